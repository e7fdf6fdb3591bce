"""AdamW, which parameters it decays, and the learning rate of each step.

AdamW moves each weight by its gradient's running mean over the root of its running second moment, and shrinks it by
`lr · weight_decay` apart from that. The shrinking is for matrices only: a norm's weights are scales around 1, and
pulling them to 0 would shrink the signal, not the model. `reference.adamw_step` is the formula, line by line.

The learning rate is a pure function of the step, so there is no scheduler object whose state could be lost.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101). Read next: `train.py`.
"""

import math

import torch

from minift.config import TrainConfig
from minift.model import Llama


def make_optimizer(model: Llama, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all the weights, in two groups: matrices (decayed) and norms (not)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (the first is 0) of `total_steps`.

    It rises linearly for `warmup` steps and reaches `lr`; from there it falls to `min_lr · lr`, which the step behind
    the last one would have, along half a cosine (Loshchilov & Hutter, arXiv 1608.03983) or a straight line.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        share = 1.0
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
