"""A model on disk: saved as a folder, and loaded from any of the formats that a Llama comes in.

A minift checkpoint is a folder of `config.json` (the shape, under Hugging Face's names), `model.pt` (the weights by
name) and the tokenizer's files. Three rules hold for whatever is saved here:

* A folder is complete or not there. It is written under another name, flushed to the disk and then renamed, so a
  process that is killed in the middle of a save leaves the older checkpoint, never half of a new one.
* It carries checksums of its files, by which damage is noticed before a model is used (`storage/checksums.py`).
* A checkpoint is data and cannot run code: it is read with `weights_only=True`, after a look at what its pickle holds.

What other programs write is loaded as well; `formats/open.py` lists it. A run's state (the step folders from which a
run is resumed) is written by `runs/steps.py`.

    python -c "import minift; minift.save_model('my-base', minift.load_model('bundled'))"

Read next: `runner.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minift.distributed.sharding import copy_into, gathered
from minift.distributed.world import World
from minift.errors import InputError
from minift.formats.carried import Carried
from minift.formats.files import Spec, Specs
from minift.formats.huggingface import write_huggingface
from minift.formats.native import open_weights, write_native
from minift.formats.open import check_model_files, open_model
from minift.formats.peft import read_adapter
from minift.formats.shapes import model_without_weights
from minift.lora import has_adapter, merged_weights
from minift.model import Llama
from minift.storage.atomic import write_folder
from minift.storage.checksums import write_checksums
from minift.storage.system import MOVES_OPEN_FILES
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import save_tokenizer

FORMATS = ("native", "hf")  # that a model is saved in; `minift convert` writes others

# Loading --------------------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    check: bool = True,
) -> Llama:
    """Return the model of any format, in evaluation mode.

    On a CPU, where all tensors have this dtype and minift's layout in their files, they become the parameters where
    they are, mapped into memory. Otherwise they are copied, cast or permuted one by one. Either way memory holds the
    model once, and one tensor more.

    Args:
        path: a folder or file of a format in `formats/open.py`; an adapter's folder is merged with its base. A string
            may also be "bundled", or a name on Hugging Face's hub whose files are in its cache.
        dtype: of the weights in memory; None keeps the file's (the widest, where it has several).
        check: compare the model's files with the checksums in its folder, where it has some.

    Raises:
        InputError: when there is no model, a file is damaged, or a tensor is missing, unexpected, of the wrong shape,
            not finite, or beyond the range of the dtype.
    """
    opened, device = open_model(path), torch.device(device)
    if check:
        check_model_files(path)
    dtype = dtype or opened.dtype
    mapped = MOVES_OPEN_FILES and device.type == "cpu"  # or its folder could not be replaced while the model is used
    mapped = mapped and all(source.spec.dtype == dtype and source.needs_no_copy for source in opened.sources.values())
    weights: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in opened.specs:
        if mapped and (view := opened.view(name)).untyped_storage().data_ptr() not in storages:
            storages.add(view.untyped_storage().data_ptr())
            weights[name] = view
        else:  # also a second name of the same bytes: parameters must not share them
            weights[name] = opened.read(name, dtype, device, copy=True)
    model = model_without_weights(opened.config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def model_without_memory(path: str | Path) -> Llama:
    """Return the model that `load_model` gives, but without its weights: `weights_of` gives those.

    Raises:
        InputError: as `load_model`, for what can be told without reading the weights.
    """
    return model_without_weights(open_model(path).config)


def weights_of(path: str | Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model of any format, by name, each to be used before the next one is read.

    Raises:
        InputError: as `load_model`.
    """
    opened = open_model(path)
    for name in opened.specs:
        yield name, opened.read(name, dtype)


def load_weights(folder: Path, model: Llama) -> None:
    """Copy the weights of a minift checkpoint into a model; if it has adapters, those of the folder's `adapter.pt`.

    Call on all ranks.

    Raises:
        InputError: when the file is missing or damaged, or its weights are not of this model.
    """
    if has_adapter(model):
        read_adapter(folder, model)
        return
    opened = open_weights(folder, model.config)
    for name, parameter in model.state_dict().items():
        copy_into(parameter, opened.sources[name].read())


# Saving ---------------------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path,
    model: Llama,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    format: str = "native",
    world: World | None = None,
    carried: Carried | None = None,
) -> None:
    """Write a model and its tokenizer into a folder, which replaces an older one of that name.

    Adapters are merged in what is written; the model stays as it is.

    Args:
        dtype: of the weights in the file; by default the model's own, or those of `carried`.
        format: native, or hf for a Hugging Face folder.
        carried: for hf: what else the folder gets, and the dtype of each tensor, as in the folder that the model is
            from. A tensor whose values are beyond the range of float16 stays as it is.
        world: the processes over which the model may be sharded: call on all ranks. The main rank writes all of it, one
            tensor at a time.

    Raises:
        InputError: when the `hf` extra is missing.
        RunError: when the disk refuses.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; choose from {', '.join(FORMATS)}")
    weights = merged_weights(model)
    dtypes = _dtypes_in_range(weights, carried.dtypes) if carried is not None and dtype is None else {}
    carried = carried and replace(carried, ends=model.config.eos_token_ids)

    def write(partial: Path) -> None:
        specs = {
            name: Spec(dtypes.get(name, dtype or tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()
        }
        write_model(partial, model, weights, tokenizer, specs, format, carried)
        write_checksums(partial)

    if world is None or world.is_main:
        write_folder(Path(folder), write)
    else:
        for tensor in weights.values():  # takes part in gathering them, in the order in which they are written
            gathered(tensor)
    if world is not None:
        world.wait()


def _dtypes_in_range(weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the dtype in which each tensor is written, all its values being in its range. Call on all ranks."""
    chosen = dict(dtypes)
    largest = torch.finfo(torch.float16).max
    for name in [name for name, dtype in dtypes.items() if dtype == torch.float16]:
        if gathered(weights[name].detach()).abs().max() > largest:  # bfloat16 has the range of float32
            chosen[name] = weights[name].dtype
    return chosen


def write_model(
    folder: Path,
    model: Llama,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    specs: Specs | None = None,
    format: str = "native",
    carried: Carried | None = None,
) -> None:
    """Write the files of a model into a folder that is there.

    Args:
        weights: the `merged_weights`; where they are sharded, each is gathered when it is written.
        specs: dtype and shape of each in the file; by default its own.
        carried: what else a Hugging Face folder gets; a tokenizer's files are then written as they are.
    """
    specs = specs or {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}

    def read(name: str) -> Tensor:
        return gathered(weights[name].detach()).to("cpu", specs[name].dtype)

    if tokenizer is not None and carried is None:
        save_tokenizer(folder, tokenizer, format)
    elif tokenizer is not None:
        tokenizer.save(folder)
    if format == "native":
        write_native(folder, model.config, specs, read)
    else:
        write_huggingface(folder, model.config, specs, read, carried=carried)
