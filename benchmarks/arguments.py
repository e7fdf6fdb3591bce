"""The options that benchmarks have in common, and the training run that they ask for. Read next: `record.py`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from minift.config import DEVICES, DTYPES, PRETRAIN, LlamaConfig, TrainConfig
from minift.errors import InputError, need
from minift.runs import machine
from minift.values import check_number

FILES = ("json", "plot", "trace")  # options that name a file to write


def add_shape(
    parser: argparse.ArgumentParser,
    config: str = "stories15m",
    batch_size: int = 16,
    length: int = 256,
    rows: str = "rows",
) -> None:
    """The shape of a model and of a batch; `rows` says what there are `batch_size` of."""
    parser.add_argument("--config", default=config, metavar="NAME|FILE", help="the model's shape (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help=f"{rows} (%(default)s)")
    parser.add_argument("--length", type=int, default=length, metavar="N", help="tokens of a row (%(default)s)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What it is computed on, and in."""
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the matrix products (%(default)s)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """What it is computed on."""
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(%(default)s)")


def add_repeats(parser: argparse.ArgumentParser, repeats: int, what: str = "turns") -> None:
    """How often it is measured, and where the result goes."""
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"{what} (%(default)s)")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE")


def add_measure(parser: argparse.ArgumentParser) -> None:
    """What a process of its own is asked to do (`process.py`): nobody else gives it."""
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError when one of these options is not at least 1."""
    for name in names:
        check_number("--" + name.replace("_", "-"), getattr(options, name), least=1)


def check_files(options: argparse.Namespace) -> None:
    """Raise InputError when a file cannot be written: before it is measured what should stand in it."""
    for file in (getattr(options, name, None) for name in FILES):
        if file is None:
            continue
        try:
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("a").close()
            if new:
                path.unlink()
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def check_plot(file: str | None) -> None:
    """Raise InputError when this file cannot be drawn: better before an hour of measuring than after it."""
    if file is not None:
        need("matplotlib.pyplot", "plot", "--plot")
        if Path(file).suffix != ".png":
            raise InputError(f"--plot draws a .png, not {file}")


def train_config(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    """The run that `add_shape` and `add_device` or `add_machine` ask for, its device and dtype decided.

    Raises:
        InputError: for sizes or `changes` that no run can have, a device that is not there, a dtype that it cannot, and
            a compiler that is not installed.
    """
    config = PRETRAIN.replace(
        batch_size=options.batch_size,
        max_length=options.length,
        device=options.device,
        dtype=getattr(options, "dtype", "auto"),
        **{"compile": False, **changes},
    )
    device = machine.choose_device(config)
    machine.check_compiler(config, device)
    return config.replace(device=device.type, dtype=machine.choose_dtype(config, device))


def check_compiler(config: TrainConfig, needed: bool, otherwise: str) -> None:
    """Raise InputError where something is to be compiled and cannot be; `otherwise` is what to give then."""
    try:
        machine.check_compiler(config.replace(compile=needed), torch.device(config.device))
    except InputError as error:
        raise InputError(f"{error}; to do without, {otherwise}") from None


def words(options: argparse.Namespace, config: TrainConfig) -> list[str]:
    """The options that `train_config` was made from, for a process of its own."""
    return [
        f"--config={options.config}",
        f"--batch-size={config.batch_size}",
        f"--length={config.max_length}",
        f"--device={config.device}",
        *([f"--dtype={config.dtype}"] if "dtype" in options else []),
    ]


def recorded_shape(name: str) -> str | dict[str, Any]:
    """What a record says of a model's shape: a preset's name, or all of what stands in a file."""
    return LlamaConfig.named(name).to_dict() if name.endswith(".json") else name


def shape_name(recorded: str | dict[str, Any]) -> str:
    """What a table says of it."""
    return recorded if isinstance(recorded, str) else "a config.json"
