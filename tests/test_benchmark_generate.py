"""The promise of `python -m benchmarks generate`: all sides choose the same ids, and its costs are the formulas'."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import generate, roof
from minift.config import LlamaConfig
from minift.errors import InputError
from minift.generate import stream
from minift.model import KVCache
from tests.conftest import SMALL, small_model
from tests.test_benchmarks import run_here

WORDS = ("--config", "stories260k", "--prompt-length", 7, "--new-tokens", 5, "--repeats", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def small_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 2**20})


def test_all_sides_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ("minift", "transformers", "transformers, bare loop")
    result = run_here("generate", tmp_path, *WORDS, "--dtype", "float32", "--sides", *sides)
    model = result["models"]["stories260k"]
    assert list(model["sides"]) == list(sides)
    for numbers in model["sides"].values():
        assert numbers["ids_as_minift"] == 5
        assert numbers["decode_tokens_per_second"]["n"] == 2
        shares = numbers["decode_bytes_per_second"] / numbers["decode_share_of_matvec_roof"]
        assert shares == pytest.approx(result["roof"]["matvec_bandwidth"])
    assert model["minift_times_as_fast_as"]["minift"] == {"prefill": 1, "decode": 1}
    assert {"machine", "versions", "commit"} <= set(result)
    assert "stories260k, float32 on cpu" in capsys.readouterr().out


def test_sides_that_differ_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "stream", lambda model, prompt, n: (7 for _ in range(n)))
    with pytest.raises(InputError, match="choose different ids"):
        run_here("generate", tmp_path, *WORDS, "--sides", "minift", "transformers, bare loop")


def test_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run_here("generate", tmp_path, *WORDS)
    assert list(result["models"]["stories260k"]["sides"]) == ["minift"]
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
    seen = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert generate.decode_bytes(config, "bfloat16", 9) == weights + 2 * config.hidden_size + seen


@pytest.mark.parametrize("words", [("--repeats", 0), ("--new-tokens", 1), ("--prompt-length", 600)])
def test_wrong_input(tmp_path: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        run_here("generate", tmp_path, "--config", "stories260k", *words)


def test_the_record_can_be_read(tmp_path: Path) -> None:
    run_here("generate", tmp_path, *WORDS, "--sides", "minift")
    assert json.loads((tmp_path / "result.json").read_text())["benchmark"] == "generate"


def test_products_with_a_vector_are_left_to_the_fast_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16; it is as it was afterwards, and the numbers are the same."""
    seen: list[bool] = []
    model = small_model().bfloat16()
    product = torch.mv
    outputs: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def spy(matrix: torch.Tensor, vector: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        seen.append(bool(torch.backends.mkldnn.enabled))
        outputs[fast].append(product(matrix, vector, **more).clone())
        return product(matrix, vector, **more)

    monkeypatch.setattr(torch, "mv", spy)
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr("minift.decode._fast_products", lambda dtype: nullcontext())
        ids = list(stream(model, [1, 5, 9], 4))
        assert torch.backends.mkldnn.enabled
    a_text = (len(ids) - 1) * (7 * model.config.num_hidden_layers + 1)
    assert seen == [False] * a_text + [True] * a_text
    for one, other in zip(outputs[True], outputs[False], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
