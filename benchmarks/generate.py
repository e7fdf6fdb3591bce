"""Compare text generation with `transformers`: the speed of prefill and of decoding, each as a share of its roof.

All sides take turns with the same random weights and the same prompt, greedily, with a cache of keys and values.
Reading the prompt (prefill) is limited by arithmetic: its roof is that of matrix products. Every token after the first
(decode) has to read all weights and the whole cache once, and computes little with them: its roof is bandwidth.

* *minift*: `minift.generate.stream`, as `minift generate` calls it;
* *minift, plain*: the same without its decoders (`minift/kernels/decode.py`, `minift/kernels/graph.py`), as with
  `--plain`;
* *transformers*: `LlamaForCausalLM.generate`, with SDPA and its dynamic cache, as its users call it;
* *transformers, bare loop*: the fewest of its parts that generate: forward pass, cache and argmax;
* *transformers, compiled*: that loop with its static cache and `torch.compile`; on a CPU only when it is named in
  `--sides`, because compiling takes longer there than the rest of the measurement.

In float32 all sides must choose the same ids, or the comparison is not valid. In bfloat16 roundings differ, and texts
may diverge where two ids are about equally likely.

    python -m benchmarks generate
    python -m benchmarks generate --config smollm2-135m --prompt-length 512 --new-tokens 64
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks import arguments, energy, record, roof
from benchmarks.peers import to_transformers
from benchmarks.timing import paired_ratio, wait_for
from minift.config import LlamaConfig, TrainConfig
from minift.costs.flops import BYTES, count_parameters, forward_flops_per_token
from minift.errors import InputError
from minift.generate import stream
from minift.model import Llama
from minift.runs.machine import choose_device, choose_dtype
from minift.values import check_number, size

CONFIGS = ("smollm2-135m", "stories15m")
SIDES = ("minift", "minift, plain", "transformers", "transformers, bare loop", "transformers, compiled")
Text: TypeAlias = tuple[list[int], list[float]]  # the ids, and the time at which each of them came
Timed: TypeAlias = tuple[float, float, float]  # the seconds of prefill and of decode, and the time of day
Speak: TypeAlias = Callable[[list[int], int], Text]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    names = ", ".join(CONFIGS)
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="NAME|FILE", help=f"the shapes ({names})")
    parser.add_argument("--prompt-length", type=int, default=128, metavar="N", help="tokens read (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens generated (%(default)s)")
    arguments.add_machine(parser)
    arguments.add_repeats(parser, 7, "texts of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="NAME", help="only these: " + "; ".join(SIDES))


def run(options: argparse.Namespace) -> None:
    """Measure each shape, print its table and write the JSON."""
    arguments.check_counts(options, "repeats", "prompt_length")
    check_number("--new-tokens", options.new_tokens, least=2)
    asked = TrainConfig(dtype=options.dtype, device=options.device)
    device = choose_device(asked)
    dtype = choose_dtype(asked, device)
    shapes = [(name, LlamaConfig.named(name)) for name in options.config]
    for name, config in shapes:
        if options.prompt_length + options.new_tokens > config.max_position_embeddings:
            raise InputError(f"{name} has {config.max_position_embeddings} positions, fewer than the tokens asked for")
    sides, skipped = _sides(options.sides, device)
    for side, reason in skipped.items():
        print(f"{side}: skipped, {reason}")
    roofs = roof.meter(device.type, getattr(torch, dtype))
    result = {
        "benchmark": "generate",
        **record.environment(),
        "dtype": dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "prompt_length": options.prompt_length,
        "new_tokens": options.new_tokens,
        "skipped": skipped,
        "models": {},
        "rows": [],
    }
    turns: list[roof.Roof] = []
    for name, config in shapes:
        texts, seconds, measured, joules = _measure(config, sides, device, dtype, roofs, options)
        label = name if not name.endswith(".json") else "a config.json"
        result["models"][label] = _summary(config, dtype, options, measured, texts, seconds)
        result["rows"] += _sample_rows(label, options, seconds)
        turns += measured
        if joules:
            result["models"][label]["joules_per_new_token"] = joules
        print(_table(label, result))
    result["rows"] += record.control(turns)
    record.write(options.json, result)


def _sides(named: Sequence[str] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Return the sides to measure, and the others with the reason why they are skipped."""
    skipped = {}
    if importlib.util.find_spec("transformers") is None:
        skipped = {side: "transformers is not installed" for side in SIDES if side.startswith("transformers")}
    elif device.type == "cpu" and not named:
        skipped = {"transformers, compiled": "compiling takes minutes on a CPU; ask for it by --sides"}
    return [side for side in SIDES if side in (named or SIDES) and side not in skipped], skipped


# Measuring ------------------------------------------------------------------------------------------------------------


