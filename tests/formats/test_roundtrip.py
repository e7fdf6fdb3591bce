"""The promise of `formats/`: a model that goes from format to format is the same model, to the bit.

Nothing here is read or written by minift alone. Hugging Face's files are made and looked into with `safetensors`,
Meta's shards and `.pt` files with plain `torch`, llama2.c's with `struct` and NumPy; and the logits of what was
converted are those of a forward pass in NumPy, in float64, that turns neighbouring channels by complex numbers, as
Meta's and llama2.c's own programs do. Held here:

* every route is the same bits in every dtype, with weights that are random bit patterns: −0, denormals, extremes;
* minift reads what Meta's ranks and llama2.c write, and they would read what it writes;
* a destination appears whole or not at all, and nothing but a checkpoint is ever replaced;
* what a format cannot hold is refused by name;
* converting and loading hold a few tensors in memory, not the model.
"""

import dataclasses
import errno
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import LlamaConfig, RopeScaling
from minift.errors import InputError, RunError
from minift.formats import files, huggingface, llama2c, meta
from minift.formats.convert import convert
from minift.formats.native import write_pt
from minift.formats.open import open_model
from minift.formats.opened import Opened, to_half_split, to_interleaved
from minift.formats.peft import adapter_shapes, write_peft
from minift.formats.shapes import parameter_shapes
from minift.lora import LoRAConfig
from minift.model import Llama
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import ROOT, random_model, random_tokens, small_model

# Every size divides by four ranks.
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 5.5,
    "low_freq_factor": 0.75,
    "high_freq_factor": 3.25,
    "original_max_position_embeddings": 48,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tied-gqa": {},
    "untied-gqa": {"tie_word_embeddings": False},
    "tied-mha": {"num_key_value_heads": 8},
    "untied-mha": {"num_key_value_heads": 8, "tie_word_embeddings": False, "rms_norm_eps": 3e-6, "rope_theta": 5e5},
    "scaled, several ends": {"rope_scaling": SCALING, "bos_token_id": 3, "eos_token_id": [2, 7, 5]},
}
WIDE = {"head_dim": 10, "num_key_value_heads": 2}
LOW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
formats = pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])


# Models made without minift -------------------------------------------------------------------------------------------


def safetensors() -> Any:
    """Hugging Face's own package. Without it, the test is skipped."""
    return pytest.importorskip("safetensors.torch")


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every finite bit pattern alike, and in front those that arithmetic would lose."""
    integers = LOW[dtype]
    bounds = torch.iinfo(integers)
    bits = torch.randint(bounds.min, bounds.max, tuple(shape), generator=generator, dtype=integers)
    values = bits.view(dtype)
    values = torch.where(torch.isfinite(values), values, torch.zeros((), dtype=dtype)).contiguous()
    info = torch.finfo(dtype)
    special = torch.tensor([-0.0, info.tiny, -info.tiny, info.max, -info.max, info.eps], dtype=dtype)
    denormals = torch.tensor([1, 2, 77], dtype=integers).view(dtype)
    flat = values.view(-1)
    flat[: len(special)] = special
    flat[len(special) : len(special) + 3] = denormals
    return values


def moderate(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Weights of a size at which logits are far from uniform, and norms that are not 1."""
    if len(shape) == 1:
        return 0.5 + torch.rand(tuple(shape), generator=generator)
    return 0.2 * torch.randn(tuple(shape), generator=generator)


def hf_tensors(config: Mapping[str, Any], make: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    """A Llama's tensors under Hugging Face's names, written out by hand."""
    D, F, V, C = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": make((V, D))}
    for i in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (H * C, D),
            "self_attn.k_proj": (K * C, D),
            "self_attn.v_proj": (K * C, D),
            "self_attn.o_proj": (D, H * C),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }.items():
            found[f"model.layers.{i}.{name}.weight"] = make(shape)
    found["model.norm.weight"] = make((D,))
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = make((V, D))
    return found


def write_hf(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> dict[str, Any]:
    """A Hugging Face folder; returns what its config says of the model."""
    said = {**BASE, **changes}
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **said}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors().save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return said


def random_hf(folder: Path, dtype: torch.dtype, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """A Hugging Face folder of random bit patterns; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = hf_tensors({**BASE, **changes}, lambda shape: random_bits(shape, dtype, generator))
    write_hf(folder, tensors, **changes)
    return tensors


def write_native(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> LlamaConfig:
    """A minift checkpoint of tensors under Hugging Face's names, by plain `torch.save`."""
    folder.mkdir(parents=True)
    config = as_config({**BASE, **changes})
    torch.save({native_name(name): tensor for name, tensor in tensors.items()}, folder / "model.pt")
    (folder / "config.json").write_text(config.to_json())
    return config


def as_config(said: Mapping[str, Any]) -> LlamaConfig:
    values = dict(said)
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**{k: v for k, v in values["rope_scaling"].items() if k != "rope_type"})
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    return LlamaConfig(**values)


def native_name(name: str) -> str:
    return name.removeprefix("model.")


