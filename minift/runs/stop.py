"""Ctrl-C and SIGTERM: they end a run after the step that is being taken, and its state is saved."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """A request to stop, which the loop reads between two steps. A second signal interrupts at once.

    Attributes:
        requested: True from the first signal on.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other thread
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._handlers_before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
