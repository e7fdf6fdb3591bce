"""Measure what each optimisation of the training step gains: one rung at a time, from a textbook's float32 step up.

Every rung is `train.train_step` over the same documents, and includes all that the rungs below it have:

    textbook      float32; attention with all T² scores, a loss with all logits, AdamW's loop, a row for each document
    plain         minift without its kernels: PyTorch's fused attention, a chunked loss, PyTorch's fused AdamW
    + AMP         autocast: matrix products in bfloat16, where the machine has it
    + packing     several documents in a row, isolated from each other: few positions are padding
    + NAME …      one more kernel, by its name in `minift/kernels/`, of those that a run installs on this device
    + compile     torch.compile, which fuses what is between the matrix products, and the kernels of a compiled run

Each rung runs in its own process, and they take turns. The speed counts targets, not padding, so that rungs with and
without packing can be compared. The last line says from how many steps on compiling saves time.

    python -m benchmarks ladder
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import arguments, process, record, side, textbook
from benchmarks.timing import in_turn_order, paired_ratio
from minift import kernels
from minift.config import LlamaConfig, TrainConfig
from minift.costs.flops import training_flops_per_token
from minift.kernels.swap import swap
from minift.loss import NextTokenLoss
from minift.model import Llama, ScaledDotProduct
from minift.pack import Batch, Example, collate
from minift.runs.start import start_state
from minift.train import TrainState, train_step
from minift.values import check_number

PAGES = ("textbook", "plain", "+ AMP", "+ packing")  # rungs without a kernel
ORDER = ("malloc", "adamw", "norm", "attention", "flex", "cross_entropy", "targets", "layer")  # kernels, lowest first
RUNGS = (*PAGES, *(f"+ {name}" for name in ORDER), "+ compile")
SHORTEST = 8  # documents are between 1/SHORTEST of a row and a whole row long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser, rows="documents of a step")
    arguments.add_device(parser)
    arguments.add_repeats(parser, 6)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, metavar="NAME", help="only these: " + "; ".join(RUNGS))
    parser.add_argument(
        "--prompt", type=float, default=0.5, metavar="SHARE", help="of a document that has no targets (%(default)s)"
    )
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    config, shape = arguments.train_config(options), LlamaConfig.named(options.config)
    if options.measure:
        _serve(options.measure[0], shape, config, options.prompt)
        return
    arguments.check_counts(options, "repeats")
    check_number("--prompt", options.prompt, least=0, below=1)
    taken = kernels.choose(config.replace(compile=False), torch.device(config.device))
    there = [name for name in RUNGS if name[2:] not in ORDER or name[2:] in taken]
    rungs = [name for name in there if name in (options.rungs or RUNGS)]
    arguments.check_compiler(config, rungs[-1] == "+ compile", "give all --rungs but the last")
    words = [*arguments.words(options, config), f"--prompt={options.prompt}"]
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


def _serve(name: str, shape: LlamaConfig, config: TrainConfig, prompt: float) -> None:
    """Make a rung and take two steps; then take one step for each line on standard input."""
    step, batch, _ = make_rung(name, shape, config, prompt)
    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    step()
    tokens = batch.tokens.numel()
    ready = {"first_step_seconds": first, "loss": loss, "targets": batch.n_targets, "positions": tokens}
    side.serve(ready, step, config.device)


def make_rung(
    name: str, shape: LlamaConfig, config: TrainConfig, prompt: float = 0.5
) -> tuple[Callable[[], float], Batch, TrainState]:
    """Return a rung's step, which returns its loss, the batch that it trains on, and the state that it changes.

    Args:
        prompt: the share of each document that has no targets.
    """
    has = RUNGS[: RUNGS.index(name) + 1]
    config = config.replace(
        dtype=config.dtype if "+ AMP" in has else "float32", compile="+ compile" in has, pack="+ packing" in has
    )
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(0)
    model = Llama(shape)
    model.init_weights(generator)
    documents = _documents(shape, config, generator, prompt)
    batch = collate(documents, shape.eos_token_ids[0], config.max_length, config.pack).to(device)
    names = [one for one in kernels.choose(config, device) if f"+ {one}" in has or config.compile]
    state = start_state(model.to(device), None, config, names=names)  # type: ignore[arg-type]  # has no batches
    if name == "textbook":
        swap(state.objective, {ScaledDotProduct: TextbookAttention, NextTokenLoss: TextbookLoss})
        state.optimizer = textbook.adamw(model, config)
    return lambda: train_step(state, [batch], config.lr, config).loss, batch, state


def _documents(shape: LlamaConfig, config: TrainConfig, generator: torch.Generator, prompt: float) -> list[Example]:
    T = config.max_length
    lengths = torch.randint(max(2, T // SHORTEST), T + 1, (config.batch_size,), generator=generator).tolist()
    texts = [torch.randint(shape.vocab_size, (n + 1,), generator=generator).tolist() for n in lengths]
    cuts = [max(1, round(prompt * len(ids))) for ids in texts]
    return [Example(prompt=ids[:cut], answer=ids[cut:]) for ids, cut in zip(texts, cuts, strict=True)]


class TextbookAttention(ScaledDotProduct):
    """Attention that computes all T² scores, for rows of one document."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend: [B, H, T, C] and twice [B, K, T, C] → [B, H, T, C]."""
        assert mask is None
        return textbook.attention(query, key, value)


