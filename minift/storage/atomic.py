"""Files and folders that are either complete or not there: written under another name, flushed to disk, then renamed.

When the process is killed on the way, or the disk is full, what was there before is still there. What is left under the
other name is removed by the next run.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minift.errors import RunError
from minift.storage.system import flush_path, move


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` to fill a new folder, flush it to disk, then rename it to `folder`, which it replaces.

    After an error nothing new is left on the disk.

    Raises:
        RunError: when the disk refuses.
    """
    partial = partial_name(folder)
    with _removed_after_error(folder, lambda: shutil.rmtree(partial, ignore_errors=True)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in (*partial.iterdir(), partial):
            flush_path(file)
        if folder.exists():
            _replace(folder, partial)
        else:
            move(partial, folder)
        flush_path(folder.parent)


def write_file(file: Path, write: Callable[[Path], Any], then: Callable[[], Any] = lambda: None) -> None:
    """Call `write` to make a new file, flush it to disk, call `then`, and rename the new file to `file`.

    Raises:
        RunError: when the disk refuses.
    """
    partial = partial_name(file)
    with _removed_after_error(file, lambda: partial.unlink(missing_ok=True)):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write(partial)
        flush_path(partial)
        then()
        move(partial, file, replace=True)
        flush_path(file.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there. What is half removed does not have its name.

    Raises:
        RunError: when the disk refuses.
    """
    renamed = folder.with_name(f".{folder.name}.old")
    try:
        move(folder, renamed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{folder}: cannot be removed: {error.strerror or error}") from None
    shutil.rmtree(renamed, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Return the name that a file or folder has until it is complete."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _removed_after_error(target: Path, remove: Callable[[], None]) -> Iterator[None]:
    """After an error in here, call `remove`, and remove the folders that were made for `target`.

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
    """Rename `new` to `folder`. At every moment the old or the new one is complete on the disk, under some name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    move(folder, old)
    try:
        move(new, folder)
    except OSError:
        move(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
