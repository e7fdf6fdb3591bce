"""A checkpoint of one format written as another, one tensor at a time.

Converting is reading and writing: `open.py` opens the source and gives each tensor under minift's name and in minift's
layout, and the writer of the other format asks for one after the other. So only a few tensors are in memory, whatever
the model's size, and any two formats go together. The weights' bits are kept, unless a dtype is asked for; an adapter
is merged into its base. From one Hugging Face folder to another, what else is there is kept, too (`carried.py`).

    minift convert bundled my-model --to hf

The result appears complete or not at all: it is written under another name, flushed, and renamed.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minift.errors import InputError, RunError, did_you_mean
from minift.formats.carried import Carried
from minift.formats.files import Spec
from minift.formats.huggingface import write_huggingface
from minift.formats.llama2c import HEADER_BYTES, open_llama2c, write_llama2c
from minift.formats.meta import SIDECAR, unsaid, write_meta
from minift.formats.native import write_native
from minift.formats.open import FORMATS, carried_from, check_model_files, open_model, recognise
from minift.formats.opened import Opened
from minift.storage.atomic import write_file, write_folder
from minift.storage.links import check_name
from minift.storage.names import base_of, is_adapter, model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import TOKENIZER_FILES, check_fit, load_tokenizer, tokenizer_files
from minift.tokenizer.save import save_tokenizer

_WRITERS: dict[str, Callable[..., None]] = {"native": write_native, "hf": write_huggingface, "meta": write_meta}
# The files of a checkpoint: only such files are removed when a checkpoint is replaced.
_BELONGS = (
    *TOKENIZER_FILES,
    "tokenizer.bin",
    "model.pt",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "consolidated.*.pth",
    "config.json",
    "generation_config.json",
    "params.json",
    SIDECAR,
    "README.md",
    "LICENSE*",
    ".gitattributes",
)


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    Attributes:
        opened: the source.
        specs: dtype and shape of every tensor that was written.
        notes: what a user should know about it.
    """

    opened: Opened
    specs: dict[str, Spec]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    version: int = 0,
    tokenizer: str | Path | None = None,
    force: bool = False,
    check: bool = True,
) -> Converted:
    """Write the model at `source` in another format.

    Args:
        source: a model of any format, or its name (`formats/open.py`).
        destination: a folder that does not exist; for llama2c a file.
        to: native, hf, meta or llama2c.
        dtype: of the weights that are written; None keeps each tensor's, bit for bit (llama2c is always float32).
        shards: model-parallel shards of the meta format.
        version: of llama2c's header: 0 (legacy) or 1.
        tokenizer: a tokenizer to write with the model, in place of the source's.
        force: replace a checkpoint that is already there.
        check: compare the source's files with the checksums in its folder, where it has some.

    Raises:
        InputError: for a source that is no model or damaged, a destination that exists, or what the format cannot hold.
        RunError: when the disk refuses.
    """
    source, destination = model_path(source), Path(destination).resolve()
    _check_options(to, shards, version)
    check_name(destination)
    carried = carried_from(source, tokenizer is None) if to == "hf" else None
    _check_destination(source.resolve(), destination, to, force, carried)
    opened = open_model(source)
    if check:
        check_model_files(source)
    for file in opened.files:  # an adapter's base may be elsewhere
        _check_apart(file.path.parent.resolve() / file.path.name, destination)
    specs = _specs(opened, to, dtype)
    found, files, notes = _find_tokenizer(source, opened, tokenizer, as_it_is=carried is not None)
    nbytes = sum(spec.nbytes for spec in specs.values())
    if to == "meta" and opened.config.tie_word_embeddings:
        nbytes += specs["embed_tokens.weight"].nbytes  # Meta's format has the head as well
    _check_room(destination, nbytes)

    def save_rest(folder: Path) -> None:
        if found is not None:
            save_tokenizer(folder, found, to)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    with tqdm(total=nbytes * shards, unit="B", unit_scale=True, desc=f"to {to}", disable=None, delay=1) as progress:
        read = partial(_read, opened, specs, progress)
        if to == "llama2c":
            then = _tokenizer_of_file(destination.parent, save_rest)
            write_file(destination, lambda file: write_llama2c(file, opened.config, read, version), then)
        else:
            own: dict[str, dict[str, Any]] = {"hf": {"carried": carried}, "meta": {"shards": shards}}

            def fill(folder: Path) -> None:
                save_rest(folder)
                _WRITERS[to](folder, opened.config, specs, read, **own.get(to, {}))

            write_folder(destination, fill)
    if to == "meta":
        notes += unsaid(opened.config)
    return Converted(opened, specs, (*opened.notes, *notes, *(carried.notes if carried else ())))


