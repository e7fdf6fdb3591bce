"""The commands that train: `minift finetune` and `minift pretrain`. Their flags are the fields of `TrainConfig`."""

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from minift.cli.parts import MODEL_HELP, add_command, add_encoding, add_plain, add_reading, check_fields
from minift.cli.streams import outlive_reader
from minift.config import CHOSEN, CONTINUED, FINETUNE, FREE, PRETRAIN, TrainConfig, not_given
from minift.errors import InputError
from minift.look.report import few_line, samples, table, worse_line
from minift.runs.stop import ended_at_once
from minift.storage.names import model_path
from minift.storage.system import command_line

LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")


# Flags ----------------------------------------------------------------------------------------------------------------


FINETUNE_MORE = """\
All weights are trained or, with --lora-rank, adapters. The run's folder gets the model (final/), the
loss of each step (metrics.jsonl), both models' answers (compare.json), and a page to look at
(report.html).

example:
  minift finetune --model bundled --data my_pairs.jsonl --out runs/mine --epochs 3"""


def add_finetune(commands: Any) -> None:
    """Add `minift finetune`."""
    text = "finetune a model on instruction pairs or chats, and compare it with what it was before"
    command = add_command(commands, "finetune", _finetune, text, FINETUNE_MORE)
    given = argparse.SUPPRESS  # a flag that is not given is absent from the options
    command.add_argument("--model", default=given, metavar="DIR", help=f"{MODEL_HELP} (default: bundled)")
    text = "train on these pairs or chats: JSON Lines, a JSON array, CSV, TSV, Parquet or Arrow (default: bundled)"
    command.add_argument("--data", nargs="+", default=given, metavar="FILE", help=text)
    text = "hold out these pairs or chats (default: a tenth of --data; for the bundled pairs, the bundled questions)"
    command.add_argument("--test", nargs="+", default=given, metavar="FILE", help=text)
    add_reading(command, argparse.SUPPRESS)
    _add_run_flags(command, "runs/finetune")
    _add_train_flags(command, FINETUNE, without=("isolate", "shuffle_buffer", "workers"))  # those are for pages


PRETRAIN_MORE = """\
--config, --data and --tokenizer are needed, unless --resume continues a run; or --model and --data: then
the training of that model continues, with its own tokenizer. The run's folder gets the model (final/),
the loss of each step (metrics.jsonl), and a page to look at (report.html).

examples:
  minift pretrain --config bundled --data "data/pages/*.json.gz" --tokenizer data/base --steps 20
  minift pretrain --model bundled --data "data/pages/*.json.gz" --steps 20"""


def add_pretrain(commands: Any) -> None:
    """Add `minift pretrain`."""
    text = "train a model on pages of text, from random weights or from where another training ended"
    command = add_command(commands, "pretrain", _pretrain, text, PRETRAIN_MORE)
    given = argparse.SUPPRESS
    text = "the shape of the model: the name of a preset, or a config.json"
    command.add_argument("--config", default=given, metavar="NAME|FILE", help=text)
    text = "continue the training of this model, in place of --config: " + MODEL_HELP
    text += f" (--lr is then {CONTINUED.lr:g} by default: at a higher one it forgets more)"
    command.add_argument("--model", default=given, metavar="DIR", help=text)
    text = "train on these pages: JSON Lines or text, compressed or not"
    command.add_argument("--data", nargs="+", default=given, metavar="GLOB", help=text)
    text = "encode the pages with this tokenizer: a tokenizer.model, or its folder (default: that of --model)"
    command.add_argument("--tokenizer", default=given, metavar="FILE", help=text)
    text = "evaluate on these pages, which are held out of training (default: none)"
    command.add_argument("--validation", nargs="+", default=given, metavar="GLOB", help=text)
    text = "find a page's text under this key of its record (default: text)"
    command.add_argument("--text-field", default=given, metavar="NAME", help=text)
    add_encoding(command, argparse.SUPPRESS)
    _add_run_flags(command, "runs/pretrain")
    of_pairs = ("template", "learn", "rendered", "pack", "compare", *LORA)
    _add_train_flags(command, PRETRAIN, without=of_pairs)


