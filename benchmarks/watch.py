"""Watch what the machine does during a measurement, and mark the turns in which it did something else than usual.

A time depends on the code and on the machine, and only the code is in question. Other processes take time on the same
cores; on a virtual machine, the host takes ("steals") time for other guests; a clock is lowered when a chip gets hot or
reaches its power limit. A turn during which that changed is left out, for all sides.

Three things keep this rule honest. It looks at the machine, never at the time that was measured. It was written before
the measurement. And it compares with the run's own usual state: a machine that is busy all the time is measured as it
is, and the record says how busy it was. So at least half of the turns always count.

Linux counts the time of its cores in ticks of 10 ms. So the counts say nothing about a turn of 20 ms, and short turns
are judged together. What a system does not tell is None, and marks nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks import hardware, nvml, timers
from minift.errors import InputError

WINDOW = 0.5  # seconds: the ticks at both ends of a window are then at most 2 % of a core's time in it
OTHERS = 0.05  # of the cores' time; less is within what ticks of 10 ms can tell
STOLEN = 0.02  # of the cores' time: as much as two times may differ and be called the same
CLOCK = 0.03  # of the clock rate; the steps between the rates of a GPU are below 1 %
CELSIUS = 10.0  # a chip that is so much warmer leaks more, and lowers its clock soon
FEWEST = 6  # turns: with fewer, it is not known what is usual
CORES = 16  # at most so many are asked for their clock: to ask one may wake it up


@dataclass(frozen=True)
class Reading:
    """What the machine says at a moment.

    Attributes:
        at: seconds on a clock.
        busy: seconds that the cores which this process may use have worked, for all processes.
        own: seconds that this process and its known children have worked.
        stolen: seconds that the host of a virtual machine took.
        megahertz: the mean clock of these cores.
        gpu_megahertz, reasons, celsius, watts: of the GPU; see `nvml.Gpu`.
    """

    at: float
    busy: float | None = None
    own: float = 0.0
    stolen: float | None = None
    megahertz: float | None = None
    gpu_megahertz: float | None = None
    reasons: frozenset[str] | None = None
    celsius: float | None = None
    watts: float | None = None


@dataclass(frozen=True)
class State:
    """What the machine did during a turn.

    Attributes:
        others: the share of the cores' time that other processes took.
        stolen: the share of the cores' time that the host took.
    """

    others: float | None = None
    stolen: float | None = None
    megahertz: float | None = None
    gpu_megahertz: float | None = None
    reasons: frozenset[str] | None = None
    celsius: float | None = None
    watts: float | None = None


class Watch:
    """Reads what the machine does. Each argument is for tests.

    Args:
        device: "cuda" for a GPU too.
        children: the ids of child processes that take part in the measurement.
        proc, cpus: the folders where Linux tells about processes and cores.
        gpu: what tells about the GPU; by default NVIDIA's library, if it is there.
        clock, own: return seconds: of a clock, and of the processor time of this process.
    """

    def __init__(
        self,
        device: str = "cpu",
        children: Sequence[int] = (),
        proc: Path = Path("/proc"),
        cpus: Path = Path("/sys/devices/system/cpu"),
        gpu: nvml.Gpu | None = None,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.process_time,
    ):
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.missing: str | None = None  # why the GPU is not watched
        self._children, self._proc, self._cpus, self._gpu = children, proc, cpus, gpu
        self._clock, self._own = clock, own
        self._tick = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
        if device == "cuda" and gpu is None:
            try:
                self._gpu = nvml.find()
            except InputError as error:
                self.missing = str(error)

    def read(self) -> Reading:
        """Return what the machine says now."""
        gpu = self._gpu
        work = hardware.Ticks.now(self._proc, self.cores)
        return Reading(
            self._clock(),
            work.busy if work else None,
            self._own() + sum(map(self._work_of, self._children)),
            work.stolen if work else None,
            self._megahertz(),
            *((gpu.megahertz(), gpu.reasons(), gpu.celsius(), gpu.watts()) if gpu else ()),
        )

    def states(self, readings: Sequence[Reading]) -> list[State]:
        """Return what the machine did in each turn. There is a reading before the first turn and one after each."""
        shares: list[tuple[float | None, float | None]] = []
        n, first = len(readings) - 1, 0
        for turn in range(n):
            long = readings[turn + 1].at - readings[first].at >= WINDOW
            rest = readings[n].at - readings[turn + 1].at
            if (long and rest >= WINDOW) or turn == n - 1:
                shares += [self._shares(readings[first], readings[turn + 1])] * (turn + 1 - first)
                first = turn + 1
        ends = readings[1:]
        return [
            State(*two, one.megahertz, one.gpu_megahertz, one.reasons, one.celsius, one.watts)
            for two, one in zip(shares, ends, strict=True)
        ]

    def marks(self, readings: Sequence[Reading]) -> list[tuple[str, ...]]:
        """Return why each turn is left out, of `samples.MARKS`; () for one that counts."""
        states = self.states(readings)
        if len(states) < FEWEST:
            return [()] * len(states)
        rules = rules_for(usual(states))
        found: list[tuple[str, ...]] = [()] * len(states)
        for mark, broken in rules.items():
            marked = [broken(state) for state in states]
            if sum(marked) <= len(states) / 2:  # otherwise nothing is usual, and the rule could only choose
                found = [(*marks, mark) if now else marks for marks, now in zip(found, marked, strict=True)]
        return found

    def interruptions(self) -> int:
        """Return how often another process has taken a core from this one; 0 where the system does not say."""
        return timers.preemptions()

    def _shares(self, before: Reading, after: Reading) -> tuple[float | None, float | None]:
        """Return the shares of the cores' time between two readings: of other processes, and what was stolen."""
        if before.busy is None or after.busy is None or before.stolen is None or after.stolen is None:
            return None, None
        whole = max(after.at - before.at, 1e-9) * len(self.cores)
        others = after.busy - before.busy - (after.own - before.own)
        return max(0.0, others / whole), (after.stolen - before.stolen) / whole

    def _work_of(self, child: int) -> float:
        """Return the processor seconds of a child process; 0 where the system does not say."""
        try:
            words = (self._proc / str(child) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, words[11:13])) * self._tick  # its user and its system time

    def _megahertz(self) -> float | None:
        """Return the mean clock of the cores; many virtual machines do not say it, or always say the same."""
        found: list[float] = []
        cores = self.cores[:CORES]
        try:
            for core in cores:
                file = self._cpus / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"
                found.append(int(file.read_text(encoding="ascii")) / 1e3)
        except (OSError, ValueError):
            found = self._megahertz_of_cpuinfo(cores)
        return statistics.fmean(found) if found else None

    def _megahertz_of_cpuinfo(self, cores: Sequence[int]) -> list[float]:
        found, core = [], -1
        try:
            with (self._proc / "cpuinfo").open(encoding="utf-8") as file:
                for line in file:
                    name, _, value = line.partition(":")
                    if name.strip() == "processor":
                        core = int(value)
                    elif name.strip() == "cpu MHz" and core in cores:
                        found.append(float(value))
                        if len(found) == len(cores):
                            break  # each further core costs time
        except (OSError, ValueError):
            return []
        return found


