"""What a run tells of each step: a line of `metrics.jsonl`, a bar, and whether its validation loss is the lowest yet.

Read next: `train.py`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm  # in a notebook, its own kind of bar

from minift.costs.flops import data_sheet_flops, training_flops_per_token
from minift.distributed.world import World
from minift.pack import PADDING, Batch
from minift.train import TrainState


@dataclass
class Best:
    """The lowest validation loss of a run so far, and how long ago it was."""

    loss: float = math.inf
    step: int = 0
    evaluations_since: int = 0

    @classmethod
    def of(cls, metrics: Path) -> "Best":
        """Of a run's `metrics.jsonl`, which holds nothing but the steps that were taken."""
        best = cls()
        if metrics.exists():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                best.add(json.loads(line))
        return best

    def add(self, record: dict[str, Any]) -> bool:
        """Take in what a step reports. True when it was evaluated and is the best."""
        if "validation_loss" not in record:
            return False
        if record["validation_loss"] < self.loss:
            self.loss, self.step, self.evaluations_since = record["validation_loss"], record["step"], 0
            return True
        self.evaluations_since += 1
        return False


@contextmanager
def metrics_file(out: Path, world: World) -> Iterator[TextIO]:
    """The file of the run's metrics; the ranks that do not keep them write nowhere."""
    with (out / "metrics.jsonl" if world.is_main else Path(os.devnull)).open("a", encoding="utf-8") as file:
        yield file


def record_of(
    state: TrainState, loss: float, grad_norm: float, lr: float, window: Sequence[Batch], seconds: float, dtype: str
) -> dict[str, Any]:
    """What `metrics.jsonl` has of the step that `state` has just taken, over a window of micro-batches. All ranks ask.

    Args:
        seconds: what the step took, from the wait for its batches on.
        dtype: of the arithmetic, whose peak the MFU is a share of.
    """
    world = state.world
    tokens = int(world.total(sum(int((batch.document_ids != PADDING).sum()) for batch in window))[0])
    record = {
        "step": state.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }
    if state.scaler.is_enabled():
        record["loss_scale"] = state.scaler.get_scale()
    peak = data_sheet_flops(state.model.device, dtype)
    if peak is not None:
        length = window[0].tokens.shape[1]
        record["mfu"] = training_flops_per_token(state.model.config, length) * tokens / seconds / peak / world.size
    return record


def progress_bar(steps: int, state: TrainState) -> "tqdm[Any]":
    """A bar of all the steps of a run, of which `state` has taken some; of several ranks, the main one shows it."""
    hidden = not state.world.is_main
    return tqdm(total=steps, initial=state.step, unit="step", desc="training", dynamic_ncols=True, disable=hidden)


def show(bar: "tqdm[Any]", record: dict[str, Any]) -> None:
    """One step more, and what it reports."""
    shown = {"loss": f"{record['loss']:.3f}", "tok/s": f"{record['tokens_per_second']:,.0f}"}
    if "validation_loss" in record:
        shown["validation"] = f"{record['validation_loss']:.3f}"
    bar.set_postfix(shown)
    bar.update()
