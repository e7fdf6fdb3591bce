"""The commands that train: `minift finetune` and `minift pretrain`. See `cli/__init__.py`."""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from minift.cli.parts import MODEL_HELP, add_command
from minift.cli.streams import outlive_reader
from minift.config import FINETUNE, PRETRAIN, TrainConfig
from minift.errors import InputError
from minift.look.report import samples, table
from minift.storage.names import model_path

LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")
FREE = ("workers", "keep", "strict", "parallel")  # that a run may change its mind about


def _add_train_flags(command: argparse.ArgumentParser, defaults: TrainConfig, without: tuple[str, ...] = ()) -> None:
    """A flag for every field of TrainConfig (but `without`). One that is not given is absent from the result."""
    group = command.add_argument_group("training")
    hints = get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        if item.name in without:
            continue
        flag, default = "--" + item.name.replace("_", "-"), getattr(defaults, item.name)
        text = item.metadata["help"].replace("%", "%%") + ("" if default is None else f" (default: {default})")
        kind = next(kind for kind in (*get_args(hints[item.name]), hints[item.name]) if kind is not type(None))
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            metavar = "|".join(item.metadata["choices"] or ()) or {int: "N", float: "X", str: "NAME"}[kind]
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)


def add_finetune(commands: Any) -> None:
    """`minift finetune`."""
    command = add_command(commands, "finetune", _finetune, "finetune all the weights of a model on instruction pairs")
    given = argparse.SUPPRESS
    command.add_argument("--model", default=given, metavar="DIR", help=f"{MODEL_HELP} (default: bundled)")
    command.add_argument(
        "--data", nargs="+", default=given, metavar="FILE", help="instruction pairs, JSON Lines (default: bundled)"
    )
    command.add_argument(
        "--test", nargs="+", default=given, metavar="FILE", help="held-out pairs (default: a tenth of the data)"
    )
    command.add_argument("--out", default="runs/finetune", metavar="DIR", help="the run's folder (runs/finetune)")
    command.add_argument("--resume", action="store_true", help="continue the run that --out holds")
    _add_train_flags(command, FINETUNE, without=("isolate", "shuffle_buffer", "workers"))  # those are for pages


def add_pretrain(commands: Any) -> None:
    """`minift pretrain`."""
    command = add_command(commands, "pretrain", _pretrain, "train a model with random weights on pages of text")
    given = argparse.SUPPRESS
    command.add_argument("--config", default=given, metavar="NAME|FILE", help="a preset's name, or a config.json")
    command.add_argument(
        "--data", nargs="+", default=given, metavar="GLOB", help="pages: JSON Lines or text, packed or not"
    )
    command.add_argument("--tokenizer", default=given, metavar="FILE", help="a tokenizer.model, or its folder")
    command.add_argument("--validation", nargs="+", default=given, metavar="GLOB", help="held-out pages (none)")
    command.add_argument("--text-field", default=given, metavar="NAME", help="key of a page's text (text)")
    command.add_argument("--out", default="runs/pretrain", metavar="DIR", help="the run's folder (runs/pretrain)")
    command.add_argument("--resume", action="store_true", help="continue the run that --out holds")
    _add_train_flags(command, PRETRAIN, without=("template", "pack", *LORA))  # those are for pairs


def _finetune(options: dict[str, Any]) -> int:
    from minift.runs import finetune as jobs

    outlive_reader()
    out, resume = Path(options.pop("out")), options.pop("resume")
    if resume:
        inputs, config = _resumed("finetune", out, options)
        job = jobs.finetune_job(**inputs)
    else:
        config = FINETUNE.replace(**train_options(options))
        job = jobs.finetune_job(options.get("model", "bundled"), options.get("data"), options.get("test"))
    result = jobs.finetune(job, config, out, resume)
    if result is None:
        return _say_resume("finetune", out)
    if not result:  # this is one of several processes, and another has the result
        return 0
    print(f"\n{table(result)}\n\n{samples(result, 4)}\n")
    adapter = f"{out / 'adapter'} (the adapters alone), " if config.lora_rank else ""
    print(f"saved: {out / 'final'} (the model), {adapter}{out / 'compare.json'}, {out / 'metrics.jsonl'}")
    print(f"look at it: {out / 'report.html'}")
    template = result["template"]
    if template == "carried":  # the questions brought it with them; a new one has to be put into it
        template = "alpaca" if result["samples"][0]["question"].endswith("### Response:") else "qa"
    if template != "plain":
        print(f'ask it as it was trained: minift generate --model {out / "final"} --template {template} --prompt "…"')
    return 0


def _pretrain(options: dict[str, Any]) -> int:
    from minift.distributed.world import is_main_process
    from minift.runs import pretrain as jobs

    outlive_reader()
    out, resume = Path(options.pop("out")), options.pop("resume")
    if resume:
        inputs, config = _resumed("pretrain", out, options)
    else:
        config = PRETRAIN.replace(**train_options(options))
        for name in ("config", "data", "tokenizer"):
            if name not in options:
                raise InputError(f"pretrain needs --{name} (see minift pretrain --help)")
        inputs = options
    job = jobs.pretrain_job(**inputs)
    if not jobs.pretrain(job, config, out, resume):
        return _say_resume("pretrain", out)
    if not is_main_process():
        return 0
    print(f"saved: {out / 'final'} (the model), {out / 'metrics.jsonl'}")
    print(f"look at it: {out / 'report.html'}")
    return 0


def train_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of TrainConfig out of `options`."""
    return {item.name: options.pop(item.name) for item in dataclasses.fields(TrainConfig) if item.name in options}


def _resumed(name: str, out: Path, options: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig]:
    """The settings of the run in `out`. A flag that says otherwise is refused: it would be another run.

    Only those may differ that change no result: a run that bears nothing may go on as one that does, and one of several
    processes as one of another number.
    """
    from minift.runs.folder import read_run

    found, inputs, config = read_run(out)
    if found != name:
        raise InputError(f"{out}: holds a {found} run; continue it with minift {found} --resume --out {out}")
    config = config.replace(**{flag: options.pop(flag) for flag in FREE if flag in options})
    settings = {**inputs, **config.to_dict()}
    for flag, value in options.items():
        if flag == "model":
            value = str(model_path(value))
        if settings[flag] != value:
            raise InputError(f"--{flag.replace('_', '-')} is {value}, but the run in {out} has {settings[flag]}")
    return inputs, config


def _say_resume(name: str, out: Path) -> int:
    from minift.distributed.world import is_main_process, started_by_torchrun

    if not is_main_process():
        return 1
    program = "minift" if shutil.which("minift") else f"{shlex.quote(sys.executable)} -m minift"
    if started_by_torchrun():
        program = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} -m minift"
    print(f"stopped and saved; continue with: {program} {name} --resume --out {shlex.quote(str(out))}")
    return 1
