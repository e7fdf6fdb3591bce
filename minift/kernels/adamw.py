"""AdamW's step as one call of PyTorch's fused kernel for each group of parameters.

Plain twin: `optim.make_optimizer`, that is `torch.optim.AdamW(fused=True)`, whose weights and state these are to the
bit. Taken always. The methods of that class import PyTorch's compiler when they are called, only to be left alone by
it: 1.5 s for every process that makes an optimizer. Here they are called as they were before they were wrapped.

    python -m benchmarks ops --only adamw
    python -m benchmarks ladder          # the rung "adamw"
"""

import inspect
from typing import Any

import torch

from minift import optim
from minift.config import TrainConfig
from minift.model import Llama

NEEDED = ("_fused_adamw_", "_foreach_add_")  # kernels of PyTorch that are not public


def make_optimizer(model: Llama, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters of a model: the twin's, where PyTorch lacks a kernel."""
    if not all(hasattr(torch, name) for name in NEEDED):
        return optim.make_optimizer(model, config)
    groups, betas = optim.parameter_groups(model, config), (config.beta1, config.beta2)
    return AdamW(groups, lr=config.lr, betas=betas, eps=1e-8)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW with its step written out.

    Args:
        groups: parameters of one dtype on one device, with what differs from the defaults.
        defaults: lr, betas, eps and weight_decay.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any):
        super().__init__(groups, fused=True, **defaults)
        self._step_supports_amp_scaling = False  # a GradScaler then looks for overflows itself, and asks for no step

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to be computed again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [optim.moments_of(self, parameter) for parameter in parameters]
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
