"""Show results in a terminal: scores and X-rays as tables, a comparison as two columns of words.

The numbers come from `evaluation/` and `look/explain.py`; here they only become text.

    minift compare bundled runs/finetune/final --data data/test.jsonl
"""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minift.errors import printable

if TYPE_CHECKING:  # explain.py imports torch, for which `minift --help` need not wait
    from minift.look.explain import Entry, Position, XRay

LABELS = {
    "exact_match": "exact match of answers",
    "exact_match_normalised": "… except for case, punctuation, articles",
    "token_f1": "token F1 of answers",
    "perplexity": "perplexity of the right answers",
    "bits_per_byte": "bits per byte of the right answers",
    "next_token_accuracy": "next-token accuracy in the right answers",
}

FEW = 10  # records, below which resampling them shows hardly how far they vary
CUT = " … (cut)"  # after an answer that went on when its number of tokens was reached
_TOKEN, _ENTRIES = 12, 62  # columns of the terminal for a token, and for five entries
_LEGEND = """At each position the model reads a token and predicts the next. Of that next token: p is its probability,
rank its place among all tokens (1: none was likelier), nll = -ln p the surprise. Weight 1: it is learned; 0: it is
only given (a question). The gradient at the logits is softmax - one-hot: the step pushes - up, and + down."""


def table(result: dict[str, Any]) -> str:
    """Return the scores of a comparison (`evaluate.compare`) as a table: before, after and the difference."""
    before, after = result["before"], result["after"]
    lines = [f"{'':<46}{'before':>10}{'after':>10}   difference, and its 95 % interval"]
    for name, label in LABELS.items():
        if before[name] is None:
            continue
        count = {"exact_match": "n", "token_f1": "n_token_f1"}.get(name)
        text = f"{label} (n = {before[count]:,})" if count else label
        change = result["difference"][name]
        ends = f" [{number(change['low'])}, {number(change['high'])}]" if change["low"] is not None else ""
        shown = f"{'+' * (change['value'] >= 0)}{number(change['value'])}{ends}"
        lines.append(f"{text:<45} {number(before[name]):>9} {number(after[name]):>9}   {shown}")
    if result["skipped"]:
        why = "they have no answer, are too long, or have no place in the template"
        lines.append(f"{result['skipped']} held-out records were left out: {why}")
    return "\n".join(lines)


def worse_line(result: dict[str, Any]) -> str | None:
    """Return a line about a model that training has made worse on what was held out; None where it has not."""
    before, after = result["before"]["perplexity"], result["after"]["perplexity"]
    if before is None or after is None or after <= before:
        return None
    return (
        f"note: after training the right answers are less likely than before (perplexity {number(before)}, then "
        f"{number(after)}): train for fewer steps, lower --lr, or give more records"
    )


def few_line(result: Mapping[str, Any]) -> str | None:
    """Return a line about a comparison of few records; None where there are FEW or more."""
    n = max(result["before"]["n"], result["before"]["n_token_f1"], len(result["samples"]))
    if n >= FEW:
        return None
    return f"note: {n} held-out record{'s' * (n != 1)} say{'s' * (n == 1)} little about others: name more with --test"


def score_lines(scores: dict[str, Any]) -> str:
    """Return the scores of one model (`Evaluation.to_dict`), each on its line, with its interval."""
    lines = []
    for name, value in scores.items():
        if name != "intervals":
            ends = scores["intervals"].get(name)
            interval = f"  [{number(ends[0])}, {number(ends[1])}]" if ends else ""
            lines.append(f"{name:<24}{number(value):>10}{interval}")
    return "\n".join(lines)


