"""Compare a training step with that of `transformers`: the same weights, batches and optimizer, in turns.

Every side is a process that makes its model from the same weights and waits; then they take turns, a few steps each, in
an order that is reversed each time. All of them do full finetuning under autocast, with AdamW's fused kernel and
clipping by the global norm. `transformers` uses SDPA. Their losses must agree at every step, or the comparison is not
valid.

* *minift, compiled* and *minift*: `train_step`, with and without `--compile`;
* *transformers, compiled* and *transformers*: the loop of its documentation around `LlamaForCausalLM`;
* *transformers, checkpointed*: the same with activation checkpointing; only when it is named in `--sides`, for models
  that do not fit a GPU without it;
* *litgpt* and *torchtune*, compiled or not: the same loop around their models and losses (`others.py`); only when they
  are named, by who has installed them.

    python -m benchmarks peers
    python -m benchmarks peers --config smollm2-135m --batch-size 4 --length 512
    python -m benchmarks peers --config llama2-7b --batch-size 2 --length 4096 --device cuda --apart

Where a GPU has room for one model only, `--apart` lets each side take all its turns before the next one begins; a side
that does not fit is reported and left out. The sides then run on the same machine, but not at the same time.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

from benchmarks import arguments, others, process, record, roof, side
from benchmarks.timing import in_turn_order, paired_ratio
from minift.config import PRETRAIN, LlamaConfig, TrainConfig
from minift.costs.flops import data_sheet_flops, training_flops_per_token
from minift.errors import InputError
from minift.model import Llama
from minift.runs.start import start_state
from minift.train import train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser)
    arguments.add_machine(parser)
    parser.add_argument(
        "--loss-chunk", type=int, default=PRETRAIN.loss_chunk, metavar="N", help="minift's (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=1e-4, metavar="X", help="learning rate (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of each side in a turn (%(default)s)")
    arguments.add_repeats(parser, 8)
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="NAME", help="only these: " + "; ".join(SIDES))
    parser.add_argument("--apart", action="store_true", help="one side after another, for models that fill a GPU")
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    config = arguments.train_config(options, loss_chunk=options.loss_chunk, weight_decay=0.0, lr=options.lr)
    shape = LlamaConfig.named(options.config)
    if options.measure:
        _serve(options.measure[0], shape, config, options.steps)
        return
    arguments.check_counts(options, "repeats", "steps")
    sides = [name for name in SIDES if name in (options.sides or UNASKED)]
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: skipped")
        sides = [name for name in sides if not name.startswith("transformers")]
    compiled = any(name.endswith("compiled") for name in sides)
    arguments.check_compiler(config, compiled, "give --sides that are not compiled")
    words = [*arguments.words(options, config), f"--steps={options.steps}"]
    words += [f"--loss-chunk={config.loss_chunk}", f"--lr={config.lr}"]
    turns = Turns()
    for together in [[name] for name in sides] if options.apart else [sides]:
        try:
            turns.take(together, words, config, options.repeats, options.apart)
        except InputError as error:
            if not (options.apart and "out of memory" in str(error)):
                raise
            print(f"{together[0]}: skipped, it does not fit")
            turns.skipped.append(together[0])
            continue
        for name in together if options.apart else ():  # a long run may be interrupted before its table
            seconds = record.spread([answer["seconds"] for answer in turns.answers[name]])["median"]
            print(f"{name}: {config.batch_size * config.max_length / seconds:,.0f} tokens/s", flush=True)
            record.write(options.json, _result(options, config, shape, turns))
    if not turns.answers:
        raise InputError("no side fits in memory; lower --batch-size or --length")
    result = _result(options, config, shape, turns)
    print(_table(result))
    record.write(options.json, result)


@dataclass
class Turns:
    """The answers of the sides' processes, by side.

    Attributes:
        ready: the first answer, after the first steps.
        answers: the answers of all turns.
        rates: FLOPs a second of a large matrix product: measured in each turn or, with `--apart`, before them.
        skipped: sides that do not fit in memory.
    """

    ready: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[Any]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def take(self, sides: Sequence[str], words: Sequence[str], config: TrainConfig, repeats: int, apart: bool) -> None:
        """Let sides take turns. Raises InputError when one fails."""
        dtype = getattr(torch, config.dtype)
        alone = [roof.measure(config.device, dtype).flops] * repeats if apart else None
        if config.device == "cuda":
            torch.cuda.empty_cache()  # a side with `--apart` may need it
        with ExitStack() as stack:
            workers = {}
            for name in sides:
                workers[name] = stack.enter_context(process.Worker("peers", name, *words))
                ready = workers[name].ready
                print(f"{name}: ready; its first step took {ready['first_step_seconds']:.1f} s", flush=True)
            answers: dict[str, list[Any]] = {name: [] for name in sides}
            roofs, rates = None if alone else roof.meter(config.device, dtype), list(alone or ())
            for turn in range(repeats):
                if roofs is not None:
                    rates.append(roofs(roof.REPEATS_A_TURN).flops)
                for name in in_turn_order(sides, turn):
                    answers[name].append(workers[name].ask("steps"))
        self.ready |= {name: worker.ready for name, worker in workers.items()}
        self.answers |= answers
        self.rates |= dict.fromkeys(sides, rates)


# In a process of its own ----------------------------------------------------------------------------------------------


def _serve(name: str, shape: LlamaConfig, config: TrainConfig, steps: int) -> None:
    """Make a side's model and take two steps; then take `steps` of them for each line on standard input."""
    generator = torch.Generator(config.device).manual_seed(0)
    with torch.device(config.device):
        model = Llama(shape)
        model.init_weights(generator)
        ids = torch.randint(shape.vocab_size, (side.BATCHES, config.batch_size, config.max_length), generator=generator)
    how = {"compile": name.endswith("compiled"), "checkpoint_activations": name.endswith("checkpointed")}
    step = MAKERS[name.partition(",")[0]](model, ids, config.replace(**how))
    del model
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # two models existed for a short time
    start = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - start
    losses.append(step())  # some memory is allocated only in the second step
    side.serve({"first_step_seconds": first, "losses": losses}, step, config.device, steps)


