"""The promise of the benchmarks' clock: what is compared takes turns, warming up does not count, a GPU is waited for.

The clock here is not a real one: it moves when a call says so, and what is measured must then be exact. And the roofs
have the units that they claim.
"""

import io
import json
import sys
from collections.abc import Callable, Mapping

import pytest
import torch

from benchmarks import floor, roof, side, timers, timing
from benchmarks.samples import Samples
from benchmarks.timing import in_turns, paired_ratio
from minift.errors import InputError
from minift.pack import IGNORE
from tests.helpers import as_samples


class FakeMachine:
    """A clock that only its calls move, and the names of all calls. On "cuda", work is done when it is waited for."""

    def __init__(self, device: str = "cpu") -> None:
        self.now, self.pending, self.device = 0.0, 0.0, device
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes so long the first time, the second …; the last number holds for all that follow."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.pending += left.pop(0) if len(left) > 1 else left[0]
            if self.device == "cpu":
                self.wait()

        return call

    def wait(self) -> None:
        self.now, self.pending = self.now + self.pending, 0.0


def seconds_of(measured: Mapping[str, Samples]) -> dict[str, list[float]]:
    return {name: one.seconds for name, one in measured.items()}


@pytest.fixture(autouse=True)
def no_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is taken again, however busy the machine is."""
    monkeypatch.setattr(timing.Watch, "interruptions", lambda self: 0)


def test_sides_take_turns_in_an_order_that_is_reversed_each_time() -> None:
    machine = FakeMachine()
    sides = {"a": machine.work("a", 1.0), "b": machine.work("b", 2.0)}
    assert seconds_of(in_turns(sides, 3, clock=machine.clock)) == {"a": [1.0] * 3, "b": [2.0] * 3}
    warm, turns = machine.log[:-6], machine.log[-6:]
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert warm == ["a"] * 3 + ["b"] * 3  # two calls that warm up, and one that tells how long a call takes


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_warming_up_does_not_count(warmup: int) -> None:
    machine = FakeMachine()
    sides = {"a": machine.work("a", *[100.0] * warmup, 1.0, 2.0)}
    assert seconds_of(in_turns(sides, 2, warmup=warmup, clock=machine.clock)) == {"a": [2.0, 2.0]}
    assert len(machine.log) == warmup + 1 + 2


@pytest.mark.parametrize(("seconds", "calls"), [(0.003, 1), (0.0004, 5), (1e-6, 1_000), (0.0, 1_000)])
def test_short_calls_are_measured_several_in_a_row(seconds: float, calls: int) -> None:
    machine = FakeMachine()
    (times,) = in_turns({"a": machine.work("a", seconds)}, 2, clock=machine.clock).values()
    assert times.seconds == pytest.approx([seconds] * 2)  # of one call
    assert [sample.calls for sample in times.samples] == [calls] * 2
    assert len(machine.log) == 3 + 2 * calls


def test_a_gpu_is_waited_for_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is only queued takes no time on the clock until it is waited for."""
    machine = FakeMachine("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
    monkeypatch.setattr(floor, "measure", lambda *_: floor.Floor(0.0, 0.0, 0.0))
    sides = {"a": machine.work("a", 7.0, 7.0, 1.0), "b": machine.work("b", 0.01)}
    times = seconds_of(in_turns(sides, 2, device="cuda", clock=machine.clock))
    assert times["a"] == pytest.approx([1.0, 1.0])
    assert times["b"] == pytest.approx([0.01, 0.01])


def test_a_cpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("there may be no GPU"))
    timing.wait_for("cpu")


def test_paired_ratio_is_the_median_of_the_turns_ratios() -> None:
    assert paired_ratio([2.0, 40.0, 9.0], [1.0, 20.0, 3.0]) == 2.0  # a turn in which all was slow changes nothing
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_side_takes_its_turn_when_it_is_asked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1, 2, 3 … seconds. What comes before a turn, and the wait for others, is nobody's time."""
    machine = FakeMachine(device)
    work, losses = machine.work("step", *map(float, range(1, 10))), iter(range(10, 20))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(sys, "stdin", io.StringIO("steps\n" * 3))

    def step() -> float:
        work()
        return float(next(losses))

    out = io.StringIO()
    together = machine.work("together", 100.0)
    side.serve({"ready": True}, step, device, 2, out, together, machine.clock)
    ready, *answers = map(json.loads, out.getvalue().splitlines())
    assert ready == {"ready": True}
    assert [answer["seconds"] for answer in answers] == [1.5, 3.5, 5.5]  # of one step
    assert [answer["losses"] for answer in answers] == [[10, 11], [12, 13], [14, 15]]
    assert all(answer["peak_bytes"] == 7 if device == "cuda" else answer["peak_bytes"] > 1e7 for answer in answers)
    assert machine.log == ["together", "step", "step"] * 3


