"""Meta's folder: `params.json`, and `consolidated.00.pth`, `.01.pth`, … with one model-parallel shard each.

Three things differ from minift's own. The names, which the table below translates. The layout of queries and keys,
whose RoPE pairs are neighbours (`opened.to_half_split`). And the shards: each rank of Meta's training held a slice of
every matrix, cut along its outputs or its inputs, and a copy of every norm.

`params.json` does not say everything that a `LlamaConfig` does: no length, no BOS and EOS, no word on tied embeddings,
and of RoPE's scaling only that there is one. What is missing is taken from `minift.json` in the same folder, if minift
wrote it. Otherwise it is what most of Meta's released models have, and noted. The feed-forward width is not there
either, but follows from `multiple_of` and `ffn_dim_multiplier`.

Source: `llama/model.py` in meta-llama/llama and `models/llama3` in meta-llama/llama-models.
"""

import dataclasses
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import LlamaConfig, RopeScaling
from minift.errors import InputError
from minift.formats.files import Read, Spec, Specs, TensorFile
from minift.formats.opened import (
    Opened,
    Source,
    check_names,
    check_specs,
    open_tensors,
    rotary_heads,
    to_interleaved,
)
from minift.formats.pt_file import write_pt
from minift.formats.shapes import parameter_shapes
from minift.values import check_number, read_json

# minift's name → (Meta's name, the axis along which the ranks split it, or None where each has a copy).
_TABLE: dict[str, tuple[str, int | None]] = {
    "embed_tokens.weight": ("tok_embeddings.weight", 1),  # Llama 3 splits axis 0; the shards' shape tells
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_PARAMS: dict[str, type] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "max_seq_len": int,
    "max_batch_size": int,
}
# Llama 3.1's scaling, which Meta's code holds as constants (`apply_scaling`).
META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8_192)
LLAMA32_SCALING = RopeScaling(32.0, 1.0, 4.0, 8_192)  # of the small models, which are the tied ones
LLAMA3_VOCABULARY = 128_256
LLAMA3_IDS: dict[str, Any] = {"bos_token_id": 128_000, "eos_token_id": (128_001, 128_008, 128_009)}
SIDECAR = "minift.json"


def table(config: LlamaConfig) -> dict[str, tuple[str, int | None]]:
    """Return (Meta's name, axis) of every tensor of a model, by minift's name."""
    names = {}
    for ours in parameter_shapes(config):
        if ours.startswith("layers."):
            _, layer, rest = ours.split(".", 2)
            theirs, axis = _TABLE[rest]
            names[ours] = (f"layers.{layer}.{theirs}", axis)
        else:
            names[ours] = _TABLE[ours]
    return names


def open_meta(folder: Path) -> Opened:
    """Open a folder of Meta's.

    Raises:
        InputError: when a shard is missing or damaged, or `params.json` says what minift does not implement.
    """
    files = _shards(folder)
    first = files[0].specs
    params_file = folder / "params.json"
    embedding = first.get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{files[0].path}: tensor tok_embeddings.weight is missing, or not a matrix")
    params = _read_params(params_file)
    rows = embedding.shape[0] * (len(files) if embedding.shape[1] == params["dim"] else 1)
    config = _config(params, rows, folder, "output.weight" not in first)
    names = table(config)
    ignored = {"rope.freqs", *(["output.weight"] if config.tie_word_embeddings else [])}
    for file in files:
        check_names([name for name, _ in names.values()], dict.fromkeys(file.specs, file), file.path, ignored)
    sources: dict[str, Source] = {}
    for ours, (theirs, axis) in names.items():
        if ours == "embed_tokens.weight" and embedding.shape[1] == config.hidden_size:
            axis = 0
        sources[ours] = Source(files, theirs, axis or 0, axis is None, rotary_heads(ours, config))
    check_specs(sources, config, "params.json")
    if "lm_head.weight" in sources and _is_tied(sources, folder):
        config = dataclasses.replace(config, tie_word_embeddings=True)
        del sources["lm_head.weight"]
    if config.tie_word_embeddings and config.rope_scaling and not (folder / SIDECAR).is_file():
        config = dataclasses.replace(config, rope_scaling=LLAMA32_SCALING)
    return Opened(folder, "meta", config, sources, () if (folder / SIDECAR).is_file() else _guesses(config, params))


