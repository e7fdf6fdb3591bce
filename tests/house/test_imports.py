"""The layout of the package, read from its imports: what the root may import, that nothing runs in a circle, …

The root of `minift/` is the way from text to a changed weight, and reads without the wings that make it faster, run it,
show it or measure it. These tests read the source; nothing is imported.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "minift"
ROOM = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__") for name in ROOM.values()}
ROOT_FILES = sorted(path for path in ROOM if path.parent == PACKAGE and not path.name.startswith("__"))
APART = {"kernels", "runs", "look", "cli", "costs", "evaluation", "formats"}  # wings that the root does without
ALLOWED = {  # of them, what some files of the root open and call
    "checkpoint.py": {"formats"},
    "runner.py": {"formats", "runs", "evaluation", "kernels"},
    "generate.py": {"kernels"},
}


def imports(path: Path, late: bool = True) -> set[str]:
    """Return the modules of minift that a file imports, by their full names; late ones are those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if not late and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return (found & MODULES) - {"minift"}


def wing(module: str) -> str:
    parts = module.split(".")
    return parts[1] if (PACKAGE / parts[1]).is_dir() else ""


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_the_root_does_without_the_wings(path: Path) -> None:
    used = {wing(module) for module in imports(path)} & APART
    assert used <= ALLOWED.get(path.name, set())


def test_a_decoder_is_asked_of_the_kernels_in_one_late_import() -> None:
    path = PACKAGE / "generate.py"
    assert not {module for module in imports(path, late=False) if wing(module) == "kernels"}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "minift.kernels" in line]
    assert len(lines) == 1


@pytest.mark.parametrize("path", ROOM, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_imports_the_command_line(path: Path) -> None:
    if wing(ROOM[path]) == "cli" or path.name == "__main__.py":
        return
    assert not {module for module in imports(path) if wing(module) == "cli"}


def test_no_import_runs_in_a_circle() -> None:
    """Late imports included, but for the decoder's: kernels are made of the root's modules."""
    graph = {
        name.removesuffix(".__init__"): imports(path) - {name}
        for path, name in ROOM.items()
        if name != "minift.__init__"
    }
    graph["minift.generate"] -= {module for module in graph["minift.generate"] if wing(module) == "kernels"}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(graph.get(module, set())):
            walk(other, (*path, module))
        done.add(module)

    for module in graph:
        walk(module, ())


WINGS = sorted(path for path in ROOM if path.name == "__init__.py" and path.parent != PACKAGE)


@pytest.mark.parametrize("path", WINGS, ids=lambda path: path.parent.name)
def test_a_wing_begins_with_a_list_of_its_rooms(path: Path) -> None:
    """A docstring that names each file and folder of the wing, and at most one function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    rooms = [file.name for file in path.parent.glob("*.py") if file.name != "__init__.py"]
    rooms += [f"{folder.name}/" for folder in path.parent.iterdir() if (folder / "__init__.py").is_file()]
    assert [room for room in rooms if room not in text] == []
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(functions) <= 1


@pytest.mark.parametrize("path", ROOM, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_root_says_what_to_read_next(path: Path) -> None:
    says = "Read next" in path.read_text(encoding="utf-8")
    assert not says or path.parent == PACKAGE


def test_the_order_of_reading_is_one_line_through_the_root() -> None:
    """From `errors.py`, each file names the next, each once, and minift/README.md lists them in that order."""
    order, name = [], "errors.py"
    while name:
        assert name not in order
        order.append(name)
        text = (PACKAGE / name).read_text(encoding="utf-8")
        sentences = re.findall(r"Read next: ([^\n]*)", text)
        assert len(sentences) <= 1, name
        named = re.findall(r"`([\w/]+\.py)`", sentences[0]) if sentences else []
        order += named[:-1]  # rooms of a wing on the way
        name = named[-1] if named else ""
    assert sorted(file for file in order if "/" not in file) == [path.name for path in ROOT_FILES]
    assert all((PACKAGE / file).is_file() for file in order)
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \**`([\w/]+\.py)`\** \|", readme, re.MULTILINE) == order
    assert re.findall(r"^\| \*\*`([\w/]+)\.py`", readme, re.MULTILINE) == list(WAY)


@pytest.mark.parametrize("path", ROOM, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


# The way of one pair, from its text to a changed weight; and below, the lines that it may have.
WAY = ("prompts", "tokenizer/base", "tokenizer/sentencepiece", "pack", "model", "cache", "loss", "optim", "train")


def test_the_way_of_a_pair_is_short() -> None:
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in WAY}
    assert sum(lines.values()) <= 1_400
    assert lines["model"] <= 280
    assert lines["loss"] <= 90
    assert lines["train"] <= 230
