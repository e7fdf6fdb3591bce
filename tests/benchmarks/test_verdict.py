"""The promise of a verdict: it follows its rules, cries wolf in at most 5 % of comparisons, and finds what is there.

The formulas are held against values from tables and against simulations whose truth is known. What they simulate is
what times are like: each pair of processes has a speed of its own, and turns have a long tail.
"""

import math

import numpy as np
import pytest

from benchmarks import verdict
from benchmarks.verdict import LOOKS, Estimate, decide, holm, missing, paired, quantile, two_sided, unpaired

LIMIT = math.log1p(0.02)


def times(seed: int, ratio: float, process: float, pairs: int = 12, turns: int = 24) -> list[np.ndarray]:
    """Ratios of turns in pairs of processes, each pair with its own speed (a share); turns have heavy tails of 3 %."""
    draw = np.random.default_rng(seed)
    own = process * draw.standard_normal(pairs)
    return [np.exp(math.log(ratio) + speed + 0.03 * draw.standard_t(3, turns)) for speed in own]


def with_looks(seed: int, ratio: float, process: float) -> str:
    """The verdict of someone who looks after 3, 6, 9 and 12 pairs, and stops at the first."""
    pairs = times(seed, ratio, process)
    for look, error in enumerate(LOOKS, 1):
        estimate = paired(pairs[: 3 * look], seed)
        assert estimate is not None
        (found,) = decide({"row": estimate}, error=error).values()
        if found.word != "undecided":
            return found.word
    return "undecided"


# Values of tables: t with 1, 4, 10 and 30 degrees of freedom, two-sided.
TABLE = [
    (0.05, 1, 12.706),
    (0.05, 4, 2.776),
    (0.05, 10, 2.228),
    (0.01, 30, 2.750),
    (0.001, 10, 4.587),
    (0.05, 500, 1.96),
]


@pytest.mark.parametrize(("error", "freedom", "t"), TABLE)
def test_students_t_is_that_of_the_tables(error: float, freedom: int, t: float) -> None:
    assert quantile(error, freedom) == pytest.approx(t, abs=6e-4)
    assert two_sided(t, freedom) == pytest.approx(error, rel=2e-3)


def test_the_looks_share_the_error_as_o_brien_and_fleming_do() -> None:
    """By simulation of a sum that is looked at four times: 5 % in all, and hardly any at the first look."""
    walks = np.random.default_rng(0).standard_normal((200_000, 4)).cumsum(axis=1) / np.sqrt([1, 2, 3, 4])
    limits = np.array([quantile(error, 10_000) for error in LOOKS])
    assert (np.abs(walks) > limits).any(axis=1).mean() == pytest.approx(0.05, abs=2e-3)
    assert LOOKS[0] < 1e-4 < LOOKS[1] < LOOKS[2] < LOOKS[3] < 0.05


def test_holm_by_hand() -> None:
    """0.010 passes 0.05/4, 0.016 passes 0.05/3, 0.03 does not pass 0.05/2; then nothing does."""
    levels = holm([0.030, 0.010, 0.04, 0.016])
    assert levels == pytest.approx([0.05 / 2, 0.05 / 4, 0.05 / 2, 0.05 / 3])
    assert holm([0.5]) == [0.05]


def test_the_error_is_that_of_the_clusters() -> None:
    """Where processes differ by 2 % and turns by nothing, ten pairs know the mean within 2 % / sqrt(10)."""
    own = 0.02 * np.random.default_rng(1).standard_normal(10)
    estimate = paired([np.exp(np.full(50, speed)) for speed in own])
    assert estimate is not None
    assert estimate.log == pytest.approx(own.mean())
    assert estimate.error == pytest.approx(own.std(ddof=1) / math.sqrt(10), rel=0.1)
    assert (estimate.clusters, estimate.turns) == (10, 1_000)  # two turns a ratio


RULES = [
    (0.000, 0.001, "same"),
    (0.019, 0.010, "undecided"),  # inside the band, and perhaps outside
    (0.030, 0.001, "slower"),
    (-0.03, 0.001, "faster"),
    (0.015, 0.001, "same"),  # certainly slower, and by less than what matters
    (0.030, 0.020, "undecided"),  # beyond the band, and perhaps nothing
]


@pytest.mark.parametrize(("log", "error", "word"), RULES)
def test_the_rule(log: float, error: float, word: str) -> None:
    found = verdict.verdict(Estimate(log, error, 10, 100), 0.05, 0.02)
    assert found.word == word
    assert found.ratio == pytest.approx(math.exp(log))
    half = 2.262 * error  # t with 9 degrees of freedom
    assert (found.low, found.high) == pytest.approx((math.exp(log - half), math.exp(log + half)), rel=1e-4)
    assert bool(found.needs) == (word == "undecided")


