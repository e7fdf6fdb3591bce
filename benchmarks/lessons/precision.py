"""Show where low precision is enough and where it is not: float32, bfloat16 and float16 in a training step.

A number is a sign, an exponent and a fraction. float32 has 23 bits of fraction, float16 10, bfloat16 only 7: it
distinguishes 1 from 1.008, but not from 1.003. bfloat16 has float32's exponent, and so its range; float16's largest
value is 65,504, and values below 3e-8 become 0. Four experiments:

* *autocast*: the dtype of each part of a step, measured on the model's own modules;
* *positions*: the error of RoPE's angles when positions are rounded;
* *updates*: the share of AdamW's updates that is lost when the weights have low precision, and its effect on the loss:
  the reason why master weights stay float32;
* *the scaler*: the share of a gradient's values that become 0 or infinite in float16, and how `GradScaler` finds a
  scale.

    python -m benchmarks lesson precision

Source of mixed precision: Micikevicius et al. (arXiv 1710.03740).
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.lessons.chart import Chart, Point
from minift.checkpoint import load_model
from minift.config import FINETUNE, LlamaConfig, TrainConfig
from minift.data.batches import PairBatches
from minift.data.conversations import read_all_conversations
from minift.data.examples import encode_conversations
from minift.data.templates import template_named
from minift.model import DecoderLayer, Llama, rope_tables
from minift.pack import Batch
from minift.runs.start import start_state
from minift.storage.names import bundled, model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.train import Objective, train_step
from minift.values import check_number

DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = (256, 257, 1_001, 5_001, 30_001)
SCALES = (1.0, 2.0**8, 2.0**16, 2.0**24)
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
FIRST_SCALE, GROWTH_INTERVAL = 2.0**28, 6  # of the trace: both the decrease and the growth are seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), metavar="X", help="learning rates")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of finetuning (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pairs (%(default)s)")
    parser.add_argument("--scaler-steps", type=int, default=30, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Do the four experiments."""
    for name in ("steps", "batch_size", "scaler_steps"):
        check_number(name, getattr(options, name), least=1)
    for rate in options.rates:
        check_number("rates", rate, above=0)
    tokenizer = load_tokenizer(model_path("bundled"))
    batches = PairBatches(_examples(tokenizer), options.batch_size, tokenizer.eos_id, options.seed)
    windows = list(islice(batches, options.steps))
    return {
        "seed": options.seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "autocast": {dtype: dtypes_of_parts(dtype) for dtype in DTYPES},
        "positions": [_position(position) for position in POSITIONS],
        "updates": [{"lr": rate, **lost_updates(windows[0], rate)} for rate in options.rates],
        "finetuning": {dtype: _finetune(windows, dtype, FINETUNE.lr) for dtype in ("float32", "bfloat16")},
        "underflow": [{"scale": scale, **_underflow(windows[0], scale)} for scale in SCALES],
        "scaler": scaler_trace(options.scaler_steps, options.seed),
    }


def table(result: dict[str, Any]) -> str:
    """Return four small tables."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    parts = list(result["autocast"]["float32"])
    lines = ["1  what computes in which dtype, by the dtype of autocast"]
    for dtype in DTYPES[1:]:
        kept = [part for part in parts if result["autocast"][dtype][part] == "float32"]
        low = [part for part in parts if result["autocast"][dtype][part] == dtype]
        lines += [f"   {short[dtype]}: {', '.join(low)}", f"   {'':>{len(short[dtype])}}  fp32: {', '.join(kept)}"]
    lines += [
        "",
        f"2  {'position':<20}{'in bf16 it is':>14}{'angle wrong by':>16}{'in fp32 by':>12}   (radians, fastest pair)",
    ]
    for at in result["positions"]:
        lines.append(
            f"   {at['position']:<20,}{at['bfloat16']:>14,.0f}{at['bfloat16_error']:>16.3g}{at['float32_error']:>12.1e}"
        )
    lines += ["", "3  " + f"{'learning rate':<20}" + "".join(f"{f'lost in {short[d]}':>16}" for d in DTYPES)]
    for row in result["updates"]:
        lines.append(f"   {row['lr']:<20g}" + "".join(f"{row[dtype]:>16.1%}" for dtype in DTYPES))
    ends = ", ".join(f"{short[d]} {found['loss']:.4f}" for d, found in result["finetuning"].items())
    lines.append(f"   loss after {result['steps']} steps at {FINETUNE.lr:g}, by the dtype of the weights: {ends}")
    lines += ["", f"4  {'scale of the loss':<20}{'become 0 in fp16':>18}{'become infinite':>18}"]
    for row in result["underflow"]:
        lines.append(f"   {row['scale']:<20,.0f}{row['zero']:>18.1%}{row['infinite']:>18.1%}")
    trace = " ".join(f"2^{s['scale_log2']:.0f}{'' if s['stepped'] else ' (skipped)'}" for s in _runs(result["scaler"]))
    return "\n".join([*lines, f"   GradScaler: {trace}"])


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of the share of lost updates, by learning rate."""
    series = {dtype: [Point(row["lr"], row[dtype]) for row in result["updates"]] for dtype in DTYPES}
    return Chart(
        "Updates that change nothing", "learning rate", "share of the weights left as they were", series, log_x=True
    )