def _guesses(config: LlamaConfig, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on what was taken because `params.json` does not say it."""
    taken = [f"BOS {config.bos_token_id} and EOS {config.eos_token_id}"]
    if "max_seq_len" not in params:
        taken.insert(0, f"{config.max_position_embeddings:,} positions")
    if config.rope_scaling is not None:
        taken.append(f"RoPE scaled by {config.rope_scaling.factor:g}")
    return (f"params.json does not say everything; taken, as in Meta's releases: {', '.join(taken)}",)


def _shards(folder: Path) -> tuple[TensorFile, ...]:
    """Open the shards, by rank. Raises InputError when one between them is missing."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02d}.pth":
            raise InputError(f"{folder / f'consolidated.{number:02d}.pth'}: missing, but there is {path.name}")
    return tuple(open_tensors(path) for path in paths)


def _is_llama3(config: LlamaConfig) -> bool:
    """Return True for a model of Llama 3's code, which splits the embedding by rows; Llama 1 and 2 by columns."""
    return config.vocab_size == LLAMA3_VOCABULARY or config.rope_scaling is not None


def _is_tied(sources: Mapping[str, Source], folder: Path) -> bool:
    """Return True when head and embedding are equal: Meta's files always have both, of a tied model, too."""
    if (folder / SIDECAR).is_file():
        return False  # minift.json says it
    head, embedding = sources["lm_head.weight"], sources["embed_tokens.weight"]
    return head.spec == embedding.spec and torch.equal(head.read(), embedding.read())


# params.json ----------------------------------------------------------------------------------------------------------


def _read_params(file: Path) -> dict[str, Any]:
    params = read_json(file)
    for key, value in params.items():
        if key not in _PARAMS:
            raise InputError(f"{file}: unknown key {key!r}; known: {', '.join(_PARAMS)}")
        kinds = (float, int) if _PARAMS[key] is float else (_PARAMS[key],)
        if value is None and key in ("n_kv_heads", "ffn_dim_multiplier"):
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and _PARAMS[key] is not bool):
            raise InputError(f"{file}: {key} is {value!r}; it must be {_PARAMS[key].__name__}")
        if not isinstance(value, bool) and isinstance(value, int | float) and key != "vocab_size":
            check_number(f"{file}: {key}", value, above=0, below=1_000 if key == "ffn_dim_multiplier" else None)
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise InputError(f"{file}: key {key!r} is missing")
    return params


