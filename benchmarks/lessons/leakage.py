"""Measure what leaks between two documents of a row, and what it costs to isolate them.

Short documents share a row, so that little is computed for padding. Packed *naively*, they form one text: each attends
to all that comes before it, and its positions continue those before. *Isolated*, as minift packs pairs, attention
stays inside a document, and its positions start at 0.

Here a page B follows a page about something else (a *stranger*), or another page about the same thing of the same
length. Whatever changes in B is leakage: its loss at each token, and the gradient of that loss. *Alone* is the case of
a model in use, where B has a row for itself.

    python -m benchmarks lesson leakage
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing
from benchmarks.lessons import estimate
from benchmarks.lessons.chart import Chart
from data import generate as pages
from minift.checkpoint import load_model
from minift.config import FINETUNE
from minift.evaluation.likelihood import target_scores
from minift.model import Llama
from minift.pack import IGNORE, Batch, Example, collate
from minift.runs.machine import choose_device, choose_dtype
from minift.storage.names import model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.train import Objective
from minift.values import check_number, size

PLACES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32))  # ranges of tokens of B, counted from 1
DOCUMENT = 32  # tokens of a document in the measurement of the cost
CHUNK = 512  # targets whose logits are in memory at the same time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    parser.add_argument("--rows", type=int, default=60, metavar="N", help="of two pages each (%(default)s)")
    lengths = [64, 128, 256, 512]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="N", help="of rows (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4_096, metavar="N", help="of a timed step (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed turns (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the leakage in rows of two pages, and the cost of isolation by the length of the rows."""
    check_number("rows", options.rows, least=2)
    check_number("repeats", options.repeats, least=1)
    for length in options.lengths:
        check_number("lengths", length, least=DOCUMENT, below=513)
    model, tokenizer = load_model(model_path("bundled")), load_tokenizer(model_path("bundled"))
    rows = _rows(tokenizer, options.rows, Random(f"{options.seed} leakage"))
    found = [_row(model, *row) for row in rows]
    cost = [_cost(model, tokenizer, length, options) for length in options.lengths]
    return {
        "seed": options.seed,
        "pages": options.rows,
        "places": [_place(place, found) for place in PLACES],
        "whole": {side: estimate.mean([float(one["nll"][side].mean()) for one in found]) for side in found[0]["nll"]},
        "naive": _crossed(found, "naive"),
        "isolated": _crossed(found, "isolated"),
        "cost": cost,
        "rows": [row for one in cost for row in one.pop("samples")],
    }


def table(result: dict[str, Any]) -> str:
    """Return a table of B's loss by position, the leakage, and the cost."""
    sides = ("alone", "stranger", "same")
    lines = [f"{'loss of page B, nats a token':<30}" + "".join(f"{name:>22}" for name in _LABELS.values())]
    for place in result["places"]:
        first, last = place["place"]
        name = f"token {first}" if first == last else f"tokens {first} to {last}"
        lines.append(f"  {name:<28}" + "".join(f"{estimate.shown(place[side]):>22}" for side in sides))
    lines.append(f"  {'all':<28}" + "".join(f"{estimate.shown(result['whole'][side]):>22}" for side in sides))
    lines += ["", f"{'when the page before B is another':<48}{'naive':>22}{'isolated':>22}"]
    for key, label in (
        ("loss", "B's loss changes by, nats a token"),
        ("gradient", "its gradient changes by, share of it"),
    ):
        cells = "".join(f"{estimate.shown(result[side][key], 3):>22}" for side in ("naive", "isolated"))
        lines.append(f"  {label:<46}{cells}")
    lines += ["", f"{'forward and backward, tokens of a row':<40}{'naive':>10}{'isolated':>10}{'ratio':>8}{'mask':>10}"]
    for cost in result["cost"]:
        times = "".join(f"{cost[side]['median'] * 1e3:>7,.0f} ms" for side in ("naive", "isolated"))
        lines.append(f"  {cost['length']:<38}{times}{cost['ratio']:>8.2f}{size(cost['mask_bytes']):>10}")
    return "\n".join(lines)


_LABELS = {"alone": "alone, or isolated", "stranger": "after an unrelated page", "same": "after the same thing"}


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of B's loss by position, after each neighbour."""
    series = {
        label: [estimate.point(statistics.mean(place["place"]), place[side]) for place in result["places"]]
        for side, label in _LABELS.items()
    }
    return Chart("What a neighbour changes", "token of page B", "loss of page B, nats a token", series, log_x=True)


def conclusion(result: dict[str, Any]) -> str:
    """State what leaked, in which direction, and what isolation costs."""
    naive, isolated, whole = result["naive"], result["isolated"], result["whole"]
    if isolated["largest"] == 0.0:
        first = (
            "Isolated, nothing crosses: B's losses and gradients are the same to the bit, whatever stands before it."
        )
    else:
        first = f"Isolated, B's loss still changes by up to {isolated['largest']:.1g}: isolation is broken."
    second = (
        f"Naively packed, another neighbour changes B's loss by {naive['loss']['value']:.2f} nats a token, and its "
        f"gradient by {naive['gradient']['value']:.0%} of its length."
    )
    if whole["same"]["value"] < whole["stranger"]["value"] and whole["same"]["value"] < whole["alone"]["value"]:
        third = (
            f"Behind a page about the same thing the loss is {whole['same']['value']:.2f} in place of "
            f"{whole['alone']['value']:.2f}: what the neighbour says need not be known, and is learned less."
        )
    else:
        third = "A page about the same thing did not lower B's loss here."
    last = result["cost"][-1]
    price = f"In rows of {last['length']} tokens isolation takes {last['ratio']:.2f} times the time of a step."
    return " ".join((first, second, third, price))


