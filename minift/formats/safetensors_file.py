"""Hugging Face's container of tensors: `.safetensors`.

An 8-byte length, a JSON header with each tensor's dtype, shape and place, and the bytes. It is read by the package
`safetensors` (the `hf` extra), which maps the file and checks the header. Its errors do not always name the tensor, so
a header that it refuses is checked here once more.

Source: "Format", in the README of huggingface/safetensors.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.errors import InputError, need
from minift.formats.files import Read, Specs, checked_bytes

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
    **{f"F8_{kind}": 8 for kind in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")},
}


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, each created when it is asked for: a file is opened often, and has hundreds."""

    def __init__(self, path: Path):
        safetensors = need("safetensors", "hf", str(path))
        self._path = path
        self._errors = (safetensors.SafetensorError, OSError, RuntimeError, ValueError, AttributeError, TypeError)
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            self._names = list(self._file.keys())
        except self._errors as error:
            raise self._refusal(error) from None

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except self._errors as error:
            raise self._refusal(error) from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _refusal(self, error: Exception) -> InputError:
        return InputError(f"{self._path}: not a whole safetensors file: {_fault(self._path) or error}")


def open_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file, by name; they are mapped.

    Raises:
        InputError: for a file that is damaged, with the tensor at fault; without the `hf` extra.
    """
    return _Tensors(path)


def _fault(path: Path) -> str | None:
    """Return what is wrong with a header that `safetensors` refuses, with the tensor's name; None if none is found."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size - 8 - length
            if size < 0:
                return f"its header is said to have {length} bytes, more than the file"
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError, struct.error):
        return None
    if not isinstance(header, dict):
        return "its header is not a JSON object"
    header.pop("__metadata__", None)
    places: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        if fault := _entry_fault(entry, size):
            return f"tensor {name}: {fault}"
        places[name] = tuple(entry["data_offsets"])
    reached = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != reached:
            return f"tensor {name}: its bytes begin at {begin}, those of the one before end at {reached}"
        reached = end
    return f"the tensors have {reached} bytes, the file {size}" if reached != size else None


def _entry_fault(entry: Any, size: int) -> str | None:
    """Return what is wrong with one tensor's entry in the header; None if nothing is found.

    Args:
        size: bytes of all tensors in the file.
    """
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return f"its entry is {entry!r}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            return f"its {what} is {numbers!r}"
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"its dtype is {dtype!r}"
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"its data_offsets is {offsets!r}"
    if offsets[1] > size:
        return f"its bytes end at {offsets[1]}, the file's at {size}"
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
        return f"{offsets[1] - offsets[0]} bytes for shape {shape} of {dtype}"
    return None


def write_safetensors(path: Path, specs: Specs, read: Read) -> None:
    """Write a file that `safetensors` reads, holding one tensor at a time.

    Args:
        specs: names, dtypes and shapes, in the order in which they are asked for.
        read: returns the tensor of a name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors begin at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            file.write(checked_bytes(name, spec, read))
