"""PyTorch's container of tensors: `.pt`, `.pth`, `.bin`.

It is a zip archive of uncompressed records: `data.pkl`, a pickle that says which part of which storage each tensor is,
and `data/0`, `data/1`, …, the storages' bytes. (Before version 1.6 it was no archive; such files are read, but not
mapped.) A pickle can run code, so it is held to what a file of tensors needs before it is loaded (`pickle_guard.py`).
"""

import math
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minift.errors import InputError, is_out_of_memory
from minift.formats.files import Read, Spec, Specs, checked_bytes
from minift.formats.pickle_guard import inspect

LOCAL_HEADER = 30  # bytes in front of a zip record, without its name and extra fields
ALIGNMENT = 64  # of a storage's first byte in the file, so that its tensors can be mapped
_STORAGE = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


# Reading --------------------------------------------------------------------------------------------------------------


def load_pt(path: Path, mapped: bool = True) -> dict[str, Any]:
    """Return the named values in a file of `torch.save`; tensors are mapped, unless they are to be read at once.

    Raises:
        InputError: for a file that is missing or damaged, that would call a function, or holds no dict.
    """
    try:
        archive = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle's protocol
            inspect(path, archive)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and archive)
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
    """Return what PyTorch says of a file, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if called := next((line for line in lines if "GLOBAL" in line), None):
        return f"refused, it is not only tensors: {called}"
    if isinstance(error, pickle.UnpicklingError):
        lines = [line.split("error:", 1)[1].strip() for line in lines if "Unpickler error:" in line]
    return "damaged, or not a file of tensors" + (f": {lines[0]}" if lines and lines[0] else "")


def open_pt(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, by name.

    Raises:
        InputError: as `load_pt`, and for a value that is no plain tensor.
    """
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


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor that is pickled without being there."""

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
    """A pickler that writes, for a storage, the name of the record that holds its bytes, as `torch.load` reads it."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGE[obj.spec.dtype], obj.key, "cpu", obj.spec.numel


def write_pt(path: Path, specs: Specs, read: Read) -> None:
    """Write a file that `torch.load` reads, holding one tensor at a time.

    Args:
        specs: names, dtypes and shapes, in the order in which they are asked for.
        read: returns the tensor of a name.
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
    """Open a new record, padded so that its bytes begin at a multiple of `ALIGNMENT`."""
    info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the same tensors always give the same bytes
    assert archive.fp is not None
    zip64_field = 20  # bytes that zipfile writes before this padding when sizes may need 64 bits
    start = archive.fp.tell() + LOCAL_HEADER + len(info.filename) + zip64_field + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB": PyTorch's own padding field
    return archive.open(info, "w", force_zip64=True)