def _config(params: Mapping[str, Any], rows: int, folder: Path, tied: bool) -> LlamaConfig:
    """Return the shape, from `params.json` and, where minift wrote the folder, `minift.json`.

    Args:
        rows: of the embedding.
        tied: there is no head.
    """
    where = folder / "params.json"
    vocabulary = params.get("vocab_size", -1)
    if vocabulary == -1:  # "as many as the tokenizer has"
        vocabulary = rows
    theta = params.get("rope_theta", 10_000.0)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": feed_forward_width(
            params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
        ),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": theta,
    }
    if not (folder / SIDECAR).is_file():
        scaled = params.get("use_scaled_rope", False)
        length = 131_072 if scaled else 8_192 if vocabulary == LLAMA3_VOCABULARY else 4_096
        more = LLAMA3_IDS if vocabulary == LLAMA3_VOCABULARY else {}
        try:
            return LlamaConfig(
                **shape,
                max_position_embeddings=params.get("max_seq_len", length),
                rope_scaling=META_SCALING if scaled else None,
                tie_word_embeddings=tied,
                **more,
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    config = LlamaConfig.from_file(folder / SIDECAR)
    for key, value in shape.items():
        if getattr(config, key) != value:
            raise InputError(f"{folder / SIDECAR}: {key} is {getattr(config, key)}, but params.json makes it {value}")
    return config


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the width F of the feed-forward network, by Meta's rule: two thirds of 4 D, times a factor, rounded up."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def feed_forward_params(dim: int, width: int) -> dict[str, Any]:
    """Return a `multiple_of` and `ffn_dim_multiplier` for which Meta's rule gives `width`.

    Those of a released model are preferred.
    """
    for multiple_of, multiplier in product((256, 1_024, 4_096), (None, 1.3, 1.5)):
        if feed_forward_width(dim, multiple_of, multiplier) == width:
            break
    else:  # any number from 1 to F is rounded up to F
        plain = int(2 * (4 * dim) / 3)
        multiple_of, multiplier = width, None if plain <= width else (width + 0.5) / plain
    found: dict[str, Any] = {"multiple_of": multiple_of}
    return found if multiplier is None else {**found, "ffn_dim_multiplier": multiplier}


def _params(config: LlamaConfig) -> dict[str, Any]:
    """Return the `params.json` of a shape. Keys that Meta's older code does not know are left out where possible."""
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        **feed_forward_params(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
    }
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params


def unsaid(config: LlamaConfig) -> tuple[str, ...]:
    """Return a note on what Meta's code cannot read from the `params.json` of a shape."""
    known = LLAMA32_SCALING if config.tie_word_embeddings else META_SCALING
    if config.rope_scaling in (None, known):
        return ()
    return (f"params.json only says that RoPE is scaled; by how much ({config.rope_scaling}) is in {SIDECAR}",)


# Writing --------------------------------------------------------------------------------------------------------------


def write_meta(folder: Path, config: LlamaConfig, specs: Specs, read: Read, shards: int = 1) -> None:
    """Write a folder that Meta's code loads on `shards` ranks.

    Args:
        specs, read: of minift's tensors, by name; one is in memory at a time.

    Raises:
        InputError: for a shape that the format cannot hold, or that does not divide by `shards`.
    """
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"Meta's format cannot hold head_dim {config.head_dim}; it is always hidden_size / num_attention_heads"
        )
    check_number("shards", shards, least=1, below=100)
    for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size"):
        if getattr(config, name) % shards:
            raise InputError(f"{name} {getattr(config, name)} is not a multiple of {shards} shards")
    names = table(config)
    names["embed_tokens.weight"] = ("tok_embeddings.weight", 0 if _is_llama3(config) else 1)
    if config.tie_word_embeddings:  # Meta's code needs the head, tied or not
        names = {**names, "lm_head.weight": _TABLE["lm_head.weight"]}
        specs = {**specs, "lm_head.weight": specs["embed_tokens.weight"]}
    ours = {theirs: name for name, (theirs, _) in names.items()}

    def piece(name: str, rank: int) -> Tensor:
        """Return a rank's part of one of Meta's tensors."""
        source = "embed_tokens.weight" if name == "output.weight" and config.tie_word_embeddings else ours[name]
        tensor, (_, axis) = read(source), names[ours[name]]
        if heads := rotary_heads(source, config):
            tensor = to_interleaved(tensor, heads)
        return tensor if axis is None else tensor.chunk(shards, axis)[rank]

    for rank in range(shards):
        parts = {}
        for name, spec in specs.items():
            theirs, axis = names[name]
            shape = tuple(n // shards if i == axis else n for i, n in enumerate(spec.shape))
            parts[theirs] = Spec(spec.dtype, shape)
        write_pt(folder / f"consolidated.{rank:02d}.pth", parts, lambda name, rank=rank: piece(name, rank))  # type: ignore[misc]
    (folder / SIDECAR).write_text(config.to_json(), encoding="utf-8")
    (folder / "params.json").write_text(json.dumps(_params(config), indent=2) + "\n", encoding="utf-8")
