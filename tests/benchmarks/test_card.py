"""The one command for a GPU: it ends within its budget, in its order, and a kill loses nothing.

Times are those of a clock that only the parts move, the GPU is a stand-in for NVIDIA's library, and the parts are
stubs. Two tests start real processes that hang.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from benchmarks import card, nvml
from benchmarks.__main__ import BENCHMARKS
from benchmarks.card import GRACE, PARTS, Card, Part
from benchmarks.process import ROOT
from minift.errors import InputError


class Machine:
    """A clock that only stub parts move.

    Args:
        takes: the seconds of each part, by name; with `fails` it ends with an error, and with `writes` leaves a result.
    """

    def __init__(self, takes: dict[str, float], fails: Sequence[str] = (), writes: dict[str, Any] | None = None):
        self.now, self.takes, self.fails, self.writes = 1_000.0, takes, fails, writes or {}
        self.started: list[str] = []
        self.ended: list[str] = []

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], log: IO[str]) -> "Stub":
        name = Path(log.name).stem
        self.started.append(name)
        log.write(f"{name} says a line\n")
        log.flush()
        if name in self.writes:
            (Path(log.name).parent / f"{name}.json").write_text(json.dumps(self.writes[name]), encoding="utf-8")
        return Stub(self, name)

    def end(self, process: Any) -> None:
        self.ended.append(process.name)
        self.now += GRACE


class Stub:
    pid = 0

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name

    def wait(self, timeout: float | None = None) -> int:
        takes = self.machine.takes[self.name]
        assert timeout is not None
        self.machine.now += min(takes, timeout)
        if takes > timeout:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return int(self.name in self.machine.fails)

    def kill(self) -> None:
        raise AssertionError("`end` is given")


class FakeNvml:
    """A library like `pynvml`, of a GPU that is hot and does not tell its power."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        return 1_755

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return 0x04 | 0x01

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:  # noqa: N802
        return 81

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        raise self.NVMLError("not supported")


def measured(machine: Machine, tmp_path: Path, budget: float = 840, gpu: Any = None) -> dict[str, Any]:
    """Return what is written of a measurement by stubs."""
    file = tmp_path / "card.json"
    Card(str(file), budget, gpu, machine.clock, machine.start, machine.end).measure(PARTS)
    return json.loads(file.read_text(encoding="utf-8"))


def states(result: dict[str, Any]) -> dict[str, str]:
    return {part["name"]: part["state"] for part in result["parts"]}


NAMES = [part.name for part in PARTS]
QUICK = dict.fromkeys(NAMES, 10.0)
PEERS = {"mfu_of_data_sheet": {"minift, compiled": 0.56, "minift": 0.4, "transformers": 0.7}}


def test_correctness_comes_first_and_the_order_is_the_one_that_is_promised(tmp_path: Path) -> None:
    machine = Machine(QUICK)
    result = measured(machine, tmp_path)
    assert machine.started == NAMES == ["tests", "peers-1.1b", "peers-7b", "ops", "generate", "memory"]
    assert set(states(result).values()) == {"done"}
    assert result["correct"] is True
    assert result["seconds"] == 60
    assert [part["seconds"] for part in result["parts"]] == [10] * 6
    assert result["parts"][3]["output"] == ["ops says a line"]


@pytest.mark.parametrize("budget", [60, 200, 600, 840])
def test_it_ends_within_its_budget_whatever_hangs(budget: float, tmp_path: Path) -> None:
    """Each part would take for ever, and is ended when its share is over; one for which too little is left is named."""
    machine = Machine(dict.fromkeys(NAMES, 1e9))
    result = measured(machine, tmp_path, budget)
    assert machine.now - 1_000 <= budget
    assert result["seconds"] <= budget
    found = states(result)
    assert list(found) == NAMES
    assert set(found.values()) <= {"stopped", "left out"}
    assert machine.ended == machine.started == [name for name, state in found.items() if state == "stopped"]
    for part in result["parts"]:
        why = "were over" if part["state"] == "stopped" else "s are left for it, and it needs at least"
        assert why in part["why"]
    assert result["correct"] is None


def test_what_a_part_leaves_goes_to_those_after_it(tmp_path: Path) -> None:
    result = measured(Machine(QUICK), tmp_path)
    bounds = {part["name"]: part["bound_seconds"] for part in result["parts"]}
    assert bounds["tests"] == pytest.approx(840 * 120 / 840 - GRACE)
    assert bounds["peers-1.1b"] == pytest.approx(830 * 210 / 720 - GRACE)
    assert bounds["memory"] == pytest.approx(790 - GRACE)  # the last one may have all that is left


def test_little_time_goes_to_correctness_and_the_rest_is_named(tmp_path: Path) -> None:
    result = measured(Machine({**QUICK, "tests": 100.0}), tmp_path, budget=250)
    assert states(result)["tests"] == "stopped"  # 250 · 120 / 840 s less GRACE are less than its 100
    assert {"left out"} == {states(measured(Machine(QUICK), tmp_path, budget=30))[name] for name in NAMES[:-1]}


def test_a_failure_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(Machine(QUICK, fails=["tests", "ops"]), tmp_path)
    assert states(result) == {**dict.fromkeys(NAMES, "done"), "tests": "failed", "ops": "failed"}
    assert result["correct"] is False
    assert "tests failed: these are times of wrong code" in capsys.readouterr().out


