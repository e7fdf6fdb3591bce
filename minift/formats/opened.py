"""A model on disk, opened but not read: its config, and for each of minift's tensors where its bytes are.

Every format is brought to the same form: minift's names (Hugging Face's, without the `model.` prefix), RoPE's
half-split layout, one tensor a name. The formats differ in three small facts about each tensor: its name in the file,
the axis along which its pieces are joined, and whether its rows have to be permuted.

Names, shapes and dtypes are checked when a model is opened, before a byte of its weights is read. NaN and infinity are
looked for when a tensor is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.files import FLOATS, WINDOW, Spec, TensorFile, dtype_name, widest
from minift.formats.pt_file import open_pt
from minift.formats.safetensors_file import open_safetensors
from minift.formats.shapes import parameter_shapes

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """The place of one of minift's tensors in the files of a model.

    Attributes:
        files, name: the files that hold a piece of it each, and its name in them.
        axis: along which the pieces are joined.
        replicated: every file holds all of the tensor, not a piece.
        heads: for queries and keys in the interleaved RoPE layout, the number of heads in their rows; else 0.
    """

    files: tuple[TensorFile, ...]
    name: str
    axis: int = 0
    replicated: bool = False
    heads: int = 0

    @property
    def spec(self) -> Spec:
        """Dtype and shape of the joined tensor."""
        specs = [file.specs[self.name] for file in self.files]
        shape = list(specs[0].shape)
        if not self.replicated and self.axis < len(shape):
            shape[self.axis] = sum(spec.shape[self.axis] for spec in specs)
        return Spec(specs[0].dtype, tuple(shape))

    @property
    def needs_no_copy(self) -> bool:
        """True when the bytes in the file are already in minift's layout."""
        return len(self.files) == 1 and self.heads == 0

    def read(self) -> Tensor:
        """Return the joined tensor in minift's layout."""
        pieces = [file.read(self.name) for file in self.files]
        if self.replicated:
            for file, piece in zip(self.files, pieces, strict=True):
                if not torch.equal(piece, pieces[0]):
                    raise InputError(f"{file.path}: tensor {self.name} is not the one in {self.files[0].path.name}")
        joined = pieces[0] if len(pieces) == 1 or self.replicated else torch.cat(pieces, dim=self.axis)
        return to_half_split(joined, self.heads) if self.heads else joined

    def check_finite(self, tensor: Tensor) -> None:
        """Raise InputError, with file and tensor, when what was read from here holds NaN or infinity."""
        check_finite(tensor, self.files[0].path, self.name)


