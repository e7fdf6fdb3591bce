"""The promise that numbers which go wrong are noticed at once: by step, by name, and before they spread.

A learning rate of 1000, a weight that is NaN, a batch without a target, ids that no vocabulary has: none of them ends
in a model that looks trained, or in a traceback.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import train
from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import TrainConfig
from minift.data.templates import template_named
from minift.errors import InputError, RunError
from minift.evaluation.evaluate import compare
from minift.generate import Sampling, generate, stream
from minift.loss import next_token_loss
from minift.pack import IGNORE, Batch
from minift.prompts import Pair
from minift.tokenizer.base import Tokenizer
from minift.train import TrainState, train_step, validation_loss
from tests.helpers import bits, new_state, same, small_model, write_jsonl

CONFIG = TrainConfig(steps=9, dtype="float32")


@pytest.fixture
def state() -> TrainState:
    return new_state()


@pytest.fixture
def batch(state: TrainState) -> Batch:
    return next(iter(state.batches))


def without_targets(batch: Batch) -> Batch:
    return replace(batch, targets=torch.full_like(batch.targets, IGNORE), n_targets=0)


@pytest.fixture
def words(tmp_path: Path, small_checkpoint: Path) -> list[str]:
    """Return the words of a finetuning of 30 steps, without its `--out`."""
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    command = ["finetune", "--model", small_checkpoint, "--data", write_jsonl(tmp_path / "pairs.jsonl", pairs)]
    command += ["--batch-size", 4, "--steps", 30, "--warmup", 0, "--device", "cpu"]
    return [str(word) for word in command]


def last_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lr", ["1000", "1e30", "1e38"])
def test_a_learning_rate_far_too_high_ends_the_run_with_what_to_lower(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], lr: str, dtype: str
) -> None:
    """Or the run ends well, with losses that are finite; it never saves a model that is not finite."""
    out = tmp_path / "run"
    code = main([*words, "--lr", lr, "--dtype", dtype, "--out", str(out)])
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    assert all(0 < loss < float("inf") for loss in losses)
    for folder in out.glob("step_*"):
        load_model(folder)  # refuses what is not finite
    if code:
        line = last_line(capfd.readouterr().err)
        assert line.startswith(f"minift: error: step {len(losses) + 1} is not finite (loss ")
        assert "; lower --lr" in line
        assert not (out / "final").exists()
    else:
        load_model(out / "final")
    assert code == 1 or lr == "1000"


@pytest.mark.parametrize(
    "flags", [["--steps", "1"], ["--steps", "2", "--save-every", "1", "--keep", "0"]], ids=["last step", "a save"]
)
def test_weights_that_are_no_numbers_are_never_saved(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """The step that makes them had a finite loss and a finite gradient."""
    out = tmp_path / "run"
    assert main([*words, "--lr", "1e38", *flags, "--out", str(out)]) == 1
    line = last_line(capfd.readouterr().err)
    assert line == "minift: error: step 1 has made the weight embed_tokens.weight infinite or NaN; lower --lr"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (
            lambda state: state.model.layers[1].mlp.up_proj.weight.data[0, 0].fill_(float("nan")),
            "the weight layers.1.mlp",
        ),
        (lambda state: state.model.norm.weight.data[0].fill_(float("inf")), "the weight norm.weight"),
        (
            lambda state: state.model.layers[0].self_attn.o_proj.weight.register_hook(lambda grad: grad / 0),
            "the gradient of layers.0.self_attn.o_proj.weight",
        ),
    ],
    ids=["NaN in a weight", "Inf in a weight", "Inf in a gradient"],
)
def test_what_is_not_finite_is_named_and_the_weights_stay(
    state: TrainState, batch: Batch, spoil: Callable[[TrainState], object], culprit: str
) -> None:
    spoil(state)
    before = bits(state.model)
    result = train_step(state, [batch], 1e-2, CONFIG)
    assert not result.stepped
    assert result.culprit is not None
    assert result.culprit.startswith(culprit)
    assert all(torch.equal(now, before[name]) or now.isnan().any() for name, now in bits(state.model).items())
    assert not state.optimizer.state  # AdamW has not seen the gradient


def test_a_loss_that_is_not_a_number_ends_a_run_at_its_step(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One batch in the middle is at fault. The steps before it are saved, and the run continues once it is repaired."""
    whole, out, taken = tmp_path / "whole", tmp_path / "run", train.train_step

    def spoiled(state: Any, window: Any, *rest: Any) -> Any:
        if state.step == 7:
            state.model.embed_tokens.weight.register_hook(lambda grad: grad * float("nan"))
        return taken(state, window, *rest)

    assert main([*words, "--dtype", "float32", "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", spoiled)
        assert main([*words, "--dtype", "float32", "--out", str(out)]) == 1
    assert "step 8 is not finite (" in last_line(capfd.readouterr().err)
    assert [folder.name for folder in out.glob("step_*")] == ["step_000007"]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert (out / "final" / "model.pt").read_bytes() == (whole / "final" / "model.pt").read_bytes()


def test_a_damaged_model_is_refused_before_training(
    words: list[str], tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    model.layers[1].mlp.gate_proj.weight.data[3, 2] = float("nan")
    save_model(tmp_path / "bad", model, tokenizer)
    assert main([*words, "--model", str(tmp_path / "bad"), "--out", str(tmp_path / "run")]) == 2
    line = last_line(capfd.readouterr().err)
    assert line.endswith("model.pt: tensor layers.1.mlp.gate_proj.weight holds NaN or infinite values")
    assert not (tmp_path / "run").exists()


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_window_without_a_target_is_refused(state: TrainState, batch: Batch) -> None:
    with pytest.raises(InputError, match=r"^step 1: no micro-batch of it has a target"):
        train_step(state, [without_targets(batch), without_targets(batch)], 1e-2, CONFIG)


def test_a_micro_batch_without_a_target_changes_nothing_in_its_window(batch: Batch) -> None:
    alone, together = new_state(), new_state()
    first, second = (
        train_step(alone, [batch], 1e-2, CONFIG),
        train_step(together, [without_targets(batch), batch], 1e-2, CONFIG),
    )
    assert first.loss == second.loss
    assert same(bits(alone.model), bits(together.model))


def test_an_evaluation_without_a_target_is_refused(state: TrainState, batch: Batch) -> None:
    with pytest.raises(InputError, match="no target"):
        validation_loss(state, [without_targets(batch)])
    assert validation_loss(state, [batch, without_targets(batch)]) == validation_loss(state, [batch])


# Ids and lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [97, 10**9, -1, -(2**40)])
def test_an_id_that_is_not_in_the_vocabulary_is_named(state: TrainState, batch: Batch, id: int) -> None:
    model = state.model
    named = pytest.raises(InputError, match=rf"token id.* {id}\b")
    with named:
        model(torch.tensor([[5, id]]))
    with named:
        train_step(state, [replace(batch, tokens=batch.tokens.clone().fill_(id))], 1e-2, CONFIG)
    with named:
        next_token_loss(torch.zeros(1, 2, 24), model.head_weight, torch.tensor([[5, id]]))
    with named:
        generate(model, [[1], [1, id]], 4)
    with named:
        next(stream(model, [id], 4))


def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = small_model()
    assert model(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 97)
    with pytest.raises(InputError, match="65 tokens are more than the model's 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="the prompt has 65 tokens; it must be shorter than the model's 64 positions"):
        generate(model, [[1] * 65], 4)


# Using a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_finite_generates_nothing(temperature: float) -> None:
    """Its weights became NaN in memory: a saved model with NaN is not loaded."""
    model = small_model()
    model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="logits are not finite numbers"):
        generate(model, [[1, 2]], 4, Sampling(temperature))


def test_an_empty_document_among_many_is_skipped_and_counted(
    small_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`data stats` counts all the others."""
    pages = tmp_path / "pages.jsonl"
    lines = [b'{"text": "page %d"}\n' % i for i in range(20_000)]
    lines[12_345] = b'{"text": ""}\n'
    pages.write_bytes(b"".join(lines))
    assert main(["data", "stats", str(pages), "--tokenizer", str(small_checkpoint)]) == 0
    shown = capfd.readouterr()
    assert "19,999" in shown.out
    assert f"{pages}:12346: the text is empty" in shown.out + shown.err


def test_an_answer_of_nothing_is_no_division_by_nothing(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    pairs = [Pair("What is nothing?", answer=""), Pair("What is a noun?", answer="A word.")]
    result = compare((model, tokenizer), (model, tokenizer), pairs, template_named("plain"))
    assert "nan" not in json.dumps(result).lower()
