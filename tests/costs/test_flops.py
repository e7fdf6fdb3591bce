"""The promise of `costs/flops.py`: a model has as many weights, and needs as many operations, as the formulas say.

Parameters are counted in real models, and against the published totals. Operations are counted by PyTorch's
`FlopCounterMode`, which sees every matrix product, to the last one. A text that is generated token by token makes
exactly the pairs of tokens that causal attention has, so nothing needs to be estimated.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minift.cache import KVCache
from minift.config import PRESETS, PRETRAIN, LlamaConfig
from minift.costs.flops import (
    count_parameters,
    forward_flops_per_token,
    peak_flops,
    training_flops_per_token,
)
from minift.distributed.world import World
from minift.formats.shapes import model_without_weights
from minift.loss import next_token_loss
from minift.model import Llama
from minift.pack import Batch
from minift.runs.progress import record_of
from minift.runs.start import start_state
from minift.train import Step, StepResult
from tests.costs.shapes import shapes, tokens_of
from tests.helpers import small_model

# Parameters -----------------------------------------------------------------------------------------------------------


@shapes
def test_parameters_are_those_of_a_real_model(shape: dict[str, Any]) -> None:
    model = small_model(**shape)
    counted = count_parameters(model.config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    layers = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed", "lm_head")))
    assert counted.without_embedding == layers
    assert counted.embedding == counted.total - layers


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_those_of_its_model(name: str) -> None:
    config = LlamaConfig.preset(name)
    model = model_without_weights(config)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama2-7b", 6_738_415_616),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("stories15m", 15_191_712),
    ],
)
def test_the_published_totals(name: str, total: int) -> None:
    assert count_parameters(LlamaConfig.preset(name)).total == total


# Operations -----------------------------------------------------------------------------------------------------------


def counted_flops(job: Callable[[], Any]) -> int:
    """Operations of all matrix products of `job`, by PyTorch's own count. Attention is made of plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        job()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("length", [1, 2, 17])
@shapes
def test_flops_of_generating_a_text_token_by_token(shape: dict[str, Any], length: int) -> None:
    model = small_model(**shape)
    tokens = tokens_of(model.config, 1, length)

    @torch.no_grad()
    def generate() -> None:
        cache = KVCache(model.config, 1, length, model.device, torch.float32)
        for t in range(length):
            model(tokens[:, t : t + 1], cache=cache)

    assert counted_flops(generate) == length * forward_flops_per_token(model.config, length)


def masked_flops(config: LlamaConfig, length: int) -> int:
    """What plain products compute of attention although causality masks it: T² − T (T + 1) / 2 pairs in each layer."""
    masked = length**2 - length * (length + 1) // 2
    return masked * 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers


@pytest.mark.parametrize("length", [1, 16])
@shapes
def test_flops_of_a_forward_pass(shape: dict[str, Any], length: int) -> None:
    model = small_model(**shape)
    tokens = tokens_of(model.config, 3, length)
    expected = 3 * (length * forward_flops_per_token(model.config, length) + masked_flops(model.config, length))
    assert counted_flops(lambda: model(tokens)) == expected


@pytest.mark.parametrize("length", [1, 16])
@shapes
def test_flops_of_a_training_step(shape: dict[str, Any], length: int) -> None:
    model = small_model(**shape)
    tokens = tokens_of(model.config, 3, length)

    def step() -> None:
        next_token_loss(model.hidden(tokens), model.head_weight, tokens, chunk=20).backward()

    expected = 3 * (length * training_flops_per_token(model.config, length) + 3 * masked_flops(model.config, length))
    assert counted_flops(step) == expected


# Peaks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bfloat16", None),  # a part of one
    ],
)
def test_peaks(gpu: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(gpu, dtype) == peak


def test_the_peak_of_float32_is_that_of_tf32_where_pytorch_is_told_to_round() -> None:
    """By its older switch, too. What has no such products keeps the rate of float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
        assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
        assert peak_flops("Tesla V100-SXM2-16GB", "float32") == 15.7e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12


def test_mfu_is_recorded_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is only said to be there."""
    model = small_model()
    batch = Batch(*(torch.zeros(2, 8, dtype=torch.int64) for _ in range(4)), isolated=False, n_targets=16)
    config = PRETRAIN.replace(dtype="float32", device="cpu")
    state = start_state(model, None, config)  # type: ignore[arg-type]
    state.dtype = "bfloat16"
    step = Step([batch], 0.1, StepResult(1.0, 1.0, True), 0.5)
    assert "mfu" not in record_of(state, step)
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    alone = record_of(state, step)
    assert alone["mfu"] == pytest.approx(training_flops_per_token(model.config, 8) * 16 / 0.5 / 989e12)
    state.world = OneOfFour(size=4)
    record = record_of(state, step)
    assert (record["tokens"], record["tokens_per_second"]) == (4 * 16, 4 * 16 / 0.5)
    assert record["mfu"] == pytest.approx(alone["mfu"])  # each of four GPUs does what one alone has done


class OneOfFour(World):
    """A rank whose three others do the same."""

    def total(self, *values: float) -> list[float]:
        return [4 * value for value in values]


def test_tokens_are_those_that_were_read_and_no_padding() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1], [0, 0, -1, -1, -1, -1, -1, -1]])
    rows = torch.zeros(2, 8, dtype=torch.int64)
    batch = Batch(rows, rows, rows, ids, isolated=True, n_targets=3)
    state = start_state(small_model(), None, PRETRAIN.replace(dtype="float32", device="cpu"))  # type: ignore[arg-type]
    record = record_of(state, Step([batch, batch], 0.1, StepResult(1.0, 1.0, True), 0.5))
    assert (record["tokens"], record["tokens_per_second"]) == (14, 28)
