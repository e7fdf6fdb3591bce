"""A run's folder: what was asked for, what was measured, and what came of it.

    config.json      what was asked for: the job, its inputs and the TrainConfig; enough to start the run again
    metrics.jsonl    one object for each optimizer step
    step_NNNNNN/     a resumable checkpoint (`steps.py`)
    best/            with --patience: the model of the lowest validation loss so far (of a LoRA run, its adapters)
    final/           the trained model: a minift checkpoint or, of a Hugging Face folder, such a folder with all in it
                     that training did not change (`formats/carried.py`); --save-format says otherwise
    adapter/         with --lora-rank: the adapters, as the `peft` package stores them; in final/ they are merged
    compare.json     for finetuning: both models on the held-out questions
    report.html      all of this on one page; curves.png, its curves, where the `plot` extra is installed

So `--resume` needs nothing but the folder.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

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
    """What to finetune: a model folder, files of pairs, and files of held-out pairs (none: a tenth of the pairs).

    `encoding` is that of all these files, and `fields` are the keys of their records, if the user names them.
    """

    name: ClassVar[str] = "finetune"
    model: str
    data: tuple[str, ...]
    test: tuple[str, ...] = ()
    encoding: str = "utf-8"
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class PretrainJob:
    """What to pretrain: a preset or config file, pages, a tokenizer, and held-out pages (none: no evaluation).

    `encoding` is that of all pages.
    """

    name: ClassVar[str] = "pretrain"
    config: str
    data: tuple[str, ...]
    tokenizer: str
    validation: tuple[str, ...] = ()
    text_field: str = "text"
    encoding: str = "utf-8"


Job: TypeAlias = FinetuneJob | PretrainJob
JOBS: dict[str, type[FinetuneJob] | type[PretrainJob]] = {job.name: job for job in (FinetuneJob, PretrainJob)}


def check_free(out: Path) -> None:
    """Raise InputError unless a new run can begin in `out`: it is free, and its name is one that a model may have."""
    check_name(out)
    if out.is_dir() and (out / "config.json").exists():
        raise InputError(f"{out}: already holds a run; continue it with --resume, or choose another --out")
    if out.exists() and (not out.is_dir() or any(not _is_leftover(file) for file in out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another --out")


def _is_leftover(file: Path) -> bool:
    """Return True for a file of a run that was killed before it had written its config.json."""
    return file.name.endswith(".partial") or file.name == LOCK


@contextmanager
def own_folder(out: Path, resume: bool, world: World) -> Iterator[None]:
    """Lock a run's folder: no other run can write into it. Call it on all ranks; the main one holds the lock.

    Raises:
        InputError: on every rank, when another run holds the lock, or the folder cannot be made.
    """
    with ExitStack() as stack:
        failure = None
        if world.is_main:
            try:
                stack.enter_context(locked(out))
                if not resume:
                    check_free(out)  # again: another run may have begun since the first check
            except InputError as error:
                failure = error
        world.agree(failure)
        yield


def start_folder(job: Job, config: TrainConfig, out: Path) -> None:
    """Write config.json: what was asked for, as `read_run` reads it."""
    settings = {"job": job.name, "inputs": vars(job), "train": config.to_dict()}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    content = text.encode(errors="backslashreplace")  # a path that is not UTF-8 is read back as it was
    write_file(out / "config.json", lambda partial: partial.write_bytes(content))


def read_run(out: Path) -> tuple[str, dict[str, Any], TrainConfig]:
    """Return a run's job by name, its inputs and its TrainConfig.

    Raises:
        InputError: when `out` holds no run, or its config.json is not one of a run.
    """
    where = out / "config.json"
    if not where.is_file():
        raise InputError(f"{out}: holds no run to resume (no config.json)")
    run = read_json(where)
    name, inputs, train = run.get("job"), run.get("inputs"), run.get("train")
    if not isinstance(name, str) or name not in JOBS or not isinstance(inputs, dict) or not isinstance(train, dict):
        raise InputError(f"{where}: not the settings of a run (job, inputs, train)")
    _check_inputs(name, inputs, where)
    config = TrainConfig.from_dict(train, where=f"{where}: train")
    if config.dtype == "auto":
        raise InputError(f"{where}: dtype is 'auto'; the settings of a run that has begun name one")
    return name, inputs, config


def _check_inputs(name: str, inputs: dict[str, Any], where: Path) -> None:
    """Raise InputError unless `inputs` are the fields of the job called `name`: texts, and lists of texts."""
    fields = dataclasses.fields(JOBS[name])
    names = {item.name for item in fields}
    inputs.setdefault("encoding", "utf-8")  # runs of earlier versions read no other
    if "fields" in names:
        inputs.setdefault("fields", [])
    if set(inputs) != names:
        raise InputError(f"{where}: inputs are {sorted(inputs)}; a {name} run has {sorted(names)}")
    for item in fields:
        value, is_list = inputs[item.name], item.type is not str
        texts = value if is_list and isinstance(value, list) else [None if is_list else value]
        missing = item.default is dataclasses.MISSING and not value
        if missing or not all(isinstance(text, str) and "\0" not in text for text in texts):
            kind = "a list of texts" if is_list else "a text"
            raise InputError(f"{where}: {item.name} is {value!r}; it must be {kind}")


def newest_whole_step(out: Path) -> Path | None:
    """Return the newest step folder that is not damaged; None when there is no step folder.

    Raises:
        InputError: when all of them are damaged: `--resume` must not begin again from the start.
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


def cut_metrics(file: Path, step: int) -> None:
    """Drop the lines after step `step`: the resumed run takes those steps again."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(file, lambda partial: partial.write_text("".join(lines[:step]), encoding="utf-8"))


def write_report(out: Path) -> None:
    """Write a finished run's report.html and, where the `plot` extra is installed, its curves as a picture."""
    page = run_page(out).encode(errors="backslashreplace")  # paths in it need not be UTF-8
    write_file(out / "report.html", lambda partial: partial.write_bytes(page))
    if find_spec("matplotlib") is not None:
        write_file(out / "curves.png", partial(png, read_metrics(out)))