def mistake_lines(found: dict[str, Any]) -> str:
    """Return the lists of `mistakes.mistakes` as text."""
    blocks = []
    for kind, entries in found["lists"].items():
        count = found["counts"].get(kind)
        lines = [f"{kind}" + (f" ({count:,} of {found['n']:,})" if count is not None else "")]
        for entry in entries:
            lines.append(f"  {shorten(entry['question'], 100)}")
            lines.append(f"    said   {said(entry['said'], entry['ended'], 160)}")
            lines.append(f"    right  {shorten(entry['answer'], 160)}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def samples(result: dict[str, Any], count: int) -> str:
    """Return the first `count` questions of a comparison, each with both models' words and the right answer."""
    blocks = []
    for sample in result["samples"][: max(0, count)]:
        earlier = [f"  {turn['role']:<10}{shorten(turn['text'], 160)}" for turn in sample.get("earlier", ())]
        lines = [*(["earlier"] * bool(earlier)), *earlier, shorten(sample["question"], 200)]
        for name in ("before", "after"):
            lines.append(f"  {name:<8}{said(sample[name], sample.get(f'{name}_ended', True), 200)}")
        lines.append(f"  {'right':<8}{said(sample['answer'], True, 200)}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def xray_table(xrays: "Mapping[str, XRay]", colour: bool = False, width: int = 120) -> str:
    """Return the X-rays of the same text by one model or two, with a line for each position.

    Args:
        xrays: by the models' names. Two are side by side, or one after the other if their tokens differ.
        colour: whether lines are green, yellow and red by surprise, and faint where nothing is learned.
        width: columns of the terminal.
    """
    xrays = {printable(name): xray for name, xray in xrays.items()}
    read = [[at.token for at in xray.positions] for xray in xrays.values()]
    if len(xrays) == 1:
        (xray,) = xrays.values()
        lines = [*_one_model(xray, colour, width), "", xray_total(xray), ""]
    elif read[0] == read[1]:
        totals = [f"{name}: {xray_total(xray)}" for name, xray in xrays.items()]
        lines = [*_side_by_side(xrays, colour), "", *totals, ""]
    else:
        lines = []
        for name, xray in xrays.items():
            lines += [name, *_one_model(xray, colour, width), "", xray_total(xray), ""]
    return "\n".join([*map(str.rstrip, lines), _LEGEND])


def _one_model(xray: "XRay", colour: bool, width: int) -> list[str]:
    """Return one model's lines. The gradient is in a second line where the first has no space for it."""
    head = f"{'':>5} {'reads':<{_TOKEN}} {'next':<{_TOKEN}} {'weight':>6} {'p':>7} {'rank':>6} {'nll':>7}  "
    one_line = width >= len(head) + 2 * _ENTRIES
    lines = [f"{head}{'likeliest':<{_ENTRIES}}" + ("gradient" if one_line else "")]
    for at in _with_documents(xray.positions, lines):
        line = f"{_place(xray, at)} {int(at.learned):>6} {_numbers(at)}  "
        gradient = _entry_texts(xray, at.gradient, signed=True)
        likeliest = _entry_texts(xray, at.likeliest)
        line += f"{_pad(likeliest, _ENTRIES)}{gradient}" if one_line else likeliest
        if gradient and not one_line:
            line += f"\n{'':>{2 * _TOKEN + 8}}gradient  {gradient}"
        lines.append(_coloured(line, at) if colour else line)
    return lines


def _side_by_side(xrays: "Mapping[str, XRay]", colour: bool) -> list[str]:
    """Return the lines of two models that read the same tokens."""
    first, second = xrays.values()
    half = 26 + _TOKEN
    numbers = f"{'p':>7} {'rank':>6} {'nll':>7}  {'likeliest':<{_TOKEN}}  "
    names = "".join(f"{shorten(name, half - 20):<{half}}" for name in xrays)
    lines = [f"{'':>{15 + 2 * _TOKEN}}{names}", f"{'':>5} {'reads':<{_TOKEN}} {'next':<{_TOKEN}} weight {numbers * 2}"]
    for at, other in zip(_with_documents(first.positions, lines), second.positions, strict=True):
        line = f"{_place(first, at)} {int(at.learned):>6} "
        for xray, here in ((first, at), (second, other)):
            line += f"{_numbers(here)}  {_pad(_show(xray, here.likeliest[0].id), _TOKEN)}  "
        lines.append(_coloured(line, other) if colour else line)
    return lines


def xray_total(xray: "XRay") -> str:
    """Return a sentence that says the loss, and what it is the mean of."""
    perplexity = number(math.exp(min(700.0, xray.loss)))
    return (
        f"loss {xray.loss:.6f} nats, the mean nll of {xray.n_targets:,} targets, as a training step in {xray.dtype} "
        f"reports it; perplexity {perplexity}"
    )


def _with_documents(positions: "Sequence[Position]", lines: list[str]) -> "Iterator[Position]":
    """Yield the positions. Before each document, where there are several, a line that says so is added to `lines`."""
    several = len({(at.row, at.document) for at in positions}) > 1
    before: tuple[int, int] | None = None
    for at in positions:
        if several and (at.row, at.document) != before:
            before = (at.row, at.document)
            lines.append(f"row {at.row + 1}, document {at.document + 1}: positions from 0; sees no other document")
        yield at


def _place(xray: "XRay", at: "Position") -> str:
    """Return the position, the token that is read, and the next one."""
    return f"{at.position:>5} {_pad(_show(xray, at.token), _TOKEN)} {_pad(_show(xray, at.next), _TOKEN)}"


def _numbers(at: "Position") -> str:
    """Return probability, rank and nll."""
    p = f"{at.probability:.4f}" if at.probability >= 1e-4 else f"{at.probability:.0e}"
    return f"{p:>7} {at.rank:>6,} {at.nll:>7.3f}"


def _entry_texts(xray: "XRay", entries: "Sequence[Entry]", signed: bool = False) -> str:
    def value(entry: "Entry") -> str:
        return f"{entry.value:{'+' if signed else ''}.2f}".replace("0.", ".")

    return "  ".join(f"{_show(xray, entry.id, 9)} {value(entry)}" for entry in entries)


def _show(xray: "XRay", id: int, length: int = _TOKEN) -> str:
    text = visible(xray.texts[id])
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _coloured(line: str, at: "Position") -> str:
    code = "2" if not at.learned else "32" if at.probability > 0.5 else "33" if at.probability > 0.05 else "31"
    return f"\x1b[{code}m{line}\x1b[0m"


def _pad(text: str, width: int) -> str:
    """Fill a text up to `width` columns of a terminal, in which many East Asian characters take two."""
    return text + " " * (width - sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))


def visible(text: str, space: str = "▁") -> str:
    """Return a token's text with every character visible: "▁" is a space, "⏎" a line break."""
    shown = text.replace(" ", space).replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def shorten(text: str, length: int) -> str:
    """Return a text as one line of at most `length` characters; line breaks become slashes."""
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return text if len(text) <= length else f"{text[:length]} … (+{len(text) - length:,} characters)"


def said(text: str, ended: bool, length: int) -> str:
    """Return an answer as `shorten` does; of one that was cut off before it `ended`, with a mark that says so."""
    return (shorten(text, length) or "(nothing)") + CUT * (not ended)


def number(value: Any) -> str:
    """Return a score for people to read: three decimals, "-" for none."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.3f}" if abs(value) < 1e6 else f"{value:.3g}"
