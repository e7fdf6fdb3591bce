"""A value with its interval, as plain values and as text. Read next: `accumulation.py`."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lessons.chart import Point
from minift.evaluation.intervals import Score


def mean(values: Sequence[float]) -> dict[str, Any]:
    """The `value`, the ends of its 95 % `interval` (bootstrap), and `n`, of how many values it is."""
    score = Score(list(values), [1.0] * len(values))
    return {"value": score.value, "interval": list(score.interval()), "n": len(values)}


def of_runs(values: Sequence[float]) -> dict[str, Any]:
    """The median of a few runs, as `value`, and the least and the greatest of them, as `interval`.

    For so few a bootstrap interval would be too narrow. How sure this one is can be said exactly: `certainty`.
    """
    return {"value": statistics.median(values), "interval": [min(values), max(values)], "n": len(values)}


def certainty(n: int) -> float:
    """With what probability the median of all possible runs lies between the least and the greatest of `n`.

    Each run is above it or below it like a coin, and it lies outside only if all of them are on one side. Source: David
    & Nagaraja, "Order Statistics" (2003), section 7.1.
    """
    return 1 - 2 * 0.5**n


def apart(lower: dict[str, Any], higher: dict[str, Any]) -> bool:
    """Whether the whole of one interval lies below the whole of the other."""
    return bool(lower["interval"][1] < higher["interval"][0])


def shown(found: dict[str, Any], digits: int = 2) -> str:
    """A value as "0.50 [0.40, 0.60]"."""
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def point(x: float | str, found: dict[str, Any]) -> Point:
    """A value as a point of a chart."""
    return Point(x, found["value"], *found["interval"])
