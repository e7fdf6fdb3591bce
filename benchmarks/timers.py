"""Read the time of a call in one of three ways; a result says which.

* *wall*: a clock around the calls. On a CPU that is the time of the work. On a GPU it is the time of the launches too,
  where they take longer than the work: for a small operation it is Python that is timed.
* *events*: two CUDA events on the stream, one before and one after the calls. Only the GPU's time between them counts.
  But a GPU that has nothing to do waits for each launch, and this wait counts too. So a long kernel is put on the
  stream first, and all calls are queued while it runs. It is checked that it still ran when the last was queued.
* *graph*: the calls are recorded in a CUDA graph, and the events are put around its replay. This is what an operation
  takes in a step or a decoder that is recorded. It is the least.

Triton's `do_bench` has the events without the full queue: it shows speeds that are too low for short kernels. Its
`do_bench_cudagraph` has the graph with warm caches: it shows speeds that no step reaches (`cold.py`).

A call that waits for the GPU cannot be queued, and one that asks the system for memory cannot be recorded. Such a call
is timed in the way before, down to *wall*.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from minift.errors import InputError, RunError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NAMES = ("wall", "events", "graph")
# Seconds that a sample should last: a shorter call is repeated within it, so that reading a clock (below 1 µs) and
# waiting for a GPU (about 10 µs) are at most half a percent of it. Not longer: on a busy machine another process takes
# a core for some milliseconds at a time, which is in few of many short samples, and in each of few long ones.
SHORTEST = 0.002
MOST_CALLS = 1_000
IN_A_GRAPH = 100  # calls at most: each is kept as nodes of the graph
OCCUPIED = 0.002  # seconds that the first kernel lasts; twice as long each time that the queue ran empty
LONGEST_OCCUPIED = 0.5  # the launch queue is full long before: a longer wait cannot help
ROWS = 2**16  # of the sum that tells how fast one thread of the GPU adds


class Timer(Protocol):
    """Reads the time of calls.

    Attributes:
        name: of NAMES.
    """

    name: str

    def calls(self, call: Callable[[], object]) -> int:
        """Return how often to repeat a call in a sample. Raise QueueError when this timer cannot time it."""

    def seconds(self, call: Callable[[], object], calls: int, before: Callable[[], object]) -> float:
        """Return the mean seconds of `calls` calls in a row, after a call of `before` that does not count."""


class QueueError(RunError):
    """A call cannot be queued or recorded: it waits for the GPU, or launches more than the launch queue holds."""


def nothing() -> None:
    """Do nothing."""


class Wall:
    """A clock around the calls, read when the device has nothing left to do."""

    name = "wall"

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter):
        self.device, self._clock = device, clock

    def calls(self, call: Callable[[], object]) -> int:
        """Return how often to repeat a call in a sample."""
        return repetitions(self.seconds(call, 1))

    def seconds(self, call: Callable[[], object], calls: int, before: Callable[[], object] = nothing) -> float:
        """Return the mean seconds of `calls` calls in a row, from an idle device until its work is done."""
        before()
        wait_for(self.device)
        start = self._clock()
        for _ in range(calls):
            call()
        wait_for(self.device)
        return (self._clock() - start) / calls


class Events:
    """CUDA events around calls that are all queued before the first of them starts.

    Args:
        cuda: `torch.cuda`; tests give another.
        occupy: puts work on the stream that lasts about so many seconds; by default a sum.
    """

    name = "events"

    def __init__(self, cuda: Any = torch.cuda, occupy: Callable[[float], object] | None = None):
        self._cuda = cuda
        self._occupy = occupy or long_kernel(cuda)
        self._occupied = OCCUPIED

    def calls(self, call: Callable[[], object]) -> int:
        """Return how often to repeat a call in a sample: as often as the launch queue takes."""
        calls = repetitions(self.seconds(call, 1))
        while calls > 1:
            try:
                self.seconds(call, calls)
                break
            except QueueError:
                calls //= 2
        return calls

    def seconds(self, call: Callable[[], object], calls: int, before: Callable[[], object] = nothing) -> float:
        """Return the mean seconds of `calls` calls in a row on the stream.

        Raises:
            QueueError: when the GPU came to the first call before the last was queued, however long it was occupied.
        """
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        occupied = self._occupied
        while occupied <= LONGEST_OCCUPIED:
            self._cuda.synchronize()
            self._occupy(occupied)
            before()
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            full = not begin.query()  # the GPU has not come to it yet: all that is after it was queued in time
            self._cuda.synchronize()
            if full:
                self._occupied = occupied
                return float(begin.elapsed_time(end)) / 1e3 / calls
            occupied *= 2
        raise QueueError("the launch queue ran empty")


class Graph(Events):
    """CUDA events around the replay of a graph in which the calls are recorded."""

    name = "graph"

    def __init__(self, cuda: Any = torch.cuda, occupy: Callable[[float], object] | None = None):
        super().__init__(cuda, occupy)
        self._recorded: tuple[Callable[[], object], int, Any] | None = None

    def calls(self, call: Callable[[], object]) -> int:
        """Return how many calls to record in a graph."""
        return min(IN_A_GRAPH, repetitions(self.seconds(call, 1)))

    def seconds(self, call: Callable[[], object], calls: int, before: Callable[[], object] = nothing) -> float:
        """Return the mean seconds of `calls` calls that are replayed. Raise QueueError when they cannot be recorded."""
        if self._recorded is None or self._recorded[:2] != (call, calls):
            self._recorded = None  # releases the memory of the graph before
            self._recorded = (call, calls, self._record(call, calls))
        return super().seconds(self._recorded[2].replay, 1, before) / calls

    def _record(self, call: Callable[[], object], calls: int) -> Any:
        cuda = self._cuda
        try:
            aside = cuda.Stream()  # what a call does once, such as loading a library, must not be recorded
            aside.wait_stream(cuda.current_stream())
            with cuda.stream(aside):
                call()
            cuda.current_stream().wait_stream(aside)
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                for _ in range(calls):
                    call()
            graph.replay()  # the first is slower
            cuda.synchronize()
        except RuntimeError as error:
            raise QueueError(f"cannot be recorded: {error}") from error
        return graph


def usual(device: str) -> str:
    """Return the name of the timer that a device's work is timed by unless another is asked for."""
    return "events" if device == "cuda" else "wall"


