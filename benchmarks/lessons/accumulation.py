"""Measure the error of a gradient that is a mean of means, by how unequal its micro-batches are.

A step's gradient is summed over micro-batches. The right one divides the summed loss by the number of targets in all
micro-batches, as `train.train_step` does. A common fault divides each micro-batch's loss by its own number of targets
and averages these means: then the targets of a micro-batch with few of them weigh more. Where all micro-batches have
the same number, the two gradients are the same.

Here a window of pairs, whose answers all have the same number of tokens, is split over the micro-batches in several
ways: evenly, and with a growing share in the first one. The right gradient is the same for every split. The table shows
the faulty gradient's direction (the *cosine* of the angle between the two: 1 is the same direction) and its length (the
*norm ratio*: 1 is the same length), as means over random windows, with their 95 % intervals.

    python -m benchmarks lesson accumulation

Several training libraries had this fault until October 2024.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import estimate
from benchmarks.lessons.chart import Chart
from minift.checkpoint import load_model
from minift.data.conversations import read_all_conversations
from minift.data.examples import encode_conversations
from minift.data.templates import template_named
from minift.errors import InputError
from minift.model import Llama
from minift.pack import Example, collate
from minift.storage.names import bundled, model_path
from minift.tokenizer.load import load_tokenizer
from minift.train import Objective
from minift.values import check_number

CHUNK = 512  # targets whose logits are in memory at the same time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of a window (%(default)s)")
    parser.add_argument("--pairs", type=int, default=32, metavar="N", help="of a window, of all of them (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=4, metavar="N", help="of each answer (%(default)s)")
    parser.add_argument("--windows", type=int, default=40, metavar="N", help="drawn anew (%(default)s)")
    parser.add_argument("--model", default="bundled", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the two gradients for each split of each window."""
    for name in ("micro_batches", "windows"):
        check_number(name, getattr(options, name), least=1 if name == "windows" else 2)
    if options.pairs % options.micro_batches:
        raise InputError(f"--pairs {options.pairs} cannot be split evenly over {options.micro_batches} micro-batches")
    model, tokenizer = load_model(model_path(options.model)), load_tokenizer(model_path(options.model))
    pairs = read_all_conversations([bundled("pairs.jsonl")])
    examples, _ = encode_conversations(pairs, template_named("plain"), tokenizer, model.config.max_position_embeddings)
    alike = [example for example in examples if len(example.answer) == options.answer_tokens]
    if len(alike) < options.pairs:
        raise InputError(f"only {len(alike)} answers have {options.answer_tokens} tokens; choose other --answer-tokens")
    splits = sizes(options.pairs, options.micro_batches)
    rng = Random(f"{options.seed} accumulation")
    found: list[list[tuple[float, float, float]]] = [[] for _ in splits]
    for _ in range(options.windows):
        window = rng.sample(alike, options.pairs)
        right = right_gradient(model, [window])
        for split, results in zip(splits, found, strict=True):
            results.append(compare(mean_of_means(model, cut(window, split)), right))
    return {
        "seed": options.seed,
        "windows": options.windows,
        "pairs": options.pairs,
        "answer_tokens": options.answer_tokens,
        "levels": [_level(split, results) for split, results in zip(splits, found, strict=True)],
    }


def table(result: dict[str, Any]) -> str:
    """Return a table with a line for each split."""
    lines = [
        f"{'pairs of the micro-batches':<30}{'largest share':>14}{'cosine':>26}{'norm ratio':>26}{'relative error':>18}"
    ]
    for level in result["levels"]:
        sizes_of = " + ".join(map(str, level["sizes"]))
        cells = "".join(f"{estimate.shown(level[key], 4):>26}" for key in ("cosine", "norm_ratio"))
        lines.append(f"{sizes_of:<30}{level['share']:>13.0%} {cells}{level['error']['value']:>18.4f}")
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of the cosine over the largest micro-batch's share."""
    points = [estimate.point(round(level["share"], 2), level["cosine"]) for level in result["levels"]]
    return Chart(
        "The mean of means points elsewhere",
        "share of the targets in the largest micro-batch",
        "cosine between the faulty gradient and the right one",
        {"cosine": points},
    )


def conclusion(result: dict[str, Any]) -> str:
    """State how the error grows."""
    levels = result["levels"]
    cosines = [level["cosine"]["value"] for level in levels]
    equal, most = levels[0], levels[-1]
    error = equal["error"]["value"]
    why = ": rounding" if error < 1e-5 else ""
    same = f"With equal micro-batches the two gradients differ by {error:.0e} of their length{why}."
    if all(later < earlier for earlier, later in pairwise(cosines)):
        grows = (
            f"The more unequal, the further apart: with {most['share']:.0%} of the targets in one micro-batch the "
            f"cosine is {most['cosine']['value']:.2f}, and the faulty gradient {most['norm_ratio']['value']:.2f} times "
            "as long."
        )
    else:
        grows = "Over these windows the cosine does not fall at every level: take more --windows."
    return f"{same} {grows} Sums, divided once by the count of the whole window, have no such error."


def sizes(pairs: int, micro_batches: int) -> list[list[int]]:
    """Return splits from even to most unequal: from one to the next, all micro-batches but the first lose a pair."""
    even = pairs // micro_batches
    return [[pairs - (micro_batches - 1) * rest, *[rest] * (micro_batches - 1)] for rest in range(even, 0, -1)]


def cut(window: Sequence[Example], split: Sequence[int]) -> list[list[Example]]:
    """Cut the window into parts of these sizes."""
    ends = [sum(split[: i + 1]) for i in range(len(split))]
    return [list(window[end - size : end]) for size, end in zip(split, ends, strict=True)]


def right_gradient(model: Llama, parts: Sequence[Sequence[Example]]) -> Tensor:
    """Return the gradient of the loss summed over the micro-batches, divided by all their targets, as one vector."""
    n_targets = sum(len(example.answer) for part in parts for example in part)
    return _gradient(model, parts, [n_targets] * len(parts))


def mean_of_means(model: Llama, parts: Sequence[Sequence[Example]]) -> Tensor:
    """Return the faulty gradient: of the average of the micro-batches' mean losses."""
    return _gradient(model, parts, [len(parts) * sum(len(example.answer) for example in part) for part in parts])


def _gradient(model: Llama, parts: Sequence[Sequence[Example]], divisors: Sequence[int]) -> Tensor:
    for part, divisor in zip(parts, divisors, strict=True):
        nll_sum = Objective(model, CHUNK)(collate(part, model.config.eos_token_ids[0]))
        (nll_sum / divisor).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradient


def compare(faulty: Tensor, right: Tensor) -> tuple[float, float, float]:
    """Return the cosine, the norm ratio, and the norm of the difference over that of the right gradient."""
    faulty, right = faulty.double(), right.double()
    cosine = float(faulty @ right / (faulty.norm() * right.norm()))
    return cosine, float(faulty.norm() / right.norm()), float((faulty - right).norm() / right.norm())


def _level(split: Sequence[int], results: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    columns = dict(zip(("cosine", "norm_ratio", "error"), zip(*results, strict=True), strict=True))
    return {
        "sizes": list(split),
        "share": max(split) / sum(split),
        **{key: estimate.mean(c) for key, c in columns.items()},
    }