def assert_same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits; −0 is not 0 here."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        integers = LOW[tensor.dtype]
        assert torch.equal(found[name].contiguous().view(integers), tensor.contiguous().view(integers)), name


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by name: the bytes of files, None for folders. Hidden names too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# A Llama in NumPy, in the interleaved layout --------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def interleaved_logits(
    weights: Arrays,
    tokens: Sequence[int],
    heads: int,
    kv_heads: int,
    eps: float = 1e-5,
    theta: float = 10_000.0,
    slow: Callable[[float], float] = lambda frequency: frequency,
    positions: Sequence[int] | None = None,
) -> np.ndarray:
    """Logits of one text, [T, V], in float64, from tensors under Meta's names and in its layout.

    Channels 2i and 2i + 1 of a head are a complex number, which position t turns by t · theta^(−2i/C). `slow` is what
    is done to that frequency.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    T, layers = len(tokens), sum(name.endswith("attention.wq.weight") for name in w)
    width = w["layers.0.attention.wq.weight"].shape[0] // heads
    frequencies = np.array([slow(theta ** (-2 * i / width)) for i in range(width // 2)])
    at = np.arange(T) if positions is None else np.array(positions)
    turn = np.exp(1j * at[:, None] * frequencies)  # [T, C/2]
    future = np.triu(np.ones((T, T), dtype=bool), 1)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def rotated(x: np.ndarray) -> np.ndarray:
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)

    def head(x: np.ndarray, h: int) -> np.ndarray:
        return x[:, h * width : (h + 1) * width]

    x = w["tok_embeddings.weight"][list(tokens)]
    for i in range(layers):
        layer = {name.removeprefix(f"layers.{i}."): array for name, array in w.items() if f"layers.{i}." in name}
        y = norm(x, layer["attention_norm.weight"])
        q, k, v = (y @ layer[f"attention.w{kind}.weight"].T for kind in "qkv")
        mixed = []
        for h in range(heads):
            shared = h // (heads // kv_heads)
            scores = rotated(head(q, h)) @ rotated(head(k, shared)).T / math.sqrt(width)
            scores[future] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(share / share.sum(-1, keepdims=True) @ head(v, shared))
        x = x + np.concatenate(mixed, -1) @ layer["attention.wo.weight"].T
        y = norm(x, layer["ffn_norm.weight"])
        gate = y @ layer["feed_forward.w1.weight"].T
        up = y @ layer["feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


@torch.no_grad()
def logits_of(path: Path, tokens: Sequence[int], positions: Sequence[int] | None = None) -> np.ndarray:
    at = None if positions is None else torch.tensor([positions])
    found: np.ndarray = load_model(path)(torch.tensor([tokens]), at)[0].double().numpy()
    return found


def some_tokens(count: int = 21, below: int = 96) -> list[int]:
    generator = random.Random(4)
    return [generator.randrange(below) for _ in range(count)]


# llama2.c's files, read and written by hand ---------------------------------------------------------------------------

LAYER_TENSORS = {
    "rms_att": "attention_norm",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "rms_ffn": "ffn_norm",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
}
# In the order in which `export.py` writes them.
LEGACY = [
    *("tok_emb", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3"),
    *("rms_final", "freq_cos", "freq_sin", "wcls"),
]
VERSION_1 = ["rms_att", "rms_ffn", "rms_final", "tok_emb", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wcls"]


def read_bin(data: bytes) -> tuple[dict[str, int], Arrays]:
    """The header of a `.bin`, and its tensors under Meta's names."""
    if data[:4] == b"24ka":  # the magic number 0x616b3432, little-endian
        magic, version, *sizes, shared = struct.unpack("<Ii7iB", data[:37])
        assert (magic, version) == (0x616B3432, 1)
        assert shared in (0, 1)
        assert data[37:256] == bytes(256 - 37)
        order, begin = VERSION_1, 256
    else:
        sizes = list(struct.unpack("<7i", data[:28]))
        shared, sizes[5] = int(sizes[5] > 0), abs(sizes[5])
        order, begin = LEGACY, 28
    dim, hidden, layers, heads, kv_heads, vocabulary, length = sizes
    width = dim // heads
    shape_of: dict[str, tuple[int, ...]] = {
        "tok_emb": (vocabulary, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * width, dim),
        "wv": (layers, kv_heads * width, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cos": (length, width // 2),
        "freq_sin": (length, width // 2),
        "wcls": (vocabulary, dim),
    }
    whole = {"tok_emb": "tok_embeddings", "rms_final": "norm", "wcls": "output", "freq_cos": "cos", "freq_sin": "sin"}
    tensors: Arrays = {}
    for part in order:
        if part == "wcls" and shared:
            continue
        shape = shape_of[part]
        array = np.frombuffer(data, "<f4", math.prod(shape), begin).reshape(shape)
        begin += array.nbytes
        if part in whole:
            tensors[f"{whole[part]}.weight"] = array
        else:
            tensors |= {f"layers.{i}.{LAYER_TENSORS[part]}.weight": array[i] for i in range(layers)}
    assert begin == len(data)
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocabulary", "length")
    return {**dict(zip(names, sizes, strict=True)), "shared": shared}, tensors


# Round trips are bitwise ----------------------------------------------------------------------------------------------


def check_hf(folder: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """A Hugging Face folder holds these bits, and its config says all of this."""
    assert_same_bits(safetensors().load_file(folder / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in said} == said
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert open_model(folder).config == as_config(said)


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE], ids=[*SHAPES.keys(), "wide heads"])
def test_hf_to_native_and_back(tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, said = random_hf(tmp_path / "a", dtype, **shape), {**BASE, **shape}
    convert(tmp_path / "a", tmp_path / "native", "native")
    stored = torch.load(tmp_path / "native" / "model.pt", weights_only=True)
    assert_same_bits(stored, {native_name(name): tensor for name, tensor in tensors.items()})
    assert LlamaConfig.from_file(tmp_path / "native" / "config.json") == as_config(said)
    convert(tmp_path / "native", tmp_path / "b", "hf")
    check_hf(tmp_path / "b", tensors, said)


@dtypes
@pytest.mark.parametrize("shards", [1, 2, 4])
@shapes
def test_hf_to_meta_and_back(tmp_path: Path, shape: dict[str, Any], shards: int, dtype: torch.dtype) -> None:
    tensors, said = random_hf(tmp_path / "a", dtype, **shape), {**BASE, **shape}
    convert(tmp_path / "a", tmp_path / "meta", "meta", shards=shards)
    ranks = sorted(path.name for path in (tmp_path / "meta").glob("*.pth"))
    assert ranks == [f"consolidated.{rank:02d}.pth" for rank in range(shards)]
    convert(tmp_path / "meta", tmp_path / "b", "hf")
    check_hf(tmp_path / "b", tensors, said)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("kv_heads", [4, 8], ids=["gqa", "mha"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_native_to_llama2c_and_back(tmp_path: Path, tied: bool, kv_heads: int, version: int) -> None:
    shape = {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
    generator = torch.Generator().manual_seed(5)
    tensors = hf_tensors({**BASE, **shape}, lambda size: random_bits(size, torch.float32, generator))
    config = write_native(tmp_path / "a", tensors, **shape)
    convert(tmp_path / "a", tmp_path / "a.bin", "llama2c", version=version)
    convert(tmp_path / "a.bin", tmp_path / "b", "native")
    stored = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    assert_same_bits(stored, {native_name(name): tensor for name, tensor in tensors.items()})
    assert LlamaConfig.from_file(tmp_path / "b" / "config.json") == config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_through_every_format_in_turn(tmp_path: Path, tied: bool) -> None:
    tensors = random_hf(tmp_path / "0", torch.float32, tie_word_embeddings=tied)
    route = [("meta", "1"), ("llama2c", "2.bin"), ("meta", "3"), ("native", "4"), ("llama2c", "5.bin"), ("hf", "6")]
    for number, (to, name) in enumerate(route):
        convert(tmp_path / (["0"] + [name for _, name in route])[number], tmp_path / name, to)
    check_hf(tmp_path / "6", tensors, {**BASE, "tie_word_embeddings": tied})
    assert (tmp_path / "2.bin").read_bytes() == (tmp_path / "5.bin").read_bytes()


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_every_tensor_keeps_its_own_dtype(tmp_path: Path, to: str) -> None:
    generator = torch.Generator().manual_seed(6)

    def make(shape: tuple[int, ...]) -> Tensor:
        return random_bits(shape, torch.float32 if len(shape) == 1 else torch.bfloat16, generator)

    tensors = hf_tensors(BASE, make)
    write_hf(tmp_path / "a", tensors)
    convert(tmp_path / "a", tmp_path / "between", to)
    convert(tmp_path / "between", tmp_path / "b", "hf")
    check_hf(tmp_path / "b", tensors, BASE)
    assert {p.dtype for p in load_model(tmp_path / "between", dtype=None).parameters()} == {torch.float32}  # the widest


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_float64_survives(tmp_path: Path, to: str) -> None:
    tensors = random_hf(tmp_path / "a", torch.float64)
    convert(tmp_path / "a", tmp_path / "between", to)
    convert(tmp_path / "between", tmp_path / "b", "hf")
    check_hf(tmp_path / "b", tensors, BASE)


def test_a_shard_is_filled_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    random_hf(tmp_path / "a", torch.bfloat16)
    opened = open_model(tmp_path / "a")
    first, second, third, *_ = (spec.nbytes for spec in opened.specs.values())
    for less, expected in ((0, 3), (1, 2)):
        folder = tmp_path / f"less {less}"
        folder.mkdir()
        limit = first + second + third - less
        huggingface.write_huggingface(folder, opened.config, opened.specs, opened.read, shard_bytes=limit)
        assert len(safetensors().load_file(min(folder.glob("*.safetensors")))) == expected


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    """It may be in the file that the index says, in another, or in both."""
    random_hf(tmp_path / "a", torch.bfloat16)
    opened = open_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    huggingface.write_huggingface(tmp_path / "b", opened.config, opened.specs, opened.read, shard_bytes=10_000)
    file = min((tmp_path / "b").glob("*.safetensors"))
    held = safetensors().load_file(file)
    safetensors().save_file({**held, "model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(InputError, match=r"safetensors: tensor model\.norm\.weight is not where the index says"):
        open_model(tmp_path / "b")


def test_a_huggingface_folder_of_many_files_is_the_same_model(tmp_path: Path) -> None:
    tensors = random_hf(tmp_path / "a", torch.bfloat16, tie_word_embeddings=False)
    opened = open_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    limit = 10_000
    huggingface.write_huggingface(tmp_path / "b", opened.config, opened.specs, opened.read, shard_bytes=limit)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(parts) > 3
    found: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        assert part.name == f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        held = safetensors().load_file(part)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit or len(held) == 1
        assert all(index["weight_map"][name] == part.name for name in held)
        found |= held
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same_bits(found, tensors)
    convert(tmp_path / "b", tmp_path / "c", "hf")
    check_hf(tmp_path / "c", tensors, {**BASE, "tie_word_embeddings": False})


# llama2.c -------------------------------------------------------------------------------------------------------------


def test_stories260k_comes_back_byte_for_byte(real_data: Path, tmp_path: Path) -> None:
    convert(real_data / "stories260K.bin", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again.bin", "llama2c")
    assert (tmp_path / "again.bin").read_bytes() == (real_data / "stories260K.bin").read_bytes()


def test_stories260k_computes_what_a_forward_pass_in_numpy_does(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "stories260K.bin"
    header, weights = read_bin(file.read_bytes())
    assert (header["dim"], header["layers"], header["heads"], header["kv_heads"]) == (64, 5, 8, 4)
    tokens = [1, *some_tokens(40, below=512)]
    wanted = interleaved_logits(weights, tokens, header["heads"], header["kv_heads"])
    assert wanted.std() > 1
    convert(file, tmp_path / "native", "native")
    for path in (file, tmp_path / "native"):
        assert np.abs(logits_of(path, tokens) - wanted).max() < 1e-4


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["multi-query", "gqa", "mha"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_written_bin_computes_what_its_source_does(tmp_path: Path, tied: bool, kv_heads: int, version: int) -> None:
    model = random_model(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    save_model(tmp_path / "a", model)
    convert(tmp_path / "a", tmp_path / "a.bin", "llama2c", version=version)
    data = (tmp_path / "a.bin").read_bytes()
    header, weights = read_bin(data)
    assert data.startswith(struct.pack("<Ii", 0x616B3432, 1)) == (version == 1)
    assert header == {
        "dim": 24,
        "hidden": 40,
        "layers": 2,
        "heads": 4,
        "kv_heads": kv_heads,
        "vocabulary": 97,
        "length": 64,
        "shared": int(tied),
    }
    tokens = random_tokens(21).tolist()
    wanted = interleaved_logits(weights, tokens, 4, kv_heads)
    assert wanted.std() > 0.9
    assert np.abs(logits_of(tmp_path / "a", tokens) - wanted).max() < 1e-4
    assert np.abs(logits_of(tmp_path / "a.bin", tokens) - wanted).max() < 1e-4


def test_the_legacy_file_holds_ropes_table(tmp_path: Path) -> None:
    save_model(tmp_path / "a", small_model())
    convert(tmp_path / "a", tmp_path / "a.bin", "llama2c")
    _, weights = read_bin((tmp_path / "a.bin").read_bytes())
    angles = np.outer(np.arange(64), 10_000.0 ** (-np.arange(0, 6, 2) / 6))
    assert np.abs(weights["cos.weight"] - np.cos(angles)).max() < 1e-5
    assert np.abs(weights["sin.weight"] - np.sin(angles)).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06"),
        ({"rope_theta": 500_000.0}, r"rope_theta 500000\.0"),
        ({"head_dim": 10}, "head_dim 10"),
        ({"rope_scaling": SCALING}, "rope_scaling"),
        ({"bos_token_id": 0}, "bos_token_id 0"),
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
    ],
)
def test_what_llama2c_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], culprit: str) -> None:
    random_hf(tmp_path / "a", torch.float32, **changes)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"cannot hold {culprit}"):
        convert(tmp_path / "a", tmp_path / "a.bin", "llama2c")
    assert snapshot(tmp_path) == before


def test_llama2c_is_float32(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "float64", tmp_path / "bfloat16"
    generator = torch.Generator().manual_seed(7)
    tensors = hf_tensors(BASE, lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64))
    write_hf(wide, tensors)
    with pytest.raises(InputError, match="float64; round them with --dtype float32"):
        convert(wide, tmp_path / "a.bin", "llama2c")
    with pytest.raises(InputError, match="hold float32; leave --dtype out"):
        convert(wide, tmp_path / "a.bin", "llama2c", dtype=torch.bfloat16)
    assert not (tmp_path / "a.bin").exists()
    convert(wide, tmp_path / "a.bin", "llama2c", dtype=torch.float32)
    convert(tmp_path / "a.bin", tmp_path / "a", "hf")
    check_hf(tmp_path / "a", {name: tensor.float() for name, tensor in tensors.items()}, BASE)

    tensors = random_hf(narrow, torch.bfloat16)
    convert(narrow, tmp_path / "b.bin", "llama2c")  # widened: no bit is lost
    convert(tmp_path / "b.bin", tmp_path / "b", "hf", dtype=torch.bfloat16)
    check_hf(tmp_path / "b", tensors, BASE)


@pytest.mark.parametrize("version", [-1, 2, 3])
def test_an_unknown_version_of_llama2c_is_refused(
    tmp_path: Path, small_checkpoint: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("convert", small_checkpoint, tmp_path / "a.bin", "--to", "llama2c", "--llama2c-version", version)
    assert main([str(word) for word in words]) == 2
    assert str(version) in one_error(capsys)
    assert snapshot(tmp_path) == {}


# Meta -----------------------------------------------------------------------------------------------------------------

# The axis along which Meta's ranks share a matrix; norms are on every rank.
META_AXES = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "output": 0,
}
PARAMS = {
    "dim": 32,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 8,
    "n_layers": 2,
    "vocab_size": -1,
}
META_F = 112  # ⌊2/3 · 128⌋ = 85, ⌊1.3 · 85⌋ = 110, rounded up to a multiple of 16


def random_meta(kv_heads: int, vocabulary: int = 96, dim: int = 32, seed: int = 8) -> dict[str, Tensor]:
    """A whole model in Meta's names and layout."""
    generator = torch.Generator().manual_seed(seed)

    whole = {"tok_embeddings.weight": moderate((vocabulary, dim), generator)}
    for i in range(2):
        shapes_of = {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_heads * dim // 8, dim),
            "attention.wv": (kv_heads * dim // 8, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (META_F, dim),
            "feed_forward.w2": (dim, META_F),
            "feed_forward.w3": (META_F, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        whole |= {f"layers.{i}.{name}.weight": moderate(shape, generator) for name, shape in shapes_of.items()}
    whole["norm.weight"] = moderate((dim,), generator)
    whole["output.weight"] = moderate((vocabulary, dim), generator)
    return whole


def meta_axis(name: str, embedding_axis: int) -> int | None:
    if name == "tok_embeddings.weight":
        return embedding_axis
    kind = name.removesuffix(".weight")
    return META_AXES.get(kind.split(".", 2)[2] if kind.startswith("layers.") else kind)


def write_ranks(
    folder: Path, whole: Mapping[str, Tensor], ranks: int, embedding_axis: int, params: Mapping[str, Any]
) -> None:
    """The folder as Meta's ranks would save it, RoPE's frequencies and all."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        shard = {}
        for name, tensor in whole.items():
            axis = meta_axis(name, embedding_axis)
            piece = tensor if axis is None else tensor.tensor_split(ranks, axis)[rank]
            shard[name] = piece.clone(memory_format=torch.contiguous_format)
        shard["rope.freqs"] = torch.arange(2.0)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))


def joined_ranks(folder: Path, embedding_axis: int) -> Arrays:
    """The whole tensors of a Meta folder, read with plain torch."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    whole = {}
    for name in shards[0]:
        axis = meta_axis(name, embedding_axis)
        if axis is None:
            assert all(torch.equal(shard[name], shards[0][name]) for shard in shards)
            whole[name] = shards[0][name].numpy()
        else:
            assert len({shard[name].shape for shard in shards}) == 1, name
            whole[name] = torch.cat([shard[name] for shard in shards], axis).numpy()
    return whole


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama 3", "llama 2"])
@pytest.mark.parametrize("kv_heads", [None, 4], ids=["mha", "gqa"])
def test_the_files_of_metas_ranks(tmp_path: Path, kv_heads: int | None, embedding_axis: int, ranks: int) -> None:
    whole = random_meta(kv_heads or 8)
    params = dict(PARAMS)
    if kv_heads:
        params |= {"n_kv_heads": kv_heads, "rope_theta": 500_000.0, "norm_eps": 1e-3}
    write_ranks(tmp_path / "meta", whole, ranks, embedding_axis, params)
    tokens = some_tokens()
    wanted = interleaved_logits(
        {name: tensor.numpy() for name, tensor in whole.items()},
        tokens,
        8,
        kv_heads or 8,
        float(params.get("norm_eps", 1e-5)),
        float(params.get("rope_theta", 10_000.0)),
    )
    assert wanted.std() > 0.9
    assert np.abs(logits_of(tmp_path / "meta", tokens) - wanted).max() < 1e-4
    config = open_model(tmp_path / "meta").config
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (96, META_F, 4_096)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (1, (2,), False)
    assert config.rms_norm_eps == params.get("norm_eps", 1e-5)
    safetensors()
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert np.abs(logits_of(tmp_path / "hf", tokens) - wanted).max() < 1e-4


def metas_scaling(frequency: float, factor: float = 8) -> float:
    """Llama 3.1's `apply_scaling`, whose numbers are constants of Meta's code; Llama 3.2's has another factor."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8_192 / 4:
        return frequency
    if wavelength > 8_192 / 1:
        return frequency / factor
    smooth = (8_192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [500_000.0, 3_000_000.0], ids=["blended", "slowed down"])
def test_metas_scaled_rope(tmp_path: Path, theta: float, tied: bool) -> None:
    """By 8; of tied models, which are the small ones of Llama 3.2, by 32."""
    whole = random_meta(4)
    if tied:
        whole["output.weight"] = whole["tok_embeddings.weight"].clone()
    params = {**PARAMS, "n_kv_heads": 4, "rope_theta": theta, "use_scaled_rope": True}
    write_ranks(tmp_path / "meta", whole, 2, 0, params)
    assert open_model(tmp_path / "meta").config.max_position_embeddings == 131_072
    arrays = {name: tensor.numpy() for name, tensor in whole.items()}
    tokens = some_tokens(16)
    positions = [797 * t for t in range(16)]  # far enough for the slow pair of channels to turn
    slow = partial(metas_scaling, factor=32 if tied else 8)
    wanted = interleaved_logits(arrays, tokens, 8, 4, theta=theta, slow=slow, positions=positions)
    plain = interleaved_logits(arrays, tokens, 8, 4, theta=theta, positions=positions)
    assert np.abs(wanted - plain).max() > 0.1
    assert np.abs(logits_of(tmp_path / "meta", tokens, positions) - wanted).max() < 1e-4


def test_llama3s_vocabulary_brings_its_ids_and_length(tmp_path: Path) -> None:
    whole = random_meta(4, vocabulary=128_256)
    write_ranks(tmp_path / "meta", whole, 2, 0, {**PARAMS, "n_kv_heads": 4, "rope_theta": 5e5, "vocab_size": 128_256})
    config = open_model(tmp_path / "meta").config
    assert (config.bos_token_id, config.eos_token_ids[0], config.max_position_embeddings) == (128_000, 128_001, 8_192)
    convert(tmp_path / "meta", tmp_path / "again", "meta", shards=4)
    assert torch.load(tmp_path / "again" / "consolidated.00.pth")["tok_embeddings.weight"].shape == (128_256 // 4, 32)
    assert_same_bits(
        {name: torch.from_numpy(array) for name, array in joined_ranks(tmp_path / "again", 0).items()}, whole
    )


def test_equal_matrices_in_metas_files_are_a_tied_model(tmp_path: Path) -> None:
    whole = random_meta(4)
    whole["output.weight"] = whole["tok_embeddings.weight"].clone()
    write_ranks(tmp_path / "meta", whole, 2, 1, {**PARAMS, "n_kv_heads": 4})
    model = load_model(tmp_path / "meta")
    assert model.config.tie_word_embeddings
    assert model.head_weight is model.embed_tokens.weight
    tokens = some_tokens()
    wanted = interleaved_logits({name: tensor.numpy() for name, tensor in whole.items()}, tokens, 8, 4)
    assert np.abs(logits_of(tmp_path / "meta", tokens) - wanted).max() < 1e-4


# What the dataclass `ModelArgs` has; `max_seq_len` and `max_batch_size` are given beside the file, and would be twice.
LLAMA2_PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"} | {
    "norm_eps"
}
LLAMA3_PARAMS = LLAMA2_PARAMS | {"rope_theta", "use_scaled_rope"}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "known", "embedding_axis"),
    [
        ({}, LLAMA2_PARAMS, 1),
        ({"tie_word_embeddings": False, "num_key_value_heads": 8}, LLAMA2_PARAMS, 1),
        ({"rope_scaling": SCALING, "rope_theta": 500_000.0}, LLAMA3_PARAMS, 0),
    ],
    ids=["tied", "untied", "llama 3"],
)
def test_metas_ranks_could_load_what_is_written(
    tmp_path: Path, shape: dict[str, Any], known: set[str], embedding_axis: int, shards: int
) -> None:
    generator = torch.Generator().manual_seed(9)
    said = {**BASE, **shape}
    write_hf(tmp_path / "a", hf_tensors(said, lambda size: moderate(size, generator)), **shape)
    convert(tmp_path / "a", tmp_path / "meta", "meta", shards=shards)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params.keys() <= known
    assert (params["dim"], params["n_layers"], params["n_heads"], params["vocab_size"]) == (32, 2, 8, 96)
    assert params["n_kv_heads"] == said["num_key_value_heads"]
    assert params.get("use_scaled_rope", False) == (said["rope_scaling"] is not None)
    assert metas_width(32, params["multiple_of"], params.get("ffn_dim_multiplier")) == said["intermediate_size"]
    whole = joined_ranks(tmp_path / "meta", embedding_axis)
    assert whole["tok_embeddings.weight"].shape == (96, 32)
    assert "output.weight" in whole  # which Meta's code wants of a tied model too
    for name, array in whole.items():
        if (axis := meta_axis(name, embedding_axis)) is not None:
            for rank in range(shards):
                piece = torch.load(tmp_path / "meta" / f"consolidated.{rank:02d}.pth")[name]
                assert piece.shape[axis] * shards == array.shape[axis]
                assert piece.is_contiguous()
    if said["rope_scaling"] is None:
        tokens = some_tokens()
        wanted = interleaved_logits(whole, tokens, 8, said["num_key_value_heads"])
        assert wanted.std() > 0.9
        assert np.abs(logits_of(tmp_path / "a", tokens) - wanted).max() < 1e-4


def metas_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """`FeedForward.__init__` of Meta's code, line by line."""
    hidden_dim = 4 * dim
    hidden_dim = int(2 * hidden_dim / 3)
    if multiplier is not None:
        hidden_dim = int(multiplier * hidden_dim)
    return multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4_096, 256, None, 11_008),  # Llama 2 7B
        (5_120, 256, None, 13_824),  # Llama 2 13B
        (8_192, 4_096, 1.3, 28_672),  # Llama 2 70B
        (4_096, 1_024, 1.3, 14_336),  # Llama 3 8B
        (2_048, 256, 1.5, 8_192),  # Llama 3.2 1B
        (3_072, 256, 1.0, 8_192),  # Llama 3.2 3B
    ],
)
def test_published_widths(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert meta.feed_forward_width(dim, multiple_of, multiplier) == width
    assert metas_width(dim, **as_arguments(meta.feed_forward_params(dim, width))) == width


def as_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"multiple_of": params["multiple_of"], "multiplier": params.get("ffn_dim_multiplier")}


def test_every_width_can_be_said() -> None:
    generator = random.Random(10)
    cases = [(dim, width) for dim in range(1, 90) for width in range(1, 40)]
    cases += [(generator.randrange(1, 20_000), generator.randrange(1, 100_000)) for _ in range(20_000)]
    wrong = [
        (dim, width)
        for dim, width in cases
        if metas_width(dim, **as_arguments(meta.feed_forward_params(dim, width))) != width
    ]
    assert not wrong, f"{len(wrong)} pairs of dim and width, the first {wrong[:5]}"


def change_shard(folder: Path, rank: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / f"consolidated.{rank:02d}.pth"
    shard = torch.load(file, weights_only=True)
    change(shard)
    torch.save(shard, file)


def other_norm(shard: dict[str, Tensor]) -> None:
    shard["layers.1.ffn_norm.weight"][3] += 1


def narrow_piece(shard: dict[str, Tensor]) -> None:
    shard["layers.0.attention.wq.weight"] = shard["layers.0.attention.wq.weight"][:, :-4].clone()


def flat_piece(shard: dict[str, Tensor]) -> None:
    shard["layers.0.feed_forward.w2.weight"] = shard["layers.0.feed_forward.w2.weight"].flatten()


def wide_piece(shard: dict[str, Tensor]) -> None:
    shard["layers.0.attention.wv.weight"] = shard["layers.0.attention.wv.weight"].double()


def missing_piece(shard: dict[str, Tensor]) -> None:
    del shard["layers.1.attention.wo.weight"]


def extra_piece(shard: dict[str, Tensor]) -> None:
    shard["layers.2.attention.wo.weight"] = torch.zeros(3)


def no_number(shard: dict[str, Tensor]) -> None:
    shard["layers.1.feed_forward.w3.weight"][2, 3] = math.nan


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (other_norm, r"layers\.1\.ffn_norm\.weight is not the one in consolidated\.00\.pth"),
        (narrow_piece, r"layers\.0\.attention\.wq\.weight"),
        (flat_piece, r"layers\.0\.feed_forward\.w2\.weight"),
        (wide_piece, r"layers\.0\.attention\.wv\.weight"),  # or half of its bits would go without a word
        (missing_piece, r"layers\.1\.attention\.wo\.weight is missing"),
        (extra_piece, r"layers\.2\.attention\.wo\.weight is not part"),
        (no_number, r"layers\.1\.feed_forward\.w3\.weight holds NaN"),
    ],
)
def test_a_wrong_piece_of_a_shard_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], culprit: str
) -> None:
    write_ranks(tmp_path / "meta", random_meta(4), 4, 1, {**PARAMS, "n_kv_heads": 4})
    change_shard(tmp_path / "meta", 2, change)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"consolidated\.0\d\.pth: tensor {culprit}"):
        convert(tmp_path / "meta", tmp_path / "native", "native")
    assert snapshot(tmp_path) == before


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_ranks(tmp_path / "meta", random_meta(4), 4, 1, {**PARAMS, "n_kv_heads": 4})
    last = tmp_path / "meta" / "consolidated.03.pth"
    (tmp_path / "meta" / "consolidated.02.pth").unlink()
    with pytest.raises(InputError, match=r"consolidated\.02\.pth: missing, but there is consolidated\.03\.pth"):
        open_model(tmp_path / "meta")
    last.unlink()  # two of four: every matrix is half of what params.json says
    with pytest.raises(InputError, match=r"tensor .* is \["):
        open_model(tmp_path / "meta")


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"n_experts": 8}, "unknown key 'n_experts'"),
        ({"dim": "32"}, "dim is '32'"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_layers": None}, "n_layers is None"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"n_kv_heads": 3}, "num_key_value_heads 3"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
    ],
)
def test_a_wrong_key_of_params_is_named(tmp_path: Path, changes: dict[str, Any], culprit: str) -> None:
    write_ranks(tmp_path / "meta", random_meta(4), 1, 1, {**PARAMS, "n_kv_heads": 4, **changes})
    with pytest.raises(InputError, match=rf"params\.json: .*{culprit}"):
        open_model(tmp_path / "meta")


