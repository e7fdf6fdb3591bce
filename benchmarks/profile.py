"""Profile one optimizer step: its operators, the device's idle time, and its memory by purpose.

    python -m benchmarks profile --trace step.json.gz         # opens in Perfetto, https://ui.perfetto.dev
    python -m benchmarks profile --config smollm2-135m --batch-size 4 --length 512 --device cuda

The step is `job.take_step`; its parts are ranges in the trace. It is taken several times, because each tool disturbs
what another measures:

* without the profiler: the wall clock and, on a CPU, the CPU time of its threads. A thread that waits for others in a
  loop counts as busy; OpenMP waits in this way.
* with the profiler: the trace, and the table of operators by *self* time, without the operators that they call. On a
  GPU that is the time of the kernels that they launch. The rest is the row "Python, between the operators".
* with every tensor's storage recorded (`alive.py`): the memory at its peak, by purpose. "activations" are what autograd
  saves for the backward pass: those of the layers, autocast's copies of weights, and the gradients that the loss has
  computed; "other" is temporary memory, mainly logits. A compiled step cannot be recorded in this way.

A GPU is idle while neither a kernel nor a copy runs: their time in the trace is compared with that of a step without
the profiler. On a CPU the idle share is 1 − CPU time / (wall clock × threads).
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import arguments, record
from benchmarks.alive import Memory, watch_step
from benchmarks.job import Job, prepare, take_step
from benchmarks.job import add_arguments as add_job_arguments
from benchmarks.timing import wait_for
from minift.errors import InputError
from minift.values import size

WARMUP = 3  # steps before the first measured one
PYTHON = "Python, between the operators"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events that keep a GPU busy
CATEGORIES = {
    "weights": "weights",
    "gradients": "gradients",
    "AdamW's two moments": "optimizer state",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_job_arguments(parser)
    parser.add_argument("--top", type=int, default=15, metavar="N", help="operators to show (%(default)s)")
    arguments.add_repeats(parser, 5, "steps without the profiler")
    parser.add_argument("--trace", metavar="FILE", help="write the trace to FILE, .json or .json.gz")


def run(options: argparse.Namespace) -> None:
    """Measure, print the tables and write the trace and the JSON."""
    arguments.check_counts(options, "repeats", "top")
    if options.trace is not None and not options.trace.endswith((".json", ".json.gz")):
        raise InputError(f"--trace: {options.trace} must end in .json or .json.gz")
    job = prepare(options)
    for _ in range(WARMUP):
        take_step(job, nullcontext)
    wall, busy = time_steps(job, options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(options.trace or Path(scratch) / "trace.json.gz")
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiled, operators = profile_step(job, trace)
        if job.config.device == "cuda":
            busy = busy_seconds(read_trace(trace)) / wall
    result = {
        "benchmark": "profile",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        **{key: getattr(job.config, key) for key in ("device", "dtype", "batch_size", "grad_accum", "compile")},
        "length": job.config.max_length,
        "threads": torch.get_num_threads(),
        "step_seconds": wall,
        "profiled_step_seconds": profiled,
        "idle": max(0.0, 1 - busy),
        "operators": operators,
        "peak_memory": None if job.config.compile else peak_memory(job),
    }
    show(result, options.top)
    record.write(options.json, result)
    if options.trace:
        print(f"trace: {options.trace} (open it in https://ui.perfetto.dev)")


def time_steps(job: Job, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the median share of them in which this process's threads were busy."""
    seconds, busy = [], []
    for _ in range(repeats):
        wait_for(job.config.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        take_step(job, nullcontext)
        wait_for(job.config.device)
        seconds.append(time.perf_counter() - start)
        busy.append((time.process_time() - start_cpu) / (seconds[-1] * torch.get_num_threads()))
    return statistics.median(seconds), statistics.median(busy)


def profile_step(job: Job, trace: Path) -> tuple[float, list[dict[str, Any]]]:
    """Take a step under the profiler and write its trace.

    Returns:
        The seconds of the step, and for each operator its name, calls, self time on the CPU and on the GPU, and share.
    """
    cuda = job.config.device == "cuda"
    wait_for(job.config.device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        start = time.perf_counter()
        take_step(job, record_function)
        wait_for(job.config.device)
        seconds = time.perf_counter() - start
    profiler.export_chrome_trace(str(trace))
    return seconds, operators_of(profiler.key_averages(), cuda)


def operators_of(events: Sequence[Any], cuda: bool) -> list[dict[str, Any]]:
    """Return the operators of a profile by descending self time; time in none of them is one row, PYTHON."""
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: the operator that launched it includes its time
        name = PYTHON if event.is_user_annotation else event.key
        row = rows.setdefault(name, {"name": name, "calls": 0, "self_cpu_seconds": 0.0, "self_cuda_seconds": 0.0})
        row["calls"] += event.count
        row["self_cpu_seconds"] += event.self_cpu_time_total / 1e6
        row["self_cuda_seconds"] += event.self_device_time_total / 1e6
    key = "self_cuda_seconds" if cuda else "self_cpu_seconds"
    total = sum(row[key] for row in rows.values()) or 1.0
    return sorted(
        ({**row, "share": row[key] / total} for row in rows.values()), key=lambda row: row["share"], reverse=True
    )


def read_trace(file: Path) -> list[dict[str, Any]]:
    """Return the events of a trace."""
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as opened:
        events: list[dict[str, Any]] = json.load(opened)["traceEvents"]
    return events


def busy_seconds(events: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of a trace in which the GPU was busy: work that runs at the same time counts once."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_DEVICE)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def peak_memory(job: Job) -> dict[str, Any]:
    """Return the bytes at the peak of a step, by category; on a GPU also the allocator's peak."""
    if job.config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    peak = watch_step(job).peak(category)
    names = (*CATEGORIES.values(), "activations", "other")
    found: dict[str, Any] = {"fullest_in": peak.part, "bytes": {name: peak.nbytes.get(name, 0) for name in names}}
    if job.config.device == "cuda":
        found["max_memory_allocated"] = torch.cuda.max_memory_allocated()
    return found


def category(memory: Memory) -> str:
    """Return the category of memory."""
    return CATEGORIES.get(memory.label) or ("activations" if memory.saved else "other")


def show(result: dict[str, Any], top: int) -> None:
    """Print the tables."""
    cuda = result["device"] == "cuda"
    print(
        f"{arguments.shape_name(result['config'])}, {result['dtype']} on {result['device']}, "
        f"{result['grad_accum']} x {result['batch_size']} x {result['length']} tokens: "
        f"{result['step_seconds'] * 1e3:,.1f} ms a step, {result['profiled_step_seconds'] * 1e3:,.1f} ms profiled"
    )
    print(f"{'operator':<60}{'calls':>8}{'self CPU':>12}{'self CUDA' if cuda else '':>12}{'share':>8}")
    for row in result["operators"][:top]:
        kernels = f"{row['self_cuda_seconds'] * 1e3:,.2f} ms" if cuda else ""
        print(
            f"{row['name'][:59]:<60}{row['calls']:>8,}{row['self_cpu_seconds'] * 1e3:>9,.2f} ms{kernels:>12}"
            f"{row['share']:>8.1%}"
        )
    rest = result["operators"][top:]
    if rest:
        print(f"{f'{len(rest)} more':<92}{sum(row['share'] for row in rest):>8.1%}")
    print(f"idle: {result['idle']:.1%} of the {'GPU' if cuda else 'CPU'} ({result['threads']} threads)")
    memory = result["peak_memory"]
    if memory is None:
        print("memory: not watched, as the step is compiled")
        return
    total = sum(memory["bytes"].values())
    print(f"memory at the fullest moment (in the part {memory['fullest_in']!r}): {size(total)}")
    for name, nbytes in memory["bytes"].items():
        print(f"  {name:<18}{size(nbytes):>10}{nbytes / total:>8.1%}")
    if cuda:
        print(f"  torch.cuda.max_memory_allocated: {size(memory['max_memory_allocated'])}")
