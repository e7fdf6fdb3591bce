"""Files of named tensors: read when they are asked for, written one tensor at a time, whatever their size.

There are two kinds of such files, PyTorch's (`pt_file.py`) and Hugging Face's (`safetensors_file.py`).

*Reading.* Both are mapped into memory, so a tensor costs nothing until its bytes are used. Bytes that were used stay in
memory as long as the mapping is there. So a mapping is released, and made anew, after every `WINDOW` bytes: a model
larger than memory can be read tensor by tensor.

*Writing.* `torch.save` and `safetensors` take all tensors at once. The writers here take only their names, dtypes and
shapes, and then ask for one after the other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 256 << 20  # bytes that are read through one mapping of a file
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Spec:
    """A tensor's dtype and shape, which are known before its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.dtype.itemsize * self.numel


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`, as configs have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


Specs = Mapping[str, Spec]
Read = Callable[[str], Tensor]


def widest(specs: Specs) -> torch.dtype:
    """Return the dtype that holds the values of all tensors."""
    dtypes = [spec.dtype for spec in specs.values()]
    return reduce(torch.promote_types, dtypes)


class TensorFile:
    """The tensors of one file, by the names that they have in it.

    Attributes:
        path: the file.
        specs: dtype and shape of every tensor.
        bytes_read: bytes of the tensors that were read since the file was last mapped.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], Mapping[str, Tensor]]):
        self.path = path
        self._open_file = open_file
        self._tensors: Mapping[str, Tensor] | None = open_file(path)
        self._viewed: Mapping[str, Tensor] | None = None
        self.bytes_read = 0
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file. Writing to it does not change the file."""
        if self._tensors is None:
            self._tensors = self._open_file(self.path)
        self.bytes_read += self.specs[name].nbytes
        return self._tensors[name]

    def view(self, name: str) -> Tensor:
        """Return a tensor as `read` does, from a second mapping, which is kept: its bytes are not in memory yet."""
        if self._viewed is None:
            self._viewed = self._open_file(self.path)
        return self._viewed[name]

    def release(self) -> None:
        """Release the mapping. Tensors in use keep it; the next `read` maps the file anew."""
        self._tensors, self.bytes_read = None, 0


def checked_bytes(name: str, spec: Spec, read: Read) -> memoryview:
    """Return the bytes of the tensor that `read` gives for a name, which must have the dtype and shape of its spec."""
    tensor = read(name)
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name  # or the file's header would be wrong
    return tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as they are in memory: little-endian, row after row."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
