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

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.config import SAVE_FORMATS
from minift.distributed.world import METADATA, World, is_sharded, like, put, whole
from minift.errors import InputError, RunError, one_line
from minift.formats import open_model
from minift.formats.files import Spec
from minift.formats.huggingface import write_huggingface
from minift.formats.native import open_weights, write_native
from minift.formats.pt_file import load_pt
from minift.lora import (
    adapter_weights,
    base_checksum,
    has_adapter,
    merge,
    merged_weights,
    put_peft,
    read_adapter,
    write_adapter,
)
from minift.model import Llama
from minift.state import TrainState
from minift.storage.adapters import base_of, is_adapter
from minift.storage.atomic import partial_name, write_folder
from minift.storage.checksums import CHECKSUMS, hold_against, read_checksums, readable_checksums, write_checksums
from minift.storage.links import check_links
from minift.tokenizer.base import SentencePieceTokenizer, Tokenizer, tokenizer_bin

STEP_FILES = {"config.json", "training.pt"}  # that each has; a tokenizer's; and one of these:
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
    with torch.device("meta"):  # shapes only; the tensors above become the parameters
        model = Llama(opened.config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def model_without_memory(path: str | Path) -> Llama:
    """The model that `load_model` gives, but without its weights: those are in `weights_of`.

    Raises:
        InputError: when there is no model, or an adapter's folder, which has to be merged first.
    """
    if is_adapter(Path(path)):
        raise InputError(f"{path}: is an adapter; make a model of it and its base with minift convert, to shard it")
    with torch.device("meta"):
        return Llama(open_model(path).config)


def weights_of(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model of any format, by name, each to be used before the next is read.

    Raises:
        InputError: as `load_model`.
    """
    opened = open_model(path)
    for name in opened.specs:
        yield name, opened.read(name)


def save_step(run: Path, state: TrainState, tokenizer: Tokenizer | None, keep: int = 0) -> Path:
    """Write `step_NNNNNN/` into a run's folder, then remove those before it, but for the `keep` newest (0: keep all).

    Every rank must ask.

    Raises:
        RunError: when the disk refuses.
    """
    folder, world = run / f"step_{state.step:06d}", state.world
    sharded = world.parallel == "fsdp"
    if sharded:
        from minift.distributed.shards import write_shards
    random, *others = world.gather({"cpu": torch.get_rng_state(), "cuda": _cuda_rng_states()})

    def write(partial: Path) -> None:
        if sharded:
            world.wait()  # for the folder to be there
            write_shards(partial, _tensors(state))
            (partial / "config.json").write_text(state.model.config.to_json(), encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(partial, tokenizer, "native")
        elif has_adapter(state.model):  # the weights are those of the model that the run began with
            write_adapter(partial, adapter_weights(state.model))
            (partial / "config.json").write_text(state.model.config.to_json(), encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(partial, tokenizer, "native")
        else:
            _write_model(partial, state.model, merged_weights(state.model), tokenizer, None)
        training = {
            "step": state.step,
            "optimizer": None if sharded else state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "batches": state.batches.state_dict(),
            "base": base_checksum(state.model) if has_adapter(state.model) and not sharded else None,
            "random": random,
            "random_of_other_ranks": others,
        }
        _save(training, partial / "training.pt")
        write_checksums(partial)

    if world.is_main:
        write_folder(folder, write)
        _remove_older(run, state.step, keep)
    elif sharded:
        world.wait()
        write_shards(partial_name(folder), _tensors(state))
    world.wait()
    return folder


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """What a sharded run keeps: the trained weights and their moments, by name. Moments are made if need be."""
    found: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.detach()
            found |= {f"{name} {key}": moment for key, moment in state.optimizer.state_of(parameter).items()}
    return found


def _remove_older(run: Path, step: int, keep: int) -> None:
    # A folder of a later step is not this run's: it was found damaged, and passed over.
    folders = [other for other in step_folders(run) if int(other.name[5:]) <= step]
    for old in folders[keep:] if keep else []:
        gone = old.with_name(f".{old.name}.old")  # a folder that is being removed has no step's name any more
        try:
            old.rename(gone)
        except OSError as error:
            raise RunError(f"{old}: cannot be removed: {error.strerror or error}") from None
        shutil.rmtree(gone, ignore_errors=True)


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


def save_best(folder: Path, state: TrainState, tokenizer: Tokenizer | None) -> None:
    """Write the weights that `load_weights` reads: a minift checkpoint, or the adapters of a model that has some.

    Every rank must ask.

    Raises:
        RunError: when the disk refuses.
    """
    if has_adapter(state.model):
        adapter = adapter_weights(state.model)
        if state.world.is_main:
            write_folder(folder, lambda partial: write_adapter(partial, adapter))
    else:
        save_model(folder, state.model, tokenizer, world=state.world)


def load_step(folder: Path, state: TrainState) -> None:
    """Put a step folder's weights, optimizer, scaler, step and place in the data into `state`.

    Raises:
        InputError: when a file is missing or damaged, or the weights are not of this model.
    """
    sharded, rank = is_sharded(folder), state.world.rank
    if sharded:
        from minift.distributed.shards import read_shards

        read_shards(folder, _tensors(state))
    else:
        load_weights(folder, state.model)
    training = load_pt(folder / "training.pt")
    known = has_adapter(state.model) and not sharded and state.world.parallel != "fsdp"
    if known and training.get("base") != base_checksum(state.model):
        raise InputError(
            f"{folder}: the model that the run began with has changed since; its adapters are not for this"
        )
    try:
        if not sharded:
            _load_moments(state, training["optimizer"])
        state.scaler.load_state_dict(training["scaler"])
        state.batches.load_state_dict(training["batches"])
        state.step = training["step"]
        randoms = [training["random"], *training["random_of_other_ranks"]]
        if rank < len(randoms):  # a rank that was not there before goes on with its seed
            torch.set_rng_state(randoms[rank]["cpu"])
            if len(randoms[rank]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(randoms[rank]["cuda"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / 'training.pt'}: not the state of such a run: {error}") from None


def _load_moments(state: TrainState, saved: dict[str, Any]) -> None:
    """The optimizer's state as one process has it; where the model is sharded, this rank's part of it."""
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for i, moments in saved["state"].items():
        for key, moment in moments.items():
            moments[key] = like(parameters[i], moment.to(parameters[i].device)) if moment.ndim else moment
    state.optimizer.load_state_dict(saved)


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, the newest first."""
    folders = [folder for folder in run.glob("step_*") if folder.is_dir() and folder.name[5:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True)


def check_step(folder: Path) -> None:
    """Hold a step folder's files against its checksums, as `sha256sum -c SHA256SUMS` does.

    Raises:
        InputError: for a damaged or missing file, by name.
    """
    sums = folder / CHECKSUMS
    with readable_checksums(sums):
        check_links(folder)
        listed = read_checksums(sums)
        ours = {file.name for file in folder.iterdir() if file.name == METADATA or not file.name.startswith(".")}
        there = ours - {CHECKSUMS}
        weights = {METADATA} if METADATA in listed else {WEIGHT_FILES[WEIGHT_FILES[1] in listed]}
        needed = STEP_FILES | weights
        if unlisted := sorted((there | needed) - set(listed)):
            raise InputError(f"{sums}: damaged, or not of this folder: does not list {unlisted[0]}")
        for name in sorted(set(listed) - there):
            raise InputError(f"{folder / one_line(name)}: missing")
        hold_against(listed, folder)


def _cuda_rng_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


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


def save_tokenizer(folder: Path, tokenizer: Tokenizer, format: str) -> None:
    """Write a tokenizer's files, and those that a format's own programs look for.

    Hugging Face's tools read `tokenizer.json`, which is made from a SentencePiece model where there is none. llama2.c's
    read `tokenizer.bin`. And where only the model's config said which ids are BOS and EOS, a file says so now.

    Raises:
        InputError: when the `hf` extra is missing.
    """
    tokenizer.save(folder)
    if format == "hf" or not isinstance(tokenizer, SentencePieceTokenizer):
        from minift.tokenizer.huggingface import config_file, json_file

        made = config_file(tokenizer) | (json_file(tokenizer) if format == "hf" else {})
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    if format == "llama2c" and "tokenizer.model" in tokenizer.files:  # which may lie beside a tokenizer.json
        pieces = SentencePieceTokenizer(tokenizer.files["tokenizer.model"])
        if pieces.vocab_size == tokenizer.vocab_size:
            (folder / "tokenizer.bin").write_bytes(tokenizer_bin(pieces))


def _save(values: dict[str, Any], file: Path) -> None:
    with file.open("xb") as opened:
        try:
            torch.save(values, opened)
        except RuntimeError as error:  # about a file that ends too early; why it does was said before
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
