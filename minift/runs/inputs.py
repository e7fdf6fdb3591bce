"""Name a run's inputs such that it is resumed from any folder: their paths are recorded as absolute ones.

What is no place on this disk stays as it is: a preset, "bundled", a name on Hugging Face's hub, standard input. On this
a run can be resumed only if the same data come again.
"""

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minift.errors import InputError
from minift.storage.names import is_hub_name

MODELS = ("model", "tokenizer")
DATA = ("data", "test", "validation")
PATHS = (*MODELS, *DATA, "config", "template")
TEMPLATES = (".txt", ".jinja")  # the ends of the name of a template that is a file


def from_anywhere(name: str, value: Any) -> Any:
    """Return an input as any folder understands it: a path or glob, or a list of them, is made absolute.

    Args:
        name: the input's name. Those of PATHS are paths, unless they name what is no place on this disk.
    """
    if isinstance(value, list | tuple):
        return [from_anywhere(name, item) for item in value]
    if not is_path(name, value):
        return value
    here = os.getcwd()
    if name in DATA and not os.path.exists(value):  # a glob, but nothing in the folder's name is a pattern
        here = glob.escape(here)
    return os.path.join(here, value)


def same_input(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of an input are the same: as paths, they may be written in different ways."""
    one, other = from_anywhere(name, one), from_anywhere(name, other)
    if one == other or name not in PATHS or type(one) is not type(other):
        return bool(one == other)
    return _real(name, one) == _real(name, other)


def check_there(inputs: Mapping[str, Any], settings: Path) -> None:
    """Raise InputError unless the files that a run was begun with are where its config.json, `settings`, says.

    Where one is standard input, print what is expected there.
    """
    for name, value in inputs.items():
        if name in DATA and "-" in value:
            print("note: the run reads standard input, and needs the same data there again, from the first record on")
        for text in [value] if isinstance(value, str) else value or ():
            if not is_path(name, text) or os.path.exists(text) or (name in DATA and glob.glob(text, recursive=True)):
                continue
            place = f"write its new place into {settings}"
            if os.path.isabs(text):
                raise InputError(f"{text}: no such file; the run was begun with it: put it back, or {place}")
            begun = f"no such file in {os.getcwd()}; the run was begun in another folder: resume it there"
            raise InputError(f"{text}: {begun}, or {place}")


def is_path(name: str, value: Any) -> bool:
    """Return whether an input is a place on this disk: not a preset, "bundled", a hub's name, standard input …"""
    if name not in PATHS or not isinstance(value, str) or not value:
        return False
    if name in MODELS:
        return value != "bundled" and not is_hub_name(value)
    if name == "template":
        return value.endswith(TEMPLATES)
    return value.endswith(".json") if name == "config" else value != "-"


def _real(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_real(name, item) for item in value]
    return os.path.realpath(value) if is_path(name, value) else value
