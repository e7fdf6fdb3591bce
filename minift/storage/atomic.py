"""Files and folders that are either whole or not there: written under another name, flushed to the disk, then renamed.

A process that is killed in between, or a disk that is full, leaves what was there before. What is left under the other
name is removed by the next run. Read next: `checkpoint.py`.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minift.errors import RunError


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, flush it to the disk, then give it its name.

    Whatever goes wrong, nothing new is left behind. Raises RunError when the disk refuses.
    """
    partial = partial_name(folder)
    with _nothing_left(folder, lambda: shutil.rmtree(partial, ignore_errors=True)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in (*partial.iterdir(), partial):
            _sync(file)
        if folder.exists():
            _replace(folder, partial)
        else:
            partial.rename(folder)
        _sync(folder.parent)


def write_file(file: Path, write: Callable[[Path], Any], then: Callable[[], Any] = lambda: None) -> None:
    """Let `write` make a file beside `file`, flush it to the disk, call `then`, and give it its name.

    Raises:
        RunError: when the disk refuses.
    """
    partial = partial_name(file)
    with _nothing_left(file, lambda: partial.unlink(missing_ok=True)):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write(partial)
        _sync(partial)
        then()
        partial.replace(file)
        _sync(file.parent)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run had begun to write, or to remove."""
    for pattern in (".*.partial", ".*.old"):
        for left in run.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def partial_name(path: Path) -> Path:
    """Where a file or folder is while it is being written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _nothing_left(target: Path, remove: Callable[[], None]) -> Iterator[None]:
    """Whatever goes wrong in here, remove what was begun, and the folders that were made for it.

    Raises:
        RunError: for an OSError.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            remove()
        with suppress(OSError):
            for folder in made:  # innermost first, up to one that holds something or is not there
                folder.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
        raise


def _replace(folder: Path, new: Path) -> None:
    """Give `new` the name of `folder`, which is whole under one name or another at every moment."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