def test_an_aim_is_compared_with_the_best_of_minift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`transformers` may be faster than that; and a part that is stopped is judged by what it has written."""
    machine = Machine({**QUICK, "peers-7b": 1e9}, writes={"peers-1.1b": PEERS, "peers-7b": PEERS})
    result = measured(machine, tmp_path)
    parts = {part["name"]: part for part in result["parts"]}
    found = {name: (part["state"], part["mfu"], part["aim_mfu"]) for name, part in parts.items() if "mfu" in part}
    assert found == {"peers-1.1b": ("done", 0.56, 0.55), "peers-7b": ("stopped", 0.56, 0.60)}
    out = capsys.readouterr().out
    assert "MFU 0.560; the aim of 0.55 is reached" in out
    assert "MFU 0.560; the aim of 0.60 is not reached" in out


def test_a_gpu_without_a_known_peak_has_no_mfu(tmp_path: Path) -> None:
    result = measured(Machine(QUICK, writes={"peers-1.1b": {"mfu_of_data_sheet": None}}), tmp_path)
    assert result["parts"][1]["mfu"] is None


def test_the_gpu_is_watched_during_each_part(tmp_path: Path) -> None:
    result = measured(Machine(QUICK), tmp_path, gpu=nvml.find(FakeNvml()))
    for part in result["parts"]:
        gpu = part["gpu"]
        assert (gpu["median_megahertz"], gpu["highest_celsius"], gpu["mean_watts"]) == (1755, 81, None)
        assert gpu["slowed_down"] == {"power cap": len(gpu["looks"])}  # idle is no slowing down


def test_the_file_is_whole_at_any_moment(tmp_path: Path) -> None:
    """Before a part it names the one that runs, with all that earlier ones found."""
    seen: list[dict[str, Any]] = []
    machine = Machine(QUICK, writes={"tests": {"a": 1}})

    def start(command: Sequence[str], log: IO[str]) -> Stub:
        seen.append(json.loads((tmp_path / "card.json").read_text(encoding="utf-8")))
        return machine.start(command, log)

    Card(str(tmp_path / "card.json"), 840, None, machine.clock, start, machine.end).measure(PARTS)
    for i, result in enumerate(seen):
        assert states(result) == {**dict.fromkeys(NAMES[:i], "done"), NAMES[i]: "running"}
        assert i == 0 or result["parts"][0]["result"] == {"a": 1}


def test_a_package_that_is_missing_leaves_its_part_out(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    Card(str(file), 840, None).measure([Part("tests", ("no_such_package",), 1, 1, measures=False)])
    (part,) = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert (part["state"], part["why"]) == ("left out", "no_such_package is not installed")


@pytest.mark.parametrize("part", [part for part in PARTS if part.measures], ids=lambda part: part.name)
def test_each_part_is_a_command_that_can_be_parsed(part: Part) -> None:
    program, name, *words = part.words
    assert program == "benchmarks"
    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    options = parser.parse_args([*words, "--device=cuda", "--json=x.json"])
    assert (options.device, options.json) == ("cuda", "x.json")


def test_the_tests_are_those_that_need_a_gpu() -> None:
    files = card.cuda_tests()
    assert "tests/kernels/test_waits.py" in [file.replace("\\", "/") for file in files]
    command = [sys.executable, "-m", *PARTS[0].words, "--collect-only", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert found.returncode == 0, found.stdout[-500:]


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = argparse.Namespace(json=None, budget=840, only=None, device="auto")
    with pytest.raises(InputError, match="torch finds none here"):
        card.run(options)


# Real processes -------------------------------------------------------------------------------------------------------

HANGS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
HANGS += "print('began', flush=True); time.sleep(600)"


def hanging(pids: list[int]) -> Callable[[Sequence[str], IO[str]], Any]:
    def start(command: Sequence[str], log: IO[str]) -> Any:
        process = card.start([sys.executable, "-c", HANGS], log)
        pids.append(process.pid)
        return process

    return start


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no groups of processes")
def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pids: list[int] = []
    file = tmp_path / "card.json"
    began = time.monotonic()
    Card(str(file), 4 + GRACE, None, start=hanging(pids)).measure([Part("ops", ("benchmarks", "ops"), 1, 1)])
    assert time.monotonic() - began < 4 + GRACE
    (part,) = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert (part["state"], part["output"]) == ("stopped", ["began"])
    for _ in range(100):  # the group's last process is waited for by the system, not by us
        if not group_lives(pids[0]):
            break
        time.sleep(0.05)
    assert not group_lives(pids[0])


def group_lives(group: int) -> bool:
    """Return whether a group has a process that is not merely waiting to be collected."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no groups of processes")
def test_a_signal_ends_the_part_and_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    file = tmp_path / "card.json"
    start = hanging(pids)

    def start_and_signal(command: Sequence[str], log: IO[str]) -> Any:
        process = start(command, log)
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # comes while the part is waited for
        return process

    monkeypatch.setattr(card, "choose_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(nvml, "find", lambda: (_ for _ in ()).throw(InputError("no library")))
    monkeypatch.setattr(Card.__init__, "__defaults__", (time.monotonic, start_and_signal, card.end))
    before = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="1"):
            card.run(argparse.Namespace(json=str(file), budget=600, only=["ops", "memory"], device="auto"))
    finally:
        signal.signal(signal.SIGALRM, before)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert states(result) == {"ops": "stopped"}
    assert result["gpu_not_watched"] == "no library"
    assert not group_lives(pids[0])