def test_a_sidecar_that_contradicts_params_is_named(tmp_path: Path) -> None:
    random_hf(tmp_path / "a", torch.float32)
    convert(tmp_path / "a", tmp_path / "meta", "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-6}))
    with pytest.raises(InputError, match=r"minift\.json: rms_norm_eps is 1e-05, but params\.json makes it 1e-06"):
        open_model(tmp_path / "meta")


@pytest.mark.parametrize(
    ("changes", "shards", "culprit"),
    [
        ({"num_key_value_heads": 2}, 4, "num_key_value_heads 2 is not a multiple of 4 shards"),
        ({"num_key_value_heads": 1}, 2, "num_key_value_heads 1"),
        ({"intermediate_size": 50}, 4, "intermediate_size 50"),
        ({"vocab_size": 98}, 4, "vocab_size 98"),
        ({}, 3, "num_attention_heads 8"),
        ({}, 0, "shards is 0"),
        ({}, -1, "shards is -1"),
        ({}, 100, "shards is 100"),
        ({"head_dim": 10}, 1, "cannot hold head_dim 10"),
    ],
)
def test_shards_that_do_not_divide_are_refused(
    tmp_path: Path, changes: dict[str, Any], shards: int, culprit: str
) -> None:
    random_hf(tmp_path / "a", torch.bfloat16, **changes)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=culprit):
        convert(tmp_path / "a", tmp_path / "meta", "meta", shards=shards)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (4, 6), (8, 16), (3, 10)])
