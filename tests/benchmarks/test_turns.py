"""The promise of `timing.in_turns`: when turns end, which of them count, what is cold, and what is too short.

The clock only moves when a call says so, and the machine does what the test says.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import cold, floor, timing
from benchmarks.cold import Cache
from benchmarks.floor import Floor
from benchmarks.samples import Samples, median_interval
from benchmarks.timing import in_turns
from benchmarks.watch import Reading


class Work:
    """Calls that move a clock; each call takes the next of its times, over and over."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        times: Iterator[float] = itertools.cycle(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += next(times)

        return call


class Told:
    """Tells the marks of turns that a test gives."""

    def __init__(self, marks: Mapping[int, tuple[str, ...]] | None = None, interruptions: Sequence[int] = (0,)):
        self.of_turn, self._interruptions = marks or {}, itertools.cycle(interruptions)

    def read(self) -> Reading:
        return Reading(0.0)

    def marks(self, readings: Sequence[Reading]) -> list[tuple[str, ...]]:
        return [self.of_turn.get(turn, ()) for turn in range(len(readings) - 1)]

    def interruptions(self) -> int:
        return next(self._interruptions)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """A machine without costs of its own. Emptying its caches takes 7 seconds."""
    machine = Work()
    monkeypatch.setattr(floor, "measure", lambda *_: Floor(0.0, 0.0, 0.0))
    monkeypatch.setattr(cold, "emptier", lambda device: machine.call("emptied", 7.0))
    return machine


def measure(work: Work, sides: Mapping[str, Callable[[], object]], *repeats: int, **how: object) -> dict[str, Samples]:
    return in_turns(sides, *repeats, **{"clock": work.clock, "watch": Told(), **how})  # type: ignore[arg-type]


# When turns end -------------------------------------------------------------------------------------------------------


def test_turns_end_when_all_medians_are_known(work: Work) -> None:
    """Equal times need the fewest turns that have an interval; for one side with a range of ±5 %, it takes more."""
    found = measure(work, {"a": work.call("a", 1.0), "b": work.call("b", 2.0)}, budget=1e6)
    assert [(len(one.samples), one.stopped) for one in found.values()] == [(timing.FEWEST, "narrow")] * 2
    noisy = work.call("b", 1.9, 2.0, 2.1)
    found = measure(work, {"a": work.call("a", 1.0), "b": noisy}, budget=1e6)
    seconds = found["b"].seconds
    assert found["a"].stopped == found["b"].stopped == "narrow"
    assert len(found["a"].samples) == len(seconds) > timing.FEWEST
    low, high = median_interval(seconds)
    assert high <= 1.02 * statistics.median(seconds)
    assert low >= 0.98 * statistics.median(seconds)


@pytest.mark.parametrize("precision", [0.005, 0.02, 0.06])
def test_a_precision_may_be_asked_for(precision: float, work: Work) -> None:
    times = [1 + 0.001 * ((37 * i) % 101 - 50) for i in range(101)]  # even between 0.95 and 1.05
    (found,) = measure(work, {"a": work.call("a", *times)}, budget=1e6, precision=precision).values()
    low, high = median_interval(found.seconds)
    middle = statistics.median(found.seconds)
    assert middle * (1 - precision) <= low <= high <= middle * (1 + precision)
    assert (len(found.seconds) == timing.FEWEST) == (precision == 0.06)


def test_a_budget_ends_turns_before_it_is_exceeded_and_that_is_said(work: Work) -> None:
    (found,) = measure(work, {"a": work.call("a", 1.0, 3.0)}, budget=21.0).values()
    assert found.stopped == "budget"
    assert 18 <= sum(found.seconds) <= 21
    (once,) = measure(work, {"a": work.call("a", 100.0)}, budget=1.0).values()
    assert (once.stopped, once.seconds) == ("budget", [100.0])  # one at least, or there would be no result


def test_short_calls_are_measured_for_half_a_second(work: Work) -> None:
    """Six equal samples of 2 ms are of one moment, and tell nothing about the next."""
    (found,) = measure(work, {"a": work.call("a", 0.002)}, budget=10.0).values()
    assert found.stopped == "narrow"
    assert 0.5 <= sum(found.seconds) < 0.6


def test_a_sample_that_another_process_interrupts_is_taken_again(work: Work) -> None:
    """Interruptions are counted before and after: the first attempt has one, the second has none, and counts."""
    told = Told(interruptions=(0, 1, 1, 1))
    (found,) = measure(work, {"a": work.call("a", 9.0, 1.0)}, 4, warmup=0, watch=told).values()
    calls = work.log.count("a")
    assert (found.seconds, found.left_out) == ([found.seconds[0]] * 4, {})
    assert calls == 1 + 2 * 4  # one tells how long a call takes


