"""Exceptions for a user's mistake: what was wrong, where, and what to do, in one line.

The command line prints an `InputError` as one line and exits with code 2. Any other exception is a defect of minift
itself and keeps its traceback. A program that calls minift can catch an `InputError` as a `ValueError`.

Read next: `values.py`.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

_PACKAGES = {  # as pyproject.toml
    "hf": ("safetensors", "tokenizers"),
    "plot": ("matplotlib",),
    "zstd": ("zstandard",),
    "chat": ("jinja2",),
    "arrow": ("pyarrow",),
    "tensorboard": ("tensorboard",),
    "gpu": ("nvidia-ml-py",),
}
_OBEYED = re.compile(  # control characters but tab and line feed; marks of direction; line separators; invisible ones
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    r"|[\U000e0000-\U000e007f]"
)
LONGEST_LINE = 1_000  # characters of a message; a file may hold a megabyte where a number should be


class InputError(ValueError):
    """Wrong input: a file, a record, a flag or a value. The message is one line that names it."""


class RunError(RuntimeError):
    """A run that cannot go on although its input was right: a loss that is not a number, a full disk.

    The command line prints it as one line and exits with code 1.
    """


def one_line(text: object) -> str:
    """Return a text on one line of at most LONGEST_LINE characters; the middle of a longer one is left out.

    Characters that a terminal would obey or hide (the text may come from a file) are replaced by their escapes.
    """
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[3 - LONGEST_LINE // 2 :]}"


def printable(text: str) -> str:
    """Return a text with the characters spelled out that a terminal would obey, or show in another order or not at all.

    They are listed, not asked of `str.isprintable`: that refuses what joins the parts of an emoji or of a Persian word,
    and characters that are newer than Python's table.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the known word that a mistyped one resembles most; "" where none does."""
    near = get_close_matches(word, [name for name in known if name != word], 1, 0.7) if len(word) < 100 else []
    return f" (did you mean {near[0]}?)" if near else ""


def need(package: str, extra: str, what: str) -> ModuleType:
    """Import an optional package and return its module.

    Args:
        extra: the name of minift's extra that installs the package.
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. Only PyTorch on a CPU has no error class for it, so its message is read."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("allocate memory", "not enough memory")  # the second on Windows
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in said)


def out_of_memory(error: BaseException) -> str:
    """Return a message for an error that `is_out_of_memory`, with the size of the allocation if the error says it."""
    tried = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if tried is None:
        return "out of memory"
    amount, unit = tried.groups()
    size = f"{int(amount):,} bytes" if unit == "bytes" else f"{amount} {unit}"
    return f"out of memory: {size} more could not be allocated"
