"""An adapter's folder, as the package `peft` writes it; a model that is an adapter and its base; a run's adapters.

`adapter_config.json` names the base and says what is adapted, `adapter_model.safetensors` (or `.bin`) holds A and B of
each matrix. `open_adapter` makes one model of the two: every adapted matrix is W + (alpha / r) B A by the time it is
read, one at a time, so commands and formats need to know nothing about adapters. The mathematics is in `lora.py`.

    minift convert runs/finetune/adapter merged --to hf
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import LORA_TARGETS, LlamaConfig
from minift.distributed.sharding import copy_into
from minift.errors import InputError
from minift.formats.files import Spec, TensorFile
from minift.formats.opened import Opened, Source, check_finite, check_floating, check_wrappers, open_tensors
from minift.formats.pt_file import write_pt
from minift.formats.safetensors_file import write_safetensors
from minift.formats.shapes import parameter_shapes
from minift.lora import LoRAConfig, merged_matrix
from minift.model import Llama
from minift.storage.names import ADAPTER_FILE, is_hub_name
from minift.values import read_json

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX, _SUFFIX = "base_model.model.model.", ".weight"  # of `peft`'s names for tensors
# The keys for what else an adapter can do, and the values that ask for nothing more.
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
# The same, of keys that older versions of `peft` do not know: they are checked, but not written.
_PLAIN_IF_THERE: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# The ways to begin that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, …) take their first
# B A out of the base, so their adapter belongs to a base that is in no file.
_INITS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal", "eva", "mica")
_READ = {
    "base_model_name_or_path",
    "exclude_modules",
    "init_lora_weights",
    "lora_alpha",
    "r",
    "revision",
    "target_modules",
}
_NO_DIFFERENCE = {  # once an adapter is trained
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
    "velora_config",
}
ADAPTER_KEYS = frozenset({*_PLAIN, *_PLAIN_IF_THERE, *_READ, *_NO_DIFFERENCE})  # all that are known


# A `peft` folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdaptedSource(Source):
    """A matrix of the base, with the adapter that is added to it.

    Attributes:
        base: of W [M, N], in the base's files; an adapted one, where the base is an adapter, too.
        a, b: of A [r, N] and B [M, r], in the adapter's file.
        scale: alpha / r.
    """

    base: Source
    a: Source
    b: Source
    scale: float

    @property
    def spec(self) -> Spec:
        """Dtype and shape of W."""
        return self.base.spec

    @property
    def needs_no_copy(self) -> bool:
        """False: it has to be computed."""
        return False

    def read(self) -> Tensor:
        """Return W + (alpha / r) B A, not yet cast to W's dtype: float32, or float64 for such a W."""
        weight, a, b = self.base.read(), self.a.read(), self.b.read()
        self.a.check_finite(a)
        self.b.check_finite(b)
        return merged_matrix(weight, a, b, self.scale)


def open_adapter(folder: Path, base: Opened) -> Opened:
    """Open the model that a `peft` adapter makes of its base.

    Raises:
        InputError: for an adapter that is damaged, for another model, or of a kind that minift does not implement.
    """
    config, notes, excludes = _read_config(folder / ADAPTER_FILE)
    file = _open_weights(folder)
    found = {_our_name(name, file): spec for name, spec in file.specs.items()}
    shapes = adapter_shapes(base.config, config)
    if excludes:  # the tensors that are there tell which
        matrices = {name.rpartition(".")[0] for name in found}
        shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in matrices}
    _check_config(found, config, str(file.path))
    _check_adapters(shapes, found, str(file.path))
    sources = dict(base.sources)
    for name in {adapter.rpartition(".")[0] for adapter in shapes}:
        matrix = base.sources[f"{name}.weight"]
        sources[f"{name}.weight"] = AdaptedSource(
            files=(*matrix.files, file),
            name=matrix.name,
            base=matrix,
            a=Source((file,), f"{_PREFIX}{name}.lora_A{_SUFFIX}"),
            b=Source((file,), f"{_PREFIX}{name}.lora_B{_SUFFIX}"),
            scale=config.alpha / config.rank,
        )
    merged = f"an adapter of rank {config.rank} for {', '.join(config.targets)}, merged into {base.path}"
    return replace(base, path=folder, format="peft", sources=sources, notes=(merged, *notes, *base.notes))


