"""Compare all attention kernels: on rows of one document, and on rows of several documents isolated by a mask.

All kernels take turns on the same queries, keys and values, in the layout that the projections give. The forward pass
is timed alone, and together with the backward pass. Which kernels are available depends on the machine, the dtype and
the heads; one that refuses is skipped, with its reason. The result and the gradients of each kernel must agree with the
formula, or the benchmark fails.

* *used*: what training installs (`minift/kernels/`), with the mask that training passes; eager, and compiled;
* *SDPA*: PyTorch's `scaled_dot_product_attention` with its own choice of kernel, and with each of its kernels, of which
  *math* is matrix products and a softmax; for several documents with a mask of all pairs;
* *FlexAttention*: compiled for the mask; it skips the mask's empty blocks;
* *varlen*: all documents of a batch concatenated into one row, without padding.

    python -m benchmarks attention                                        # smollm2-135m's heads
    python -m benchmarks attention --config llama2-7b --batch-size 2 --length 4096 --device cuda

FLOPs are counted for the pairs of tokens that the mask allows (`minift/costs/flops.py`). Legend: B rows, T tokens of
a row, H query heads, K key/value heads, C head width.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import agreement, arguments, record, roof, textbook, timers
from benchmarks.timing import in_turns, paired_ratio
from minift.config import LlamaConfig
from minift.errors import InputError
from minift.kernels.attention import FastScaledDotProduct
from minift.kernels.flex import FlexPrepare, FlexScaledDotProduct, block_mask
from minift.model import Prepare

KERNELS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
AGREE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # the largest relative error of a result
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser, "smollm2-135m", batch_size=4, length=1_024)
    parser.add_argument("--document", type=int, default=256, metavar="N", help="tokens of a document (%(default)s)")
    arguments.add_machine(parser)
    arguments.add_repeats(parser, 5)


def run(options: argparse.Namespace) -> None:
    """Measure, print two tables and write the JSON."""
    arguments.check_counts(options, "document", "repeats")
    config, shape = arguments.train_config(options), LlamaConfig.named(options.config)
    device, dtype = torch.device(config.device), config.dtype
    result = {
        "benchmark": "attention",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "heads": [shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim],
        "dtype": dtype,
        "device": device.type,
        "batch_size": options.batch_size,
        "length": options.length,
        "roof_flops": roof.measure(device.type, getattr(torch, dtype)).flops,
        "cases": {},
        "rows": [],
    }
    inputs = make_inputs(shape, options.batch_size, options.length, getattr(torch, dtype), device)
    cases = {"one document a row": options.length}
    if options.document < options.length:
        cases["several documents a row"] = options.document
    for name, document in cases.items():
        documents = (torch.arange(options.length, device=device) // document).expand(options.batch_size, -1)
        case = measure(inputs, documents, document, dtype, options.repeats)
        result["rows"] += [record.row(f"{name}/{side}", samples) for side, samples in case.pop("samples").items()]
        result["cases"][name] = {"document": document, **case}
        print(_table(name, result), flush=True)
    record.write(options.json, result)


def make_inputs(
    shape: LlamaConfig, batch_size: int, length: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return random query, key and value, [B, heads, T, C] in a layer's layout, and a gradient of the result."""
    generator = torch.Generator(device).manual_seed(0)
    B, T, C = batch_size, length, shape.head_dim
    H, K = shape.num_attention_heads, shape.num_key_value_heads

    def random(heads: int) -> Tensor:
        return torch.randn(B, T, heads, C, generator=generator, device=device).to(dtype).transpose(1, 2)

    query, key, value = (random(heads).requires_grad_() for heads in (H, K, K))
    return [query, key, value, random(H)]


