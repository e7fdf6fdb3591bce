"""The parser of the command line, with all commands in it."""

import argparse

from minift import __version__
from minift.cli.chat import add_chat
from minift.cli.data import add_data, add_tokenizer
from minift.cli.explain import add_explain
from minift.cli.models import add_compare, add_convert, add_evaluate, add_generate, add_info
from minift.cli.parts import Parser
from minift.cli.train import add_finetune, add_pretrain

DESCRIPTION = """\
Finetune a Llama on next-token prediction, with every step explicit.

Try it: minift finetune
trains the bundled base on the bundled pairs, and shows its answers before and after.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser. Its result has `run`, a function that takes the other options and returns an exit code."""
    parser = Parser(prog="minift", description=DESCRIPTION, epilog="`minift COMMAND --help` describes a command.")
    parser.add_argument("--version", action="version", version=f"minift {__version__}", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_finetune(commands)
    add_pretrain(commands)
    add_generate(commands)
    add_chat(commands)
    add_compare(commands)
    add_evaluate(commands)
    add_explain(commands)
    add_convert(commands)
    add_info(commands)
    add_tokenizer(commands)
    add_data(commands)
    return parser
