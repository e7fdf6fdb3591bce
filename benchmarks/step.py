"""Time the parts of an optimizer step, from the next batch to the bookkeeping.

A step is timed part by part (`job.take_step`), and the parts have to add up to two other times. One is the time of the
same step by one clock around all of it; if it differs, something is in no part. The other is a step of the real
`train.train_step`, in turns with it; if it differs, measuring the parts has changed the step, or the machine was busy
with something else (then more `--repeats` help). A difference of more than 5 % from either prints a warning. On a GPU
the clock waits for its work at the end of each part. A real step overlaps work of different parts, so the parts may add
up to more when the GPU has little to do.

    python -m benchmarks step
    python -m benchmarks step --config smollm2-135m --batch-size 4 --length 512 --device cuda --dtype bfloat16

*share* is a share of the time of all steps together, because some parts come in bursts: text is encoded for many
batches at once. MFU: the FLOPs a second of the model (`minift/costs/flops.py`) in the real steps, as a share of those
of a large matrix product in the same dtype, measured in the same run (`roof.py`).
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import arguments, energy, record, roof
from benchmarks.job import PARTS, STEPS, Job, prepare, take_step
from benchmarks.job import add_arguments as add_job_arguments
from benchmarks.timing import paired_ratio, wait_for
from minift.costs.flops import data_sheet_flops, training_flops_per_token
from minift.optim import learning_rate
from minift.train import train_step

WARMUP = 2  # steps of each kind that are not counted
TOLERANCE = 0.05  # largest difference between the parts and the whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_job_arguments(parser)
    arguments.add_repeats(parser, 10, "steps of each kind")


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    arguments.check_counts(options, "repeats")
    job = prepare(options)
    whole, around, parts, began = measure(job, options.repeats)
    result = {
        "benchmark": "step",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        **{key: getattr(job.config, key) for key in ("device", "dtype", "batch_size", "grad_accum", "compile")},
        "length": job.config.max_length,
        "threads": torch.get_num_threads(),
        **summary(job, whole, around, parts),
        "rows": sample_rows(whole, parts, began),
    }
    used = energy.joules_a_call(lambda: whole_step(job), energy.find(job.config.device))
    if used.joules is not None:
        result |= {"joules_per_token": used.joules / job.tokens, "joules_by": used.source}
    show(result)
    record.write(options.json, result)


class Stopwatch:
    """A stopwatch for the parts of a step. The times of a part that comes once for each micro-batch are added up.

    Attributes:
        seconds: the total by part.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._clock = clock

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds of the `with` block to a part."""
        start = self._clock()
        yield
        wait_for(self._device)
        self.seconds[name] += self._clock() - start


def whole_step(job: Job) -> None:
    """Take a step as the training loop does."""
    state, config = job.state, job.config
    state.batches.state_dict()
    window = [next(job.micro_batches).to(state.model.device) for _ in range(config.grad_accum)]
    lr = learning_rate(state.step, STEPS, config)
    state.step += train_step(state, window, lr, config).stepped


def measure(
    job: Job, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], list[float], list[dict[str, float]], list[tuple[float, float]]]:
    """Time whole steps, and in turns with them steps in parts.

    Returns:
        The seconds of each whole step; of each step in parts by one clock around it; and of its parts. Last, the times
        of day at which both steps of a turn began.
    """
    device = job.config.device
    whole: list[float] = []
    around: list[float] = []
    parts: list[dict[str, float]] = []
    began: list[dict[str, float]] = []

    def take_whole() -> None:
        wait_for(device)
        began[-1]["whole"] = time.time()
        start = clock()
        whole_step(job)
        wait_for(device)
        whole.append(clock() - start)

    def take_parts() -> None:
        watch = Stopwatch(device, clock)
        wait_for(device)
        began[-1]["parts"] = time.time()
        start = clock()
        take_step(job, watch.part)
        wait_for(device)
        around.append(clock() - start)
        parts.append(dict(watch.seconds))

    for turn in range(WARMUP + repeats):
        began.append({})
        for take in (take_whole, take_parts) if turn % 2 else (take_parts, take_whole):
            take()
    times = [(turn["whole"], turn["parts"]) for turn in began[WARMUP:]]
    return whole[WARMUP:], around[WARMUP:], parts[WARMUP:], times


def sample_rows(
    whole: list[float], parts: list[dict[str, float]], began: list[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Return the rows of the record: of the whole step, and of each part. A part's time of day is that of its step."""
    answers = {"train_step": [{"at": at, "seconds": taken} for taken, (at, _) in zip(whole, began, strict=True)]}
    for name in PARTS:
        answers[name] = [{"at": at, "seconds": step[name]} for step, (_, at) in zip(parts, began, strict=True)]
    return [record.row(name, given, per="step") for name, given in answers.items()]


