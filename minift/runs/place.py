"""The place of a run: a folder that is free, a numbered name where it is not, or an earlier run that is replaced.

    runs/finetune, runs/finetune-2, runs/finetune-3 …        # of runs without --out, each has its own

What a run writes is listed here and described in `folder.py`: --overwrite removes that alone, and refuses a folder in
which it finds anything else.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

from minift.errors import InputError
from minift.storage.checksums import CHECKSUMS, read_checksums
from minift.storage.links import check_name
from minift.storage.lock import LOCK
from minift.storage.names import base_of, is_adapter, names_in
from minift.values import read_json

CONFIG = "config.json"
FILES = (CONFIG, "metrics.jsonl", "metrics.jsonl.damaged", "best.json", "compare.json", "report.html", "curves.png")
FOLDERS = ("best", "final", "adapter", "tensorboard")
_STEP = re.compile(r"step_\d+")
_LEFTOVER = re.compile(r"\.(.+)\.(?:partial|old)")
# What a run writes into a folder without checksums: a model's files, and TensorBoard's events.
_OF_A_MODEL = re.compile(
    r"(?:generation_|adapter_|tokenizer_)?config\.json|(?:model|adapter|training)\.pt|tokenizer\.(?:model|json)"
    r"|(?:adapter_)?model[\w.-]*\.safetensors(?:\.index\.json)?|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.jinja|\.metadata|\w+\.distcp"
)
_EVENTS = re.compile(r"events\.out\.tfevents\.\d+")


def is_free(out: Path) -> bool:
    """Return whether a new run can begin in `out`: it is not there, empty, or was left so by a run that was killed."""
    return not out.exists() or (out.is_dir() and all(map(_is_leftover, out.iterdir())))


def _is_leftover(file: Path) -> bool:
    """Return True for a file of a run that was killed before it had written its config.json."""
    return file.name in (f".{CONFIG}.partial", LOCK)


def _is_own_leftover(path: Path) -> bool:
    """Return whether a path has the name under which a run writes or removes one of its files or folders."""
    match = _LEFTOVER.fullmatch(path.name)
    return match is not None and (match[1] in (*FILES, *FOLDERS) or _STEP.fullmatch(match[1]) is not None)


def remove_own_leftovers(out: Path) -> None:
    """Remove what a run that was killed had begun to write or to remove."""
    for path in filter(_is_own_leftover, out.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_run(folder: Path) -> bool:
    """Return whether a folder's config.json is that of a run, and not of a model."""
    try:
        values = read_json(folder / CONFIG)
    except InputError:
        return False
    return isinstance(values.get("job"), str) and isinstance(values.get("inputs"), dict) and "train" in values


# Numbered names -------------------------------------------------------------------------------------------------------


def next_name(out: Path) -> Path:
    """Return the numbered name after all that there are: `runs/mine-2`, or after `runs/mine-4` `runs/mine-5`."""
    out = out if out.name.strip(".") else out.resolve()  # `.` and `..` are no names
    return out.with_name(f"{out.name}-{1 + max(_numbers(out), default=1)}")


def newest_run(out: Path) -> tuple[Path, int]:
    """Return the run that began last, of those in `out` and in its numbered names; and how many runs these are.

    Where there is none, the folder is `out`.
    """
    folders = [out, *(out.with_name(f"{out.name}-{number}") for number in _numbers(out))]
    found = [folder for folder in folders if is_run(folder)]
    return max(found, key=lambda folder: (folder / CONFIG).stat().st_mtime_ns, default=out), len(found)


def _numbers(out: Path) -> list[int]:
    """Return the numbers, from 2 on, in the numbered names next to `out`, in their order."""
    found = (re.fullmatch(rf"{re.escape(out.name)}-([1-9]\d{{0,8}})", name) for name in names_in(out.parent))
    return sorted(number for match in found if match and (number := int(match[1])) > 1)


# Replacing a run ------------------------------------------------------------------------------------------------------


def check_replaceable(out: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError unless `out` is free, or holds a run and nothing that a run does not write.

    Args:
        inputs: files, folders and globs that the new run reads: none may be in `out`.
    """
    check_name(out)
    if is_free(out):
        return
    if out.is_symlink():
        raise InputError(f"{out}: is a link, which --overwrite does not follow; give --out {out.resolve()}")
    if not out.is_dir() or not is_run(out):
        raise InputError(f"{out}: holds no run, and --overwrite replaces nothing else; choose another --out")
    foreign = next(_foreign(out), None)
    if foreign is not None:
        raise InputError(f"{foreign}: was not written by the run, so --overwrite leaves all as it is; move it away")
    for path in _places(inputs):
        if path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{path}: the new run would read it, and --overwrite remove it; choose another --out")


def remove_run(out: Path) -> None:
    """Remove what a run has written, its config.json last: until then --overwrite can be given again.

    Call it under the run's lock, after `check_replaceable`.

    Raises:
        InputError: when something cannot be removed.
    """
    try:
        remove_own_leftovers(out)
        for path in sorted(out.iterdir(), key=lambda path: path.name == CONFIG):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:
        raise InputError(f"{error.filename or out}: cannot be removed: {error.strerror or error}") from None


def _foreign(out: Path) -> Iterator[Path]:
    """Yield what is in a run's folder, and in the folders in it, that no run writes there. No link is one."""
    for path in sorted(out.iterdir()):
        folder = path.name in FOLDERS or _STEP.fullmatch(path.name)
        known = folder or path.name in (*FILES, LOCK) or _is_own_leftover(path)
        if not known or path.is_symlink() or (path.is_dir() and not folder and not _is_own_leftover(path)):
            yield path
        elif path.is_dir() and folder:
            sums = path / CHECKSUMS
            listed = read_checksums(sums) if sums.is_file() else None
            names = _EVENTS if path.name == "tensorboard" else _OF_A_MODEL
            for file in sorted(path.iterdir()):
                own = names.fullmatch(file.name) if listed is None else file.name in (*listed, CHECKSUMS)
                if not own or not file.is_file() or file.is_symlink():
                    yield file


def _places(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the files and folders that are named or matched by a glob; of adapters, their bases, too."""
    for text in map(str, inputs):
        for path in [Path(text)] if os.path.exists(text) else map(Path, glob(text, recursive=True)):
            yield path
            while is_adapter(path):
                path = base_of(path)
                yield path
