"""Say *faster*, *slower*, *same* or *undecided* of two versions' times, and how much more would decide it.

All is about the ratio of the times, new over old, and computed with its logarithm. A difference matters when it is
larger than the *band*, 2 % by default.

* *same*: the whole interval of the ratio is inside the band;
* *slower* (*faster*): the whole interval is on one side of 1, and the estimate is beyond the band;
* *undecided*: anything else. A verdict that is not sure is not given.

**The interval.** Samples in one process are not independent: a process has a speed of its own. So whole pairs of
processes are drawn anew (a cluster bootstrap), and the standard deviation of the estimate over many such draws is its
standard error. To draw the turns within each as well would count their spread twice: it is in the spread of the pairs.
Few pairs know little of their own spread: the interval is as wide as Student's t for their number says. The estimate of
a pair is the mean of the middle half of its ratios, which a few disturbed turns do not move; that of the row is the
mean over the pairs.

**Many rows.** Of twenty rows of identical code one is "significant" at 5 % by chance. Holm's correction keeps the
chance that *any* row is wrong at 5 %.

**Many looks.** Who looks after each quarter of the budget and stops at the first verdict has four chances to be wrong.
`LOOKS` shares the 5 % among them, as O'Brien and Fleming do: hardly any for the first look, nearly all for the last.

Sources: Cameron, Gelbach and Miller (2008) for the cluster bootstrap; Holm (1979); O'Brien and Fleming (1979), whose
limits for four looks are 2.024 · sqrt(4 / look) standard errors; Abramowitz and Stegun, 26.7.3 and 26.7.4, for t.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

BAND = 0.02
ERROR = 0.05  # the chance that any row of a comparison is wrong
LOOKS = tuple(2 * NormalDist().cdf(-2.024 * math.sqrt(4 / look)) for look in (1, 2, 3, 4))
DRAWS = 1_000
HOPELESS = 20  # times as many: more than that is not worth asking for
PROCESS = 0.005  # the standard deviation of a process's own speed, where one process is all there is (`alike`)


@dataclass(frozen=True)
class Estimate:
    """What is known of one row.

    Attributes:
        log: the logarithm of the ratio of the times, new over old.
        error: its standard error.
        clusters: how many independent measurements there are: pairs of processes, or turns of two files.
        turns: the number of turns in all.
    """

    log: float
    error: float
    clusters: int
    turns: int

    def p_value(self) -> float:
        """Return the chance of such an estimate where there is no difference; two-sided."""
        if self.error == 0:
            return 0.0 if self.log else 1.0
        return two_sided(abs(self.log) / self.error, self.clusters - 1)

    def interval(self, error: float) -> tuple[float, float]:
        """Return the limits of the logarithm which the truth is outside of with the probability `error`."""
        half = quantile(error, self.clusters - 1) * self.error if self.error else 0.0
        return self.log - half, self.log + half


@dataclass(frozen=True)
class Verdict:
    """What is said of one row.

    Attributes:
        word: "faster", "slower", "same" or "undecided".
        ratio, low, high: of the times, new over old, and its interval after all corrections.
        pairs, turns: how many were measured.
        needs: what would decide it; empty when it is decided.
    """

    word: str
    ratio: float
    low: float
    high: float
    pairs: int
    turns: int
    needs: str = ""


def paired(pairs: Sequence[Sequence[float]], seed: int = 0) -> Estimate | None:
    """Return the estimate from ratios within pairs of processes; None from fewer than two pairs.

    Args:
        pairs: for each pair of processes, the ratio new over old of all two turns that count, one in each order.
        seed: of the draws.
    """
    logs = [np.log(np.asarray(ratios)) for ratios in pairs if len(ratios)]
    if len(logs) < 2:
        return None
    n, generator = len(logs), np.random.default_rng(seed)
    means = np.array([middle(one[None])[0] for one in logs])  # [n]
    few = math.sqrt(n / (n - 1))  # the spread of a few drawn anew is smaller than their own by so much
    error = few * float(means[generator.integers(n, size=(DRAWS, n))].mean(1).std())
    return Estimate(float(means.mean()), error, n, 2 * sum(map(len, logs)))


def unpaired(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Estimate | None:
    """Return the estimate from the seconds of two files, each of one process; None from fewer than six turns.

    Turns that follow each other are alike, so whole blocks of them are drawn. What a process's own speed may be, one
    process cannot tell: `PROCESS` is added for each.
    """
    n = min(len(old), len(new))
    if n < 6:
        return None
    generator = np.random.default_rng(seed)
    spread = 0.0
    for values in (old, new):
        logs, block = np.log(np.asarray(values)), round(len(values) ** (1 / 3))
        starts = generator.integers(len(logs), size=(DRAWS, math.ceil(len(logs) / block), 1))
        places = (starts + np.arange(block)).reshape(DRAWS, -1)[:, : len(logs)] % len(logs)
        spread += float(np.median(logs[places], axis=1).var()) + PROCESS**2
    return Estimate(float(np.log(np.median(new) / np.median(old))), math.sqrt(spread), n, n)


def middle(logs: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of each row."""
    ordered, cut = np.sort(logs, axis=1), logs.shape[1] // 4
    return ordered[:, cut : logs.shape[1] - cut].mean(1)


