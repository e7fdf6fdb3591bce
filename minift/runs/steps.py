"""The state of a run on disk: `step_NNNNNN/`, written so that a resumed run takes the same steps, bit for bit.

    config.json, tokenizer.model …    as in a minift checkpoint
    model.pt                          the weights; of a LoRA run adapter.pt, its adapters alone
    training.pt                       the optimizer's moments, the scaler, the step, the place in the data, and the
                                      states of torch's random numbers, of each rank
    SHA256SUMS                        the checksums of all these files

In a sharded run (fsdp) each rank writes its part of the weights and moments (`distributed/shards.py`).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.checkpoint import load_weights, save_model, write_model
from minift.distributed.sharding import METADATA, is_sharded, shard_like
from minift.errors import InputError, RunError, one_line
from minift.formats.peft import write_adapter
from minift.formats.pt_file import load_pt
from minift.lora import adapter_weights, base_checksum, has_adapter, merged_weights
from minift.optim import moments_of
from minift.storage.atomic import partial_name, write_folder
from minift.storage.checksums import CHECKSUMS, check_files, read_checksums, readable_checksums, write_checksums
from minift.storage.links import check_links
from minift.storage.system import MOVES_OPEN_FILES, move
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import save_tokenizer
from minift.train import TrainState

WEIGHT_FILES = ("model.pt", "adapter.pt")  # one of them; in a sharded run the ranks' parts instead
STEP_FILES = {"config.json", "training.pt"}  # in every step folder, with a tokenizer's files and the weights


# Writing --------------------------------------------------------------------------------------------------------------


def save_step(run: Path, state: TrainState, tokenizer: Tokenizer | None, keep: int = 0) -> Path:
    """Write `step_NNNNNN/` into a run's folder, then remove all older ones but the `keep` newest (0: keep all).

    Call it on all ranks.

    Raises:
        RunError: when the disk refuses.
    """
    folder, world = run / f"step_{state.step:06d}", state.world
    random_states = world.gather(_random_state())

    def write(partial: Path) -> None:
        _write_weights(partial, state, tokenizer)
        _save(_training_values(state, random_states), partial / "training.pt")
        write_checksums(partial)

    if world.is_main:
        write_folder(folder, write)
        _remove_older(run, state.step, keep)
    elif world.parallel == "fsdp":
        from minift.distributed.shards import write_shards

        world.wait()  # until the main rank has made the folder
        write_shards(partial_name(folder), _shards(state))
    world.wait()
    return folder


def _write_weights(partial: Path, state: TrainState, tokenizer: Tokenizer | None) -> None:
    """Write the weights that are trained, the config and the tokenizer. Only the main rank calls it."""
    if state.world.parallel != "fsdp" and not has_adapter(state.model):
        write_model(partial, state.model, merged_weights(state.model), tokenizer)
        return
    if state.world.parallel == "fsdp":
        from minift.distributed.shards import write_shards

        state.world.wait()  # the other ranks write into the folder, too
        write_shards(partial, _shards(state))
    else:  # all other weights are those of the model that the run began with
        write_adapter(partial, adapter_weights(state.model))
    (partial / "config.json").write_text(state.model.config.to_json(), encoding="utf-8")
    if tokenizer is not None:
        save_tokenizer(partial, tokenizer, "native")


def _training_values(state: TrainState, random_states: list[Any]) -> dict[str, Any]:
    """Return what training.pt holds. `random_states`: of each rank, the main one first."""
    sharded = state.world.parallel == "fsdp"
    return {
        "step": state.step,
        "optimizer": None if sharded else state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "batches": state.batches.state_dict(),
        "base": base_checksum(state.model) if has_adapter(state.model) and not sharded else None,
        "random": random_states[0],
        "random_of_other_ranks": random_states[1:],
    }


def _random_state() -> dict[str, Any]:
    """Return the states of this process's random numbers: the CPU's, and those of all its GPUs."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _shards(state: TrainState) -> dict[str, Tensor]:
    """Return this rank's part of the trained weights and of their moments, by name. Moments are made if need be."""
    shards: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            shards[name] = parameter.detach()
            shards |= {f"{name} {key}": moment for key, moment in moments_of(state.optimizer, parameter).items()}
    return shards


