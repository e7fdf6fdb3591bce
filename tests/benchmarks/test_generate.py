"""The promise of `python -m benchmarks generate`: all sides choose the same ids, and its costs are the formulas'."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import generate, roof
from minift.cache import KVCache
from minift.config import LlamaConfig
from minift.errors import InputError
from minift.generate import stream
from tests.helpers import SMALL, run_here, small_model

WORDS = ("--config", "stories260k", "--prompt-length", 7, "--new-tokens", 5, "--repeats", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def small_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 2**20})


def test_all_sides_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sides = ("minift", "minift, plain", "transformers", "transformers, bare loop")
    result = run_here("generate", tmp_path, *WORDS, "--dtype", "float32", "--sides", *sides)
    model = result["models"]["stories260k"]
    assert list(model["sides"]) == list(sides)
    for numbers in model["sides"].values():
        assert numbers["ids_as_minift"] == 5
        assert numbers["decode_tokens_per_second"]["n"] == 2
        assert numbers["decode_share_of_matvec_roof"]["n"] == numbers["decode_share_of_read_roof"]["n"] == 2
    assert model["minift_times_as_fast_as"]["minift"] == {"prefill": 1, "decode": 1}
    assert {"machine", "versions", "commit"} <= set(result)
    assert "stories260k, float32 on cpu" in capsys.readouterr().out


def test_sides_that_differ_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(generate, "stream", lambda model, prompt, n, plain: (7 for _ in range(n)))
    with pytest.raises(InputError, match="choose different ids"):
        run_here("generate", tmp_path, *WORDS, "--sides", "minift", "transformers, bare loop")


def test_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run_here("generate", tmp_path, *WORDS)
    assert list(result["models"]["stories260k"]["sides"]) == ["minift", "minift, plain"]
    assert "transformers: skipped, transformers is not installed" in capsys.readouterr().out


def test_the_operations_of_a_prompt() -> None:
    """PyTorch's counter, which knows no formula for the CPU's attention kernel."""
    model, T = small_model(), 6
    with FlopCounterMode(display=False) as counter:
        next(stream(model, list(range(3, 3 + T)), 1))
    config = model.config
    attention = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * T * (T + 1) / 2
    assert counter.get_total_flops() == generate.prefill_flops(config, T) - attention


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_a_token(tied: bool) -> None:
    """All weights but the embedding's other rows, and the keys and values of what was seen."""
    config = LlamaConfig(**{**SMALL, "tie_word_embeddings": tied})
    model = small_model(tie_word_embeddings=tied).bfloat16()
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "embed_tokens.weight")
    weights += model.head_weight.nbytes if tied else 0
    cache = KVCache(config, 1, 9, model.device, torch.bfloat16)
    seen = sum(tensor.nbytes for tensor in cache.stored.unbind())
    assert generate.decode_bytes(config, "bfloat16", 9) == weights + 2 * config.hidden_size + seen


@pytest.mark.parametrize("words", [("--repeats", 0), ("--new-tokens", 1), ("--prompt-length", 600)])
def test_wrong_input(tmp_path: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        run_here("generate", tmp_path, "--config", "stories260k", *words)


def test_the_record_can_be_read(tmp_path: Path) -> None:
    run_here("generate", tmp_path, *WORDS, "--sides", "minift")
    assert json.loads((tmp_path / "result.json").read_text())["benchmark"] == "generate"


def test_decoding_is_a_share_of_the_fastest_way_to_read_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the table, too; the roof reads what a token reads, so that a small model has the roof of a cache."""
    read: list[float] = []

    def meter(device: str, dtype: torch.dtype, shape: roof.Shape, nbytes: float) -> Callable[[int], roof.Roof]:
        read.append(nbytes)
        return lambda repeats: roof.Roof("float32", 1e12, 1e9, 2e9, 4e12)

    monkeypatch.setattr(roof, "meter", meter)
    result = run_here("generate", tmp_path, *WORDS, "--sides", "minift")
    model = result["models"]["stories260k"]
    numbers = model["sides"]["minift"]
    assert read == [model["decode_bytes_per_token"]]
    assert model["roof"]["read_bandwidth"] == {"median": 4e12, "min": 4e12, "max": 4e12, "n": 2}
    share = numbers["decode_share_of_read_roof"]
    assert share["max"] == pytest.approx(numbers["decode_bytes_per_second"]["max"] / 4e12)
    assert numbers["decode_share_of_matvec_roof"]["max"] == pytest.approx(2_000 * share["max"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("minift"))
    assert row.split()[-1] == f"{share['median']:.2f}"


def test_a_share_is_of_the_roof_of_its_turn() -> None:
    """6 operations in 2 seconds where 4 a second were possible, and in 1 second where 12 were: 3/4 and 1/2."""
    share = generate._share(6, [2.0, 1.0], [4.0, 12.0])
    assert (share["min"], share["max"], share["n"]) == (0.5, 0.75, 2)


def test_the_compiled_static_cache_is_a_side_by_default_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert generate._sides(None, torch.device("cuda")) == (list(generate.SIDES), {})
    sides, skipped = generate._sides(None, torch.device("cpu"))
    assert set(skipped) == set(generate.SIDES) - set(sides) == {"transformers, compiled"}
