"""AdamW, which parameters it decays, and the learning rate of each step.

AdamW moves each weight by its gradient's running mean over the root of its running second moment, and shrinks it by
`lr · weight_decay` apart from that. The shrinking is for matrices only: a norm's weights are scales around 1, and
pulling them to 0 would shrink the signal, not the model. `reference.adamw_step` is the formula, line by line.

The learning rate is a pure function of the step, so there is no scheduler object whose state could be lost.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101). Read next: `train.py`.
"""

import inspect
import math
from typing import Any

import torch

from minift.config import TrainConfig
from minift.model import Llama


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW with its step written out: the fused kernel updates all parameters of a group in one call.

    The weights and the state are those of `torch.optim.AdamW(fused=True)`, to the bit. But the methods of that one
    import PyTorch's compiler when they are called, to have themselves left alone by it: 1.5 s for every process that
    makes an optimizer. Here they are what they were before they were wrapped.

    Args:
        groups: of parameters of one dtype on one device, with what differs from the defaults.
        defaults: lr, betas, eps and weight_decay.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any):
        super().__init__(groups, fused=True, **defaults)
        self._step_supports_amp_scaling = False  # a GradScaler looks for overflows itself, and then asks for no step

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is nothing to be computed again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state_of(parameter) for parameter in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],  # the largest exp_avg_sq, of a variant that is not used
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter's step, a float32 scalar, and its two moments, of its shape. Before its first step: zeros."""
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return state


def parameter_groups(model: Llama, config: TrainConfig) -> list[dict[str, Any]]:
    """What is trained of a model, in two groups: matrices (decayed) and norms (not)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: Llama, config: TrainConfig) -> AdamW:
    """AdamW over what is trained of a model."""
    return AdamW(parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8)


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
