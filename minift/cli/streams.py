"""Standard output and standard error, which may be closed, full, or pipes that have lost their reader.

* A closed stream leads nowhere. Left closed, its number would go to the next file that is opened, and what is printed
  would be written into that file.
* What standard error cannot take is dropped: a progress bar must not end a night of training.
* When standard output cannot be written, the command ends with a line that says so.
* What comes from data, models and names is shown, never obeyed: characters that would move a terminal's cursor, ring
  its bell or turn the direction of a line are spelled out (`errors.printable`). All that is printed passes here, so no
  command can forget it. What has to be exact is written by `write_exact`.
* A console of Windows is written to in Unicode, whatever its code page is.
* When the reader of standard output has left (`| head`), a command that only shows something ends, and one that trains
  goes on.
"""

import errno
import io
import os
import stat
import sys
from typing import Any, TextIO

from minift.errors import RunError, printable

_STANDARD_OUTPUT, _ESCAPE_SEQUENCES = -11, 4  # of Windows: GetStdHandle, and a mode of SetConsoleMode


class _Stream(io.FileIO):
    """Standard output or standard error. What is written to it after a failure is dropped.

    Args:
        title: its name, for the message.
        ignored: the errors of writing that are not reported.

    Attributes:
        console: writes to a console of Windows, in place of the file.
    """

    console: Any = None

    def __init__(self, number: int, title: str, ignored: tuple[type[OSError], ...]):
        super().__init__(number, "w", closefd=False)
        self.title, self.ignored = title, ignored

    def write(self, data: Any) -> int:
        try:
            written: int = super().write(data) if self.console is None else self.console.write(data)
            return written
        except OSError as error:
            if error.errno == errno.EINVAL and stat.S_ISFIFO(os.fstat(self.fileno()).st_mode):  # so Windows says it
                error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            self.console = None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if isinstance(error, self.ignored):
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise error from None
            raise RunError(f"{self.title}: cannot be written: {error.strerror}") from None


class _Text(io.TextIOWrapper):
    """The text of standard output or standard error, with what a terminal would obey spelled out.

    Attributes:
        redraws: whether a progress bar is drawn here. A carriage return that begins a text goes through then.
    """

    redraws = False

    def write(self, text: str, /) -> int:
        start = "\r" if self.redraws and text.startswith("\r") else ""
        super().write(start + printable(text[len(start) :]))
        return len(text)

    def write_exact(self, text: str) -> None:
        """Write a text as it is."""
        super().write(text)


def write_exact(text: str) -> None:
    """Write a text to standard output as it is, at once: a model's words for another program, or colours."""
    if isinstance(sys.stdout, _Text):
        sys.stdout.write_exact(text)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def open_streams() -> None:
    """Make the two streams behave as this file says. Those of a notebook or a test stay as they are."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
    sys.stdout = _wrap(sys.stdout, sys.__stdout__, _Stream(1, "standard output", ()))
    sys.stderr = _wrap(sys.stderr, sys.__stderr__, _Stream(2, "standard error", (OSError,)))
    if isinstance(sys.stderr, _Text):
        sys.stderr.redraws = True


def _wrap(stream: TextIO | None, original: TextIO | None, raw: _Stream) -> TextIO:
    """Return a stream that writes by `raw`; `stream` itself where it is not the `original` one of this process."""
    if stream is None:
        return _Text(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")  # a character that the terminal does not have is escaped
    if stream is not original:
        return stream
    found: Any = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(found, io.FileIO):
        raw.console = found
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)  # with `python -u` there is none
    return _Text(
        buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def shows_colours() -> bool:
    """Return whether standard output is a terminal that shows colours, and its user wants them (no-color.org).

    A console of Windows shows them once it is told to.
    """
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return False
    import ctypes

    if not hasattr(ctypes, "WinDLL"):
        return True
    kernel, mode = ctypes.WinDLL("kernel32"), ctypes.c_ulong()
    console = kernel.GetStdHandle(_STANDARD_OUTPUT)
    known = kernel.GetConsoleMode(console, ctypes.byref(mode))
    return bool(known and kernel.SetConsoleMode(console, mode.value | _ESCAPE_SEQUENCES))


def outlive_reader() -> None:
    """Go on when the reader of standard output has left: for a command that does more than show something."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, _Stream):
        raw.ignored = (BrokenPipeError,)
