"""The numbers of `metrics.jsonl` for TensorBoard, in OUT/tensorboard: one scalar for each of them, by step.

The file is written with TensorBoard's own record writer, in this thread: a line of `metrics.jsonl` and its events are
on the disk before a checkpoint of their step is, and a full disk is one error, at the step that met it. (The thread of
`torch.utils.tensorboard.SummaryWriter` would print a traceback of its own.)

    minift finetune --tensorboard && tensorboard --logdir runs        # needs the extra minift[tensorboard]
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minift.config import TrainConfig
from minift.runs.metrics import read_metrics
from minift.runs.progress import BEFORE
from minift.train import TrainState

FOLDER = "tensorboard"


class Events:
    """An events file that takes up what the steps of a run report.

    Args:
        folder: where the files of a run are; a resumed run adds one.
        step: the last step that counts. Events of later steps, in earlier files, are marked as void.

    Raises:
        OSError: when the disk refuses.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        number = max((_number(file) for file in folder.iterdir()), default=-1) + 1  # TensorBoard reads them by name
        self._file = (folder / f"events.out.tfevents.{number:06d}").open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a line of `metrics.jsonl`, and flush them. Raises OSError when the disk refuses."""
        values = dict(record)
        step, before = values.pop("step"), values.pop(BEFORE, None)
        if before is not None:  # the first step
            self._write(step=0, summary=self._summary(value=[self._value("validation_loss", before)]))
        numbers = [self._value(name, value) for name, value in values.items() if isinstance(value, int | float)]
        self._write(step=step, summary=self._summary(value=numbers))

    def close(self) -> None:
        """Close the file. What was added is in it already, or was refused then."""
        with suppress(OSError):
            self._file.close()

    def _value(self, name: str, value: float) -> Any:
        return self._summary.Value(tag=name, simple_value=value)

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


class NoEvents:
    """The events of a run that keeps none, or of a rank that writes none."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take up nothing."""

    def close(self) -> None:
        """Close nothing."""


def open_events(config: TrainConfig, out: Path, state: TrainState) -> Events | NoEvents:
    """Return the events of a run in `out`; where they begin later than the run, with those of its earlier steps.

    Raises:
        OSError: when the disk refuses.
    """
    if not config.tensorboard or not state.world.is_main:
        return NoEvents()
    first = not (out / FOLDER).is_dir()
    events = Events(out / FOLDER, state.step)
    metrics = out / "metrics.jsonl"
    for record in read_metrics(metrics) if first else []:
        events.add(record)
    return events


def _number(file: Path) -> int:
    return int(file.suffix[1:]) if file.suffix[1:].isdecimal() else -1
