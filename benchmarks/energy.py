"""Measure how many joules a call takes, where the machine tells.

* A GPU: NVIDIA's library counts the energy of the board (since Volta); of an older one it tells the power, whose mean
  over the time is taken. It is the board's, with its memory, and not that of the processor that launches its work.
* A CPU: Intel's and AMD's processors count the energy of a package (RAPL), which Linux shows in /sys/class/powercap,
  on most systems to its administrator only. It is that of all processes, and of the cores that wait.

Both counters move some times a second or a thousand times, so a call is repeated for two seconds. Where a machine tells
nothing, there is no number, and the reason instead.

    with energy.measured(energy.find("cpu")) as used:
        train()
    print(used.joules or used.reason)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from benchmarks import nvml
from benchmarks.timers import wait_for
from minift.errors import InputError

POWERCAP = Path("/sys/class/powercap")
LEAST = 2.0  # seconds: a hundred times what a counter of NVML needs to move
EVERY = 0.02  # seconds between two readings of a power


@dataclass(frozen=True)
class Meter:
    """Counts joules.

    Attributes:
        source: what tells them: "NVML", "NVML, power" or "RAPL".
        start: begins to count; what it returns gives, when it is called, the joules since then.
    """

    source: str
    device: str
    start: Callable[[], Callable[[], float]]


@dataclass
class Used:
    """The energy that something took.

    Attributes:
        joules: None where nothing tells them.
        source: what told them; see `Meter`.
        reason: why there are none.
    """

    joules: float | None = None
    source: str = ""
    reason: str = ""


def find(device: str, powercap: Path = POWERCAP, gpu: nvml.Gpu | None = None) -> Meter | str:
    """Return what counts the joules of a device, or the reason why nothing does.

    Args:
        device: "cpu" or "cuda".
        powercap, gpu: where the system tells; tests give others.
    """
    if device != "cuda":
        return _find_rapl(powercap)
    try:
        found = gpu or nvml.find()
    except InputError as error:
        return str(error)
    if found.joules() is not None:
        return Meter("NVML", device, lambda: _difference(lambda: found.joules() or 0.0))
    if found.watts() is not None:
        return Meter("NVML, power", device, lambda: Integral(lambda: found.watts() or 0.0).stop)
    return "the driver tells neither the energy nor the power of this GPU"


@contextmanager
def measured(meter: Meter | str) -> Iterator[Used]:
    """Measure the energy of the `with` block; what it gives is filled in when the block has ended.

    Args:
        meter: what `find` returned.
    """
    if isinstance(meter, str):
        yield Used(reason=meter)
        return
    used = Used()
    wait_for(meter.device)
    stop = meter.start()
    yield used
    wait_for(meter.device)
    used.joules, used.source = stop(), meter.source


def joules_a_call(
    call: Callable[[], object],
    meter: Meter | str,
    least: float = LEAST,
    clock: Callable[[], float] = time.perf_counter,
) -> Used:
    """Return the energy of a call, the mean over as many as begin within `least` seconds; without a meter, call none.

    Args:
        meter: what `find` returned.
    """
    calls, start = 0, clock()
    with measured(meter) as used:
        while isinstance(meter, Meter) and (calls == 0 or clock() - start < least):
            call()
            wait_for(meter.device)  # a GPU's queue could otherwise hold many more seconds of work
            calls += 1
    if used.joules is not None:
        used.joules /= calls
    return used


def _difference(read: Callable[[], float]) -> Callable[[], float]:
    before = read()
    return lambda: read() - before


class Integral:
    """Adds up a power over the time, in a thread, by the trapezoidal rule."""

    def __init__(self, watts: Callable[[], float], clock: Callable[[], float] = time.perf_counter):
        self._watts, self._clock, self._ended = watts, clock, Event()
        self._readings = [(clock(), watts())]
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self._readings.append((self._clock(), self._watts()))

    def stop(self) -> float:
        """Return the joules since the beginning."""
        self._ended.set()
        self._thread.join()
        self._readings.append((self._clock(), self._watts()))
        pairs = zip(self._readings, self._readings[1:], strict=False)
        return sum((then - now) * (before + after) / 2 for (now, before), (then, after) in pairs)


def _find_rapl(powercap: Path) -> Meter | str:
    """Return the meter of all packages of the processor. A package's parts (intel-rapl:0:1 …) are in its count."""
    packages = sorted(folder for folder in powercap.glob("intel-rapl:*") if folder.name.count(":") == 1)
    if not packages:
        return "this system tells no energy of a processor (there is no /sys/class/powercap/intel-rapl:0)"
    try:
        ranges = [_microjoules(folder / "max_energy_range_uj") for folder in packages]
        for folder in packages:
            _microjoules(folder / "energy_uj")
    except PermissionError as error:
        return f"{error.filename} can only be read by the system's administrator"
    except (OSError, ValueError) as error:
        return f"{powercap} tells no energy: {error}"

    def start() -> Callable[[], float]:
        before = [_microjoules(folder / "energy_uj") for folder in packages]

        def joules() -> float:
            after = [_microjoules(folder / "energy_uj") for folder in packages]
            # A counter begins again at 0 after its largest value, at most once in the seconds of a measurement.
            return sum((b - a) % (most + 1) for a, b, most in zip(before, after, ranges, strict=True)) / 1e6

        return joules

    return Meter("RAPL", "cpu", start)


def _microjoules(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))
