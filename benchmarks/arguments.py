"""Define the options that benchmarks have in common, and the training config that they describe."""

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
    """Add the options for the shape of a model and of a batch; `rows` is the help text of `--batch-size`."""
    parser.add_argument("--config", default=config, metavar="NAME|FILE", help="the model's shape (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help=f"{rows} (%(default)s)")
    parser.add_argument("--length", type=int, default=length, metavar="N", help="tokens of a row (%(default)s)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options for the dtype and the device."""
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the matrix products (%(default)s)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device."""
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(%(default)s)")


def add_repeats(parser: argparse.ArgumentParser, repeats: int, what: str = "turns") -> None:
    """Add the options for the number of measurements and for the file of the result."""
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"{what} (%(default)s)")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for the file of the result."""
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE")


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Add the hidden option that tells a child process what to measure (`process.py`)."""
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these options is at least 1."""
    for name in names:
        check_number("--" + name.replace("_", "-"), getattr(options, name), least=1)


def check_files(options: argparse.Namespace) -> None:
    """Raise InputError when an output file cannot be written: before the measurement, not after it."""
    for file in (getattr(options, name, None) for name in FILES):
        if file is None:
            continue
        try:
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def check_plot(file: str | None) -> None:
    """Raise InputError when a plot cannot be drawn to this file: before the measurement, not after it."""
    if file is not None:
        need("matplotlib.pyplot", "plot", "--plot")
        if Path(file).suffix != ".png":
            raise InputError(f"--plot draws a .png, not {file}")


def train_config(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    """Return the config that the options of `add_shape` and `add_device` or `add_machine` describe.

    Its device and dtype are resolved: neither is "auto".

    Raises:
        InputError: for invalid sizes or `changes`, a device that is not available, a dtype that it does not support,
            and a compiler that is not installed.
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
    """Raise InputError when compiling is needed and impossible; `otherwise` says which option avoids it."""
    try:
        machine.check_compiler(config.replace(compile=needed), torch.device(config.device))
    except InputError as error:
        raise InputError(f"{error}; to do without, {otherwise}") from None


def words(options: argparse.Namespace, config: TrainConfig) -> list[str]:
    """Return the options that `train_config` was made from, for a child process."""
    return [
        f"--config={options.config}",
        f"--batch-size={config.batch_size}",
        f"--length={config.max_length}",
        f"--device={config.device}",
        *([f"--dtype={config.dtype}"] if "dtype" in options else []),
    ]


def recorded_shape(name: str) -> str | dict[str, Any]:
    """Return a model's shape for a record: a preset's name, or the contents of a config file."""
    return LlamaConfig.named(name).to_dict() if name.endswith(".json") else name


def shape_name(recorded: str | dict[str, Any]) -> str:
    """Return the name of a recorded shape for a table."""
    return recorded if isinstance(recorded, str) else "a config.json"
