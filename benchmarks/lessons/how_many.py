"""Measure how many pairs finetuning needs: held-out exact match after 10, 30, 100, 300 and 1,000 of them.

The bundled base is finetuned on this many pairs, drawn by a seed, and asked the held-out questions, which are about
facts that are in no pair. *Exact match* is the share of them that it answers right to the letter.

The number of optimizer steps, and of pairs in a step, is the same for every count. So all runs compute as much, and
only the number of *different* pairs differs: a small set is repeated more often than a large one. With equal epochs, 10
pairs would get a hundredth of the steps of 1,000, and too few pairs could not be distinguished from too few steps. The
sets of a seed are nested: its 30 pairs are its 10 and 20 more.

    python -m benchmarks lesson how-many
    python -m benchmarks lesson how-many --counts 10 1000 --steps 50 --seeds 3

Source of the idea that a few varied pairs may be enough, because they teach how to answer and not what: Zhou et al.,
"LIMA" (arXiv 2305.11206).
"""

import argparse
from itertools import pairwise
from random import Random
from typing import Any

from benchmarks.lessons import estimate
from benchmarks.lessons.chart import Chart
from benchmarks.lessons.side_by_side import side_by_side
from benchmarks.lessons.training import finetune, right_answers, settings
from minift.checkpoint import load_model
from minift.config import FINETUNE
from minift.data.conversations import read_all_conversations
from minift.data.records import read_records
from minift.errors import InputError
from minift.storage.names import bundled, model_path
from minift.tokenizer.load import load_tokenizer
from minift.values import check_number

NEAR = 0.05  # of exact match: a count so close to the best is enough


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    counts = [10, 30, 100, 300, 1_000]
    parser.add_argument("--counts", type=int, nargs="+", default=counts, metavar="N", help="of pairs (10 … 1000)")
    parser.add_argument("--seeds", type=int, default=6, metavar="N", help="draws of pairs for each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of them (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of each run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=10, metavar="N", help="pairs of a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, metavar="X", help="learning rate (%(default)s)")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="to ask; 0: all (%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at the same time (one a core)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Finetune once for each count and seed."""
    _check(options)
    counts = sorted(set(options.counts))
    common = {"steps": options.steps, "batch_size": options.batch_size, "lr": options.lr}
    seeds = range(options.seed, options.seed + options.seeds)
    asked = [
        {**common, "count": count, "seed": seed, "questions": options.questions} for seed in seeds for count in counts
    ]
    found = side_by_side(_measure, asked, options.processes)
    runs = [{"count": one["count"], "seed": one["seed"], **run} for one, run in zip(asked, found, strict=True)]
    return {
        "settings": {**common, "seeds": list(seeds)},
        "questions": runs[0]["questions"],
        "runs": runs,
        "counts": [_of_count(count, [run for run in runs if run["count"] == count]) for count in counts],
    }


