"""The promise of `samples.py`: intervals that hold for every distribution, and a record of all samples."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from benchmarks.samples import MARKS, Sample, Samples, median_interval, quantile_interval, quantiles


def chance_below(n: int, share: float, count: int) -> float:
    """The chance that at most `count` of `n` values are below the quantile, added up over which of them are."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(count + 1))


@pytest.mark.parametrize("n", [6, 7, 9, 20, 75, 101])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_an_interval_of_the_median_is_the_shortest_that_covers_enough(n: int, confidence: float) -> None:
    values = list(map(float, range(n)))  # each is its own rank
    low, high = median_interval(random.Random(0).sample(values, n), confidence)
    if n < 8 and confidence == 0.99:  # all of seven are on one side in 2 of 128 cases
        assert (low, high) == (-math.inf, math.inf)
        return
    tail = (1 - confidence) / 2
    assert low + high == n - 1  # symmetric
    assert chance_below(n, 0.5, int(low)) <= tail
    assert chance_below(n, 0.5, int(low) + 1) > tail


@pytest.mark.parametrize("share", [0.05, 0.25, 0.75, 0.95])
def test_an_interval_of_another_quantile(share: float) -> None:
    for n in (10, 60, 200):
        found = quantile_interval(list(map(float, range(n))), share)
        possible = [k for k in range(n) if chance_below(n, share, k) <= 0.025]
        above = [k for k in range(n) if chance_below(n, share, k) >= 0.975]
        assert found == ((max(possible), min(above)) if possible and above else None)


def test_fewer_than_six_values_have_no_interval() -> None:
    assert median_interval([1.0] * 5) == (-math.inf, math.inf)
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert median_interval([]) == (-math.inf, math.inf)


def test_many_values_do_not_overflow() -> None:
    low, high = median_interval(list(map(float, range(10_000))))
    assert high - low == pytest.approx(1.96 * math.sqrt(10_000), abs=3)  # as the normal approximation


def test_the_true_median_is_inside_as_often_as_promised() -> None:
    generator, inside = random.Random(1), 0
    for _ in range(1_000):
        low, high = median_interval([generator.expovariate(1) for _ in range(25)])
        inside += low <= math.log(2) <= high
    assert 0.94 < inside / 1_000 < 0.98  # 95.7 % by the binomial


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_quantiles_are_numpys(n: int) -> None:
    generator = random.Random(n)
    values = [generator.lognormvariate(0, 1) for _ in range(n)]
    found = quantiles(values)
    assert list(found) == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert [one["value"] for one in found.values()] == pytest.approx(np.quantile(values, list(found)).tolist())
    assert (found[0.05]["interval"] is None) == (n < 72)  # all are above it in 0.95 ** 72 = 2.5 % of the cases
    for one in found.values():
        assert one["interval"] is None or one["interval"][0] <= one["value"] <= one["interval"][1]
    assert json.loads(json.dumps(found))["0.5"] == found[0.5]


def samples(*seconds: float, floor: float = 0.0, marks: dict[int, tuple[str, ...]] | None = None) -> Samples:
    all_of = [Sample(100.0 + turn, one, 3, turn, (marks or {}).get(turn, ())) for turn, one in enumerate(seconds)]
    return Samples("used", "wall", "warm", tuple(all_of), "narrow", floor)


def test_what_is_left_out_is_kept_and_counted() -> None:
    found = samples(1.0, 9.0, 2.0, 3.0, marks={1: ("stolen", "other load"), 3: ("stolen",)})
    assert found.seconds == [1.0, 2.0]
    assert found.left_out == {"stolen": 2, "other load": 1}
    written = found.to_dict()
    assert written["samples"] == [
        [100.0, 1.0, 3, 0, []],
        [101.0, 9.0, 3, 1, ["stolen", "other load"]],
        [102.0, 2.0, 3, 2, []],
        [103.0, 3.0, 3, 3, ["stolen"]],
    ]
    assert {key: value for key, value in written.items() if key != "samples"} == {
        "timer": "wall",
        "caches": "warm",
        "stopped": "narrow",
        "floor_seconds": 0.0,
        "left_out": {"stolen": 2, "other load": 1},
        "quantiles": {  # of the two that count: too few for intervals
            name: {"value": pytest.approx(1 + float(name)), "interval": None}
            for name in ("0.05", "0.25", "0.5", "0.75", "0.95")
        },
    }
    assert set(found.left_out) <= set(MARKS)
    assert Samples.from_dict("used", json.loads(json.dumps(written))) == found


def test_nothing_below_the_floor_gets_a_number() -> None:
    assert samples(2.0, 3.0, 4.0, floor=3.0).median == 3.0
    assert samples(2.0, 3.0, 4.0, floor=3.1).median is None
    assert samples(2.0, marks={0: ("clock",)}).median is None


def test_a_difference_is_taken_turn_by_turn() -> None:
    both, forward = (
        samples(5.0, 7.0, 6.0, floor=0.1, marks={2: ("clock",)}),
        samples(1.0, 2.0, 9.0, marks={2: ("clock",)}),
    )
    rest = both.minus(forward)
    assert rest.seconds == [4.0, 5.0]
    assert [one.seconds for one in rest.samples] == [4.0, 5.0, -3.0]
    assert (rest.floor, rest.timer, rest.caches) == (0.1, "wall", "warm")
    assert all(a.at == b.at for a, b in itertools.zip_longest(rest.samples, both.samples))
    with pytest.raises(ValueError, match="shorter"):
        both.minus(samples(1.0))


def test_a_ratio_is_taken_within_turns() -> None:
    """A machine that is ten times slower in a turn is so for both; a turn that is left out is so for both, too."""
    marks = {2: ("stolen",)}
    long = samples(2.0, 20.0, 9.0, 2.0, 2.2, 2.0, 1.8, marks=marks)
    short = samples(1.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0, marks=marks)
    assert long.paired(short) == pytest.approx((2.0, 1.8, 2.2))
    assert long.paired(long) == (1.0, 1.0, 1.0)
