"""Define what a function of your own gets and returns for each operation, and the plain formula that it must equal.

`python -m benchmarks ops --contract norm > my_norm.py` writes a file to start from: the contract as comments, and the
formula as a function that already keeps it. `variant.py` holds such functions against the formulas.

Legend: B batch, T tokens of a row, D model width, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.operation import Operation, Step, whole_model
from minift.config import PRETRAIN
from minift.errors import InputError, did_you_mean
from minift.pack import IGNORE

Arguments: TypeAlias = dict[str, Any]  # by name: a tensor, a list of tensors, or a number

HEADER = """import math

import torch
import torch.nn.functional as F
from torch import Tensor
"""
MAX_NORM = 1.0
WITHOUT = {"layer": "a layer is made of norm, qkv, rope, attention, output and swiglu: add a function for one of them"}


@dataclass(frozen=True)
class Contract:
    """What a function of one operation gets, in the order of its arguments, and what it returns.

    Attributes:
        inputs: by name, an argument's shape and dtype.
        returns: the shape and dtype of what it returns.
        plain: the formula, a function of the same arguments.
        arguments: makes the arguments from a step and the operation's leaves, which are among them.
        writes: the names of the arguments that it changes in place; a function that has some returns nothing.
        exact: whether it computes in float32 whatever the dtype of the matrix products is.
    """

    inputs: dict[str, str]
    returns: str
    plain: Callable[..., Any]
    arguments: Callable[[Step, tuple[Tensor, ...]], tuple[Any, ...]]
    writes: tuple[str, ...] = ()
    exact: bool = False

    def make(self, step: Step, operation: Operation) -> Arguments:
        """Return the arguments for the function, with the operation's leaves among them."""
        return dict(zip(self.inputs, self.arguments(step, operation.leaves), strict=True))


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up the rows of a table."""
    return weight[tokens]


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate channel i with channel i + C/2: x · cos + (−second half, first half) · sin, computed in float32."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return rotate(query), rotate(key)


def qkv(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project by three weights."""
    return x @ query.T, x @ key.T, x @ value.T


def output(x: Tensor, weight: Tensor) -> Tensor:
    """Project by a weight."""
    return x @ weight.T


def adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update weights and both moments in place; the first step is 1, and all weights decay."""
    for weight, gradient, moment, square in zip(weights, gradients, moments, squares, strict=True):
        moment.mul_(beta1).add_((1 - beta1) * gradient)
        square.mul_(beta2).add_((1 - beta2) * gradient**2)
        mean, root = moment / (1 - beta1**step), torch.sqrt(square / (1 - beta2**step))
        weight.mul_(1 - lr * weight_decay).sub_(lr * mean / (root + eps))


def _gradients(step: Step) -> list[Tensor]:
    parameters = whole_model(step).parameters()
    return [torch.empty_like(one, requires_grad=False).normal_(generator=step.generator) for one in parameters]


def _adamw(step: Step, leaves: tuple[Tensor, ...]) -> tuple[Any, ...]:
    weights = [parameter.detach() for parameter in whole_model(step).parameters()]
    gradients = [1e-3 * gradient for gradient in _gradients(step)]
    zeros = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    settings = PRETRAIN.lr, PRETRAIN.beta1, PRETRAIN.beta2, 1e-8, PRETRAIN.weight_decay
    return weights, gradients, *zeros, 1, *settings


CONTRACTS: dict[str, Contract] = {
    "embedding": Contract(
        {"tokens": "[B, T] int64", "weight": "[V, D] float32, gets a gradient"},
        "[B, T, D] float32",
        embedding,
        lambda step, leaves: (step.tokens, *leaves),
        exact=True,
    ),
    "norm": Contract(
        {"x": "[B, T, D] float32, gets a gradient", "weight": "[D] float32, gets a gradient", "eps": "a number"},
        "[B, T, D] float32",
        textbook.norm,
        lambda step, leaves: (*leaves, step.model.norm.eps),
        exact=True,
    ),
    "rope": Contract(
        {
            "query": "[B, H, T, C] in the run's dtype, gets a gradient",
            "key": "[B, K, T, C] in the run's dtype, gets a gradient",
            "cos": "[B, 1, T, C] float32, its two halves alike",
            "sin": "[B, 1, T, C] float32, its two halves alike",
        },
        "query and key, rotated: a tuple of two, of the same shapes and dtypes",
        rope,
        lambda step, leaves: (*leaves, step.shared.cos, step.shared.sin),
    ),
    "qkv": Contract(
        {
            "x": "[B, T, D] float32, gets a gradient",
            "query": "[H·C, D] float32, gets a gradient",
            "key": "[K·C, D] float32, gets a gradient",
            "value": "[K·C, D] float32, gets a gradient",
        },
        "a tuple of three: [B, T, H·C], [B, T, K·C], [B, T, K·C], in the run's dtype",
        qkv,
        lambda step, leaves: leaves,
    ),
    "attention": Contract(
        {
            "query": "[B, H, T, C] in the run's dtype, gets a gradient",
            "key": "[B, K, T, C] in the run's dtype, gets a gradient; head h of the queries reads head h // (H / K)",
            "value": "[B, K, T, C] in the run's dtype, gets a gradient",
        },
        "[B, H, T, C] in the run's dtype; position t reads positions 0 to t",
        textbook.attention,
        lambda step, leaves: leaves,
    ),
    "output": Contract(
        {"x": "[B, T, H·C] in the run's dtype, gets a gradient", "weight": "[D, H·C] float32, gets a gradient"},
        "[B, T, D] in the run's dtype",
        output,
        lambda step, leaves: leaves,
    ),
    "swiglu": Contract(
        {
            "x": "[B, T, D] float32, gets a gradient",
            "gate": "[F, D] float32, gets a gradient",
            "up": "[F, D] float32, gets a gradient",
            "down": "[D, F] float32, gets a gradient",
        },
        "[B, T, D] in the run's dtype",
        textbook.swiglu,
        lambda step, leaves: leaves,
    ),
    "loss": Contract(
        {
            "hidden": "[B, T, D] float32, gets a gradient",
            "weight": "[V, D] float32, the head, gets a gradient",
            "targets": f"[B, T] int64; those of IGNORE = {IGNORE} do not count",
        },
        "[] float32: the sum over all targets, not their mean",
        textbook.loss,
        lambda step, leaves: (*leaves, step.targets),
    ),
    "clip": Contract(
        {"gradients": "a list of float32 tensors, changed in place", "max_norm": "a number"},
        "nothing",
        textbook.clip,
        lambda step, leaves: (_gradients(step), MAX_NORM),
        writes=("gradients",),
        exact=True,
    ),
    "adamw": Contract(
        {
            "weights": "a list of float32 tensors, changed in place",
            "gradients": "a list of float32 tensors",
            "moments": "a list of float32 tensors, the first moments, changed in place",
            "squares": "a list of float32 tensors, the second moments, changed in place",
            **{"step": "an int, 1 at first"},
            **dict.fromkeys(("lr", "beta1", "beta2", "eps", "weight_decay"), "a number"),
        },
        "nothing",
        adamw,
        _adamw,
        writes=("weights", "moments", "squares"),
        exact=True,
    ),
}


def contract(operation: str) -> Contract:
    """Return an operation's contract. Raise InputError for an operation without one, with the reason."""
    if operation in WITHOUT:
        raise InputError(f"{operation}: no function of your own can be added: {WITHOUT[operation]}")
    if operation not in CONTRACTS:
        known = ", ".join(CONTRACTS)
        raise InputError(f"{operation}: no such operation{did_you_mean(operation, CONTRACTS)}; there are {known}")
    return CONTRACTS[operation]


