"""Checksums of what minift saves, so that a damaged file is named before it is used.

They are in the same folder as the files, in a format that `sha256sum -c SHA256SUMS` checks, too.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minift.errors import InputError, one_line

CHECKSUMS = "SHA256SUMS"  # the name of their file


def check_model(path: str | Path) -> None:
    """Compare a model that minift has saved with the checksums in its folder. A model without checksums passes.

    Args:
        path: the model's folder; of a model that is one file, that file: then only it is compared.

    Raises:
        InputError: for a damaged or missing file, by name.
    """
    path = Path(path)
    sums = (path.parent if path.is_file() else path) / CHECKSUMS
    if not sums.is_file():
        return
    with readable_checksums(sums):
        listed = read_checksums(sums)
        if path.is_file():
            listed = {name: listed[name] for name in {path.name} & set(listed)}
        for name in listed:
            if Path(name).name != name or not (sums.parent / name).is_file():
                raise InputError(f"{sums.parent / one_line(name)}: missing, but {CHECKSUMS} lists it")
        check_files(listed, sums.parent)


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder into the folder."""
    sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(sums), encoding="utf-8", newline="\n")  # as `sha256sum` reads it


def read_checksums(sums: Path) -> dict[str, str]:
    """Return the checksums in a file, by the names of their files. Raises ValueError for a line that is no pair."""
    return dict(line.split("  ", 1)[::-1] for line in sums.read_text(encoding="utf-8").split("\n")[:-1])


def check_files(listed: dict[str, str], folder: Path) -> None:
    """Raise InputError for the first file of a folder whose checksum is not the one in `listed`."""
    for name, checksum in listed.items():
        if _sha256(folder / name) != checksum:
            remedy = f"restore it, or remove {CHECKSUMS} if you have changed it"
            raise InputError(f"{folder / name}: damaged, or changed: its checksum is not that of {CHECKSUMS}; {remedy}")


@contextmanager
def readable_checksums(sums: Path) -> Iterator[None]:
    """Raise InputError, with the file's name, when a file cannot be read in here or `sums` holds no checksums."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or sums}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # not UTF-8, or a line that is no pair
        raise InputError(f"{sums}: damaged: not lines of a checksum and a name") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
