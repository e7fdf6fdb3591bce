"""The promise that private and undocumented names of PyTorch are used in `kernels/` alone.

There each of them is behind a check that falls back to the plain twin (`kernels/test_private_names.py`). The only other
ones are names that a file format itself holds: a pickle names the functions that rebuild its tensors.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

MINIFT = ROOT / "minift"
FILES = sorted(path for path in MINIFT.rglob("*.py") if "kernels" not in path.relative_to(MINIFT).parts)
IN_A_FILE_FORMAT = {
    ("formats/pt_file.py", "torch._utils._rebuild_tensor_v2"),
    ("distributed/shards.py", "_get_layout"),  # of torch.serialization
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(source: str) -> Iterator[str]:
    """Yield the private names of PyTorch in a source, and those of its operators, as they are written there."""
    tree = ast.parse(source)
    roots = {"torch"}  # the names by which the file knows PyTorch, or something of it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            roots |= {alias.asname or "torch" for alias in names}
            yield from (alias.name for alias in names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (
                    any(map(is_private, full.split(".")))
                    or full.startswith("torch.ops")
                    or alias.name == "is_compiling"
                ):
                    yield full
    inner: set[ast.expr] = set()  # torch._utils is a part of torch._utils._rebuild_tensor_v2
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, root = [node.attr], node.value
            while isinstance(root, ast.Attribute):
                parts.insert(0, root.attr)
                root = root.value
            of_torch = isinstance(root, ast.Name) and root.id in roots
            if node not in inner and of_torch and (any(map(is_private, parts)) or parts[0] == "ops"):
                yield ast.unparse(node)
            inner.add(node.value)
            if node.attr == "is_compiling":
                yield ast.unparse(node)
            # A private attribute of something that is not the class's own, or its base class's.
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            own = own or (isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()")
            documented = ast.unparse(node) == "os._exit"  # Python's, for all its underscore
            if is_private(node.attr) and not own and not of_torch and not documented:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and is_private(str(node.args[1].value)):
                yield str(node.args[1].value)
        elif isinstance(node, ast.Tuple):  # (module, name): what an unpickler may call
            values = [part.value for part in node.elts if isinstance(part, ast.Constant)]
            if values and str(values[0]).split(".")[0] == "torch":
                yield from (str(value) for value in values[1:] if is_private(str(value)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(MINIFT).as_posix())
def test_a_file_outside_kernels_has_no_private_name_of_pytorch(path: Path) -> None:
    file = path.relative_to(MINIFT).as_posix()
    allowed = {name for where, name in IN_A_FILE_FORMAT if where == file}
    found = set(private_names(path.read_text(encoding="utf-8")))
    assert found == allowed, f"{file}: {', '.join(sorted(found - allowed))}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch._foreach_add_(a, 1)", "torch._foreach_add_"),
        ("import torch\ntorch.ops.aten.mm(a, b)", "torch.ops.aten.mm"),
        ("import torch.nn.functional as F\nF._scaled_mm(a)", "F._scaled_mm"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._functorch import config", "torch._functorch.config"),
        ("from torch.optim.adamw import _fused_adamw", "torch.optim.adamw._fused_adamw"),
        ("from torch import ops", "torch.ops"),
        ("import torch\nif torch.compiler.is_compiling(): pass", "torch.compiler.is_compiling"),
        ("from torch.compiler import is_compiling\nis_compiling()", "torch.compiler.is_compiling"),
        ("optimizer._step_supports_amp_scaling = False", "optimizer._step_supports_amp_scaling"),
        ("model.layers[0]._parameters", "model.layers[0]._parameters"),
        ("import torch\ngetattr(torch.cpu, '_is_avx512_bf16_supported', None)", "_is_avx512_bf16_supported"),
        ("ALLOWED = {('torch._utils', '_rebuild_tensor_v2')}", "_rebuild_tensor_v2"),
        ("import torch\nself._cache = torch.zeros(1).__class__", None),
        ("_own_function(torch.nn.Linear)", None),
    ],
)
def test_the_search_finds_them(source: str, expected: str | None) -> None:
    assert list(private_names(source)) == ([] if expected is None else [expected])
