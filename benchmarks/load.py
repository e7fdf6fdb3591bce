"""Measure the time and the memory of loading and converting a checkpoint, compared with `transformers`.

A checkpoint of random weights is made, of any preset's shape, and each loader runs in a fresh process. Measured are the
time from the call to a model; the time from the call to the first logits, which reads every weight even from a mapped
file; and the peak resident memory of the process above what its imports take. The two loaders take turns, so that
another load on the machine slows both. Then minift converts the checkpoint, and the same is measured.

    python -m benchmarks load                                          # TinyLlama-1.1B's shape, 2.2 GB of disk
    python -m benchmarks load --config llama2-7b --repeats 3           # 13.5 GB of disk, and as much memory

Resident memory includes pages of mapped files. It is read from /proc, so this needs Linux.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, process, record
from minift.config import LlamaConfig
from minift.errors import need
from minift.formats.files import Spec
from minift.formats.huggingface import write_huggingface
from minift.formats.open import FORMATS
from minift.formats.shapes import parameter_shapes
from minift.values import size

TOKENS = 8  # of the forward pass that reads every weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--config", default="tinyllama-1.1b", help="a preset's name, or a config.json (%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the file (%(default)s)"
    )
    arguments.add_repeats(parser, 7, "runs of each loader")
    parser.add_argument("--folder", help="where to make the checkpoint (the system's temporary folder)")
    formats = f"to convert to, of {', '.join(FORMATS)} (native meta)"
    parser.add_argument(
        "--convert", nargs="*", default=["native", "meta"], choices=list(FORMATS), metavar="FORMAT", help=formats
    )
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    if options.measure:
        print(json.dumps(_measure(*options.measure)))
        return
    need("safetensors", "hf", "this benchmark")
    arguments.check_counts(options, "repeats")
    config = LlamaConfig.named(options.config)
    loaders = ["minift"] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "hf"
        nbytes = _make(folder, config, getattr(torch, options.dtype))
        print(f"{options.config} in {options.dtype}: {size(nbytes)} of weights, in {folder}")
        if len(loaders) == 1:
            print("transformers is not installed: skipped")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
        for turn in range(options.repeats + 1):
            for name in loaders if turn % 2 else reversed(loaders):
                measured = process.fresh("load", name, folder, options.dtype)
                if turn:  # the first turn warms the page cache
                    runs[name].append(measured)
        conversions = {}
        for to in options.convert:
            target = Path(scratch) / to
            conversions[to] = process.fresh("load", f"convert {to}", folder, target)
            shutil.rmtree(target)
    result = {
        "benchmark": "load",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": options.dtype,
        "weights_bytes": nbytes,
        "load": {name: _summary(measured) for name, measured in runs.items()},
        "convert_from_hf": conversions,
        "rows": [row for name, measured in runs.items() for row in _sample_rows(name, measured)],
    }
    print(_table(result))
    record.write(options.json, result)


def _make(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> int:
    """Write a Hugging Face folder of random weights, one tensor at a time. Return the size of the weights in bytes."""
    generator = torch.Generator().manual_seed(0)
    specs = {name: Spec(dtype, shape) for name, shape in parameter_shapes(config).items()}

    def read(name: str) -> Tensor:
        shape = specs[name].shape
        return torch.rand(shape, generator=generator).sub_(0.5).mul_(0.04).to(dtype)  # cheaper than normal

    folder.mkdir()
    write_huggingface(folder, config, specs, read)
    return sum(spec.nbytes for spec in specs.values())


def _measure(name: str, path: str, dtype_or_target: str) -> dict[str, float]:
    """Load or convert a model in a fresh process. Return the seconds, and the peak bytes above those of the imports."""
    if name.startswith("convert "):
        from minift.formats.convert import convert

        process.forget_peak_of("cpu")
        before, start = process.resident(), time.perf_counter()
        convert(path, dtype_or_target, name.removeprefix("convert "))
        return {"seconds": time.perf_counter() - start, "peak_bytes": process.peak() - before}

    dtype = getattr(torch, dtype_or_target)
    if name == "minift":
        from minift.checkpoint import load_model

        def load() -> Any:
            return load_model(path, dtype=dtype)
    else:
        from transformers import LlamaForCausalLM

        os.environ["HF_HUB_OFFLINE"] = "1"

        def load() -> Any:
            return LlamaForCausalLM.from_pretrained(path, dtype=dtype)

    tokens = torch.arange(TOKENS)[None]
    process.forget_peak_of("cpu")
    before, start = process.resident(), time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    peak_loaded = process.peak()
    with torch.inference_mode():
        model(tokens)
    ready = time.perf_counter()
    return {
        "load_seconds": loaded - start,
        "ready_seconds": ready - start,
        "load_peak_bytes": peak_loaded - before,
        "ready_peak_bytes": process.peak() - before,
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: record.spread([run[key] for run in runs]) for key in runs[0] if key != "at"}


def _sample_rows(name: str, runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    return [
        record.row(f"{name}/{what}", [{"at": run.get("at"), "seconds": run[f"{what}_seconds"]} for run in runs])
        for what in ("load", "ready")
    ]


def _table(result: dict[str, Any]) -> str:
    weights = result["weights_bytes"]
    lines = [f"{'':<22}{'load':>18}{'to first logits':>20}{'peak memory':>16}{'of the weights':>16}"]
    for name, summary in result["load"].items():
        cells = [
            "{median:.2f} s ({min:.2f}-{max:.2f})".format(**summary[key]) for key in ("load_seconds", "ready_seconds")
        ]
        peak = summary["ready_peak_bytes"]["max"]
        lines.append(f"{name:<22}{cells[0]:>18}{cells[1]:>20}{size(peak):>16}{peak / weights:>16.3f}")
    for to, measured in result["convert_from_hf"].items():
        seconds, peak = f"{measured['seconds']:.2f} s", measured["peak_bytes"]
        lines.append(f"{f'convert to {to}':<22}{seconds:>18}{'':>20}{size(peak):>16}{peak / weights:>16.3f}")
    return "\n".join(lines)
