"""Prepare one operation of a training step for timing: its inputs, its variants, and its minimal cost.

*Variants.* `naive` is the operation as a textbook has it (`textbook.py`), in the same dtype; `used` is what minift
trains with; `compiled` is what `--compile` makes of it, if it is inside a layer.

*Inputs* have the shape, dtype and layout that they have in a step, because the operations before them make them. Under
autocast the hidden states and the weights are float32; q, k, v and the result of attention have the lower precision.

Legend: B batch, T tokens of a row, D model width, H query heads, K key/value heads, C head width.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minift import kernels
from minift.config import PRETRAIN, LlamaConfig, TrainConfig
from minift.model import DecoderLayer, Llama, Shared
from minift.train import Objective

Call: TypeAlias = Callable[[], tuple[Tensor, ...]]
Function: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Setting:
    """The settings that all operations share.

    Attributes:
        shape: the shape of the model.
        batch_size, length: B rows of T tokens.
        dtype: the dtype of the matrix products, by autocast.
        device: "cpu" or "cuda".
        compile: whether there are compiled variants.
    """

    shape: LlamaConfig
    batch_size: int
    length: int
    dtype: torch.dtype
    device: str
    compile: bool = False

    def train_config(self) -> TrainConfig:
        """Return the config of an eager run of this setting."""
        return PRETRAIN.replace(device=self.device, dtype=str(self.dtype).removeprefix("torch."), compile=False)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a training step."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Work:
    """The minimal cost of a computation: floating-point operations, and bytes of memory traffic."""

    flops: float
    nbytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Operation:
    """One operation, ready to be called.

    Attributes:
        calls: how often a training step does it.
        inside: how many of these calls are inside the layers; 0 for `layer` itself, which contains them.
        work: the minimal cost by phase: "forward" and "backward", or "step" for what has no backward pass.
        variants: by name, a call that does it once. Those of a "step" work in place, each on its own tensors.
        leaves: the inputs and weights that get a gradient.
        gradients: the outputs' gradients, which the backward pass starts from.
        early: variants that compute gradients already in the forward pass: their phases cannot be compared with those
            of `work`.
    """

    calls: int
    inside: int
    work: dict[str, Work]
    variants: dict[str, Call]
    leaves: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    early: tuple[str, ...] = ()

    def both(self, variant: str) -> tuple[Tensor, ...]:
        """Run the forward and then the backward pass. Return the gradients of `leaves`."""
        return torch.autograd.grad(self.variants[variant](), self.leaves, self.gradients)


@dataclass(frozen=True)
class Step:
    """The operations' inputs: what a model of one layer computes from random tokens to the loss."""

    setting: Setting
    generator: torch.Generator
    model: Llama  # plain
    layer: DecoderLayer  # plain
    objective: Objective  # with the same weights, and the kernels that an eager run installs
    trained: DecoderLayer  # its layer
    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]
    stream: Tensor  # [B, T, D]
    normed: Tensor  # [B, T, D]
    query: Tensor  # [B, H, T, C]; key and value [B, K, T, C]
    key: Tensor
    value: Tensor
    shared: Shared  # RoPE's tables, [B, 1, T, C]
    rotated: tuple[Tensor, Tensor]  # query and key after RoPE
    mixed: Tensor  # [B, T, H·C]


@torch.no_grad()
def make_step(setting: Setting) -> Step:
    """Return random weights and tokens from a fixed seed, and what the first layer computes from them."""
    generator = torch.Generator(setting.device).manual_seed(0)
    model = _model(dataclasses.replace(setting.shape, num_hidden_layers=1), setting, generator)
    shape, layer = setting.shape, model.layers[0]
    assert isinstance(layer, DecoderLayer)
    B, T, C = setting.batch_size, setting.length, shape.head_dim
    ids = torch.randint(shape.vocab_size, (B, T + 1), generator=generator, device=setting.device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(T, device=setting.device).expand(B, T)
    names = kernels.choose(setting.train_config(), torch.device(setting.device))
    objective = kernels.with_kernels(Objective(model, PRETRAIN.loss_chunk), names)
    trained = objective.model.layers[0]
    assert isinstance(trained, DecoderLayer)
    shared = model.prepare(tokens, positions, None, None)
    with setting.autocast():
        stream = model.embed_tokens(tokens)
        normed = layer.input_layernorm(stream)
        attention = layer.self_attn
        query, key, value = (
            projection(normed).view(B, T, -1, C).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rotated = attention.rope(query, shared.cos, shared.sin), attention.rope(key, shared.cos, shared.sin)
        mixed = attention.attend(*rotated, value, None).transpose(1, 2).reshape(B, T, -1)
    heads = query, key, value, shared, rotated, mixed
    return Step(setting, generator, model, layer, objective, trained, tokens, targets, stream, normed, *heads)


def two_passes(
    step: Step,
    *,
    calls: int,
    naive: Function,
    used: Function,
    inputs: tuple[Tensor, ...],
    flops: tuple[float, float],
    weights: tuple[Tensor, ...] = (),
    reads: tuple[Iterable[Tensor], Iterable[Tensor]] | None = None,
    inside: int = 0,
    compiled: Function | None = None,
) -> Operation:
    """Return an operation with a backward pass.

    Args:
        calls, inside: see `Operation`.
        naive, used: functions of `inputs`; they refer to `weights` themselves.
        inputs, weights: those that require a gradient become the operation's `leaves`.
        flops: of the forward and of the backward pass.
        reads: the tensors that each of the two passes reads, in addition to the outputs' gradients; by default inputs
            and weights.
        compiled: the function that `--compile` compiles inside a layer; by default `used`.
    """

    def under_autocast(function: Function) -> Call:
        def call() -> tuple[Tensor, ...]:
            with step.setting.autocast():
                result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        return call

    functions = {"naive": naive, "used": used}
    if step.setting.compile and (inside or compiled):
        functions["compiled"] = torch.compile(compiled or used, dynamic=False)
    variants = {name: under_autocast(function) for name, function in functions.items()}
    outputs = [output.detach() for output in variants["used"]()]
    gradients = tuple(torch.empty_like(output).normal_(generator=step.generator) for output in outputs)
    leaves = tuple(tensor for tensor in (*inputs, *weights) if tensor.requires_grad)
    read_forward, read_backward = reads or ((*inputs, *weights), (*inputs, *weights))
    work = {
        "forward": Work(flops[0], nbytes_of(read_forward) + nbytes_of(outputs)),
        "backward": Work(flops[1], nbytes_of(read_backward) + nbytes_of(gradients) + nbytes_of(leaves)),
    }
    return Operation(calls, inside, work, variants, leaves, gradients)


def _model(shape: LlamaConfig, setting: Setting, generator: torch.Generator) -> Llama:
    with torch.device(setting.device):
        model = Llama(shape)
    model.init_weights(generator)
    return model


def whole_model(step: Step) -> Llama:
    return _model(step.setting.shape, step.setting, step.generator)


def leaf(tensor: Tensor) -> Tensor:
    """Return the tensor detached, as a leaf that gets a gradient."""
    return tensor.detach().requires_grad_()


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
