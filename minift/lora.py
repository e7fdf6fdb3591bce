"""LoRA: finetune a few additional numbers instead of the weights themselves.

A matrix W [M, N] stays as it is, and what finetuning would add to it is a product of two thin matrices:

    y = W x + (alpha / r) · B (A x)        A: [r, N], B: [M, r], r far below M and N

Only A and B are trained, so only they have gradients and moments of AdamW: LoRA saves memory, not arithmetic.
A starts random and B at zero, so that training starts with exactly the model that was loaded. Afterwards
W + (alpha / r) B A is one matrix again (`merge`), and the model as fast as before. Dividing alpha by r keeps the size
of the change about the same when r changes; a larger r allows a change of higher rank.

    minift finetune --lora-rank 8 --lr 5e-3

The rest of this project is about full finetuning; LoRA is what it can be compared with. How adapters are stored is in
`formats/peft.py`.

Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.1. Read next: `checkpoint.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.config import LORA_TARGETS, TrainConfig
from minift.distributed.sharding import copy_into, gathered
from minift.errors import InputError, did_you_mean
from minift.model import Llama
from minift.values import check_number


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, alpha, dropout and targets of the adapters. Raises InputError for a value out of bounds."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_number("lora_rank", self.rank, least=1)
        check_number("lora_alpha", self.alpha, above=0)
        check_number("lora_dropout", self.dropout, least=0, below=1)
        for target in self.targets:
            if target not in LORA_TARGETS:
                near = did_you_mean(target, LORA_TARGETS)
                raise InputError(f"lora_targets has {target!r}{near}; choose from {', '.join(LORA_TARGETS)}")
        if not self.targets:
            raise InputError(f"lora_targets is empty; choose from {', '.join(LORA_TARGETS)}")

    @classmethod
    def of(cls, config: TrainConfig) -> "LoRAConfig":
        """Return the adapters' settings of a run."""
        named = tuple(target.strip() for target in config.lora_targets.split(",") if target.strip())
        targets = LORA_TARGETS if named == ("all",) else named
        return cls(config.lora_rank, config.lora_alpha, targets, config.lora_dropout)


class LoRALinear(nn.Linear):
    """A frozen matrix with an adapter."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        nn.Module.__init__(self)  # there is a weight already
        self.out_features, self.in_features = base.weight.shape
        self.weight = base.weight
        self.register_parameter("bias", None)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        dtype, device = base.weight.dtype, base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[…, N] → […, M]."""
        thin = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # […, r]
        return F.linear(x, self.weight) + F.linear(thin, self.lora_B) * self.scale

    @property
    def matrix(self) -> Tensor:
        """[M, N]: W + (alpha / r) B A, in W's dtype."""
        return merged_matrix(self.weight, self.lora_A, self.lora_B, self.scale).to(self.weight.dtype)


def merged_matrix(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return W + scale · B A, [M, N], in float32, or in float64 for such a W: the caller casts it, once."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    change = (lora_B.to(exact) @ lora_A.to(exact)).mul_(scale)
    return weight + change  # in the dtype of the change, by PyTorch's rules of promotion


def effective_matrix(linear: nn.Linear) -> Tensor:
    """Return the matrix [M, N] that a linear module multiplies by: its weight, and its adapter's part if it has one."""
    return linear.matrix if isinstance(linear, LoRALinear) else linear.weight


def add_lora(model: Llama, config: LoRAConfig, generator: torch.Generator) -> None:
    """Freeze a model's weights, and add an adapter to each matrix that is a target.

    Args:
        generator: draws the first A, on the CPU.
    """
    model.requires_grad_(False)
    for parent, name, linear in _linears(model):
        if name in config.targets:
            setattr(parent, name, LoRALinear(linear, config))
    init_adapters(model, generator)


@torch.no_grad()
def init_adapters(model: Llama, generator: torch.Generator) -> None:
    """Give all adapters their first values: A random, and B zero, which adds nothing to the model."""
    for *_, linear in _linears(model):
        if isinstance(linear, LoRALinear):
            bound = 1 / math.sqrt(linear.in_features)  # as nn.Linear's weights start
            copy_into(linear.lora_A, torch.empty(linear.lora_A.shape).uniform_(-bound, bound, generator=generator))
            copy_into(linear.lora_B, torch.zeros(linear.lora_B.shape))


@torch.no_grad()
def merge(model: Llama) -> None:
    """Make the adapters part of the weights, and all of these trainable: an ordinary model again."""
    for parent, name, linear in _linears(model):
        if isinstance(linear, LoRALinear):
            setattr(parent, name, _linear(linear.matrix))
    model.requires_grad_(True)


def _linear(matrix: Tensor) -> nn.Linear:
    """Return an nn.Linear of this matrix, [M, N], which draws no random numbers."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = matrix.shape
    linear.weight = nn.Parameter(matrix)
    linear.register_parameter("bias", None)
    return linear


def has_adapter(model: Llama) -> bool:
    """Return whether a model has adapters that are not merged."""
    return any(isinstance(linear, LoRALinear) for *_, linear in _linears(model))


@torch.no_grad()
def merged_weights(model: Llama) -> dict[str, Tensor]:
    """Return a model's weights by name, with its adapters merged into them, if it has some."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.matrix
    return weights


def adapter_weights(model: Llama) -> dict[str, Tensor]:
    """Return a model's adapters by name: `layers.0.self_attn.q_proj.lora_A`, …. Complete; call on all ranks."""
    return {name: gathered(tensor) for name, tensor in model.state_dict().items() if ".lora_" in name}


@torch.no_grad()
def base_checksum(model: Llama) -> int:
    """Return a sum of the bits of the frozen weights, by which a changed base is recognised."""
    total = 0
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            total += int(tensor.view(integers).sum(dtype=torch.int64))
    return total


def _linears(model: Llama) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield all matrices of the layers: the module that has it, its name there, and it."""
    for layer in model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(cast(nn.Module, parent).named_children()):
                if isinstance(child, nn.Linear):
                    yield cast(nn.Module, parent), name, child
