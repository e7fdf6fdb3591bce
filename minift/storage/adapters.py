"""An adapter's folder: how it is told from a model's, and where the model is that it belongs to.

The adapter itself, and what it does to a model, is in `lora.py`. Read next: `tokenizer/base.py`.
"""

import os
from pathlib import Path

from minift.config import model_path
from minift.errors import InputError
from minift.values import read_json

ADAPTER_FILE = "adapter_config.json"  # as `peft` calls it


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's, and no model's."""
    return (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file()


def base_of(folder: Path) -> Path:
    """Where the model of an adapter is; it may be one with an adapter itself.

    Raises:
        InputError: when the config does not say, or an adapter is, by way of others, its own base.
    """
    base, seen = _base(folder), {folder.resolve()}
    other = base
    while is_adapter(other):
        if other.resolve() in seen:
            raise InputError(f"{folder / ADAPTER_FILE}: base_model_name_or_path leads back to {other}")
        seen.add(other.resolve())
        other = _base(other)
    return base


def _base(folder: Path) -> Path:
    where = folder / ADAPTER_FILE
    base = read_json(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: base_model_name_or_path does not name the adapter's model")
    path = model_path(base)
    if not os.path.exists(path):  # unlike Path.exists, it takes any text: a name that is too long, half a character
        raise InputError(f"{where}: base_model_name_or_path: {path}: no such file or folder")
    return path
