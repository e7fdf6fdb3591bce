"""The numbers of `metrics.jsonl` for TensorBoard, in OUT/tensorboard: one scalar for each of them, by step.

The file is written with TensorBoard's own record writer, in this thread: a line of `metrics.jsonl` and its events are
on the disk before a checkpoint of their step is, and a full disk is one error, at the step that met it. (The thread of
`torch.utils.tensorboard.SummaryWriter` would print a traceback of its own.)

    minift finetune --tensorboard && tensorboard --logdir runs        # needs the extra minift[tensorboard]
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minift.config import TrainConfig
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
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._write(step=record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file. What was added is in it already, or was refused then."""
        with suppress(OSError):
            self._file.close()

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
    for line in metrics.read_text(encoding="utf-8").splitlines() if first and metrics.is_file() else []:
        events.add(json.loads(line))
    return events


def _number(file: Path) -> int:
    return int(file.suffix[1:]) if file.suffix[1:].isdecimal() else -1
