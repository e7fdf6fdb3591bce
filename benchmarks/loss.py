"""Compare all implementations of the head and its loss: speed, memory and error.

Each goes from the final hidden states and the head's weights, both in float32, to the summed loss and both gradients,
under the autocast of a step; they take turns. The logits are as wide as the vocabulary, so for a small model the head
takes most of a step's time and memory.

* *used*: `minift/kernels/cross_entropy.py`, which computes the logits of some positions at a time, and each only once;
* *plain*: its plain twin, `next_token_loss` (`minift/loss.py`);
* *all logits*: a product and `F.cross_entropy`, which hold several copies of N·V numbers; eager, and compiled;
* *F.linear_cross_entropy*: PyTorch's own chunked loss (from 2.13 on), with the policy that it chooses for this device
  and dtype, and with its most accurate one. Autocast has no effect on it, so its inputs are cast before.

    python -m benchmarks loss                                    # stories15m's head, 16 x 256 tokens
    python -m benchmarks loss --config tinyllama-1.1b --batch-size 4 --length 2048 --device cuda

*Off* is the relative error compared with the same formula in float64. If that of *used* is too large, the benchmark
fails. Legend: B rows, T tokens of a row, N = B·T, D model width, V vocabulary.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import agreement, arguments, process, record, roof, textbook, timers
from benchmarks.timing import in_turns, paired_ratio
from minift.config import PRETRAIN, LlamaConfig, TrainConfig
from minift.errors import InputError
from minift.kernels.cross_entropy import FusedNextTokenLoss
from minift.loss import next_token_loss

AGREE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # the largest relative error of `used`
SPREAD = 2.0  # standard deviation of the logits: about that of a trained model
ROWS = 256  # positions that the float64 formula computes at a time
Way: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser)
    parser.add_argument(
        "--loss-chunk", type=int, default=PRETRAIN.loss_chunk, metavar="N", help="of the used one (%(default)s)"
    )
    arguments.add_machine(parser)
    arguments.add_repeats(parser, 5)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    arguments.check_counts(options, "repeats")
    config = arguments.train_config(options, loss_chunk=options.loss_chunk)
    shape, dtype = LlamaConfig.named(options.config), getattr(torch, config.dtype)
    if options.measure:
        print(json.dumps(_memory(options.measure[0], shape, config)))
        return
    inputs = make_inputs(shape, config.batch_size, config.max_length, torch.device(config.device))
    found = measure(ways(dtype, config.loss_chunk), inputs, config.dtype, options.repeats)
    rows = [record.row(f"{name}/both", samples) for name, samples in found.pop("samples").items()]
    words = [*arguments.words(options, config), f"--loss-chunk={config.loss_chunk}"]
    for name, way in found["ways"].items():
        way["peak_bytes"] = process.fresh("loss", name, *words)
    result = {
        "benchmark": "loss",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": config.dtype,
        "device": config.device,
        "batch_size": config.batch_size,
        "length": config.max_length,
        "width": shape.hidden_size,
        "vocabulary": shape.vocab_size,
        "loss_chunk": config.loss_chunk,
        "roof_flops": roof.measure(config.device, dtype).flops,
        **found,
        "rows": rows,
    }
    print(_table(result))
    record.write(options.json, result)


def make_inputs(
    shape: LlamaConfig, batch_size: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [B, T, D] and a head [V, D], float32, that require gradients; and targets [B, T]."""
    generator = torch.Generator(device).manual_seed(0)
    D, V = shape.hidden_size, shape.vocab_size
    hidden = torch.randn(batch_size, length, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device) * SPREAD / math.sqrt(D)
    targets = torch.randint(V, (batch_size, length), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def ways(dtype: torch.dtype, chunk: int) -> dict[str, Way]:
    """Return the implementations by name. Only a call shows whether this PyTorch and this machine support one."""

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(hidden, weight, targets, chunk)

    def fused(policy: str) -> Way:
        def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            if not hasattr(F, "linear_cross_entropy"):
                raise NotImplementedError(f"PyTorch {torch.__version__} has none")
            options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)  # type: ignore[arg-type]
            states, head = hidden.flatten(0, 1).to(dtype), weight.to(dtype)
            return F.linear_cross_entropy(states, head, targets.flatten(), reduction="sum", options=options)

        return call

    return {
        "used": FusedNextTokenLoss(chunk),
        "plain": plain,
        "all logits": textbook.loss,
        "all logits, compiled": torch.compile(textbook.loss, dynamic=False),
        "F.linear_cross_entropy": fused("auto"),
        "… accurate": fused("accurate"),
    }


