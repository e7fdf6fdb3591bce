"""The exception for a user's mistake: what was wrong, where, and what to do, in one line.

The command line prints an `InputError` as a single line and exits with code 2; any other exception is a defect of
minift itself and keeps its traceback. Library callers can catch it as a `ValueError`. Read next: `values.py`.
"""

import re
from importlib import import_module
from types import ModuleType

# Of each extra, as in pyproject.toml.
_PACKAGES = {"hf": ("safetensors", "tokenizers"), "plot": ("matplotlib",), "zstd": ("zstandard",)}


LONGEST = 1_000  # characters of a line; a file may hold a megabyte where a number should be


class InputError(ValueError):
    """Wrong input: a file, a record, a flag or a value. The message is one line that names the culprit."""


class RunError(RuntimeError):
    """A run that cannot go on although its input was in order: a loss that is not a number, a full disk.

    The command line prints it as a single line and exits with code 1.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Python and PyTorch's GPUs have an error for it; of a CPU's PyTorch only has words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and "allocate memory" in str(error)


def out_of_memory(error: BaseException) -> str:
    """What to say of an error that `is_out_of_memory`: on one line, how much was asked for, if that is known."""
    tried = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if tried is None:
        return "out of memory"
    amount, unit = tried.groups()
    return f"out of memory: {f'{int(amount):,} bytes' if unit == 'bytes' else f'{amount} {unit}'} more could not be had"


def one_line(text: object) -> str:
    """Words on one line of at most LONGEST characters: more are left out of its middle.

    Characters that a terminal would obey or hide (they may come from a file) are spelled out.
    """
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[3 - LONGEST // 2 :]}"


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
