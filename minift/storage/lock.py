"""A lock on a run's folder, so that a second run cannot mix its files into it.

It is a lock of the operating system on a file in the folder. The system releases it when the process ends, in any way,
so a run that was killed leaves nothing to unlock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minift.errors import InputError
from minift.storage import system

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in here. The folder is made if it is not there, and removed again if it stays empty.

    Raises:
        InputError: when another process holds the lock, or a file cannot be made there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / LOCK)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if not system.MOVES_OPEN_FILES:  # there it is the system that keeps the file, if another run has opened it
            os.close(lock)
        with suppress(OSError):
            (folder / LOCK).unlink()  # before the lock is released, so that the next process finds no file
        if system.MOVES_OPEN_FILES:
            os.close(lock)
        with suppress(OSError):
            for path in made:  # innermost first, up to one that holds something
                path.rmdir()


def _lock(file: Path) -> int:
    """Lock a file and return its descriptor. (Forked workers, which may outlive the run, inherit no POSIX lock.)"""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            system.lock(descriptor)
            if not system.MOVES_OPEN_FILES:
                return descriptor
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise InputError(
                f"{file.parent}: another run is writing it; wait for its end, or choose another --out"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held the lock has just ended and removed the file
