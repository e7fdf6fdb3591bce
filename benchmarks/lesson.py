"""Run an experiment for a lesson: it prints a table, draws a chart, and states a conclusion.

    python -m benchmarks lesson accumulation
    python -m benchmarks lesson how-many --plot how-many.png

Each takes less than five minutes on two cores. The conclusion is computed from the measurements; where the numbers do
not show an effect, it says so.
"""

import argparse
import textwrap
import time
from typing import Any, Protocol

from benchmarks import arguments, record
from benchmarks.lessons import accumulation, forgetting, how_many, knowledge, leakage, precision
from benchmarks.lessons.chart import Chart


class Lesson(Protocol):
    """The interface of a module in `lessons/`. The first line of the module's docstring is its help text."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this lesson, including `--seed`; the defaults are its full size."""

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """Do the experiment. Return plain values for the JSON."""

    def table(self, result: dict[str, Any]) -> str:
        """Return the numbers as a table of text."""

    def chart(self, result: dict[str, Any]) -> Chart:
        """Return the chart."""

    def conclusion(self, result: dict[str, Any]) -> str:
        """State in a few sentences what these numbers show, not what they were expected to show."""


LESSONS: dict[str, Lesson] = {
    "accumulation": accumulation,
    "leakage": leakage,
    "precision": precision,
    "knowledge": knowledge,
    "how-many": how_many,
    "forgetting": forgetting,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each lesson, with its options."""
    names = parser.add_subparsers(dest="lesson", metavar="NAME", required=True)
    for name, lesson in LESSONS.items():
        text = (lesson.__doc__ or "").splitlines()[0]
        one = names.add_parser(name, help=text, description=text)
        lesson.add_arguments(one)
        one.add_argument("--plot", metavar="FILE", help="draw the picture to a .png, too")
        arguments.add_json(one)


def run(options: argparse.Namespace) -> None:
    """Do one experiment; print its table, its chart and its conclusion."""
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
