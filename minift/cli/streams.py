"""Standard output and standard error may be closed, full, or pipes that nobody reads any more. The command line's are.

Where one is closed, it leads nowhere; or else the next file that is opened would take its place, and be printed into.
What standard error cannot take is dropped: a progress bar must not end a night of training. When standard output cannot
be written, the command ends with a line that says so. Its reader may leave (`| head`): that ends a command that only
shows something, and means nothing to one that trains. Read next: `cli/__init__.py`.
"""

import io
import os
import sys
from typing import Any, TextIO

from minift.errors import RunError


class _Stream(io.FileIO):
    """One of the two. What is written to it after a failure is dropped.

    Args:
        title: its name, for the message.
        forgiven: the errors of writing that nobody is told.
    """

    def __init__(self, number: int, title: str, forgiven: tuple[type[OSError], ...]):
        super().__init__(number, "w", closefd=False)
        self.title, self.forgiven = title, forgiven

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if isinstance(error, self.forgiven):
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise
            raise RunError(f"{self.title}: cannot be written: {error.strerror}") from None


def open_streams() -> None:
    """Make the two streams what the module's text says. Those of a notebook or a test are left alone."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
    sys.stdout = _opened(sys.stdout, sys.__stdout__, _Stream(1, "standard output", ()))
    sys.stderr = _opened(sys.stderr, sys.__stderr__, _Stream(2, "standard error", (OSError,)))


def _opened(stream: TextIO | None, first: TextIO | None, raw: _Stream) -> TextIO:
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")  # a terminal that has not every character gets its number instead
    if stream is not first:
        return stream
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)  # with `python -u` there is none
    return io.TextIOWrapper(
        buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def outlive_reader() -> None:
    """Go on when the reader of standard output has left. For a command that does more than to show something."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, _Stream):
        raw.forgiven = (BrokenPipeError,)