def table(result: dict[str, Any]) -> str:
    """Return a table with a line for each count: the median over the draws, and each of them."""
    chosen = result["settings"]
    read = chosen["steps"] * chosen["batch_size"]
    lines = [f"{'pairs':>6}{'each read':>12}{'exact match':>20}{'of other kinds':>18}   each draw"]
    for row in result["counts"]:
        each = "  ".join(f"{run['right']:.2f}" for run in result["runs"] if run["count"] == row["count"])
        others = f"{row['right_of_others']} of {row['others']}" if row["others"] else "-"
        times = f"{read / row['count']:,.1f} x"
        lines.append(f"{row['count']:>6,}{times:>12}{estimate.shown(row):>20}{others:>18}   {each}")
    n = len(chosen["seeds"])
    sure = f"in {estimate.certainty(n):.0%} of cases such a range holds the median of all draws there could be"
    return "\n".join(
        [
            *lines,
            f"exact match: the share of {result['questions']} held-out questions answered right to the letter,",
            f"  the median of {n} draws of the pairs, and in brackets the lowest and the highest;",
            *([f"  {sure}"] if n > 1 else []),
            "of other kinds: right answers to questions of a kind (capitals, symbols, …) that none of the pairs is of",
        ]
    )


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of exact match over the number of pairs."""
    points = [estimate.point(row["count"], row) for row in result["counts"]]
    y = "exact match on held-out questions"
    return Chart("How many pairs it takes to learn to answer", "different pairs", y, {"right": points}, log_x=True)


def conclusion(result: dict[str, Any]) -> str:
    """State where the curve rises, whether by more than chance, and where it ends."""
    rows = result["counts"]
    first, last = rows[0], rows[-1]
    falls = [(a, b) for a, b in pairwise(rows) if b["value"] < a["value"]]
    words = [
        f"{first['count']:,} pairs teach the base to answer {first['value']:.0%} of the held-out questions, "
        f"{last['count']:,} pairs {last['value']:.0%}."
    ]
    if falls:
        a, b = falls[0]
        words.append(f"From {a['count']:,} to {b['count']:,} the share falls: not every step up is shown here.")
    elif len(rows) > 1:
        words.append("From one count to the next the share never falls.")
    best = max(row["value"] for row in rows)
    enough = next(row["count"] for row in rows if row["value"] >= best - NEAR)
    if estimate.apart(first, last):
        words.append(
            f"{enough:,} come within {NEAR * 100:.0f} points of the best. All runs read as many pairs, the small sets "
            "again and again, so what made the difference is how many different ones there are."
        )
    elif len(rows) > 1:
        words.append("But the draws of the fewest and of the most pairs overlap: no clear difference is shown here.")
    others = sum(row["others"] for row in rows)
    if others:
        words.append(
            f"Of {others} questions of a kind that no pair was of, {sum(row['right_of_others'] for row in rows)} were "
            "answered right."
        )
    return " ".join(words)


def _check(options: argparse.Namespace) -> None:
    available = len(read_all_conversations([bundled("pairs.jsonl")]))
    for name in ("seeds", "steps", "batch_size"):
        check_number(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    for name in ("seed", "questions"):
        check_number(f"--{name}", getattr(options, name), least=0)
    check_number("--lr", options.lr, above=0)
    for count in options.counts:
        check_number("--counts", count, least=1, below=available + 1)
        if count % options.batch_size:
            raise InputError(
                f"--counts {count} is not a multiple of --batch-size {options.batch_size}: some steps would be smaller"
            )


def _of_count(count: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the runs with this many pairs."""
    sums = {name: sum(run[name] for run in runs) for name in ("right_of_others", "others")}
    return {"count": count, **estimate.of_runs([run["right"] for run in runs]), **sums}


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Finetune on the first `count` pairs of the seed's order, and ask the questions.

    Returns:
        `right`, the share of right answers; `questions`, the number of questions; `others`, how many of them are of a
        kind that no pair is of; `right_of_others`, how many of those are answered right.
    """
    path = model_path("bundled")
    model, tokenizer = load_model(path), load_tokenizer(path)
    pairs = read_all_conversations([bundled("pairs.jsonl")])
    Random(f"{asked['seed']} how many").shuffle(pairs)
    pairs = pairs[: asked["count"]]
    config = settings(FINETUNE, asked["seed"], lr=asked["lr"], batch_size=asked["batch_size"])
    finetune(model, tokenizer, pairs, config, asked["steps"])
    test = [pair for pair in read_all_conversations([bundled("test.jsonl")]) if pair.metric == "exact_match"]
    test = test[: asked["questions"] or None]
    hits = right_answers(model, tokenizer, test)
    kinds = _kinds()
    taught = {kinds[pair.question] for pair in pairs}
    of_others = [hit for hit, pair in zip(hits, test, strict=True) if kinds[pair.question] not in taught]
    return {
        "right": sum(hits) / len(hits),
        "questions": len(hits),
        "others": len(of_others),
        "right_of_others": round(sum(of_others)),
    }


def _kinds() -> dict[str, str]:
    """Return the kind of each bundled question: the relation that it asks for."""
    records = [record for name in ("pairs.jsonl", "test.jsonl") for record in read_records(bundled(name))]
    return {record.text("question"): record.text("relation") for record in records}