def _add_run_flags(command: argparse.ArgumentParser, out: str) -> None:
    """Add the flags that are not part of a run's settings."""
    text = f"make the run's folder here (default: {out}, or where that holds a run {out}-2 and so on)"
    command.add_argument("--out", metavar="DIR", help=text)
    text = "continue the run in --out (default: the newest) from its last checkpoint, with the settings that it has"
    command.add_argument("--resume", action="store_true", help=text)
    text = "replace an earlier run in --out: it is removed when all that this run reads has been read"
    command.add_argument("--overwrite", action="store_true", help=text)
    add_plain(command, trains=True)


def _add_train_flags(command: argparse.ArgumentParser, defaults: TrainConfig, without: tuple[str, ...]) -> None:
    """Add a flag for every field of TrainConfig but those of `without`. One that is not given is absent."""
    group = command.add_argument_group("training")
    hints = get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        if item.name in without:
            continue
        flag, default = "--" + item.name.replace("_", "-"), getattr(defaults, item.name)
        if defaults is FINETUNE and item.name in CHOSEN:
            default = "chosen from the pairs and the model"
        text = item.metadata["help"].replace("%", "%%") + ("" if default in (None, ()) else f" (default: {default})")
        kinds = [kind for kind in get_args(hints[item.name]) or (hints[item.name],) if kind is not type(None)]
        kind = kinds[0]
        if kinds == [int, str]:
            group.add_argument(flag, type=_number_or_text, default=argparse.SUPPRESS, metavar="N|Nm", help=text)
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            several = get_origin(hints[item.name]) is tuple
            metavar = "|".join(item.metadata["choices"] or ()) or {int: "N", float: "X", str: "NAME"}[kind]
            shape: dict[str, Any] = {"nargs": "+", "metavar": "PATTERN"} if several else {"metavar": metavar}
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, **shape)


def _number_or_text(word: str) -> int | str:
    return int(word) if word.removeprefix("-").isdecimal() else word


# Commands -------------------------------------------------------------------------------------------------------------


def _finetune(options: dict[str, Any]) -> int:
    with ended_at_once():
        from minift.distributed.world import is_main_process
        from minift.runs import finetune as jobs

    outlive_reader()
    out, resume, overwrite, plain = _take_run_flags(options, "runs/finetune")
    if resume:
        inputs, config = _settings_of("finetune", out, options)
        job, choose = jobs.finetune_job(**inputs), set[str]()
    else:
        choose = not_given(options)
        config = FINETUNE.replace(**train_options(options))
        job = jobs.finetune_job(
            options.get("model", "bundled"),
            options.get("data"),
            options.get("test"),
            options.get("encoding", "utf-8"),
            check_fields(options.get("fields", ())),
        )
    result = jobs.finetune(job, config, out, resume, plain, choose, overwrite)
    if result is None:
        return _say_how_to_resume("finetune", out, plain)
    if is_main_process():
        _show_result(result, config, out)
    return 0


def _show_result(result: dict[str, Any], config: TrainConfig, out: Path) -> None:
    """Print the scores and some answers before and after, what was saved, and how to ask the new model."""
    if result:
        print(f"\n{table(result)}\n\n{samples(result, 4)}\n")
        for line in (few_line(result), worse_line(result)):
            if line is not None:
                print(f"{line}\n")
    adapter = f"{out / 'adapter'} (the adapters alone), " if config.lora_rank else ""
    compared = f"{out / 'compare.json'}, " if result else ""
    print(f"saved: {out / 'final'} (the model), {adapter}{compared}{out / 'metrics.jsonl'}")
    print(f"look at it: {out / 'report.html'}")
    _show_how_to_ask(result, config, out)


def _show_how_to_ask(result: dict[str, Any], config: TrainConfig, out: Path) -> None:
    """Print the commands that ask the new model as it was trained, where it would be asked otherwise without flags."""
    from minift.data.templates import is_chat_template, passes_over_own
    from minift.runs.folder import read_run
    from minift.tokenizer.load import load_tokenizer

    template, asked = read_run(out)[2].template, result.get("samples", ())
    if template == "carried":  # the pairs brought their template with them; a new question is written in it
        if not asked:
            return
        template = "alpaca" if asked[0]["question"].endswith("### Response:") else "qa"
    own = is_chat_template(template)  # which is saved with the model
    plain = template == "plain" and not passes_over_own(template, load_tokenizer(out / "final"))
    flags = "" if own or plain else f" --template {template}"
    if any("earlier" in sample for sample in asked) or own:
        print(f"talk to it: minift chat --model {out / 'final'}{flags}")
    flags += " --rendered" * (config.rendered and not own)
    if (flags and template != "text") or own:
        print(f'ask it as it was trained: minift generate --model {out / "final"}{flags} --prompt "…"')


