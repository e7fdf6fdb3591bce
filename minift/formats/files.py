"""Files of named tensors: read lazily, written one tensor at a time, whatever their size.

Two containers matter. A `.pt`, `.pth` or `.bin` file of PyTorch is a zip archive of uncompressed records: `data.pkl`, a
pickle that says how each tensor lies in its storage, and `data/0`, `data/1`, … the storages' bytes. A `.safetensors`
file is an 8-byte length, a JSON header with each tensor's dtype, shape and place, and the bytes.

*Reading.* Both are mapped into memory, so a tensor costs nothing until its bytes are looked at. What has been looked at
stays resident as long as the mapping lives; `TensorFile` therefore maps a file anew after every `WINDOW` bytes, and a
model larger than memory can go through tensor by tensor. Nothing in a file is run: pickles are read with
`weights_only=True`, which knows tensors and refuses every other call.

*Writing.* `torch.save` and `safetensors` want all tensors at once. The writers here want to know only their names,
dtypes and shapes, and then ask for one after the other.

Read next: `opened.py`.
"""

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minift.errors import InputError
from minift.extras import need

WINDOW = 256 << 20  # bytes that are read through one mapping of a file
LOCAL_HEADER = 30  # bytes in front of a zip record, without its name and extra fields
ALIGNMENT = 64  # of a storage's bytes in a .pt file, so that they can be used where they lie
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAFETENSORS_NAME = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_STORAGE = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * self.numel


Specs = Mapping[str, Spec]
Read = Callable[[str], Tensor]


class TensorFile:
    """The tensors of one file, by the names that they have in it.

    Attributes:
        path: the file.
        specs: of every tensor in it.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], Mapping[str, Tensor]]):
        self.path = path
        self._open_file = open_file
        self._tensors: Mapping[str, Tensor] | None = open_file(path)
        self._bytes_read = 0
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file. It may be written to; the file stays as it is."""
        if self._bytes_read > WINDOW:
            self.release()
        if self._tensors is None:
            self._tensors = self._open_file(self.path)
        self._bytes_read += self.specs[name].nbytes
        return self._tensors[name]

    def release(self) -> None:
        """Let go of the mapping. Tensors in use keep theirs; the next one that is read maps the file anew."""
        self._tensors, self._bytes_read = None, 0


def open_tensors(path: Path) -> TensorFile:
    """A `.safetensors` file, or one of PyTorch's.

    Raises:
        InputError: for a file that is damaged, holds anything but named tensors, or needs the `hf` extra.
    """
    return TensorFile(path, _open_safetensors if path.suffix == ".safetensors" else _open_pt)


# PyTorch's container --------------------------------------------------------------------------------------------------


def load_pt(path: Path) -> dict[str, Any]:
    """The named values in a file of `torch.save`, tensors mapped where they lie.

    Raises:
        InputError: for a file that is missing or damaged, that would call a function, or holds no dict.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # PyTorch's container before 1.6 was none, and cannot be mapped
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # a damaged pickle can fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if wanted := next((line.strip() for line in lines if "GLOBAL" in line), None):
            raise InputError(f"{path}: refused, it is not only tensors: {wanted}") from None
        raise InputError(f"{path}: damaged, or not a file of tensors: {lines[0]}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not named values")
    return values


def _open_pt(path: Path) -> dict[str, Tensor]:
    values = load_pt(path)
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: tensor {name} is {type(tensor).__name__}, not a named tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{path}: tensor {name} is {tensor.type()}, not a plain tensor")
    return values


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
                record.write(_checked_bytes(name, spec, read))
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


# Safetensors ----------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = need("safetensors", "hf", str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {_header_fault(path) or error}") from None


def _header_fault(path: Path) -> str | None:
    """What is wrong with a header that `safetensors` has refused, with the tensor's name; None if nothing is found."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size - 8 - length
            if size < 0:
                return f"its header is said to have {length} bytes, more than the file"
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError, struct.error):
        return None
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            elements, itemsize = torch.Size(entry["shape"]).numel(), _ITEMSIZE.get(entry["dtype"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            return f"tensor {name}: its entry is {entry!r} ({error})"
        if itemsize is None:
            return f"tensor {name}: its dtype is {entry['dtype']!r}"
        if end - begin != elements * itemsize:
            return f"tensor {name}: {end - begin} bytes for shape {entry['shape']} of {entry['dtype']}"
        places[name] = (begin, end)
    reached = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != reached:
            return f"tensor {name}: its bytes begin at {begin}, those of the one before end at {reached}"
        if end > size:
            return f"tensor {name}: its bytes end at {end}, the file's at {size}"
        reached = end
    return f"the tensors have {reached} bytes, the file {size}" if reached != size else None


def write_safetensors(path: Path, specs: Specs, read: Read) -> None:
    """Write a file that `safetensors` reads, holding one tensor at a time. The arguments are those of `write_pt`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entry = {"dtype": _SAFETENSORS_NAME[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors start at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            file.write(_checked_bytes(name, spec, read))


def _checked_bytes(name: str, spec: Spec, read: Read) -> memoryview:
    tensor = read(name)
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name  # or the header would lie
    return tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in memory: little-endian, row after row."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
