"""The promise of `timers.py`: events are around work that was all queued before, or a graph, and a result says which.

The GPU here has a clock for the host and one for its stream. A launch takes the host 5 µs. The stream does one thing
after another, and each not before it was launched.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import floor, timers
from benchmarks.timers import Events, Graph, QueueError, Wall, choose
from benchmarks.timing import in_turns
from minift.errors import InputError

LAUNCH = 5e-6  # seconds of the host
ROOM = 1_000  # launches that the queue holds


class FakeCuda:
    """As much of `torch.cuda` as the timers use."""

    def __init__(self) -> None:
        self.host = self.stream_ends = 0.0
        self.queue: deque[float] = deque()
        self.recording: list[float] | None = None
        self.log: list[str] = []

    def launch(self, seconds: float) -> None:
        if self.recording is not None:
            self.recording.append(seconds)
            return
        self.host += LAUNCH
        while self.queue and self.queue[0] <= self.host:
            self.queue.popleft()
        if len(self.queue) >= ROOM:
            self.host = self.queue.popleft()
        self.stream_ends = max(self.stream_ends, self.host) + seconds
        self.queue.append(self.stream_ends)

    def kernel(self, seconds: float, name: str = "kernel") -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.launch(seconds)

        return call

    def synchronize(self) -> None:
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.stream_ends)

    def Event(self, enable_timing: bool) -> "FakeEvent":  # noqa: N802
        assert enable_timing
        return FakeEvent(self)

    def CUDAGraph(self) -> "FakeGraph":  # noqa: N802
        return FakeGraph(self)

    def Stream(self) -> "FakeCuda":  # noqa: N802
        return self

    def current_stream(self) -> "FakeCuda":
        return self

    def wait_stream(self, other: object) -> None:
        pass

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: "FakeGraph") -> Iterator[None]:
        self.recording = graph.kernels
        try:
            yield
        finally:
            self.recording = None


class FakeEvent:
    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda
        self.at = 0.0

    def record(self) -> None:
        self.cuda.launch(0.0)
        self.at = self.cuda.stream_ends

    def query(self) -> bool:
        return self.cuda.host >= self.at

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.at - self.at) * 1e3  # milliseconds


class FakeGraph:
    def __init__(self, cuda: FakeCuda):
        self.cuda, self.kernels = cuda, list[float]()

    def replay(self) -> None:
        self.cuda.log.append(f"replay of {len(self.kernels)}")
        self.cuda.launch(sum(self.kernels))


@pytest.fixture
def gpu() -> FakeCuda:
    return FakeCuda()


def test_events_time_the_gpu_and_not_the_launches(gpu: FakeCuda) -> None:
    """A kernel of 1 µs, launched each 5 µs: a wall clock reads the launches, events with a full queue the kernel."""
    events = Events(gpu, gpu.launch)
    call = gpu.kernel(1e-6)
    assert events.seconds(call, 100) == pytest.approx(1e-6)
    gpu.synchronize()
    start = gpu.host
    for _ in range(100):
        call()
    gpu.synchronize()
    assert (gpu.host - start) / 100 == pytest.approx(5e-6, rel=0.05)


def test_the_stream_is_occupied_for_longer_until_all_is_queued_in_time(gpu: FakeCuda) -> None:
    asked: list[float] = []

    def occupy(seconds: float) -> None:
        asked.append(seconds)
        gpu.launch(seconds)

    events = Events(gpu, occupy)
    assert events.seconds(gpu.kernel(1e-6), 900) == pytest.approx(1e-6)  # launching them takes 4.5 ms
    assert asked == [0.002, 0.004, 0.008]
    assert events.seconds(gpu.kernel(1e-6), 900) == pytest.approx(1e-6)
    assert asked[3:] == [0.008]  # it remembers


def test_more_calls_than_the_queue_holds_are_measured_fewer_in_a_row(gpu: FakeCuda) -> None:
    def call() -> None:
        for _ in range(3):
            gpu.launch(0.2e-6)

    events = Events(gpu, gpu.launch)
    calls = events.calls(call)
    assert 100 < 3 * calls < ROOM
    assert events.seconds(call, calls) == pytest.approx(0.6e-6)


def test_a_call_that_waits_cannot_be_queued_and_is_timed_by_the_wall_clock(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        gpu.launch(0.001)
        gpu.synchronize()

    with pytest.raises(QueueError, match="ran empty"):
        Events(gpu, gpu.launch).calls(call)
    monkeypatch.setattr(timers, "Events", lambda: Events(gpu, gpu.launch))
    monkeypatch.setattr(timers, "Graph", lambda: Graph(gpu, gpu.launch))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(floor, "measure", lambda *_: floor.Floor(0.0, 0.0, 0.0))
    waits = {"waits": call, "queues": gpu.kernel(0.001)}
    for timer, names in (("graph", ["wall", "graph"]), ("events", ["wall", "events"]), ("wall", ["wall", "wall"])):
        found = in_turns(waits, 2, device="cuda", timer=timer, clock=lambda: gpu.host)
        assert [one.timer for one in found.values()] == names
        assert found["waits"].seconds == pytest.approx([0.001] * 2, rel=0.02)
        assert found["queues"].seconds == pytest.approx([0.001] * 2, rel=0.02)


def test_a_graph_is_recorded_once_and_replayed(gpu: FakeCuda) -> None:
    graph, call = Graph(gpu, gpu.launch), gpu.kernel(1e-4)
    calls = graph.calls(call)
    assert calls == 20  # 2 ms
    gpu.log.clear()
    for _ in range(3):
        assert graph.seconds(call, calls) == pytest.approx(1e-4)
    assert (
        gpu.log == ["kernel"] * (1 + 20) + ["replay of 20"] * 4
    )  # once aside, then recorded; the first does not count
    assert graph.calls(gpu.kernel(1e-9)) == timers.IN_A_GRAPH


@pytest.mark.parametrize("kind", [Events, Graph])
def test_emptying_the_caches_is_not_timed(kind: type[Events], gpu: FakeCuda) -> None:
    timer, call = kind(gpu, gpu.launch), gpu.kernel(1e-4)
    timer.calls(call)
    gpu.log.clear()
    assert timer.seconds(call, 1, gpu.kernel(0.1, "emptied")) == pytest.approx(1e-4)
    assert gpu.log.count("emptied") == 1
    assert gpu.log[-2] == "emptied"


def test_a_cpu_has_a_wall_clock_only() -> None:
    assert isinstance(choose("wall", "cpu", timers.nothing)[0], Wall)
    for name, device in (("events", "cpu"), ("graph", "cpu"), ("sundial", "cpu"), ("sundial", "cuda")):
        with pytest.raises(InputError, match=name):
            choose(name, device, timers.nothing)


def test_the_long_kernel_lasts_as_long_as_it_is_asked_to(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose threads add a number each 10 ns."""

    class Columns:
        def __init__(self, rows: int, columns: int, device: str):
            self.rows = rows

        def cumsum(self, dim: int) -> None:
            assert dim == 0
            gpu.launch(self.rows * 1e-8)

    monkeypatch.setattr(torch, "ones", Columns)
    occupy = timers.long_kernel(gpu)
    gpu.synchronize()
    before = gpu.host
    occupy(0.01)
    gpu.synchronize()
    assert gpu.host - before == pytest.approx(0.01, rel=0.02)


@pytest.mark.cuda
@pytest.mark.parametrize("name", timers.NAMES)
def test_a_real_gpu_reads_a_known_workload(name: str) -> None:
    """Twice the work takes twice the time, by each timer."""
    x = torch.zeros(2**26, device="cuda")

    def once() -> None:
        x.add_(1)

    def twice() -> None:
        once()
        once()

    found = in_turns({"once": once, "twice": twice}, 9, device="cuda", timer=name)
    assert found["once"].timer == name
    assert sorted(found["twice"].seconds)[4] / sorted(found["once"].seconds)[4] == pytest.approx(2, rel=0.05)
