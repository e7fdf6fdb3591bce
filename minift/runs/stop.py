"""Ctrl-C and SIGTERM, which end a run between two steps and not in the middle of one. Read next: `train.py`."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request that the loop reads between steps. A second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only there may Python set handlers
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
