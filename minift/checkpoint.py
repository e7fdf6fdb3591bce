"""Models on disk, and runs that can be continued: folders that are either whole or not there.

A minift checkpoint is a folder of `config.json` (the shape, under Hugging Face's names), `model.pt` (the weights) and
`tokenizer.model`. A step folder, `step_000300/`, is such a checkpoint and, beside it, `training.pt`: the optimizer's
moments, the scaler, the step and the data's place, all that the loop needs to go on as if it had not been stopped.

Every folder is written under another name, flushed to the disk and then renamed, so a run that is killed in the middle
of a save leaves the older checkpoint, never half of a new one. Files are read with `weights_only=True`: a checkpoint
is data, and cannot run code.

Read next: `generate.py`.
"""

import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minift.config import LlamaConfig
from minift.errors import InputError, RunError
from minift.model import Llama
from minift.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minift.train import TrainState


def save_model(folder: str | Path, model: Llama, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
    """Write a minift checkpoint: the folder appears whole, or not at all. An older one of that name is replaced.

    Args:
        dtype: of the weights in the file; by default the model's own.

    Raises:
        RunError: when the disk refuses.
    """
    _write_folder(Path(folder), lambda partial: _write_model(partial, model, tokenizer, dtype))


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Llama:
    """The model of a minift checkpoint.

    Args:
        dtype: of the weights in memory; None keeps the file's.

    Raises:
        InputError: when the folder is no checkpoint, or a tensor is missing, unexpected or of the wrong shape.
    """
    folder = Path(path)
    config_file, weights_file = folder / "config.json", folder / "model.pt"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise InputError(f"{folder}: not a minift checkpoint: it has no {file.name}")
    config = LlamaConfig.from_file(config_file)
    with torch.device("meta"):  # shapes only; the file's tensors become the parameters
        model = Llama(config)
    weights = _load(weights_file)
    _check_weights(model, weights, weights_file)
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def save_step(run: Path, state: "TrainState", tokenizer: Tokenizer) -> Path:
    """Write `step_NNNNNN/` into a run's folder. Raises RunError when the disk refuses."""
    folder = run / f"step_{state.step:06d}"

    def write(partial: Path) -> None:
        _write_model(partial, state.model, tokenizer, None)
        training = {
            "step": state.step,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "batches": state.batches.state_dict(),
        }
        _save(training, partial / "training.pt")

    _write_folder(folder, write)
    return folder


def load_step(folder: Path, state: "TrainState") -> None:
    """Put a step folder's weights, optimizer, scaler, step and place in the data into `state`.

    Raises:
        InputError: when a file is missing or damaged, or the weights are not of this model.
    """
    weights = _load(folder / "model.pt")
    _check_weights(state.model, weights, folder / "model.pt")
    state.model.load_state_dict(weights)
    training = _load(folder / "training.pt")
    try:
        state.optimizer.load_state_dict(training["optimizer"])
        state.scaler.load_state_dict(training["scaler"])
        state.batches.load_state_dict(training["batches"])
        state.step = training["step"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / 'training.pt'}: not the state of such a run: {error}") from None


def newest_step(run: Path) -> Path | None:
    """The step folder with the highest number, or None."""
    folders = [folder for folder in run.glob("step_*") if folder.is_dir() and folder.name[5:].isdecimal()]
    return max(folders, key=lambda folder: int(folder.name[5:]), default=None)


def _write_model(folder: Path, model: Llama, tokenizer: Tokenizer, dtype: torch.dtype | None) -> None:
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    _save(weights, folder / "model.pt")
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")
    tokenizer.save(folder)


def _write_folder(folder: Path, write: Any) -> None:
    """Let `write` fill a folder beside `folder`, flush it to the disk, then give it its name."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in (*partial.iterdir(), partial):
            _sync(file)
        if folder.exists():
            _replace(folder, partial)
        else:
            partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _replace(folder: Path, new: Path) -> None:
    """Give `new` the name of `folder`, which is whole under one name or another at every moment."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save(values: dict[str, Any], file: Path) -> None:
    try:
        torch.save(values, file)
    except RuntimeError as error:  # torch's file writer reports a full disk so
        raise OSError(str(error).splitlines()[0]) from None


def _load(file: Path) -> dict[str, Any]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{file}: damaged, or not a file of tensors: {reason[0]}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds {type(values).__name__}, not named values")
    return values


def _check_weights(model: Llama, weights: dict[str, Tensor], file: Path) -> None:
    wanted = model.state_dict()
    for name in wanted:
        if name not in weights:
            raise InputError(f"{file}: tensor {name} is missing")
    for name, tensor in weights.items():
        if name not in wanted:
            raise InputError(f"{file}: tensor {name} is not part of this model")
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise InputError(f"{file}: tensor {name} holds {tensor.dtype}, not floating-point weights")
        if not isinstance(tensor, Tensor) or tensor.shape != wanted[name].shape:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{file}: tensor {name} is {found}; config.json makes it {list(wanted[name].shape)}")
