"""Measure what finetuning forgets: the perplexity of pretraining pages, by learning rate and by LoRA rank.

The bundled base is finetuned on the bundled pairs: all its weights at several learning rates, and adapters of several
ranks (`minift/lora.py`), with frozen weights, at several others. Each time two things are measured. *Exact match*, the
share of held-out questions whose answer is right to the letter, is the purpose of finetuning. The *perplexity* of
pages of pretraining, exp of the mean loss a token, shows how well the model still predicts them. The pages are some of
those that the base was trained on, because forgetting can be measured only on what it knew.

There are two kinds of pages. Pages that *tell* hold facts and guides, and finetuning need not change how they are
predicted. Pages that *ask* hold only questions, one per line: after a question, a base trained on them writes another
one, and the pairs teach it to answer instead. So it is the purpose to forget the pages that ask, and the cost to forget
those that tell.

    python -m benchmarks lesson forgetting
    python -m benchmarks lesson forgetting --rates 1e-4 --lora-rates 3e-4 1e-3 --ranks 8

Source: Biderman et al., "LoRA Learns Less and Forgets Less" (arXiv 2405.09673), who finetuned models of 7 billion
weights on far more text, each at its best learning rate.
"""

import argparse
from itertools import islice, pairwise, product
from typing import Any

import torch

from benchmarks.lessons import estimate
from benchmarks.lessons.chart import Chart
from benchmarks.lessons.side_by_side import side_by_side
from benchmarks.lessons.training import finetune, right_answers, settings
from benchmarks.process import ROOT
from minift.checkpoint import load_model
from minift.config import FINETUNE
from minift.data.conversations import read_all_conversations
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.evaluation.intervals import difference
from minift.evaluation.likelihood import Likelihood, likelihood_scores, page_likelihoods
from minift.lora import LoRAConfig, add_lora
from minift.model import Llama
from minift.storage.names import bundled, model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.values import check_number

PAGES = ROOT / "data" / "pages"
WINDOW = 256  # tokens of a page that are evaluated at once
NEAR = 0.05  # of exact match: a run so close to the best has learned as much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    rates = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, metavar="X", help="for all weights (3e-5 …)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="of adapters (1 8 32)")
    parser.add_argument(
        "--lora-rates", type=float, nargs="+", default=[1e-3, 5e-3], metavar="X", help="for adapters (1e-3 5e-3)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first of them (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of each run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pairs of a step (%(default)s)")
    parser.add_argument("--pages", type=int, default=400, metavar="N", help="to foresee, of both sorts (%(default)s)")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="to ask; 0: all (%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at the same time (one a core)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the base, and a run of each seed for each learning rate and rank."""
    _check(options)
    asks = _pages_that_ask(options.pages)
    common = {name: getattr(options, name) for name in ("steps", "batch_size", "pages", "questions")}
    seeds = range(options.seed, options.seed + options.seeds)
    full = [{"rank": 0, "lr": rate} for rate in sorted(set(options.rates))]
    adapters = list(product(sorted(set(options.ranks)), sorted(set(options.lora_rates))))
    sides = [*full, *({"rank": rank, "lr": rate} for rank, rate in adapters)]
    base = {"rank": 0, "lr": 0.0}
    asked = [{**common, **base, "seed": 0}, *({**common, **side, "seed": seed} for side in sides for seed in seeds)]
    runs = side_by_side(_measure, asked, options.processes)
    of_side = [runs[1 + i * len(seeds) :][: len(seeds)] for i in range(len(sides))]
    return {
        "settings": {**common, "seeds": list(seeds), "pages_that_ask": sum(asks)},
        "base": {**base, **_together(runs[:1], asks, runs[0])},
        "sides": [{**side, **_together(own, asks, runs[0])} for side, own in zip(sides, of_side, strict=True)],
    }


