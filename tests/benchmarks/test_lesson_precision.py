"""The promise of `lesson precision`: its dtypes, roundings and scales are those of the arithmetic."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lessons import precision
from minift.errors import InputError
from tests.helpers import run_here

PRODUCTS = {"query", "key", "value", "attention", "gate", "up", "feed-forward"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    words = ["--steps", 12, "--batch-size", 8, "--rates", 1e-5, 1e-4, 1e-3, "--scaler-steps", 30]
    return run_here("lesson", tmp_path_factory.mktemp("precision"), "precision", *words)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_keeps_all_but_the_products(result: dict, dtype: str) -> None:
    found = result["autocast"][dtype]
    assert {part for part, kind in found.items() if kind == dtype} == PRODUCTS
    assert {kind for part, kind in found.items() if part not in PRODUCTS} == {"float32"}
    assert set(result["autocast"]["float32"].values()) == {"float32"}


def test_positions(result: dict) -> None:
    """By hand: bfloat16 keeps 8 significant bits, so that above 256 not every whole number is one of its own."""
    rounded = {at["position"]: at["bfloat16"] for at in result["positions"]}
    assert rounded == {256: 256, 257: 256, 1_001: 1_000, 5_001: 4_992, 30_001: 29_952}
    for at in result["positions"]:
        assert at["bfloat16_error"] == abs(at["position"] - at["bfloat16"])
        assert at["float32_error"] < 1e-5


def test_lost_updates(result: dict) -> None:
    """Fewer bits and smaller rates lose more; at a rate that changes every bit, nothing is lost."""
    rows = result["updates"]
    for row in rows:
        assert row["float32"] <= row["float16"] <= row["bfloat16"]
        assert row["float32"] < 0.01
    for smaller, larger in pairwise(rows):
        assert smaller["bfloat16"] > larger["bfloat16"]
    assert rows[0]["bfloat16"] > 0.8


def test_a_lost_update_is_one_below_half_a_unit_in_the_last_place() -> None:
    """AdamW's first update is the rate, up or down; bfloat16's neighbours of w are 2^(exponent - 7) apart."""
    from minift.checkpoint import load_model
    from minift.data.conversations import read_all_conversations
    from minift.data.examples import encode_conversations
    from minift.data.templates import template_named
    from minift.pack import collate
    from minift.storage.names import bundled, model_path
    from minift.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model_path("bundled"))
    pairs = read_all_conversations([bundled("pairs.jsonl")])[:8]
    examples, _ = encode_conversations(pairs, template_named("plain"), tokenizer, 256)
    lr = 1e-4
    found = precision.lost_updates(collate(examples, tokenizer.eos_id), lr)["bfloat16"]
    model = load_model(model_path("bundled"))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).bfloat16().float().numpy()
    _, exponent = np.frexp(np.abs(weights))  # w = m · 2^exponent, m in [0.5, 1)
    half = 2.0 ** (exponent - 8) / 2
    assert found == pytest.approx(float((lr < half).mean()), abs=0.03)


def test_bfloat16_weights_learn_less(result: dict) -> None:
    assert result["finetuning"]["bfloat16"]["loss"] > result["finetuning"]["float32"]["loss"]
    assert "in place of" in result["conclusion"]
    even = copy.deepcopy(result)
    even["finetuning"]["bfloat16"]["loss"] = 0.0
    assert "all the same" in precision.conclusion(even)


def test_a_scale_saves_small_gradients_until_large_ones_overflow(result: dict) -> None:
    zero = [row["zero"] for row in result["underflow"]]
    infinite = [row["infinite"] for row in result["underflow"]]
    assert zero == sorted(zero, reverse=True)
    assert zero[0] > zero[-1] == 0.0
    assert infinite == sorted(infinite)
    assert infinite[0] == 0.0 < infinite[-1]


def test_the_scaler_halves_on_overflow_and_doubles_after_a_while(result: dict) -> None:
    trace = result["scaler"]
    assert trace[0]["scale_log2"] == 28
    taken = 0
    for step, after in pairwise(trace):
        taken = taken + 1 if step["stepped"] else 0
        grown = step["stepped"] and taken % precision.GROWTH_INTERVAL == 0
        expected = step["scale_log2"] - 1 if not step["stepped"] else step["scale_log2"] + grown
        assert after["scale_log2"] == expected
    assert not trace[0]["stepped"]
    assert any(step["stepped"] for step in trace)


@pytest.mark.parametrize("words", [["--steps", 0], ["--rates", -1.0], ["--scaler-steps", 0]], ids=str)
def test_wrong_options(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_here("lesson", tmp_path, "precision", *words)
