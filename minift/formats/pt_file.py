"""PyTorch's container of tensors: `.pt`, `.pth`, `.bin`.

It is a zip archive of uncompressed records: `data.pkl`, a pickle that says how each tensor lies in its storage, and
`data/0`, `data/1`, …, the storages' bytes. (Before version 1.6 it was no archive; such files are read, but not mapped.)

A pickle is a program for a small stack machine, and somebody else's program is not run without a look. `torch.load`
with `weights_only=True` knows tensors and refuses to call anything else; but a pickle of a few hundred bytes can still
keep it busy for ever, or claim bytes that belong to another tensor. So `inspect` walks through the instructions first,
without carrying them out, and refuses values that no file of tensors holds.

Read next: `safetensors_file.py`.
"""

import io
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from minift.errors import InputError, is_out_of_memory
from minift.formats.files import Read, Spec, Specs, checked_bytes

LOCAL_HEADER = 30  # bytes in front of a zip record, without its name and extra fields
ALIGNMENT = 64  # of a storage's bytes, so that they can be used where they lie
DEPTH, COST = 16, 2_000  # of nested tuples: levels, and elements in all; a random state has 629
_STORAGE = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
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


# Reading --------------------------------------------------------------------------------------------------------------


def load_pt(path: Path) -> dict[str, Any]:
    """The named values in a file of `torch.save`, tensors mapped where they lie.

    Raises:
        InputError: for a file that is missing or damaged, that would call a function, or holds no dict.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle's protocol
            inspect(path, mapped)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        if is_out_of_memory(error) and "mmap" in str(error):  # otherwise it is the file that asks for too much
            raise
        raise InputError(f"{path}: {_reason(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not named values")
    return values


def _reason(error: Exception) -> str:
    """What PyTorch says, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if wanted := next((line for line in lines if "GLOBAL" in line), None):
        return f"refused, it is not only tensors: {wanted}"
    if isinstance(error, pickle.UnpicklingError):
        lines = [line.split("error:", 1)[1].strip() for line in lines if "Unpickler error:" in line]
    return "damaged, or not a file of tensors" + (f": {lines[0]}" if lines and lines[0] else "")


def open_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. Raises InputError as `load_pt`, and for a value that is no plain tensor."""
    tensors = {}
    for name, value in load_pt(path).items():
        if not isinstance(name, str):
            raise InputError(f"{path}: holds a value whose name is {type(name).__name__}, not text")
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: tensor {name} is {type(value).__name__}, not a named tensor")
        if value.is_nested or value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InputError(f"{path}: tensor {name} is not a plain tensor")
        tensor = Tensor.detach(value).as_subclass(Tensor).resolve_neg().resolve_conj()
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: tensor {name} has more elements than its storage")
        tensors[name] = tensor.contiguous()
    return tensors


class _Value(NamedTuple):
    """What is known of a value on the stack machine's stack: enough to bound the work of using it as a dict's key."""

    known: Any = None  # a string, a number or a tuple of such
    depth: int = 0
    cost: int = 1


def inspect(path: Path, zipped: bool) -> None:
    """Walk through a file's pickle without carrying it out.

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
        stream = io.BytesIO(archive.read(records["data.pkl"]))  # instruction by instruction, a file would be slow
        _walk(path, stream, {name: info.file_size for name, info in records.items()})


def _walk(path: Path, stream: IO[bytes], records: Mapping[str, int] | None) -> None:
    """One pickle. The effect of each instruction on the stack is taken from `pickletools`, which documents them all."""
    stack: list[_Value | None] = []  # None marks where an open tuple, list or dict begins
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
    cost = 1 + sum(item.cost for item in items)
    return _Value(tuple(item.known for item in items), 1 + max((item.depth for item in items), default=0), cost)


def _take(stack: list[_Value | None], to_mark: bool, count: int) -> list[_Value]:
    """Take off the stack what an instruction uses: all values down to the mark, or a number of them, or both."""
    taken: list[_Value] = []
    if to_mark:
        while (value := stack.pop()) is not None:
            taken.append(value)
    for _ in range(count):
        taken.append(stack.pop() or _Value())
    return taken[::-1]


_SLICE = (pickletools.markobject, pickletools.stackslice)
# By an instruction's name: whether it uses all values down to the mark, how many without one, whether it leaves any.
_EFFECTS = {
    code.name: (
        _SLICE[0] in code.stack_before,
        sum(kind not in _SLICE for kind in code.stack_before),
        bool(code.stack_after),
    )
    for code in pickletools.opcodes
}


def _check_record(path: Path, known: Any, records: Mapping[str, int]) -> None:
    """A storage, ("storage", its class, key, "cpu", number of elements), against the record that holds its bytes."""
    if not isinstance(known, tuple) or len(known) != 5:
        return  # which PyTorch refuses by itself
    _, kind, key, _, numel = known
    itemsize = _ITEMSIZE.get(kind)
    if itemsize is not None and isinstance(numel, int) and records.get(f"data/{key}") != numel * itemsize:
        found = records.get(f"data/{key}")
        raise InputError(f"{path}: damaged: storage {key} has {found} bytes, but is said to have {numel * itemsize}")


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoredTensor:
    """Pickles as a tensor does, without having one."""

    key: str
    spec: Spec

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.spec.shape[i + 1 :]) for i in range(len(self.spec.shape)))
        storage = _Storage(self.key, self.spec)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.spec.shape, strides, False, OrderedDict())


@dataclass(frozen=True)
class _Storage:
    key: str
    spec: Spec


class _Pickler(pickle.Pickler):
    """Writes a storage as PyTorch's loader expects it: by the name of the record that holds its bytes."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGE[obj.spec.dtype], obj.key, "cpu", obj.spec.numel


def write_pt(path: Path, specs: Specs, read: Read) -> None:
    """Write a file that `torch.load` reads, holding one tensor at a time.

    Args:
        specs: names, dtypes and shapes, in the order in which they are asked for.
        read: gives the tensor of a name.
    """
    with path.open("xb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        with _record(archive, "data.pkl") as record:
            keys = {name: str(i) for i, name in enumerate(specs)}
            _Pickler(record, protocol=2).dump({name: _StoredTensor(keys[name], spec) for name, spec in specs.items()})
        with _record(archive, "byteorder") as record:
            record.write(b"little")
        for name, spec in specs.items():
            with _record(archive, f"data/{keys[name]}") as record:
                record.write(checked_bytes(name, spec, read))
        with _record(archive, "version") as record:
            record.write(b"3\n")


def _record(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new record, padded so that its bytes start at a multiple of `ALIGNMENT`."""
    info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the same tensors always give the same bytes
    assert archive.fp is not None
    zip64_field = 20  # what zipfile itself puts in front of our padding when sizes may need 64 bits
    start = archive.fp.tell() + LOCAL_HEADER + len(info.filename) + zip64_field + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB": PyTorch's own padding field
    return archive.open(info, "w", force_zip64=True)
