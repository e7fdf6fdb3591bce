"""An interval is what its name says: it covers the truth about as often as 95 %, and pairs sharpen a difference.

Held here: scores against plain sums; intervals against the formula of the standard error, and by simulation; the
difference of two models against an interval of the differences themselves; proportions against published intervals, and
against the definition, solved by bisection; and the same numbers for the same seed.
"""

import math
import random
import statistics

import numpy as np
import pytest

from minift.evaluation import intervals
from minift.evaluation.intervals import Score, difference, exponential, newcombe, score_values, wilson


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


@pytest.mark.parametrize("n", [2, 3])
def test_few_items(n: int) -> None:
    low, high = Score([float(i) for i in range(n)], [1.0] * n).interval()
    assert 0 <= low <= high <= n - 1
    assert Score([1.0] * 3, [0.0] * 3).interval() == (3.0, 3.0)  # texts of no bytes


# Proportions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "ends"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilsons_interval_is_the_published_one(right: int, n: int, ends: tuple[float, float]) -> None:
    """Source of the numbers: Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    assert wilson(right, n) == pytest.approx(ends, abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 7), (228, 228), (227, 228), (50, 1_000)])
def test_wilsons_ends_are_1_96_of_their_own_errors_away(right: int, n: int) -> None:
    """Found by bisection: |right / n - p| = 1.96 √(p (1 - p) / n)."""
    z = statistics.NormalDist().inv_cdf(0.975)

    def end(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            if abs(right / n - p) <= z * math.sqrt(p * (1 - p) / n):
                inside = p
            else:
                outside = p
        return inside

    assert wilson(right, n) == pytest.approx((end(right / n, 0.0), end(right / n, 1.0)), abs=1e-9)


@pytest.mark.parametrize(
    ("counts", "ends"),
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((1, 1, 7, 12), (-0.5069, -0.0256))],
)
def test_newcombes_interval_is_the_published_one(counts: tuple[int, ...], ends: tuple[float, float]) -> None:
    """Of both right, the first alone, the second alone, neither; the first less the second.

    Source of the numbers: Newcombe, Statistics in Medicine 17 (1998) 2635, table III, method 10; Fagerland et al.,
    Statistics in Medicine 33 (2014) 2850, the data of Bentur et al.
    """
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    items = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    assert newcombe([b for _, b in items], [a for a, _ in items]) == pytest.approx(ends, abs=5e-4)


def test_newcombes_interval_covers_the_truth() -> None:
    """Of 2,000 pairs of samples of two models that are right to 90 % and 97 %, mostly on the same items."""
    source, covered = random.Random(0), 0
    for _ in range(2_000):
        drawn = [source.random() for _ in range(60)]
        before = [x < 0.90 for x in drawn]
        after = [x < 0.88 or (0.90 <= x < 0.99) for x in drawn]
        low, high = newcombe(before, after)
        covered += low <= 0.07 <= high
    assert 0.93 <= covered / 2_000 <= 0.99


def test_where_all_items_agree_an_interval_has_a_width() -> None:
    """All of 228 right; before, none of them. Each item counts alike, so a token's share of a text does not."""
    ones = [1.0] * 228
    right, wrong = (Score([value] * 228, ones, is_share=True) for value in (1.0, 0.0))
    assert right.interval() == pytest.approx((0.98343, 1.0), abs=1e-5)
    assert difference(wrong, right) == pytest.approx({"value": 1.0, "low": 0.97657, "high": 1.0}, abs=1e-5)
    assert difference(right, right) == pytest.approx({"value": 0.0, "low": -0.01657, "high": 0.01657}, abs=1e-5)
    tokens = [float(1 + i % 9) for i in range(228)]
    assert Score(tokens, tokens, is_share=True).interval() == right.interval()


def test_what_is_no_proportion_is_drawn() -> None:
    some = Score([float(i % 2) for i in range(40)], [1.0 + i % 2 for i in range(40)], is_share=True)
    part = Score([0.5, 1.0, 0.0] * 9, [1.0] * 27, is_share=True)
    for score in (some, part, Score([1.0] * 9, [1.0] * 9)):
        assert score.right is None
        assert score.interval() == Score(score.parts, score.wholes).interval()
    half = Score([0.0, 1.0] * 20, [1.0] * 40, is_share=True)
    assert half.interval() == wilson(20, 40)
    mixed = Score([0.25] * 40, [1.0] * 40, is_share=True)
    assert difference(half, mixed) == difference(Score(half.parts, half.wholes), Score(mixed.parts, mixed.wholes))


@pytest.mark.parametrize("n", [1, 2])
def test_items_that_agree_promise_nothing_about_others(n: int) -> None:
    """One or two records, or some that are alike: an interval without width would say that no other could differ."""
    f1 = Score([0.4] * n, [1.0] * n, is_share=True)
    assert f1.interval() == pytest.approx(wilson(0.4 * n, n))
    surprise = Score([7.0] * n, [2.0] * n, exponential)
    assert surprise.interval() is None
    better = difference(f1, Score([0.7] * n, [1.0] * n, is_share=True))
    assert -1 <= better["low"] < 0 < better["value"] < better["high"] <= 1
    likelier = difference(surprise, Score([3.0] * n, [2.0] * n, exponential))
    assert (likelier["low"], likelier["high"]) == (None, None)
    same = difference(surprise, surprise)
    assert (same["low"], same["high"]) == (0, 0)  # one model, whatever the record
    found = score_values({"f1": f1, "perplexity": surprise, "none": None})
    assert list(found["intervals"]) == ["f1"]
    assert found["perplexity"] == pytest.approx(math.exp(3.5))


@pytest.mark.parametrize("n", [3, 30])
def test_a_difference_of_two_halves_is_bounded_by_both(n: int) -> None:
    """Where all items have the same share: the distances to the ends are those of both models, put at right angles."""
    before, after = (Score([value] * n, [1.0] * n, is_share=True) for value in (0.25, 0.5))
    (a, b), (c, d) = wilson(n / 4, n), wilson(n / 2, n)
    found = difference(before, after)
    assert found["low"] == pytest.approx(0.25 - math.hypot(0.5 - c, b - 0.25))
    assert found["high"] == pytest.approx(0.25 + math.hypot(d - 0.5, 0.25 - a))