def describe(operation: str) -> str:
    """Return a Python file to start from: the contract as comments, and the formula as a function that keeps it."""
    one = contract(operation)
    width = max(map(len, one.inputs)) + 1
    lines = [
        f"# {operation}: {operation}({', '.join(one.inputs)})",
        *(f"#   {name + ':':<{width}} {shape}" for name, shape in one.inputs.items()),
        f"# It returns {one.returns}.",
        "# B batch, T tokens of a row, D model width, H query heads, K key/value heads, C head width, F feed-forward",
        "# width, V vocabulary. It is called under autocast in the run's dtype. It changes no other input than those",
        "# named so, and keeps nothing from one call for another.",
        f"#     python -m benchmarks ops --add FILE.py:{operation} --against {operation}",
        HEADER,
    ]
    if operation == "loss":
        lines.append(f"IGNORE = {IGNORE}\n")
    header = "\n".join(lines)
    source = inspect.getsource(one.plain).replace("Sequence[Tensor]", "list[Tensor]")
    return f"{header}\n\n{source}".rstrip()


def other_values(arguments: Arguments, generator: torch.Generator) -> Arguments:
    """Return other arguments of the same shapes: what is right for both is not right by chance, or by memory.

    Activations have rows of very different sizes, a norm's weights are not all 1, some targets are left out, tables are
    those of other positions, and numbers are others.
    """
    return {name: _other(name, value, generator) for name, value in arguments.items()}


def _other(name: str, value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, list):
        return [_other(name, one, generator) for one in value]
    if not isinstance(value, Tensor):
        return {"eps": 1e-3, "step": 7, "max_norm": 2 * MAX_NORM, "lr": 2e-3, "weight_decay": 0.3}.get(name, value)
    if name in ("cos", "sin"):
        return value.roll(1, dims=2)
    if not value.is_floating_point():
        shuffled = value.flatten()[torch.randperm(value.numel(), generator=generator, device=value.device)]
        if name == "targets":
            shuffled[::4] = IGNORE
        return shuffled.view_as(value)
    drawn = torch.empty_like(value, requires_grad=False).normal_(generator=generator)
    if name in ("moments", "squares"):  # of a run that has begun
        return (1e-3 * drawn).square() if name == "squares" else 1e-3 * drawn
    if name == "gradients":
        return 1e-5 * drawn
    if value.ndim == 1:
        return 1 + drawn / 2
    scale = value.detach().std().clamp_min(1e-3) if value.ndim == 2 else 1.0
    if value.ndim == 3:
        rows = torch.empty_like(value[..., :1], requires_grad=False).uniform_(-2, 1, generator=generator)
        drawn = drawn * 10**rows
    return scale * drawn
