"""The promise of `kernels/layer.py`: a decoder layer whose passes are written out has the values and gradients of its twin.

The twin is `model.DecoderLayer` under autograd, which `way/test_slow_twins.py` and `way/test_hf_parity.py` hold against others.
Finite differences hold the gradients once more, and know neither.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import minift.model
from minift.config import FINETUNE, LlamaConfig, TrainConfig
from minift.kernels.layer import Weights, share, written_layer
from minift.lora import LoRAConfig, add_lora
from minift.loss import batch_loss
from minift.model import DecoderLayer, Llama
from minift.pack import Batch, Example, collate
from minift.rope import rope_tables
from minift.runs.machine import autocast, choose_written_out
from minift.runs.start import start_state

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
SHAPES: list[dict[str, Any]] = [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1, "head_dim": 10}]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "a key for each query", "one key, wide heads"])
masks = pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
places = pytest.mark.parametrize("wanted", [None, [3, 4, 9, 20, 20, 0]], ids=["all places", "some places"])


def a_layer(shape: dict[str, Any], dtype: torch.dtype) -> DecoderLayer:
    """A layer with random weights, its norms included."""
    layer = DecoderLayer(LlamaConfig.from_dict({**SHAPE, **shape}), 0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        parameter.data = random * 0.3 + (1 if parameter.ndim == 1 else 0)
    return layer


def weights_of(layer: DecoderLayer) -> Weights:
    """The layer's parameters, found by their names."""
    named = dict(layer.named_parameters())
    attention = (named[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    mlp = (named[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return Weights(named["input_layernorm.weight"], *attention, named["post_attention_layernorm.weight"], *mlp)


def both_ways(
    shape: dict[str, Any], masked: bool, wanted: list[int] | None, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """The twin, the written layer, and what both are functions of."""
    config, layer = LlamaConfig.from_dict({**SHAPE, **shape}), a_layer(shape, dtype)
    B, T = 3, 7
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, config.hidden_size, generator=generator, dtype=dtype).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
    documents = (positions == 0).cumsum(-1)
    mask = torch.ones(T, T, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    added = mask[:, None] if masked else None
    cos, sin = rope_tables(positions, config.head_dim, config.rope_theta)
    chosen = None if wanted is None else torch.tensor(wanted)

    def twin() -> Tensor:
        return layer(x, cos, sin, added, None, chosen)

    def written() -> Tensor:
        shared = share(config, cos, sin, added)
        if not torch.is_autocast_enabled("cpu"):
            shared = shared._replace(mask=shared.mask.to(dtype), dtype=dtype)
        return written_layer(x, shared, chosen, weights_of(layer))

    return twin, written, [x, *layer.parameters()]


def value_and_gradients(call: Callable[[], Tensor], inputs: list[Tensor], autocasts: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        out = call()
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, inputs, pull)]


def apart(one: Tensor, other: Tensor) -> float:
    """How far, as a share of the size of the other."""
    assert one.shape == other.shape
    return float(((one.double() - other.double()).norm() / other.double().norm()).detach())


@shapes
@masks
@places
def test_values_and_gradients_are_the_twins(shape: dict[str, Any], masked: bool, wanted: list[int] | None) -> None:
    twin, written, inputs = both_ways(shape, masked, wanted, torch.float32)
    expected, found = value_and_gradients(twin, inputs), value_and_gradients(written, inputs)
    assert len(found) == 1 + 10
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert apart(one, other) < 2e-6


@shapes
@masks
@places
def test_gradients_are_those_of_finite_differences(
    shape: dict[str, Any], masked: bool, wanted: list[int] | None
) -> None:
    _, written, inputs = both_ways(shape, masked, wanted, torch.float64)
    assert torch.autograd.gradcheck(lambda *_: written(), inputs, fast_mode=True)


@shapes
@masks
def test_in_bfloat16_it_is_no_further_from_the_truth_than_its_twin(shape: dict[str, Any], masked: bool) -> None:
    """Each value and gradient against float32's: within 1.5 times as far as the twin, on the whole."""
    twin, written, inputs = both_ways(shape, masked, None, torch.float32)
    truth = value_and_gradients(twin, inputs)
    theirs, ours = (value_and_gradients(call, inputs, autocasts=True) for call in (twin, written))
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert apart(one, exact) < 0.03
    distance = [sum(apart(one, exact) for one, exact in zip(of, truth, strict=True)) for of in (ours, theirs)]
    assert 0 < distance[0] < 1.5 * distance[1]


# Where a model uses it ------------------------------------------------------------------------------------------------


def a_model() -> Llama:
    model = Llama(LlamaConfig.from_dict(SHAPE))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def a_batch(longest: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = [(4, 5), (7, 2), (3, 9), (longest - 4, 3)]
    ids = [torch.randint(3, 61, (a + b,), generator=generator).tolist() for a, b in lengths]
    return collate([Example(one[:a], one[a:]) for one, (a, _) in zip(ids, lengths, strict=True)], 2)


def loss_and_gradients(model: Llama, batch: Batch, dtype: str = "bfloat16") -> list[Tensor]:
    model.zero_grad()
    with autocast(model, TrainConfig(dtype=dtype)):
        nll_sum, _ = batch_loss(model, batch)
    nll_sum.backward()
    return [
        nll_sum.detach(),
        *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_written_out_has_the_loss_and_gradients_of_its_modules(recompute: bool) -> None:
    model, batch = a_model(), a_batch()
    modules = loss_and_gradients(model, batch, "float32")
    model.written_out, model.checkpoint_activations = True, recompute
    written = loss_and_gradients(model, batch, "float32")
    assert len(written) == len(modules) == 1 + len(list(model.parameters()))
    for one, other in zip(written, modules, strict=True):
        assert apart(one, other) < 3e-6


def test_a_loss_seen_is_the_loss_trained_on_to_the_bit() -> None:
    model, batch = a_model(), a_batch()
    model.written_out = True
    trained_on, *_ = loss_and_gradients(model, batch)
    with torch.no_grad(), autocast(model, TrainConfig(dtype="bfloat16")):
        seen, _ = batch_loss(model, batch)
    assert torch.equal(seen, trained_on)


def test_a_changed_document_changes_no_bit_of_its_neighbours_gradient() -> None:
    """Two documents of a row, one learned from: what the other says moves neither its loss nor a weight."""
    model = a_model()
    model.written_out = True
    found = []
    for other in (range(3, 15), range(40, 52)):
        batch = collate([Example([5, 9, 11], [7, 8]), Example(list(other), [2])], 2)
        learned = batch.targets.clone()
        learned[learned == 2] = -100
        found.append(loss_and_gradients(model, Batch(**{**vars(batch), "targets": learned, "n_targets": 2})))
        assert batch.isolated
    for one, other_one in zip(*found, strict=True):
        assert torch.equal(one, other_one)


@pytest.mark.parametrize(("longest", "expected"), [(250, 3), (260, 0)])
def test_only_short_rows_are_written_out(longest: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    written = minift.model.written_layer
    monkeypatch.setattr(minift.model, "written_layer", lambda *args: (calls.append(1), written(*args))[1])
    model = a_model()
    model.written_out = True
    loss_and_gradients(model, a_batch(longest))
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"dtype": "float32"}, False), ({"compile": True}, False), ({"lora_rank": 4}, False)],
)
def test_a_run_in_bfloat16_on_a_cpu_is_written_out(changes: dict[str, Any], expected: bool) -> None:
    config, model = FINETUNE.replace(**{"dtype": "bfloat16", **changes}), a_model()
    if config.lora_rank:
        add_lora(model, LoRAConfig.of(config), torch.Generator().manual_seed(0))
    assert choose_written_out(model, config, torch.device("cpu")) == expected
    assert not choose_written_out(model, config, torch.device("cuda"))
    if not config.compile:
        state = start_state(model, None, config)  # type: ignore[arg-type]  # no data to keep the place of
        assert state.model.written_out == expected
