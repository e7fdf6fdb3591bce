"""Time calls in turns until their medians are known, and leave out the turns in which the machine was disturbed.

The speed of a machine changes from one second to the next. So what is compared is measured in turns, in an order that
is reversed each time, and the median counts. The first calls warm up caches, allocators and compilers, and do not
count. A short call is repeated within a sample, or the clock's own cost would count.

How many turns? As many as it takes until the true median is known within 2 % with 95 % confidence (`samples.py`), or
until the time that is allowed is over; a result says which. The samples of a moment are alike, because the machine was,
and not because the median is known; so turns go on for half a second at least.

The other parts: how a time is read (`timers.py`), with which caches (`cold.py`), what is too short (`floor.py`), and
what the machine did meanwhile (`watch.py`).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from benchmarks import cold, floor, timers
from benchmarks.samples import Sample, Samples, median_interval
from benchmarks.timers import Timer, seconds_a_call, wait_for
from benchmarks.watch import WINDOW, Reading, Watch

__all__ = ["in_turn_order", "in_turns", "paired_ratio", "seconds_a_call", "wait_for"]

BUDGET = 5.0  # seconds of turns, unless another budget or a number of turns is asked for
PRECISION = 0.02  # of a median: as much as two times may differ and be called the same
FEWEST = 6  # turns: with fewer, a median has no interval of 95 %
LEAST = WINDOW  # seconds of turns: with fewer, nothing is known about the machine either
ATTEMPTS = 3  # at a sample: if another process takes a core away in each, the turn is marked
LOOKS = 10  # the medians are looked at again when there are a tenth more turns: each look is a chance to stop too early


class Watcher(Protocol):
    """Tells what the machine did; `watch.Watch` or a test's."""

    def read(self) -> Reading:
        """Return what the machine says now."""

    def marks(self, readings: Sequence[Reading]) -> list[tuple[str, ...]]:
        """Return why each turn is left out; there is a reading before the first turn and one after each."""

    def interruptions(self) -> int:
        """Return how often another process has taken a core from this one."""


@dataclass
class _Side:
    """A side of a comparison, and the samples so far."""

    call: Callable[[], object]
    timer: Timer
    calls: int
    caches: str
    before: Callable[[], object]
    floor: float
    samples: list[Sample] = field(default_factory=list)

    def sample(self, turn: int, interruptions: Callable[[], int]) -> bool:
        """Take a sample, and take it again if another process took a core away. Return whether one did each time.

        Only the last attempt is kept: a slice of another process, some milliseconds, says nothing about the call.
        """
        for _ in range(ATTEMPTS):
            before, at = interruptions(), time.time()
            seconds = self.timer.seconds(self.call, self.calls, self.before)
            interrupted = interruptions() != before
            if not interrupted:
                break
        self.samples.append(Sample(at, seconds, self.calls, turn))
        return interrupted

    def marked(self, marks: Sequence[tuple[str, ...]]) -> list[Sample]:
        return [replace(sample, marks=marks[sample.turn]) for sample in self.samples]


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int | None = None,
    *,
    budget: float | None = None,
    precision: float = PRECISION,
    warmup: int = 2,
    device: str = "cpu",
    timer: str = "wall",
    caches: str | Mapping[str, str] = "warm",
    clock: Callable[[], float] = time.perf_counter,
    watch: Watcher | None = None,
) -> dict[str, Samples]:
    """Return the samples of each side, one in each turn.

    Args:
        sides: what to call, by name.
        repeats: the number of turns. Without it there are as many as `precision` needs and `budget` allows.
        budget: seconds of turns, BUDGET by default. At least one turn is measured; none begins that would end later.
        precision: turns end when each side's median has an interval of 95 % within this share of it.
        warmup: calls of each that do not count.
        device: the kind of device that does the work, "cpu" or "cuda".
        timer: of `timers.NAMES`. A side that it cannot time is timed in the way before; its samples say which.
        caches: of `cold.MODES`, for all sides or by name. Where both are in use, a cold sample has emptied the caches
            for the next side; so a warm one begins with a call that does not count.
        clock: returns seconds; tests replace it.
        watch: tells what the machine did; by default `watch.Watch`.
    """
    modes = {name: caches if isinstance(caches, str) else caches[name] for name in sides}
    mixed = len(set(modes.values())) > 1
    watch = watch or Watch(device)
    measured: dict[str, _Side] = {}
    for name, call in sides.items():
        for _ in range(warmup):
            call()
        chosen, calls = timers.choose(timer, device, call, clock)
        calls = 1 if modes[name] == "cold" else calls
        before = call if mixed and modes[name] == "warm" else cold.before(modes[name], device)
        least = floor.measure(chosen.name, device, modes[name], clock).seconds(calls)
        measured[name] = _Side(call, chosen, calls, modes[name], before, least)
    budget = BUDGET if budget is None else budget
    stopped, marks = _take_turns(measured, repeats, budget, precision, clock, watch)
    return {
        name: Samples(name, side.timer.name, side.caches, tuple(side.marked(marks)), stopped, side.floor)
        for name, side in measured.items()
    }


def _take_turns(
    sides: Mapping[str, _Side],
    repeats: int | None,
    budget: float,
    precision: float,
    clock: Callable[[], float],
    watch: Watcher,
) -> tuple[str, list[tuple[str, ...]]]:
    """Measure turns until a rule stops them. Return its name, and the marks of each turn."""
    readings, start, turn, look = [watch.read()], clock(), 0, FEWEST
    interrupted: list[bool] = []

    def marks_of_turns() -> list[tuple[str, ...]]:
        return with_interrupted(watch.marks(readings), interrupted)

    while True:
        sampled = [sides[name].sample(turn, watch.interruptions) for name in in_turn_order(list(sides), turn)]
        interrupted.append(any(sampled))
        readings.append(watch.read())
        turn, spent = turn + 1, clock() - start
        if repeats is not None:
            if turn >= repeats:
                return "repeats", marks_of_turns()
            continue
        if turn >= look and spent >= LEAST:
            look = turn + max(1, turn // LOOKS)
            marks = marks_of_turns()
            if all(is_narrow(side.marked(marks), precision) for side in sides.values()):
                return "narrow", marks
        if spent + spent / turn > budget:
            return "budget", marks_of_turns()


def with_interrupted(marks: Sequence[tuple[str, ...]], interrupted: Sequence[bool]) -> list[tuple[str, ...]]:
    """Return the marks of turns, with "other load" for those that were interrupted.

    Where that is more than half of the turns it is usual, and of fewer than FEWEST it is not known what is usual.
    """
    if len(interrupted) < FEWEST or sum(interrupted) > len(interrupted) / 2:
        return list(marks)
    pairs = zip(marks, interrupted, strict=True)
    return [(*of, "other load") if now and "other load" not in of else of for of, now in pairs]


def is_narrow(samples: Sequence[Sample], precision: float) -> bool:
    """Return whether the median of the samples that count is known within this share of it."""
    seconds = [sample.seconds for sample in samples if not sample.marks]
    if len(seconds) < FEWEST:
        return False
    middle, (low, high) = statistics.median(seconds), median_interval(seconds)
    return high - middle <= precision * middle and middle - low <= precision * middle


def in_turn_order(names: Sequence[str], turn: int) -> Sequence[str]:
    """Return the names in the order of a turn: reversed in every second one, so that none is always the first."""
    return names if turn % 2 == 0 else names[::-1]


def paired_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return how many times as fast: the median of the ratios by turn, as another load in a turn slowed both sides."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
