"""Files of named tensors: read lazily, written one tensor at a time, whatever their size.

Two containers matter: PyTorch's (`pt_file.py`) and Hugging Face's (`safetensors_file.py`).

*Reading.* Both are mapped into memory, so a tensor costs nothing until its bytes are looked at. What has been looked at
stays resident as long as the mapping lives; so a file can be let go and mapped anew after every `WINDOW` bytes, and a
model larger than memory can go through tensor by tensor.

*Writing.* `torch.save` and `safetensors` want all tensors at once. The writers here want to know only their names,
dtypes and shapes, and then ask for one after the other.

Read next: `pt_file.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 256 << 20  # bytes that are read through one mapping of a file
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`, as configs and people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


Specs = Mapping[str, Spec]
Read = Callable[[str], Tensor]


class TensorFile:
    """The tensors of one file, by the names that they have in it.

    Attributes:
        path: the file.
        specs: of every tensor in it.
        bytes_read: through the present mapping.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], Mapping[str, Tensor]]):
        self.path = path
        self._open_file = open_file
        self._tensors: Mapping[str, Tensor] | None = open_file(path)
        self._kept: Mapping[str, Tensor] | None = None
        self.bytes_read = 0
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file. It may be written to; the file stays as it is."""
        if self._tensors is None:
            self._tensors = self._open_file(self.path)
        self.bytes_read += self.specs[name].nbytes
        return self._tensors[name]

    def view(self, name: str) -> Tensor:
        """As `read`, but from a mapping of its own, which is kept: nothing of it is resident until it is looked at."""
        if self._kept is None:
            self._kept = self._open_file(self.path)
        return self._kept[name]

    def release(self) -> None:
        """Let go of the mapping. Tensors in use keep theirs; the next one that is read maps the file anew."""
        self._tensors, self.bytes_read = None, 0


def checked_bytes(name: str, spec: Spec, read: Read) -> memoryview:
    """The bytes of a tensor that is asked for by name, which must be what was announced."""
    tensor = read(name)
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name  # or the header would lie
    return tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in memory: little-endian, row after row."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