def test_the_two_layouts_of_rope_are_permutations_of_each_other(heads: int, width: int) -> None:
    weight = torch.randn(heads * width, 7, generator=torch.Generator().manual_seed(11))
    assert torch.equal(to_interleaved(to_half_split(weight, heads), heads), weight)
    assert torch.equal(to_half_split(to_interleaved(weight, heads), heads), weight)
    # `permute` in transformers' convert_llama_weights_to_hf.py
    dim1, dim2 = weight.shape
    theirs = weight.view(heads, dim1 // heads // 2, 2, dim2).transpose(1, 2).reshape(dim1, dim2)
    assert torch.equal(to_half_split(weight, heads), theirs)
    for h in range(heads):  # and one row at a time
        for i in range(width // 2):
            for half in (0, 1):
                row = h * width + half * width // 2 + i
                assert torch.equal(to_half_split(weight, heads)[row], weight[h * width + 2 * i + half])


# Name tables ----------------------------------------------------------------------------------------------------------

TABLE_SHAPES = {**SHAPES, "wide heads": WIDE, "twelve layers": {"num_hidden_layers": 12, "tie_word_embeddings": False}}
table_shapes = pytest.mark.parametrize("shape", TABLE_SHAPES.values(), ids=TABLE_SHAPES.keys())


@table_shapes
def test_the_shapes_on_paper_are_the_models(shape: dict[str, Any]) -> None:
    config = as_config({**BASE, **shape})
    state = Llama(config).state_dict()
    assert list(parameter_shapes(config).items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]


@table_shapes
def test_every_name_table_is_a_bijection(shape: dict[str, Any]) -> None:
    config = as_config({**BASE, **shape})
    names = list(Llama(config).state_dict())
    to_hf = huggingface.table(config)
    assert list(to_hf) == names
    assert set(to_hf.values()) == set(hf_tensors({**BASE, **shape}, torch.zeros))
    assert len(set(to_hf.values())) == len(names)
    to_meta = {ours: theirs for ours, (theirs, _) in meta.table(config).items()}
    assert list(to_meta) == names
    assert len(set(to_meta.values())) == len(names)
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()) for name in to_meta.values()}
    wanted = {f"layers.{name}.weight" for name in LAYER_TENSORS.values()} | {"tok_embeddings.weight", "norm.weight"}
    assert kinds - {"output.weight"} == wanted
    for version in (0, 1):
        order = [name for name, _ in llama2c.order(config, version) if name != "rope"]
        assert sorted(order) == sorted(names)
        for name, count in llama2c.order(config, version):
            if name != "rope":
                assert count == math.prod(parameter_shapes(config)[name])


