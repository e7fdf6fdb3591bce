"""The promise of `costs/memory.py`: each line of the ledger is what real tensors take.

They are the tensors of a training step, those that autograd saves, and those of the cache. `runs/test_distributed.py`
does the same for the shards of several processes.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.alive import Alive
from minift import kernels
from minift.cache import KVCache
from minift.config import PRETRAIN, LlamaConfig, TrainConfig
from minift.costs.memory import inference_memory, training_memory
from minift.data.batches import PairBatches
from minift.kernels.cross_entropy import FusedNextTokenLoss, _all_rows_at_once_
from minift.kernels.layer import WrittenLayer
from minift.model import Llama
from minift.pack import Example
from minift.runs.start import start_state
from minift.train import train_step
from tests.costs.shapes import WIDER, shapes, tokens_of
from tests.helpers import small_model


@shapes
def test_weights_gradients_and_moments_are_those_of_a_real_step(shape: dict[str, Any]) -> None:
    examples = [Example([1, 5, 6 + i], [20 + i, 30 + i, 2]) for i in range(8)]
    config = PRETRAIN.replace(steps=1, dtype="float32", device="cpu", batch_size=4)
    model = small_model(**shape)
    state = start_state(model, PairBatches(examples, 4, pad_id=2, seed=0), config)
    gradients: list[int] = []

    def look(*arguments: Any) -> None:
        gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    state.optimizer.register_step_pre_hook(look)
    assert train_step(state, [next(iter(state.batches))], 1e-3, config).stepped
    ledger = training_memory(model.config, "float32", 4, 6)
    assert ledger["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert [ledger["gradients"]] == gradients
    moments = [state.optimizer.state[parameter] for parameter in model.parameters()]
    assert ledger["AdamW's two moments"] == sum(m["exp_avg"].nbytes + m["exp_avg_sq"].nbytes for m in moments)


def saved_storages(job: Callable[[], Tensor], model: Llama) -> list[Tensor]:
    """One tensor for each storage that autograd keeps for the backward pass of `job`; parameters are left out."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = job()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept}
    del result
    return [tensor for place, tensor in found.items() if place not in known]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def is_copy_of_a_matrix(tensor: Tensor, model: Llama) -> bool:
    """Whether a saved tensor is a weight that was cast, or several as one: it has the size of them, and no tokens."""
    sizes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.ndim == 2}
    D, C = model.config.hidden_size, model.config.head_dim
    of_qkv = (model.config.num_attention_heads + 2 * model.config.num_key_value_heads) * C
    sizes |= {tuple(sorted((rows, D))) for rows in (of_qkv, 2 * model.config.intermediate_size)}
    return tensor.dtype != torch.float32 and tensor.ndim == 2 and tuple(sorted(tensor.shape)) in sizes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 3, "head_dim": 24}, {"tie_word_embeddings": False}],
    ids=["gqa", "mha", "wide heads", "untied"],
)
def test_activations_are_what_autograd_saves(shape: dict[str, Any], dtype: str, device: str) -> None:
    """With what a run installs for the device: a GPU's kernels, too, on the machine that is here."""
    B, T = 3, 41
    names = kernels.choose(TrainConfig(dtype=dtype), torch.device(device))
    model = kernels.with_kernels(small_model(**{**WIDER, **shape}), names)
    written = isinstance(model.layers[0], WrittenLayer)
    assert written == (device == "cpu" and dtype == "bfloat16")
    tokens = tokens_of(model.config, B, T)
    positions = torch.arange(T).expand(B, T)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        saved = saved_storages(lambda: model.hidden(tokens, positions), model)
    copies = [tensor for tensor in saved if is_copy_of_a_matrix(tensor, model)]
    rest = nbytes(saved) - nbytes(copies)
    ledger = training_memory(model.config, dtype, B, T, device=device)
    assert rest == pytest.approx(ledger["activations for the backward pass"], rel=0.02)
    # All that is left out is RoPE's tables of cosines and sines, and the tokens.
    tables = 4 * (1 if written else 2) * B * T * model.config.head_dim + 8 * B * T
    assert rest == ledger["activations for the backward pass"] + tables
    if dtype == "float32":
        assert not copies
        assert "autocast's copies of matrices" not in ledger
    else:
        head = 2 * model.config.vocab_size * model.config.hidden_size  # which the loss copies itself
        assert nbytes(copies) + head == ledger["autocast's copies of matrices"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_losss_own_gradients_are_what_it_saves(dtype: str) -> None:
    B, T = 4, 16  # a multiple of what a CPU takes together in bfloat16
    model = small_model(**WIDER, tie_word_embeddings=False)
    targets = tokens_of(model.config, B, T)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        hidden = model.hidden(targets)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
            loss: Tensor = FusedNextTokenLoss()(hidden.requires_grad_(), model.head_weight, targets)
            return loss

    saved = [tensor for tensor in saved_storages(loss, model) if tensor.is_floating_point()]
    assert nbytes(saved) == training_memory(model.config, dtype, B, T)["the loss's own gradients"]


@pytest.mark.parametrize(("chunk", "rows"), [(2_048, 42), (42, 42), (10, 10), (1, 1)])
def test_logits_of_a_chunk(chunk: int, rows: int) -> None:
    config = small_model(**WIDER).config
    logits = torch.empty(rows, config.vocab_size)
    for dtype in ("float32", "bfloat16"):
        cpu, cuda = (training_memory(config, dtype, 3, 14, loss_chunk=chunk, device=d) for d in ("cpu", "cuda"))
        assert cpu["logits of a chunk"] == logits.to(getattr(torch, dtype)).nbytes
        wide = logits.nbytes if dtype == "bfloat16" else 0  # all rows at once in float32
        assert cuda["logits of a chunk"] == cpu["logits of a chunk"] + wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_on_a_gpu_are_there_once_more_in_float32(dtype: str) -> None:
    """Its way through the softmax, on the machine that is here: all that it makes, but for a number a row."""
    config, rows = small_model(**{**WIDER, "vocab_size": 4_096}).config, 42
    logits = torch.zeros(rows, config.vocab_size, dtype=getattr(torch, dtype))
    with Alive({"logits": [logits]}) as alive, alive.part("loss"):
        _all_rows_at_once_(logits, torch.zeros(rows, 1, dtype=torch.int64))
    ledger = training_memory(config, dtype, 3, 14, device="cuda")["logits of a chunk"]
    assert 0 <= alive.peak(lambda memory: memory.label).total - ledger < 32 * rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@shapes
def test_keys_and_values_are_those_of_the_cache(shape: dict[str, Any], dtype: str) -> None:
    model = small_model(dtype=getattr(torch, dtype), **shape)
    cache = KVCache(model.config, 5, 33, model.device, getattr(torch, dtype))
    ledger = inference_memory(model.config, dtype, 5, 33)
    assert ledger["keys and values"] == cache.stored.nbytes
    assert ledger["weights"] == sum(parameter.nbytes for parameter in model.parameters())


def test_the_ledger_grows_with_what_it_counts() -> None:
    """Activations with tokens, logits only up to a chunk; weights with neither."""
    config = LlamaConfig.preset("bundled")
    one, more = (training_memory(config, "float32", rows, 256) for rows in (1, 8))
    for name, growth in {
        "weights": 1,
        "gradients": 1,
        "AdamW's two moments": 1,
        "activations for the backward pass": 8,
        "logits of a chunk": 4,
    }.items():
        assert math.isclose(more[name], growth * one[name]), name


def test_what_fsdp_gathers_adds_up_by_hand() -> None:
    """Llama-2-7B among 8 ranks: two layers as they are sent, and the root and gradients in float32."""
    config = LlamaConfig.preset("llama2-7b")
    layer = 4 * 4_096 * 4_096 + 3 * 4_096 * 11_008 + 2 * 4_096
    root = 2 * 32_000 * 4_096 + 4_096
    alone, sharded = (training_memory(config, "bfloat16", 1, 4_096, device="cuda", ranks=ranks) for ranks in (None, 8))
    assert sharded["two layers, gathered"] == 2 * 2 * layer
    assert sharded["embedding, head and norm, gathered"] == 4 * root
    assert sharded["gradients before they are split"] == 4 * (root + layer)
    adapters = training_memory(config, "bfloat16", 1, 4_096, device="cuda", trained=1_000, ranks=8)
    assert adapters["gradients before they are split"] == 4 * layer
    for name in ("weights", "gradients", "AdamW's two moments"):
        assert sharded[name] == alone[name] // 8
    assert "autocast's copies of matrices" not in sharded  # FSDP casts what it gathers


def test_a_wide_head_is_copied_by_columns_on_a_cpu() -> None:
    config = LlamaConfig.preset("stories15m")  # 32,000 x 288
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        cpu, cuda = (training_memory(config, dtype, 2, 256, device=device) for device in ("cpu", "cuda"))
        assert cpu["the head, by columns"] == size * 32_000 * 288
        assert "the head, by columns" not in cuda
