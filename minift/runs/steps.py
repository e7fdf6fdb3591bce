"""A run's state on disk."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.checkpoint import WEIGHT_FILES, _save, _write_model, load_weights, save_model
from minift.distributed.sharding import METADATA, is_sharded, like
from minift.errors import InputError, RunError, one_line
from minift.formats.peft import write_adapter
from minift.formats.pt_file import load_pt
from minift.lora import adapter_weights, base_checksum, has_adapter, merged_weights
from minift.storage.atomic import partial_name, write_folder
from minift.storage.checksums import CHECKSUMS, hold_against, read_checksums, readable_checksums, write_checksums
from minift.storage.links import check_links
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import save_tokenizer
from minift.train import TrainState

STEP_FILES = {"config.json", "training.pt"}  # that each has; a tokenizer's; and one of these:


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
