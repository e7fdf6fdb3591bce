"""Paths that a model cannot have: a folder may come from others, and a link in it could lead anywhere on this disk.

Read next: `formats/`.
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path

from minift.errors import InputError


def check_links(folder: Path, names: Collection[str] = ()) -> None:
    """Raise InputError for a link to a file outside of its folder.

    In a snapshot of Hugging Face's cache, links to the `blobs` of the same repository are how it is made.

    Args:
        names: the files that count; by default all.
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

    In a locale of another encoding, Python takes the same bytes for other characters.
    """
    encoding = sys.getfilesystemencoding()
    try:
        same = str(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        same = False
    if not same and encoding == "utf-8":
        raise InputError(f"{path}: this name is not UTF-8, and PyTorch cannot open such a file; rename it")
    if not same:
        raise InputError(f"{path}: PyTorch opens names in UTF-8, but this locale's are {encoding}; set PYTHONUTF8=1")
