"""Define the workloads by which two versions of minift are compared, and serve one sample of one when asked.

Each is small enough to be taken many times in a second: a training step, a few tokens of text, and the operations of
`operations.py` as training uses them. This file imports minift only inside functions: the other side may be an older
version, and a workload that it lacks is reported by name while the others run.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.timers import preemptions, seconds_a_call

Call = Callable[[], object]
Setting = Mapping[str, Any]  # config, batch_size, length, dtype, device
WARMUP = 3  # calls of each before it is sampled
PROMPT, NEW_TOKENS = 8, 8  # of `decode`


def step(setting: Setting) -> Call:
    """Take an optimizer step of training on random tokens: `train_step`, as a run does it."""
    from minift.config import PRETRAIN, LlamaConfig
    from minift.model import Llama
    from minift.pack import IGNORE, Batch
    from minift.runs.start import start_state
    from minift.train import train_step

    shape, (B, T) = LlamaConfig.named(setting["config"]), (setting["batch_size"], setting["length"])
    config = PRETRAIN.replace(device=setting["device"], dtype=setting["dtype"], compile=False, batch_size=B)
    config = config.replace(max_length=T)
    generator = torch.Generator(setting["device"]).manual_seed(0)
    with torch.device(setting["device"]):
        model = Llama(shape)
        model.init_weights(generator)
        ids = torch.randint(shape.vocab_size, (B, T), generator=generator)
        targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)), dim=-1)
        batch = Batch(ids, targets, torch.arange(T).expand(B, T), torch.zeros_like(ids), False, B * (T - 1))
    state = start_state(model, None, config)  # type: ignore[arg-type]  # has no batches
    return lambda: train_step(state, [batch], 1e-5, config)


def decode(setting: Setting) -> Call:
    """Generate a few tokens after a short prompt, greedily, with a cache."""
    from minift.config import LlamaConfig
    from minift.generate import generate
    from minift.model import Llama

    shape = LlamaConfig.named(setting["config"])
    generator = torch.Generator(setting["device"]).manual_seed(0)
    with torch.device(setting["device"]):
        model = Llama(shape)
        model.init_weights(generator)
    model.to(getattr(torch, setting["dtype"])).eval()
    prompt = [3 + i for i in range(PROMPT)]
    return lambda: generate(model, [prompt], NEW_TOKENS)


def operation(name: str) -> Callable[[Setting], Call]:
    """Return a workload: one operation of a step as training uses it, forward and backward."""

    def workload(setting: Setting) -> Call:
        from benchmarks.operation import Setting as OperationSetting
        from benchmarks.operation import make_step
        from benchmarks.operations import OPERATIONS
        from minift.config import LlamaConfig

        shape, dtype = LlamaConfig.named(setting["config"]), getattr(torch, setting["dtype"])
        made = OPERATIONS[name](
            make_step(OperationSetting(shape, setting["batch_size"], setting["length"], dtype, setting["device"]))
        )
        return (lambda: made.both("used")) if made.leaves else made.variants["used"]

    return workload


WORKLOADS: dict[str, Callable[[Setting], Call]] = {
    "step": step,
    "decode": decode,
    **{name: operation(name) for name in ("norm", "rope", "attention", "swiglu", "layer", "loss")},
}


def serve(first: Mapping[str, Any], lines: TextIO) -> None:
    """Make the workloads that the first line names, say which are ready, and answer each line by a sample.

    Args:
        first: "names"; "setting"; "extra", units of more work after each call, by name; "root", which minift is in;
            "threads".
        lines: the connection. A request is {"name": …, "calls": …, "burst": …}, its answer is what `sample` returns.
    """
    import minift

    if not Path(minift.__file__).is_relative_to(first["root"]):
        raise RuntimeError(f"minift was imported from {minift.__file__}, not from {first['root']}")
    if first["threads"]:
        torch.set_num_threads(first["threads"])
    device, calls = first["setting"]["device"], dict[str, Call]()
    answer: dict[str, Any] = {"seconds": {}, "missing": {}}
    if device == "cpu":
        keep_freed_memory()
    for name in first["names"]:
        try:
            calls[name] = with_extra(WORKLOADS[name](first["setting"]), first["extra"].get(name, 0))
            for _ in range(WARMUP):
                calls[name]()
            answer["seconds"][name] = seconds_a_call(calls[name], 1, device, time.process_time)
        except Exception as error:  # whatever an older version lacks
            answer["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if first.get("units"):  # the work of `with_extra`, to be counted out
        calls["units"] = with_extra(lambda: None, first["units"])
    while True:
        print(json.dumps(answer), file=lines, flush=True)
        line = lines.readline()
        if not line:
            return
        asked = json.loads(line)
        answer = sample(calls[asked["name"]], asked["calls"], asked["burst"], device)


def sample(call: Call, calls: int, burst: int, device: str) -> dict[str, Any]:
    """Return what a call takes: the median of a burst of short samples, of those that nothing interrupted if any.

    A short sample often ends before another process gets the core, and a burst shares what it costs to start cold.

    Returns:
        "at": the time of day; "seconds" and "cpu" of one call, on the wall and on a core; "preempted": whether another
        process took a core away in every sample of the burst.
    """
    if calls > 1:
        call()  # the other side's process has had the caches
    at, taken = time.time(), list[tuple[int, float, float]]()
    for _ in range(burst):
        preempted, cpu = preemptions(), time.process_time()
        seconds = seconds_a_call(call, calls, device)
        taken.append((preemptions() - preempted, seconds, (time.process_time() - cpu) / calls))
    clean = [one for one in taken if not one[0]] or taken
    middle = {key: statistics.median(one[i] for one in clean) for i, key in ((1, "seconds"), (2, "cpu"))}
    return {"at": at, **middle, "preempted": all(one[0] for one in taken)}


def keep_freed_memory() -> None:
    """Keep freed memory for the next call, as training does, if this side's minift can.

    Without it the C library gives some blocks back to the system in each call, or none, by where the heap happens to
    end: `loss` then has 20 page faults a call in one process and 220 in another, which is a fifth slower.
    """
    with contextlib.suppress(ImportError):
        from minift.kernels.malloc import keep_freed_memory

        keep_freed_memory()


def with_extra(call: Call, units: float) -> Call:
    """Return a call with so many units of more work after it, on average: a slowdown put in by hand."""
    if not units:
        return call
    x, due = torch.ones(256), 0.0

    def slower() -> object:
        nonlocal due
        result = call()
        due += units
        while due >= 1:
            x.mul_(1.0)
            due -= 1
        return result

    return slower
