"""A look at a pickle before it is loaded: it may hold what a state dict needs, and nothing else.

A pickle is a program for a small stack machine, and a file of unknown origin could be any program. `torch.load` with
`weights_only=True` knows tensors and refuses to call anything else. But a pickle of a few hundred bytes can still keep
it busy for ever, or claim bytes that belong to another tensor. So `inspect` reads the instructions first, without
executing them, and refuses what no file of tensors holds.

Source: the module `pickletools` of Python's library, which documents each instruction and its effect on the stack.
"""

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from minift.errors import InputError

DEPTH, COST = 16, 2_000  # bounds of nested tuples: levels, and elements in all; Python's random state has 629
_ITEMSIZE = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}
_SLICE = (pickletools.markobject, pickletools.stackslice)
# The effect of an instruction, by its name: (does it take all values down to the mark, how many besides, does it leave
# a value).
_EFFECTS = {
    code.name: (
        _SLICE[0] in code.stack_before,
        sum(kind not in _SLICE for kind in code.stack_before),
        bool(code.stack_after),
    )
    for code in pickletools.opcodes
}


class _Value(NamedTuple):
    """A value on the stack, as far as it is known: enough to bound the work of hashing it as a key of a dict."""

    known: Any = None  # a string, a number or a tuple of these
    depth: int = 0
    cost: int = 1


def inspect(path: Path, zipped: bool) -> None:
    """Go through the instructions of a file's pickle without executing them.

    Args:
        zipped: the file is an archive of records; otherwise it is a row of pickles, as PyTorch wrote before 1.6.

    Raises:
        InputError: for nested tuples that would take for ever to hash, a set (whose members are hashed), a record that
            is compressed, or one that is not as long as the storage in it is said to be.
    """
    if not zipped:
        with path.open("rb") as bare:
            for _ in range(5):  # a magic number, a version, the machine, the values, the storages' keys
                if bare.peek(1):
                    _walk(path, bare, None)
        return
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: record {name} is compressed; PyTorch's are not")
        stream = io.BytesIO(archive.read(records["data.pkl"]))  # a file would be slow, read byte by byte
        _walk(path, stream, {name: info.file_size for name, info in records.items()})


def _walk(path: Path, stream: IO[bytes], records: Mapping[str, int] | None) -> None:
    """Go through one pickle.

    Args:
        records: the length of each record of the archive, by name; None where there is no archive.
    """
    stack: list[_Value | None] = []  # None is the mark at which an open tuple, list or dict begins
    memo: dict[int, _Value] = {}
    for code, argument, _ in pickletools.genops(stream):
        name = code.name
        to_mark, count, pushes = _EFFECTS[name]
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1] or _Value()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "MARK":
            stack.append(None)
        elif name == "GLOBAL" and argument in ("builtins set", "__builtin__ set"):
            raise InputError(f"{path}: refused, it is not only tensors: it holds a set")
        else:
            taken = _take(stack, to_mark, count)
            if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                value = _tuple(taken)
                if value.depth > DEPTH or value.cost > COST:
                    raise InputError(f"{path}: refused, it is not only tensors: it holds tuples of tuples of tuples …")
                stack.append(value)
                continue
            if name == "BINPERSID" and records is not None:
                _check_record(path, taken[-1].known, records)
            if pushes:
                stack.append(_Value(argument if isinstance(argument, int | str) else None))


def _tuple(items: list[_Value]) -> _Value:
    """Return what is known of a tuple of such values."""
    cost = 1 + sum(item.cost for item in items)
    return _Value(tuple(item.known for item in items), 1 + max((item.depth for item in items), default=0), cost)


def _take(stack: list[_Value | None], to_mark: bool, count: int) -> list[_Value]:
    """Pop what an instruction uses: all values down to the mark, or a number of them, or both; the lowest first."""
    taken: list[_Value] = []
    if to_mark:
        while (value := stack.pop()) is not None:
            taken.append(value)
    for _ in range(count):
        taken.append(stack.pop() or _Value())
    return taken[::-1]


def _check_record(path: Path, known: Any, records: Mapping[str, int]) -> None:
    """Compare a storage, ("storage", its class, key, "cpu", number of elements), with the record of its bytes."""
    if not isinstance(known, tuple) or len(known) != 5:
        return  # PyTorch refuses it
    _, kind, key, _, numel = known
    itemsize = _ITEMSIZE.get(kind)
    if itemsize is not None and isinstance(numel, int) and records.get(f"data/{key}") != numel * itemsize:
        found = records.get(f"data/{key}")
        raise InputError(f"{path}: damaged: storage {key} has {found} bytes, but is said to have {numel * itemsize}")