@dataclass(frozen=True)
class Opened:
    """A model on disk.

    Attributes:
        path: the folder or file of the model.
        format: native, hf, meta or llama2c; for an adapter with its base, peft.
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
        return widest(self.specs)

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", copy: bool = False
    ) -> Tensor:
        """Return one of minift's tensors, to be used before the next one is read, unless it is a copy.

        A file's mapping is released after `WINDOW` bytes, and when a tensor of another file is read: what was read does
        not stay in memory.

        Args:
            dtype: to cast it to; by default the file's.
            copy: return memory of its own, in any case.

        Raises:
            InputError: when it holds NaN or infinity, or values beyond the range of the dtype.
        """
        source = self.sources[name]
        for file in self.files:
            if file not in source.files or file.bytes_read > WINDOW:
                file.release()
        tensor = source.read()
        source.check_finite(tensor)
        cast = tensor.to(device, dtype or source.spec.dtype, copy=copy)
        if torch.finfo(cast.dtype).max < torch.finfo(tensor.dtype).max and not is_finite(cast):
            where = f"{source.files[0].path}: tensor {source.name}"
            raise InputError(f"{where} has values beyond the range of {dtype_name(cast.dtype)}")
        return cast

    def view(self, name: str) -> Tensor:
        """Return one of minift's tensors that `needs_no_copy`, mapped from the file, to be kept.

        Its values are checked through another mapping, which is released: of this one, nothing is in memory yet.

        Raises:
            InputError: as `read`.
        """
        self.read(name)
        source = self.sources[name]
        return source.files[0].view(source.name)


def open_tensors(path: Path) -> TensorFile:
    """Open a `.safetensors` file, or one of PyTorch's.

    Raises:
        InputError: for a file that is damaged, holds anything but named tensors, or needs the `hf` extra.
    """
    return TensorFile(path, open_safetensors if path.suffix == ".safetensors" else open_pt)


# Names ----------------------------------------------------------------------------------------------------------------

_PREFIX = "model."  # Hugging Face's, of all names but the head's
_WRAPPERS = {  # what stands before every name in the state dict of a model that was wrapped when it was saved
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "base_model.model.": "peft",
}


def named_sources(holders: Mapping[str, TensorFile], config: LlamaConfig, where: Path) -> dict[str, Source]:
    """Return where each of minift's tensors is, in files that name them as Hugging Face does, or without `model.`.

    What can be computed may be there as well: RoPE's frequencies, which early versions of `transformers` wrote, and the
    head of a model whose head is its embedding; it must be equal.

    Args:
        holders: for the name of each tensor that is there, its file.
        where: the place to name when a tensor is missing.

    Raises:
        InputError: with file and tensor, for one that is missing, too many, or of another shape or dtype.
    """
    for name, file in holders.items():
        check_wrappers(name, file.path)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in holders) else ""
    names = {ours: ours if ours == HEAD else prefix + ours for ours in parameter_shapes(config)}
    check_names(names.values(), holders, where, computed_names(config))
    sources = {ours: Source((holders[theirs],), theirs) for ours, theirs in names.items()}
    check_specs(sources, config)
    if config.tie_word_embeddings and HEAD in holders:
        head, embedding = holders[HEAD], sources["embed_tokens.weight"]
        if not torch.equal(head.read(HEAD), embedding.read()):
            raise InputError(f"{head.path}: tensor {HEAD} is not the embedding, but config.json ties them")
    return sources


def computed_names(config: LlamaConfig) -> set[str]:
    """Return the names of tensors that a model may have in its files, but does not need there."""
    places = ["", *(f"layers.{i}.self_attn." for i in range(config.num_hidden_layers))]
    frequencies = {f"{prefix}{place}rotary_emb.inv_freq" for place in places for prefix in ("", _PREFIX)}
    return frequencies | ({HEAD} if config.tie_word_embeddings else set())


def check_wrappers(name: str, file: Path) -> None:
    """Raise InputError for a tensor that has the name of a wrapper in front of its own, or inside of it."""
    for wrapper, program in _WRAPPERS.items():
        if name.startswith(wrapper) or f".{wrapper}" in name:
            raise InputError(
                f"{file}: tensor {name} was saved from inside a wrapper: {wrapper!r} in its name is of {program}; "
                "remove it from all names, or save the state dict of the model itself"
            )


# Checks ---------------------------------------------------------------------------------------------------------------


def check_names(
    expected: Iterable[str], holders: Mapping[str, TensorFile], where: Path, ignored: Iterable[str] = ()
) -> None:
    """Raise InputError, with file and tensor, when a tensor is missing or one too many.

    Args:
        expected: the names, as the files have them.
        holders: for each name that is there, its file.
        where: the place to name when a tensor is missing.
        ignored: names that may be there as well: what can be computed from the config.
    """
    expected = set(expected)
    for name in sorted(expected - set(holders)):
        raise InputError(f"{where}: tensor {name} is missing")
    for name in sorted(set(holders) - expected - set(ignored)):
        raise InputError(f"{holders[name].path}: tensor {name} is not part of this model")


def check_specs(sources: Mapping[str, Source], config: LlamaConfig, config_file: str = "config.json") -> None:
    """Raise InputError, with file and tensor, unless every tensor has the config's shape and a floating dtype."""
    for name, shape in parameter_shapes(config).items():
        source = sources[name]
        first = source.files[0].specs[source.name].dtype
        pieces = 1 if source.replicated else len(source.files)
        expected = [n / pieces if i == source.axis else n for i, n in enumerate(shape)]  # a piece's
        for file in source.files:
            spec, where = file.specs[source.name], f"{file.path}: tensor {source.name}"
            check_floating(spec, where)
            if spec.dtype != first:
                raise InputError(f"{where} holds {dtype_name(spec.dtype)}, the other pieces {dtype_name(first)}")
            if list(spec.shape) != expected:
                whole_numbers = [int(n) if n == int(n) else n for n in expected]
                raise InputError(f"{where} is {list(spec.shape)}; {config_file} makes it {whole_numbers}")


def check_floating(spec: Spec, where: str) -> None:
    """Raise InputError unless a tensor, which `where` names, has a dtype of weights."""
    if spec.dtype not in FLOATS:
        raise InputError(f"{where} holds {dtype_name(spec.dtype)}, not floating-point weights")


def check_finite(tensor: Tensor, file: Path, name: str) -> None:
    """Raise InputError when a tensor holds NaN or infinity: whatever is computed with it would be NaN."""
    if not is_finite(tensor):
        raise InputError(f"{file}: tensor {name} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Return True when every element is a number. The tensor is read once, without a copy."""
    if tensor.numel() == 0 or torch.isfinite(tensor.sum()):  # a sum is finite only if all its terms are
        return True
    smallest, largest = torch.aminmax(tensor)  # the sum may have overflowed: look at the terms; a NaN shows in both
    return bool(torch.isfinite(smallest) and torch.isfinite(largest))


# The two layouts of RoPE ----------------------------------------------------------------------------------------------


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """Return the number of heads in the rows of a query or key matrix, by minift's name; 0 for every other tensor."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of a query or key matrix from the interleaved RoPE layout to the half-split one.

    Meta's code rotates neighbouring channels, (0, 1), (2, 3), …; Hugging Face's and ours rotate channel i with i + C/2.
    The same rotation needs the same pairs, so within each head

        interleaved:  a0 b0 a1 b1 a2 b2      half-split:  a0 a1 a2 b0 b1 b2

    Args:
        weight: [heads · C, D].
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows back: the inverse of `to_half_split`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
