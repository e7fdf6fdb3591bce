"""The state of a run on disk: `step_NNNNNN/`, written so that a resumed run takes the same steps, bit for bit.

    config.json, tokenizer.model …    as in a minift checkpoint
    model.pt                          the weights; of a LoRA run adapter.pt, its adapters alone
    training.pt                       the optimizer's moments, the scaler, the step, the place in the data, and the
                                      states of torch's random numbers, of each rank
    SHA256SUMS                        the checksums of all these files

In a sharded run (fsdp) each rank writes its part of the weights and moments (`distributed/shards.py`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.checkpoint import load_weights, save_model, write_model
from minift.distributed.sharding import METADATA, is_sharded, shard_like
from minift.errors import InputError, one_line
from minift.formats.peft import write_adapter
from minift.formats.pt_file import load_pt
from minift.lora import adapter_weights, base_checksum, has_adapter, merged_weights
from minift.model import Llama
from minift.optim import moments_of
from minift.runs.contents import run_id
from minift.runs.progress import Best
from minift.storage.atomic import partial_name, remove_folder, write_file, write_folder
from minift.storage.checksums import (
    CHECKSUMS,
    check_files,
    check_model,
    read_checksums,
    readable_checksums,
    write_checksums,
)
from minift.storage.links import check_links
from minift.storage.system import MOVES_OPEN_FILES
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import save_tokenizer
from minift.train import TrainState
from minift.values import read_json

WEIGHT_FILES = ("model.pt", "adapter.pt")  # one of them; in a sharded run the ranks' parts instead
STEP_FILES = {"config.json", "training.pt"}  # in every step folder, with a tokenizer's files and the weights


# Writing --------------------------------------------------------------------------------------------------------------


def save_step(run: Path, state: TrainState, tokenizer: Tokenizer | None, keep: int | None = 0) -> Path:
    """Write `step_NNNNNN/` into a run's folder, then remove all older ones but the `keep` newest (0: all; None: one).

    Call it on all ranks.

    Raises:
        RunError: when the disk refuses.
    """
    folder, world = run / f"step_{state.step:06d}", state.world
    random_states = world.gather(random_state())

    def write(partial: Path) -> None:
        _write_weights(partial, state, tokenizer)
        _save({"run": run_id(run), **_training_values(state, random_states)}, partial / "training.pt")
        write_checksums(partial)

    if world.is_main:
        write_folder(folder, write)
        remove_older(run, state.step, 1 if keep is None else keep or None)
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


def random_state() -> dict[str, Any]:
    """Return the states of this process's random numbers: the CPU's, and those of all its GPUs."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _shards(state: TrainState) -> dict[str, Tensor]:
    """Return this rank's part of the weights (of a LoRA run, of the adapters), and of the moments of those trained.

    Moments are made if need be.
    """
    shards: dict[str, Tensor] = {}
    adapted = has_adapter(state.model)
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad or not adapted:  # what adapters leave as it is, the base of the run has
            shards[name] = parameter.detach()
        if parameter.requires_grad:
            shards |= {f"{name} {key}": moment for key, moment in moments_of(state.optimizer, parameter).items()}
    return shards


def remove_older(run: Path, step: int, keep: int | None) -> None:
    """Remove the step folders up to step `step`, but for the `keep` newest of them (None: remove none)."""
    # The folder of a later step stays out of the count: it was found damaged, and passed over.
    folders = [folder for folder in step_folders(run) if int(folder.name[5:]) <= step]
    for old in [] if keep is None else folders[keep:]:
        remove_folder(old)


def save_best(folder: Path, state: TrainState, tokenizer: Tokenizer | None, best: Best) -> None:
    """Write the weights that `load_best` reads: a minift checkpoint; of a LoRA run, its adapters. Call on all ranks.

    Next to the folder is a file with their step: a run that is resumed may have another best step than one that a later
    step, which is lost, has written.

    Raises:
        RunError: when the disk refuses.
    """
    note = folder.with_suffix(".json")
    if state.world.is_main:
        note.unlink(missing_ok=True)
    if has_adapter(state.model):
        adapter = adapter_weights(state.model)

        def write(partial: Path) -> None:
            write_adapter(partial, adapter)
            write_checksums(partial)

        if state.world.is_main:
            write_folder(folder, write)
    else:
        save_model(folder, state.model, tokenizer, world=state.world)
    if state.world.is_main:
        text = json.dumps({"step": best.step, "validation_loss": best.loss})
        write_file(note, lambda partial: partial.write_text(text, encoding="utf-8"))


def load_best(folder: Path, model: Llama, best: Best) -> None:
    """Copy the weights that `save_best` wrote into a model. Call on all ranks.

    Raises:
        InputError: when a file is missing or damaged, or the weights are not of this model, or not those of `best`.
    """
    if (step := read_json(folder.with_suffix(".json")).get("step")) != best.step:
        raise InputError(f"{folder}: is the model of step {step}, not that of step {best.step}")
    check_model(folder)
    load_weights(folder, model)


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
        InputError: when a file is missing or damaged, or the weights are not of this model, or of another run.
    """
    sharded = is_sharded(folder)
    if sharded:
        from minift.distributed.shards import read_shards

        read_shards(folder, _shards(state))
    else:
        load_weights(folder, state.model)
    training = load_pt(folder / "training.pt", mapped=MOVES_OPEN_FILES)  # the moments stay as they are loaded
    _check_run(folder, training)
    if has_adapter(state.model) and not sharded and state.world.parallel != "fsdp":
        _check_base(folder, training.get("base"), state)
    try:
        if not sharded:
            _load_moments(state, training["optimizer"])
        state.scaler.load_state_dict(training["scaler"])
        state.batches.load_state_dict(training["batches"])
        state.step = training["step"]
        states = [training["random"], *training["random_of_other_ranks"]]
        if state.world.rank < len(states):  # a rank that the saved run did not have continues with its own seed
            load_random_state(states[state.world.rank])
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / 'training.pt'}: not the state of such a run: {error}") from None


def _check_run(folder: Path, training: dict[str, Any]) -> None:
    """Raise InputError unless a step folder was saved by the run that it is in, after the step of its name."""
    own, number = run_id(folder.parent), int(folder.name[5:])
    if None not in (own, saved := training.get("run")) and saved != own:  # earlier versions recorded none
        raise InputError(f"{folder}: was saved by another run than that of {folder.parent}; put it back, or remove it")
    if (step := training.get("step", number)) != number:
        raise InputError(f"{folder}: holds the state after step {step}; give it that name, or remove it")


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


def load_random_state(state: dict[str, Any]) -> None:
    """Restore the random numbers that `random_state` has returned; a GPU's where there are as many of them."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _save(values: dict[str, Any], file: Path) -> None:
    """Write values with `torch.save`. Raises OSError when the disk refuses, in place of PyTorch's RuntimeError."""
    with file.open("xb") as opened:
        try:
            torch.save(values, opened)
        except RuntimeError as error:  # about a file that ends too early; its context says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
