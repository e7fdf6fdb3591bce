"""Run one benchmark, `python -m benchmarks NAME [options]`; without a name, run a quick tour.

Exit codes: 0 done; 1 the benchmark found something, such as `compare` that a row is slower; 2 it could not be done, for
wrong input or a full disk, with one line that says why; 130 Ctrl-C or SIGTERM; 141 the reader of its output has left.
"""

import argparse
import ast
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from benchmarks import tour
from benchmarks.words import Parser
from minift.cli.streams import open_streams
from minift.errors import InputError, RunError, one_line
from minift.runs.stop import handled_by

INTERRUPTED, NO_READER = 130, 141  # as a shell reports a program that SIGINT, or SIGPIPE, has ended

NAMES = (
    *("load", "data", "stream", "packing", "audit", "ops", "attention", "loss", "ladder", "peers", "step", "profile"),
    *("memory", "roofs", "generate", "lora", "defaults", "scale", "soak", "lesson"),
    *("card", "compare", "alike", "tables"),
)

READING = ("tables", "compare")  # results; and `compare --commits` reads the time that a process had a core


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
    """Run one benchmark, or the tour. Return the exit code; all but a defect is reported in one line."""
    open_streams()
    words = sys.argv[1:]
    code = 0
    try:
        with interrupted_by_signals():
            if words:
                code = run(words)
            else:
                tour.take(run, NAMES)
            sys.stdout.flush()
    except (InputError, RunError) as error:
        print(f"benchmarks: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`
        return NO_READER
    except OSError as error:  # a full disk, a file that may not be read, …
        print(f"benchmarks: error: {one_line(error)}", file=sys.stderr)
        return 2
    return code


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end all processes that this one has started, and raise KeyboardInterrupt in the block.

    Who waits for such a process waits no longer then.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for pid in descendants():
            with suppress(OSError):  # `multiprocessing` ends its own, and warns of those that are ended for it
                if b"multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)
        raise KeyboardInterrupt

    with handled_by(interrupt):
        yield


def descendants(parent: int | None = None) -> list[int]:
    """Return the processes that this one (or `parent`) has started, and those that they have; none without /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()  # its name may have spaces
            parents[int(folder.name)] = int(words[1])
    found = [os.getpid() if parent is None else parent]
    for pid in found:  # which grows
        found += [child for child, its_parent in parents.items() if its_parent == pid]
    return found[1:]


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
    if options.name not in READING and (busy := hardware.busy_in_words(before)):
        print(busy, file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only be a traceback while Python ends
    sys.exit(code)