def test_a_larger_band_calls_more_the_same() -> None:
    estimate = Estimate(0.03, 0.002, 10, 100)
    assert verdict.verdict(estimate, 0.05, 0.02).word == "slower"
    assert verdict.verdict(estimate, 0.05, 0.05).word == "same"


@pytest.mark.parametrize(("log", "error"), [(0.0, 0.012), (0.03, 0.02), (-0.005, 0.01)])
def test_what_is_said_to_be_missing_would_decide_it(log: float, error: float) -> None:
    one = Estimate(log, error, 6, 100)
    assert verdict.verdict(one, 0.05, 0.02).word == "undecided"
    more = int(missing(one, 0.05, LIMIT, "pairs").split()[1])
    n = 6 + more
    later = Estimate(log, error * math.sqrt(6 / n), n, 100)
    assert verdict.verdict(later, 0.05, 0.02).word != "undecided"
    earlier = Estimate(log, error * math.sqrt(6 / (n - 2)), n - 2, 100)
    assert verdict.verdict(earlier, 0.05, 0.02).word == "undecided"


def test_one_is_singular() -> None:
    one = Estimate(0.0, 1.01 * LIMIT / quantile(0.05, 5), 6, 100)  # six pairs hardly do not decide it, seven do
    assert missing(one, 0.05, LIMIT, "pairs of processes") == "about 1 more pair of processes"
    assert missing(one, 0.05, LIMIT, "turns") == "about 1 more turn"
    assert verdict.counted(2, "pairs of processes") == "2 pairs of processes"


def test_what_no_number_decides_is_said() -> None:
    assert "another --band" in missing(Estimate(LIMIT, 0.01, 6, 100), 0.05, LIMIT, "pairs")


def test_identical_code_is_seldom_told_apart() -> None:
    """Of 200, 5 % is 10; a correct procedure exceeds 18 once in a hundred times. Processes differ by 2 %."""
    words = [with_looks(seed, 1.0, 0.02) for seed in range(200)]
    assert words.count("faster") + words.count("slower") <= 18


def test_without_the_clusters_identical_code_would_be_told_apart() -> None:
    """The reason for the clusters: turns alone, of one pair of processes that differ by 3 %, are sure and wrong."""
    pooled = [
        [np.concatenate(times(seed, 1.0, 0.03, pairs=1, turns=200))[i::10] for i in range(10)] for seed in range(40)
    ]
    alone = [decide({"row": estimate})["row"].word for one in pooled if (estimate := paired(one))]
    assert sum(word in ("faster", "slower") for word in alone) > 8


def test_many_rows_of_identical_code_are_not_told_apart_either() -> None:
    """Twenty rows at a time, thirty times: in at most 5 % of comparisons (and 5 of 30 by chance) is any row wrong."""
    wrong = 0
    for start in range(0, 600, 20):
        rows = {str(seed): paired(times(seed, 1.0, 0.02, 6), seed) for seed in range(start, start + 20)}
        found = decide({name: one for name, one in rows.items() if one})
        wrong += any(one.word in ("faster", "slower") for one in found.values())
    assert wrong <= 5


@pytest.mark.parametrize(("slowdown", "least"), [(1.03, 45), (1.1, 50)])
def test_a_slowdown_is_found(slowdown: float, least: int) -> None:
    words = [with_looks(seed, slowdown, 0.005) for seed in range(50)]
    assert words.count("slower") >= least
    assert words.count("faster") == 0


def test_identical_code_is_called_the_same() -> None:
    words = [with_looks(seed, 1.0, 0.005) for seed in range(50)]
    assert words.count("same") >= 38


def test_one_pair_of_processes_is_no_estimate() -> None:
    assert paired([[1.0] * 100]) is None
    assert paired([[1.0, 1.1], []]) is None
    assert unpaired([1.0] * 5, [1.0] * 100) is None


def test_files_are_never_surer_than_a_process_allows() -> None:
    """A file is one process, whose own speed its samples do not show: 1.5 % between two is no difference."""
    draw = np.random.default_rng(0)
    old, new = (1e-3 * center * np.exp(0.001 * draw.standard_normal(500)) for center in (1.0, 1.015))
    estimate = unpaired(list(old), list(new))
    assert estimate is not None
    assert estimate.log == pytest.approx(math.log(1.015), abs=1e-3)
    assert estimate.error == pytest.approx(math.sqrt(2) * verdict.PROCESS, rel=0.05)
    assert decide({"row": estimate}, more="turns")["row"].word == "undecided"


def test_drift_in_a_file_makes_it_less_sure() -> None:
    """Turns that follow each other are alike: the error is larger than if the same turns came in any order."""
    draw = np.random.default_rng(0)
    slow = np.repeat(0.1 * draw.standard_normal(50), 8)
    values = np.exp(slow)
    drifting, mixed = (unpaired(list(one), list(one)) for one in (values, draw.permutation(values)))
    assert drifting is not None
    assert mixed is not None
    assert drifting.error > 1.5 * mixed.error