def visible_flops(shape: tuple[int, ...], document: int) -> float:
    """Return the FLOPs of the forward pass: 4·C for each pair of a query and a visible key, in each head.

    Args:
        shape: of the queries, (B, H, T, C).
        document: tokens of each document but the last one of a row, which may be shorter.
    """
    B, H, T, C = shape
    lengths = [document] * (T // document) + [T % document]
    return B * H * 4 * C * sum(length * (length + 1) / 2 for length in lengths)


def kernels(documents: Tensor, document: int, heads: tuple[int, int, int]) -> dict[str, Kernel]:
    """Return the attention kernels by name. Only a call shows whether the machine supports one.

    Args:
        documents: int64 [B, T], the document of each token.
        document: tokens of each document.
        heads: H, K and C.
    """
    (_, T), device = documents.shape, documents.device.type
    shared, whole = heads[0] > heads[1], document == T
    H, K, C = heads
    config = LlamaConfig(hidden_size=H * C, num_attention_heads=H, num_key_value_heads=K, head_dim=C)
    ids = None if whole else documents
    mask = Prepare(config).mask(documents, 0, ids, None)
    blocks = block_mask(documents)
    on_gpu = device == "cuda"
    trained = FlexScaledDotProduct() if on_gpu else FastScaledDotProduct()
    mask_of_trained = (FlexPrepare if on_gpu else Prepare)(config).mask(documents, 0, ids, None)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
        )

    def by(backend: SDPBackend) -> Kernel:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(query, key, value)

        return call

    def used(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed: Tensor = trained(query, key, value, mask_of_trained)
        return mixed

    flex = torch.compile(flex_attention, dynamic=False)
    return {
        "used": used,
        "used, compiled": torch.compile(used, dynamic=False),
        "SDPA": sdpa,
        **{name: by(backend) for name, backend in KERNELS.items()},
        "FlexAttention": lambda query, key, value: flex(query, key, value, block_mask=blocks, enable_gqa=shared),
        "varlen": lambda query, key, value: _varlen(query, key, value, document),
    }


def _varlen(query: Tensor, key: Tensor, value: Tensor, document: int) -> Tensor:
    """Attend with all documents in one row and their start offsets; keys are repeated for the query heads."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, C = query.shape
    starts = [row + start for row in range(0, B * T, T) for start in range(0, T, document)]
    places = torch.tensor([*starts, B * T], dtype=torch.int32, device=query.device)
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    query, key, value = (x.transpose(1, 2).reshape(B * T, H, C) for x in (query, key, value))
    mixed = varlen_attn(query, key, value, places, places, document, document, window_size=(-1, 0))
    assert isinstance(mixed, Tensor)
    return mixed.view(B, T, H, C).transpose(1, 2)


def measure(inputs: Sequence[Tensor], documents: Tensor, document: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Return the seconds of every available kernel and why others are skipped; raise InputError when one is wrong."""
    *tensors, grad = inputs
    query, key, _ = tensors
    heads = (query.shape[1], key.shape[1], query.shape[3])
    right = _formula(inputs, document)
    skipped, sides, working = {}, {}, []

    def both(kernel: Kernel) -> tuple[Tensor, ...]:
        mixed = kernel(*tensors)
        return mixed, *torch.autograd.grad(mixed, tensors, grad)

    for name, kernel in kernels(documents, document, heads).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns at length why a kernel is unavailable
                found = both(kernel)
        except agreement.REFUSALS as refusal:
            skipped[name] = agreement.reason(refusal)
            continue
        for part, one, other in zip(("result", "gradient of q", "of k", "of v"), found, right, strict=True):
            off = agreement.off(one, other)
            if not off <= AGREE[dtype]:
                raise InputError(f"{name}: its {part} is {off:.1e} off the formula's; times would compare nothing")
        sides[f"{name} forward"] = lambda kernel=kernel: kernel(*tensors)
        sides[f"{name} both"] = lambda kernel=kernel: both(kernel)
        working.append(name)
    device = query.device.type
    samples = in_turns(sides, repeats, device=device, timer=timers.usual(device))
    seconds = {name: one.seconds for name, one in samples.items()}
    flops = visible_flops(tuple(query.shape), document)
    found_of = {}
    for name in working:
        forward, both_ways = record.spread(seconds[f"{name} forward"]), record.spread(seconds[f"{name} both"])
        found_of[name] = {
            "forward_seconds": forward,
            "both_seconds": both_ways,
            "forward_flops_per_second": flops / forward["median"],
            "both_flops_per_second": 3 * flops / both_ways["median"],
            "used_is_times_as_fast": paired_ratio(seconds[f"{name} both"], seconds["used both"]),
        }
    return {"forward_flops": flops, "skipped": skipped, "kernels": found_of, "samples": samples}


def _formula(inputs: Sequence[Tensor], document: int) -> tuple[Tensor, ...]:
    """Return the result and the three gradients by the formula, in float64, one document at a time."""
    rows = []
    for b in range(len(inputs[0])):
        of_row = [x[b : b + 1].detach().double().split(document, 2) for x in inputs]
        parts = []
        for *tensors, grad in zip(*of_row, strict=True):
            leaves = [x.requires_grad_() for x in tensors]
            mixed = textbook.attention(*leaves)
            parts.append((mixed.detach(), *torch.autograd.grad(mixed, leaves, grad)))
        rows.append([torch.cat(part, 2) for part in zip(*parts, strict=True)])
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def _table(name: str, result: dict[str, Any]) -> str:
    case, (H, K, C) = result["cases"][name], result["heads"]
    lines = [
        f"{name}: {result['batch_size']} x {result['length']} tokens in documents of {case['document']}, {H} heads of "
        f"{C} ({K} of keys), {result['dtype']} on {result['device']}",
        f"{'':<24}{'forward':>12}{'GFLOP/s':>10}{'both':>12}{'GFLOP/s':>10}{'of roof':>9}{'used is x':>11}",
    ]
    for kernel, times in case["kernels"].items():
        speed = times["both_flops_per_second"]
        lines.append(
            f"{kernel:<24}{times['forward_seconds']['median'] * 1e3:>9.2f} ms"
            f"{times['forward_flops_per_second'] / 1e9:>10,.0f}{times['both_seconds']['median'] * 1e3:>9.2f} ms"
            f"{speed / 1e9:>10,.0f}{speed / result['roof_flops']:>9.2f}{times['used_is_times_as_fast']:>11.2f}"
        )
    lines += [f"{kernel}: skipped, {reason}" for kernel, reason in case["skipped"].items()]
    return "\n".join(lines)
