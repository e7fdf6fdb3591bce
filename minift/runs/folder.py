"""A run's folder: what was asked for, what was measured, and what came of it.

    config.json      what was asked for: the job, its inputs and the TrainConfig, enough to start the run again; and
                     checksums of what the inputs held
    metrics.jsonl    one object for each optimizer step (what was damaged of it is in metrics.jsonl.damaged)
    tensorboard/     with --tensorboard: the same numbers as TensorBoard's events (`events.py`)
    step_NNNNNN/     a resumable checkpoint (`steps.py`)
    best/            until the run is complete: the model of the lowest validation loss so far (of a LoRA run, its
                     adapters), and best.json next to it, with its step
    final/           that model: a minift checkpoint or, of a Hugging Face folder, such a folder with all in it that
                     training did not change (`formats/carried.py`); --save-format says otherwise
    adapter/         with --lora-rank: the adapters, as the `peft` package stores them; in final/ they are merged
    compare.json     for finetuning: both models on the held-out questions
    report.html      all of this on one page; curves.png, its curves, where the `plot` extra is installed

So `--resume` needs nothing but the folder, from wherever one stands. `--overwrite` removes this and nothing else
(`place.py`).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
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
from minift.look.pages.run import run_page
from minift.runs.contents import check_contents
from minift.runs.inputs import from_anywhere
from minift.runs.metrics import read_metrics
from minift.runs.place import check_replaceable, is_free, is_run, next_name, remove_run
from minift.runs.steps import check_step, step_folders
from minift.storage.atomic import write_file
from minift.storage.links import check_name
from minift.storage.lock import locked
from minift.values import read_json


@dataclass(frozen=True)
class FinetuneJob:
    """A job of finetuning: a model folder, files of pairs, and files of held-out pairs (none: a tenth of the pairs).

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
    """A job of pretraining: a preset or config file, pages, a tokenizer, and held-out pages (none: no evaluation).

    `encoding` is that of all pages. `model` is the one whose training continues; `config` is "" then.
    """

    name: ClassVar[str] = "pretrain"
    config: str
    data: tuple[str, ...]
    tokenizer: str
    validation: tuple[str, ...] = ()
    text_field: str = "text"
    encoding: str = "utf-8"
    model: str = ""


Job: TypeAlias = FinetuneJob | PretrainJob
JOBS: dict[str, type[FinetuneJob] | type[PretrainJob]] = {job.name: job for job in (FinetuneJob, PretrainJob)}


def check_free(out: Path) -> None:
    """Raise InputError unless a new run can begin in `out`: it is free, and its name is one that a model may have."""
    check_name(out)
    if is_run(out):
        ways = f"continue it with --resume, replace it with --overwrite, or give --out {next_name(out)}"
        raise InputError(f"{out}: already holds a run; {ways}")
    if not is_free(out):
        raise InputError(f"{out}: exists and is not an empty folder; choose another --out")


def inputs_of(job: Job, config: TrainConfig) -> list[str]:
    """Return what a run is asked to read: files, folders and globs, among names that are none."""
    values = [config.template, *vars(job).values()]
    return [text for value in values for text in ([value] if isinstance(value, str) else value)]


@contextmanager
def own_folder(out: Path, resume: bool, world: World, overwrite: bool = False) -> Iterator[None]:
    """Lock a run's folder: no other run can write into it. Call it on all ranks; the main one holds the lock.

    With `overwrite`, an earlier run may be there, which `start_folder` removes.

    Raises:
        InputError: on every rank, when another run holds the lock, or the folder cannot be made.
    """
    with ExitStack() as stack:
        failure = None
        if world.is_main:
            try:
                stack.enter_context(locked(out))
                if overwrite:
                    check_replaceable(out)  # again: something may have been put there since the first check
                elif not resume:
                    check_free(out)  # again: another run may have begun since the first check
            except InputError as error:
                failure = error
        world.agree(failure)
        yield


def start_folder(job: Job, config: TrainConfig, out: Path, contents: Mapping[str, Any]) -> None:
    """Write config.json: what was asked for, as `read_run` reads it from any folder, and what the inputs held.

    An earlier run is removed first.

    Raises:
        InputError: when that cannot be removed.
        RunError: when the disk refuses.
    """
    if not is_free(out):  # `own_folder` has let it pass
        remove_run(out)
        print(f"{out}: the earlier run is removed")
    inputs, train = (
        {name: from_anywhere(name, value) for name, value in part.items()} for part in (vars(job), config.to_dict())
    )
    settings = {"job": job.name, "inputs": inputs, "train": train, "contents": contents}
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
    if not isinstance(run.get("contents", {}), dict):
        raise InputError(f"{where}: contents is {run['contents']!r}; it must be an object")
    config = TrainConfig.from_dict(train, where=f"{where}: train")
    if config.dtype == "auto":
        raise InputError(f"{where}: dtype is 'auto'; the settings of a run that has begun name one")
    return name, inputs, config


def check_made_from(contents: Mapping[str, Any], job: Job, config: TrainConfig, out: Path) -> None:
    """Compare what the run in `out` was made from with the `contents` of now.

    Raises:
        InputError: for a difference, by name.
    """
    where = out / "config.json"
    saved = read_json(where).get("contents")
    if saved is None:
        print(f"note: {where} has no checksums of what the run was made from: the inputs are taken as they are now")
    else:
        check_contents(saved, contents, vars(job), config.template, where)


def _check_inputs(name: str, inputs: dict[str, Any], where: Path) -> None:
    """Raise InputError unless `inputs` are the fields of the job called `name`: texts, and lists of texts."""
    fields = dataclasses.fields(JOBS[name])
    names = {item.name for item in fields}
    inputs.setdefault("encoding", "utf-8")  # runs of earlier versions read no other
    if "fields" in names:
        inputs.setdefault("fields", [])
    else:
        inputs.setdefault("model", "")  # earlier versions had none here
    if set(inputs) != names:
        raise InputError(f"{where}: inputs are {sorted(inputs)}; a {name} run has {sorted(names)}")
    for item in fields:
        value, is_list = inputs[item.name], item.type is not str
        texts = value if is_list and isinstance(value, list) else [None if is_list else value]
        missing = item.default is dataclasses.MISSING and not value
        missing = missing and not (item.name == "config" and inputs.get("model"))
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


def write_report(out: Path) -> None:
    """Write a finished run's report.html and, where the `plot` extra is installed, its curves as a picture."""
    page = run_page(out).encode(errors="backslashreplace")  # paths in it need not be UTF-8
    write_file(out / "report.html", lambda partial: partial.write_bytes(page))
    if find_spec("matplotlib") is not None and (metrics := read_metrics(out / "metrics.jsonl")):
        write_file(out / "curves.png", partial(png, metrics))
