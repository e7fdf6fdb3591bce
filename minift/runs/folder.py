"""A run's folder: what was asked for, what was measured, and what came of it.

    config.json      what was asked: the job, its inputs and the TrainConfig; enough to start the run again
    metrics.jsonl    one object for each optimizer step
    step_NNNNNN/     a resumable checkpoint (checkpoint.py)
    best/            with --patience: the model of the lowest validation loss so far, a minift checkpoint
    final/           the trained model, a minift checkpoint (or, if asked for, a Hugging Face folder)
    adapter/         with --lora-rank: the adapters, as the `peft` package has them; final/ is the model with them in it
    compare.json     for finetuning: both models on the held-out questions
    report.html      all of this on one page; curves.png, its curves, where the `plot` extra is installed

So `--resume` needs only the folder. Read next: `runs/finetune.py`.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minift.config import TrainConfig
from minift.distributed.world import World
from minift.errors import InputError
from minift.look.pages.curves import png
from minift.look.pages.run import read_metrics, run_page
from minift.runs.steps import check_step, step_folders
from minift.storage.atomic import write_file
from minift.storage.links import check_name
from minift.storage.lock import LOCK, locked
from minift.values import read_json


@dataclass(frozen=True)
class FinetuneJob:
    """What to finetune: a model folder, files of pairs, and held-out pairs (none: a tenth of the pairs)."""

    model: str
    data: tuple[str, ...]
    test: tuple[str, ...] = ()


@dataclass(frozen=True)
class PretrainJob:
    """What to pretrain: a preset or config file, pages, a tokenizer, and held-out pages (none: no evaluation)."""

    config: str
    data: tuple[str, ...]
    tokenizer: str
    validation: tuple[str, ...] = ()
    text_field: str = "text"


JOBS: dict[str, type[FinetuneJob] | type[PretrainJob]] = {"finetune": FinetuneJob, "pretrain": PretrainJob}


def read_run(out: Path) -> tuple[str, dict[str, Any], TrainConfig]:
    """The job's name, its inputs and its TrainConfig, from a run's folder.

    Raises:
        InputError: when there is no run in it.
    """
    where = out / "config.json"
    if not where.is_file():
        raise InputError(f"{out}: holds no run to resume (no config.json)")
    run = read_json(where)
    job, inputs, train = run.get("job"), run.get("inputs"), run.get("train")
    if not isinstance(job, str) or job not in JOBS or not isinstance(inputs, dict) or not isinstance(train, dict):
        raise InputError(f"{where}: not the settings of a run (job, inputs, train)")
    names = {item.name for item in dataclasses.fields(JOBS[job])}
    if set(inputs) != names:
        raise InputError(f"{where}: inputs are {sorted(inputs)}; a {job} run has {sorted(names)}")
    for item in dataclasses.fields(JOBS[job]):
        value, several = inputs[item.name], item.type is not str
        texts = value if several and isinstance(value, list) else [None if several else value]
        missing = item.default is dataclasses.MISSING and not value
        if missing or not all(isinstance(text, str) and "\0" not in text for text in texts):
            kind = "a list of texts" if several else "a text"
            raise InputError(f"{where}: {item.name} is {value!r}; it must be {kind}")
    config = TrainConfig.from_dict(train, where=f"{where}: train")
    if config.dtype == "auto":
        raise InputError(f"{where}: dtype is 'auto'; a run's own settings name it")
    return job, inputs, config


def check_free(out: Path) -> None:
    """Raise InputError when `out` already holds a run, or anything else, or is no name for a model's folder."""
    check_name(out)
    if out.is_dir() and (out / "config.json").exists():
        raise InputError(f"{out}: already holds a run; continue it with --resume, or choose another --out")
    if out.exists() and (not out.is_dir() or any(not _is_leftover(file) for file in out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another --out")


def _is_leftover(file: Path) -> bool:
    """Of a run that was killed when it had hardly begun."""
    return file.name.endswith(".partial") or file.name == LOCK


@contextmanager
def own_folder(out: Path, resume: bool, world: World) -> Iterator[None]:
    """Have the run's folder to ourselves. Raises InputError, on every rank, when the main one cannot have it."""
    with ExitStack() as stack:
        failure = None
        if world.is_main:
            try:
                stack.enter_context(locked(out))
                if not resume:
                    check_free(out)  # again: another run may have begun meanwhile
            except InputError as error:
                failure = error
        world.agree(failure)
        yield


def start_folder(name: str, job: FinetuneJob | PretrainJob, config: TrainConfig, out: Path) -> None:
    """Write what was asked for, from which `read_run` reads it."""
    text = json.dumps({"job": name, "inputs": vars(job), "train": config.to_dict()}, indent=2, ensure_ascii=False)
    content = (text + "\n").encode(errors="backslashreplace")  # a path that is not UTF-8 is read back as it was
    write_file(out / "config.json", lambda partial: partial.write_bytes(content))


def cut_metrics(file: Path, step: int) -> None:
    """Drop the lines of steps that the resumed run takes again."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(file, lambda partial: partial.write_text("".join(lines[:step]), encoding="utf-8"))


def newest_whole_step(out: Path) -> Path | None:
    """The newest step folder that is not damaged; None when there is no step folder.

    Raises:
        InputError: when all of them are damaged: to begin again is not what `--resume` is for.
    """
    damaged = None
    for folder in step_folders(out):
        try:
            check_step(folder)
            return folder
        except InputError as error:
            print(f"passed over: {error}")
            damaged = error
    if damaged is not None:
        raise damaged
    return None


def write_report(out: Path) -> None:
    """The page of a finished run and, where the `plot` extra is installed, its curves as a picture."""
    page = run_page(out).encode(errors="backslashreplace")  # paths in it need not be UTF-8
    write_file(out / "report.html", lambda partial: partial.write_bytes(page))
    if find_spec("matplotlib") is not None:
        write_file(out / "curves.png", partial(png, read_metrics(out)))
