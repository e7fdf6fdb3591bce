"""Models on disk, and runs that can be continued: folders that are either whole or not there.

A minift checkpoint is a folder of `config.json` (the shape, under Hugging Face's names), `model.pt` (the weights) and
the tokenizer's files; what other programs write is read as well (`formats/`). A step folder, `step_000300/`, is such a
checkpoint and, beside it, `training.pt`: the optimizer's moments, the scaler, the step, the data's place and the state
of torch's random numbers, all that the loop needs to go on as if it had not been stopped. In a sharded run each rank
writes its part of weights and moments (`distributed/shards.py`); all else is written by the main rank alone.

Every folder is written under another name, flushed to the disk and then renamed, so a run that is killed in the middle
of a save leaves the older checkpoint, never half of a new one. What is saved carries checksums of its files. A step
folder is held against them before anything is resumed (a damaged one is passed over for the one before it), a model
before it is finetuned. Files are read with `weights_only=True`: a checkpoint is data, and cannot run code.

Read next: `generate.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import SAVE_FORMATS
from minift.distributed.sharding import put, whole
from minift.distributed.world import World
from minift.errors import InputError
from minift.formats import open_model
from minift.formats.files import Spec
from minift.formats.huggingface import write_huggingface
from minift.formats.native import open_weights, write_native
from minift.formats.peft import put_peft, read_adapter
from minift.formats.shapes import model_without_weights
from minift.lora import has_adapter, merge, merged_weights
from minift.model import Llama
from minift.storage.atomic import write_folder
from minift.storage.checksums import write_checksums
from minift.storage.names import base_of, is_adapter
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import save_tokenizer

WEIGHT_FILES = ("model.pt", "adapter.pt")


def save_model(
    folder: str | Path,
    model: Llama,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    format: str = "native",
    world: World | None = None,
) -> None:
    """Write a model and its tokenizer: the folder appears whole, or not at all. An older one of that name is replaced.

    Args:
        dtype: of the weights in the file; by default the model's own.
        format: native, or hf for a Hugging Face folder.
        world: the processes among which the model may be sharded; each must ask. The main one writes it as a whole, a
            tensor at a time.

    Raises:
        InputError: when the `hf` extra is missing.
        RunError: when the disk refuses.
    """
    if format not in SAVE_FORMATS:
        raise InputError(f"format is {format!r}; choose from {', '.join(SAVE_FORMATS)}")
    weights = merged_weights(model)

    def write(partial: Path) -> None:
        _write_model(partial, model, weights, tokenizer, dtype, format)
        write_checksums(partial)

    if world is None or world.is_main:
        write_folder(Path(folder), write)
    else:
        for tensor in weights.values():  # in the order in which they are written
            whole(tensor)
    if world is not None:
        world.wait()


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Llama:
    """The model of a minift checkpoint, a Hugging Face or Meta folder, a llama2.c file, or a `peft` adapter's folder.

    Where the file has the wanted dtype and layout, its tensors become the parameters as they lie, mapped into memory;
    otherwise they are converted one by one. Either way no more is held than the model itself. An adapter is merged into
    the model that its config names.

    Args:
        dtype: of the weights in memory; None keeps the file's (the widest, where it has several).

    Raises:
        InputError: when there is no model, or a tensor is missing, unexpected, of the wrong shape or not finite.
    """
    device = torch.device(device)
    if is_adapter(Path(path)):
        model = load_model(base_of(Path(path)), dtype, device)
        put_peft(Path(path), model)
        merge(model)
        return model.eval()
    opened = open_model(path)
    dtype = dtype or opened.dtype
    specs = opened.specs
    as_they_lie = device.type == "cpu" and all(
        specs[name].dtype == dtype and source.lies_whole for name, source in opened.sources.items()
    )
    weights: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in specs:
        tensor = opened.read(name)  # which looks at every value
        if as_they_lie and (view := opened.view(name)).untyped_storage().data_ptr() not in storages:
            storages.add(view.untyped_storage().data_ptr())
            weights[name] = view
        else:  # also where two names share their bytes, which two parameters must not
            weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
    model = model_without_weights(opened.config)  # the tensors above become its parameters
    model.load_state_dict(weights, assign=True)
    return model.eval()


def model_without_memory(path: str | Path) -> Llama:
    """The model that `load_model` gives, but without its weights: those are in `weights_of`.

    Raises:
        InputError: when there is no model, or an adapter's folder, which has to be merged first.
    """
    if is_adapter(Path(path)):
        raise InputError(f"{path}: is an adapter; make a model of it and its base with minift convert, to shard it")
    return model_without_weights(open_model(path).config)


def weights_of(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model of any format, by name, each to be used before the next is read.

    Raises:
        InputError: as `load_model`.
    """
    opened = open_model(path)
    for name in opened.specs:
        yield name, opened.read(name)


def load_weights(folder: Path, model: Llama) -> None:
    """Put the weights of a minift checkpoint into a model; if it has adapters, those of the folder's `adapter.pt`.

    Raises:
        InputError: when the file is missing or damaged, or its weights are not of this model.
    """
    if has_adapter(model):
        read_adapter(folder, model)
        return
    sources = open_weights(folder, model.config).sources
    for name, parameter in model.state_dict().items():
        put(parameter, sources[name].read())


def _write_model(
    folder: Path,
    model: Llama,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
    format: str = "native",
) -> None:
    specs = {name: Spec(dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}

    def read(name: str) -> Tensor:
        return whole(weights[name].detach()).to("cpu", specs[name].dtype)

    write = {"native": write_native, "hf": write_huggingface}[format]
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer, format)
    write(folder, model.config, specs, read)


def _save(values: dict[str, Any], file: Path) -> None:
    with file.open("xb") as opened:
        try:
            torch.save(values, opened)
        except RuntimeError as error:  # about a file that ends too early; why it does was said before
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