def test_sides_train_on_whole_rows() -> None:
    ids = torch.arange(2 * 3 * 4).view(2, 3, 4)
    first, second = side.whole_rows(ids)
    assert torch.equal(second.tokens, ids[1])
    assert first.targets.tolist() == [[1, 2, 3, IGNORE], [5, 6, 7, IGNORE], [9, 10, 11, IGNORE]]
    assert first.n_targets == (first.targets != IGNORE).sum() == 9
    assert first.positions.tolist() == [[0, 1, 2, 3]] * 3
    assert not first.document_ids.any()


def test_sides_that_do_not_train_the_same_are_no_comparison() -> None:
    assert side.losses_apart({"a": [2.0, 1.0], "b": [2.0, 1.005]}) == pytest.approx(0.005)
    with pytest.raises(InputError, match=r"up to 2\.0% apart"):
        side.losses_apart({"a": [2.0, 1.0], "b": [2.0, 1.02]})


# The roofs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs that are measured in no time, and are therefore wrong."""
    monkeypatch.setitem(roof.SIDE, "cpu", 32)
    monkeypatch.setitem(roof.COPIED, "cpu", 2**14)
    monkeypatch.setattr(timers, "SHORTEST", 1e-4)


@pytest.mark.usefixtures("tiny_roof")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("reading", "read_bandwidth"), [(0.0625, 2**14 / 0.0625), (1.0, 2**14 / 0.25)])
def test_roofs_by_their_definition(
    dtype: torch.dtype, reading: float, read_bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best run counts: 2·n³ operations of a product, a copy's bytes read and written, the matrix of a vector.

    Of the readings the fastest counts, and the matrix-vector product is one of them.
    """
    reads = {"read/sum of int64": [0.25, 0.5], "read/maximum of int32": [2.0], "read/sum of float32": [reading]}
    times = {"product": [2.0, 0.5], "copy": [0.25, 1.0], "matvec": [0.125], **reads}
    monkeypatch.setattr(roof, "search", lambda device, dtype: [roof.Tried((8, 16, 32), 1.0)])

    def in_turns(sides: dict[str, Callable[[], object]], *_: object, **__: object) -> dict[str, Samples]:
        assert list(sides) == list(times)
        for call in sides.values():
            call()
        return as_samples(times)

    monkeypatch.setattr(roof, "in_turns", in_turns)
    measured = roof.measure("cpu", dtype)
    assert measured.dtype in str(dtype)
    assert (measured.flops, measured.shape) == (2 * 8 * 16 * 32 / 0.5, (8, 16, 32))
    assert measured.bandwidth == 2**14 / 0.25
    assert measured.matvec_bandwidth == 2**13 / 0.125
    assert measured.read_bandwidth == read_bandwidth
    assert roof.Roof(**measured.to_dict()) == measured  # type: ignore[arg-type]


@pytest.mark.usefixtures("tiny_roof")
def test_roofs_of_this_machine_are_plausible() -> None:
    measured = roof.measure("cpu", torch.float32)
    assert 1e6 < measured.flops < 1e14
    assert 1e5 < measured.bandwidth < 1e13
    assert 1e5 < measured.matvec_bandwidth <= measured.read_bandwidth < 1e13


def test_the_higher_cost_is_the_roof() -> None:
    machine = roof.Roof("float32", flops=100.0, bandwidth=10.0, matvec_bandwidth=10.0)
    assert machine.seconds(200.0, 10.0) == 2.0  # bound by arithmetic: 20 FLOPs a byte, above the ridge of 10
    assert machine.seconds(20.0, 10.0) == 1.0  # bound by traffic
