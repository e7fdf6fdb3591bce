"""The promise of `kernels/layer.py`: a layer with both passes written out has the values and gradients of its twin.

The twin is `model.DecoderLayer` under autograd, which `way/test_slow_twins.py` and `way/test_hf_parity.py` hold against
others. Finite differences hold the gradients once more, and know neither.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minift.cache import KVCache
from minift.config import FINETUNE, LlamaConfig
from minift.kernels import choose, with_kernels
from minift.kernels.layer import LONGEST, WrittenLayer, WrittenPrepare, WrittenShared, prepare_written
from minift.kernels.swap import as_class
from minift.lora import LoRAConfig, add_lora
from minift.model import DecoderLayer, Llama, Prepare, Shared, rope_tables
from minift.pack import Batch, Example, collate
from minift.runs.start import start_state
from minift.train import Objective
from tests.twins import apart

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
places = pytest.mark.parametrize("places", [None, [3, 4, 9, 20, 20, 0]], ids=["all places", "some places"])


def a_layer(shape: dict[str, Any], dtype: torch.dtype) -> DecoderLayer:
    """A layer with random weights, its norms included."""
    layer = DecoderLayer(LlamaConfig.from_dict({**SHAPE, **shape}), 0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        parameter.data = random * 0.3 + (1 if parameter.ndim == 1 else 0)
    return layer


def both_ways(
    shape: dict[str, Any], masked: bool, places: list[int] | None, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """The twin, the written layer, and what both are functions of."""
    config, layer = LlamaConfig.from_dict({**SHAPE, **shape}), a_layer(shape, dtype)
    B, T = 3, 7
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, config.hidden_size, generator=generator, dtype=dtype).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
    documents = (positions == 0).cumsum(-1)
    mask = torch.ones(T, T, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    shared = Shared(
        *rope_tables(positions, config.head_dim, config.rope_theta), mask[:, None] if masked else None, None
    )
    chosen = torch.arange(B * T) if places is None else torch.tensor(places)

    def twin() -> Tensor:
        out = layer(x, shared)
        return out if places is None else out.flatten(0, 1)[chosen]

    def written() -> Tensor:
        prepared = prepare_written(config, shared.cos, shared.sin, shared.mask)
        if not torch.is_autocast_enabled("cpu"):
            prepared = prepared._replace(mask=prepared.mask.to(dtype), dtype=dtype)
        return as_class(layer, WrittenLayer)(x, prepared, None if places is None else chosen)

    return twin, written, [x, *layer.parameters()]


def value_and_gradients(call: Callable[[], Tensor], inputs: list[Tensor], autocasts: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        out = call()
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, inputs, pull)]


@shapes
@masks
@places
def test_values_and_gradients_are_the_twins(shape: dict[str, Any], masked: bool, places: list[int] | None) -> None:
    twin, written, inputs = both_ways(shape, masked, places, torch.float32)
    expected, found = value_and_gradients(twin, inputs), value_and_gradients(written, inputs)
    assert len(found) == 1 + 10
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert apart(one, other) < 2e-6


@shapes
@masks
@places
def test_gradients_are_those_of_finite_differences(
    shape: dict[str, Any], masked: bool, places: list[int] | None
) -> None:
    _, written, inputs = both_ways(shape, masked, places, torch.float64)
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


def loss_and_gradients(objective: nn.Module, batch: Batch, dtype: str = "bfloat16") -> list[Tensor]:
    objective.zero_grad()
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        nll_sum = objective(batch)
    nll_sum.backward()
    gradients = [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]
    return [nll_sum.detach(), *gradients]


def written_out(model: Llama) -> Objective:
    """An objective over the same weights, with the layers that are written out and nothing else."""
    objective = with_kernels(Objective(model), ["layer"])
    assert {type(layer) for layer in objective.model.layers} == {WrittenLayer}
    assert type(objective.model.prepare) is WrittenPrepare
    return objective


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [False, True], ids=["all places", "targets"])
def test_a_model_written_out_has_the_loss_and_gradients_of_its_modules(targets: bool, recompute: bool) -> None:
    model, batch = a_model(), a_batch()
    modules = loss_and_gradients(Objective(model), batch, "float32")
    model.checkpoint_activations = recompute
    objective = with_kernels(Objective(model), ["layer", "targets"]) if targets else written_out(model)
    written = loss_and_gradients(objective, batch, "float32")
    assert len(written) == len(modules) == 1 + len(list(model.parameters()))
    for one, other in zip(written, modules, strict=True):
        assert apart(one, other) < 3e-6


def test_a_loss_seen_is_the_loss_trained_on_to_the_bit() -> None:
    objective, batch = written_out(a_model()), a_batch()
    trained_on, *_ = loss_and_gradients(objective, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = objective(batch)
    assert torch.equal(seen, trained_on)


def test_a_changed_document_changes_no_bit_of_its_neighbours_gradient() -> None:
    """Two documents of a row, one learned from: what the other says moves neither its loss nor a weight."""
    objective = written_out(a_model())
    found = []
    for other in (range(3, 15), range(40, 52)):
        batch = collate([Example([5, 9, 11], [7, 8]), Example(list(other), [2])], 2)
        learned = batch.targets.clone()
        learned[learned == 2] = -100
        found.append(loss_and_gradients(objective, Batch(**{**vars(batch), "targets": learned, "n_targets": 2})))
        assert batch.isolated
    for one, other_one in zip(*found, strict=True):
        assert torch.equal(one, other_one)


@pytest.mark.parametrize(("length", "expected"), [(LONGEST, WrittenShared), (LONGEST + 1, Shared)])
def test_only_short_rows_are_written_out(length: int, expected: type) -> None:
    """All layers get what they read in one form; in the other they are their twins to the bit."""
    model = a_model()
    objective = written_out(model)
    forms: list[type] = []
    for layer in objective.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: forms.append(type(inputs[1])))
    tokens = torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(0))
    found = objective.model.hidden(tokens)
    assert LONGEST == 256
    assert forms == [expected] * 3
    assert torch.equal(found, model.hidden(tokens)) == (expected is Shared)


@torch.no_grad()
def test_with_a_cache_it_is_its_twin_to_the_bit() -> None:
    model = a_model()
    objective = written_out(model)
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(model.config, 2, 9, model.device, torch.float32) for _ in range(2)]
    for here in (slice(6), slice(6, 9)):
        found, expected = (
            one.hidden(tokens[:, here], cache=cache)
            for one, cache in zip((objective.model, model), caches, strict=True)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": "float32"}, False),
        ({"compile": True}, False),
        ({"lora_rank": 4}, False),
        ({"parallel": "fsdp"}, False),
        ({"parallel": "ddp"}, True),
    ],
)
def test_a_run_in_bfloat16_on_a_cpu_is_written_out(changes: dict[str, Any], expected: bool) -> None:
    config, model = FINETUNE.replace(**{"dtype": "bfloat16", "compile": False, **changes}), a_model()
    if config.lora_rank:
        add_lora(model, LoRAConfig.of(config), torch.Generator().manual_seed(0))
    assert ("layer" in choose(config, torch.device("cpu"))) == expected
    assert "layer" not in choose(config, torch.device("cuda"))
    if not config.compile and config.parallel != "fsdp":  # that is for several processes
        state = start_state(model, None, config)  # type: ignore[arg-type]  # no data to keep the place of
        layers = {type(layer) for layer in state.model.layers}
        assert (layers == {WrittenLayer}) == expected == (type(state.model.prepare) is WrittenPrepare)


@pytest.mark.parametrize("why", ["adapters", "a frozen weight", "weights in bfloat16", "no kernels"])
def test_what_it_cannot_stand_in_for_stays(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    if why == "adapters":
        add_lora(model, LoRAConfig(2, 4.0, ("q_proj",)), torch.Generator().manual_seed(0))
        model.requires_grad_(True)
    elif why == "a frozen weight":
        model.norm.weight.requires_grad_(False)
    elif why == "weights in bfloat16":
        model.bfloat16()
    else:
        monkeypatch.setattr("minift.kernels.layer.is_available", lambda: False)
    other = with_kernels(model, ["layer"])
    assert {type(layer) for layer in other.layers} == {DecoderLayer}
    assert type(other.prepare) is Prepare