def conclusion(result: dict[str, Any]) -> str:
    """State what the numbers of each experiment show."""
    low = [part for part, dtype in result["autocast"]["bfloat16"].items() if dtype == "bfloat16"]
    kept = len(result["autocast"]["bfloat16"]) - len(low)
    first = f"Under bfloat16 {len(low)} of {len(low) + kept} parts compute in it, the products; the rest stays float32."
    worst = max(result["positions"], key=lambda at: at["bfloat16_error"])
    second = f"Position {worst['position']:,} would be read as {worst['bfloat16']:,.0f}: RoPE's angles need float32."
    row = min(result["updates"], key=lambda row: abs(row["lr"] - FINETUNE.lr))
    losses = {dtype: found["loss"] for dtype, found in result["finetuning"].items()}
    third = f"At a learning rate of {row['lr']:g} bfloat16 weights would lose {row['bfloat16']:.0%} of their updates"
    if losses["bfloat16"] > losses["float32"]:
        third += f", and finetuning ends at a loss of {losses['bfloat16']:.3f} in place of {losses['float32']:.3f}."
    else:
        third += f"; the loss is {losses['bfloat16']:.3f} all the same, {losses['float32']:.3f} in float32."
    zero, scaled = result["underflow"][0], result["underflow"][2]
    skipped = sum(not step["stepped"] for step in result["scaler"])
    fourth = (
        f"float16 takes {zero['zero']:.0%} of this gradient's values for 0, and {scaled['zero']:.1%} after a scale of "
        f"{scaled['scale']:,.0f}; from a scale that is too large the scaler came down, skipping {skipped} steps in all."
    )
    return " ".join((first, second, third, fourth))


# 1 --------------------------------------------------------------------------------------------------------------------


def dtypes_of_parts(dtype: str) -> dict[str, str]:
    """Return the dtype of each part's output in a small model, forward and backward, under autocast of `dtype`."""
    model = _small_model(0)
    found: dict[str, torch.dtype] = {}
    layer = cast(DecoderLayer, model.layers[0])
    watched: dict[str, nn.Module] = {
        "embedding": model.embed_tokens,
        "norm": layer.input_layernorm,
        "query": layer.self_attn.q_proj,
        "key": layer.self_attn.k_proj,
        "value": layer.self_attn.v_proj,
        "attention": layer.self_attn,
        "gate": layer.mlp.gate_proj,
        "up": layer.mlp.up_proj,
        "feed-forward": layer.mlp,
        "stream": layer,
        "last norm": model.norm,
    }
    hooks = [module.register_forward_hook(_note(found, name)) for name, module in watched.items()]
    batch = next(_patterns(0))
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        nll_sum = Objective(model, 512)(batch)
    nll_sum.backward()
    for hook in hooks:
        hook.remove()
    weight = layer.mlp.gate_proj.weight
    assert weight.grad is not None
    found |= {"loss": nll_sum.dtype, "weights": weight.dtype, "gradients": weight.grad.dtype}
    return {name: str(kind).removeprefix("torch.") for name, kind in found.items()}


