"""Paths that a model cannot have: a link that leads out of its folder, and a name that is not UTF-8."""

import os
import sys
from collections.abc import Collection
from pathlib import Path

from minift.errors import InputError
from minift.storage.system import WINDOWS, forbidden_part


def check_links(folder: Path, names: Collection[str] = ()) -> None:
    """Raise InputError for a link in `folder` to a file outside of it: it could lead to any file of this disk.

    A snapshot in Hugging Face's cache consists of links to the `blobs` of the same repository; these are allowed.

    Args:
        names: the names of the files to check; by default all.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for entry in folder.iterdir():
        if entry.is_symlink() and entry.is_file() and (not names or entry.name in names):
            target = entry.resolve()
            if not any(target.is_relative_to(place) for place in inside):
                raise InputError(f"{entry}: is a link that leads out of its folder, to {target}; copy the file there")


def check_name(path: Path) -> None:
    """Raise InputError for a path that is not UTF-8: Python can open it, but PyTorch and safetensors cannot.

    In a locale with another encoding, Python reads the same bytes as other characters. On Windows, names that it would
    change are refused, too.
    """
    if WINDOWS and (part := forbidden_part(path)):
        raise InputError(f"{path}: Windows takes {part!r} for something else than a file's name; choose another")
    encoding = sys.getfilesystemencoding()
    try:
        same = str(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        same = False
    if not same and encoding == "utf-8":
        raise InputError(f"{path}: this name is not UTF-8, and PyTorch cannot open such a file; rename it")
    if not same:
        raise InputError(f"{path}: PyTorch opens names in UTF-8, but this locale's are {encoding}; set PYTHONUTF8=1")
