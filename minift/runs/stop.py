"""Ctrl-C and SIGTERM: they end a run after the step that is being taken, and its state is saved."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTER_STEP = "stopping after this step, then saving (once more: without this step)"
AFTER_FINAL = "stopping when final/ is saved"
WITHIN_STEP = "stopping now, then saving"
SAVING = "already stopping; what is being done has to be finished"


class StopSignal:
    """A request to stop, which the loop reads between two steps. A second signal interrupts what may be interrupted.

    What a signal does is said at once.

    Attributes:
        requested: True from the first signal on.
        first: what is said at the first one.
    """

    def __init__(self, first: str = AFTER_STEP, quiet: bool = False) -> None:
        """Prepare for signals.

        Args:
            first: what is said at the first one.
            quiet: say nothing, because another process of the run does.
        """
        self.requested = False
        self.first = first
        self._quiet, self._may_interrupt = quiet, False
        self._handling = ExitStack()

    def __enter__(self) -> "StopSignal":
        self._handling.enter_context(handled_by(self._handle))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.close()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a second signal raise KeyboardInterrupt in the block, until `hold` is called."""
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False

    def hold(self, *_: Any) -> None:
        """Let nothing interrupt what follows: an update of the weights. It is called as the optimizer's hook."""
        self._may_interrupt = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._say(self.first)
        elif self._may_interrupt:
            self._may_interrupt = False
            self._say(WITHIN_STEP)
            raise KeyboardInterrupt
        else:
            self._say(SAVING)

    def _say(self, text: str) -> None:
        """Write a line to standard error, past Python's buffers: the signal may have come while one is written."""
        if not self._quiet:
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


@contextmanager
def ended_at_once() -> Iterator[None]:
    """End the process, with a line, when a signal comes in the block: a library that is being imported may swallow it.

    Nothing is cleaned up, so the block must write nothing.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, b"minift: interrupted\n")
        os._exit(1)

    with handled_by(end):
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handled_by(interrupt):
        yield


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Let a handler take both signals in the block. Python sets handlers in the main thread only."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in SIGNALS} if in_main_thread else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