def test_a_turn_whose_samples_are_all_interrupted_is_left_out(work: Work) -> None:
    """In one of six turns, each attempt. Where it is most turns, or there are few, nothing is usual, and all count."""
    for turns, counted in ((6, 5), (5, 5)):
        rare = [*[0] * (2 * turns - 2), *range(2 * timing.ATTEMPTS)]
        (found,) = measure(work, {"a": work.call("a", 1.0)}, turns, watch=Told(interruptions=rare)).values()
        assert (len(found.seconds), sum(found.left_out.values())) == (counted, turns - counted)
    (found,) = measure(work, {"a": work.call("a", 1.0)}, 6, watch=Told(interruptions=range(100))).values()
    assert (len(found.seconds), found.left_out) == (6, {})


def test_repeats_are_exact_however_much_the_times_differ(work: Work) -> None:
    (found,) = measure(work, {"a": work.call("a", 1.0, 9.0)}, 4).values()
    assert (len(found.seconds), found.stopped) == (4, "repeats")


def test_without_repeats_or_a_budget_there_is_one(work: Work) -> None:
    (found,) = measure(work, {"a": work.call("a", 0.1, 0.2)}).values()
    assert found.stopped == "budget"
    assert sum(found.seconds) <= timing.BUDGET + 1e-6


# Which turns count ----------------------------------------------------------------------------------------------------


def test_a_turn_in_which_the_machine_changed_is_left_out_for_all_sides(work: Work) -> None:
    sides = {"a": work.call("a", *[1.0] * 5, 50.0, 1.0), "b": work.call("b", *[2.0] * 6)}
    told = Told({2: ("other load",), 4: ("stolen", "clock")})
    found = measure(work, sides, 6, warmup=0, watch=told)
    for one in found.values():
        assert len(one.samples) == 6
        assert len(one.seconds) == 4
        assert one.left_out == {"other load": 1, "stolen": 1, "clock": 1}
        assert [sample.turn for sample in one.samples if sample.marks] == [2, 4]
    assert 50.0 not in found["a"].seconds


def test_a_slow_turn_of_a_machine_that_did_not_change_counts(work: Work) -> None:
    (found,) = measure(work, {"a": work.call("a", 1.0, 1.0, 1.0, 90.0)}, 8, warmup=0).values()
    assert found.seconds.count(90.0) == 2


def test_turns_that_are_left_out_are_measured_again(work: Work) -> None:
    (found,) = measure(
        work, {"a": work.call("a", 1.0)}, budget=1e6, watch=Told({0: ("clock",), 3: ("clock",)})
    ).values()
    assert len(found.seconds) == timing.FEWEST
    assert len(found.samples) == timing.FEWEST + 2


def test_the_times_of_day_are_those_of_the_samples(work: Work) -> None:
    before = time.time()
    found = measure(work, {"a": work.call("a", 1.0), "b": work.call("b", 1.0)}, 2)
    at = [found["a"].samples[0].at, found["b"].samples[0].at, found["b"].samples[1].at, found["a"].samples[1].at]
    assert before <= at[0] <= at[1] <= at[2] <= at[3] <= time.time()


# Cold -----------------------------------------------------------------------------------------------------------------


def test_a_cold_sample_is_one_call_after_emptying_which_is_not_timed(work: Work) -> None:
    (found,) = measure(work, {"a": work.call("a", 1e-4)}, 3, warmup=1, caches="cold").values()
    assert found.caches == "cold"
    assert found.seconds == pytest.approx([1e-4] * 3)
    assert [sample.calls for sample in found.samples] == [1] * 3
    assert work.log == ["a"] * 2 + ["emptied", "a"] * 3


def test_a_warm_sample_next_to_cold_ones_is_warmed_first(work: Work) -> None:
    call = work.call("a", 1.0)
    found = measure(work, {"warm": call, "cold": call}, 2, warmup=0, caches={"warm": "warm", "cold": "cold"})
    assert [one.caches for one in found.values()] == ["warm", "cold"]
    assert found["warm"].seconds == found["cold"].seconds == [1.0, 1.0]
    warm, cold_one = ["a", "a"], ["emptied", "a"]
    assert work.log == ["a"] * 2 + warm + cold_one + cold_one + warm


def test_nothing_is_emptied_between_warm_samples(work: Work) -> None:
    measure(work, {"a": work.call("a", 1.0)}, 3, warmup=0)
    assert work.log == ["a"] * 4


def test_emptying_reads_a_buffer_of_several_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "cache", lambda device: Cache(2**20))
    made: list[torch.Tensor] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **how: made.append(ones(*size, **how)) or made[-1])
    empty = cold.emptier.__wrapped__("cpu")
    assert float(empty()) == made[0].numel()  # type: ignore[arg-type]  # so it has read all of it
    assert made[0].nbytes == cold.TIMES * 2**20 >= 3 * 2**20


