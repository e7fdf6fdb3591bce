"""Hugging Face's folder: `config.json` and the weights, in one file or in shards with an index.

The names are minift's own with `model.` in front (but for `lm_head`), and the layout is the same, so the weights can
be mapped from the file. The work is in the config. Its keys fall into four groups: those that are a field of
`LlamaConfig`, those that must have a certain value because the model implements nothing else, those known to make no
difference here, and the rest. `transformers` ignores the rest, so they are ignored here too, but noted; one that
differs from a known key by a letter or two is refused, because it is a misspelling.

`transformers` 4 writes `rope_theta` and `rope_scaling`, 5 writes both as `rope_parameters`; both are read. What is
written has version 4's keys, which version 5 reads.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.carried import Carried
from minift.formats.files import Read, Specs, TensorFile, dtype_name
from minift.formats.generation import GENERATION_FILE, read_generation
from minift.formats.opened import HEAD, Opened, computed_names, named_sources, open_tensors
from minift.formats.safetensors_file import write_safetensors
from minift.formats.shapes import parameter_shapes
from minift.tokenizer.special import added_tokens
from minift.values import read_json

SHARD_BYTES = 5 * 10**9  # of weights in one file, as `transformers` 4 has it

# In the order in which `transformers` prefers them: the file of all weights, or the index of the shards.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys that older files leave out, with the values that `transformers` then takes.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# Keys with the values that the model implements; another value means another model.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
}
_READ = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "sliding_window",
    "head_dim",
    "num_key_value_heads",
)
_NO_DIFFERENCE = {
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",  # slices the same matrix products
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
_MEANINGFUL = frozenset({*_SIZES, *_DEFAULTS, *_IMPLEMENTED, *_READ})
CONFIG_KEYS = _MEANINGFUL | _NO_DIFFERENCE  # all of a `config.json` that are known


def table(config: LlamaConfig) -> dict[str, str]:
    """Return Hugging Face's name of every tensor of a model, by minift's."""
    return {name: name if name == HEAD else f"model.{name}" for name in parameter_shapes(config)}


def has_weights(folder: Path) -> bool:
    """Return True for a folder with weights in a file that Hugging Face's tools look for."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def open_huggingface(folder: Path) -> Opened:
    """Open a Hugging Face folder.

    Raises:
        InputError: for a model that minift does not implement, with the key; for a damaged or incomplete file, with
            the tensor; without the `hf` extra, for safetensors.
    """
    generation = read_generation(folder / GENERATION_FILE)
    tokens = {**({"eos": generation.ends[0]} if generation.ends else {}), **_named_tokens(folder)}
    config, notes = read_config(folder / "config.json", tokens)
    config, notes = generation.with_ends(config, tokens.get("eos")), notes + generation.notes
    holders = _holders(folder, computed_names(config))
    paths = {file.path for file in holders.values()}
    where = folder if len(paths) != 1 else paths.pop()
    return Opened(folder, "hf", config, named_sources(holders, config, where), notes)


def _holders(folder: Path, computed: Collection[str]) -> dict[str, TensorFile]:
    """Return, for the name of every tensor, the file that holds it.

    Args:
        computed: names that are not needed: an index may have forgotten them, or name them though they are gone.
    """
    found = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    if found.suffix != ".json":
        file = open_tensors(found)
        if not file.specs:
            raise InputError(f"{found}: holds no tensors")
        return dict.fromkeys(file.specs, file)
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{found}: has no weight_map")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    files: dict[str, TensorFile] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise InputError(f"{found}: tensor {tensor} is said to be in {shard!r}, which is not a file of this folder")
        if shard not in files:
            if shard not in present:
                where = str(folder / shard) if shard.isprintable() else f"{folder}: {shard!r}"
                raise InputError(f"{where}: missing; the index says that it holds tensor {tensor}")
            files[shard] = open_tensors(folder / shard)
        if tensor not in files[shard].specs and tensor not in computed:
            raise InputError(f"{folder / shard}: tensor {tensor} is missing; the index says that it is there")
    for shard, file in files.items():
        for tensor in file.specs:
            if weight_map.get(tensor, shard if tensor in computed else None) != shard:
                raise InputError(f"{file.path}: tensor {tensor} is not where the index says")
    return {tensor: file for file in files.values() for tensor in file.specs}


# The config -----------------------------------------------------------------------------------------------------------


def read_config(file: Path, tokens: Mapping[str, int] | None = None) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Return the shape in a Hugging Face `config.json`, and notes on the keys that are not used.

    Args:
        tokens: the ids of "bos" and "eos" that the tokenizer's files name: what a null in the config leaves open.

    Raises:
        InputError: for a model that minift does not implement, or a misspelled key.
    """
    values, where = read_json(file), str(file)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise InputError(f"{where}: model_type is {kind!r}; minift implements llama (and mistral without its window)")
    named = values.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        if name not in _MODEL_TYPES.values():
            raise InputError(f"{where}: architectures names {name!r}; minift implements {_MODEL_TYPES[kind]}")
    for key, allowed in _IMPLEMENTED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise InputError(f"{where}: {key} is {values[key]!r}; minift implements {allowed[0]!r} only")
    for key in _SIZES:
        if key not in values:
            raise InputError(f"{where}: key {key!r} is missing")
    shape = {key: values[key] for key in _SIZES}
    defaults = {**_DEFAULTS, "max_position_embeddings": 131_072} if kind == "mistral" else _DEFAULTS
    shape |= {key: values.get(key, default) for key, default in defaults.items()}
    for end in ("bos", "eos"):
        if shape[f"{end}_token_id"] is None:
            shape[f"{end}_token_id"] = (tokens or {}).get(end, _DEFAULTS[f"{end}_token_id"])
    if kind == "mistral" and "num_key_value_heads" not in values:
        raise InputError(f"{where}: key 'num_key_value_heads' is missing")
    heads = values.get("num_key_value_heads")
    shape["num_key_value_heads"] = values["num_attention_heads"] if heads is None else heads
    head_dim = values.get("head_dim")
    shape["head_dim"] = 0 if head_dim is None else head_dim
    shape["rope_theta"], shape["rope_scaling"] = _rope(values, where)
    _check_window(values, shape, kind, where)
    config = LlamaConfig.from_dict(shape, where)
    return config, _unused_keys(values, where)


def _named_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of "bos" and "eos", where the tokenizer's files name an added token as one of them."""
    file, found = folder / "tokenizer_config.json", dict[str, int]()
    try:
        added = {token["content"]: id for id, token in added_tokens(folder).items()}
        values = read_json(file) if added and file.is_file() else {}
    except InputError:  # said when the tokenizer is opened
        return found
    for kind in ("bos", "eos"):
        token = values.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in added:
            found[kind] = added[token]
    return found


