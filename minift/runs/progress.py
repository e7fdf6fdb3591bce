"""What a run shows of each step: a line of `metrics.jsonl`, a progress bar, and whether its loss is the lowest yet."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm  # in a notebook, its own kind of bar

from minift.costs.flops import data_sheet_flops, training_flops_per_token
from minift.distributed.world import World
from minift.pack import PADDING
from minift.runs.metrics import read_metrics
from minift.storage.atomic import write_file
from minift.train import Step, TrainState
from minift.values import size

BEFORE = "validation_loss_before"  # of the first step's record: the validation loss before that step
RISE = 0.01  # of the lowest validation loss: a higher one is said


@dataclass
class Best:
    """The lowest validation loss of a run so far, and how long ago it was."""

    loss: float = math.inf
    step: int = 0
    evaluations_since: int = 0
    last: float = math.inf  # the loss of the newest evaluation

    @property
    def rose(self) -> bool:
        """Return whether the newest loss is higher than the lowest by more than RISE of it."""
        return self.evaluations_since > 0 and self.last > self.loss * (1 + RISE)

    def model_in_words(self) -> str:
        """Return which model had the lowest loss."""
        return f"the model of step {self.step}" if self.step else "the model as it was before the first step"

    def in_words(self) -> str:
        """Return where the loss was lowest, and what it is now."""
        when = f"after step {self.step}" if self.step else "before the first step"
        return f"the validation loss was lowest {when} ({self.loss:.4f}) and is {self.last:.4f} now"

    @classmethod
    def of(cls, metrics: Path) -> "Best":
        """Return the best of a run's `metrics.jsonl`, which holds only the steps that were taken."""
        return cls.of_records(read_metrics(metrics))

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> "Best":
        """Return the best of what some steps report."""
        best = cls()
        for record in records:
            if BEFORE in record:
                best.add({"step": 0, "validation_loss": record[BEFORE]})
            best.add(record)
        return best

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take in what a step reports; return True when it was evaluated and is the best so far."""
        if "validation_loss" not in record:
            return False
        self.last = record["validation_loss"]
        if record["validation_loss"] < self.loss:
            self.loss, self.step, self.evaluations_since = record["validation_loss"], record["step"], 0
            return True
        self.evaluations_since += 1
        return False


@contextmanager
def metrics_file(out: Path, world: World) -> Iterator["Metrics | TextIO"]:
    """Open the file of the run's metrics; the ranks that do not keep them write to nothing.

    Raises:
        OSError: when the disk refuses.
    """
    if not world.is_main:
        with Path(os.devnull).open("a", encoding="utf-8") as nothing:
            yield nothing
        return
    metrics = Metrics(out / "metrics.jsonl")
    try:
        yield metrics
        metrics.check()
    finally:
        metrics.close()


class Metrics:
    """The open file of a run's metrics. What another program does to it meanwhile does not end the run, and is said.

    One that is removed or replaced is written again: all its lines are still in the file that is open.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a+", encoding="utf-8")
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, text: str) -> None:
        """Add a text, after a look at the file."""
        self.check()
        self._file.write(text)

    def flush(self) -> None:
        """Hand what was added to the system."""
        self._file.flush()
        self._size = os.fstat(self._file.fileno()).st_size

    def fileno(self) -> int:
        """Return the number of the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check(self) -> None:
        """Write the file again if it is not at its place, and say so; or say that it was cut."""
        opened = os.fstat(self._file.fileno())
        try:
            if not os.path.samestat(opened, os.stat(self._path)):
                raise FileNotFoundError
        except FileNotFoundError:
            self._file.seek(0)
            text = self._file.read()
            write_file(self._path, lambda partial: partial.write_text(text, encoding="utf-8"))
            self._file.close()
            self._file = self._path.open("a+", encoding="utf-8")
            tqdm.write(f"note: {self._path}: was removed or replaced during the run; its lines are written again")
            return
        if opened.st_size < self._size:
            lost = size(self._size - opened.st_size)
            tqdm.write(f"note: {self._path}: was cut by {lost} during the run; the report lacks those steps")
            self._size = opened.st_size


def record_of(state: TrainState, step: Step) -> dict[str, Any]:
    """Return the line of `metrics.jsonl` for the step that `state` has just taken. Call on all ranks."""
    world, seconds = state.world, step.seconds
    tokens = int(world.total(sum(int((batch.document_ids != PADDING).sum()) for batch in step.window))[0])
    record = {
        "step": state.step,
        "loss": step.result.loss,
        "lr": step.lr,
        "grad_norm": step.result.grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }
    if state.scaler.is_enabled():
        record["loss_scale"] = state.scaler.get_scale()
    peak = data_sheet_flops(state.model.device, state.dtype)  # of which the MFU is a share
    if peak is not None:
        length = step.window[0].tokens.shape[1]
        record["mfu"] = training_flops_per_token(state.model.config, length) * tokens / seconds / peak / world.size
    return record


def progress_bar(steps: int, state: TrainState) -> "tqdm[Any]":
    """Return a bar of all the steps of a run, some of which `state` has taken; only the main rank shows it."""
    hidden = not state.world.is_main
    return tqdm(total=steps, initial=state.step, unit="step", desc="training", dynamic_ncols=True, disable=hidden)


def say_what(bar: "tqdm[Any]", doing: str) -> None:
    """Show what is being done, at once on a terminal: in a file each time would be another line."""
    bar.set_description(doing, refresh=getattr(bar, "fp", None) is not None and bar.fp.isatty())


def show(bar: "tqdm[Any]", record: dict[str, Any]) -> None:
    """Advance the bar by one step, and show what it reports."""
    shown = {"loss": f"{record['loss']:.3f}", "tok/s": f"{record['tokens_per_second']:,.0f}"}
    if "validation_loss" in record:
        shown["validation"] = f"{record['validation_loss']:.3f}"
    bar.set_postfix(shown)
    bar.update()
