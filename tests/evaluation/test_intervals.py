"""An interval is what its name says: it covers the truth about as often as 95 %, and pairs sharpen a difference.

Held here: scores against plain sums; intervals against the formula of the standard error, and by simulation; the
difference of two models against an interval of the differences themselves; and the same numbers for the same seed.
"""

import math
import random
import statistics

import numpy as np
import pytest

from minift.evaluation import intervals
from minift.evaluation.intervals import Score, difference, exponential


def test_a_score_is_a_ratio_of_sums() -> None:
    assert Score([1.0, 0.0, 1.0], [1.0, 1.0, 2.0]).value == 0.5
    assert Score([1.0, 3.0], [1.0, 3.0], exponential).value == pytest.approx(math.e, rel=1e-15)
    assert Score([0.1] * 10, [1.0] * 10).value == 0.1  # exact sums


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_wide_interval_is_that_of_the_normal_distribution(share: float) -> None:
    """For 1,000 yes-or-no items the percentiles are p ± 1.96 √(p (1 − p) / n)."""
    n = 1_000
    score = Score([float(i < share * n) for i in range(n)], [1.0] * n)
    margin = 1.96 * math.sqrt(share * (1 - share) / n)
    assert score.interval() == pytest.approx((share - margin, share + margin), abs=0.1 * margin)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Of 300 samples of a distribution whose mean is known."""
    source, covered = random.Random(0), 0
    for seed in range(300):
        values = [source.expovariate(1.0) for _ in range(80)]
        low, high = Score(values, [1.0] * 80).interval(seed)
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_items_weigh_by_their_wholes() -> None:
    """A perplexity is of all targets, so a text of 100 targets moves it more than one of 1."""
    nll, targets = [100.0, 3.0, 5.0, 220.0], [100.0, 1.0, 2.0, 110.0]
    score = Score(nll, targets, exponential)
    assert score.value == pytest.approx(math.exp(sum(nll) / sum(targets)))
    generator = np.random.default_rng(7)
    draws = generator.integers(4, size=(20_000, 4))
    slow = [math.exp(sum(nll[i] for i in draw) / sum(targets[i] for i in draw)) for draw in draws]
    assert score.interval() == pytest.approx(np.quantile(slow, [0.025, 0.975]), rel=0.03)


def test_a_difference_is_of_the_same_items() -> None:
    """Two models that are both good at the easy half: their difference is as sure as the differences of the items."""
    source = random.Random(1)
    easy = [float(i % 2) for i in range(400)]
    before = [x + source.gauss(0.0, 0.05) for x in easy]
    after = [x + 0.02 + source.gauss(0.0, 0.05) for x in easy]
    ones = [1.0] * 400
    found = difference(Score(before, ones), Score(after, ones))
    changes = [b - a for a, b in zip(before, after, strict=True)]
    assert found["value"] == pytest.approx(statistics.mean(changes), abs=1e-12)
    margin = 1.96 * statistics.stdev(changes) / math.sqrt(400)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(margin, rel=0.1)
    assert found["low"] > 0
    alone = Score(after, ones).interval()
    assert (alone[1] - alone[0]) > 5 * (found["high"] - found["low"])


def test_the_same_seed_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many draws are made at a time; a set of one mind has no width."""
    score = Score([float(i % 3) for i in range(50)], [1.0] * 50)
    assert score.interval() == score.interval()
    assert score.interval(seed=1) != score.interval()
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 500)
    assert score.interval() == Score(score.parts, score.wholes).interval()
    assert Score([1.0] * 9, [1.0] * 9).interval() == (1.0, 1.0)
    assert difference(score, score) == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_items(n: int) -> None:
    low, high = Score([float(i) for i in range(n)], [1.0] * n).interval()
    assert 0 <= low <= high <= n - 1
    assert Score([1.0], [0.0]).interval() == (1.0, 1.0)  # a text of no bytes
