"""The promise of `loss`: ways to a loss are compared in time, memory and error, if what trains is right."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import loss, process, roof
from minift.errors import InputError
from tests.helpers import SMALL, run_here

WORDS = ("--batch-size", 2, "--length", 12, "--repeats", 1, "--device", "cpu", "--dtype", "float32", "--loss-chunk", 7)
PYTORCHS_OWN = {"F.linear_cross_entropy", "… accurate"}


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape; and a roof, compiled functions, and processes of their own, that take no time."""
    monkeypatch.setattr(roof, "SIDE", {"cpu": 16})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(process, "fresh", lambda benchmark, name, *words: len(name))
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(SMALL))
    return file


def test_every_way_that_there_is(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_here("loss", tmp_path, "--config", shape, *WORDS)
    printed = capsys.readouterr().out
    there = {"used", "plain", "all logits", "all logits, compiled"}
    there |= PYTORCHS_OWN if hasattr(F, "linear_cross_entropy") else set()
    assert set(result["ways"]) == there
    assert set(result["skipped"]) == {*there, *PYTORCHS_OWN} - there
    assert result["flops"] == 3 * 2 * (2 * 12) * SMALL["hidden_size"] * SMALL["vocab_size"]
    assert result["ways"]["used"]["used_is_times_as_fast"] == 1
    for name, way in result["ways"].items():
        assert name in printed
        assert way["flops_per_second"] == pytest.approx(result["flops"] / way["seconds"]["median"])
        assert way["peak_bytes"] == len(name)
        assert max(way["loss_off"], way["hidden_gradient_off"], way["weight_gradient_off"]) < 1e-5


def test_a_way_that_is_not_there_is_named(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    result = run_here("loss", tmp_path, "--config", shape, *WORDS)
    assert set(result["skipped"]) == PYTORCHS_OWN
    assert f"F.linear_cross_entropy: skipped, PyTorch {torch.__version__} has none" in capsys.readouterr().out


def scaled_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return 1.001 * loss.textbook.loss(hidden, weight, targets)


def loss_of_other_weights(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return loss.textbook.loss(hidden, weight.detach(), targets)


@pytest.mark.parametrize("wrong", [scaled_loss, loss_of_other_weights])
def test_a_loss_that_is_wrong_is_no_result(
    wrong: object, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "FusedNextTokenLoss", lambda chunk: wrong)
    with pytest.raises(InputError, match=r"used: .* off the formula"):
        run_here("loss", tmp_path, "--config", shape, *WORDS)


def test_the_formula_in_pieces_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(11, (2, 6), generator=generator)
    found = loss._formula(hidden, weight, targets)
    states, head = (x.detach().double().requires_grad_() for x in (hidden, weight))
    right = -torch.log_softmax(states @ head.T, -1).gather(-1, targets[..., None]).sum()
    right.backward()
    for one, other in zip(found, (right.detach(), states.grad, head.grad), strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    """With all logits, and the gradient at them, it is at least twice N·V numbers; a chunk at a time, far less."""
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({**SMALL, "vocab_size": 8_192}))
    words = [f"--config={file}", "--batch-size=32", "--length=64", "--device=cpu", "--dtype=float32", "--loss-chunk=64"]
    logits = 32 * 64 * 8_192 * 4
    assert process.fresh("loss", "all logits", *words) > 1.9 * logits
    assert process.fresh("loss", "used", *words) < 0.5 * logits
