"""Optional packages, imported where they are used, and named when they are missing. Read next: `config.py`."""

from importlib import import_module
from types import ModuleType

from minift.errors import InputError

# Of each extra, as in pyproject.toml.
_PACKAGES = {"hf": ("safetensors", "tokenizers"), "plot": ("matplotlib",), "zstd": ("zstandard",)}


def need(package: str, extra: str, what: str) -> ModuleType:
    """The module of an optional package.

    Args:
        extra: the name of minift's extra that brings the package.
        what: what cannot be read or written without it, for the message.

    Raises:
        InputError: when it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise InputError(
            f"{what} needs the package {package}: pip install {' '.join(_PACKAGES[extra])} (the extra minift[{extra}])"
        ) from None