def _pretrain(options: dict[str, Any]) -> int:
    with ended_at_once():
        from minift.distributed.world import is_main_process
        from minift.runs import pretrain as jobs

    outlive_reader()
    out, resume, overwrite, plain = _take_run_flags(options, "runs/pretrain")
    if resume:
        inputs, config = _settings_of("pretrain", out, options)
    else:
        config = (CONTINUED if "model" in options else PRETRAIN).replace(**train_options(options))
        inputs = options
    if not jobs.pretrain(jobs.pretrain_job(**inputs), config, out, resume, plain, overwrite):
        return _say_how_to_resume("pretrain", out, plain)
    if is_main_process():
        print(f"saved: {out / 'final'} (the model), {out / 'metrics.jsonl'}")
        print(f"look at it: {out / 'report.html'}")
    return 0


def _take_run_flags(options: dict[str, Any], default: str) -> tuple[Path, bool, bool, bool]:
    """Take the flags of `_add_run_flags` out of `options`; return the run's folder, resume, overwrite and plain.

    Raises:
        InputError: for both --resume and --overwrite.
    """
    resume, overwrite, plain = (options.pop(name) for name in ("resume", "overwrite", "plain"))
    if resume and overwrite:
        raise InputError("--resume continues the run in --out, and --overwrite removes it; give one of them")
    given = options.pop("out")
    out = Path(given) if given is not None else _default_folder(Path(default), resume, overwrite)
    return out, resume, overwrite, plain


def _default_folder(default: Path, resume: bool, overwrite: bool) -> Path:
    """Return the folder of a run without --out, and print which one it is, if that is not `default` alone."""
    from minift.distributed.world import is_main_process, may_restart
    from minift.runs.place import is_free, newest_run, next_name

    out, said = default, ""
    if resume:
        out, count = newest_run(default)
        said = f"--resume: {out}, the newest of {count} runs" if count > 1 else ""
    # A process that torchrun starts again looks for its run in the same place.
    elif not (overwrite or may_restart() or is_free(default)):
        out = next_name(default)
        said = f"{default} is taken; this run's folder is {out}"
    if said and is_main_process():
        print(said)
    return out


def train_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of TrainConfig out of `options`; return them."""
    return {item.name: options.pop(item.name) for item in dataclasses.fields(TrainConfig) if item.name in options}


def _settings_of(name: str, out: Path, options: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig]:
    """Return the inputs and the config of the run in `out`.

    Raises:
        InputError: when there is no such run, or a flag of `options` differs from its settings: that would be another
            run. Only those of FREE may differ.
    """
    from minift.runs.folder import read_run
    from minift.runs.inputs import check_there, same_input

    found, inputs, config = read_run(out)
    if found != name:
        raise InputError(f"{out}: holds a {found} run; continue it with minift {found} --resume --out {out}")
    config = config.replace(**{flag: options.pop(flag) for flag in FREE if flag in options})
    settings = {**inputs, **config.to_dict()}
    for flag, value in options.items():
        if flag == "model":
            value = str(model_path(value))
        if not same_input(flag, settings[flag], value):
            raise InputError(f"--{flag.replace('_', '-')} is {value}, but the run in {out} has {settings[flag]}")
    check_there({**inputs, "template": config.template}, out / "config.json")
    return inputs, config


def _say_how_to_resume(name: str, out: Path, plain: bool) -> int:
    """Print the command that continues an interrupted run; return its exit code."""
    from minift.distributed.world import is_main_process, started_by_torchrun

    if is_main_process():
        program = ["minift"] if shutil.which("minift") else [sys.executable, "-m", "minift"]
        if started_by_torchrun():
            program = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "-m", "minift"]
        command = [*program, name, "--resume", "--out", str(out), *["--plain"] * plain]
        print(f"stopped and saved; continue with: {command_line(command)}")
    return 1
