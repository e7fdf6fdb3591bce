"""Experiments for a lesson: each prints a table, draws a picture, and states what to conclude.

    python -m benchmarks lesson accumulation
    python -m benchmarks lesson how-many --plot how-many.png

Each takes less than five minutes on two cores. What it concludes is worked out from what it has measured; where the
numbers do not show it, it says so. Read next: `lessons/chart.py`.
"""

import argparse
import textwrap
import time
from typing import Any, Protocol

from benchmarks import arguments, record
from benchmarks.lessons import accumulation, forgetting, how_many, knowledge, leakage, precision
from benchmarks.lessons.chart import Chart


class Lesson(Protocol):
    """What a module in `lessons/` has. Its docstring's first line is what `--help` says of it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of this lesson, `--seed` among them; the defaults are its full size."""

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """Do the experiment. Returns plain values: what goes into the JSON."""

    def table(self, result: dict[str, Any]) -> str:
        """The numbers, for the eye."""

    def chart(self, result: dict[str, Any]) -> Chart:
        """The picture."""

    def conclusion(self, result: dict[str, Any]) -> str:
        """What these numbers say, in a few sentences; not what they were expected to say."""


LESSONS: dict[str, Lesson] = {
    "accumulation": accumulation,
    "leakage": leakage,
    "precision": precision,
    "knowledge": knowledge,
    "how-many": how_many,
    "forgetting": forgetting,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The lessons, each with its options."""
    names = parser.add_subparsers(dest="lesson", metavar="NAME", required=True)
    for name, lesson in LESSONS.items():
        text = (lesson.__doc__ or "").splitlines()[0]
        one = names.add_parser(name, help=text, description=text)
        lesson.add_arguments(one)
        one.add_argument("--plot", metavar="FILE", help="draw the picture to a .png, too")
        arguments.add_json(one)


def run(options: argparse.Namespace) -> None:
    """Do one experiment; print its table, its picture and its conclusion."""
    arguments.check_plot(options.plot)
    lesson = LESSONS[options.lesson]
    start = time.perf_counter()
    found = lesson.measure(options)
    result = {
        "benchmark": f"lesson {options.lesson}",
        **record.environment(),
        "seconds": time.perf_counter() - start,
        **found,
        "conclusion": lesson.conclusion(found),
    }
    print(f"{lesson.table(result)}\n\n{lesson.chart(result).text()}\n\n{textwrap.fill(result['conclusion'], 110)}")
    if options.plot:
        lesson.chart(result).draw(options.plot)
    record.write(options.json, result)