def summary(job: Job, whole: list[float], around: list[float], parts: list[dict[str, float]]) -> dict[str, Any]:
    """Return the record of the measurements."""
    sums = [sum(step.values()) for step in parts]
    of_same, of_whole = paired_ratio(sums, around), paired_ratio(sums, whole)
    measured = roof.measure(job.config.device, getattr(torch, job.config.dtype))
    tokens_per_second = job.tokens / statistics.median(whole)
    flops = training_flops_per_token(job.shape, job.config.max_length) * tokens_per_second
    peak = data_sheet_flops(job.state.model.device, job.config.dtype)
    return {
        "tokens": job.tokens,
        "parts_seconds": {name: record.spread([step[name] for step in parts]) for name in PARTS},
        "parts_share": {name: sum(step[name] for step in parts) / sum(sums) for name in PARTS},
        "sum_of_parts_seconds": record.spread(sums),
        "whole_step_seconds": record.spread(whole),
        "parts_of_same_step": of_same,
        "parts_of_whole_step": of_whole,
        "adds_up": max(abs(of_same - 1), abs(of_whole - 1)) <= TOLERANCE,
        "tokens_per_second": tokens_per_second,
        "roof": measured.to_dict(),
        "model_flops_per_second": flops,
        "mfu": flops / measured.flops,
        "mfu_of_data_sheet": flops / peak if peak else None,
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    accum = f"{result['grad_accum']} x " if result["grad_accum"] > 1 else ""
    print(
        f"{arguments.shape_name(result['config'])}, {result['dtype']} on {result['device']}, "
        f"{accum}{result['batch_size']} x {result['length']} tokens a step{', compiled' if result['compile'] else ''}"
    )
    print(f"{'part':<26}{'median':>12}{'spread':>22}{'share':>9}")
    for name, times in result["parts_seconds"].items():
        print(_row(name, times) + f"{result['parts_share'][name]:>9.1%}")
    print(_row("sum of the parts", result["sum_of_parts_seconds"]))
    print(_row("a whole train_step", result["whole_step_seconds"]))
    print(
        f"the parts come to {result['parts_of_same_step']:.1%} of the same step by one clock, and to "
        f"{result['parts_of_whole_step']:.1%} of the whole train_step (medians over the turns)"
    )
    if not result["adds_up"]:
        print(f"WARNING: MORE THAN {TOLERANCE:.0%} OFF: THE PARTS DO NOT DESCRIBE THE STEP, OR THE MACHINE IS BUSY")
    print(
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['model_flops_per_second'] / 1e9:,.1f} GFLOP/s: "
        f"MFU {result['mfu']:.1%} of {result['roof']['flops'] / 1e9:,.1f} measured"
        + (f", {result['mfu_of_data_sheet']:.1%} of the data sheet's peak" if result["mfu_of_data_sheet"] else "")
    )
    if "joules_per_token" in result:
        print(f"{result['joules_per_token'] * 1e3:,.3g} mJ a token in whole steps ({result['joules_by']})")


def _row(name: str, times: dict[str, float]) -> str:
    spread = f"{times['min'] * 1e3:,.2f}-{times['max'] * 1e3:,.2f}"
    return f"{name:<26}{times['median'] * 1e3:>9,.2f} ms{spread:>22}"