# convert: destinations ------------------------------------------------------------------------------------------------


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("minift: error: ")
    return lines[0]


def destination_of(folder: Path, to: str) -> Path:
    return folder / ("there.bin" if to == "llama2c" else "there")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder without a tokenizer, which every format can say."""
    random_hf(tmp_path / "source", torch.float32)
    return tmp_path / "source"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder in which something is to appear, or not."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@formats
def test_an_existing_destination_is_refused_without_force(
    source: Path, place: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = destination_of(place, to)
    for make in (lambda: there.write_bytes(b""), lambda: there.write_text("mine"), there.mkdir):
        make()
        before = snapshot(place)
        assert main(["convert", str(source), str(there), "--to", to]) == 2
        assert "exists; choose another name, or add --force" in one_error(capsys)
        assert snapshot(place) == before
        there.rmdir() if there.is_dir() else there.unlink()


REPLACED = [(older, to) for to in ("native", "hf", "meta") for older in ("native", "hf", "meta", "nothing")]


@pytest.mark.parametrize(("older", "to"), [*REPLACED, ("llama2c", "llama2c")])
def test_force_replaces_a_checkpoint_and_nothing_of_it_stays(source: Path, place: Path, to: str, older: str) -> None:
    there = destination_of(place, to)
    random_hf(place.parent / "other", torch.float32, seed=12)
    if older == "nothing":
        there.mkdir()
    else:
        convert(place.parent / "other", there, older)
    convert(source, there, to, force=True)
    convert(source, destination_of(place.parent, to), to)
    assert snapshot(place) == {
        name: content for name, content in snapshot(place.parent).items() if name.split("/")[0] == there.name
    }


@formats
def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(source: Path, place: Path, to: str) -> None:
    there = place / "there"
    convert(source, there, "native" if to == "llama2c" else "llama2c")
    before = snapshot(place)
    with pytest.raises(InputError, match=f"is a (file|folder); --to {to} does not write one"):
        convert(source, there, to, force=True)
    assert snapshot(place) == before


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_force_spares_a_folder_of_something_else(source: Path, place: Path, to: str) -> None:
    (place / "there").mkdir()
    (place / "there" / "thesis.txt").write_text("the only copy")
    before = snapshot(place)
    with pytest.raises(InputError, match="holds something that is not a model"):
        convert(source, place / "there", to, force=True)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "content", [b"the only copy of a thesis", bytes(28), b"PK\x03\x04" + bytes(600)], ids=["text", "zeros", "archive"]
)
def test_force_spares_a_file_of_something_else(source: Path, place: Path, content: bytes) -> None:
    (place / "thesis").write_bytes(content)
    with pytest.raises(InputError, match=r"thesis"):
        convert(source, place / "thesis", "llama2c", force=True)
    assert snapshot(place) == {"thesis": content}


@formats
def test_a_destination_may_not_be_the_source_nor_hold_it(place: Path, to: str) -> None:
    inner = place / "models" / "inner"
    random_hf(inner, torch.float32)
    (place / "link").symlink_to(inner)
    before = snapshot(place)
    for there in (inner, inner.parent, place, place / "link", inner / ".." / "inner"):
        with pytest.raises(InputError, match="is where the source is"):
            convert(inner, there, to, force=True)
        assert snapshot(place) == before
    convert(inner, place.parent / "a.bin", "llama2c")
    with pytest.raises(InputError, match="is where the source is"):
        convert(place.parent / "a.bin", place.parent / "a.bin", "llama2c", force=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_the_source_is_never_replaced(source: Path, name: str) -> None:
    before = snapshot(source)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        convert(source, source / name, "llama2c", force=True)
    assert snapshot(source) == before


# convert: what goes wrong on the way ----------------------------------------------------------------------------------


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, int], None]:
    """Make reading fail after some tensors."""

    def arrange(error: BaseException, after: int) -> None:
        read, left = Opened.read, iter(range(after))

        def reading(self: Opened, name: str, *options: Any) -> Tensor:
            if next(left, None) is None:
                raise error
            return read(self, name, *options)

        monkeypatch.setattr(Opened, "read", reading)

    return arrange


FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), RunError),
    "bad tensor": (InputError("model.pt: tensor is damaged"), InputError),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "defect": (RuntimeError("a defect"), RuntimeError),
}


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize(("error", "raised"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("force", [False, True], ids=["new", "over an older one"])
@formats
def test_a_write_that_fails_leaves_everything_as_it_was(
    source: Path,
    place: Path,
    tokenizer: Tokenizer,
    breaking: Callable[[BaseException, int], None],
    to: str,
    force: bool,
    error: BaseException,
    raised: type[BaseException],
    after: int,
) -> None:
    there = destination_of(place, to)
    if force:
        random_hf(place.parent / "other", torch.float32, seed=13)
        convert(place.parent / "other", there, to)
    (place / "neighbour").write_text("of something else")
    before = snapshot(place)
    breaking(error, after)
    with pytest.raises(raised):
        convert(source, there, to, shards=2 if to == "meta" else 1, force=force)
    assert snapshot(place) == before


@pytest.mark.parametrize("function", ["tensor_bytes", "fsync"])
@formats
def test_a_disk_that_refuses_leaves_everything_as_it_was(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch, to: str, function: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    there = destination_of(place, to)
    convert(source, there, to)
    before = snapshot(place)
    for module in [os] if function == "fsync" else [files, llama2c]:
        monkeypatch.setattr(module, function, refuse)
    with pytest.raises(RunError, match="cannot be written: Input/output error"):
        convert(source, there, to, force=True)
    assert snapshot(place) == before


@formats
def test_a_failure_leaves_no_folder_that_it_made_on_the_way(
    source: Path, place: Path, breaking: Callable[[BaseException, int], None], to: str
) -> None:
    breaking(InputError("model.pt: tensor is damaged"), 3)
    with pytest.raises(InputError, match="damaged"):
        convert(source, destination_of(place / "new" / "deep", to), to)
    assert snapshot(place) == {}


@formats
def test_folders_on_the_way_are_made(source: Path, place: Path, to: str) -> None:
    there = destination_of(place / "new" / "deep", to)
    convert(source, there, to)
    assert open_model(there).format == to


@formats
def test_a_destination_below_a_file_is_one_line(
    source: Path, place: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("no folder")
    before = snapshot(place)
    assert main(["convert", str(source), str(place / "file" / "there"), "--to", to]) == 1
    assert str(place / "file" / "there") in one_error(capsys)
    assert snapshot(place) == before


@formats
def test_a_disk_that_is_too_small_is_refused_at_once(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    usage = shutil.disk_usage(place)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["convert", str(source), str(destination_of(place, to)), "--to", to]) == 1
    assert "GB free" in one_error(capsys)
    assert snapshot(place) == {}


def run_main(script: str, *words: str | Path, **limits: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **limits)


FULL = """
import signal, sys
from minift.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it anyway: writing then fails with an error
codes = [main(["convert", sys.argv[1], sys.argv[2] + name, "--to", to]) for to, name in
         (("native", "n"), ("hf", "h"), ("meta", "m"), ("llama2c", "c.bin"))]
