"""Compare the memory ledger of `minift info` (`minift/costs/memory.py`) with what a training step really holds.

The ledger describes the moment of a step with the most memory: all gradients of the micro-batches before exist, and the
forward pass has just stored all its activations. So a step of two micro-batches is taken, each shape and dtype in its
own process, and measured in two ways at once:

* line by line, from a history of every tensor's storage (`alive.py`), at the moment with the most bytes. What is in no
  line of the ledger has its own line.
* from outside: on a GPU `torch.cuda.max_memory_allocated`; on a CPU the peak resident memory of the process, above what
  it was before the first step without the weights (imports, the tokenizer, the buffer of pages). The CPU's is measured
  twice: as it is, and in another process, whose C library releases every large freed block at once. The difference is
  fragmentation: glibc keeps freed blocks of up to 32 MB, and tensors of other sizes do not fit into them.

A ledger that is more than 10 % off the first measurement prints a warning.

    python -m benchmarks memory
    python -m benchmarks memory --shapes tinyllama-1.1b:2x1024 --dtypes bfloat16 --device cuda
"""

import argparse
import json
from contextlib import nullcontext
from itertools import chain
from typing import Any

from benchmarks import arguments, process, record
from benchmarks.alive import CAST, Memory, watch_step
from benchmarks.job import Job, add_data_arguments, begin, pages, settings, take_step
from minift.config import DTYPES, LlamaConfig
from minift.costs.memory import training_memory
from minift.errors import InputError
from minift.values import size

SHAPES = ["stories15m:16x256", "smollm2-135m:4x512"]
TOLERANCE = 0.1
REST = "in no line of the ledger"
KEEP, GIVE_BACK = "keep", "give-back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NAME:BxT", help="(%(default)s)")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=DTYPES, metavar="DTYPE", help="(%(default)s)")
    arguments.add_device(parser)
    add_data_arguments(parser)
    arguments.add_json(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table for each shape and write the JSON."""
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    cases = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    for shape, dtype in cases:  # raises for wrong options before anything runs
        named = _named(shape, dtype, options.device)
        settings(named)
        LlamaConfig.named(named.config)
    runs = []
    for shape, dtype in cases:
        where = (options.device, options.tokenizer, *([options.data] if options.data else []))
        one = process.fresh("memory", KEEP, shape, dtype, *where)
        if one["device"] == "cpu":
            again = process.fresh("memory", GIVE_BACK, shape, dtype, *where)
            one["outside_without_holes_bytes"] = again["outside_bytes"]
        runs.append(one)
        show(one)
    record.write(options.json, {"benchmark": "memory", **record.environment(), "runs": runs})


def measure(freed: str, shape: str, dtype: str, device: str, tokenizer: str, data: str | None = None) -> dict[str, Any]:
    """Measure in a fresh process the memory of a shape's second step, and compute its ledger.

    Args:
        freed: what the C library does with large freed blocks: its default (KEEP), or release them (GIVE_BACK).
    """
    if freed == GIVE_BACK:
        process.give_back_freed()
    named = _named(shape, dtype, device)
    config, model = settings(named), LlamaConfig.named(named.config)
    batches = pages(model, config, data, tokenizer)
    micro_batches = iter(batches)
    first = next(micro_batches)  # fills the buffer of pages
    job = begin(model, config, batches, chain([first], micro_batches))
    before = process.held_by(config.device) - sum(parameter.nbytes for parameter in job.state.model.parameters())
    take_step(job, nullcontext)
    process.forget_peak_of(config.device)
    peak = watch_step(job).peak(lambda memory: purpose(memory, job))
    outside = process.peak_of(config.device) - before
    ledger = training_memory(
        model, config.dtype, config.batch_size, config.max_length, config.loss_chunk, config.device
    )
    names = dict.fromkeys([*ledger, *sorted(peak.nbytes), REST])
    lines = {name: {"ledger": ledger.get(name, 0), "measured": peak.nbytes.get(name, 0)} for name in names}
    return {
        "shape": shape,
        "dtype": config.dtype,
        "device": config.device,
        "lines": lines,
        "ledger_bytes": sum(ledger.values()),
        "measured_bytes": peak.total,
        "ledger_of_measured": sum(ledger.values()) / peak.total,
        "fullest_in": peak.part,
        "outside_bytes": outside,
    }


def purpose(memory: Memory, job: Job) -> str:
    """Return the line of the ledger that memory belongs to."""
    config = job.config
    chunk = (min(config.loss_chunk, config.batch_size * config.max_length), job.shape.vocab_size)
    if memory.label:
        return memory.label
    if memory.copy_of == "weights":
        transposed = memory.part == "loss" and memory.made_by != CAST
        return "the head, by columns" if transposed else "autocast's copies of matrices"
    if memory.part == "forward" and memory.saved:
        return "activations for the backward pass"
    if memory.part == "loss" and memory.saved and memory.dtype.is_floating_point:
        return "the loss's own gradients"
    if memory.part == "loss" and memory.shape == chunk:
        return "logits of a chunk"
    return REST


def show(run: dict[str, Any]) -> None:
    """Print the ledger of a shape."""
    off = run["ledger_of_measured"] - 1
    print(f"{run['shape']}, {run['dtype']} on {run['device']}; fullest in the part {run['fullest_in']!r}")
    print(f"{'':<36}{'ledger':>10}{'measured':>10}")
    for name, line in run["lines"].items():
        print(f"{name:<36}{size(line['ledger']):>10}{size(line['measured']):>10}")
    print(f"{'in all':<36}{size(run['ledger_bytes']):>10}{size(run['measured_bytes']):>10}   ledger {off:+.1%}")
    outside = "max_memory_allocated" if run["device"] == "cuda" else "resident memory of the process"
    print(f"{outside:<46}{size(run['outside_bytes']):>10}")
    if "outside_without_holes_bytes" in run:
        print(f"{'… with freed blocks given back':<46}{size(run['outside_without_holes_bytes']):>10}")
    if abs(off) > TOLERANCE:
        print(f"WARNING: THE LEDGER IS MORE THAN {TOLERANCE:.0%} OFF")
    print()


def _named(shape: str, dtype: str, device: str) -> argparse.Namespace:
    """Return a shape as the options of a run. Raise InputError unless it is NAME:BxT."""
    name, _, sizes = shape.rpartition(":")
    rows, _, length = sizes.partition("x")
    if not (name and rows.isdecimal() and length.isdecimal()):
        raise InputError(f"--shapes: {shape!r} is not NAME:BxT, as in stories15m:16x256")
    return argparse.Namespace(
        config=name,
        batch_size=int(rows),
        length=int(length),
        grad_accum=2,
        dtype=dtype,
        device=device,
        compile=False,
    )
