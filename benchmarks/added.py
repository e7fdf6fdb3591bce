"""Time functions of your own next to what minift has for the same operation: the options of `ops`, and its table.

python -m benchmarks ops --contract norm > my_norm.py
python -m benchmarks ops --add my_norm.py:norm --against norm
"""

import argparse
import dataclasses
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contract import CONTRACTS, contract
from benchmarks.operation import Operation, Step
from benchmarks.samples import median_interval
from benchmarks.user_file import split
from benchmarks.variant import Trial, WrongError
from minift.errors import InputError, did_you_mean, one_line

BUILT_IN = ("naive", "used", "compiled")
TURNS = 6  # fewer give no interval
Times = dict[str, dict[str, list[float]]]  # by phase, by variant: seconds in each turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for functions of one's own."""
    group = parser.add_argument_group(
        "functions of your own",
        "Times a function of yours next to minift's, after its values and gradients were held against the formula. "
        "--contract says what it gets and returns. A wrong one gets its error and no time, and the exit code is 1. "
        "A file that is named here is run, as your own program: name only files that you would run.",
    )
    group.add_argument("--contract", metavar="OPERATION", help="print a file to start from, and end")
    group.add_argument("--add", action="append", metavar="FILE.py:NAME", help="a function; may be given several times")
    group.add_argument("--against", metavar="OPERATION", help="what it computes: of " + ", ".join(CONTRACTS))
    group.add_argument(
        "--rank",
        metavar="DIR",
        help="a table of the files in DIR by the speed of their functions that are named as the operation; each is run "
        "in a process of its own, in turns with what minift trains with",
    )
    group.add_argument("--limit", type=float, metavar="S", help="with --rank: seconds that a file may take (60)")
    group.add_argument(
        "--memory", type=float, metavar="GB", help="with --rank: memory that a file may take (half of what is free)"
    )


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, or name what is not there."""
    if options.add and options.rank:
        raise InputError("--add times functions next to each other, --rank makes a table of a folder: give one of them")
    if options.against and not (options.add or options.rank):
        raise InputError("--against is for --add and --rank; to time one operation of minift, give --only")
    for name in ("limit", "memory"):
        if (value := getattr(options, name)) is not None:
            if not options.rank and not options.measure:
                raise InputError(f"--{name} is for --rank")
            if not 0 < value < math.inf:
                raise InputError(f"--{name} is {value:g}; expected a number above 0")
    if (options.add or options.rank) and (options.only or options.plot):
        name = "--only" if options.only else "--plot"
        raise InputError(f"{name} is for minift's own variants; with --add or --rank, name the operation by --against")
    if options.against:
        contract(options.against)
    elif options.add:
        name = options.add[0].rpartition(":")[2]
        meant = [one for one in CONTRACTS if one in name]
        example = f"; for {one_line(name)}, perhaps --against {meant[0]}" if meant else did_you_mean(name, CONTRACTS)
        raise InputError(f"--add needs --against OPERATION, of {', '.join(CONTRACTS)}{example}")


def named(places: Sequence[str]) -> dict[str, str]:
    """Return the functions "FILE.py:NAME" by their names in tables: NAME, with its file where two share it.

    Raises:
        InputError: when a file is not there, or a function is named twice.
    """
    found: dict[str, str] = {}
    names = [split(place)[1] for place in places]
    for place, name in zip(places, names, strict=True):
        file, _ = split(place)
        label = name if names.count(name) == 1 and name not in BUILT_IN else f"{file.name}:{name}"
        if label in found:
            label = one_line(place)
        if label in found:
            raise InputError(f"--add {one_line(place)} is given twice")
        found[label] = place
    return found


class Added:
    """The functions of `--add`, from their check to their rows.

    Attributes:
        trials: by name, those that are right so far.
        wrong: by name, the errors of the others.
    """

    def __init__(self, options: argparse.Namespace, limits: tuple[float, float]):
        check(options)
        self.places, self.limits = named(options.add or []), limits
        self.operations = [options.against] if self.places else []
        self.trials: dict[str, Trial] = {}
        self.wrong: dict[str, str] = {}

    def beside(self, name: str, operation: Operation, step: Step) -> Operation:
        """Return an operation with those functions among its variants that are right; say what is wrong with others."""
        for label, place in self.places.items():
            trial = Trial(place, name, step, operation, self.limits)
            try:
                trial.check()
            except WrongError as error:
                self._refuse(label, error)
            else:
                self.trials[label] = trial
        variants = {**operation.variants, **{label: trial.call() for label, trial in self.trials.items()}}
        early = operation.early + (tuple(self.trials) if operation.early else ())
        return dataclasses.replace(operation, variants=variants, early=early)

    def still_right(self, times: Times) -> Times:
        """Return the times without those of functions that are no longer right, after they were timed."""
        if not self.places:
            return times
        for label, trial in list(self.trials.items()):
            try:
                trial.check_again()
            except WrongError as error:
                self._refuse(label, error)
                del self.trials[label]
        return {
            phase: {name: seconds for name, seconds in sides.items() if name not in self.wrong}
            for phase, sides in times.items()
        }

    def _refuse(self, label: str, error: WrongError) -> None:
        self.wrong[label] = str(error)
        print(f"{label}: wrong: {error}; it gets no time", flush=True)

    def table(self, phases: Mapping[str, Any], times: Times) -> str:
        """Return a row for each variant, and a sentence for each function that was added.

        Args:
            phases: the operation's record by phase, with `roof_seconds`.
        """
        shown = [phase for phase in times if phase != "backward"]
        whole = times[shown[-1]]
        width = max(map(len, [*whole, *self.operations]))
        columns = "".join(f"{phase + ' ms':>12}{'±':>5}" for phase in shown)
        lines = [f"{self.operations[0]:<{width}}{columns}{'share':>7}{'x naive':>9}{'x used':>8}"]
        for variant in whole:
            cells = "".join(_time(times[phase][variant]) for phase in shown)
            share = phases[shown[-1]]["roof_seconds"] / statistics.median(whole[variant])
            faster = [ratio(whole[other], whole[variant])[0] for other in BUILT_IN[:2]]
            lines.append(f"{variant:<{width}}{cells}{share:>7.2f}{faster[0]:>9.2f}{faster[1]:>8.2f}")
        sentences = [sentence(label, *ratio(whole["used"], whole[label])) for label in self.trials]
        return "\n".join([*lines, *sentences])

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a record: each function's file and digest, and the error of a wrong one."""
        return {
            label: {**identity(split(place)[0]), **({"error": self.wrong[label]} if label in self.wrong else {})}
            for label, place in self.places.items()
        }


def identity(file: Path) -> dict[str, str]:
    """Return a file's name and digest."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """Return how many times as fast, the median over the turns, and the interval that holds the true one in 95 %."""
    ratios = [one / other for one, other in zip(slower, faster, strict=True)]
    return statistics.median(ratios), *median_interval(ratios)


def sentence(label: str, middle: float, low: float, high: float) -> str:
    """Return in words whether a function is faster than what minift trains with."""
    if not math.isfinite(high - low):
        return f"{label} is {middle:.2f} times as fast as used; an interval takes {TURNS} turns (--repeats)"
    interval = f"in 95 % between {low:.2f} and {high:.2f}"
    if low > 1 or high < 1:
        return f"{label} is {middle:.2f} times as fast as used, {interval}"
    return f"whether {label} is faster than used is undecided: {middle:.2f} times as fast, {interval}"


def _time(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds)
    around = (max(seconds) - min(seconds)) / 2 / middle
    return f"{1e3 * middle:>12.4g}{around:>5.0%}"
