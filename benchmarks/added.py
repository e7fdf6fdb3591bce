"""Time functions of your own next to what minift has for the same operation: the options of `ops`, and its table.

A file to start from, and the time of what became of it:

    python -m benchmarks ops --contract norm > my_norm.py
    python -m benchmarks ops --add my_norm.py:norm --against norm
"""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contract import CONTRACTS, contract
from benchmarks.operation import Operation, Step
from benchmarks.samples import Samples
from benchmarks.timing import FEWEST
from benchmarks.user_file import check_named, split
from benchmarks.variant import Trial, WrongError
from minift.errors import InputError, did_you_mean, one_line

NOISY = 0.5  # an interval that is wider than this share of its value says nothing
BUILT_IN = ("naive", "used", "compiled")
Times = dict[str, dict[str, dict[str, Samples]]]  # by caches, by phase, by variant


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
        "in a process and a folder of its own, in turns with what minift trains with; without --against, a table for "
        "each operation that a function in the files is named as",
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help="with --rank: seconds that a file may take (60 and its share of --budget)",
    )
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
    parts = [split(place) for place in places]
    names = [name for _, name in parts]
    for place, (file, name) in zip(places, parts, strict=True):
        if any(Path(other).samefile(file) and name == known for other, known in map(split, found.values())):
            raise InputError(f"--add {one_line(place)} is given twice")
        label = name if names.count(name) == 1 and name not in BUILT_IN else f"{file.name}:{name}"
        found[one_line(place) if label in found else label] = place
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
        for place in self.places.values():
            check_named(place)
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
            mode: {
                phase: {name: samples for name, samples in sides.items() if name not in self.wrong}
                for phase, sides in phases.items()
            }
            for mode, phases in times.items()
        }

    def _refuse(self, label: str, error: WrongError) -> None:
        self.wrong[label] = str(error)
        print(f"{label}: wrong: {error}; it gets no time", flush=True)

    def table(self, of_mode: Mapping[str, Any], times: Times) -> str:
        """Return a row for each variant and each state of the caches, and sentences on the functions that were added.

        Args:
            of_mode: by caches, the operation's record.
        """
        shown = [phase for phase in next(iter(times.values())) if phase != "backward"]
        whole = shown[-1]
        width = max(map(len, [*next(iter(times.values()))[whole], *self.operations]))
        columns = "".join(f"{phase + ' ms':>12}{'±':>5}" for phase in shown)
        lines = [f"{self.operations[0]:<{width}} {'':<4}{columns}{'share':>7}{'x naive':>9}{'x used':>8}"]
        sentences = []
        for mode, record in of_mode.items():
            of_variant = times[mode][whole]
            for name, values in record["phases"][whole]["variants"].items():
                cells = "".join(_time(record["phases"][phase]["variants"][name]) for phase in shown)
                share = values["share_of_roof"]
                cells += f"{'-' if share is None else f'{share:.2f}':>7}"
                for other, space in (("naive", 9), ("used", 8)):
                    faster = ratio(of_variant[other], of_variant[name])
                    cells += f"{'-' if faster is None else f'{faster[0]:.2f}':>{space}}"
                lines.append(f"{name:<{width}} {mode:<4}{cells}")
            for label in self.trials:
                sentences.append(f"{mode}: {sentence(label, ratio(of_variant['used'], of_variant[label]))}")
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


def ratio(slower: Samples, faster: Samples) -> tuple[float, float, float] | None:
    """Return how many times as fast: the median of the ratios by turn, and the interval that holds it in 95 %.

    None where one of the two is too short to be timed. With too few turns the interval is infinite.
    """
    if slower.median is None or faster.median is None:
        return None
    return slower.paired(faster)


def is_noisy(found: tuple[float, float, float]) -> bool:
    """Return whether the interval of a value, (value, low, high), is too wide to say anything."""
    middle, low, high = found
    return high - low > NOISY * middle


def sentence(label: str, found: tuple[float, float, float] | None) -> str:
    """Return in words whether a function is faster than what minift trains with."""
    if found is None:
        return f"{label} or used is too short to be timed: give a larger --batch-size"
    middle, low, high = found
    if not math.isfinite(high - low):
        return f"{label} is {middle:.2f} times as fast as used; an interval takes {FEWEST} turns (--repeats)"
    interval = f"in 95 % between {low:.2f} and {high:.2f}"
    if is_noisy(found):
        return f"too noisy to tell: {label} is {middle:.2f} times as fast as used, {interval}"
    if low > 1 or high < 1:
        return f"{label} is {middle:.2f} times as fast as used, {interval}"
    return f"whether {label} is faster than used is undecided: {middle:.2f} times as fast, {interval}"


def _time(variant: Mapping[str, Any]) -> str:
    """Format the median, and how far its interval reaches as a share of it."""
    middle, interval = variant["seconds"]["median"], variant["interval"]
    if (least := variant["least_seconds"]) is not None:
        return f"{f'< {1e3 * least:.3g}':>12}{'-':>5}"
    reach = f"{min(9.99, max(interval[1] - middle, middle - interval[0]) / middle):.0%}" if interval else "-"
    return f"{1e3 * middle:>12.4g}{reach:>5}"
