"""Make the report of a run, or of two models side by side: what was done, how it went, and what changed.

All of a run's report is read from the run's folder (`config.json`, `metrics.jsonl`, `compare.json`, `final/`), so the
page can be made again at any time, and says nothing that the files do not say.

    minift finetune                       # writes runs/finetune/report.html
    minift compare bundled runs/finetune/final --data data/test.jsonl --html compare.html
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minift.config import CHOSEN, FINETUNE, PRETRAIN, LlamaConfig, TrainConfig
from minift.costs.flops import count_parameters
from minift.costs.memory import inference_memory, training_memory
from minift.formats.open import open_model
from minift.formats.shapes import parameter_shapes
from minift.look.pages.curves import curves_of, svg
from minift.look.pages.document import document, table, text
from minift.look.report import CUT, LABELS, few_line, number
from minift.lora import LoRAConfig
from minift.runs.freeze import frozen_names
from minift.runs.metrics import read_metrics
from minift.runs.progress import Best
from minift.storage.system import command_line
from minift.values import read_json, size

SHOWN = 100  # samples on a page; the rest are in the JSON


def run_page(folder: Path) -> str:
    """Return the page of a finished run.

    Args:
        folder: with `config.json`, `metrics.jsonl`, `final/` and, for a finetune run, `compare.json`.
    """
    run = read_json(folder / "config.json")
    config = TrainConfig.from_dict(run["train"])
    metrics = read_metrics(folder / "metrics.jsonl")
    shape = open_model(folder / "final").config
    trained = None
    if config.lora_rank:  # A has a column for each column of the matrix, B a row for each of its rows
        targets = LoRAConfig.of(config).targets
        sizes = [size for name, size in parameter_shapes(shape).items() if name.split(".")[-2] in targets]
        trained = config.lora_rank * sum(map(sum, sizes))
    sections = [_summary(config, metrics, shape, trained)]
    sections.append(f"<h2>Command</h2>\n<pre><code>{text(run_command(run, folder))}</code></pre>")
    if (folder / "compare.json").exists():
        sections.append(_scores(read_json(folder / "compare.json")))
    if metrics:
        sections.append(f'<h2>Curves</h2>\n<div class="charts">{"".join(map(svg, curves_of(metrics)))}</div>')
    if (folder / "compare.json").exists():
        sections.append(_samples(read_json(folder / "compare.json")))
    sections += [_speed(metrics), _training_ledger(shape, config, trained), _settings(config)]
    title = f"{'Finetuning' if run['job'] == 'finetune' else 'Pretraining'}: {folder}"
    return _page(title, sections)


def comparison_page(result: Mapping[str, Any], shapes: Sequence[LlamaConfig], command: str) -> str:
    """Return the page of a comparison.

    Args:
        result: as `evaluate.compare` returns it.
        shapes: of the two models.
        command: the command that made the comparison.
    """
    sections = [
        f"<h2>Command</h2>\n<pre><code>{text(command)}</code></pre>",
        _scores(result),
        _samples(result),
        _inference_ledger(shapes),
    ]
    return _page("Before and after", sections)


def run_command(run: Mapping[str, Any], out: Path) -> str:
    """Return the command line that does a run again, from its `config.json`: with what the run chose by itself."""
    defaults = FINETUNE if run["job"] == "finetune" else PRETRAIN
    words = ["minift", run["job"]]
    for name, value in run["inputs"].items():
        if value and (name, value) not in (("text_field", "text"), ("encoding", "utf-8")):  # the defaults
            words += [f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    for item in dataclasses.fields(TrainConfig):
        value, flag = run["train"].get(item.name), item.name.replace("_", "-")
        chosen = defaults is FINETUNE and item.name in CHOSEN  # another job might choose another value
        if (value == getattr(defaults, item.name) and not chosen) or value is None or value == []:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
    return command_line([*words, "--out", str(out)])


def _page(title: str, sections: Sequence[str]) -> str:
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return document(title, f"<header><h1>{text(title)}</h1></header>\n<main>\n{body}\n</main>")


def _summary(config: TrainConfig, metrics: Sequence[Mapping[str, Any]], shape: LlamaConfig, trained: int | None) -> str:
    total = count_parameters(shape).total
    sizes = {name: math.prod(size) for name, size in parameter_shapes(shape).items()}
    left = total - sum(sizes[name] for name in frozen_names(sizes, config.freeze))
    share = f"{left:,} of them trained" if config.freeze else "all of them trained"
    share = share if trained is None else f"with {trained:,} numbers of adapters trained in their place"
    tokens = sum(step["tokens"] for step in metrics)
    words = f"A Llama of {total:,} weights, {share}: {len(metrics):,} steps over {tokens:,} tokens, in {config.dtype}."
    best = Best.of_records(metrics)
    if best.evaluations_since and config.keep_last:
        words += f" Note that {best.in_words().replace(' now', ' at the end')}."
    elif best.evaluations_since:
        lowest = f"where the validation loss was lowest: {best.loss:.4f}. At the end it was {best.last:.4f}."
        words += f" final/ is {best.model_in_words()}, {lowest}"
    return f"<p>{text(words)}</p>"


def _scores(result: Mapping[str, Any]) -> str:
    """Return a table of every score of both models and the difference, each with its interval."""

    def with_ends(value: float, ends: Sequence[float] | None, sign: bool = False) -> str:
        shown = f"{'+' if sign and value >= 0 else ''}{number(value)}"
        return f'{shown} <span class="soft ends">[{number(ends[0])}, {number(ends[1])}]</span>' if ends else shown

    rows = []
    for name, label in LABELS.items():
        if result["before"][name] is None:
            continue
        cells = [with_ends(side[name], side["intervals"].get(name)) for side in (result["before"], result["after"])]
        change = result["difference"][name]
        ends = None if change["low"] is None else (change["low"], change["high"])
        rows.append([text(label), *cells, with_ends(change["value"], ends, sign=True)])
    note = f"{result['before']['n']:,} questions with an answer to be matched. The 95 % interval is in brackets."
    if (few := few_line(result)) is not None:
        note += f" {few.removeprefix('note: ').capitalize()}."
    if result["skipped"]:
        note += f" {result['skipped']:,} pairs were left out: they have no answer, or are too long."
    return "<h2>Before and after</h2>\n" + table(["score", "before", "after", "difference"], rows, text(note))


def _samples(result: Mapping[str, Any]) -> str:
    """Return each question with both answers. What changed is marked, and said in words."""
    samples = result["samples"]
    changed = sum(one["before"] != one["after"] for one in samples)
    right = [sum(one[side] == one["answer"] for one in samples) for side in ("before", "after")]
    parts = [f"<h2>Samples</h2>\n<p>{changed:,} of {len(samples):,} answers changed. "]
    parts.append(f"Exactly right: {right[0]:,} before, {right[1]:,} after.</p>")
    parts += map(_sample, samples[:SHOWN])
    if len(samples) > SHOWN:
        parts.append(
            f'<p class="soft">… and {len(samples) - SHOWN:,} more, which are in the JSON of the comparison.</p>'
        )
    return "\n".join(parts)


def _sample(one: Mapping[str, Any]) -> str:
    def said(side: str) -> str:
        words = text(one[side]) or '<span class="soft">(nothing)</span>'
        if not one.get(f"{side}_ended", True):
            words += f'<span class="soft">{CUT}</span>'
        if side == "after" and one["after"] != one["before"]:
            words = f'<mark>{words}</mark> <span class="soft">(changed)</span>'
        return f'{words} <span class="good">✓ right</span>' if one[side] == one["answer"] else words

    turns = one.get("earlier", ())  # of a chat
    earlier = "".join(f'<p class="soft">{text(turn["role"])}: {text(turn["text"])}</p>' for turn in turns)
    return (
        f'<article class="sample">{earlier}<h3>{text(one["question"])}</h3><dl><dt>before</dt><dd>{said("before")}</dd>'
        f"<dt>after</dt><dd>{said('after')}</dd><dt>right</dt><dd>{text(one['answer'])}</dd></dl></article>"
    )


def _speed(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    speeds = sorted(step["tokens_per_second"] for step in metrics)
    seconds = sum(step["seconds"] for step in metrics)
    words = (
        f"{statistics.median(speeds):,.0f} tokens a second (median of the steps; from {speeds[0]:,.0f} to "
        f"{speeds[-1]:,.0f}). The steps took {seconds:,.1f} s in total, without evaluation and saving."
    )
    return f"<h2>Speed</h2>\n<p>{words}</p>"


def _training_ledger(shape: LlamaConfig, config: TrainConfig, trained: int | None) -> str:
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    ledger = training_memory(
        shape, config.dtype, config.batch_size, config.max_length, config.loss_chunk, device, trained
    )
    caption = (
        f"Bytes that a step needs at most, as computed from the shape: {config.batch_size:,} rows of "
        f"{config.max_length:,} tokens. Short ones share rows and need fewer."
    )
    rows = [[text(name), size(nbytes)] for name, nbytes in {**ledger, "total": sum(ledger.values())}.items()]
    return "<h2>Memory</h2>\n" + table(["use", "bytes"], rows, text(caption))


def _inference_ledger(shapes: Sequence[LlamaConfig]) -> str:
    ledgers = [inference_memory(shape, "float32", 1, shape.max_position_embeddings) for shape in shapes]
    rows = [[text(name), *(size(ledger[name]) for ledger in ledgers)] for name in ledgers[0]]
    rows.append(["total", *(size(sum(ledger.values())) for ledger in ledgers)])
    caption = "Bytes that each model takes in float32 with a text of all its positions, as computed from the shape"
    return "<h2>Memory</h2>\n" + table(["use", "before", "after"], rows, caption)


def _settings(config: TrainConfig) -> str:
    rows = []
    for item in dataclasses.fields(TrainConfig):
        value = getattr(config, item.name)
        value = " ".join(value) if isinstance(value, tuple) else value
        shown = "-" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
        rows.append([f"<code>{item.name}</code>", text(shown), text(item.metadata["help"])])
    return "<h2>Settings</h2>\n" + table(["name", "value", "meaning"], rows, "All settings of the run")
