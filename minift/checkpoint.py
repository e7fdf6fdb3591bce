"""Models on disk, and runs that can be continued: folders that are either whole or not there.

A minift checkpoint is a folder of `config.json` (the shape, under Hugging Face's names), `model.pt` (the weights) and
the tokenizer's files; what other programs write is read as well (`formats/`). A step folder, `step_000300/`, is such a
checkpoint and, beside it, `training.pt`: the optimizer's moments, the scaler, the step, the data's place and the state
of torch's random numbers, all that the loop needs to go on as if it had not been stopped.

Every folder is written under another name, flushed to the disk and then renamed, so a run that is killed in the middle
of a save leaves the older checkpoint, never half of a new one. A step folder carries checksums of its files, and is
held against them before anything is resumed: a damaged one is passed over for the one before it. Files are read with
`weights_only=True`: a checkpoint is data, and cannot run code.

Read next: `generate.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minift.config import SAVE_FORMATS
from minift.errors import InputError, RunError, one_line
from minift.formats import open_model
from minift.formats.files import Spec
from minift.formats.huggingface import write_huggingface
from minift.formats.native import open_weights, write_native
from minift.formats.pt_file import load_pt
from minift.lora import (
    base_checksum,
    base_of,
    has_adapter,
    is_adapter,
    merge,
    merged_weights,
    put_peft,
    read_adapter,
    write_adapter,
)
from minift.model import Llama
from minift.tokenizer import SentencePieceTokenizer, Tokenizer, tokenizer_bin

if TYPE_CHECKING:
    from minift.train import TrainState

CHECKSUMS = "SHA256SUMS"  # of a step folder: a checksum for each of its files, for `sha256sum -c`, too
STEP_FILES = {"config.json", "training.pt"}  # that each has; a tokenizer's; and one of these:
WEIGHT_FILES = ("model.pt", "adapter.pt")


def save_model(
    folder: str | Path,
    model: Llama,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    format: str = "native",
) -> None:
    """Write a model and its tokenizer: the folder appears whole, or not at all. An older one of that name is replaced.

    Args:
        dtype: of the weights in the file; by default the model's own.
        format: native, or hf for a Hugging Face folder.

    Raises:
        InputError: when the `hf` extra is missing.
        RunError: when the disk refuses.
    """
    if format not in SAVE_FORMATS:
        raise InputError(f"format is {format!r}; choose from {', '.join(SAVE_FORMATS)}")
    write_folder(Path(folder), lambda partial: _write_model(partial, model, tokenizer, dtype, format))


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


def save_step(run: Path, state: "TrainState", tokenizer: Tokenizer | None, keep: int = 0) -> Path:
    """Write `step_NNNNNN/` into a run's folder, then remove those before it, but for the `keep` newest (0: keep all).

    Raises:
        RunError: when the disk refuses.
    """
    folder = run / f"step_{state.step:06d}"

    def write(partial: Path) -> None:
        if has_adapter(state.model):  # the weights are those of the model that the run began with
            write_adapter(partial, state.model)
            (partial / "config.json").write_text(state.model.config.to_json(), encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(partial, tokenizer, "native")
        else:
            _write_model(partial, state.model, tokenizer, None)
        training = {
            "step": state.step,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "batches": state.batches.state_dict(),
            "base": base_checksum(state.model) if has_adapter(state.model) else None,
            "random": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng_states()},
        }
        _save(training, partial / "training.pt")
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
        (partial / CHECKSUMS).write_text("".join(sums))

    write_folder(folder, write)
    # A folder of a later step is not this run's: it was found damaged, and passed over.
    folders = [other for other in step_folders(run) if int(other.name[5:]) <= state.step]
    for old in folders[keep:] if keep else []:
        gone = old.with_name(f".{old.name}.old")  # a folder that is being removed has no step's name any more
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return folder


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
        parameter.copy_(sources[name].read())


def save_best(folder: Path, model: Llama, tokenizer: Tokenizer | None) -> None:
    """Write the weights that `load_weights` reads: a minift checkpoint, or the adapters of a model that has some.

    Raises:
        RunError: when the disk refuses.
    """
    if has_adapter(model):
        write_folder(folder, lambda partial: write_adapter(partial, model))
    else:
        save_model(folder, model, tokenizer)


def load_step(folder: Path, state: "TrainState") -> None:
    """Put a step folder's weights, optimizer, scaler, step and place in the data into `state`.

    Raises:
        InputError: when a file is missing or damaged, or the weights are not of this model.
    """
    load_weights(folder, state.model)
    training = load_pt(folder / "training.pt")
    if has_adapter(state.model) and training.get("base") != base_checksum(state.model):
        raise InputError(
            f"{folder}: the model that the run began with has changed since; its adapters are not for this"
        )
    try:
        state.optimizer.load_state_dict(training["optimizer"])
        state.scaler.load_state_dict(training["scaler"])
        state.batches.load_state_dict(training["batches"])
        state.step = training["step"]
        torch.set_rng_state(training["random"]["cpu"])
        if len(training["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(training["random"]["cuda"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / 'training.pt'}: not the state of such a run: {error}") from None


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
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in sums.read_text(encoding="utf-8").split("\n")[:-1])
        there = {file.name for file in folder.iterdir() if not file.name.startswith(".")} - {CHECKSUMS}
        needed = STEP_FILES | ({WEIGHT_FILES[0]} if WEIGHT_FILES[1] not in listed else set())
        if unlisted := sorted((there | needed) - set(listed)):
            raise InputError(f"{sums}: damaged, or not of this folder: does not list {unlisted[0]}")
        for name in sorted(set(listed) - there):
            raise InputError(f"{folder / one_line(name)}: missing")
        for name, checksum in listed.items():
            if _sha256(folder / name) != checksum:
                raise InputError(f"{folder / name}: damaged: its checksum is not that of {CHECKSUMS}")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or sums}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # not UTF-8, or a line that is no pair
        raise InputError(f"{sums}: damaged") from None


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run had begun to write, or to remove."""
    for pattern in (".*.partial", ".*.old"):
        for left in run.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _cuda_rng_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_model(
    folder: Path, model: Llama, tokenizer: Tokenizer | None, dtype: torch.dtype | None, format: str = "native"
) -> None:
    weights = merged_weights(model)
    specs = {name: Spec(dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}

    def read(name: str) -> Tensor:
        return weights[name].detach().to("cpu", specs[name].dtype)

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
        from minift.tokenizer_json import config_file, json_file

        made = config_file(tokenizer) | (json_file(tokenizer) if format == "hf" else {})
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    if format == "llama2c" and "tokenizer.model" in tokenizer.files:  # which may lie beside a tokenizer.json
        pieces = SentencePieceTokenizer(tokenizer.files["tokenizer.model"])
        if pieces.vocab_size == tokenizer.vocab_size:
            (folder / "tokenizer.bin").write_bytes(tokenizer_bin(pieces))


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, flush it to the disk, then give it its name.

    Whatever goes wrong, nothing new is left behind. Raises RunError when the disk refuses.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with _nothing_left(folder, lambda: shutil.rmtree(partial, ignore_errors=True)):
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


def write_file(file: Path, write: Callable[[Path], Any], then: Callable[[], Any] = lambda: None) -> None:
    """Let `write` make a file beside `file`, flush it to the disk, call `then`, and give it its name.

    Raises:
        RunError: when the disk refuses.
    """
    partial = file.with_name(f".{file.name}.partial")
    with _nothing_left(file, lambda: partial.unlink(missing_ok=True)):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write(partial)
        _sync(partial)
        then()
        partial.replace(file)
        _sync(file.parent)


@contextmanager
def _nothing_left(target: Path, remove: Callable[[], None]) -> Iterator[None]:
    """Whatever goes wrong in here, remove what was begun, and the folders that were made for it.

    Raises:
        RunError: for an OSError.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            remove()
        with suppress(OSError):
            for folder in made:  # innermost first, up to one that holds something or is not there
                folder.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
        raise


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
