"""What one operating system has and another lacks: each difference is here, with what takes its place.

The tests run on Linux. `tests/hostile/test_other_systems.py` takes away what Windows and macOS lack, and runs the
commands without it. (A terminal's differences are in `cli/streams.py`, that of the C library in `kernels/malloc.py`.)
"""

import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WINDOWS = os.name == "nt"
# Windows neither renames nor removes a file that is open or mapped into memory, nor a folder that holds one.
MOVES_OPEN_FILES = not WINDOWS
PATIENCE = 2.0  # seconds: on Windows a virus scanner opens what has just been written, and closes it soon

_PLAIN_WORD = re.compile(r"[\w+=:./\\-]+")  # means itself in both shells of Windows, cmd and PowerShell
_DEVICES = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])\s*(?:\..*)?", re.IGNORECASE)


# Files ----------------------------------------------------------------------------------------------------------------


def lock(descriptor: int) -> None:
    """Lock an open file, until it is closed or the process ends.

    Raises:
        BlockingIOError, PermissionError: when another process has locked it. (POSIX allows either.)
    """
    if fcntl is not None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def flush(descriptor: int) -> None:
    """Flush an open file to the disk itself. On macOS, `fsync` alone leaves it in the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system that does not know it: a network's
            pass
    os.fsync(descriptor)


def flush_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. (Windows opens no folder, and keeps a journal of names.)"""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes what may be written
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def move(path: Path, target: Path, replace: bool = False) -> None:
    """Rename a file or folder to a name that is free, or with `replace` a file to one that may be there.

    On Windows, wait for programs that have it open for a moment.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            path.replace(target) if replace else path.rename(target)
            return
        except PermissionError:
            if MOVES_OPEN_FILES or time.monotonic() > end:
                raise
            time.sleep(0.05)


def forbidden_part(path: PurePath) -> str | None:
    """Return the part of a path that Windows would take for something else; None where there is none.

    A colon begins a stream of a file, a dot or space at the end is dropped, and some names are devices in every folder.
    """
    for part in path.parts:
        colon = ":" in part and part != path.anchor
        if colon or part not in (part.rstrip(". "), ".", "..") or _DEVICES.fullmatch(part):
            return part
    return None


# Processes and words --------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forks() -> bool:
    """Return whether a new process is a copy of this one.

    Where it is not, it takes seconds to import torch, and it imports the user's script again.
    """
    import multiprocessing

    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"


def command_line(words: Sequence[str], windows: bool = WINDOWS) -> str:
    """Return a command as it is typed in this system's shell: with quotes where a word needs them."""
    return " ".join(map(_quoted, words)) if windows else shlex.join(words)


def _quoted(word: str) -> str:
    """Return a word in double quotes, unless it needs none.

    Source: "Parsing C++ command-line arguments", in Microsoft's documentation of C++.
    """
    if _PLAIN_WORD.fullmatch(word):
        return word
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", word)) + '"'
