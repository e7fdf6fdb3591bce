"""A model on disk, opened but not read: its config, and for each of minift's tensors where its bytes lie.

Every format is brought to the same form: minift's names (Hugging Face's, without the `model.` prefix), RoPE's
half-split layout, one whole tensor a name. What a format does differently is three small facts per tensor: its name
there, the axis along which its pieces are joined, and whether its rows have to be permuted.

Names, shapes and dtypes are checked when a model is opened, before a byte of its weights is read; that the weights are
numbers is checked as they pass.

Read next: `huggingface.py`, `meta.py`, `llama2c.py`, `native.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.files import FLOATS, WINDOW, Spec, TensorFile, dtype_name
from minift.formats.pt_file import open_pt
from minift.formats.safetensors_file import open_safetensors
from minift.formats.shapes import parameter_shapes


@dataclass(frozen=True)
class Source:
    """Where one of minift's tensors lies.

    Attributes:
        files, name: the files that hold a piece of it each, and its name in them.
        axis: along which the pieces are joined.
        replicated: every file holds the whole tensor, not a piece.
        heads: for queries and keys in the interleaved RoPE layout, how many heads their rows are; else 0.
    """

    files: tuple[TensorFile, ...]
    name: str
    axis: int = 0
    replicated: bool = False
    heads: int = 0

    @property
    def spec(self) -> Spec:
        """Dtype and shape of the whole."""
        specs = [file.specs[self.name] for file in self.files]
        shape = list(specs[0].shape)
        if not self.replicated and self.axis < len(shape):
            shape[self.axis] = sum(spec.shape[self.axis] for spec in specs)
        return Spec(specs[0].dtype, tuple(shape))

    @property
    def lies_whole(self) -> bool:
        """Whether the tensor can be used where it lies in the file, without a copy."""
        return len(self.files) == 1 and self.heads == 0

    def read(self) -> Tensor:
        """The whole tensor, in minift's layout."""
        pieces = [file.read(self.name) for file in self.files]
        if self.replicated:
            for file, piece in zip(self.files, pieces, strict=True):
                if not torch.equal(piece, pieces[0]):
                    raise InputError(f"{file.path}: tensor {self.name} is not the one in {self.files[0].path.name}")
        whole = pieces[0] if len(pieces) == 1 or self.replicated else torch.cat(pieces, dim=self.axis)
        return to_half_split(whole, self.heads) if self.heads else whole


@dataclass(frozen=True)
class Opened:
    """A model on disk.

    Attributes:
        path: what the user named.
        format: native, hf, meta or llama2c.
        config: its shape.
        sources: of all of minift's tensors, by name; checked against the shape.
        notes: what a user should know about it (keys that are not used, …).
    """

    path: Path
    format: str
    config: LlamaConfig
    sources: Mapping[str, Source]
    notes: tuple[str, ...] = ()

    @cached_property
    def files(self) -> list[TensorFile]:
        """All files of weights."""
        return list({file.path: file for source in self.sources.values() for file in source.files}.values())

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tensor, in minift's order."""
        return {name: self.sources[name].spec for name in parameter_shapes(self.config)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; the widest, where there are several."""
        dtype = next(iter(self.specs.values())).dtype
        for spec in self.specs.values():
            dtype = torch.promote_types(dtype, spec.dtype)
        return dtype

    def read(self, name: str) -> Tensor:
        """One of minift's tensors, to be used before the next is read.

        A file is let go after `WINDOW` bytes, and when the next one's turn has come: what was read does not stay.

        Raises:
            InputError: when it holds NaN or infinity.
        """
        source = self.sources[name]
        for file in self.files:
            if file not in source.files or file.bytes_read > WINDOW:
                file.release()
        tensor = source.read()
        check_finite(tensor, source.files[0].path, source.name)
        return tensor

    def view(self, name: str) -> Tensor:
        """One of minift's tensors that `lies_whole`, as it lies in the file, to be kept. Its values are unchecked."""
        source = self.sources[name]
        return source.files[0].view(source.name)


def open_tensors(path: Path) -> TensorFile:
    """A `.safetensors` file, or one of PyTorch's.

    Raises:
        InputError: for a file that is damaged, holds anything but named tensors, or needs the `hf` extra.
    """
    return TensorFile(path, open_safetensors if path.suffix == ".safetensors" else open_pt)


def check_names(
    wanted: Iterable[str], holders: Mapping[str, TensorFile], where: Path, ignored: Iterable[str] = ()
) -> None:
    """Raise InputError, with file and tensor, when a tensor is missing or one too many.

    Args:
        wanted: the names, as the files have them.
        holders: for each name that is there, its file.
        where: what to name when a tensor is missing.
        ignored: names that may be there as well: what can be computed from the config.
    """
    wanted = set(wanted)
    for name in sorted(wanted - set(holders)):
        raise InputError(f"{where}: tensor {name} is missing")
    for name in sorted(set(holders) - wanted - set(ignored)):
        raise InputError(f"{holders[name].path}: tensor {name} is not part of this model")


def check_specs(sources: Mapping[str, Source], config: LlamaConfig, config_file: str = "config.json") -> None:
    """Raise InputError, with file and tensor, unless every tensor has the config's shape and a floating dtype."""
    for name, wanted in parameter_shapes(config).items():
        source = sources[name]
        for file in source.files:
            spec = file.specs[source.name]
            if spec.dtype not in FLOATS:
                raise InputError(
                    f"{file.path}: tensor {source.name} holds {dtype_name(spec.dtype)}, not floating-point weights"
                )
            first = source.files[0].specs[source.name].dtype
            if spec.dtype != first:
                raise InputError(
                    f"{file.path}: tensor {source.name} holds {dtype_name(spec.dtype)}, "
                    f"the other pieces {dtype_name(first)}"
                )
            pieces = 1 if source.replicated else len(source.files)
            piece = [n / pieces if i == source.axis else n for i, n in enumerate(wanted)]
            if list(spec.shape) != piece:
                wanted_piece = [int(n) if n == int(n) else n for n in piece]
                where = f"{file.path}: tensor {source.name}"
                raise InputError(f"{where} is {list(spec.shape)}; {config_file} makes it {wanted_piece}")


def check_finite(tensor: Tensor, file: Path, name: str) -> None:
    """Raise InputError when a tensor holds NaN or infinity: whatever is computed with it would be NaN."""
    if not is_finite(tensor):
        raise InputError(f"{file}: tensor {name} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a number. Reads the tensor once, without a copy, as fast as memory gives it."""
    if tensor.numel() == 0 or torch.isfinite(tensor.sum()):  # a sum is finite only if all its terms are
        return True
    smallest, largest = torch.aminmax(tensor)  # or it was too large: then look at the terms; a NaN shows in both
    return bool(torch.isfinite(smallest) and torch.isfinite(largest))


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """How many heads the rows of a query or key matrix are, by one of minift's names; 0 for every other tensor."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key matrix, from the interleaved RoPE layout to the half-split one.

    Meta's code rotates neighbouring channels, (0, 1), (2, 3), …; Hugging Face's and ours rotate channel i with i + C/2.
    The same rotation needs the same pairs, so within each head

        interleaved:  a0 b0 a1 b1 a2 b2      half-split:  a0 a1 a2 b0 b1 b2

    Args:
        weight: [heads · C, D].
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
