"""The loop: batches in, changed weights out. `train_step` is the one function to read.

An optimizer step sums the gradients of `grad_accum` micro-batches, so that a step's batch may be larger than memory.
The one trap in it: micro-batches hold different numbers of targets. So each one's loss is a *sum*, and is divided by
the number of targets of the **whole window**, known before its first backward pass. A mean of the micro-batches' means
would give a target more weight the fewer others there are in its micro-batch. The last window of a run may be
partial, and is an ordinary step with its own count.

Mixed precision: the weights stay float32; under `torch.autocast` the matrix products run in bfloat16 or float16.
float16 cannot hold small gradients, so a `GradScaler` multiplies the loss by a large number first. The order is then
fixed: unscale → clip → step → update. A step whose gradients overflowed is skipped, and the schedule does not advance.

Several processes (`distributed/`) take the same steps together: each has its share of every micro-batch; targets are
counted and gradients added up over all of them, and everything is measured after that.

Saving, stopping, and what a run shows of its steps is in `runs/`. Source of mixed precision: Micikevicius et al. (arXiv
1710.03740). Read next: `generate.py`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from minift.config import TrainConfig
from minift.distributed.sharding import first_not_finite, gathered, micro_batch, release, unwrapped
from minift.distributed.world import World
from minift.errors import InputError
from minift.loss import LOSS_CHUNK, NextTokenLoss
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import IGNORE, Batch
from minift.values import check_number


class Objective(nn.Module):
    """A model and its loss as one module: what a run trains, alone or in several processes."""

    def __init__(self, model: Llama, chunk: int = LOSS_CHUNK):
        super().__init__()
        self.model, self.loss = model, NextTokenLoss(chunk)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss of a micro-batch, a scalar, in nats."""
        hidden = self.model.hidden(batch.tokens, batch.positions, batch.documents)  # [B, T, D]
        return self.loss(hidden, self.model.head_weight, batch.targets, batch.n_targets)


