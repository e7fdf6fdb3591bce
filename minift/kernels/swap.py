"""Kernels go into a model from outside: modules are swapped for faster ones with the same weights and names."""

import copy
from collections.abc import Collection
from typing import TypeVar, cast

import torch
from torch import nn

from minift.kernels import layer
from minift.kernels.attention import FastScaledDotProduct
from minift.kernels.compiling import keep_less_for_the_backward_pass
from minift.kernels.cross_entropy import FusedNextTokenLoss
from minift.kernels.flex import FlexPrepare, FlexScaledDotProduct
from minift.kernels.malloc import keep_freed_memory
from minift.kernels.norm import FusedInputNorm, FusedRMSNorm, FusedRoPE
from minift.kernels.targets import TargetsLayer, TargetsObjective
from minift.loss import NextTokenLoss
from minift.model import DecoderLayer, Prepare, RMSNorm, RoPE, ScaledDotProduct
from minift.train import Objective

ALL = ("norm", "attention", "flex", "cross_entropy", "targets", "layer", "adamw", "malloc", "compiling")

_Swaps = dict[type[nn.Module], type[nn.Module]]
_SWAPS: dict[str, _Swaps] = {  # for each plain class, the faster one that takes its place
    "norm": {RMSNorm: FusedRMSNorm, RoPE: FusedRoPE},
    "attention": {ScaledDotProduct: FastScaledDotProduct},
    "flex": {ScaledDotProduct: FlexScaledDotProduct, Prepare: FlexPrepare},
    "cross_entropy": {NextTokenLoss: FusedNextTokenLoss},
    "layer": {DecoderLayer: layer.WrittenLayer, Prepare: layer.WrittenPrepare},
}
_PLAIN: _Swaps = {fast: plain for swaps in _SWAPS.values() for plain, fast in swaps.items()}
_PLAIN |= {FusedInputNorm: RMSNorm, TargetsLayer: DecoderLayer}
_Module = TypeVar("_Module", bound=nn.Module)


def install(module: _Module, names: Collection[str]) -> _Module:
    """Swap modules of a model, or of the `Objective` that holds it, for faster ones; earlier kernels are removed first.

    Weights, their names and the numbers stay the same. Where this version of PyTorch lacks what a kernel calls, or a
    module is not one that it can stand in for (a matrix with an adapter, a weight that is frozen), the plain module
    stays. "malloc" and "compiling" set something for the whole process; "adamw" is no module: see `adamw.py`.

    Args:
        names: of ALL, as `choose` gives them.

    Returns:
        The module itself; or for "targets" the objective that takes its place.

    Raises:
        ValueError: for an unknown name, or names of which one device takes only some.
    """
    _check(names)
    if "malloc" in names:
        keep_freed_memory()
    if "compiling" in names:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        keep_less_for_the_backward_pass(device)
    return _install_modules(module, names)


def with_kernels(module: _Module, names: Collection[str]) -> _Module:
    """Return a copy of a model with kernels, which shares its weights; the model itself is left as it is.

    Of the names, those of modules count: nothing is set for the process. Raises ValueError as `install`.
    """
    _check(names)
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return _install_modules(copy.deepcopy(module, shared), names)


def _check(names: Collection[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"names are a list of strings; give [{names!r}]")
    if unknown := sorted(set(names) - set(ALL)):
        raise ValueError(f"unknown kernel {unknown[0]!r}; known: {', '.join(ALL)}")
    if "flex" in names and (others := [name for name in ("attention", "layer") if name in names]):
        raise ValueError(f"'flex' attends on a GPU, and {others[0]!r} on a CPU: install one of them")


def _install_modules(module: _Module, names: Collection[str]) -> _Module:
    swap(module, _PLAIN)
    if isinstance(module, TargetsObjective):
        module = cast(_Module, as_class(module, Objective))
    for name, swaps in _SWAPS.items():
        if name in names and _fits(name, module):
            swap(module, swaps)
    if "norm" in names:  # after the norms are fused; inside layers their results feed matrix products alone
        for parent in module.modules():
            if isinstance(parent, DecoderLayer):
                swap(parent, {FusedRMSNorm: FusedInputNorm}, deeply=False)
    if "targets" in names and isinstance(module, Objective):
        swap(module.model.layers, {DecoderLayer: TargetsLayer}, deeply=False)  # all, so that they compile as one
        return cast(_Module, as_class(module, TargetsObjective))
    return module


def as_class(plain: nn.Module, kind: type[_Module]) -> _Module:
    """Return a module of another class with the same parameters, submodules and attributes; no `__init__` is called."""
    module = kind.__new__(kind)
    module.__dict__.update(plain.__dict__)
    return module


def swap(module: nn.Module, swaps: _Swaps, deeply: bool = True) -> None:
    """Replace each child, or with `deeply` each module below, whose class is a key of `swaps`; weights stay."""
    for parent in list(module.modules()) if deeply else [module]:
        for name, child in list(parent.named_children()):
            if type(child) in swaps:
                setattr(parent, name, as_class(child, swaps[type(child)]))


def _fits(name: str, module: nn.Module) -> bool:
    if name == "layer":
        linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
        plain = all(type(part) is nn.Linear for part in linears)
        trained = all(weight.requires_grad and weight.dtype == torch.float32 for weight in module.parameters())
        return plain and trained and layer.is_available()
    if name == "flex":  # it has no kernels for float64
        return all(weight.dtype != torch.float64 for weight in module.parameters())
    return True
