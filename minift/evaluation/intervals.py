"""Say how sure a score is: intervals of one model's score and of the difference of two.

A test set is a sample: with other questions the score would have been another. The bootstrap asks how different, by
drawing new test sets from the one there is, of the same size and with replacement, and scoring each. The middle 95 % of
those scores is the interval. The smaller the set, the wider the interval.

Where all items agree, every draw gives the same score, and an interval without width would promise that no other item
could differ. So a *proportion*, the share of items that are right, has Wilson's interval, which is computed from the
count alone: of 228 right answers to 228 questions it is [0.983, 1.000].

Two models are compared on the same questions, so they are scored on the same draws: hard questions are hard for both,
and cancel in the difference. An interval of the difference that contains 0 says: this set cannot tell the two apart.
The difference of two proportions has Newcombe's interval, which takes from the pairs how far both models go together.

All scores here are a sum over the items divided by a sum over the items: matches by questions, and for perplexity nats
by targets, of which the exponential is taken.

    minift compare bundled runs/finetune/final --data data/test.jsonl

Sources: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), sections 13.3 (percentiles) and 8.3 (pairs);
Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", J. Am. Stat. Assoc. 22 (1927) 209;
Newcombe, "Improved Confidence Intervals for the Difference between Binomial Proportions Based on Paired Data",
Statistics in Medicine 17 (1998) 2635, method 10.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
LEVEL = 0.95
FEWEST = 3  # items that must agree before an interval without width is given
Z = 1.959963984540054  # the quantile (1 + LEVEL) / 2 of the normal distribution
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
        is_share: whether each part is a share of its whole, from none of it to all of it.
    """

    parts: Sequence[float]
    wholes: Sequence[float]
    finish: Callable[[_Numbers], _Numbers] = _identity
    is_share: bool = False

    @property
    def value(self) -> float:
        """Return the score. The sums are exact, so that it does not depend on the items' order."""
        return float(self.finish(np.array(math.fsum(self.parts) / (math.fsum(self.wholes) or 1.0))))

    @property
    def right(self) -> list[bool] | None:
        """Return which items are right, where each is right or wrong and all count alike; None for another score.

        Items that have several targets each count alike where all of them are right, or all wrong.
        """
        items = list(zip(self.parts, self.wholes, strict=True))
        if not self.is_share or any(whole <= 0 or part not in (0, whole) for part, whole in items):
            return None
        right = [part == whole for part, whole in items]
        return right if len(set(self.wholes)) == 1 or len(set(right)) == 1 else None

    def interval(self, seed: int = 0) -> tuple[float, float] | None:
        """Return the lower and the upper end of the score's 95 % interval; None where the items cannot tell one.

        A mean of shares, none of which is above 1, varies at most as a proportion does: where all items agree, it has
        that one's interval.
        """
        if (right := self.right) is not None:
            return wilson(sum(right), len(right))
        low, high = _middle(_resampled([self], seed)[0])
        n = len(self.parts)
        if low == high and self.is_share:
            return wilson(self.value * n, n)
        return (low, high) if low < high or n >= FEWEST else None


def difference(before: Score, after: Score, seed: int = 0) -> dict[str, float | None]:
    """Return `value`, after minus before, and the `low` and `high` end of its 95 % interval, None where `interval` is.

    Two proportions have Newcombe's interval; other scores are computed on the same draws.
    """
    assert len(before.parts) == len(after.parts)
    old_right, new_right = before.right, after.right
    if old_right is not None and new_right is not None:
        low, high = newcombe(old_right, new_right)
    else:
        old, new = _resampled([before, after], seed)
        low, high = _middle(new - old)
    ends: tuple[float | None, float | None] = (low, high)
    few = before.is_share or len(before.parts) < FEWEST
    if low == high and few and (before.parts, before.wholes) != (after.parts, after.wholes):
        ends_before, ends_after = before.interval(seed), after.interval(seed)
        ends = (None, None)
        if before.is_share and after.is_share and ends_before and ends_after:
            ends = _joined(before.value, ends_before, after.value, ends_after)
    return {"value": after.value - before.value, "low": ends[0], "high": ends[1]}


def wilson(right: float, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of a proportion: `right` of `n` items.

    These are the proportions p from which the found one is no more than Z standard errors √(p (1 − p) / n) away. Unlike
    the error of the found proportion, which is 0 where all items agree, theirs is not.
    """
    z2, p = Z * Z, right / n
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if right == 0 else middle - margin), (1.0 if right == n else middle + margin)


def newcombe(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Return the ends of Newcombe's 95 % interval of the share that is right after, less the share before.

    The distances from each proportion to the ends of its own Wilson interval are put together as the sides of a
    triangle; the cosine of their angle is the correlation φ of the two models, made smaller where it is positive (the
    method's correction for continuity).
    """
    n = len(before)
    both, gained, lost = (
        sum(pair == kind for pair in zip(before, after, strict=True))
        for kind in ((True, True), (False, True), (True, False))
    )
    neither = n - both - gained - lost
    old, new = both + lost, both + gained
    margins = old * (n - old) * new * (n - new)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(0.0, product - n / 2)
    phi = product / math.sqrt(margins) if margins else 0.0
    return _joined(old / n, wilson(old, n), new / n, wilson(new, n), phi)


def _joined(
    old: float, old_ends: tuple[float, float], new: float, new_ends: tuple[float, float], phi: float = 0.0
) -> tuple[float, float]:
    """Return the ends of the interval of `new` - `old`, of those of both, whose correlation is `phi`."""
    down, up = (new - new_ends[0], old_ends[1] - old), (new_ends[1] - new, old - old_ends[0])
    low, high = (math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (down, up))
    return max(-1.0, new - old - low), min(1.0, new - old + high)


def score_values(scores: Mapping[str, Score | None]) -> dict[str, Any]:
    """Return scores as plain numbers, and their `intervals`, each [low, high], of those that have one."""
    ends = {name: score.interval() for name, score in scores.items() if score is not None}
    return {
        **{name: None if score is None else score.value for name, score in scores.items()},
        "intervals": {name: list(pair) for name, pair in ends.items() if pair is not None},
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