class Batches(Protocol):
    """Micro-batches without an end, and their place in the data, to be saved and restored."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, object]: ...
    def load_state_dict(self, state: dict[str, object]) -> None: ...


@dataclass
class TrainState:
    """Everything that changes during a run: what is saved, and what a resumed run gets back (`runs/steps.py`).

    Attributes:
        objective: the model and its loss, as the processes of `world` share them.
        dtype: of the matrix products, "float32", "bfloat16" or "float16".
        step: optimizer steps taken.
        world: the processes that train the model together.
    """

    model: Llama
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: Batches
    objective: nn.Module
    dtype: str = "float32"
    step: int = 0
    world: World = field(default_factory=World)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass, in which matrix products run in `dtype`."""
        return torch.autocast(self.model.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32")


@dataclass(frozen=True)
class StepResult:
    """The report of one optimizer step.

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


def train_step(state: TrainState, window: Sequence[Batch], lr: float, config: TrainConfig) -> StepResult:
    """Take one optimizer step over a window of micro-batches, at learning rate `lr`.

    Args:
        window: micro-batches on the model's device; of several processes, each has its share of them. (`world.total`,
            `micro_batch` and `gathered` add up over the processes; for one alone they do nothing.)

    Raises:
        InputError: when no process has a target.
    """
    model, optimizer, scaler, world = state.model, state.optimizer, state.scaler, state.world
    (n_targets,) = world.total(sum(batch.n_targets for batch in window))  # of all ranks, before the first backward
    if not n_targets:
        raise InputError(f"step {state.step + 1}: no micro-batch of it has a target; there is nothing to learn")

    total_nll = torch.zeros((), device=model.device)
    for i, batch in enumerate(window):
        with micro_batch(state.objective, last=i == len(window) - 1):
            with state.autocast():
                nll = state.objective(batch)
            scaler.scale(nll / n_targets).backward()  # gradients add up in parameter.grad
        total_nll += nll.detach()

    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)  # gradients back to their true size, to be measured and clipped
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    grad_norm, nll_sum = torch.stack((gathered(norm), total_nll)).tolist()  # here, and only here, a GPU is waited for
    stepped = math.isfinite(grad_norm)
    culprit = None if stepped else first_not_finite(model, world)
    if stepped and 0 < config.clip < grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
    if scaler.is_enabled() or stepped:
        scale = scaler.get_scale()
        scaler.step(optimizer)  # does nothing if a float16 gradient overflowed
        scaler.update()  # … and then halves the scale
        stepped = scaler.get_scale() >= scale  # it is lower only where the step was left out
    optimizer.zero_grad(set_to_none=True)
    (nll_sum,) = world.total(nll_sum)
    return StepResult(nll_sum / n_targets, grad_norm, stepped, culprit)


@dataclass(frozen=True)
class Plan:
    """The length of a run: `steps` optimizer steps over `micro_batches` micro-batches, `grad_accum` in each window."""

    steps: int
    micro_batches: int
    grad_accum: int

    @classmethod
    def make(cls, config: TrainConfig, micro_batches_per_epoch: float) -> "Plan":
        """Return the plan of `steps`, or of `epochs`: then the last window holds the rest. InputError for neither."""
        if config.steps is not None:
            return cls(config.steps, config.steps * config.grad_accum, config.grad_accum)
        if config.epochs is None:
            raise InputError("give --steps or --epochs: one of them sets the length of the run")
        check_number("the number of micro-batches", config.epochs * micro_batches_per_epoch, below=2**31)
        micro_batches = max(1, round(config.epochs * micro_batches_per_epoch))
        return cls(-(-micro_batches // config.grad_accum), micro_batches, config.grad_accum)

    def window(self, step: int) -> int:
        """Return how many micro-batches step `step` sums."""
        return min(self.grad_accum, self.micro_batches - step * self.grad_accum)


@dataclass(frozen=True)
class Step:
    """One turn of the loop: what it trained on, at which rate, what came of it, and how many seconds it took."""

    window: Sequence[Batch]
    lr: float
    result: StepResult
    seconds: float


def train(state: TrainState, plan: Plan, config: TrainConfig) -> Iterator[Step]:
    """Take the steps left of a plan; yield each, and each skipped for an overflow: the next has its window again."""
    micro_batches, window = iter(state.batches), list[Batch]()
    while state.step < plan.steps:
        start = time.perf_counter()
        window = window or state.world.agreed(_take, micro_batches, plan.window(state.step), state.model.device)
        lr = learning_rate(state.step, plan.steps, config)
        result = train_step(state, window, lr, config)
        state.step += result.stepped
        yield Step(window, lr, result, time.perf_counter() - start)
        window = [] if result.stepped else window


def _take(micro_batches: Iterator[Batch], count: int, device: torch.device) -> list[Batch]:
    return [next(micro_batches).to(device) for _ in range(count)]


@torch.no_grad()
def validation_loss(state: TrainState, batches: Sequence[Batch]) -> float:
    """Return the mean loss, in nats, over all targets of the held-out batches, without dropout. Call on all ranks.

    The ranks take the batches in turns. Raise InputError when no batch has a target.
    """
    nll, n_targets, world = 0.0, 0, state.world
    state.model.eval()
    for start in range(0, len(batches), world.size):
        batch = batches[min(start + world.rank, len(batches) - 1)]
        if start + world.rank >= len(batches):  # another rank has it; but FSDP needs all ranks in every layer
            batch = replace(batch, targets=torch.full_like(batch.targets, IGNORE), n_targets=0)
        with state.autocast():
            nll += float(unwrapped(state.objective)(batch.to(state.model.device)))
        n_targets += batch.n_targets
    state.model.train()
    release(state.objective)
    nll, total = world.total(nll, n_targets)
    if not total:
        raise InputError("the held-out batches have no target to be evaluated on")
    return nll / total
