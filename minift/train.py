"""The loop: batches in, changed weights out. `train_step` is the one function to read.

An optimizer step sums the gradients of `grad_accum` micro-batches, so that a step's batch may be larger than memory.
The one trap in it: micro-batches hold different numbers of targets. Each one's loss is therefore a *sum*, and is
divided by the targets of the **whole window**, known before its first backward pass. A mean of the micro-batches' means
would weight a target by how few neighbours it happens to have. The last window of a run may be partial, and is an
ordinary step with its own count.

Mixed precision: the weights stay float32; under `torch.autocast` the matrix products run in bfloat16 or float16.
float16 cannot hold small gradients, so a `GradScaler` multiplies the loss by a large number first. The order is then
fixed: unscale → clip → step → update. A step whose gradients overflowed is skipped, and the schedule does not advance.

Several processes (`distributed/world.py`) take the same steps together: each has its share of every micro-batch, the targets
are counted and the gradients added up over all of them, and whatever is measured is measured after that.

Source of mixed precision: Micikevicius et al. (arXiv 1710.03740). Read next: `checkpoint.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from minift.config import TrainConfig
from minift.data.batches import PageBatches, PairBatches
from minift.distributed.sharding import Objective, first_not_finite, micro_batch, release, whole
from minift.distributed.world import World
from minift.errors import InputError
from minift.model import Llama
from minift.optim import AdamW
from minift.pack import IGNORE, Batch
from minift.runs.machine import autocast
from minift.values import check_number


@dataclass
class TrainState:
    """Everything that changes during a run. What is saved, and what a resumed run gets back (`checkpoint.py`).

    Attributes:
        step: optimizer steps taken.
        world: the processes that train it together.
        objective: the model and its loss, as `world` takes them.
    """

    model: Llama
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    batches: PairBatches | PageBatches
    step: int = 0
    world: World = field(default_factory=World)
    objective: nn.Module = None  # type: ignore[assignment]  # made of the model, if it is not given

    def __post_init__(self) -> None:
        if self.objective is None:
            self.objective = Objective(self.model)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        loss: mean over the step's targets, in nats.
        grad_norm: 2-norm of the whole gradient, before clipping.
        stepped: False when the gradient was not finite and the weights were left as they are.
        culprit: then, the first weight or gradient in which that can be seen.
    """

    loss: float
    grad_norm: float
    stepped: bool
    culprit: str | None = None


# ----------------------------------------------------------------------------------------------------------------------


def train_step(state: TrainState, window: Sequence[Batch], lr: float, config: TrainConfig) -> StepResult:
    """One optimizer step over a window of micro-batches.

    Args:
        window: micro-batches on the model's device. With several processes it is this one's share of them, and there
            must be a target in somebody's.
        lr: the learning rate of this step.

    Raises:
        InputError: when nobody has a target.
    """
    model, optimizer, scaler, world = state.model, state.optimizer, state.scaler, state.world
    # Of the whole window, on all ranks, before its first backward pass.
    (n_targets,) = world.total(sum(batch.n_targets for batch in window))
    if not n_targets:
        raise InputError(f"step {state.step + 1}: no micro-batch of it has a target; there is nothing to learn")

    total_nll = torch.zeros((), device=model.device)
    for i, batch in enumerate(window):
        with micro_batch(state.objective, last=i == len(window) - 1):
            with autocast(model, config):
                nll_sum, _ = state.objective(batch, config.loss_chunk)
            scaler.scale(nll_sum / n_targets).backward()  # gradients add up in parameter.grad
        total_nll += nll_sum.detach()

    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)  # gradients back to their true size, to be measured and clipped
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    grad_norm = float(whole(norm))
    stepped = math.isfinite(grad_norm)
    culprit = None if stepped else first_not_finite(model, world)
    if stepped and 0 < config.clip < grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
    if scaler.is_enabled() or stepped:
        scale = scaler.get_scale()
        scaler.step(optimizer)  # does nothing if a float16 gradient overflowed
        scaler.update()  # … and then halves the scale
        stepped = scaler.get_scale() >= scale
    optimizer.zero_grad(set_to_none=True)
    (nll,) = world.total(float(total_nll))
    return StepResult(nll / n_targets, grad_norm, stepped, culprit)


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The length of a run: `steps` optimizer steps over `micro_batches` micro-batches, `grad_accum` in each window."""

    steps: int
    micro_batches: int
    grad_accum: int

    @classmethod
    def make(cls, config: TrainConfig, micro_batches_per_epoch: float) -> "Plan":
        """From `steps`, or from `epochs`: then the last window holds what is left. Raises InputError without either."""
        if config.steps is not None:
            return cls(config.steps, config.steps * config.grad_accum, config.grad_accum)
        if config.epochs is None:
            raise InputError("give --steps or --epochs: one of them sets the length of the run")
        check_number("the number of micro-batches", config.epochs * micro_batches_per_epoch, below=2**31)
        micro_batches = max(1, round(config.epochs * micro_batches_per_epoch))
        return cls(-(-micro_batches // config.grad_accum), micro_batches, config.grad_accum)

    def window(self, step: int) -> int:
        """How many micro-batches step `step` sums."""
        return min(self.grad_accum, self.micro_batches - step * self.grad_accum)


@torch.no_grad()
def validation_loss(state: TrainState, batches: Sequence[Batch], config: TrainConfig) -> float:
    """Mean loss, in nats, over all targets of the held-out batches, without dropout. Ranks take them in turns."""
    nll, n_targets, world = 0.0, 0, state.world
    objective = state.objective if world.parallel == "fsdp" else Objective(state.model)
    state.model.eval()
    for start in range(0, len(batches), world.size):
        batch = batches[min(start + world.rank, len(batches) - 1)]
        if start + world.rank >= len(batches):  # it is another's, but FSDP needs every rank for every layer
            batch = replace(batch, targets=torch.full_like(batch.targets, IGNORE), n_targets=0)
        with autocast(state.model, config):
            nll_sum, _ = objective(batch.to(state.model.device), config.loss_chunk)
        nll += float(nll_sum)
        n_targets += batch.n_targets
    state.model.train()
    release(state.objective)
    nll, total = world.total(nll, n_targets)
    if not total:
        raise InputError("the held-out batches have no target to be evaluated on")
    return nll / total