print(codes)
"""


def test_a_write_that_the_system_refuses_is_one_line_and_exit_1(source: Path, place: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # bytes of a file; the model has 90,000

    done = run_main(FULL, source, f"{place}/", preexec_fn=limit)
    assert done.stdout == "[1, 1, 1, 1]\n", done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["minift", "error"]] * 4
    assert all("cannot be written: File too large" in line for line in lines)
    assert snapshot(place) == {}


# convert: dtypes and flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_a_dtype_rounds_as_torch_does(tmp_path: Path, to: str) -> None:
    generator = torch.Generator().manual_seed(14)
    tensors = hf_tensors(BASE, lambda shape: torch.randn(shape, generator=generator))
    write_hf(tmp_path / "a", tensors)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        between, again = tmp_path / f"between-{name}", tmp_path / f"again-{name}"
        words = ["convert", tmp_path / "a", between, "--to", to, "--dtype", name]
        assert main([str(word) for word in words]) == 0
        convert(between, again, "hf")
        check_hf(again, {key: tensor.to(dtype) for key, tensor in tensors.items()}, BASE)


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_values_beyond_float16_are_refused_by_name(
    tmp_path: Path, place: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = hf_tensors(BASE, torch.ones)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70_000.0
    write_hf(tmp_path / "a", tensors)
    assert main(["convert", str(tmp_path / "a"), str(place / "there"), "--to", to, "--dtype", "float16"]) == 2
    line = one_error(capsys)
    assert "model.safetensors: tensor model.layers.1.mlp.up_proj.weight has values beyond the range of float16" in line
    assert snapshot(place) == {}
    convert(tmp_path / "a", place / "there", to, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("to", "flags", "culprit"),
    [
        ("native", ["--shards", "2"], "--shards is for --to meta, not for native"),
        ("llama2c", ["--shards", "2"], "--shards is for --to meta"),
        ("hf", ["--llama2c-version", "1"], "--llama2c-version is for --to llama2c, not for hf"),
        ("meta", ["--shards", "0"], "shards is 0"),
        ("meta", ["--shards", "two"], "two"),
        ("hf", ["--dtype", "float8"], "--dtype is 'float8'"),
        ("llama2c", ["--dtype", "bfloat16"], "leave --dtype out"),
        ("gguf", [], "--to is 'gguf'"),
        ("hf", ["--tokenizer", "nowhere"], "nowhere"),
        ("hf", ["--fast"], "--fast"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(
    source: Path, place: Path, to: str, flags: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(place / "there"), "--to", to, *flags]) == 2
    assert culprit in one_error(capsys)
    assert snapshot(place) == {}


def test_a_source_that_is_no_model_is_one_line_and_exit_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    (place / "text.bin").write_text("not a model")
    before = snapshot(place)
    for name in ("nowhere", "empty", "text.bin"):
        assert main(["convert", str(place / name), str(place / "there"), "--to", "native"]) == 2
        assert name in one_error(capsys)
        assert snapshot(place) == before


def test_a_conversion_says_what_it_did(source: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(place / "there"), "--to", "meta", "--shards", "2"]) == 0
    shown = capsys.readouterr()
    numel = sum(tensor.numel() for tensor in safetensors().load_file(source / "model.safetensors").values())
    assert shown.out.startswith(f"saved: {place / 'there'} (meta, from hf; {numel:,} parameters, float32, ")
    assert shown.err.splitlines() == [
        "note: the source has no tokenizer next to it, so the result has none (--tokenizer names one)"
    ]


def test_ctrl_c_is_exit_1(
    source: Path,
    place: Path,
    breaking: Callable[[BaseException, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaking(KeyboardInterrupt(), 4)
    assert main(["convert", str(source), str(place / "there"), "--to", "hf"]) == 1
    assert capsys.readouterr().err == "minift: interrupted\n"
    assert snapshot(place) == {}


# convert: tokenizers --------------------------------------------------------------------------------------------------

EXTRA_FILES = {
    "tokenizer_config.json": b'{"model_max_length": 512,   "chat_template": "{{ x }}"}\r\n',
    "special_tokens_map.json": b'{"pad_token": "</s>"}',
    "chat_template.jinja": b"\xef\xbb\xbf{%- for m in messages %}\r\n\x00\xff\xfe no UTF-8 {% endfor %}",
    "chat_template.json": b"\x80 not even JSON",
}


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
def test_all_the_tokenizers_files_travel(small_checkpoint: Path, place: Path, to: str) -> None:
    if to == "hf":
        pytest.importorskip("tokenizers")
    start = place.parent / "start"
    shutil.copytree(small_checkpoint, start)
    for name, content in EXTRA_FILES.items():
        (start / name).write_bytes(content)
    (start / "README.md").write_text("which is not the tokenizer's")
    there = destination_of(place, to)
    assert not convert(start, there, to).notes
    folder = place if to == "llama2c" else there
    for name, content in {**EXTRA_FILES, "tokenizer.model": (start / "tokenizer.model").read_bytes()}.items():
        assert (folder / name).read_bytes() == content
    assert not (folder / "README.md").exists()
    text = "What is the capital of Mexico?\n\tNaïve — 東京"
    assert load_tokenizer(there).encode(text) == load_tokenizer(start).encode(text)
    convert(there, place.parent / "back", "native")
    for name, content in EXTRA_FILES.items():
        assert (place.parent / "back" / name).read_bytes() == content


def test_a_tokenizer_that_cannot_be_read_here_travels_as_it_is(source: Path, place: Path) -> None:
    ranks = b"IQ== 0\nIg== 1\nIw== 2\n"  # tiktoken's, as Llama 3's folders have them
    (source / "tokenizer.model").write_bytes(ranks)
    done = convert(source, place / "there", "meta")
    assert (place / "there" / "tokenizer.model").read_bytes() == ranks
    (note,) = done.notes
    assert "copied as they are" in note
    assert "tiktoken" in note


def test_a_tokenizer_beside_a_bin_that_does_not_fit_is_left_out(
    source: Path, place: Path, tokenizer: Tokenizer
) -> None:
    convert(source, place / "a.bin", "llama2c")
    tokenizer.save(place)  # of 2,048 pieces, for a model of 96
    done = convert(place / "a.bin", place / "there", "native")
    assert sorted(file.name for file in (place / "there").iterdir()) == ["config.json", "model.pt"]
    (note,) = done.notes
    assert "left out" in note
    assert "2048" in note


def test_a_named_tokenizer_takes_the_place_of_the_sources(
    small_checkpoint: Path, place: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    start = place.parent / "start"
    shutil.copytree(small_checkpoint, start)
    (start / "tokenizer.model").write_bytes(b"damaged")
    named = small_checkpoint / "tokenizer.model"
    words = ["convert", str(start), str(place / "a"), "--to", "native", "--tokenizer", str(named)]
    assert main(words) == 2
    assert one_error(capsys).startswith(f"minift: error: {start / 'tokenizer.model'}: damaged, or changed")
    assert main([*words, "--no-check"]) == 0
    assert (place / "a" / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
    assert capsys.readouterr().err == ""
    random_hf(place.parent / "tiny", torch.float32)
    assert main(["convert", str(place.parent / "tiny"), str(place / "b"), "--to", "hf", "--tokenizer", str(named)]) == 2
    assert "2048" in one_error(capsys)
    assert not (place / "b").exists()


def test_llama2cs_own_tokenizer_file(small_checkpoint: Path, place: Path, tokenizer: Tokenizer) -> None:
    """Read as `build_tokenizer` in run.c does."""
    convert(small_checkpoint, place / "a.bin", "llama2c")
    data = (place / "tokenizer.bin").read_bytes()
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = tokenizer.processor
    (longest,) = struct.unpack_from("<I", data)
    begin, lengths = 4, []
    for id in range(tokenizer.vocab_size):
        score, length = struct.unpack_from("<fi", data, begin)
        text = data[begin + 8 : begin + 8 + length]
        begin += 8 + length
        lengths.append(length)
        piece = processor.id_to_piece(id).replace("▁", " ").encode()
        assert text == (b"\n" + piece + b"\n" if id in (1, 2) else piece)  # as `tokenizer/base.py` of llama2.c has it
        assert score == np.float32(processor.GetScore(id))
    assert begin == len(data)
    assert longest == max(lengths)


def test_another_models_tokenizer_beside_a_bin_is_spared(
    small_checkpoint: Path, place: Path, tokenizer: Tokenizer
) -> None:
    (place / "tokenizer.model").write_bytes(b"of another model")
    before = snapshot(place)
    with pytest.raises(InputError, match=r"tokenizer\.model: another tokenizer is there"):
        convert(small_checkpoint, place / "a.bin", "llama2c")
    assert snapshot(place) == before
    with pytest.raises(InputError, match=r"tokenizer\.model: another tokenizer is there"):
        convert(small_checkpoint, place / "a.bin", "llama2c", force=True)  # which is for a.bin, not for its neighbours
    assert snapshot(place) == before
    (place / "tokenizer.model").rename(place / "tokenizer.json")  # which would count before the one that is written
    with pytest.raises(InputError, match=r"tokenizer\.json: another tokenizer is there"):
        convert(small_checkpoint, place / "a.bin", "llama2c")
    (place / "tokenizer.json").unlink()
    convert(small_checkpoint, place / "a.bin", "llama2c")
    assert (place / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
    convert(small_checkpoint, place / "b.bin", "llama2c", version=1)  # the same tokenizer is no other
    assert sorted(snapshot(place)) == ["a.bin", "b.bin", "tokenizer.bin", "tokenizer.model"]


def test_a_tokenizer_bin_is_made_of_the_sentencepiece_model_that_lies_beside_a_json(
    small_checkpoint: Path, place: Path
) -> None:
    pytest.importorskip("tokenizers")
    convert(small_checkpoint, place / "hf", "hf")  # which holds both
    convert(place / "hf", place / "both" / "a.bin", "llama2c")
    convert(small_checkpoint, place / "one" / "a.bin", "llama2c")
    assert (place / "both" / "tokenizer.bin").read_bytes() == (place / "one" / "tokenizer.bin").read_bytes()


@pytest.mark.parametrize("foreign", ["notes.txt", "training.pt", "sub/x"])
def test_force_gives_up_nothing_but_a_checkpoint(small_checkpoint: Path, place: Path, foreign: str) -> None:
    convert(small_checkpoint, place / "model", "native")
    (place / "model" / foreign).parent.mkdir(exist_ok=True)
    (place / "model" / foreign).write_text("of value")
    before = snapshot(place / "model")
    with pytest.raises(InputError, match=f"{foreign.split('/')[0]}: is no part of a checkpoint"):
        convert(small_checkpoint, place / "model", "hf", force=True)
    assert snapshot(place / "model") == before


def test_force_replaces_no_pipe(small_checkpoint: Path, place: Path) -> None:
    os.mkfifo(place / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        convert(small_checkpoint, place / "pipe", "llama2c", force=True)
    assert (place / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"model_type": "llama"}', "JSON"),
        (b"GGUF" + bytes(60), "GGUF"),
        (struct.pack("<Q", 20) + b'{"a":1}', "safetensors"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=f"is no llama2.c file but {kind}"):
        open_model(tmp_path / "file")


# .pt files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype)[6:])
def test_a_written_pt_file_is_one_of_pytorchs(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(15)
    tensors = {
        f"tensor.{i}": random_bits(shape, dtype, generator)
        for i, shape in enumerate([(9,), (3, 5), (1, 10), (7, 1, 2), (64, 33), (13,)])
    }
    specs = {name: files.Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return tensors[name].t().contiguous().t() if tensors[name].ndim == 2 else tensors[name]  # any strides will do

    write_pt(tmp_path / "a.pt", specs, read)
    assert asked == list(tensors)
    write_pt(tmp_path / "b.pt", specs, tensors.__getitem__)
    data = (tmp_path / "a.pt").read_bytes()
    assert data == (tmp_path / "b.pt").read_bytes()
    for mmap in (True, False):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert list(found) == list(tensors)
        assert_same_bits(found, tensors)
        assert all(tensor.is_contiguous() for tensor in found.values())
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        storages = [info for info in archive.infolist() if "/data/" in info.filename]
        assert len(storages) == len(tensors)
        for info, tensor in zip(storages, tensors.values(), strict=True):
            assert info.compress_type == zipfile.ZIP_STORED
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)  # their lengths, in the local header
            begin = info.header_offset + 30 + name + extra
            assert begin % 64 == 0
            assert data[begin : begin + info.file_size] == bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    torch.save(found, tmp_path / "c.pt")  # and they can be saved on
    assert_same_bits(torch.load(tmp_path / "c.pt", weights_only=True), tensors)


def test_the_same_model_gives_the_same_bytes(source: Path, place: Path) -> None:
    for to in ("native", "hf", "meta", "llama2c"):
        names = [place / f"{number}-{to}{'.bin' * (to == 'llama2c')}" for number in (1, 2)]
        for name in names:
            convert(source, name, to, shards=2 if to == "meta" else 1)
        if to == "llama2c":
            assert names[0].read_bytes() == names[1].read_bytes()
        else:
            assert snapshot(names[0]) == snapshot(names[1])


def test_a_safetensors_file_is_aligned_and_says_that_it_is_torchs(source: Path, place: Path) -> None:
    convert(source, place / "there", "hf")
    data = (place / "there" / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}  # without which `transformers` refuses it
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


# Memory ---------------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
from pathlib import Path
from minift.checkpoint import load_model
from minift.formats.convert import convert
from minift.lora import LoRAConfig
from minift.model import Llama

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

source, destination, to = sys.argv[1:]
load_model(source + "-small", dtype=None)  # what is loaded once, on first use
before = status("VmRSS")
if to == "load":
    model = load_model(source, dtype=None)
else:
    convert(source, destination, to, shards=2 if to == "meta" else 1)
print(status("VmHWM") - before)
"""
LARGE: dict[str, Any] = {
    **BASE,
    "hidden_size": 1_024,
    "intermediate_size": 4_096,
    "num_hidden_layers": 19,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A Hugging Face folder of 600 MB of bfloat16, mostly zeros, which take no room on the disk; and its bytes."""
    folder = tmp_path_factory.mktemp("large")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0

    def place(shape: tuple[int, ...]) -> Tensor:
        nonlocal end
        begin, end = end, end + 2 * math.prod(shape)
        return torch.tensor([begin, end])

    tensors = hf_tensors(LARGE, place)
    with torch.device("meta"):
        shape_of = hf_tensors(LARGE, lambda shape: torch.empty(shape))
    for name, offsets in tensors.items():
        entry = {"dtype": "BF16", "shape": list(shape_of[name].shape), "data_offsets": offsets.tolist()}
        header[name] = entry
    text = json.dumps(header).encode()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **LARGE}))
    pattern = random_bits((LARGE["hidden_size"],), torch.bfloat16, torch.Generator().manual_seed(16))
    with (folder / "model" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, offsets in tensors.items():
            if name.endswith("norm.weight"):
                file.seek(8 + len(text) + int(offsets[0]))
                file.write(pattern.view(torch.uint8).numpy().tobytes())
    random_hf(folder / "model-small", torch.bfloat16)
    for name in ("model", "model-small"):
        adapt(folder / name, folder / name.replace("model", "adapter"))
    yield folder / "model", end
    shutil.rmtree(folder)


def adapt(base: Path, folder: Path) -> None:
    """Write an adapter of two kinds of matrices for a model, random but small."""
    config, generator = LoRAConfig(4, 4.0, ("q_proj", "down_proj")), torch.Generator().manual_seed(17)
    folder.mkdir()
    shapes = adapter_shapes(open_model(base).config, config)
    weights = {name: torch.rand(shape, generator=generator) * 1e-2 for name, shape in shapes.items()}
    write_peft(folder, weights, config, str(base))


def peak(source: Path, destination: Path, to: str) -> int:
    """Bytes that a job needs at its fullest, beyond those of an idle process."""
    done = run_main(MEMORY, source, destination, to)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("to", ["native", "meta"])
def test_converting_holds_a_few_tensors_whatever_the_size(large: tuple[Path, int], tmp_path: Path, to: str) -> None:
    source, nbytes = large
    assert nbytes > 590e6
    try:
        assert peak(source, tmp_path / "there", to) < files.WINDOW + 90e6 < 0.65 * nbytes
        opened, start = open_model(tmp_path / "there"), open_model(source)
        for name in ("norm.weight", "layers.18.input_layernorm.weight", "layers.3.self_attn.q_proj.weight"):
            assert_same_bits({name: opened.read(name)}, {name: start.read(name)})
    finally:
        shutil.rmtree(tmp_path / "there", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_the_model_once(large: tuple[Path, int], tmp_path: Path) -> None:
    source, nbytes = large
    assert peak(source, tmp_path, "load") < 1.1 * nbytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_an_adapter_is_merged_one_matrix_at_a_time(large: tuple[Path, int], tmp_path: Path) -> None:
    """Converting holds a few matrices more than without it; loading the model once, and what is mapped of the file."""
    source, nbytes = large[0].with_name("adapter"), large[1]
    try:
        matrix = 4 * LARGE["intermediate_size"] * LARGE["hidden_size"]
        assert peak(source, tmp_path / "there", "native") < files.WINDOW + 90e6 + 2 * matrix < 0.7 * nbytes
        assert peak(source, tmp_path, "load") < 1.05 * nbytes + files.WINDOW + 2 * matrix < 1.6 * nbytes
    finally:
        shutil.rmtree(tmp_path / "there", ignore_errors=True)


def test_reading_maps_a_file_anew_after_a_window(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what was read does not stay in memory; and every tensor is the same through whichever mapping."""
    monkeypatch.setattr("minift.formats.opened.WINDOW", 5_000)
    opened = open_model(source)
    (file,) = {file for held in opened.sources.values() for file in held.files}
    maps: list[Path] = []
    again = file._open_file
    monkeypatch.setattr(file, "_open_file", lambda path: maps.append(path) or again(path))
    found = {f"model.{name}": opened.read(name).clone() for name in opened.specs}
    assert_same_bits(found, safetensors().load_file(source / "model.safetensors"))
    windows, read = 0, 0
    for spec in opened.specs.values():
        if read > 5_000:
            windows, read = windows + 1, 0
        read += spec.nbytes
    assert len(maps) == windows > 5


def test_a_file_is_released_when_another_is_read(tmp_path: Path) -> None:
    """So that a model in many files needs the memory of one; and what is in several files is not mapped as it is."""
    random_hf(tmp_path / "a", torch.float32)
    specs = open_model(tmp_path / "a").specs
    (tmp_path / "b").mkdir()
    opened = open_model(tmp_path / "a")
    huggingface.write_huggingface(tmp_path / "b", opened.config, specs, opened.read, shard_bytes=10_000)
    opened = open_model(tmp_path / "b")
    assert len(opened.files) > 2
    for name in opened.specs:
        opened.read(name)
        assert [file for file in opened.files if file.bytes_read] == list(opened.sources[name].files)
    convert(tmp_path / "a", tmp_path / "meta", "meta", shards=2)
    assert not any(source.needs_no_copy for source in open_model(tmp_path / "meta").sources.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_beyond_the_range_of_a_dtype_are_not_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """They would become infinite. bfloat16 has as many bits as float16, and more range."""
    model = small_model(dtype=dtype)
    with torch.no_grad():
        model.norm.weight[3] = 1e5
    save_model(tmp_path / "model", model)
    assert float(load_model(tmp_path / "model", dtype=torch.float32).norm.weight.max()) > 9e4
    with pytest.raises(InputError, match=r"model\.pt: tensor norm\.weight has values beyond the range of float16"):
        load_model(tmp_path / "model", dtype=torch.float16)


def test_a_config_that_was_read_is_the_one_that_is_written(source: Path, place: Path) -> None:
    """Nothing of a shape is lost between any two formats that can say it."""
    config = dataclasses.replace(open_model(source).config, max_position_embeddings=33, initializer_range=0.02)
    save_model(place / "native", Llama(config))
    for first in ("native", "hf", "meta", "llama2c"):
        convert(place / "native", place / f"{first}.1", first)
        for second in ("native", "hf", "meta", "llama2c"):
            convert(place / f"{first}.1", place / f"{first}.{second}", second)
            assert open_model(place / f"{first}.{second}").config == config
