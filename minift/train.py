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

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minift.checkpoint import save_best, save_step
from minift.config import TrainConfig
from minift.distributed.world import (
    Objective,
    World,
    first_not_finite,
    micro_batch,
    release,
    replicate,
    shard,
    whole,
)
from minift.errors import InputError, RunError, is_out_of_memory, out_of_memory
from minift.kernels.malloc import keep_freed_memory
from minift.model import Llama
from minift.optim import learning_rate, make_optimizer
from minift.pack import IGNORE, Batch, PageBatches, PairBatches
from minift.runs.machine import autocast, choose_dtype, choose_written_out
from minift.runs.progress import Best, metrics_file, progress_bar, record_of, show
from minift.runs.stop import StopSignal
from minift.state import TrainState
from minift.tokenizer.base import Tokenizer
from minift.values import check_number


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


def start_state(
    model: Llama, batches: PairBatches | PageBatches, config: TrainConfig, world: World | None = None
) -> TrainState:
    """The state of a run before its first step.

    torch's own random numbers start from the config's seed, too, on each rank from another. On a CPU, what this process
    frees from now on stays with it (`kernels/malloc.py`).

    Args:
        model: where it will be trained, with its weights; for `fsdp` on "meta", without any (see `distributed.fill`).
        world: the processes that train it together; by default this one alone.
    """
    world = world or World(device=model.device)
    torch.manual_seed(config.seed + world.rank)
    if model.device.type == "cpu":
        keep_freed_memory()
    model.checkpoint_activations = config.checkpoint_activations
    model.written_out = world.parallel != "fsdp" and choose_written_out(model, config, world.device)
    model.train()  # which only the dropout of adapters knows about
    device = model.device.type
    if config.compile:
        _keep_less_for_the_backward_pass(device)
        for layer in model.layers:  # all layers are alike: one is compiled, the others reuse its code
            layer.compile()
    scaler = torch.amp.GradScaler(device, enabled=config.dtype == "float16")
    objective: nn.Module = Objective(model)
    if world.parallel == "ddp":
        objective = replicate(model, world)
    elif world.parallel == "fsdp":
        objective = shard(model, world, getattr(torch, choose_dtype(config, world.device)))
    return TrainState(model, make_optimizer(model, config), scaler, batches, world=world, objective=objective)


def _keep_less_for_the_backward_pass(device: str) -> None:
    """Let the compiler compute again what costs it nothing: silu(gate) · up, and normalised inputs.

    They are operands of matrix products, so by default it keeps them; but the loops of the backward pass read what they
    are made of anyway. That is a quarter of a layer's activations, for no more time. The budget is a share of what it
    would keep by default; at 0.85 a GPU would have to compute products again.
    """
    from torch._functorch import config as partitioner  # imports the compiler

    if hasattr(partitioner, "activation_memory_budget"):  # not public
        partitioner.activation_memory_budget = 0.85 if device == "cpu" else 0.95


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


def train(
    state: TrainState,
    plan: Plan,
    config: TrainConfig,
    tokenizer: Tokenizer,
    validation: Sequence[Batch],
    out: Path,
) -> bool:
    """Take the steps that are left of `plan`, writing `metrics.jsonl` and checkpoints into `out`.

    With `config.patience`, the model of the lowest validation loss is kept in `out/best`, and the run ends when so many
    evaluations have not found a lower one (Prechelt, "Early Stopping – But When?", 1998).

    Returns:
        True when the run is done; False when Ctrl-C or SIGTERM ended it early (the state is then saved).

    Raises:
        RunError: when a gradient or weight is not finite any more, or memory is full.
        InputError: for a bad record in the data. In both cases the steps before it are saved, unless memory is full
            while other ranks go on: nobody would answer it.
    """
    saved, best = state.step, Best.of(out / "metrics.jsonl")
    state.world.wait()  # all have read the same
    if config.patience and best.evaluations_since >= config.patience:
        return True
    try:
        with StopSignal() as stop, metrics_file(out, state.world) as metrics:
            for record in _steps(state, plan, config, validation, stop):
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                if best.add(record) and config.patience:
                    save_best(out / "best", state, tokenizer)
                if config.patience and best.evaluations_since >= config.patience:
                    return True
                if _due(state.step, config.save_every, None):
                    if state.world.is_main:
                        os.fsync(metrics.fileno())  # or a step might be saved whose line is lost
                    _check_weights(state)
                    save_step(out, state, tokenizer, config.keep)
                    saved = state.step
        _check_weights(state)
    except Exception as error:
        full = is_out_of_memory(error)
        if not full and not isinstance(error, InputError | RunError):
            raise
        unsaved = saved != state.step and not (full and state.world.size > 1)
        if unsaved and first_not_finite(state.model, state.world) is None:  # the steps before it are good
            save_step(out, state, tokenizer, config.keep)
        if full:
            remedy = "lower --batch-size and raise --grad-accum, or --checkpoint-activations"
            raise RunError(f"step {state.step + 1}: {out_of_memory(error)}; {remedy}") from None
        raise
    done = state.step >= plan.steps
    if not done and saved != state.step:
        save_step(out, state, tokenizer, config.keep)
    return done


def _steps(
    state: TrainState, plan: Plan, config: TrainConfig, validation: Sequence[Batch], stop: StopSignal
) -> Iterator[dict[str, Any]]:
    """Take the steps that are left, one at a time; yield what each has to report."""
    micro_batches, world = iter(state.batches), state.world
    with progress_bar(plan.steps, state) as bar:
        while state.step < plan.steps and not world.any(stop.requested):
            start = time.perf_counter()
            place = state.batches.state_dict()
            try:
                window = _next_window(micro_batches, plan.window(state.step), world)
                lr = learning_rate(state.step, plan.steps, config)
                result = train_step(state, window, lr, config)
                seconds = time.perf_counter() - start
                if not result.stepped:
                    _check_skipped(state, result)
            except Exception:  # no step was made of this window: a resumed run draws it again
                state.batches.load_state_dict(place)
                raise
            if not result.stepped:
                bar.write(f"step {state.step + 1}: float16 overflowed; again, at scale {state.scaler.get_scale():g}")
                continue
            state.step += 1
            record = record_of(state, result.loss, result.grad_norm, lr, window, seconds, config.dtype)
            if validation and _due(state.step, config.eval_every, plan.steps):
                record["validation_loss"] = validation_loss(state, validation, config)
            show(bar, record)
            yield record


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


def _next_window(micro_batches: Iterator[Batch], size: int, world: World) -> list[Batch]:
    """The next micro-batches, if there are some for every rank."""
    failure: Exception | None = None
    window = []
    try:
        window = [next(micro_batches).to(world.device) for _ in range(size)]
    except (InputError, RunError) as error:
        failure = error
    world.agree(failure)
    return window


def _due(step: int, every: int, last: int | None) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_weights(state: TrainState) -> None:
    """Raise RunError when a step has made weights that are no numbers: only the next one's loss would show it."""
    culprit = first_not_finite(state.model, state.world)
    if culprit is not None:
        raise RunError(f"step {state.step} has made {culprit} infinite or NaN; lower --lr")


def _check_skipped(state: TrainState, result: StepResult) -> None:
    """float16 may skip steps until its scale fits; anything else that is not finite ends the run."""
    if state.scaler.is_enabled() and state.scaler.get_scale() >= 1.0:
        return
    what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}, first in {result.culprit}"
    raise RunError(f"step {state.step + 1} is not finite ({what}); lower --lr, or try another --dtype")
