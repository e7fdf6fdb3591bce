"""Keep what a timer read: every sample in order, why some are left out, and how sure the median is.

A median without its samples cannot be checked by anyone. So a result holds all of them, with the time of day at which
each began, and those that are left out too, each with the reason. The reason is what the machine did (`watch.py`),
never the time itself: to leave out samples because they are slow would make every result look better than it is.

Times have no normal distribution: they have a least value and a long tail. So the intervals here are between two of
the samples themselves, and hold for every distribution. Of n independent values, the number below the true median is
binomial, B(n, 1/2). So the true median is between the l-th smallest and the l-th largest value, unless fewer than l
values are on one side of it, which that distribution gives. Six values are the fewest with 95 %: the chance that all
are on one side is 2 / 2**6.

Source: David and Nagaraja, "Order Statistics" (3rd edition, 2003), section 7.1.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MARKS = ("clock", "throttled", "temperature", "stolen", "other load")  # the reasons why a sample is left out
AT = (0.05, 0.25, 0.5, 0.75, 0.95)  # the quantiles of a record


@dataclass(frozen=True)
class Sample:
    """One reading of a timer.

    Attributes:
        at: the time of day when it began, seconds since the epoch.
        seconds: of one call, the mean over its `calls`.
        calls: how many calls in a row it lasted.
        turn: the number of its turn, from 0.
        marks: why it is left out, of MARKS; a sample without marks counts.
    """

    at: float
    seconds: float
    calls: int
    turn: int
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """All samples of one side of a comparison.

    A turn that is left out for one side is left out for all: `timing.in_turns` marks the samples of all sides in it. So
    the lists `seconds` of the sides of a comparison have the same turns in the same order.

    Attributes:
        name: of the side.
        timer: what read the time: "wall", "events" or "graph" (`timers.py`).
        caches: "warm" or "cold" (`cold.py`).
        samples: all, in order, those with marks too.
        stopped: why sampling ended: "narrow" (the median is known as precisely as asked), "budget" or "repeats".
        floor: seconds: three times what the clock, an empty call and an empty kernel cost (`floor.py`).
    """

    name: str
    timer: str
    caches: str
    samples: tuple[Sample, ...]
    stopped: str
    floor: float

    @property
    def seconds(self) -> list[float]:
        """Return the seconds of a call in each turn that counts, in order."""
        return [sample.seconds for sample in self.samples if not sample.marks]

    @property
    def median(self) -> float | None:
        """Return the median seconds of a call; None below the floor, where the timer would measure itself."""
        seconds = self.seconds
        middle = statistics.median(seconds) if seconds else math.nan
        return middle if middle >= self.floor else None

    @property
    def left_out(self) -> dict[str, int]:
        """Return how many samples have each mark."""
        return dict(Counter(mark for sample in self.samples for mark in sample.marks))

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a record; `from_dict` reads them."""
        return {
            "timer": self.timer,
            "caches": self.caches,
            "stopped": self.stopped,
            "floor_seconds": self.floor,
            "left_out": self.left_out,
            "quantiles": {str(share): one for share, one in quantiles(self.seconds).items()},
            "samples": [[one.at, one.seconds, one.calls, one.turn, list(one.marks)] for one in self.samples],
        }

    def minus(self, other: "Samples") -> "Samples":
        """Return, for each turn, what these samples take longer than another side's in the same turn."""
        pairs = zip(self.samples, other.samples, strict=True)
        rest = tuple(replace(one, seconds=one.seconds - less.seconds) for one, less in pairs)
        return replace(self, name=f"{self.name} - {other.name}", samples=rest, floor=max(self.floor, other.floor))

    def paired(self, other: "Samples") -> tuple[float, float, float]:
        """Return how many times as long a call takes as one of another side: the median by turn, and its interval."""
        ratios = [one / less for one, less in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), *median_interval(ratios)

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> "Samples":
        """Return the samples that `to_dict` wrote."""
        samples = tuple(
            Sample(at, seconds, calls, turn, tuple(marks)) for at, seconds, calls, turn, marks in values["samples"]
        )
        return cls(name, values["timer"], values["caches"], samples, values["stopped"], values["floor_seconds"])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the two values between which the true median is; without limits where there are too few values."""
    return quantile_interval(values, 0.5, confidence) or (-math.inf, math.inf)


def quantile_interval(values: Sequence[float], at: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the two values between which the true quantile is; None where there are too few values.

    The chance that it is below the first, or above the second, is at most half of what `confidence` leaves, each.

    Args:
        values: independent, of one distribution, in any order.
        at: the share of the distribution below the quantile, between 0 and 1.
    """
    n, tail = len(values), (1 - confidence) / 2
    below = 0.0  # the chance that at most `rank` of the values are below the quantile
    lower, upper = -1, n
    for rank in range(n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)  # the logarithm of n over rank
        below += math.exp(ways + rank * math.log(at) + (n - rank) * math.log1p(-at))
        if below <= tail:
            lower = rank  # values from 0 on: this one is above the quantile when at most `rank` are below it
        if below >= 1 - tail:
            upper = rank  # at most `tail` is the chance that more than `rank` are below
            break
    if lower < 0 or upper >= n:
        return None
    in_order = sorted(values)
    return in_order[lower], in_order[upper]


def quantiles(values: Sequence[float], at: Sequence[float] = AT) -> dict[float, dict[str, Any]]:
    """Return each quantile as {"value", "interval"}; the interval is None where there are too few values for it.

    A quantile between two values is interpolated, as by numpy. Of no values there are none.
    """
    in_order, found = sorted(values), {}
    for share in at if in_order else ():
        place = share * (len(in_order) - 1)
        one = in_order[math.floor(place)]
        value = one + (in_order[math.ceil(place)] - one) * (place % 1)
        interval = quantile_interval(values, share)
        found[share] = {"value": value, "interval": None if interval is None else list(interval)}
    return found