class TextbookLoss(NextTokenLoss):
    """The summed loss with all logits in memory."""

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, n_targets: int | None = None
    ) -> torch.Tensor:
        """Sum the loss: [B, T, D], [V, D] and [B, T] → scalar."""
        return textbook.loss(hidden, weight, targets)


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
        "prompt": options.prompt,
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
        "rows": [record.row(f"{name}/step", given, per="step") for name, given in answers.items()],
    }
    if names[-1] == "+ compile" and len(names) > 1:
        pays = break_even(ready, seconds, names[-2])
        flops = ready["+ compile"]["positions"] * training_flops_per_token(shape, config.max_length)
        result["compiling_pays"] = {**pays, "flops": pays["steps"] and flops * pays["steps"]}
    return result


def break_even(ready: dict[str, Any], seconds: dict[str, list[float]], below: str) -> dict[str, float | None]:
    """Return what compiling costs and saves, in seconds, and the steps from which on it saves more (None: never)."""
    cost = ready["+ compile"]["first_step_seconds"] - ready[below]["first_step_seconds"]
    eager = record.spread(seconds[below])["median"]
    saved = eager * (1 - 1 / paired_ratio(seconds[below], seconds["+ compile"]))
    return {"cost_seconds": cost, "saved_seconds_a_step": saved, "steps": cost / saved if saved > 0 else None}


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['documents']} documents in rows of {result['length']}, {result['dtype']} on {result['device']}",
        f"{'':<17}{'targets/s':>22}{'x below':>9}{'x first':>9}{'peak':>10}{'loss':>9}{'positions':>11}",
    ]
    for name, rung in result["rungs"].items():
        speed = "{:,.0f} ({:,.0f}-{:,.0f})".format(
            *(rung["targets_per_second"][key] for key in ("median", "min", "max"))
        )
        lines.append(
            f"{name:<17}{speed:>22}{rung['times_the_rung_below']:>9.2f}{rung['times_the_first']:>9.2f}"
            f"{rung['peak_bytes'] / 1e6:>7,.0f} MB{rung['loss']:>9.4f}{rung['positions']:>11,}"
        )
    if "compiling_pays" in result:
        pays = result["compiling_pays"]
        saved, steps = 1e3 * pays["saved_seconds_a_step"], pays["steps"]
        when = f"pays from {steps:,.0f} steps of this size on ({pays['flops']:.1e} FLOPs)" if steps else "never pays"
        lines.append(f"compiling took {pays['cost_seconds']:.0f} s, saves {saved:.0f} ms a step, and {when}")
    return "\n".join(lines)
