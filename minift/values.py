"""Plain values from files and flags: a JSON object, a number within its bounds, a dataclass's fields.

A wrong value is refused with its name and place; nothing is guessed.

Read next: `shape.py`.
"""

import json
import math
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from minift.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 2**28  # bytes: a device without an end is not read until memory is gone
_Fields = TypeVar("_Fields")  # some dataclass


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError when it is missing, too large, not JSON, or not an object."""
    path = Path(path)
    try:
        content = bytearray()
        with path.open("rb") as file:  # in blocks: to read up to a bound at once would allocate that much
            while len(content) <= LARGEST_JSON and (block := file.read(2**20)):
                content += block
        if len(content) > LARGEST_JSON:
            raise InputError(f"{path}: larger than {size(LARGEST_JSON)}, the most that is read as JSON")
        values = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        raise InputError(f"{path}:{line}: not valid JSON: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def check_number(
    name: str, value: float, *, above: float | None = None, least: float | None = None, below: float | None = None
) -> None:
    """Raise InputError unless `value` is finite, more than `above`, at least `least`, and less than `below`.

    An integer must also be below 2³¹ in absolute value.
    """
    if isinstance(value, int) and abs(value) >= 2**31:
        raise InputError(f"{name} is {value}; it must be below {2**31}")
    if not math.isfinite(value):
        raise InputError(f"{name} is {value}; it must be a finite number")
    if above is not None and not value > above:
        raise InputError(f"{name} is {value}; it must be more than {above:g}")
    if below is not None and not value < below:
        raise InputError(f"{name} is {value}; it must be below {below}")
    if least is not None and not value >= least:
        raise InputError(f"{name} is {value}; it must be at least {least:g}")


def build(cls: type[_Fields], values: dict[str, Any], where: str) -> _Fields:
    """Build a dataclass from plain values, such as those of a JSON object.

    Args:
        where: the file or place that holds the values, for messages.

    Raises:
        InputError: for a key that is not a field, a value of another type, or a value that the class refuses.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(hints)}")
    for name, value in values.items():
        is_tuple = get_origin(hints[name]) is tuple  # of texts, which the class itself looks at
        kinds = (tuple,) if is_tuple else get_args(hints[name]) or (hints[name],)
        allowed: tuple[type, ...] = tuple(get_origin(kind) or kind for kind in kinds)  # tuple[int, ...]: tuple
        if float in allowed:
            allowed = (*allowed, int)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            types = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise InputError(f"{where}: {name} is {value!r}; it must be {types}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def size(nbytes: float) -> str:
    """Return a number of bytes in decimal units: 13_476_831_232 → "13.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1_000
    return f"{nbytes:.3g} TB"


def check_ids(ids: "Tensor", vocab_size: int) -> None:
    """Raise InputError for an id outside the vocabulary. Only on a CPU: to look at ids on a GPU is to wait for it."""
    if ids.device.type == "cpu" and ids.numel():
        for id in ids.aminmax():
            if not 0 <= id < vocab_size:
                raise InputError(f"token id {int(id)} is outside the model's vocabulary of {vocab_size}")
