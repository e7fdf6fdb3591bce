"""One run, one process: a folder that is being written is locked, so that a second run cannot mix its files into it.

The lock is the system's, on a file in the folder: it ends with the process that holds it, however that ends, so a run
that was killed never has to be unlocked. Read next: `runs/folder.py`.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minift.errors import InputError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for oneself while in here. It is made if need be, and removed again if nothing is put into it.

    Raises:
        InputError: when another process has it, or a file cannot be made there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(folder / LOCK)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # before it is given up: whoever takes it then finds that it is gone
        os.close(lock)
        with suppress(OSError):
            for path in made:  # innermost first, up to one that holds something
                path.rmdir()


def _take(file: Path) -> int:
    """The descriptor of a locked file. (POSIX locks are not passed on to forked workers, which may outlive the run.)"""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except (BlockingIOError, PermissionError):  # the two that POSIX allows
            os.close(descriptor)
            raise InputError(
                f"{file.parent}: another run is writing it; wait for its end, or choose another --out"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that had it has just ended, and removed it