def _measure(
    config: LlamaConfig,
    sides: Sequence[str],
    device: torch.device,
    dtype: str,
    roofs: Callable[[int], roof.Roof],
    options: argparse.Namespace,
) -> tuple[dict[str, list[int]], dict[str, list[Timed]], list[roof.Roof], dict[str, float]]:
    """Return each side's text, the seconds of prefill and decode of each of its runs, and the roofs of each turn.

    Where the machine tells it, the last are the joules of a new token, of which reading the prompt is a part.
    """
    prompt_length, new_tokens = options.prompt_length, options.new_tokens
    generator = torch.Generator(device).manual_seed(0)
    with device:
        model = Llama(config)
        model.init_weights(generator)
    with torch.no_grad():  # the logit of each EOS is 0, never the largest: no text ends early
        model.head_weight[list(config.eos_token_ids)] = 0
    prompt = torch.randint(config.vocab_size, (prompt_length,), generator=generator, device=device).tolist()
    theirs = None
    if any(side.startswith("transformers") for side in sides):
        theirs = to_transformers(model).eval()
    exact = {side: _speaker(side, model, theirs)(prompt, new_tokens)[0] for side in sides if "compiled" not in side}
    if len({tuple(ids) for ids in exact.values()}) > 1:
        raise InputError(f"in float32 the sides choose different ids: {exact}")
    model.to(getattr(torch, dtype))
    if theirs is not None:
        theirs.to(getattr(torch, dtype))
    speak = {side: _speaker(side, model, theirs) for side in sides}
    texts = {side: speak[side](prompt, new_tokens)[0] for side in sides}  # warms up, too
    seconds: dict[str, list[Timed]] = {side: [] for side in sides}
    measured = []
    for turn in range(options.repeats):
        measured.append(roofs(roof.REPEATS_A_TURN))
        for side in sides if turn % 2 == 0 else reversed(sides):
            wait_for(device.type)
            at, start = time.time(), time.perf_counter()
            ids, times = speak[side](prompt, new_tokens)
            assert len(ids) == len(times) == new_tokens
            seconds[side].append((times[0] - start, times[-1] - times[0], at))
    meter = energy.find(device.type)
    used = {side: energy.joules_a_call(partial(speak[side], prompt, new_tokens), meter) for side in sides}
    joules = {side: one.joules / new_tokens for side, one in used.items() if one.joules is not None}
    return texts, seconds, measured, joules


def _speaker(side: str, model: Llama, theirs: Any) -> Speak:
    if side.startswith("minift"):
        return lambda prompt, n: _stamp(stream(model, prompt, n, plain=side == "minift, plain"))
    if side == "transformers":
        return lambda prompt, n: _generate(theirs, prompt, n)
    if side == "transformers, compiled":
        forward = torch.compile(theirs.forward)
        return lambda prompt, n: _stamp(_bare_loop(theirs, prompt, n, forward))
    return lambda prompt, n: _stamp(_bare_loop(theirs, prompt, n))


def _stamp(ids: Any) -> Text:
    """Return the ids and the time at which each came. Each is a Python number, so its work on the GPU is finished."""
    text, times = [], []
    for id in ids:
        text.append(id)
        times.append(time.perf_counter())
    return text, times


def _generate(theirs: Any, prompt: list[int], n: int) -> Text:
    """Call their `generate` with a streamer that records the time of each token; the streamer gets the prompt first."""
    times: list[float] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt], device=theirs.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, streamer=Streamer()
        )
    return text[0, len(prompt) :].tolist(), times[1:]


