"""The promise of `energy.py`: joules by what counts them, of a call; and where nothing does, the reason.

The counters here are files and an object that a test moves.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import energy, nvml
from benchmarks.energy import Meter, find, joules_a_call, measured
from minift.errors import InputError

LARGEST = 262_143_328_850  # of a counter, in microjoules


class Packages:
    """The folder of a machine with two processors. The parts of a processor have their own counts."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
            (folder / name).mkdir()
            (folder / name / "max_energy_range_uj").write_text(f"{LARGEST}\n")
            self.write(name, 1_000_000)
        (folder / "dtpm").mkdir()

    def write(self, name: str, microjoules: int) -> None:
        (self.folder / name / "energy_uj").write_text(f"{microjoules}\n")

    def take(self, joules: float) -> None:
        for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
            now = int((self.folder / name / "energy_uj").read_text())
            self.write(name, (now + round(joules * 1e6 / 2)) % (LARGEST + 1))


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(tmp_path)


def test_a_processors_joules_are_those_of_its_packages(packages: Packages) -> None:
    with measured(find("cpu", packages.folder)) as used:
        packages.take(12.5)
        assert used.joules is None  # not before the end
    packages.take(100.0)
    assert (used.joules, used.source, used.reason) == (pytest.approx(12.5), "RAPL", "")


def test_a_counter_that_begins_again(packages: Packages) -> None:
    packages.write("intel-rapl:0", LARGEST - 1_000_000)
    packages.write("intel-rapl:1", LARGEST)
    with measured(find("cpu", packages.folder)) as used:
        packages.take(8.0)
    assert used.joules == pytest.approx(8.0)


def test_joules_a_call_are_the_mean_of_those_in_two_seconds(packages: Packages) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.3
        packages.take(6.0)

    used = joules_a_call(call, find("cpu", packages.folder), clock=lambda: now[0])
    assert used.joules == pytest.approx(6.0)
    assert now[0] == pytest.approx(7 * 0.3)  # the seventh begins within two seconds
    used = joules_a_call(call, find("cpu", packages.folder), least=0, clock=lambda: now[0])
    assert used.joules == pytest.approx(6.0)


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    reason = find("cpu", tmp_path / "nowhere")
    assert isinstance(reason, str)
    assert "intel-rapl" in reason
    used = joules_a_call(lambda: pytest.fail("called for nothing"), reason)
    assert (used.joules, used.reason) == (None, reason)
    with measured(reason) as used:
        pass
    assert (used.joules, used.reason) == (None, reason)


def test_a_count_that_only_the_administrator_reads(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *words: Any, **how: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *words, **how)

    monkeypatch.setattr(Path, "read_text", refuse)
    reason = find("cpu", packages.folder)
    assert reason == f"{packages.folder / 'intel-rapl:0' / 'energy_uj'} can only be read by the system's administrator"


def test_a_count_that_is_damaged(packages: Packages) -> None:
    (packages.folder / "intel-rapl:0" / "energy_uj").write_text("much\n")
    reason = find("cpu", packages.folder)
    assert isinstance(reason, str)
    assert "much" in reason


# A GPU ----------------------------------------------------------------------------------------------------------------


class Board:
    """A GPU that tells what a test says; None is what it does not tell."""

    def __init__(self, joules: float | None, watts: float | None):
        self.energy, self.power = joules, watts

    def joules(self) -> float | None:
        return self.energy

    def watts(self) -> float | None:
        return self.power


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    return done


def gpu_of(board: Board) -> nvml.Gpu:
    return board  # type: ignore[return-value]


def test_a_gpus_energy_is_counted_when_its_work_is_done(waits: list[str]) -> None:
    board = Board(100.0, 400.0)
    with measured(find("cuda", gpu=gpu_of(board))) as used:
        assert waits == ["waited"]
        board.energy = 140.0
    assert (used.joules, used.source) == (40.0, "NVML")
    assert len(waits) == 2

    def call() -> None:
        assert board.energy is not None
        board.energy += 3.0

    assert joules_a_call(call, find("cuda", gpu=gpu_of(board)), least=0.01).joules == pytest.approx(3.0)


def test_the_power_of_an_older_gpu_is_added_up(waits: list[str]) -> None:
    """200 W for as long as the block lasted, by the clock around it."""
    meter = find("cuda", gpu=gpu_of(Board(None, 200.0)))
    assert isinstance(meter, Meter)
    start = time.perf_counter()
    with measured(meter) as used:
        inner = time.perf_counter()
        time.sleep(0.1)
        inner = time.perf_counter() - inner
    outer = time.perf_counter() - start
    assert used.source == "NVML, power"
    assert used.joules is not None
    assert 200 * inner <= used.joules <= 200 * outer


def test_a_power_that_changes_is_added_up_by_trapezoids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "EVERY", 1e9)  # the test takes the readings itself
    times, powers = iter([0.0, 1.0, 3.0]), iter([100.0, 300.0, 100.0])
    integral = energy.Integral(lambda: next(powers), lambda: next(times))
    integral._readings.append((next(times), next(powers)))
    assert integral.stop() == 1 * 200.0 + 2 * 200.0


def test_a_gpu_that_tells_nothing() -> None:
    reason = find("cuda", gpu=gpu_of(Board(None, None)))
    assert reason == "the driver tells neither the energy nor the power of this GPU"


def test_without_nvidias_library_the_reason_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> nvml.Gpu:
        raise InputError("watching a GPU needs the package pynvml: pip install nvidia-ml-py")

    monkeypatch.setattr(nvml, "find", missing)
    assert find("cuda") == "watching a GPU needs the package pynvml: pip install nvidia-ml-py"


# In the results -------------------------------------------------------------------------------------------------------


def test_a_step_has_joules_a_token_where_there_are_any(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from benchmarks import step

    result = {
        **dict.fromkeys(("config", "dtype", "device", "batch_size", "length"), "x"),
        **{"grad_accum": 1, "compile": False, "parts_seconds": {}, "adds_up": True, "roof": {"flops": 1e9}},
        **{key: {"min": 1.0, "median": 1.0, "max": 1.0} for key in ("sum_of_parts_seconds", "whole_step_seconds")},
        **dict.fromkeys(("parts_of_same_step", "parts_of_whole_step", "mfu", "tokens_per_second"), 1.0),
        **{"model_flops_per_second": 1e9, "mfu_of_data_sheet": None},
    }
    step.show(result)
    assert "token in whole steps" not in capsys.readouterr().out
    step.show({**result, "joules_per_token": 0.0125, "joules_by": "RAPL"})
    assert "12.5 mJ a token in whole steps (RAPL)" in capsys.readouterr().out


def test_this_machine_tells_joules_or_a_reason() -> None:
    meter = find("cpu")
    assert isinstance(meter, Meter) or meter
    if isinstance(meter, Meter):
        with measured(meter) as used:
            time.sleep(0.2)
        assert used.joules is not None
        assert 0 < used.joules < 1_000 * (os.cpu_count() or 1)
