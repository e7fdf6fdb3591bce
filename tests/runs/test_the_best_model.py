"""The promise of every run with held-out data: `final/` is the model of the lowest validation loss that the run saw.

That loss is computed again from the weights in `final/`, by `minift evaluate`'s own code and not by the loop's. Where
no step has lowered it, the model is the base, to the bit.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import load_model, load_tokenizer
from minift.cli import main
from minift.config import TrainConfig
from minift.data.conversations import Reading, read_all_conversations
from minift.data.records import Skipped
from minift.data.templates import template_named
from minift.evaluation.evaluate import answer_likelihoods, make_questions
from minift.runs import common
from minift.runs.clock import is_evaluated
from minift.train import Plan
from tests.helpers import write_jsonl

QUIET = ["--dtype", "float32", "--device", "cpu", "--warmup", "0", "--schedule", "constant", "--compare", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return pairs that are learned by heart, and others that this helps at first, and then harms."""
    folder = tmp_path_factory.mktemp("best")
    pairs = [{"question": f"What is {i}?", "answer": f"It is number {i * 7 % 10}."} for i in range(24)]
    return write_jsonl(folder / "a.jsonl", pairs[:16]), write_jsonl(folder / "b.jsonl", pairs[16:])


def words(model: Path, data: tuple[Path, Path], out: Path, *more: Any) -> list[str]:
    found = ["finetune", "--model", model, "--data", data[0], "--test", data[1], "--batch-size", 8, "--out", out]
    return [str(word) for word in (*found, *QUIET, *more)]


def validation_losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    before = {0: records[0]["validation_loss_before"]}
    return before | {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def loss_of(model: Path, test: Path) -> float:
    """The mean nats of a target over the held-out pairs, as an evaluation computes it: alone, and unpacked."""
    tokenizer = load_tokenizer(model)
    pairs = read_all_conversations([str(test)], Skipped(True), Reading(), print)
    questions, _ = make_questions(pairs, template_named("plain", tokenizer), tokenizer, 255)
    found = answer_likelihoods(load_model(model), questions)
    return sum(one.nll for one in found) / sum(one.n_targets for one in found)


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_model(one).state_dict(), load_model(other).state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2", "--lr", "0.3"]], ids=["all weights", "adapters"])
def test_final_is_the_lowest(
    small_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(small_checkpoint, data, tmp_path / "run", "--lr", "0.02", "--steps", "60", *more)) == 0
    losses = validation_losses(tmp_path / "run")
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 60
    assert losses[60] > losses[best]
    assert loss_of(tmp_path / "run" / "final", data[1]) == pytest.approx(losses[best], rel=1e-5)
    assert loss_of(small_checkpoint, data[1]) == pytest.approx(losses[0], rel=1e-5)
    printed = capsys.readouterr().out
    assert f"final/ is the model of step {best}, where the validation loss was lowest: {losses[best]:.4f}" in printed
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"final/ is the model of step {best}" in page
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"best", "compare.json"}
    assert not [name for name in names if name.startswith("step_")]


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"]], ids=["all weights", "adapters"])
def test_where_no_step_helps_it_is_the_base(
    small_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The base knows what is held out by heart: whatever else it learns, it knows that less."""
    known = write_jsonl(tmp_path / "c.jsonl", [{"question": "Who?", "answer": "zebra quartz fjord"}])
    first = words(small_checkpoint, (known, known), tmp_path / "first", "--lr", "0.02", "--steps", "40")
    assert main(first) == 0
    base = tmp_path / "first" / "final"
    assert main(words(base, (data[0], known), tmp_path / "run", "--lr", "0.05", "--steps", "10", *more)) == 0
    losses = validation_losses(tmp_path / "run")
    assert min(losses, key=lambda step: losses[step]) == 0
    assert same_weights(tmp_path / "run" / "final", base)
    assert "final/ is the model as it was before the first step" in capsys.readouterr().out


def test_the_last_step_where_that_is_asked_for(
    small_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(small_checkpoint, data, tmp_path / "run", "--lr", "0.02", "--steps", "60", "--keep-last")
    assert main(run) == 0
    losses = validation_losses(tmp_path / "run")
    assert loss_of(tmp_path / "run" / "final", data[1]) == pytest.approx(losses[60], rel=1e-5)
    assert loss_of(tmp_path / "run" / "best", data[1]) == pytest.approx(min(losses.values()), rel=1e-5)
    assert "final/ is the model of the last step, as --keep-last asks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (10, None, 10),
        (3, None, 3),
        (1, None, 1),
        (100, None, 10),
        (101, None, 10),
        (347, None, 10),
        (19, None, 10),
        (100, 0, 1),
        (100, 30, 4),
    ],
)
def test_how_often_it_is_evaluated(steps: int, every: int | None, expected: int) -> None:
    plan, config = Plan(steps, steps, 1), TrainConfig(steps=steps, eval_every=every)
    evaluated = [step for step in range(1, steps + 1) if is_evaluated(step, plan, config)]
    assert len(evaluated) == expected
    assert evaluated[-1] == steps


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    from minift.runs.progress import Best

    best = Best.of_records([{"step": 1, "validation_loss_before": math.nan, "validation_loss": 2.0}])
    assert (best.step, best.loss) == (1, 2.0)
    assert Best.of_records([{"step": 1, "validation_loss_before": 1.0, "validation_loss": 2.0}]).step == 0


def test_the_best_of_a_later_step_that_is_lost_is_not_taken(
    small_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run was killed after it had written best/, and goes on from an earlier step, but not so far."""
    out = tmp_path / "run"
    run = words(small_checkpoint, data, out, "--lr", "0.02", "--steps", "60", "--eval-every", "2", "--save-every", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "remove_saves", lambda run, state: None)
        assert main([*run, "--keep", "0"]) == 0
    losses = validation_losses(out)
    best = min(losses, key=lambda step: losses[step])
    early = max(step for step in range(4, best, 4))  # of an earlier best step
    for folder in [folder for folder in out.glob("step_*") if int(folder.name[5:]) > early]:
        shutil.rmtree(folder)
    shutil.rmtree(out / "final")
    capsys.readouterr()
    assert main(["finetune", "--resume", "--max-minutes", "1e-9", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    losses = validation_losses(out)
    if f"best: is the model of step {best}, not that of step" in printed:
        (said,) = re.findall(r"final/ is the model of step (\d+)", printed)
    else:
        said = str(max(losses))
    assert loss_of(out / "final", data[1]) == pytest.approx(losses[int(said)], rel=1e-5)