def _note(found: dict[str, torch.dtype], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[name] = output.dtype

    return hook


# 2 --------------------------------------------------------------------------------------------------------------------


def _position(position: int) -> dict[str, Any]:
    """Return the error of the angle of RoPE's fastest pair of channels, which rotates by one radian a position."""
    rounded = float(torch.tensor(position, dtype=torch.bfloat16))
    cos, sin = rope_tables(torch.tensor([[position]]), 32, 10_000.0)
    angle = torch.atan2(sin.double(), cos.double())[0, 0, 0, 0]  # the angle in minift's own tables
    turn = 2 * torch.pi
    error = float((angle - position + turn / 2) % turn - turn / 2)
    return {
        "position": position,
        "bfloat16": rounded,
        "bfloat16_error": abs(rounded - position),
        "float32_error": abs(error),
    }


# 3 --------------------------------------------------------------------------------------------------------------------


def lost_updates(window: Batch, lr: float) -> dict[str, float]:
    """Return the share of the base's weights that AdamW's first update does not change, by the weights' dtype."""
    model = load_model(model_path("bundled"), dtype=torch.float64)  # loses no update
    before = _flat(model).float()
    config = FINETUNE.replace(dtype="float32", device="cpu", compile=False)
    train_step(start_state(model, _no_batches(), config), [window], lr, config)
    update = _flat(model) - before.double()
    touched = update != 0
    shares = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        weights = before.to(dtype)
        moved = (weights.double() + update).to(dtype)
        shares[name] = float((moved == weights)[touched].double().mean())
    return shares


def _finetune(windows: Sequence[Batch], dtype: str, lr: float) -> dict[str, float]:
    """Finetune the bundled base with weights rounded to `dtype` after each step. Return the mean of the last losses."""
    model = load_model(model_path("bundled"))
    config = FINETUNE.replace(dtype="float32", device="cpu", compile=False)
    state = start_state(model, _no_batches(), config)
    losses = []
    for window in windows:
        losses.append(train_step(state, [window], lr, config).loss)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    return {"loss": statistics.mean(losses[-max(1, len(losses) // 10) :])}


# 4 --------------------------------------------------------------------------------------------------------------------


def _underflow(window: Batch, scale: float) -> dict[str, float]:
    """Return the share of the bundled base's gradient that becomes 0 in float16, and the share that is too large."""
    model = load_model(model_path("bundled"))
    nll_sum = Objective(model, 512)(window)
    (nll_sum / window.n_targets * scale).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    gradient = gradient[gradient != 0]
    rounded = gradient.half()
    return {"zero": float((rounded == 0).double().mean()), "infinite": float(rounded.isinf().double().mean())}


def scaler_trace(steps: int, seed: int) -> list[dict[str, Any]]:
    """Train a small model in float16 (slow on a CPU). Return each step's scale, and whether the step was taken."""
    model = _small_model(seed)
    config = TrainConfig(dtype="float16", lr=1e-3, clip=1.0, compile=False)
    state = start_state(model, _no_batches(), config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL)
    trace = []
    for window in islice(_patterns(seed), steps):
        scale = state.scaler.get_scale()
        result = train_step(state, [window], config.lr, config)
        trace.append({"scale_log2": float(torch.tensor(scale).log2()), "stepped": result.stepped, "loss": result.loss})
    return trace


def _runs(trace: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trace without the steps that repeat the one before."""
    return [
        step
        for i, step in enumerate(trace)
        if i == 0 or (step["scale_log2"], step["stepped"]) != (trace[i - 1]["scale_log2"], trace[i - 1]["stepped"])
    ]


# What they share ------------------------------------------------------------------------------------------------------


def _examples(tokenizer: Tokenizer) -> Any:
    return encode_conversations(
        read_all_conversations([bundled("pairs.jsonl")]), template_named("plain"), tokenizer, 256
    )[0]


def _small_model(seed: int) -> Llama:
    shape = LlamaConfig(64, 32, 64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def _patterns(seed: int) -> Iterator[Batch]:
    """Yield batches of rows in which every token is determined by the one before."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(3, 64, (4, 1), generator=generator)
        ids = 3 + (starts + 5 * torch.arange(17)) % 61
        places = torch.arange(16).expand(4, 16)
        yield Batch(ids[:, :-1], ids[:, 1:], places, torch.zeros_like(places), isolated=False, n_targets=64)


def _no_batches() -> PairBatches:
    """Return an empty source of batches: each step is given its batch directly."""
    return PairBatches([], 1, 0, 0)


def _flat(model: Llama) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
