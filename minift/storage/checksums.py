"""Checksums of what minift saves, so that a damaged file is named before anything is done with it.

They lie beside the files, and are held against them by `sha256sum -c SHA256SUMS`, too. Read next: `checkpoint.py`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minift.errors import InputError, one_line

CHECKSUMS = "SHA256SUMS"  # the file of them


def check_model(path: str | Path) -> None:
    """Hold a model that minift has saved against the checksums in its folder. Others come without, and pass.

    Raises:
        InputError: for a damaged or missing file, by name.
    """
    sums = Path(path) / CHECKSUMS
    if not sums.is_file():
        return
    with readable_checksums(sums):
        listed = read_checksums(sums)
        for name in listed:
            if Path(name).name != name or not (sums.parent / name).is_file():
                raise InputError(f"{sums.parent / one_line(name)}: missing, but {CHECKSUMS} lists it")
        hold_against(listed, sums.parent)


def write_checksums(folder: Path) -> None:
    """Write those of all files of a folder into it."""
    sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(sums), encoding="utf-8")


def read_checksums(sums: Path) -> dict[str, str]:
    """The checksums in a file, by the names that they belong to. Raises ValueError for a line that is no such pair."""
    return dict(line.split("  ", 1)[::-1] for line in sums.read_text(encoding="utf-8").split("\n")[:-1])


def hold_against(listed: dict[str, str], folder: Path) -> None:
    """Raise InputError for the first file of a folder that has another checksum than `listed` has under its name."""
    for name, checksum in listed.items():
        if _sha256(folder / name) != checksum:
            raise InputError(f"{folder / name}: damaged, or changed: its checksum is not that of {CHECKSUMS}")


@contextmanager
def readable_checksums(sums: Path) -> Iterator[None]:
    """Raise InputError, by name, when a file cannot be read in here, or the checksums are none."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or sums}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # not UTF-8, or a line that is no pair
        raise InputError(f"{sums}: damaged") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
