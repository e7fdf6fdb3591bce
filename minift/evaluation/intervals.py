"""Say how sure a score is: bootstrap intervals, of one model's score and of the difference of two.

A test set is a sample: with other questions the score would have been another. The bootstrap asks how different, by
drawing new test sets from the one there is, of the same size and with replacement, and scoring each. The middle 95 % of
those scores is the interval. The smaller the set, the wider the interval. Where all items agree the interval has no
width, which says nothing about items that were never asked.

Two models are compared on the same questions, so they are scored on the same draws: hard questions are hard for both,
and cancel in the difference. An interval of the difference that contains 0 says: this set cannot tell the two apart.

All scores here are a sum over the items divided by a sum over the items: matches by questions, and for perplexity nats
by targets, of which the exponential is taken.

    minift compare bundled runs/finetune/final --data data/test.jsonl

Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), sections 13.3 (percentiles) and 8.3 (pairs).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
LEVEL = 0.95
DRAWN_AT_ONCE = 2**20  # items
LARGEST_EXPONENT = 700.0  # e⁷⁰⁰ is near the largest float64; a model with such a loss is far worse than chance
_Numbers = NDArray[np.float64]


def _identity(ratio: _Numbers) -> _Numbers:
    return ratio


def exponential(ratio: _Numbers) -> _Numbers:
    """Return e to the power of each ratio: of a mean loss, the perplexity. It stays finite."""
    return np.exp(np.minimum(ratio, LARGEST_EXPONENT))


@dataclass(frozen=True)
class Score:
    """A score of some items: `finish` of the sum of `parts` divided by the sum of `wholes`.

    Attributes:
        parts, wholes: a number of each item, in the same order for all models.
        finish: the function from the ratio to the score.
    """

    parts: Sequence[float]
    wholes: Sequence[float]
    finish: Callable[[_Numbers], _Numbers] = _identity

    @property
    def value(self) -> float:
        """Return the score. The sums are exact, so that it does not depend on the items' order."""
        return float(self.finish(np.array(math.fsum(self.parts) / (math.fsum(self.wholes) or 1.0))))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Return the lower and the upper end of the score's 95 % interval."""
        return _middle(_resampled([self], seed)[0])


def difference(before: Score, after: Score, seed: int = 0) -> dict[str, float]:
    """Return `value`, after minus before, and the `low` and `high` end of its 95 % interval, on paired draws."""
    assert len(before.parts) == len(after.parts)
    old, new = _resampled([before, after], seed)
    low, high = _middle(new - old)
    return {"value": after.value - before.value, "low": low, "high": high}


def score_values(scores: Mapping[str, Score | None]) -> dict[str, Any]:
    """Return scores as plain numbers, and their `intervals`, each [low, high]."""
    return {
        **{name: None if score is None else score.value for name, score in scores.items()},
        "intervals": {name: list(score.interval()) for name, score in scores.items() if score is not None},
    }


def _resampled(scores: Sequence[Score], seed: int) -> list[_Numbers]:
    """Return DRAWS values of each score, all scores on the same draws."""
    columns = [np.asarray(numbers, dtype=np.float64) for score in scores for numbers in (score.parts, score.wholes)]
    items, random = np.stack(columns, axis=1), np.random.default_rng(seed)  # [n, 2 * scores]
    n = len(items)
    at_once = max(1, DRAWN_AT_ONCE // n)
    sums = np.concatenate(
        [
            items[random.integers(n, size=(min(at_once, DRAWS - done), n))].sum(axis=1)
            for done in range(0, DRAWS, at_once)
        ]
    )  # [DRAWS, 2 * scores]
    wholes = np.where(sums[:, 1::2] == 0, 1.0, sums[:, 1::2])
    return [score.finish(sums[:, 2 * i] / wholes[:, i]) for i, score in enumerate(scores)]


def _middle(values: _Numbers) -> tuple[float, float]:
    """Return the ends of the middle LEVEL of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
