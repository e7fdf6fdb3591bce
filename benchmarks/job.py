"""Set up a training run to measure: a model of random weights, batches of pages, and an optimizer step in named parts.

`take_step` makes the same calls in the same order as `minift/train.py` does for each step, inside named parts. The
caller decides what a part does: read the clock (`step.py`), name a range of a trace (`profile.py`), or label the memory
that is allocated (`memory.py`). A test compares it with `train_step`: three steps of either give the same weights, bit
for bit.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from benchmarks import arguments
from minift.config import LlamaConfig, TrainConfig
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.kernels.targets import TargetsObjective
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import Batch
from minift.runs.start import start_state
from minift.storage.names import bundled, model_path
from minift.tokenizer.load import load_tokenizer
from minift.train import StepResult, TrainState
from minift.values import check_number

STEPS = 1_000  # of the run whose beginning is measured: the schedule depends on it
PARTS = (
    "next batch",
    "copy to device",
    "forward",
    "loss",
    "backward",
    "clip",
    "optimizer",
    "zero_grad",
    "bookkeeping",
)
Part = Callable[[str], AbstractContextManager[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the run to measure."""
    arguments.add_shape(parser, rows="rows of a micro-batch")
    parser.add_argument("--grad-accum", type=int, default=1, metavar="N", help="micro-batches of a step (%(default)s)")
    arguments.add_machine(parser)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    add_data_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the text that it reads."""
    parser.add_argument("--data", metavar="FILE", help="pages (default: the bundled ones, which are generated)")
    parser.add_argument("--tokenizer", default="bundled", metavar="DIR|FILE", help="(%(default)s)")


def settings(options: argparse.Namespace) -> TrainConfig:
    """Return the config that the options describe, with device and dtype resolved; raise InputError if invalid."""
    return arguments.train_config(options, steps=STEPS, grad_accum=options.grad_accum, compile=options.compile)


@dataclass
class Job:
    """A training run in progress.

    Attributes:
        shape: the shape of the model.
        config: the settings of the run.
        state: everything that a step changes.
        micro_batches: an iterator over the micro-batches.
    """

    shape: LlamaConfig
    config: TrainConfig
    state: TrainState
    micro_batches: Iterator[Batch]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of a step."""
        return self.config.grad_accum * self.config.batch_size * self.config.max_length


def pages(shape: LlamaConfig, config: TrainConfig, data: str | None, tokenizer: str) -> PageBatches:
    """Return endless micro-batches of shuffled pages.

    Raises:
        InputError: for files that cannot be read, ids that the model does not have, or rows longer than its positions.
    """
    words = load_tokenizer(model_path(tokenizer))
    if words.vocab_size > shape.vocab_size:
        raise InputError(
            f"the tokenizer has {words.vocab_size} pieces, the model a vocabulary of {shape.vocab_size}; "
            "give another --tokenizer or --config"
        )
    check_number("length", config.max_length, below=shape.max_position_embeddings + 1)
    stream = DocumentStream([data or bundled("pages")], seed=config.seed, shuffle_buffer=config.shuffle_buffer)
    return PageBatches(stream, words, config.batch_size, config.max_length)


def begin(shape: LlamaConfig, config: TrainConfig, batches: PageBatches, micro_batches: Iterator[Batch]) -> Job:
    """Return a run from random weights, before its first step."""
    with torch.device(config.device):
        model = Llama(shape)
        model.init_weights(torch.Generator(config.device).manual_seed(config.seed))
    return Job(shape, config, start_state(model, batches, config), micro_batches)


def prepare(options: argparse.Namespace) -> Job:
    """Return the run that the options describe."""
    config, shape = settings(options), LlamaConfig.named(options.config)
    batches = pages(shape, config, options.data, options.tokenizer)
    return begin(shape, config, batches, iter(batches))


def take_step(job: Job, part: Part) -> StepResult:
    """Take one optimizer step in parts: `train.train_step`, and what the loop does before and after it.

    Args:
        part: called with the name of each part, one of PARTS, in the order in which they come.
    """
    state, config = job.state, job.config
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    objective = cast(TargetsObjective, state.objective)
    with part("bookkeeping"):
        state.batches.state_dict()  # the position to return to if the step failed
        lr = learning_rate(state.step, STEPS, config)
    window = []
    for _ in range(config.grad_accum):
        with part("next batch"):
            batch = next(job.micro_batches)
        with part("copy to device"):
            window.append(batch.to(model.device))
    n_targets = sum(batch.n_targets for batch in window)

    total_nll = torch.zeros((), device=model.device)
    for batch in window:
        with state.autocast():
            with part("forward"):
                hidden, targets = objective.states(batch)
            with part("loss"):
                nll = objective.loss(hidden, model.head_weight, targets, batch.n_targets)
        del hidden  # freed here, as when the objective's `forward` returns
        with part("backward"):
            scaler.scale(nll / n_targets).backward()
        total_nll += nll.detach()

    with part("clip"):
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        grad_norm, nll_sum = torch.stack((norm, total_nll)).tolist()
        stepped = math.isfinite(grad_norm)
        if stepped and 0 < config.clip < grad_norm:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
    with part("optimizer"):
        if scaler.is_enabled() or stepped:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            stepped = scaler.get_scale() >= scale
    with part("zero_grad"):
        optimizer.zero_grad(set_to_none=True)
    with part("bookkeeping"):
        result = StepResult(nll_sum / n_targets, grad_norm, stepped)
        state.step += result.stepped
    return result
