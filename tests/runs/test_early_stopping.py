"""The promise of `--patience`: a run ends when its validation loss has stopped falling, and `final/` is its best model.

Where it ends is computed again from the metrics. The model is compared with that of a run of exactly so many steps. A
run that was killed at any moment must end in the same way, and one without anything to evaluate must be refused.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import load_model
from minift.cli import main
from minift.runs import common
from minift.runs.progress import Best
from tests.helpers import write_jsonl


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> list[str]:
    """Return the words of a run that learns its few pairs by heart, and gets worse at those that it does not see."""
    folder = tmp_path_factory.mktemp("patience")
    pairs = [{"question": f"What is {i}?", "answer": f"It is number {i * 7 % 10}."} for i in range(24)]
    data, test = write_jsonl(folder / "a.jsonl", pairs[:16]), write_jsonl(folder / "b.jsonl", pairs[16:])
    found = ["finetune", "--model", small_checkpoint, "--data", data, "--test", test, "--batch-size", 8]
    found += ["--lr", "0.02", "--schedule", "constant", "--warmup", 0, "--dtype", "float32", "--device", "cpu"]
    return [str(word) for word in [*found, "--eval-every", 3]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """Return a run's folder, with all that it has saved on the way: a complete run removes it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "remove_saves", lambda run, state: None)
        assert (
            main([*words, "--out", str(out), "--steps", "300", "--patience", "3", "--save-every", "4", "--keep", "0"])
            == 0
        )
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_model(one).state_dict(), load_model(other).state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_where_it_ends(stopped: Path) -> None:
    """Three evaluations after the lowest loss, each of which is higher; never before."""
    losses = {record["step"]: record["validation_loss"] for record in metrics(stopped) if "validation_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    last = len(metrics(stopped))
    assert last == best + 9 < 300
    evaluated = sorted(losses)
    for i in range(3, len(evaluated)):  # at no earlier evaluation had three brought no lower loss
        if evaluated[i] < last:
            assert min(losses[step] for step in evaluated[i - 2 : i + 1]) < min(
                losses[step] for step in evaluated[: i - 2]
            )


def test_the_model_is_the_best_one(stopped: Path, words: list[str], tmp_path: Path) -> None:
    """A run of exactly so many steps ends with the same model; the last model of this run is another."""
    losses = {record["step"]: record["validation_loss"] for record in metrics(stopped) if "validation_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert main([*words, "--out", str(tmp_path / "short"), "--steps", str(best)]) == 0
    assert same_weights(stopped / "final", tmp_path / "short" / "final")
    assert same_weights(stopped / "final", stopped / "best")
    newest = max(stopped.glob("step_*"))
    assert int(newest.name[5:]) > best
    assert not same_weights(stopped / "final", newest)


@pytest.mark.parametrize("kept", [0, 1, 2, -2, -1])
def test_a_run_that_was_killed_ends_the_same(
    stopped: Path, tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed right after any of its saves. (`best/` may be of a later step, which is then taken again.)"""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    shutil.rmtree(out / "final")
    (out / "compare.json").unlink()
    folders = sorted(out.glob("step_*"))
    for folder in folders[folders.index(folders[kept]) + 1 :]:
        shutil.rmtree(folder)
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert same_weights(out / "final", stopped / "final")
    timeless = [
        [{k: v for k, v in record.items() if "second" not in k} for record in metrics(x)] for x in (out, stopped)
    ]
    assert timeless[0] == timeless[1]
    assert "final/ is the model of step" in capsys.readouterr().out


def test_without_patience_a_run_goes_to_its_end(stopped: Path, words: list[str], tmp_path: Path) -> None:
    steps = len(metrics(stopped))
    assert main([*words, "--out", str(tmp_path / "run"), "--steps", str(steps + 2)]) == 0
    assert len(metrics(tmp_path / "run")) == steps + 2
    assert not (tmp_path / "run" / "best").exists()


def test_it_may_last_to_the_end(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last step is evaluated as well, and may be the best."""
    assert main([*words, "--out", str(tmp_path / "run"), "--steps", "2", "--patience", "1"]) == 0
    assert "final/ is the model" not in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "last"), "--steps", "2", "--keep-last"]) == 0
    assert same_weights(tmp_path / "run" / "final", tmp_path / "last" / "final")


def test_the_best_of_some_losses() -> None:
    best = Best()
    losses = [3.0, 2.0, 2.0, float("nan"), 1.5]
    assert [best.add({"step": i, "validation_loss": loss}) for i, loss in enumerate(losses)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert (best.loss, best.step, best.evaluations_since) == (1.5, 4, 0)
    assert not best.add({"step": 5})
    assert best.evaluations_since == 0


def test_nothing_to_wait_for(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*words, "--out", str(out), "--steps", "9", "--patience", "2", "--eval-every", "0"]) == 2
    assert "--patience needs held-out data to be evaluated on, and --eval-every" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--out", str(out), "--steps", "9", "--patience", "-1"]) == 2