def _rope(values: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Return (rope_theta, rope_scaling) from the keys of either version."""
    theta, scaling = values.get("rope_theta"), values.get("rope_scaling")
    if (parameters := values.get("rope_parameters")) is not None:  # version 5
        if not isinstance(parameters, dict):
            raise InputError(f"{where}: rope_parameters is {parameters!r}; it must be an object")
        if scaling is not None:
            raise InputError(f"{where}: has both rope_parameters and rope_scaling")
        if theta is not None and parameters.get("rope_theta", theta) != theta:
            raise InputError(f"{where}: rope_theta is {theta!r}, but rope_parameters says otherwise")
        scaling = dict(parameters)
        theta = scaling.pop("rope_theta", theta)
    if scaling is not None and not isinstance(scaling, dict):
        raise InputError(f"{where}: rope_scaling is {scaling!r}; it must be an object or null")
    if scaling is not None:
        scaling = dict(scaling)
        original = values.get("original_max_position_embeddings")  # `transformers` prefers it to the one inside
        if original is not None and scaling.get("original_max_position_embeddings", original) != original:
            raise InputError(
                f"{where}: original_max_position_embeddings is {original!r}, but the scaling says otherwise"
            )
        if scaling.get("partial_rotary_factor") == 1:
            del scaling["partial_rotary_factor"]
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            unknown = sorted(set(scaling) - {"rope_type", "type"})
            if unknown:
                raise InputError(f"{where}: {unknown[0]} is set, but the rope_type is 'default'")
            scaling = None
    return 10_000.0 if theta is None else theta, scaling


def _check_window(values: Mapping[str, Any], shape: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise InputError for a sliding window shorter than the positions: here attention is to every earlier token."""
    window = values.get("sliding_window", 4_096 if kind == "mistral" else None)  # MistralConfig's default
    positions = shape["max_position_embeddings"]
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise InputError(f"{where}: sliding_window is {window!r}; it must be a number of tokens or null")
    if isinstance(window, int) and isinstance(positions, int) and window < positions:
        raise InputError(
            f"{where}: sliding_window {window} binds below max_position_embeddings {positions}; minift attends to "
            f"every token. Up to {window} the two are the same: for those, set max_position_embeddings to {window}"
        )


def _unused_keys(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    unused = sorted(set(values) - CONFIG_KEYS)
    for key in unused:
        if close := difflib.get_close_matches(key, _MEANINGFUL - set(values), n=1, cutoff=0.85):
            raise InputError(f"{where}: unknown key {key!r}; did you mean {close[0]!r}?")
    return (f"config.json has keys that Llama does not use: {', '.join(unused)}",) if unused else ()


def config_json(config: LlamaConfig, dtype: torch.dtype) -> str:
    """Return the text of a `config.json` for `transformers` 4 and 5."""
    values = {
        **config.to_dict(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pad_token_id": None,
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
    }
    return json.dumps(dict(sorted(values.items())), indent=2) + "\n"


# Writing --------------------------------------------------------------------------------------------------------------


def check_shape(config: LlamaConfig) -> None:
    """Raise InputError for a shape that `transformers` refuses."""
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"`transformers` refuses hidden_size {config.hidden_size} with {config.num_attention_heads} heads, "
            "whatever their width: it must be a multiple"
        )


def write_huggingface(
    folder: Path,
    config: LlamaConfig,
    specs: Specs,
    read: Read,
    shard_bytes: int = SHARD_BYTES,
    carried: Carried | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        specs, read: of minift's tensors, by name; one is in memory at a time.
        shard_bytes: a new file is begun when one more tensor would make the last one larger than this.
        carried: what else the folder gets, where the model is made of a Hugging Face folder.

    Raises:
        InputError: for a shape that `transformers` refuses, unless the model had it in such a folder already.
    """
    if carried is None:
        check_shape(config)
    names = table(config)
    ours = {theirs: name for name, theirs in names.items()}
    shards: list[dict[str, Any]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(entry.nbytes for entry in shards[-1].values()) + spec.nbytes > shard_bytes:
            shards.append({})
        shards[-1][names[name]] = spec
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / file, shard, lambda name: read(ours[name]))
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    if carried is not None:
        carried.write(folder, specs)
        return
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (folder / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    dtype = next(iter(specs.values())).dtype
    (folder / "config.json").write_text(config_json(config, dtype), encoding="utf-8")
