"""The promise of `--tensorboard`: its events are the numbers of `metrics.jsonl`, as TensorBoard itself reads them."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.config import TrainConfig
from minift.runs import loop
from minift.runs.events import Events, open_events
from minift.runs.finetune import finetune, finetune_job
from tests.helpers import new_state, take_steps, write_jsonl
from tests.runs.ranks import by_two

FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--steps", "6", "--save-every", "2"]
FLAGS += ["--keep", "0", "--eval-every", "3"]


@pytest.fixture
def words(small_checkpoint: Path, tmp_path: Path) -> list[str]:
    """Return a command that writes into `run`."""
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(26)]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    return ["finetune", "--model", str(small_checkpoint), "--data", data, "--out", str(tmp_path / "run"), *FLAGS]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out: Path) -> list[dict[str, float]]:
    """Return the scalars that TensorBoard finds, a dictionary for each step."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    steps: dict[int, dict[str, float]] = {}
    for tag in found.Tags()["scalars"]:
        for event in found.Scalars(tag):
            assert tag not in steps.setdefault(event.step, {"step": event.step}), "twice"
            steps[event.step][tag] = event.value
    return [steps[step] for step in sorted(steps)]


def assert_same(out: Path, count: int) -> None:
    records = metrics(out)
    assert len(records) == count
    before = {"step": 0, "validation_loss": records[0].pop("validation_loss_before")}
    assert events(out) == [pytest.approx(record, rel=1e-6) for record in (before, *records)]


def test_tensorboard_reads_the_metrics(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main([*words, "--tensorboard"]) == 0
    assert_same(tmp_path / "run", 6)
    found = events(tmp_path / "run")
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} < set(found[1])
    assert [step["step"] for step in found if "validation_loss" in step] == [0, 3, 6]


def test_a_resumed_run_doubles_no_step(words: list[str], tmp_path: Path) -> None:
    """Nor does a second one; and the clock, which may jump back, does not decide which file is the last."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert main([*words, "--tensorboard"]) == 0
    for steps_lost in (1, 2):
        shutil.rmtree(out / "final")
        for step in (6, 4)[:steps_lost]:
            shutil.rmtree(out / f"step_{step:06d}")
        last = max((out / "tensorboard").iterdir())
        last.write_bytes(last.read_bytes()[:-5])  # as after a kill in the middle of a write
        assert main(["finetune", "--resume", "--out", str(out)]) == 0
        assert_same(out, 6)
    assert len(list((out / "tensorboard").iterdir())) == 3


def test_a_run_that_gets_it_when_resumed_has_all_steps(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert main(words) == 0
    assert not (out / "tensorboard").exists()
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000006")
    assert main(["finetune", "--resume", "--out", str(out), "--tensorboard"]) == 0
    assert_same(out, 6)


def test_an_evaluation_that_is_made_up_for_is_in_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal interrupts the evaluation after step 3; `--resume` makes it, once."""
    pytest.importorskip("tensorboard")
    out, plain, calls = tmp_path / "run", loop.validation_loss, []

    def interrupted(*arguments: Any) -> float:
        calls.append(True)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validation_loss", interrupted)
        assert main([*words, "--tensorboard"]) == 1
    assert [step["step"] for step in events(out) if "validation_loss" in step] == [0]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert_same(out, 6)
    assert [step["step"] for step in events(out) if "validation_loss" in step] == [0, 3, 6]


def test_one_rank_writes(words: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    job = finetune_job(str(small_checkpoint), [str(tmp_path / "pairs.jsonl")])
    config = TrainConfig(steps=3, batch_size=4, dtype="float32", device="cpu", parallel="ddp", tensorboard=True)
    by_two(finetune, job, config, tmp_path / "run")
    assert_same(tmp_path / "run", 3)


def test_without_the_package_nothing_begins(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # an import of it fails
    assert main([*words, "--tensorboard"]) == 2
    assert "pip install tensorboard (the extra minift[tensorboard])" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(words) == 0  # it is imported only when it is asked for


def test_what_was_added_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """So that a killed run has the events of all steps that it saved."""
    pytest.importorskip("tensorboard")
    state = new_state()
    take_steps(state, 1)
    written = open_events(TrainConfig(steps=9, tensorboard=True), tmp_path, state)
    for step in (2, 3):
        written.add({"step": step, "loss": 1.5, "tokens": 7})
        assert [found["step"] for found in events(tmp_path)][-1] == step
    written.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("culprit", ["metrics", "events"])
def test_a_full_disk_ends_a_run_in_the_same_line(
    words: list[str],
    tmp_path: Path,
    culprit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorboard")
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115  # every write fails for want of space
    if culprit == "metrics":
        opened: Callable[..., Any] = loop.metrics_file

        class Full:
            def __init__(self, *given: Any):
                self.file = opened(*given)

            def __enter__(self) -> Any:
                self.file.__enter__()
                return full

            def __exit__(self, *given: Any) -> None:
                self.file.__exit__(*given)

        monkeypatch.setattr(loop, "metrics_file", Full)
    else:
        write = Events._write

        def refuse(self: Events, **content: Any) -> None:
            self._file.flush()
            self._records._writer = self._file = full.buffer
            write(self, **content)

        monkeypatch.setattr(Events, "_write", refuse)
    assert main([*words, "--tensorboard"]) == 1
    err = capsys.readouterr().err
    assert f"minift: error: [Errno {errno.ENOSPC}] No space left on device" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "final").exists()
