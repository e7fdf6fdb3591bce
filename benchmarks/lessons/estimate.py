"""Estimate a value with its interval, as plain values and as text."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lessons.chart import Point
from minift.evaluation.intervals import Score


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean as `value`, the ends of its 95 % `interval` (bootstrap), and `n`, the number of values."""
    score = Score(list(values), [1.0] * len(values))
    ends = score.interval() or (min(values), max(values))
    return {"value": score.value, "interval": list(ends), "n": len(values)}


def of_runs(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of a few runs as `value`, and their minimum and maximum as `interval`.

    For so few runs a bootstrap interval would be too narrow. `certainty` gives the exact confidence of this one.
    """
    return {"value": statistics.median(values), "interval": [min(values), max(values)], "n": len(values)}


def certainty(n: int) -> float:
    """Return the probability that the median of all possible runs lies between the minimum and the maximum of `n`.

    Each run is above or below the median with probability 1/2, and the median is outside only if all runs are on one
    side. Source: David & Nagaraja, "Order Statistics" (2003), section 7.1.
    """
    return 1 - 2 * 0.5**n


def apart(lower: dict[str, Any], higher: dict[str, Any]) -> bool:
    """Return whether one interval ends below the start of the other."""
    return bool(lower["interval"][1] < higher["interval"][0])


def shown(found: dict[str, Any], digits: int = 2) -> str:
    """Format a value as "0.50 [0.40, 0.60]"."""
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def point(x: float | str, found: dict[str, Any]) -> Point:
    """Return a value as a point of a chart."""
    return Point(x, found["value"], *found["interval"])
