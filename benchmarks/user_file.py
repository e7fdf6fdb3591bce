"""Take a function from a file of the user's, which is run as a module of its own.

What the file or the function raises is said in one line, with the line of the file that it came from.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import InputError, did_you_mean, one_line


class WrongError(InputError):
    """A function of a user's file that breaks its contract: what it did, in one line."""


def load(place: str) -> Callable[..., Any]:
    """Return the function that "FILE.py:NAME" names, from a file that is run once.

    Raises:
        InputError: when there is no such file.
        WrongError: when the file cannot be run, or has no such function.
    """
    file, name = split(place)
    with said_of(file):
        module = _module(file)
    functions = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
    if name not in vars(module):
        raise WrongError(f"{file}: no function {name}{did_you_mean(name, functions)}; there is {_listed(functions)}")
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        raise WrongError(f"{file}: {name} is {kind_of(function)}, not a function")
    return function


def split(place: str) -> tuple[Path, str]:
    """Return the file and the name of "FILE.py:NAME". Raise InputError for other words, or when there is no file."""
    file, colon, name = place.rpartition(":")
    if not colon or not name.isidentifier():
        example = place if place.endswith(".py") else "my_norm.py"
        raise InputError(f"{one_line(place)}: expected FILE.py:NAME, for example {one_line(example)}:fast_norm")
    path = Path(file)
    if not path.is_file():
        near = did_you_mean(path.name, [one.name for one in path.parent.glob("*.py")])
        raise InputError(f"{one_line(file)}: no such file{near}")
    if path.suffix != ".py":
        raise InputError(f"{one_line(file)}: expected a Python file, FILE.py")
    return path, name


def _module(file: Path) -> Any:
    """Run a file as a module of its own."""
    name = f"added_{file.stem}_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and compilers look a function's module up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def said_of(file: Path, doing: str = "") -> Iterator[None]:
    """Raise what a user's code raises as a WrongError, with the last line of the file that it came from."""
    try:
        yield
    except WrongError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _is(frame.filename, file)]
        if isinstance(error, SyntaxError) and _is(error.filename or "", file):
            lines.append(error.lineno)
        text = one_line(str(getattr(error, "msg", error)).split("\n\n")[0].split(". ")[0]) or "no message"
        if "backward through the graph a second time" in text:
            text += ": it keeps a result of an earlier call"
        kind = "it ends the program by SystemExit" if isinstance(error, SystemExit) else type(error).__name__
        place = f"{file}:{lines[-1]}" if lines else str(file)
        raise WrongError(f"{place}: {doing}{kind}: {text}") from None


def _is(name: str, file: Path) -> bool:
    return Path(name) == file.resolve()


def _listed(names: list[str]) -> str:
    return one_line(", ".join(names[:8])) + (" …" if len(names) > 8 else "") if names else "none"


def kind_of(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
