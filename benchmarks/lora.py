"""Compare LoRA adapters with full finetuning: scores, trained parameters, memory, and time a step.

Every side has the same pairs, steps and held-out questions and runs in a fresh process: full finetuning at its learning
rate, and adapters of several ranks (on all matrices of the layers, alpha 16) at theirs, which is usually ten to fifty
times as large. Adapters save gradients and AdamW's moments, 12 bytes for each parameter that is not trained. They do
not save activations.

    python -m benchmarks lora
    python -m benchmarks lora --ranks 8 --model ./models/TinyLlama-1.1B --data my_pairs.jsonl
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import arguments, process, record
from minift.checkpoint import load_model
from minift.config import FINETUNE
from minift.errors import InputError
from minift.look.report import number
from minift.runs import finetune as jobs
from minift.runs.machine import choose_device
from minift.storage.names import model_path
from minift.values import size

BYTES_A_NUMBER = 12  # a gradient and two moments, in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="(1 8 32)")
    parser.add_argument("--lr", type=float, default=FINETUNE.lr, metavar="X", help="for all weights (%(default)s)")
    parser.add_argument("--lora-lr", type=float, default=5e-3, metavar="X", help="for adapters (%(default)s)")
    parser.add_argument("--model", default="bundled", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="pairs (the bundled ones)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (as many as minift finetune takes)")
    arguments.add_device(parser)
    arguments.add_json(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure each side, print a table and write the JSON."""
    if options.measure:
        print(json.dumps(_measure(*options.measure)))
        return
    if min(options.ranks) < 1:
        raise InputError("--ranks must be at least 1")
    sides = {}
    for rank in (0, *options.ranks):
        config = {"device": options.device, "lora_rank": rank, "lr": options.lora_lr if rank else options.lr}
        if options.steps is not None:
            config["steps"] = options.steps
        name = f"adapters, rank {rank}" if rank else "all weights"
        sides[name] = process.fresh("lora", json.dumps({"model": options.model, "data": options.data, "train": config}))
        print(f"{name}: done", flush=True)
    rows = [record.row(f"{name}/step", side.pop("samples"), per="step") for name, side in sides.items()]
    result = {"benchmark": "lora", **record.environment(), "sides": sides, "rows": rows}
    print(_table(sides))
    record.write(options.json, result)


def _measure(words: str) -> dict[str, Any]:
    """Finetune once, in a child process."""
    asked = json.loads(words)
    config = FINETUNE.replace(**asked["train"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        result = jobs.finetune(jobs.finetune_job(asked["model"], asked["data"]), config, out)
        if result is None:
            raise KeyboardInterrupt
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
        changed = _trained(asked["model"], out, config.lora_rank)
    return {
        "lr": config.lr,
        "trained": changed[0],
        "parameters": changed[1],
        "gradient_and_moment_bytes": BYTES_A_NUMBER * changed[0],
        "peak_bytes": process.peak_of(choose_device(config).type),
        "steps": len(seconds),
        "step_seconds": record.spread(seconds),
        "samples": seconds,
        "scores": result["after"],
        "before": result["before"],
    }


def _trained(model: str, out: Path, rank: int) -> tuple[int, int]:
    """Return the number of trained parameters, from what the run has saved, and that of all the model's parameters."""
    total = sum(parameter.numel() for parameter in load_model(model_path(model)).parameters())
    if not rank:
        return total, total
    from minift.formats.opened import open_tensors

    file = open_tensors(out / "adapter" / "adapter_model.safetensors")
    return sum(spec.numel for spec in file.specs.values()), total


def _table(sides: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'':<20}{'lr':>8}{'trained':>12}{'of all':>8}{'their 12 B':>12}{'peak':>10}{'ms a step':>11}"
        f"{'exact match':>24}{'perplexity':>12}"
    ]
    for name, side in sides.items():
        scores = side["scores"]
        ends = scores["intervals"].get("exact_match")
        match = f"{number(scores['exact_match'])} [{number(ends[0])}, {number(ends[1])}]" if ends else "-"
        share = f"{side['trained'] / side['parameters']:.1%}"
        lines.append(
            f"{name:<20}{side['lr']:>8.0e}{side['trained']:>12,}{share:>8}"
            f"{size(side['gradient_and_moment_bytes']):>12}{size(side['peak_bytes']):>10}"
            f"{side['step_seconds']['median'] * 1e3:>11,.0f}{match:>24}{number(scores['perplexity']):>12}"
        )
    return "\n".join(lines)
