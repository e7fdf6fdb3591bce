"""Adapters on disk, as peft has them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import LORA_TARGETS
from minift.distributed.sharding import put
from minift.errors import InputError
from minift.formats.files import Spec
from minift.formats.opened import check_finite, open_tensors
from minift.formats.pt_file import write_pt
from minift.formats.safetensors_file import write_safetensors
from minift.lora import LoRAConfig, add_lora
from minift.model import Llama
from minift.storage.links import check_links
from minift.storage.names import ADAPTER_FILE
from minift.values import read_json

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Of what else a `peft` adapter can do: its keys, and the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
}


@torch.no_grad()
def set_adapter(model: Llama, weights: dict[str, Tensor], where: str) -> None:
    """Put weights into a model's adapters.

    Raises:
        InputError: when they are of other matrices, or of other shapes: of another model.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    for name in sorted(set(own) ^ set(weights)):
        raise InputError(f"{where}: {'has no' if name in own else 'has an'} adapter {name}; it is for another model")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            shapes = f"{list(weights[name].shape)}, and this model's is {list(tensor.shape)}"
            raise InputError(f"{where}: adapter {name} is {shapes}; it is for another model")
        check_finite(weights[name], Path(where), name)
        put(tensor, weights[name])


def write_adapter(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `adapter.pt` into a folder: the `adapter_weights` under minift's names, for a run to go on with."""
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    write_pt(folder / "adapter.pt", specs, lambda name: weights[name].detach().cpu())


def read_adapter(folder: Path, model: Llama) -> None:
    """Put a folder's `adapter.pt` into a model. Raises InputError as `set_adapter`, or for a damaged file."""
    file = open_tensors(folder / "adapter.pt")
    set_adapter(model, {name: file.read(name) for name in file.specs}, str(file.path))


def write_peft(folder: Path, adapter: dict[str, Tensor], config: LoRAConfig, base: str) -> None:
    """Write an adapter as `peft` does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        adapter: the `adapter_weights`.
        base: the folder or name of the model that it is for.
    """
    weights = {f"base_model.model.model.{name}.weight": tensor for name, tensor in adapter.items()}
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    write_safetensors(folder / WEIGHT_FILES[0], specs, lambda name: weights[name].detach().cpu())
    values = {
        **{key: plain[0] for key, plain in _PLAIN.items()},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "inference_mode": True,
    }
    (folder / ADAPTER_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def put_peft(folder: Path, model: Llama) -> None:
    """Put a `peft` adapter beside a model's weights.

    Raises:
        InputError: for one that is damaged, for another model, or of a kind that minift does not implement.
    """
    check_links(folder)
    where = folder / ADAPTER_FILE
    values = read_json(where)
    for key, plain in _PLAIN.items():
        if key in values and values[key] not in plain:
            raise InputError(f"{where}: {key} is {values[key]!r}; minift implements {plain[0]!r}")
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}; they must be numbers")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where}: target_modules is {targets!r}; it must be a list of names")
    try:
        config = LoRAConfig(rank, alpha, tuple(target for target in LORA_TARGETS if target in targets))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if unknown := sorted(set(targets) - set(LORA_TARGETS)):
        raise InputError(f"{where}: target_modules has {unknown[0]!r}; known: {', '.join(LORA_TARGETS)}")
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: an adapter without its weights ({' or '.join(WEIGHT_FILES)})")
    file = open_tensors(found[0])
    prefix, suffix = "base_model.model.model.", ".weight"
    weights = {name.removeprefix(prefix).removesuffix(suffix): file.read(name) for name in file.specs}
    add_lora(model, config, torch.Generator().manual_seed(0))
    set_adapter(model, weights, str(file.path))
