"""The promise of `attention`: kernels that agree with the formula are compared, others are no result."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import attention, roof
from minift.errors import InputError
from tests.helpers import SMALL, run_here

WORDS = ("--batch-size", 2, "--length", 12, "--document", 5, "--repeats", 1, "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape with shared heads; and a roof, and compiled kernels, that take no time."""
    monkeypatch.setattr(roof, "SIDE", {"cpu": 16})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({**SMALL, "head_dim": 8}))
    return file


def test_every_kernel_that_there_is(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_here("attention", tmp_path, "--config", shape, *WORDS)
    printed = capsys.readouterr().out
    assert [case["document"] for case in result["cases"].values()] == [12, 5]
    for case in result["cases"].values():
        there, skipped = case["kernels"], case["skipped"]
        assert {"used", "used, compiled", "SDPA", "SDPA, math"} <= set(there)
        assert {"SDPA, cuDNN", "varlen"} <= set(skipped)  # these are a GPU's
        assert all(reason and reason in printed for reason in skipped.values())
        assert there["used"]["used_is_times_as_fast"] == 1
        for times in there.values():
            ratio = case["forward_flops"] / times["forward_seconds"]["median"]
            assert times["forward_flops_per_second"] == pytest.approx(ratio)
            ratio = 3 * case["forward_flops"] / times["both_seconds"]["median"]
            assert times["both_flops_per_second"] == pytest.approx(ratio)


@pytest.mark.parametrize("document", [1, 4, 5, 12])
def test_operations_are_those_of_the_pairs_that_see_each_other(document: int) -> None:
    B, H, T, C = 2, 3, 12, 8
    documents = [t // document for t in range(T)]
    pairs = sum(documents[q] == documents[k] for q in range(T) for k in range(q + 1))
    assert attention.visible_flops((B, H, T, C), document) == B * H * pairs * 2 * (2 * C)  # q·kᵀ and the sum of v


def test_documents_that_are_as_long_as_the_row_are_no_second_case(shape: Path, tmp_path: Path) -> None:
    result = run_here("attention", tmp_path, "--config", shape, *WORDS, "--document", 12)
    assert list(result["cases"]) == ["one document a row"]


def wrong_mixture(query: Tensor, key: Tensor, value: Tensor, mask: object) -> Tensor:
    return query * 1.001 + 0 * key.sum() + 0 * value.sum()


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, mask: object) -> Tensor:
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query, key.detach(), value, is_causal=True, enable_gqa=True
    )
    return mixed + 0 * key.sum()


@pytest.mark.parametrize(("wrong", "part"), [(wrong_mixture, "result"), (wrong_gradient, "gradient of q|of k")])
def test_a_kernel_that_is_wrong_is_no_result(
    wrong: Callable[..., Tensor], part: str, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FastScaledDotProduct", lambda: wrong)
    with pytest.raises(InputError, match=rf"used: its ({part}) is .* off the formula"):
        run_here("attention", tmp_path, "--config", shape, *WORDS)


@pytest.mark.parametrize("option", ["--batch-size", "--length", "--document", "--repeats"])
def test_wrong_input(option: str, shape: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=option.removeprefix("--").replace("-", "_")):
        run_here("attention", tmp_path, "--config", shape, *WORDS, option, 0)
