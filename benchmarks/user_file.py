"""Take a function from a file of the user's, which is run as a module of its own.

What the file or the function raises is said in one line, with the line of the file that it came from.
"""

import ast
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import InputError, did_you_mean, one_line

# What binds its names for itself alone, and a class, which is no function.
_INSIDE = ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


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
    if name not in vars(module):
        raise _missing(file, name)
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        raise WrongError(f"{file}: {name} is {kind_of(function)}, not a function")
    return function


def check_named(place: str) -> None:
    """Raise WrongError unless a file can be parsed, and binds the name of "FILE.py:NAME"; the file is not run.

    A name that the file imports is there, but is not listed as one of its own. Where a file imports all names of
    another (`import *`), only running it tells.

    Raises:
        InputError: when there is no such file.
    """
    file, name = split(place)
    bound = names_in(file)
    if name not in bound and "*" not in bound:
        raise _missing(file, name)


def _missing(file: Path, name: str) -> WrongError:
    own = [known for known, function in names_in(file).items() if function and not known.startswith("_")]
    return WrongError(f"{file}: no function {name}{did_you_mean(name, own)}; there is {_listed(own)}")


def submissions(folder: str) -> tuple[list[Path], dict[Path, str]]:
    """Return the Python files of a folder in order, and what has such a name and cannot be read, with the reason.

    Names that begin with "_" or "." are left out.

    Raises:
        InputError: when there is no such folder, or no file in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--rank {one_line(folder)}: no such folder")
    found = sorted(file for file in Path(folder).glob("*.py") if file.name[0] not in "_.")
    reasons = {file: _why_unreadable(file) for file in found}
    refused = {file: reason for file, reason in reasons.items() if reason}
    files = [file for file in found if file not in refused]
    if not files:
        others = "".join(f"; {one_line(file.name)} {reason}" for file, reason in refused.items())
        raise InputError(f"--rank {one_line(folder)}: no file NAME.py in it{others}")
    return files, refused


def _why_unreadable(file: Path) -> str:
    """Return the reason why a file cannot be read; "" where it can."""
    if file.is_dir():
        return "is a folder, not a file"
    if file.is_symlink() and not file.exists():
        return f"is a link to {one_line(file.readlink())}, which is not there"
    if not file.is_file():
        return "is not a file"
    try:
        file.open("rb").close()
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


def names_in(file: Path) -> dict[str, bool]:
    """Return the names that a file binds at its top level, and whether each may be a function of the file's own.

    Raises:
        WrongError: when the file cannot be read or parsed.
    """
    with said_of(file):
        page = ast.parse(file.read_bytes(), str(file.resolve()))
        return dict(_bound(page))


def _bound(node: ast.AST, function: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield the names that a statement binds, those in an `if` or a `try` too."""
    if isinstance(node, ast.FunctionDef):
        yield node.name, True
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0], False
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, function
    elif not isinstance(node, _INSIDE):
        plain = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for child in ast.iter_child_nodes(node):
            yield from _bound(child, not plain)


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
        if isinstance(error, SyntaxError) and error.lineno and _is(error.filename or "", file):
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
    """Return what a value is, with its article: "None", "an int", "a Parameter"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name.startswith((*'aeioAEIO', 'nd')) else 'a'} {name}"
