"""What each optimisation of the training step buys: from a textbook's float32 step up, one rung at a time.

Every rung is `train.train_step` over the same documents, and has all that the rungs below it have:

    naive         float32; attention with all T² scores, a loss with all logits, AdamW's loop, a row a document
    + SDPA        attention by PyTorch's fused kernels
    + AMP         autocast: matrix products in bfloat16, where the machine has it
    + loss        the chunked loss, whose logits never exist all at once
    + AdamW       the optimizer's fused kernel
    + heap        on a CPU: what a step frees stays with the process for the next one
    + layer       on a CPU in bfloat16: the layers of short rows with both passes written out, in fewer operations
    + packing     several documents in a row, isolated from each other: no position is computed for nothing
    + compile     torch.compile, which fuses what lies between the matrix products

Each is a process of its own, and they take turns. Counted are the targets of documents, not padding, so that packing
compares. At the end stands from how many steps on compiling pays.

    python -m benchmarks ladder

Read next: `peers.py`.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import minift.loss
import minift.model
import minift.train
from benchmarks import arguments, process, record, side, textbook
from benchmarks.timing import in_turn_order, paired_ratio
from minift.config import LlamaConfig, TrainConfig
from minift.costs.flops import training_flops_per_token
from minift.model import Llama
from minift.pack import IGNORE, Batch, Example, collate
from minift.runs.start import start_state
from minift.train import train_step

RUNGS = ("naive", "+ SDPA", "+ AMP", "+ loss", "+ AdamW", "+ heap", "+ layer", "+ packing", "+ compile")
CPU_ONLY = ("+ heap", "+ layer")
SHORTEST = 8  # of the documents, as a part of a row: they are from an eighth of it to all of it long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    arguments.add_shape(parser, rows="documents of a step")
    arguments.add_device(parser)
    arguments.add_repeats(parser, 6)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, metavar="NAME", help="only these: " + "; ".join(RUNGS))
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    config, shape = arguments.train_config(options), LlamaConfig.named(options.config)
    if options.measure:
        _serve(options.measure[0], shape, config)
        return
    arguments.check_counts(options, "repeats")
    on_cpu = config.device == "cpu"
    rungs = [name for name in RUNGS if name in (options.rungs or RUNGS) and (on_cpu or name not in CPU_ONLY)]
    arguments.check_compiler(config, rungs[-1] == "+ compile", "give all --rungs but the last")
    words = arguments.words(options, config)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(process.Worker("ladder", name, *words)) for name in rungs}
        answers: dict[str, list[Any]] = {name: [] for name in rungs}
        for turn in range(options.repeats):
            for name in in_turn_order(rungs, turn):
                answers[name].append(workers[name].ask("step"))
    ready = {name: worker.ready for name, worker in workers.items()}
    result = _result(options, config, shape, ready, answers)
    print(_table(result))
    record.write(options.json, result)


# In a process of its own ----------------------------------------------------------------------------------------------


def _serve(name: str, shape: LlamaConfig, config: TrainConfig) -> None:
    """Make a rung, take two steps, and then one whenever a line comes in."""
    step, batch = make_rung(name, shape, config)
    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    step()
    tokens = batch.tokens.numel()
    ready = {"first_step_seconds": first, "loss": loss, "targets": batch.n_targets, "positions": tokens}
    side.serve(ready, step, config.device)


def make_rung(name: str, shape: LlamaConfig, config: TrainConfig) -> tuple[Callable[[], float], Batch]:
    """A rung's step, which returns its loss, and the batch that it takes.

    What the rung has not yet is replaced by a textbook's in the modules that train: this is for a process that does
    nothing else.
    """
    has = RUNGS[: RUNGS.index(name) + 1]
    if "+ SDPA" not in has:
        minift.model.attend = _textbook_attention
    if "+ loss" not in has:
        minift.loss.next_token_loss = _textbook_loss
    if "+ heap" not in has:
        minift.runs.start.keep_freed_memory = lambda: False
    if "+ layer" not in has:
        minift.runs.start.choose_written_out = lambda model, config, device: False
    config = config.replace(
        dtype=config.dtype if "+ AMP" in has else "float32", compile="+ compile" in has, pack="+ packing" in has
    )
    generator = torch.Generator().manual_seed(0)
    model = Llama(shape)
    model.init_weights(generator)
    batch = collate(_documents(shape, config, generator), shape.eos_token_ids[0], config.max_length, config.pack)
    batch = batch.to(torch.device(config.device))
    state = start_state(model.to(config.device), None, config)  # type: ignore[arg-type]  # no data to keep the place of
    if "+ AdamW" not in has:
        state.optimizer = textbook.adamw(model, config)  # type: ignore[assignment]
    return lambda: train_step(state, [batch], config.lr, config).loss, batch


def _documents(shape: LlamaConfig, config: TrainConfig, generator: torch.Generator) -> list[Example]:
    T = config.max_length
    lengths = torch.randint(max(2, T // SHORTEST), T + 1, (config.batch_size,), generator=generator).tolist()
    texts = [torch.randint(shape.vocab_size, (n + 1,), generator=generator).tolist() for n in lengths]
    return [Example(prompt=ids[:1], answer=ids[1:]) for ids in texts]


def _textbook_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
    assert mask is None  # a row for each document
    return textbook.attention(query, key, value)


def _textbook_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    return textbook.loss(hidden, weight, targets), (targets != IGNORE).sum()


# The result -----------------------------------------------------------------------------------------------------------


def _result(
    options: argparse.Namespace,
    config: TrainConfig,
    shape: LlamaConfig,
    ready: dict[str, Any],
    answers: dict[str, list[Any]],
) -> dict[str, Any]:
    seconds = {name: [answer["seconds"] for answer in given] for name, given in answers.items()}
    names = list(seconds)
    result = {
        "benchmark": "ladder",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": config.dtype,
        "device": config.device,
        "documents": config.batch_size,
        "length": config.max_length,
        "rungs": {
            name: {
                "targets_per_second": record.spread([ready[name]["targets"] / s for s in seconds[name]]),
                "times_the_rung_below": paired_ratio(seconds[below], seconds[name]) if below else 1.0,
                "times_the_first": paired_ratio(seconds[names[0]], seconds[name]),
                "peak_bytes": answers[name][-1]["peak_bytes"],
                **ready[name],
            }
            for below, name in zip([None, *names[:-1]], names, strict=True)
        },
    }
    if names[-1] == "+ compile" and len(names) > 1:
        pays = break_even(ready, seconds, names[-2])
        flops = ready["+ compile"]["positions"] * training_flops_per_token(shape, config.max_length)
        result["compiling_pays"] = {**pays, "flops": pays["steps"] and flops * pays["steps"]}
    return result


def break_even(ready: dict[str, Any], seconds: dict[str, list[float]], below: str) -> dict[str, float | None]:
    """What compiling costs and saves, in seconds, and from how many steps on it saves more (None: never)."""
    cost = ready["+ compile"]["first_step_seconds"] - ready[below]["first_step_seconds"]
    eager = record.spread(seconds[below])["median"]
    saved = eager * (1 - 1 / paired_ratio(seconds[below], seconds["+ compile"]))
    return {"cost_seconds": cost, "saved_seconds_a_step": saved, "steps": cost / saved if saved > 0 else None}


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['documents']} documents in rows of {result['length']}, {result['dtype']} on {result['device']}",
        f"{'':<12}{'targets/s':>22}{'x below':>9}{'x first':>9}{'peak':>10}{'loss':>9}{'positions':>11}",
    ]
    for name, rung in result["rungs"].items():
        speed = "{:,.0f} ({:,.0f}-{:,.0f})".format(
            *(rung["targets_per_second"][key] for key in ("median", "min", "max"))
        )
        lines.append(
            f"{name:<12}{speed:>22}{rung['times_the_rung_below']:>9.2f}{rung['times_the_first']:>9.2f}"
            f"{rung['peak_bytes'] / 1e6:>7,.0f} MB{rung['loss']:>9.4f}{rung['positions']:>11,}"
        )
    if "compiling_pays" in result:
        pays = result["compiling_pays"]
        saved, steps = 1e3 * pays["saved_seconds_a_step"], pays["steps"]
        when = f"pays from {steps:,.0f} steps of this size on ({pays['flops']:.1e} FLOPs)" if steps else "never pays"
        lines.append(f"compiling took {pays['cost_seconds']:.0f} s, saves {saved:.0f} ms a step, and {when}")
    return "\n".join(lines)
