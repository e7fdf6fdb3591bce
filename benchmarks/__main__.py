"""Run one benchmark, `python -m benchmarks NAME [options]`; without a name, run a quick tour."""

import argparse
import ast
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from benchmarks import tour
from benchmarks.words import Parser
from minift.errors import InputError, one_line

NAMES = (
    *("load", "data", "stream", "packing", "audit", "ops", "attention", "loss", "ladder", "peers", "step", "profile"),
    *(
        "memory",
        "roofs",
        "generate",
        "card",
        "lora",
        "defaults",
        "scale",
        "soak",
        "lesson",
        "compare",
        "alike",
        "tables",
    ),
)


class Benchmark(Protocol):
    """The interface of a module with a benchmark. The first line of its docstring is its help text."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this benchmark."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Measure, print a table and write the JSON. Return the exit code, where it is not 0."""


class Benchmarks(Mapping[str, Any]):
    """The modules of `NAMES`. Each is imported when it is asked for, because importing PyTorch takes seconds."""

    def __getitem__(self, name: str) -> Benchmark:
        if name not in NAMES:
            raise KeyError(name)
        return import_module(f"benchmarks.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


BENCHMARKS = Benchmarks()


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing it."""
    page = ast.parse((Path(__file__).parent / f"{name}.py").read_bytes())
    return (ast.get_docstring(page) or "").splitlines()[0]


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser for these words: of all benchmarks, the one that they name has its options."""
    parser = Parser(prog="python -m benchmarks", description="Measure minift. Without a NAME, run a quick tour.")
    names = parser.add_subparsers(dest="name", metavar="NAME")
    named = next((word for word in words if not word.startswith("-")), None)
    for name in NAMES:
        text = summary(name)
        one = names.add_parser(name, help=text, description=text)
        if name == named:
            BENCHMARKS[name].add_arguments(one)
    return parser


def main() -> int:
    """Run one benchmark, or the tour. Return the exit code: 2 for wrong input, which is reported in one line.

    A benchmark may have a code of its own, such as 1 where `compare` finds that something is slower.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a character that the terminal does not have is escaped
    words = sys.argv[1:]
    code = 0
    try:
        if words:
            code = run(words)
        else:
            tour.take(run, NAMES)
    except InputError as error:
        print(f"benchmarks: error: {one_line(error)}", file=sys.stderr)
        return 2
    return code


def run(words: Sequence[str]) -> int:
    """Run the benchmark that these words name. Return its exit code. Raises InputError for words that say nothing."""
    options = make_parser(words).parse_args(words)
    from benchmarks import arguments, hardware, record

    arguments.check_files(options)
    if getattr(options, "measure", None):  # a child process measures one thing, and writes no record
        return BENCHMARKS[options.name].run(options) or 0
    record.begin()
    before = hardware.Ticks.now()
    code = BENCHMARKS[options.name].run(options) or 0
    if busy := hardware.busy_in_words(before):
        print(busy, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
