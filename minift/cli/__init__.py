"""The command line: one subcommand for each job. It parses words, calls a function of the library, and prints.

commands.py   the parser of all commands
train.py      minift finetune, minift pretrain
models.py     minift generate, compare, evaluate, convert, info
chat.py       minift chat
explain.py    minift explain
data.py       minift tokenizer, minift data
parts.py      what the commands share: flags, loading a model, writing a result
streams.py    standard output that is closed, full, or a pipe without a reader

    minift finetune                                      # the bundled base on the bundled pairs
    minift generate --model runs/finetune/final --prompt "What is the capital of Mexico?"

Exit codes: 0 done; 2 wrong input, with one line that names it; 1 anything else. Modules that need torch are imported by
the command that uses them, so `--help` answers at once.
"""

import errno
import sys
from collections.abc import Sequence

from minift.cli.commands import make_parser
from minift.cli.parts import check_outputs
from minift.cli.streams import open_streams
from minift.errors import InputError, RunError, is_out_of_memory, one_line, out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    open_streams()
    try:
        options = vars(make_parser().parse_args(argv))
        run = options.pop("run")
        check_outputs(options)
        code: int = run(options)
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
    except BrokenPipeError:  # the reader of standard output has left (`| head`)
        return 0
    except (MemoryError, OSError, RuntimeError) as error:  # a full disk, a file that may not be read, …
        if is_out_of_memory(error):
            print(f"minift: error: {out_of_memory(error)}; a smaller model, or less data, needs less", file=sys.stderr)
        elif isinstance(error, OSError):
            print(f"minift: error: {one_line(error)}", file=sys.stderr)
            if error.errno == errno.ENAMETOOLONG:  # the name came from the user
                return 2
        else:
            raise
        return 1
