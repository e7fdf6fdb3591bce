"""AdamW, which parameters it decays, and the learning rate of each step.

AdamW moves each weight by the running mean of its gradient over the root of the running mean of the gradient's square,
and shrinks it by `lr · weight_decay` apart from that. Only matrices are shrunk: a norm's weights are scales around 1,
and pulling them towards 0 would only make what the next matrix reads smaller. `reference.adamw_step` is the formula,
line by line.

The learning rate is a pure function of the step, so there is no scheduler object whose state could be lost.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101). Read next: `train.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from minift.config import TrainConfig
from minift.model import Llama


def make_optimizer(model: Llama, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters of a model."""
    groups, betas = parameter_groups(model, config), (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=True)


def parameter_groups(model: Llama, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the trained parameters of a model in two groups: matrices, which are decayed, and norms, which are not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's step, a float32 scalar, and its two moments, of its shape: zeros before its first step."""
    moments: dict[str, Tensor] = optimizer.state[parameter]
    if not moments:
        moments["step"] = torch.zeros((), device=parameter.device)
        moments["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        moments["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return moments


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of step `step` (the first is 0) of `total_steps`.

    It rises linearly for `warmup` steps and reaches `lr`. From there it stays, or falls along half a cosine (Loshchilov
    & Hutter, arXiv 1608.03983) or a straight line, and would reach `min_lr · lr` one step after the last.
    """
    if step < (warmup := config.warmup_steps(total_steps)):
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        share = 1.0
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
