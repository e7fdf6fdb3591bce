"""What the commands share: a parser with one-line errors, loading a model, writing a result."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from minift.config import TrainConfig
from minift.errors import InputError
from minift.storage.names import model_path

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

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stdout, flush=True)  # argparse would not say that it failed

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
        write_texts({file: json_text(values)})


def json_text(values: dict[str, Any]) -> str:
    """The text of a file of results."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def write_texts(texts: Mapping[str, str]) -> None:
    """Write a text to each of some files that were asked for: all of them, or none.

    What is not Unicode in them (a path may be so) is spelled out; in JSON it is read back as it was.

    Raises:
        InputError: when the disk refuses.
    """
    made = [file for file in texts if not os.path.lexists(file)]
    for file, text in texts.items():
        try:
            Path(file).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            for other in made:
                with suppress(OSError):
                    os.unlink(other)
            raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def load(name: str, device: str) -> Any:
    """(model, tokenizer) of a checkpoint."""
    from minift.checkpoint import load_model
    from minift.runs.machine import choose_device
    from minift.tokenizer.base import check_fit
    from minift.tokenizer.load import load_tokenizer

    path = model_path(name)
    where = choose_device(TrainConfig(device=device))
    model, tokenizer = load_model(path, device=where), load_tokenizer(path)
    check_fit(model.config, tokenizer)
    return model, tokenizer