@torch.inference_mode()
def _bare_loop(theirs: Any, prompt: list[int], n: int, compiled: Any = None) -> Any:
    """Yield greedy ids by the parts of `generate` that greedy search needs, and nothing else."""
    from transformers import DynamicCache, StaticCache

    config = theirs.config
    cache = StaticCache(config=config, max_cache_len=len(prompt) + n) if compiled else DynamicCache(config=config)
    ids = torch.tensor([prompt], device=theirs.device)
    for i in range(n):
        forward = compiled if compiled and i > 0 else theirs
        # The cache is passed by position, after masks and positions: its name changes in version 5.24.
        logits = forward(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        yield int(ids)


# The result -----------------------------------------------------------------------------------------------------------


def prefill_flops(config: LlamaConfig, prompt_length: int) -> float:
    """Return the FLOPs of reading a prompt: every layer at every position, the head at the last one only."""
    head = 2 * config.vocab_size * config.hidden_size
    return prompt_length * (forward_flops_per_token(config, prompt_length) - head) + head


def decode_bytes(config: LlamaConfig, dtype: str, seen: float) -> float:
    """Return the bytes that one token reads: every weight, one row of the embedding, and the cache of `seen` tokens."""
    weights = count_parameters(config).without_embedding + (config.vocab_size + 1) * config.hidden_size
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * seen
    return BYTES[dtype] * (weights + cache)


def _summary(
    config: LlamaConfig,
    dtype: str,
    options: argparse.Namespace,
    measured: Sequence[roof.Roof],
    texts: dict[str, list[int]],
    seconds: dict[str, list[Timed]],
) -> dict[str, Any]:
    steps = options.new_tokens - 1
    flops = prefill_flops(config, options.prompt_length)
    nbytes = decode_bytes(config, dtype, options.prompt_length + (steps + 1) / 2)  # for an average token
    prefill = {side: [times[0] for times in pairs] for side, pairs in seconds.items()}
    decode = {side: [times[1] / steps for times in pairs] for side, pairs in seconds.items()}
    sides = {}
    for side in seconds:
        sides[side] = {
            "prefill_tokens_per_second": record.spread([options.prompt_length / s for s in prefill[side]]),
            "prefill_share_of_product_roof": _share(flops, prefill[side], [of_turn.flops for of_turn in measured]),
            "decode_tokens_per_second": record.spread([1 / s for s in decode[side]]),
            "decode_bytes_per_second": record.spread([nbytes / s for s in decode[side]]),
            "decode_share_of_matvec_roof": _share(
                nbytes, decode[side], [of_turn.matvec_bandwidth for of_turn in measured]
            ),
            "decode_share_of_copy_roof": _share(nbytes, decode[side], [of_turn.bandwidth for of_turn in measured]),
            "ids_as_minift": sum(a == b for a, b in zip(texts[side], texts.get("minift", ()), strict=False)),
        }
    return {
        "prefill_flops": flops,
        "decode_bytes_per_token": nbytes,
        "roof": {
            "flops": record.spread([of_turn.flops for of_turn in measured]),
            "bandwidth": record.spread([of_turn.bandwidth for of_turn in measured]),
            "matvec_bandwidth": record.spread([of_turn.matvec_bandwidth for of_turn in measured]),
        },
        "same_ids_in_float32": True,
        "sides": sides,
        "minift_times_as_fast_as": {
            side: {
                "prefill": paired_ratio(prefill[side], prefill["minift"]),
                "decode": paired_ratio(decode[side], decode["minift"]),
            }
            for side in seconds
            if "minift" in seconds
        },
    }


def _sample_rows(label: str, options: argparse.Namespace, seconds: dict[str, list[Timed]]) -> list[dict[str, Any]]:
    """Return the rows of a shape's record: prefill and decode of each side."""
    rows = []
    for side, runs in seconds.items():
        prefill = [{"at": at, "seconds": first} for first, _, at in runs]
        decode = [{"at": at, "seconds": rest / (options.new_tokens - 1)} for _, rest, at in runs]
        rows.append(record.row(f"{label}/{side}/prefill", prefill, per="prompt"))
        rows.append(record.row(f"{label}/{side}/decode", decode, per="token"))
    return rows


def _share(work: float, seconds: Sequence[float], roofs: Sequence[float]) -> dict[str, float]:
    """Return the share of its turn's roof that each run reached, in operations or bytes a second."""
    return record.spread([work / s / most for s, most in zip(seconds, roofs, strict=True)])


def _table(name: str, result: dict[str, Any]) -> str:
    model = result["models"][name]
    measured = {key: spread["median"] for key, spread in model["roof"].items()}
    lines = [
        f"{name}, {result['dtype']} on {result['device']}: {result['prompt_length']} tokens read, "
        f"{result['new_tokens']} generated; one of them reads {size(model['decode_bytes_per_token'])}",
        f"roofs: products {measured['flops'] / 1e9:,.0f} GFLOP/s, matrix-vector products "
        f"{measured['matvec_bandwidth'] / 1e9:,.1f} GB/s, copies {measured['bandwidth'] / 1e9:,.1f} GB/s",
        f"{'':<26}{'prefill tokens/s':>26}{'of roof':>9}{'decode tokens/s':>26}{'GB/s':>8}{'of roof':>9}"
        f"{'minift is x':>16}",
    ]
    for side, numbers in model["sides"].items():
        speeds = [
            "{median:,.1f} ({min:,.1f}-{max:,.1f})".format(**numbers[key])
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second")
        ]
        share, gigabytes = (
            numbers["prefill_share_of_product_roof"]["median"],
            numbers["decode_bytes_per_second"]["median"],
        )
        ratios = model["minift_times_as_fast_as"].get(side, {})
        cell = "{prefill:.2f} / {decode:.2f}".format(**ratios) if ratios and side != "minift" else ""
        lines.append(
            f"{side:<26}{speeds[0]:>26}{share:>9.2f}{speeds[1]:>26}{gigabytes / 1e9:>8.1f}"
            f"{numbers['decode_share_of_matvec_roof']['median']:>9.2f}{cell:>16}"
        )
    if "joules_per_new_token" in model:
        of = ", ".join(f"{side} {joules:,.3g}" for side, joules in model["joules_per_new_token"].items())
        lines.append(f"joules a new token, its share of the prompt included: {of}")
    return "\n".join(lines)