def choose(
    name: str, device: str, call: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[Timer, int]:
    """Return the timer of this name, or the next that can time this call, and how often to repeat it in a sample.

    Raises:
        InputError: for events and graphs on a device that has none.
    """
    if name not in NAMES or (name != "wall" and device != "cuda"):
        raise InputError(f"there is no timer {name!r} on {device}; there is {'wall' if device != 'cuda' else NAMES}")
    ways: list[Callable[[], Timer]] = [lambda: Wall(device, clock), Events, Graph]
    for make in reversed(ways[: NAMES.index(name) + 1]):
        timer = make()
        try:
            return timer, timer.calls(call)
        except QueueError:
            continue
    raise RunError("no timer can time this call")


def repetitions(seconds: float) -> int:
    """Return how often a call of so many seconds is repeated in a sample."""
    return max(1, min(MOST_CALLS, round(SHORTEST / max(seconds, 1e-9))))


def long_kernel(cuda: Any) -> Callable[[float], object]:
    """Return a function that puts one kernel on the stream that lasts about so many seconds and uses little cache.

    It adds up two long columns. Each is the work of one thread, which does one addition after another.
    """

    def add_up(rows: int) -> None:
        torch.ones(rows, 2, device="cuda").cumsum(0)

    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    add_up(ROWS)
    begin.record()
    add_up(ROWS)
    end.record()
    cuda.synchronize()
    rate = ROWS / max(begin.elapsed_time(end) / 1e3, 1e-6)
    return lambda seconds: add_up(max(1, round(seconds * rate)))


def wait_for(device: str) -> None:
    """Return when all work on a GPU is done. On a CPU it is done when a call returns."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_call(
    call: Callable[[], object], calls: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds of `calls` calls in a row, from an idle device until its work is done."""
    return Wall(device, clock).seconds(call, calls, nothing)


def preemptions() -> int:
    """Return how often another process has taken a core from this one; 0 where the system does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0
