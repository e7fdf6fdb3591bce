"""What the commands share: a parser with one-line errors, loading a model, writing a result."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from minift.config import TrainConfig, model_path
from minift.errors import InputError

MODEL_HELP = (
    "a model of any format (a minift, Hugging Face or Meta folder, a llama2.c .bin, an adapter's folder), "
    "a name on Hugging Face's hub whose files are in its cache, or `bundled` for the base that comes with minift"
)


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line, as every other error of minift is."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        values = super()._get_values(action, arg_strings)
        if values == [] and action.nargs != 0:  # `--lr=--`: some versions of Python drop every "--"
            raise argparse.ArgumentError(action, "expected an argument, found --")
        return values


def add_command(commands: Any, name: str, run: Callable[[dict[str, Any]], int], text: str) -> argparse.ArgumentParser:
    """A subcommand that calls `run` with its options and exits with what that returns."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def write_json(file: str | None, values: dict[str, Any]) -> None:
    """Write a result to a file, if one was asked for. Raises InputError when the disk refuses."""
    if file is not None:
        write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(file: str, text: str) -> None:
    """Write a text to a file that was asked for. Raises InputError when the disk refuses."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def load(name: str, device: str) -> Any:
    """(model, tokenizer) of a checkpoint."""
    from minift.checkpoint import load_model
    from minift.tokenizer import check_fit, load_tokenizer
    from minift.train import choose_device

    path = model_path(name)
    where = choose_device(TrainConfig(device=device))
    model, tokenizer = load_model(path, device=where), load_tokenizer(path)
    check_fit(model.config, tokenizer)
    return model, tokenizer
