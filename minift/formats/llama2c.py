"""llama2.c's files: one `.bin` with a header of a few integers and all weights in float32, in a fixed order.

The legacy header is seven int32; a negative vocabulary says that the head is a matrix of its own. Version 1 begins with
the magic number "ak42" and is padded to 256 bytes; it has the same weights in another order. (Version 2 is quantised,
and refused.) RoPE is Meta's interleaved layout in both. The legacy file also holds RoPE's table of cosines and sines,
which no program reads any more; it is written all the same, so that a converted file comes back byte for byte.

The format has one RMSNorm epsilon, 1e-5, and one RoPE base, 10,000: both are constants of its programs.

Source: `export.py` and `run.c` in karpathy/llama2.c.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.files import Read, TensorFile, tensor_bytes
from minift.formats.opened import Opened, Source, check_specs, rotary_heads, to_interleaved
from minift.formats.shapes import parameter_shapes
from minift.model import rope_frequencies

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = {0: 28, 1: 256}  # by version; 0 is the legacy one
EPSILON, THETA = 1e-5, 10_000.0

_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")  # w1, w2, w3
# The order of the weights, by minift's names. A name that is not in `_OUTSIDE` stands for that tensor of every layer.
_ORDER: dict[int, tuple[str, ...]] = {
    0: ("embed_tokens", _NORMS[0], *_ATTENTION, _NORMS[1], *_FEED_FORWARD, "norm", "rope", "lm_head"),
    1: (*_NORMS, "norm", "embed_tokens", *_ATTENTION, *_FEED_FORWARD, "lm_head"),
}
_OUTSIDE = ("embed_tokens", "norm", "lm_head", "rope")


def order(config: LlamaConfig, version: int) -> Iterator[tuple[str, int]]:
    """Yield minift's names in the file's order, each with its number of floats. "rope" stands for the legacy table."""
    shapes = parameter_shapes(config)
    for part in _ORDER[version]:
        if part == "rope":
            yield part, config.max_position_embeddings * config.head_dim
        elif part != "lm_head" or not config.tie_word_embeddings:
            layers = [""] if part in _OUTSIDE else [f"layers.{i}." for i in range(config.num_hidden_layers)]
            for layer in layers:
                name = f"{layer}{part}.weight"
                yield name, math.prod(shapes[name])


def open_llama2c(file: Path) -> Opened:
    """Open a `.bin` of llama2.c. Raises InputError for another kind of file, a quantised version, or a wrong size."""
    version, config = _read_header(file)
    floats = sum(count for _, count in order(config, version))
    expected, size = HEADER_BYTES[version] + 4 * floats, file.stat().st_size
    if size != expected:
        raise InputError(f"{file}: has {size:,} bytes; its header makes it {expected:,}{_end(config, version, size)}")
    tensors = TensorFile(file, lambda path: _map(path, config, version))
    sources = {}
    for name in parameter_shapes(config):
        sources[name] = Source((tensors,), name, heads=rotary_heads(name, config))
    check_specs(sources, config, "the header")
    return Opened(file, "llama2c", config, sources)


def _end(config: LlamaConfig, version: int, size: int) -> str:
    """Return the words that name the tensor in which a file that is too short ends; "" for one that is too long."""
    end = HEADER_BYTES[version]
    for name, count in order(config, version):
        end += 4 * count
        if end > size:
            return f"; it ends inside tensor {name}"
    return ""


def _map(file: Path, config: LlamaConfig, version: int) -> Mapping[str, Tensor]:
    """Map a file, and return its tensors by minift's names, queries and keys still in the interleaved layout."""
    header = HEADER_BYTES[version] // 4
    total = file.stat().st_size // 4
    try:
        everything = torch.from_file(str(file), shared=False, size=total, dtype=torch.float32)
    except RuntimeError as error:
        raise InputError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
    shapes, tensors, begin = parameter_shapes(config), {}, header
    for name, count in order(config, version):
        if name != "rope":
            tensors[name] = everything[begin : begin + count].view(shapes[name])
        begin += count
    return tensors