def _check_options(to: str, shards: int, version: int) -> None:
    if to not in FORMATS:
        raise InputError(f"--to is {to!r}{did_you_mean(to, FORMATS)}; choose from {', '.join(FORMATS)}")
    if shards != 1 and to != "meta":
        raise InputError(f"--shards is for --to meta, not for {to}")
    if version and to != "llama2c":
        raise InputError(f"--llama2c-version is for --to llama2c, not for {to}")
    if version not in HEADER_BYTES:
        raise InputError(f"--llama2c-version is {version}; choose 0 (legacy) or 1")


def _read(opened: Opened, specs: dict[str, Spec], progress: tqdm, name: str) -> Tensor:
    """Return a tensor in the dtype in which it is written."""
    tensor = opened.read(name, specs[name].dtype)
    progress.update(specs[name].nbytes)
    return tensor


def _specs(opened: Opened, to: str, dtype: torch.dtype | None) -> dict[str, Spec]:
    if to == "llama2c":
        if dtype not in (None, torch.float32):
            raise InputError("llama2c's files hold float32; leave --dtype out")
        if dtype is None and any(spec.dtype == torch.float64 for spec in opened.specs.values()):
            raise InputError("llama2c's files hold float32, these weights are float64; round them with --dtype float32")
        dtype = torch.float32
    return {name: Spec(dtype or spec.dtype, spec.shape) for name, spec in opened.specs.items()}


# The destination ------------------------------------------------------------------------------------------------------


def _check_destination(source: Path, destination: Path, to: str, force: bool, carried: Carried | None) -> None:
    """Refuse to write over anything but, with `force`, a checkpoint, and what is written there again."""
    _check_apart(source, destination)
    if not destination.exists():
        return
    if not force:
        raise InputError(f"{destination}: exists; choose another name, or add --force to replace it")
    if not destination.is_dir() and not destination.is_file():
        raise InputError(f"{destination}: is neither a file nor a folder; --force does not replace that")
    if destination.is_dir() == (to == "llama2c"):
        kind = "folder" if destination.is_dir() else "file"
        raise InputError(f"{destination}: is a {kind}; --to {to} does not write one")
    if destination.is_dir() and any(destination.iterdir()) and recognise(destination) is None:
        raise InputError(f"{destination}: holds something that is not a model; --force does not replace that")
    again = carried.files if carried is not None else {}
    for entry in sorted(destination.iterdir()) if destination.is_dir() else ():
        if entry.is_file() and entry.name in again and entry.read_bytes() == again[entry.name]:
            continue
        if entry.is_dir() or not any(fnmatch(entry.name, pattern) for pattern in _BELONGS):
            raise InputError(f"{entry}: is no part of a checkpoint and would be lost; --force does not replace that")
    if destination.is_file():
        try:
            open_llama2c(destination)
        except InputError as error:
            raise InputError(f"{error}; --force does not replace that") from None


def _check_apart(source: Path, destination: Path) -> None:
    if destination == source or destination in source.parents:
        raise InputError(f"{destination}: is where the source is; choose another destination")


def _check_room(destination: Path, nbytes: int) -> None:
    place = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise RunError(f"{destination}: needs {nbytes / 1e9:.2f} GB; the disk has {free / 1e9:.2f} GB free")


# The tokenizer --------------------------------------------------------------------------------------------------------


def _find_tokenizer(
    source: Path, opened: Opened, named: str | Path | None, as_it_is: bool
) -> tuple[Tokenizer | None, Mapping[str, bytes], tuple[str, ...]]:
    """Return the tokenizer of a model, or its files `as_it_is` or where it cannot be read here; and notes."""
    if named is not None:
        tokenizer = load_tokenizer(named)
        check_fit(opened.config, tokenizer)
        return tokenizer, {}, ()
    while is_adapter(source) and not tokenizer_files(source):
        source = base_of(source)
    files = tokenizer_files(source if source.is_dir() else source.parent)
    if not files:
        return None, {}, ("the source has no tokenizer next to it, so the result has none (--tokenizer names one)",)
    try:
        tokenizer = load_tokenizer(source)
        check_fit(opened.config, tokenizer)
        return (None, tokenizer.files, ()) if as_it_is else (tokenizer, {}, ())
    except InputError as error:
        if source.is_file():  # the other files of its folder need not belong to it
            return None, {}, (f"the tokenizer next to it is left out: {error}",)
        return None, files, (f"the tokenizer's files are copied as they are: {error}",)


def _tokenizer_of_file(folder: Path, save: Callable[[Path], None]) -> Callable[[], None]:
    """Return a function that saves the tokenizer of a llama2.c file in its folder.

    That function raises InputError when there is another tokenizer, with `force`, too: it may belong to another model.
    """
    staging = folder / ".tokenizer.partial"

    def save_if_free() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            save(staging)
            ours = {file.name: file.read_bytes() for file in staging.iterdir()}
            for name in (*TOKENIZER_FILES, "tokenizer.bin") if ours else ():
                there = folder / name
                if there.exists() and there.read_bytes() != ours.get(name):
                    raise InputError(f"{there}: another tokenizer is there; choose another folder")
            for file in staging.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    return save_if_free