def measure(sides: dict[str, Way], inputs: tuple[Tensor, Tensor, Tensor], dtype: str, repeats: int) -> dict[str, Any]:
    """Return time and error of each implementation, and why others are skipped on this machine.

    Raises:
        InputError: when `used` is not available or does not agree with the formula.
    """
    hidden, weight, targets = inputs
    device = hidden.device.type
    right = _formula(hidden, weight, targets)
    calls: dict[str, Callable[[], Tensor]] = {}
    off, skipped = {}, {}
    for name, way in sides.items():
        call = _both(way, inputs, dtype)
        try:
            loss = call()
        except agreement.REFUSALS as refusal:
            skipped[name] = agreement.reason(refusal)
            continue
        off[name] = list(map(agreement.off, (loss, hidden.grad, weight.grad), right))
        calls[name] = call
    if "used" in skipped:
        raise InputError(f"used: {skipped['used']}")
    if not max(off["used"]) <= AGREE[dtype]:
        raise InputError(f"used: {off['used']} off the formula; times would compare nothing")
    samples = in_turns(calls, repeats, device=device, timer=timers.usual(device))
    seconds = {name: one.seconds for name, one in samples.items()}
    spreads = {name: record.spread(times) for name, times in seconds.items()}
    N, D, V = targets.numel(), *weight.shape[::-1]
    flops = 3 * 2 * N * D * V
    return {
        "flops": flops,
        "samples": samples,
        "skipped": skipped,
        "ways": {
            name: {
                "seconds": spread,
                "flops_per_second": flops / spread["median"],
                "used_is_times_as_fast": paired_ratio(seconds[name], seconds["used"]),
                "loss_off": off[name][0],
                "hidden_gradient_off": off[name][1],
                "weight_gradient_off": off[name][2],
            }
            for name, spread in spreads.items()
        },
    }


def _both(way: Way, inputs: tuple[Tensor, Tensor, Tensor], dtype: str) -> Callable[[], Tensor]:
    """Return a call of the forward and the backward pass, as in a step: without gradients of the call before."""
    hidden, weight, _ = inputs
    device = hidden.device.type

    def call() -> Tensor:
        hidden.grad = weight.grad = None
        with torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = way(*inputs)
        loss.backward()
        return loss

    return call


def _memory(name: str, shape: LlamaConfig, config: TrainConfig) -> int:
    """Measure in a fresh process how many bytes the second call adds at its peak, gradients included."""
    if config.device == "cpu":
        process.give_back_freed()
    inputs = make_inputs(shape, config.batch_size, config.max_length, torch.device(config.device))
    call = _both(ways(getattr(torch, config.dtype), config.loss_chunk)[name], inputs, config.dtype)
    call()  # compiles, and loads libraries
    for leaf in inputs[:2]:
        leaf.grad = None
    process.forget_peak_of(config.device)
    before = process.held_by(config.device)
    call()
    return process.peak_of(config.device) - before


def _formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and both gradients by the formula in float64, ROWS positions at a time."""
    head = weight.detach().double().requires_grad_()
    loss, grads = torch.zeros((), dtype=torch.float64, device=head.device), []
    for states, ids in zip(hidden.detach().flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True):
        states = states.double().requires_grad_()
        part = F.cross_entropy(states @ head.T, ids, reduction="sum")
        part.backward()
        loss += part.detach()
        grads.append(states.grad)
    assert head.grad is not None
    return loss, torch.cat(grads).view_as(hidden), head.grad


def _table(result: dict[str, Any]) -> str:
    roof_flops = result["roof_flops"]
    lines = [
        f"{result['batch_size']} x {result['length']} tokens of width {result['width']}, {result['vocabulary']:,} "
        f"pieces, {result['dtype']} on {result['device']}; the roof: {roof_flops / 1e9:,.0f} GFLOP/s",
        f"{'':<24}{'both':>12}{'of roof':>9}{'used is x':>11}{'memory':>11}"
        f"{'off: loss':>12}{'∂hidden':>9}{'∂weight':>9}",
    ]
    for name, way in result["ways"].items():
        off = f"{way['loss_off']:>12.0e}{way['hidden_gradient_off']:>9.0e}{way['weight_gradient_off']:>9.0e}"
        lines.append(
            f"{name:<24}{way['seconds']['median'] * 1e3:>9,.1f} ms{way['flops_per_second'] / roof_flops:>9.2f}"
            f"{way['used_is_times_as_fast']:>11.2f}{way['peak_bytes'] / 1e6:>8,.0f} MB{off}"
        )
    lines += [f"{name}: skipped, {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)
