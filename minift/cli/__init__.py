"""The command line: one subcommand for each job. It parses, calls, and prints; nothing is decided here.

    minift finetune                                      # the bundled base on the bundled pairs
    minift generate --model runs/finetune/final --prompt "What is the capital of Mexico?"

Training's flags are made from the fields of `TrainConfig`, so they cannot drift apart. Exit codes: 0 done; 2 wrong
input, with one line that names the culprit; 1 anything else. Modules that need torch are imported by the command that
uses them, so `--help` answers at once.
"""

import argparse
import errno
import sys
from collections.abc import Sequence

from minift import __version__
from minift.cli.data import add_data, add_tokenizer
from minift.cli.explain import add_explain
from minift.cli.models import add_compare, add_convert, add_evaluate, add_generate, add_info
from minift.cli.parts import Parser
from minift.cli.streams import open_streams
from minift.cli.train import add_finetune, add_pretrain
from minift.errors import InputError, RunError, is_out_of_memory, one_line, out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; see the module's text."""
    open_streams()
    try:
        options = vars(_parser().parse_args(argv))
        code: int = options.pop("run")(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"minift: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"minift: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minift: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        return 0
    except (MemoryError, OSError, RuntimeError) as error:  # … a full disk, a file that may not be read
        if is_out_of_memory(error):
            print(f"minift: error: {out_of_memory(error)}; a smaller model, or less data, needs less", file=sys.stderr)
        elif isinstance(error, OSError):
            print(f"minift: error: {one_line(error)}", file=sys.stderr)
            if error.errno == errno.ENAMETOOLONG:  # a name that no disk takes was somebody's input
                return 2
        else:
            raise
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minift", description="Finetune a Llama, every step explicit.")
    parser.add_argument("--version", action="version", version=f"minift {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_finetune(commands)
    add_pretrain(commands)
    add_generate(commands)
    add_compare(commands)
    add_evaluate(commands)
    add_explain(commands)
    add_convert(commands)
    add_info(commands)
    add_tokenizer(commands)
    add_data(commands)
    return parser