def _minift_step(model: Llama, ids: torch.Tensor, config: TrainConfig) -> Callable[[], float]:
    batches = cycle(side.whole_rows(ids))
    state = start_state(model, None, config)  # type: ignore[arg-type]  # has no batches
    return lambda: train_step(state, [next(batches)], config.lr, config).loss


def _transformers_step(model: Llama, ids: torch.Tensor, config: TrainConfig) -> Callable[[], float]:
    theirs = to_transformers(model, use_cache=False)
    if config.checkpoint_activations:
        theirs.gradient_checkpointing_enable()
    forward = torch.compile(theirs) if config.compile else theirs
    return _step_of(theirs, lambda tokens: forward(tokens, labels=tokens).loss, ids, config)  # it shifts the labels


def _litgpt_step(model: Llama, ids: torch.Tensor, config: TrainConfig) -> Callable[[], float]:
    return _step_of(*others.litgpt(model, bool(config.compile)), ids, config)


def _torchtune_step(model: Llama, ids: torch.Tensor, config: TrainConfig) -> Callable[[], float]:
    return _step_of(*others.torchtune(model, bool(config.compile)), ids, config)


MAKERS = {
    "minift": _minift_step,
    "transformers": _transformers_step,
    "litgpt": _litgpt_step,
    "torchtune": _torchtune_step,
}


