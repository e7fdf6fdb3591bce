"""The promise of `costs/flops.py` and `minift info`: what a model costs on paper is what it costs.

Parameters are counted in real models, and against the published totals. Operations are counted by PyTorch's
`FlopCounterMode`, which sees every matrix product, to the last one; a text that is generated token by token makes
exactly the pairs of tokens that causal attention has, so nothing needs to be estimated. Each line of the ledger of
memory is held against the tensors themselves: those of a training step, those that autograd saves, those of the cache.
"""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alive import Alive
from minift.cache import KVCache
from minift.cli import main
from minift.config import PRESETS, PRETRAIN, LlamaConfig, TrainConfig
from minift.costs.flops import (
    count_parameters,
    forward_flops_per_token,
    peak_flops,
    training_flops_per_token,
)
from minift.costs.memory import inference_memory, training_memory
from minift.data.batches import PairBatches
from minift.formats.convert import convert
from minift.formats.files import TensorFile
from minift.formats.shapes import model_without_weights
from minift.loss import _all_rows_at_once_, next_token_loss
from minift.model import Llama
from minift.pack import Batch, Example
from minift.runs.machine import choose_written_out
from minift.runs.progress import record_of
from minift.runs.start import start_state
from minift.train import train_step
from tests.helpers import small_model

SHAPES: dict[str, dict[str, Any]] = {
    "tied-gqa": {},
    "untied-gqa": {"tie_word_embeddings": False},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 10},
    "three layers": {"num_hidden_layers": 3, "intermediate_size": 22},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
# A shape in which no two sizes are alike, wide enough for the small things (RoPE's tables) to be small.
WIDER: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
}


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


def tokens_of(config: LlamaConfig, *shape: int) -> Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


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
    wanted = 3 * (length * forward_flops_per_token(model.config, length) + masked_flops(model.config, length))
    assert counted_flops(lambda: model(tokens)) == wanted


@pytest.mark.parametrize("length", [1, 16])
@shapes
def test_flops_of_a_training_step(shape: dict[str, Any], length: int) -> None:
    model = small_model(**shape)
    tokens = tokens_of(model.config, 3, length)

    def step() -> None:
        nll_sum, _ = next_token_loss(model.hidden(tokens), model.head_weight, tokens, chunk=20)
        nll_sum.backward()

    wanted = 3 * (length * training_flops_per_token(model.config, length) + 3 * masked_flops(model.config, length))
    assert counted_flops(step) == wanted


# Memory ---------------------------------------------------------------------------------------------------------------


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