@pytest.mark.slow
def test_what_fits_the_cache_is_slower_when_cold() -> None:
    """A quarter of a MiB, summed up by this process alone: cold, it comes from memory."""
    size = cold.last_level()
    if size is None:
        pytest.skip("this system does not say how large its caches are")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.ones(2**16)
        found = in_turns({"warm": x.sum, "cold": x.sum}, 15, caches={"warm": "warm", "cold": "cold"})
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(found["cold"].seconds) > 1.2 * statistics.median(found["warm"].seconds)


# What is too short ----------------------------------------------------------------------------------------------------


def test_nothing_below_three_times_the_cost_gets_a_number(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "measure", lambda *_: Floor(clock=1e-6, call=1e-8, kernel=1e-5))
    sides = {name: work.call(name, seconds) for name, seconds in (("long", 3.1e-5), ("short", 2.9e-5))}
    found = measure(work, sides, 3)
    assert [one.floor for one in found.values()] == pytest.approx([3e-5] * 2)
    assert found["long"].median == pytest.approx(3.1e-5)
    assert found["short"].median is None


def test_the_floor_is_of_the_largest_cost_and_the_clock_is_read_once_a_sample() -> None:
    costs = Floor(clock=1e-6, call=1e-8, kernel=1e-7)
    assert costs.seconds(calls=1) == 3 * 1e-6
    assert costs.seconds(calls=1_000) == 3 * 1e-7
    assert Floor(clock=1e-6, call=2e-7, kernel=0).seconds(1_000) == 3 * 2e-7
    assert costs.sentence() == "the clock takes 1.00 µs, an empty call 0.01 µs, an operation on one number 0.10 µs"


def test_the_floor_of_a_clock_that_takes_time() -> None:
    """Each reading moves the clock by 1 µs; so one sample of nothing takes that, and each of 100 calls a hundredth."""
    now = itertools.count()
    costs = floor.measure.__wrapped__("wall", "cpu", "warm", lambda: next(now) * 1e-6)
    assert costs == Floor(*map(pytest.approx, (1e-6, 1e-8, 1e-8)))  # type: ignore[arg-type]


def test_the_floor_of_this_machine_is_plausible() -> None:
    costs = floor.measure("wall", "cpu", "warm")
    assert 0 < costs.call < costs.kernel < 1e-3
    assert 0 < costs.clock < 1e-3


# A workload whose length is known -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [2e-4, 0.003, 0.05])
def test_a_busy_wait_of_known_length_is_read_within_one_percent(seconds: float) -> None:
    """The wait says itself how long it was, by the same system's clock; other processes may make it longer."""
    lasted: list[float] = []

    def wait() -> None:
        start = time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            pass
        lasted.append(now - start)

    (found,) = in_turns({"wait": wait}, 11, watch=Told()).values()  # no sample is taken again
    calls = found.samples[0].calls
    of_samples = [statistics.fmean(lasted[-calls * (11 - turn) :][:calls]) for turn in range(11)]
    errors = [one.seconds / known - 1 for one, known in zip(found.samples, of_samples, strict=True)]
    assert abs(statistics.median(errors)) < 0.01
    assert calls == max(1, round(0.002 / seconds)) or seconds < 0.002


# The size of a cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores, of which this process may use three; each two share a cache of level 3."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for core in range(4):
        pair = f"{core // 2 * 2}-{core // 2 * 2 + 1}"
        levels = [("Data", 1, "48K", core), ("Instruction", 1, "32K", core), ("Unified", 2, "1M", core)]
        for index, (kind, level, size, shared) in enumerate([*levels, ("Unified", 3, "32768K", pair)]):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in {"type": kind, "level": level, "size": size, "shared_cpu_list": shared}.items():
                (folder / name).write_text(f"{value}\n")
    return tmp_path


def test_the_last_level_caches_of_the_cores_that_may_be_used(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cold.last_level(cpus) == 2 * 32 * 2**20
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert cold.last_level(cpus) == 32 * 2**20
    (cpus / "cpu3/cache/index3/size").write_text("many\n")
    assert cold.last_level(cpus) is None
    assert cold.last_level(cpus / "nowhere") is None


def test_the_larger_of_the_reported_and_the_measured_size_is_used() -> None:
    assert Cache(50 * 2**20, 40 * 2**20).used == 50 * 2**20
    assert Cache(25 * 2**20, 40 * 2**20).used == 40 * 2**20
    assert Cache(None).used == cold.UNKNOWN
    words = "cache: reported 25 MiB, measured 40 MiB; emptied by reading 160 MiB"
    assert Cache(25 * 2**20, 40 * 2**20).sentence() == words


@pytest.mark.parametrize(("fast", "knee"), [(32, 32), (5, 5), (0, None)])
def test_the_measured_size_is_where_reading_gets_slow(fast: int, knee: int | None) -> None:
    """Small tensors are read slowly too: a kernel takes its time. Above the cache it is memory's speed."""
    speeds = {mb * 2**20: (min(mb, 6) * 1e12 if mb <= fast else 3e12 if mb > 3 else 2e12) for mb in range(1, 200)}
    assert cold.knee(speeds) == (None if knee is None else knee * 2**20)