def usual(states: Sequence[State]) -> State:
    """Return the state that is usual: the lower median of each number, and the reasons of more than half the turns."""

    def median(name: str) -> float | None:
        values = [value for value in (getattr(state, name) for state in states) if value is not None]
        return statistics.median_low(values) if values else None

    reasons = [reason for state in states for reason in state.reasons or ()]
    common = frozenset(reason for reason in reasons if reasons.count(reason) > len(states) / 2)
    return State(**{one.name: median(one.name) for one in fields(State) if one.name != "reasons"}, reasons=common)


def rules_for(normal: State) -> dict[str, Callable[[State], bool]]:
    """Return, for each mark, the rule that says whether a state differs from the usual one."""

    def above(now: float | None, then: float | None, by: float) -> bool:
        return now is not None and then is not None and now > then + by

    def off(now: float | None, then: float | None, by: float) -> bool:
        return now is not None and then is not None and abs(now - then) > by

    return {
        "clock": lambda state: (
            off(state.megahertz, normal.megahertz, CLOCK * (normal.megahertz or 0))
            or off(state.gpu_megahertz, normal.gpu_megahertz, CLOCK * (normal.gpu_megahertz or 0))
        ),
        "throttled": lambda state: bool((state.reasons or frozenset()) - (normal.reasons or frozenset())),
        "temperature": lambda state: off(state.celsius, normal.celsius, CELSIUS),
        "stolen": lambda state: above(state.stolen, normal.stolen, STOLEN),
        "other load": lambda state: above(state.others, normal.others, OTHERS),
    }
