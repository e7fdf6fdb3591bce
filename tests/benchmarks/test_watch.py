"""The promise of `watch.py`: a turn in which the machine was not as usual is left out by rule, whatever its time was.

The machine here is a folder with the files of Linux, and an object with the functions of NVIDIA's library.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import nvml, watch
from benchmarks.samples import MARKS
from benchmarks.watch import Reading, Watch
from minift.errors import InputError

CORES = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]


class Machine:
    """Two cores, in a folder; each turn lasts a second."""

    def __init__(self, folder: Path):
        self.folder, self.now, self.own = folder, 0.0, 0.0
        self.ticks = {"user": 0, "nice": 0, "steal": 0}
        self.megahertz: list[float] | None = None
        self.watch = Watch(proc=folder, cpus=folder / "cpu", clock=lambda: self.now, own=lambda: self.own)
        self.watch.cores = [0, 1]
        self.write()

    def write(self) -> None:
        cores = [
            f"cpu{core} {self.ticks['user']} {self.ticks['nice']} 0 500 7 0 0 {self.ticks['steal']} 0 0\n"
            for core in (0, 1)
        ]
        other_core = "cpu7 99999 0 0 0 0 0 0 99999 0 0\n"  # which this process may not use
        total = "cpu 77 0 0 0 0 0 0 77 0 0\n"
        (self.folder / "stat").write_text(total + "".join(cores) + other_core + "intr 1 2 3\n")
        for core, megahertz in enumerate(self.megahertz or []):
            file = self.folder / "cpu" / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{round(megahertz * 1e3)}\n")

    def turn(self, seconds: float = 1.0, own: float = 0.8, others: float = 0.0, stolen: float = 0.0) -> Reading:
        """A turn in which this process worked so many seconds, and of each core others took such a share."""
        self.now += seconds
        self.own += own
        self.ticks["user"] += round(100 * own / 2)  # on both cores
        self.ticks["nice"] += round(100 * others * seconds)
        self.ticks["steal"] += round(100 * stolen * seconds)
        self.write()
        return self.watch.read()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_shares_are_those_of_the_cores_that_may_be_used(machine: Machine) -> None:
    readings = [machine.watch.read(), machine.turn(others=0.3, stolen=0.1), machine.turn(2.0, own=3.0)]
    first, second = machine.watch.states(readings)
    assert (first.others, first.stolen) == pytest.approx((0.3, 0.1))
    assert (second.others, second.stolen) == pytest.approx((0.0, 0.0))


def test_children_are_not_others(machine: Machine, tmp_path: Path) -> None:
    child = tmp_path / "4711"
    child.mkdir()
    fields = ["S", *"0" * 10, "0", "0", "0"]

    def work(user: int, system: int) -> None:
        fields[11:13] = str(user), str(system)
        (child / "stat").write_text("4711 (a name) with ) " + " ".join(fields))

    machine.watch._children = [4711, 4712]  # the second has ended
    work(0, 0)
    before = machine.watch.read()
    work(50, 10)
    after = machine.turn(others=0.4)  # 0.8 seconds on two cores, of which 0.6 are the child's
    (state,) = machine.watch.states([before, after])
    assert state.others == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "usual", "much", "mark"),
    [("others", 0.0, 0.10, "other load"), ("others", 0.5, 0.60, "other load"), ("stolen", 0.05, 0.10, "stolen")],
)
def test_a_turn_with_more_load_than_usual_is_marked(
    kind: str, usual: float, much: float, mark: str, machine: Machine
) -> None:
    loads = [usual] * 4 + [much] + [usual] * 3
    readings = [machine.watch.read(), *(machine.turn(**{kind: load}) for load in loads)]  # type: ignore[arg-type]
    assert machine.watch.marks(readings) == [()] * 4 + [(mark,)] + [()] * 3


@pytest.mark.parametrize(("others", "stolen"), [(0.9, 0.0), (0.0, 0.4), (0.04, 0.01)])
def test_a_machine_that_is_always_the_same_has_no_marks(others: float, stolen: float, machine: Machine) -> None:
    """However busy it is. And less than the thresholds is within what ticks can tell."""
    readings = [machine.watch.read()]
    for turn in range(8):
        few = turn % 2 if others < 0.1 and stolen < 0.1 else 1
        readings.append(machine.turn(own=0.2, others=others * few, stolen=stolen * few))
    assert machine.watch.marks(readings) == [()] * 8


def test_fewer_than_six_turns_have_no_usual_state(machine: Machine) -> None:
    readings = [machine.watch.read(), *(machine.turn(others=load) for load in (0, 0, 0.9, 0, 0))]
    assert machine.watch.marks(readings) == [()] * 5
    assert machine.watch.marks([*readings, machine.turn()]) == [(), (), ("other load",), (), (), ()]


def test_short_turns_are_judged_together(machine: Machine) -> None:
    """A tick of 10 ms is half of a turn of 20 ms, and says nothing about it."""
    readings = [machine.watch.read()]
    for turn in range(100):
        readings.append(machine.turn(0.02, own=0.0, others=0.5 if turn % 10 == 0 else 0.0))
    states = machine.watch.states(readings)
    assert len(states) == 100
    assert all(state.others == pytest.approx(0.05, abs=0.02) for state in states)
    assert not any(machine.watch.marks(readings))
    readings += [machine.turn(0.02, own=0.0, others=0.5) for _ in range(30)]
    marks = machine.watch.marks(readings)
    assert not any(marks[:75])
    assert all(mark == ("other load",) for mark in marks[100:])


def test_the_clock_of_the_cores(machine: Machine, tmp_path: Path) -> None:
    readings = []
    for megahertz in (2900, 3000, 3010, 3000, 2990, 3000, 3200, 3000, 3000):
        machine.megahertz = [megahertz - 10, megahertz + 10]
        readings.append(machine.turn())
    assert [reading.megahertz for reading in readings[:3]] == [2900, 3000, 3010]
    assert machine.watch.marks(readings) == [()] * 5 + [("clock",)] + [()] * 2  # the first reading belongs to no turn


def test_the_clock_by_cpuinfo(machine: Machine) -> None:
    lines = [f"processor\t: {core}\nmodel name : X\ncpu MHz\t\t: {2000.5 + core}\n" for core in (0, 1, 7)]
    (machine.folder / "cpuinfo").write_text("\n".join(lines))
    assert machine.turn().megahertz == 2001.0


def test_a_clock_that_is_never_the_same_leaves_nothing_out(machine: Machine) -> None:
    readings = []
    for turn in range(12):
        machine.megahertz = [2000 + 300.0 * turn] * 2
        readings.append(machine.turn())
    assert machine.watch.marks(readings) == [()] * 11


def test_another_system_says_nothing_and_marks_nothing(tmp_path: Path) -> None:
    blind = Watch(proc=tmp_path / "nowhere", cpus=tmp_path / "nowhere")
    readings = [blind.read() for _ in range(9)]
    assert all(reading.busy is reading.stolen is reading.megahertz is None for reading in readings)
    assert blind.marks(readings) == [()] * 8


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_this_machine() -> None:
    seen = Watch()
    before = seen.read()
    sum(range(3_000_000))
    after = seen.read()
    assert before.busy is not None
    assert after.busy is not None
    assert 0 < before.busy <= after.busy
    assert 0 < after.own - before.own < 10


# A GPU ----------------------------------------------------------------------------------------------------------------


class FakeNvml:
    """The functions of `pynvml` that are used. A value of None is not supported by this GPU."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.says: dict[str, float | None] = {
            "ClockInfo": 1980,
            "CurrentClocksThrottleReasons": 0,
            "Temperature": 50,
            "PowerUsage": 400_000,
            "TotalEnergyConsumption": 5_000,
        }
        self.handles: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.handles.append(uuid)
        return "handle"

    def __getattr__(self, name: str) -> Any:
        def get(handle: str, *words: int) -> float:
            assert handle == "handle"
            value = self.says[name.removeprefix("nvmlDeviceGet")]
            if value is None:
                raise self.NVMLError("Not Supported")
            return value

        return get


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    return FakeNvml()