def holm(p_values: Sequence[float], error: float = ERROR) -> list[float]:
    """Return the level of each row, by which the chance of any false difference is at most `error` (Holm).

    The smallest of m p-values is held against error / m. Only if it passes, the next is held against error / (m - 1),
    and so on. Those that do not pass share what is left.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels, passed = [0.0] * len(p_values), 0
    for place, i in enumerate(order):
        if passed == place and p_values[i] <= error / (len(order) - place):
            passed += 1
        levels[i] = error / (len(order) - min(place, passed))
    return levels


def decide(
    estimates: Mapping[str, Estimate], band: float = BAND, error: float = ERROR, more: str = "pairs of processes"
) -> dict[str, Verdict]:
    """Return the verdict on each row of a comparison, corrected for the number of rows.

    Args:
        estimates: of each row that is looked at.
        band: the difference that matters, as a share.
        error: the chance that any row is wrong; of one look, its share in LOOKS.
        more: the name of what there would have to be more of.
    """
    levels = holm([one.p_value() for one in estimates.values()], error)
    return {name: verdict(one, level, band, more) for (name, one), level in zip(estimates.items(), levels, strict=True)}


def verdict(one: Estimate, level: float, band: float, more: str = "pairs of processes") -> Verdict:
    """Return the verdict on one row by the interval of this level."""
    low, high = one.interval(level)
    limit = math.log1p(band)
    if -limit <= low and high <= limit:
        word = "same"
    elif abs(one.log) > limit and (low > 0 or high < 0):
        word = "slower" if one.log > 0 else "faster"
    else:
        word = "undecided"
    needs = "" if word != "undecided" else missing(one, level, limit, more)
    return Verdict(word, math.exp(one.log), math.exp(low), _exp(high), one.clusters, one.turns, needs)


def missing(one: Estimate, level: float, limit: float, more: str) -> str:
    """Return what would decide a row whose estimate stays as it is, while its error falls as one over the root of n."""
    allowed = abs(one.log) if abs(one.log) > limit else limit - abs(one.log)
    spread, n = one.error * math.sqrt(one.clusters), one.clusters
    most = HOPELESS * one.clusters
    while n <= most and quantile(level, n - 1) * spread > allowed * math.sqrt(n):
        n += max(1, n // 20)
    if n > most:
        return f"more than {most} {more}, or another --band"
    return "about " + counted(max(1, n - one.clusters), f"more {more}")


def counted(n: int, things: str) -> str:
    """Return a number and what is counted: "3 pairs of processes", "1 more turn"."""
    return f"{n} {things if n != 1 else re.sub('s(?= of|$)', '', things, count=1)}"


def _exp(log: float) -> float:
    return math.exp(min(log, 700.0))


# Student's t ----------------------------------------------------------------------------------------------------------


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that Student's t is larger than `t` or smaller than -t."""
    if freedom > 200:
        return 2 * NormalDist().cdf(-t)
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(1 - inside, 0.0)


@cache
def quantile(error: float, freedom: int) -> float:
    """Return the t beyond which, on both sides, is the probability `error`."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > error and high < 1e12:
        high *= 2
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if two_sided(half, freedom) > error else (low, half)
    return high