def table(result: dict[str, Any]) -> str:
    """Return a table with a line for the base, and one for each learning rate and rank."""
    lines = [
        f"{'':<18}{'learning':>9}{'numbers':>10}{'':>19}{'pages that tell:':>21}{'of them':>21}{'pages that ask:':>22}",
        f"{'':<18}{'rate':>9}{'trained':>10}{'exact match':>19}{'perplexity':>21}{'over the base':>21}"
        f"{'perplexity':>22}",
    ]
    for side in (result["base"], *result["sides"]):
        rate, rise = (f"{side['lr']:.0e}", estimate.shown(side["rise"])) if side["lr"] else ("-", "-")
        ask = estimate.shown(side["ask"], 1) if side["ask"] else "-"
        lines.append(
            f"{_name(side):<18}{rate:>9}{side['trained']:>10,}{estimate.shown(side['right']):>19}"
            f"{estimate.shown(side['tell']):>21}{rise:>21}{ask:>22}"
        )
    seeds = ", ".join(map(str, result["settings"]["seeds"]))
    return "\n".join(
        [
            *lines,
            f"exact match and perplexity: the median over seeds {seeds}; in brackets the lowest and the highest",
            "over the base: by how much the perplexity rises, and its 95 % interval over pages: with other pages it "
            "would be another",
            "compare adapters with all weights where exact match is alike: their learning rates mean different things",
        ]
    )


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of the perplexity of the pages that tell, over the learning rate."""
    series: dict[str, list[Any]] = {}
    for side in result["sides"]:
        series.setdefault(_name(side), []).append(estimate.point(side["lr"], side["tell"]))
    title = f"What is left of the pages that tell (the base: {result['base']['tell']['value']:.2f})"
    return Chart(title, "learning rate", "perplexity, lower is better", series, log_x=True, log_y=True)


def conclusion(result: dict[str, Any]) -> str:
    """State what a larger learning rate costs, whether adapters forget less, and which pages are forgotten."""
    base, sides = result["base"], result["sides"]
    full, adapters = [side for side in sides if not side["rank"]], [side for side in sides if side["rank"]]
    words = [_on_rates(base, full)]
    best = max(side["right"]["value"] for side in sides)
    good = [side for side in sides if side["right"]["value"] >= best - NEAR]
    near = f"within {NEAR * 100:.0f} points of the best exact match, {best:.0%}"
    gentlest = min(good, key=_perplexity_of)
    rivals = [[side for side in good if side in group] for group in (full, adapters)]
    if all(rivals):
        one, other = (min(group, key=_perplexity_of) for group in rivals)
        words.append(_on_adapters(one, other, near))
    else:
        words.append(f"{'Adapters alone' if rivals[1] else 'Runs of all weights alone'} come {near}.")
    if gentlest["ask"] and base["ask"]:
        ask, tell = (gentlest[sort]["value"] / base[sort]["value"] for sort in ("ask", "tell"))
        where = "most on" if ask > tell else "not more on"
        words.append(
            f"What the gentlest of these loses, it loses {where} the pages that ask ({ask:.2f} times the base's "
            f"perplexity, against {tell:.2f} times on those that tell)"
            + (": to answer instead of asking on is what it was taught." if ask > tell else ".")
        )
    return " ".join(words)


def _on_rates(base: dict[str, Any], full: list[dict[str, Any]]) -> str:
    values = [_perplexity_of(side) for side in full]
    text = f"The base foresees pages that tell with a perplexity of {_perplexity_of(base):.2f}."
    for a, b in pairwise(full):
        if _perplexity_of(b) <= _perplexity_of(a):
            return f"{text} It does not rise with every learning rate here: not from {a['lr']:.0e} to {b['lr']:.0e}."
    growth = f"from {values[0]:.2f} at {full[0]['lr']:.0e} to {values[-1]:.2f} at {full[-1]['lr']:.0e}"
    if len(full) > 1 and estimate.apart(full[0]["tell"], full[-1]["tell"]):
        return f"{text} The larger the learning rate of all weights, the more is forgotten: it goes {growth}."
    return f"{text} Training all weights takes it to {values[-1]:.2f} at {full[-1]['lr']:.0e}" + (
        ", and the runs at different rates overlap." if len(full) > 1 else "."
    )


def _on_adapters(full: dict[str, Any], adapters: dict[str, Any], near: str) -> str:
    """Compare two good runs, each of its kind the one that forgets least: of all weights, and of adapters."""
    if estimate.apart(adapters["tell"], full["tell"]):
        verdict = "So at the rates tried adapters forget less, for as many right answers."
    elif estimate.apart(full["tell"], adapters["tell"]):
        verdict = "So at the rates tried adapters forget more, for as many right answers."
    else:
        verdict = "The runs overlap: whether adapters forget less is not shown here."
    return (
        f"Of the runs {near}, the gentlest of all weights ({full['lr']:.0e}) leaves {_perplexity_of(full):.2f}, the "
        f"gentlest of adapters (rank {adapters['rank']}, {adapters['lr']:.0e}) {_perplexity_of(adapters):.2f}. "
        f"{verdict}"
    )


def _perplexity_of(side: dict[str, Any]) -> float:
    return float(side["tell"]["value"])


def _name(side: dict[str, Any]) -> str:
    if side["rank"]:
        return f"adapters, rank {side['rank']}"
    return "all weights" if side["lr"] else "the base"


def _check(options: argparse.Namespace) -> None:
    for name in ("seeds", "steps", "batch_size", "pages"):
        check_number(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    for name in ("seed", "questions"):
        check_number(f"--{name}", getattr(options, name), least=0)
    for rank in options.ranks:
        check_number("--ranks", rank, least=1)
    for name in ("rates", "lora_rates"):
        for rate in getattr(options, name):
            check_number(f"--{name.replace('_', '-')}", rate, above=0)


def _pages_that_ask(count: int) -> list[bool]:
    """Return for each of the first pages whether it asks. Raise InputError when none of them tells."""
    asks = ["?" in text for text in islice(DocumentStream([PAGES], epochs=1), count)]
    if all(asks):
        raise InputError(f"--pages {count}: none of them tells anything; take more")
    return asks


def _together(runs: list[dict[str, Any]], asks: list[bool], base: dict[str, Any]) -> dict[str, Any]:
    """Combine the runs of several seeds. `rise` is for the pages that tell, with losses summed over the runs."""

    def likelihoods(run: dict[str, Any], sort: bool) -> list[Likelihood]:
        return [Likelihood(*page) for page, ask in zip(run["pages"], asks, strict=True) if ask is sort]

    def perplexities(sort: bool) -> dict[str, Any]:
        scores = [likelihood_scores(likelihoods(run, sort))["perplexity"] for run in runs]
        return estimate.of_runs([score.value for score in scores])

    summed = [
        sum(of_page[1:], start=of_page[0]) for of_page in zip(*(likelihoods(run, False) for run in runs), strict=True)
    ]
    before, after = (likelihood_scores(found)["perplexity"] for found in (likelihoods(base, False), summed))
    rise = difference(before, after)
    ends = rise["low"], rise["high"]
    return {
        "trained": runs[0]["trained"],
        "right": estimate.of_runs([run["right"] for run in runs]),
        "tell": perplexities(False),
        "rise": {"value": rise["value"], "interval": [rise["value"] if end is None else end for end in ends]},
        "ask": perplexities(True) if any(asks) else None,
    }


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Finetune once (not at a learning rate of 0), ask the questions, and evaluate the pages.

    Returns:
        `trained`, the number of trained parameters; `right`, the share of right answers; `pages`, for each page its
        loss in nats, its number of targets, and how many of them were the most likely token.
    """
    path = model_path("bundled")
    model, tokenizer = load_model(path), load_tokenizer(path)
    if asked["rank"]:
        lora = LoRAConfig.of(FINETUNE.replace(lora_rank=asked["rank"]))
        add_lora(model, lora, torch.Generator().manual_seed(asked["seed"]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if asked["lr"]:
        config = settings(FINETUNE, asked["seed"], lr=asked["lr"], batch_size=asked["batch_size"])
        finetune(model, tokenizer, read_all_conversations([bundled("pairs.jsonl")]), config, asked["steps"])
    model.eval()
    test = [pair for pair in read_all_conversations([bundled("test.jsonl")]) if pair.metric == "exact_match"]
    right = right_answers(model, tokenizer, test[: asked["questions"] or None])
    return {
        "trained": trained if asked["lr"] else 0,
        "right": sum(right) / len(right),
        "pages": _foresee(model, tokenizer, asked["pages"]),
    }


def _foresee(model: Llama, tokenizer: Tokenizer, count: int) -> list[tuple[float, int, int]]:
    found = islice(page_likelihoods(model, DocumentStream([PAGES], epochs=1), tokenizer, WINDOW), count)
    return [(page.nll, page.n_targets, page.n_top1) for page in found]