def test_what_a_gpu_says_is_in_its_units(library: FakeNvml) -> None:
    gpu = nvml.find(library)
    assert library.handles == ["GPU-12ab"]
    assert (gpu.megahertz(), gpu.celsius(), gpu.watts(), gpu.joules()) == (1980, 50, 400, 5)
    library.says["CurrentClocksThrottleReasons"] = 0x1 | 0x4 | 0x40 | 0x100  # idle and a display's clock slow nothing
    assert gpu.reasons() == {"power cap", "hardware thermal slowdown"}
    library.says = dict.fromkeys(library.says)
    assert (gpu.megahertz(), gpu.reasons(), gpu.celsius(), gpu.watts(), gpu.joules()) == (None,) * 5


@pytest.mark.parametrize(
    ("what", "usual", "then", "mark"),
    [
        ("ClockInfo", 1980, 1900, "clock"),
        ("ClockInfo", 1400, 1980, "clock"),
        ("ClockInfo", 1980, 1950, None),
        ("CurrentClocksThrottleReasons", 0, 0x20, "throttled"),
        ("CurrentClocksThrottleReasons", 0x4, 0x4 | 0x8, "throttled"),
        ("CurrentClocksThrottleReasons", 0x4, 0x4, None),  # at its power limit all the time: that is how it runs
        ("CurrentClocksThrottleReasons", 0x4, 0, None),
        ("CurrentClocksThrottleReasons", 0, 0x1, None),
        ("Temperature", 60, 75, "temperature"),
        ("Temperature", 60, 68, None),
    ],
)
def test_a_gpu_that_changes(what: str, usual: int, then: int, mark: str | None, library: FakeNvml) -> None:
    seen = Watch("cuda", gpu=nvml.find(library), proc=Path("nowhere"), cpus=Path("nowhere"))
    readings = [seen.read()]
    for turn in range(8):
        library.says[what] = then if turn == 5 else usual
        readings.append(seen.read())
    assert seen.marks(readings) == [()] * 5 + [(mark,) if mark else ()] + [()] * 2
    assert mark is None or mark in MARKS


def test_without_the_package_a_gpu_is_not_watched_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    seen = Watch("cuda", proc=Path("nowhere"), cpus=Path("nowhere"))
    assert seen.missing is not None
    assert "minift[gpu]" in seen.missing
    assert "nvidia-ml-py" in seen.missing
    assert seen.read().gpu_megahertz is None


def test_a_driver_without_the_library_is_named(library: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(library, "nvmlInit", fail)
    with pytest.raises(InputError, match="Driver Not Loaded"):
        nvml.find(library)


def test_the_thresholds_are_above_what_the_counts_can_tell() -> None:
    tick, cores = 0.01, 1
    assert 2 * tick / (watch.WINDOW * cores) < watch.OTHERS
    assert tick / (watch.WINDOW * cores) <= watch.STOLEN