def naive(batch: Batch) -> Batch:
    """Return the same rows as one text each, the fault: plain causal attention, and positions that do not restart."""
    T = batch.tokens.shape[1]
    return dataclasses.replace(batch, positions=torch.arange(T).expand_as(batch.tokens), isolated=False)


def _rows(tokenizer: Tokenizer, count: int, rng: Random) -> list[tuple[Example, Example, Example]]:
    """Return triples (B, a page about the same thing, a stranger); the last two are equally long, no shorter than B."""
    world = pages.load_world()
    by_length: dict[int, list[tuple[str, Example]]] = {}
    for entity in world.entities:
        for _ in range(4):
            page = _example(tokenizer, pages.paragraph(world, entity, rng))
            by_length.setdefault(len(page), []).append((entity.name, page))
    rows: list[tuple[Example, Example, Example]] = []
    while len(rows) < count:
        entity = rng.choice(world.entities)
        B = _example(tokenizer, pages.paragraph(world, entity, rng))
        same = _example(tokenizer, pages.paragraph(world, entity, rng))
        strangers = [page for name, page in by_length.get(len(same), []) if name != entity.name]
        # A row's longest page comes first (`minift/pack.py`): B must not be longer than the page that it follows.
        if len(same) >= len(B) and strangers:
            rows.append((B, same, rng.choice(strangers)))
    return rows


def _example(tokenizer: Tokenizer, text: str) -> Example:
    ids = tokenizer.encode(text, bos=True, eos=True)
    return Example(ids[:1], ids[1:])


def _row(model: Llama, B: Example, same: Example, stranger: Example) -> dict[str, Any]:
    """Return B's loss at each token, alone and after each neighbour, and what changes between the neighbours."""
    pad_id = model.config.eos_token_ids[0]
    neighbours = {"same": same, "stranger": stranger}
    joined = {name: collate([page, B], pad_id, len(page) + len(B)) for name, page in neighbours.items()}
    # Only B's tokens are targets: a change in the neighbour's own loss is not leakage.
    only = {
        name: dataclasses.replace(
            batch, targets=torch.where(batch.document_ids == 1, batch.targets, IGNORE), n_targets=B.n_targets
        )
        for name, batch in joined.items()
    }
    nll = {name: _nll(model, naive(batch)) for name, batch in only.items()} | {"alone": _nll(model, only["same"])}
    changes = {
        "isolated": {
            "loss": _nll(model, only["stranger"]) - nll["alone"],
            "gradient": _gradient_change(model, only["same"], only["stranger"]),
        },
        "naive": {
            "loss": nll["stranger"] - nll["same"],
            "gradient": _gradient_change(model, naive(only["same"]), naive(only["stranger"])),
        },
    }
    return {"nll": nll, **changes}


def _nll(model: Llama, batch: Batch) -> Tensor:
    with torch.no_grad():
        hidden = model.hidden(batch.tokens, batch.positions, batch.documents)
    return target_scores(hidden, model.head_weight, batch.targets)[0]


def _gradient_change(model: Llama, batch: Batch, other: Batch) -> float:
    """Return the norm of the difference of the two gradients, over the norm of the first."""
    gradients = []
    for one in (batch, other):
        Objective(model, CHUNK)(one).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def _place(place: tuple[int, int], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, last = place
    sides = ("alone", "stranger", "same")
    means = {side: [one["nll"][side][first - 1 : last].tolist() for one in found] for side in sides}
    return {
        "place": [first, last],
        **{side: estimate.mean([value for row in rows for value in row]) for side, rows in means.items()},
    }


def _crossed(found: Sequence[dict[str, Any]], side: str) -> dict[str, Any]:
    losses = [float(one[side]["loss"].abs().mean()) for one in found]
    gradients = [one[side]["gradient"] for one in found]
    largest = max(*(float(one[side]["loss"].abs().max()) for one in found), *gradients)
    return {"loss": estimate.mean(losses), "gradient": estimate.mean(gradients), "largest": largest}


def _cost(model: Llama, tokenizer: Tokenizer, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time the forward and backward pass over rows of `length`, packed both ways, in turns."""
    config = FINETUNE.replace(device="cpu")
    config = config.replace(dtype=choose_dtype(config, choose_device(config)))
    ids = [3 + i % (tokenizer.vocab_size - 3) for i in range(DOCUMENT)]
    documents = [Example([tokenizer.bos_id], ids) for _ in range(options.tokens // DOCUMENT)]
    isolated = collate(documents, tokenizer.eos_id, length)

    def step(batch: Batch) -> None:
        with torch.autocast(model.device.type, getattr(torch, config.dtype), enabled=config.dtype != "float32"):
            nll_sum = Objective(model, CHUNK)(batch)
        nll_sum.backward()
        model.zero_grad(set_to_none=True)

    sides = {"naive": lambda: step(naive(isolated)), "isolated": lambda: step(isolated)}
    samples = timing.in_turns(sides, options.repeats)
    seconds = {name: one.seconds for name, one in samples.items()}
    B, T = isolated.tokens.shape
    return {
        "length": length,
        "tokens": B * T,
        **{side: record.spread(taken) for side, taken in seconds.items()},
        "ratio": timing.paired_ratio(seconds["isolated"], seconds["naive"]),
        "mask_bytes": B * T * T,
        "samples": [record.row(f"{length}/{side}", taken, per="step") for side, taken in samples.items()],
    }