def _step_of(
    theirs: torch.nn.Module, loss_of: others.LossOf, ids: torch.Tensor, config: TrainConfig
) -> Callable[[], float]:
    """Return a step of full finetuning by the usual loop around a model and its mean loss."""
    theirs.train()
    optimizer = torch.optim.AdamW(
        theirs.parameters(), config.lr, (config.beta1, config.beta2), 1e-8, config.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(ids.device.type, enabled=config.dtype == "float16")
    dtype, batches = getattr(torch, config.dtype), cycle(ids)

    def step() -> float:
        tokens = next(batches)
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(tokens)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def to_transformers(model: Llama, use_cache: bool = True) -> Any:
    """Return a `LlamaForCausalLM` with the weights of a model, on its device, with SDPA."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    values = {**model.config.to_dict(), "use_cache": use_cache, "attn_implementation": "sdpa"}
    with torch.device(model.device):
        theirs = LlamaForCausalLM(TheirConfig(**values))
    weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=not model.config.tie_word_embeddings)  # a tied head has no entry here
    return theirs


UNASKED = ("minift, compiled", "minift", "transformers, compiled", "transformers")
OTHERS = ("litgpt, compiled", "litgpt", "torchtune, compiled", "torchtune")
SIDES = (*UNASKED, "transformers, checkpointed", *OTHERS)


# The result -----------------------------------------------------------------------------------------------------------


def _result(options: argparse.Namespace, config: TrainConfig, shape: LlamaConfig, turns: Turns) -> dict[str, Any]:
    tokens, flops = config.batch_size * config.max_length, training_flops_per_token(shape, config.max_length)
    seconds = {name: [answer["seconds"] for answer in given] for name, given in turns.answers.items()}
    at_roof = {name: [rate / flops for rate in rates] for name, rates in turns.rates.items()}  # tokens/s in each turn
    losses = {
        name: turns.ready[name]["losses"] + [loss for answer in given for loss in answer["losses"]]
        for name, given in turns.answers.items()
    }
    speeds = {name: record.spread([tokens / s for s in times]) for name, times in seconds.items()}
    peak = data_sheet_flops(torch.device(config.device), config.dtype)
    rates = [rate for of_side in turns.rates.values() for rate in of_side]
    return {
        "benchmark": "peers",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": config.dtype,
        "device": config.device,
        "batch_size": config.batch_size,
        "length": config.max_length,
        "loss_chunk": config.loss_chunk,
        "lr": config.lr,
        "apart": options.apart,
        "skipped": turns.skipped,
        "roof_flops": record.spread(rates),
        "roof_tokens_per_second": record.spread([rate / flops for rate in rates]),
        "tokens_per_second": speeds,
        "share_of_roof": {
            name: record.spread([tokens / s / most for s, most in zip(times, at_roof[name], strict=True)])
            for name, times in seconds.items()
        },
        "mfu_of_data_sheet": {name: speed["median"] * flops / peak for name, speed in speeds.items()} if peak else None,
        "mfu_factor_if_attention_were_whole": training_flops_per_token(shape, 2 * config.max_length - 1) / flops,
        "times_as_fast_as": {
            name: {other: paired_ratio(seconds[other], times) for other in seconds} for name, times in seconds.items()
        },
        "first_step_seconds": {name: answer["first_step_seconds"] for name, answer in turns.ready.items()},
        "peak_bytes": {name: given[-1]["peak_bytes"] for name, given in turns.answers.items()},
        "losses": {name: [round(loss, 4) for loss in values] for name, values in losses.items()},
        "losses_apart_at_most": side.losses_apart(losses),
        "rows": [
            *(record.row(f"{name}/step", given, per="step") for name, given in turns.answers.items()),
            record.row("machine/product", [1e12 / rate for rate in next(iter(turns.rates.values()))], per="TFLOP"),
        ],
    }


def _table(result: dict[str, Any]) -> str:
    speeds, peaks = result["tokens_per_second"], result["peak_bytes"]
    short = {name: name.replace("transformers", "HF").replace(", c", " c")[:9].rstrip() for name in speeds}
    mfu = result["mfu_of_data_sheet"]
    allowed = "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**result["roof_tokens_per_second"])
    lines = [
        f"{result['batch_size']} x {result['length']} tokens, {result['dtype']} on {result['device']}; "
        f"matrix products allow {allowed} tokens/s",
        f"{'':<24}{'tokens/s':>24}{'of the roof':>13}{'MFU' if mfu else '':>7}{'peak':>11}"
        + "".join(f"{'x ' + s:>14}" for s in short.values()),
    ]
    for name, speed in speeds.items():
        cell = "{:,.0f} ({:,.0f}-{:,.0f})".format(*(speed[key] for key in ("median", "min", "max")))
        ratios = "".join(f"{ratio:>14.2f}" for ratio in result["times_as_fast_as"][name].values())
        share, peak = result["share_of_roof"][name]["median"], peaks[name] / 1e6
        promised = f"{mfu[name]:.3f}" if mfu else ""
        lines.append(f"{name:<24}{cell:>24}{share:>13.2f}{promised:>7}{peak:>8,.0f} MB{ratios}")
    if mfu:
        factor = result["mfu_factor_if_attention_were_whole"]
        lines.append(
            f"MFU: of the data sheet's peak; where attention is counted without causality, {factor:.3f} x that"
        )
    steps = len(next(iter(result["losses"].values())))
    lines.append(f"losses at most {result['losses_apart_at_most']:.2%} apart at any of {steps} steps")
    return "\n".join(lines)