def adapter_shapes(shape: LlamaConfig, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every A and B of a model's adapters, by minift's name: `layers.0.mlp.up_proj.lora_A`, …."""
    shapes = {}
    for name, (rows, *columns) in parameter_shapes(shape).items():
        matrix = name.removesuffix(".weight")
        if matrix.rpartition(".")[2] in config.targets:
            shapes[f"{matrix}.lora_A"] = (config.rank, *columns)
            shapes[f"{matrix}.lora_B"] = (rows, config.rank)
    return shapes


def _our_name(name: str, file: TensorFile) -> str:
    check_wrappers(name.removeprefix("base_model.model."), file.path)
    if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
        raise InputError(f"{file.path}: tensor {name} is no adapter; theirs are {_PREFIX}…{_SUFFIX}")
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def _open_weights(folder: Path) -> TensorFile:
    there = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder}: an adapter without its weights ({' or '.join(WEIGHT_FILES)})")
    return open_tensors(there[0])


def _read_config(file: Path) -> tuple[LoRAConfig, tuple[str, ...], bool]:
    """Return what an `adapter_config.json` says, notes on the keys that are not used, and whether it excludes some."""
    values = read_json(file)
    for key, plain in {**_PLAIN, **_PLAIN_IF_THERE}.items():
        if key in values and values[key] not in plain:
            raise InputError(f"{file}: {key} is {values[key]!r}; minift implements {plain[0]!r}")
    _check_init(values, str(file))
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}; they must be numbers")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{file}: target_modules is {targets!r}; it must be a list of names")
    try:
        config = LoRAConfig(rank, alpha, tuple(target for target in LORA_TARGETS if target in targets))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if unknown := sorted(set(targets) - set(LORA_TARGETS)):
        raise InputError(f"{file}: target_modules has {unknown[0]!r}; known: {', '.join(LORA_TARGETS)}")
    unused = sorted(key for key in set(values) - ADAPTER_KEYS if values[key] not in (None, False, [], {}))
    notes = [f"{file.name} has keys that minift does not use: {', '.join(unused)}"] if unused else []
    if values.get("revision") is not None and not is_hub_name(str(values.get("base_model_name_or_path"))):
        notes.append(f"{file.name} asks for the base's revision {values['revision']!r}; a folder's is not checked")
    return config, tuple(notes), bool(values.get("exclude_modules"))


def _check_init(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an adapter whose training began with another base than the one that is named."""
    init = values.get("init_lora_weights", True)
    if init not in _INITS:
        raise InputError(
            f"{where}: init_lora_weights is {init!r}, which changes the base's weights, too; minift reads adapters "
            "of an unchanged base. peft saves it so with save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )


def _check_config(found: Mapping[str, Spec], config: LoRAConfig, where: str) -> None:
    """Raise InputError where an adapter's tensors are not those of its own config, whatever the model."""
    modules = {name.split(".")[-2] for name in found if name.count(".") > 1}
    if more := sorted((modules & set(LORA_TARGETS)) - set(config.targets)):
        raise InputError(f"{where}: has adapters of {more[0]}, but target_modules in {ADAPTER_FILE} does not name it")
    if missing := sorted(set(config.targets) - modules):
        raise InputError(f"{where}: has no adapter of {missing[0]}, but target_modules in {ADAPTER_FILE} names it")
    for name, spec in found.items():
        axis = 0 if name.endswith(".lora_A") else 1
        if len(spec.shape) == 2 and spec.shape[axis] != config.rank:
            raise InputError(
                f"{where}: adapter {name} is {list(spec.shape)}, of rank {spec.shape[axis]}, but r in {ADAPTER_FILE} "
                f"is {config.rank}"
            )


def _check_adapters(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Spec], where: str) -> None:
    """Raise InputError unless the adapters in a file, by minift's names, are those of a model."""
    for name in sorted(set(expected) ^ set(found)):
        has = "has no" if name in expected else "has an"
        raise InputError(f"{where}: {has} adapter {name}; it is for another model")
    for name, shape in expected.items():
        check_floating(found[name], f"{where}: adapter {name}")
        if found[name].shape != shape:
            shapes = f"{list(found[name].shape)}, and this model's is {list(shape)}"
            raise InputError(f"{where}: adapter {name} is {shapes}; it is for another model")


def write_peft(folder: Path, adapter: dict[str, Tensor], config: LoRAConfig, base: str) -> None:
    """Write an adapter as `peft` does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        adapter: the `adapter_weights`.
        base: the folder or name of the model that it is for.
    """
    weights = {f"{_PREFIX}{name}{_SUFFIX}": tensor for name, tensor in adapter.items()}
    write_safetensors(folder / WEIGHT_FILES[0], _specs(weights), lambda name: weights[name].detach().cpu())
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


def _specs(weights: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


# A run's adapters -----------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `adapter.pt` into a folder: the `adapter_weights` under minift's names, from which a run is resumed."""
    write_pt(folder / "adapter.pt", _specs(weights), lambda name: weights[name].detach().cpu())


@torch.no_grad()
def read_adapter(folder: Path, model: Llama) -> None:
    """Copy a folder's `adapter.pt` into the adapters of a model.

    Raises:
        InputError: when the file is damaged, or its adapters are those of other matrices or shapes: of another model.
    """
    file = open_tensors(folder / "adapter.pt")
    own = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    _check_adapters({name: tuple(tensor.shape) for name, tensor in own.items()}, file.specs, str(file.path))
    for name, tensor in own.items():
        weight = file.read(name)
        check_finite(weight, file.path, name)
        copy_into(tensor, weight)