def _read_header(file: Path) -> tuple[int, LlamaConfig]:
    """Return the version and the shape that a file's header says. Raises InputError for another kind of file."""
    try:
        with file.open("rb") as opened:
            head = opened.read(HEADER_BYTES[1])
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if head[:4] == b"PK\x03\x04":
        raise InputError(f"{file}: is a file of PyTorch; name the folder that it is in, with its config.json")
    if head[:1] in (b"{", b"[") or head[:4] == b"GGUF" or head[8:9] == b"{":
        kind = {b"G": "GGUF, which minift does not read", b"{": "JSON", b"[": "JSON"}.get(head[:1], "safetensors")
        raise InputError(f"{file}: is no llama2.c file but {kind}; name the model's folder")
    if len(head) < HEADER_BYTES[0]:
        raise InputError(f"{file}: not a llama2.c file: it ends inside its header")
    magic, version = struct.unpack_from("<Ii", head)
    if magic == MAGIC:
        if version != 1:
            kind = "is quantised" if version == 2 else "is not known"
            raise InputError(f"{file}: version {version} of llama2.c's format {kind}; minift reads 0 (legacy) and 1")
        if len(head) < HEADER_BYTES[1]:
            raise InputError(f"{file}: not a llama2.c file: it ends inside its header")
        sizes, tied, offset = struct.unpack_from("<7i", head, 8), head[36], 37
        if tied not in (0, 1) or any(head[offset:]):
            raise InputError(f"{file}: not a llama2.c file: its header is not padded with zeros")
        return 1, _config(file, sizes, bool(tied))
    sizes = struct.unpack_from("<7i", head)
    return 0, _config(file, (*sizes[:5], abs(sizes[5]), sizes[6]), sizes[5] > 0)


def _config(file: Path, sizes: tuple[int, ...], tied: bool) -> LlamaConfig:
    dim, hidden, layers, heads, kv_heads, vocabulary, length = sizes
    try:
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=EPSILON,
            rope_theta=THETA,
            tie_word_embeddings=tied,
        )
    except InputError as error:
        raise InputError(f"{file}: not a llama2.c file, or a damaged one: {error}") from None


# Writing --------------------------------------------------------------------------------------------------------------


def check_llama2c(config: LlamaConfig) -> None:
    """Raise InputError for a shape that the format cannot hold."""
    fixed: dict[str, Any] = {
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "rope_scaling": None,
        "head_dim": config.hidden_size / config.num_attention_heads,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise InputError(f"llama2.c's format cannot hold {key} {getattr(config, key)}; it is always {value}")


def write_llama2c(file: Path, config: LlamaConfig, read: Read, version: int = 0) -> None:
    """Write a `.bin`: the legacy one, which `run.c` reads, or version 1.

    Args:
        read: returns minift's tensor of a name, in float32; one is in memory at a time.

    Raises:
        InputError: for a shape that the format cannot hold.
    """
    check_llama2c(config)
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
    )
    tied = config.tie_word_embeddings
    with file.open("xb") as output:
        if version == 1:
            header = struct.pack("<Ii7iB", MAGIC, 1, *sizes, tied)
        else:
            header = struct.pack("<7i", *sizes[:5], config.vocab_size if tied else -config.vocab_size, sizes[6])
        output.write(header.ljust(HEADER_BYTES[version], b"\0"))
        for name, _ in order(config, version):
            tensor = _rope_table(config) if name == "rope" else read(name)
            if heads := rotary_heads(name, config):
                tensor = to_interleaved(tensor, heads)
            output.write(tensor_bytes(tensor))


def _rope_table(config: LlamaConfig) -> Tensor:
    """Return the cosines of all positions, then the sines: float32 [2, positions, C/2]."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))