def _remove_older(run: Path, step: int, keep: int) -> None:
    """Remove the step folders up to step `step`, but for the `keep` newest of them (0: remove none)."""
    # The folder of a later step stays out of the count: it was found damaged, and passed over.
    folders = [folder for folder in step_folders(run) if int(folder.name[5:]) <= step]
    for old in folders[keep:] if keep else []:
        renamed = old.with_name(f".{old.name}.old")  # a folder that is half removed must not have the name of a step
        try:
            move(old, renamed)
        except OSError as error:
            raise RunError(f"{old}: cannot be removed: {error.strerror or error}") from None
        shutil.rmtree(renamed, ignore_errors=True)


def save_best(folder: Path, state: TrainState, tokenizer: Tokenizer | None) -> None:
    """Write the weights that `load_weights` reads: a minift checkpoint; of a LoRA run, its adapters.

    Call it on all ranks.

    Raises:
        RunError: when the disk refuses.
    """
    if has_adapter(state.model):
        adapter = adapter_weights(state.model)
        if state.world.is_main:
            write_folder(folder, lambda partial: write_adapter(partial, adapter))
    else:
        save_model(folder, state.model, tokenizer, world=state.world)


# Reading --------------------------------------------------------------------------------------------------------------


def step_folders(run: Path) -> list[Path]:
    """Return the step folders of a run, the newest first."""
    folders = [folder for folder in run.glob("step_*") if folder.is_dir() and folder.name[5:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True)


def check_step(folder: Path) -> None:
    """Compare a step folder's files with its checksums, as `sha256sum -c SHA256SUMS` does.

    Raises:
        InputError: for a damaged or missing file, by name.
    """
    sums = folder / CHECKSUMS
    with readable_checksums(sums):
        check_links(folder)
        listed = read_checksums(sums)
        found = {file.name for file in folder.iterdir() if file.name == METADATA or not file.name.startswith(".")}
        found -= {CHECKSUMS}
        weights = METADATA if METADATA in listed else WEIGHT_FILES[WEIGHT_FILES[1] in listed]
        if unlisted := sorted((found | STEP_FILES | {weights}) - set(listed)):
            raise InputError(f"{sums}: damaged, or not of this folder: does not list {unlisted[0]}")
        for name in sorted(set(listed) - found):
            raise InputError(f"{folder / one_line(name)}: missing")
        check_files(listed, folder)


def load_step(folder: Path, state: TrainState) -> None:
    """Load a step folder into `state`: weights, optimizer, scaler, step, place in the data, and random numbers.

    Call it on all ranks; there may be more or fewer of them than when the folder was written.

    Raises:
        InputError: when a file is missing or damaged, or the weights are not of this model.
    """
    sharded = is_sharded(folder)
    if sharded:
        from minift.distributed.shards import read_shards

        read_shards(folder, _shards(state))
    else:
        load_weights(folder, state.model)
    training = load_pt(folder / "training.pt", mapped=MOVES_OPEN_FILES)  # the moments stay as they are loaded
    if has_adapter(state.model) and not sharded and state.world.parallel != "fsdp":
        _check_base(folder, training.get("base"), state)
    try:
        if not sharded:
            _load_moments(state, training["optimizer"])
        state.scaler.load_state_dict(training["scaler"])
        state.batches.load_state_dict(training["batches"])
        state.step = training["step"]
        _load_random_state([training["random"], *training["random_of_other_ranks"]], state.world.rank)
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / 'training.pt'}: not the state of such a run: {error}") from None


def _check_base(folder: Path, checksum: Any, state: TrainState) -> None:
    """Raise InputError unless the frozen weights are those that the saved adapters were trained with."""
    if checksum != base_checksum(state.model):
        raise InputError(
            f"{folder}: the model that the run began with has changed since, and these adapters do not fit it; "
            "restore that model, or start a new run"
        )


def _load_moments(state: TrainState, saved: dict[str, Any]) -> None:
    """Load the optimizer's state as one process saves it; where the model is sharded, this rank's part of it."""
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for i, moments in saved["state"].items():
        for key, moment in moments.items():
            moments[key] = shard_like(parameters[i], moment.to(parameters[i].device)) if moment.ndim else moment
    state.optimizer.load_state_dict(saved)


def _load_random_state(states: list[Any], rank: int) -> None:
    """Restore the random numbers of this rank. A rank that the saved run did not have continues with its own seed."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"])
    if len(states[rank]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[rank]["cuda"])


def _save(values: dict[str, Any], file: Path) -> None:
    """Write values with `torch.save`. Raises OSError when the disk refuses, in place of PyTorch's RuntimeError."""
    with file.open("xb") as opened:
        try:
            torch.save(values, opened)
        except RuntimeError as error:  # about a file that ends too early; its context says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