def attend_in_its_own_dtype(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as a GPU trains it: without the CPU's detour through float32, and in that with no shared heads."""
    dtype, shared = value.dtype, query.shape[1] // key.shape[1]
    if dtype == torch.float32:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 3, "head_dim": 24}, {"tie_word_embeddings": False}],
    ids=["gqa", "mha", "wide heads", "untied"],
)
def test_activations_are_what_autograd_saves(
    shape: dict[str, Any], dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":  # its arithmetic, on the machine that is here
        monkeypatch.setattr("minift.model.attend", attend_in_its_own_dtype)
    B, T = 3, 41
    model = small_model(**{**WIDER, **shape})
    model.written_out = choose_written_out(model, TrainConfig(dtype=dtype), torch.device(device))
    tokens = tokens_of(model.config, B, T)
    positions = torch.arange(T).expand(B, T)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        saved = saved_storages(lambda: model.hidden(tokens, positions), model)
    copies = [tensor for tensor in saved if is_copy_of_a_matrix(tensor, model)]
    rest = nbytes(saved) - nbytes(copies)
    ledger = training_memory(model.config, dtype, B, T, device=device)
    assert rest == pytest.approx(ledger["activations for the backward pass"], rel=0.02)
    # All that is left out is RoPE's tables of cosines and sines, and the tokens.
    tables = 4 * (1 if model.written_out else 2) * B * T * model.config.head_dim + 8 * B * T
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
            return next_token_loss(hidden.requires_grad_(), model.head_weight, targets)[0]

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
    assert ledger["keys and values"] == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert ledger["weights"] == sum(parameter.nbytes for parameter in model.parameters())


# minift info ----------------------------------------------------------------------------------------------------------


def told(file: Path, *words: str | Path) -> dict[str, Any]:
    """What `minift info --json` writes."""
    assert main(["info", *map(str, words), "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
def test_info_of_a_model_of_every_format(
    small_checkpoint: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "hf":
        pytest.importorskip("safetensors")
        pytest.importorskip("tokenizers")
    model = tmp_path / ("model.bin" if to == "llama2c" else "model")
    convert(small_checkpoint, model, to, shards=2 if to == "meta" else 1)
    found = told(tmp_path / "info.json", "--model", model, "--batch-size", "3", "--max-length", "70", "--device", "cpu")
    config = LlamaConfig.from_file(small_checkpoint / "config.json")
    weights = torch.load(small_checkpoint / "model.pt", weights_only=True)
    numel = sum(tensor.numel() for tensor in weights.values())
    assert (found["format"], found["model"]) == (to, str(model))
    assert found["parameters"] == numel
    assert found["parameters_without_embedding"] == numel - weights["embed_tokens.weight"].numel()
    assert found["stored"] == {"float32": 4 * numel}
    names = {
        "native": ["model.pt"],
        "hf": ["model.safetensors"],
        "meta": ["consolidated.00.pth", "consolidated.01.pth"],
        "llama2c": ["model.bin"],
    }
    assert found["files"] == names[to]
    assert found["tokenizer"].endswith("2,048 ids")
    shape = {key: value for key, value in config.to_dict().items() if key != "initializer_range"}
    assert {key: found["shape"][key] for key in shape} == shape
    assert found["tied"] is True
    assert found["notes"] == []
    assert (found["batch_size"], found["length"], found["device"]) == (3, 70, "cpu")
    assert found["forward_flops_per_token"] == forward_flops_per_token(config, 70)
    assert found["training_flops_per_token"] == 3 * found["forward_flops_per_token"]
    assert found["training_memory"]["bfloat16"] == training_memory(config, "bfloat16", 3, 70, device="cpu")
    assert found["inference_memory"]["float16"] == inference_memory(config, "float16", 3, 70)
    shown = capsys.readouterr().out
    for fact in (
        f"({to})",
        f"{numel:,}",
        "4 heads of 6, 2 for keys and values (grouped-query)",
        "one matrix",
        "T = 70",
    ):
        assert fact in shown
    assert "training on cpu, 3 x 70 tokens" in shown


def test_info_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path / "info.json", "--config", "llama2-7b")
    assert (found["config"], found["parameters"], found["length"]) == ("llama2-7b", 6_738_415_616, 4_096)
    assert "6,738,415,616" in capsys.readouterr().out
    config = small_model(num_key_value_heads=1, tie_word_embeddings=False).config
    (tmp_path / "config.json").write_text(config.to_json())
    found = told(tmp_path / "info.json", "--config", tmp_path / "config.json", "--max-length", "64")
    assert found["parameters"] == count_parameters(config).total
    shown = capsys.readouterr().out
    assert "(multi-query)" in shown
    assert "two matrices" in shown


def test_the_page_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path / "info.json", "--config", "bundled", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    totals = [line.split()[1:] for line in lines if line.startswith("total")]
    for row, ledgers in zip(totals, (found["training_memory"], found["inference_memory"]), strict=True):
        cells = [float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] for value, unit in zip(row[::2], row[1::2])]  # noqa: B905
        for cell, ledger in zip(cells, ledgers.values(), strict=True):
            assert cell == pytest.approx(sum(ledger.values()), rel=0.06)


def test_info_does_not_read_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2.2 GB, of which only the header is there."""
    pytest.importorskip("safetensors")
    config = LlamaConfig.preset("tinyllama-1.1b")
    weights = model_without_weights(config).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + 2 * tensor.numel()
        theirs = name if name == "lm_head.weight" else f"model.{name}"
        header[theirs] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(config.to_json())
    monkeypatch.delattr(TensorFile, "read")
    found = told(tmp_path / "info.json", "--model", tmp_path)
    assert found["parameters"] == 1_100_048_384
    assert found["stored"] == {"bfloat16": 2 * 1_100_048_384}
    assert found["tokenizer"].startswith("none")


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ([], "--model"),
        (["--model", "bundled", "--config", "bundled"], "not allowed with"),
        (["--model", "nowhere"], "nowhere: no such file"),
        (["--config", "llama9"], "unknown preset 'llama9'"),
        (["--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--model", "bundled", "--batch-size", "0"], "batch_size is 0"),
        (["--model", "bundled", "--batch-size", "many"], "many"),
        (["--model", "bundled", "--max-length", "0"], "max_length is 0"),
        (["--model", "bundled", "--max-length", "513"], "max_length is 513; it must be below 513"),
        (["--model", "bundled", "--device", "tpu"], "device is 'tpu'"),
        (["--model", "bundled", "--json", "nowhere/info.json"], "nowhere/info.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_line_and_exit_2(
    words: list[str], culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minift: error: ")
    assert culprit in line


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


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float16", 312e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # a slower one, of which nothing is said
        ("NVIDIA H200", "float32", None),
    ],
)
def test_peaks(gpu: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(gpu, dtype) == peak


def test_mfu_is_recorded_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is only said to be there."""
    model = small_model()
    batch = Batch(*(torch.zeros(2, 8, dtype=torch.int64) for _ in range(4)), isolated=False, n_targets=16)
    config = PRETRAIN.replace(dtype="float32", device="cpu")
    state = start_state(model, None, config)  # type: ignore[arg-type]
    assert "mfu" not in record_of(state, 1.0, 1.0, 0.1, [batch], 0.5, "bfloat16")
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    record = record_of(state, 1.0, 1.0, 0.1, [batch], 0.5, "bfloat16")
    assert record["mfu"] == pytest.approx(training_flops_per_token(model.config, 8) * 16 / 0.5 / 989e12)
