"""What people look at: a comparison as a table and as two columns of words.

The numbers are made by `evaluate.compare`; here they only become text. Try it:

    minift compare bundled runs/finetune/final --data data/test.jsonl
"""

from typing import Any

LABELS = {
    "exact_match": "exact match of answers",
    "exact_match_normalised": "… but for case, punctuation, articles",
    "token_f1": "token F1 of answers",
    "perplexity": "perplexity of the right answers",
    "bits_per_byte": "bits per byte of the right answers",
    "next_token_accuracy": "next-token accuracy in them",
}


def table(result: dict[str, Any]) -> str:
    """The scores of a comparison (`evaluate.compare`), before beside after and their difference, as aligned text."""
    before, after = result["before"], result["after"]
    lines = [f"{'':<46}{'before':>10}{'after':>10}   difference, and its 95 % interval"]
    for name, label in LABELS.items():
        if before[name] is None:
            continue
        count = {"exact_match": "n", "token_f1": "n_token_f1"}.get(name)
        text = f"{label} (n = {before[count]:,})" if count else label
        change = result["difference"][name]
        ends = f"[{number(change['low'])}, {number(change['high'])}]"
        shown = f"{'+' * (change['value'] >= 0)}{number(change['value'])} {ends}"
        lines.append(f"{text:<46}{number(before[name]):>10}{number(after[name]):>10}   {shown}")
    if result["skipped"]:
        lines.append(f"{result['skipped']} held-out pairs were left out: no answer, or too long for the model")
    return "\n".join(lines)


def score_lines(scores: dict[str, Any]) -> str:
    """The scores of one model (`Evaluation.to_dict`), each on its line, with its interval."""
    lines = []
    for name, value in scores.items():
        if name != "intervals":
            ends = scores["intervals"].get(name)
            interval = f"  [{number(ends[0])}, {number(ends[1])}]" if ends else ""
            lines.append(f"{name:<24}{number(value):>10}{interval}")
    return "\n".join(lines)


def mistake_lines(found: dict[str, Any]) -> str:
    """What `mistakes.mistakes` found, as text."""
    blocks = []
    for kind, entries in found["lists"].items():
        count = found["counts"].get(kind)
        lines = [f"{kind}" + (f" ({count:,} of {found['n']:,})" if count is not None else "")]
        for entry in entries:
            lines.append(f"  {shorten(entry['question'], 100)}")
            lines.append(f"    said   {shorten(entry['said'], 160) or '(nothing)'}")
            lines.append(f"    right  {shorten(entry['answer'], 160)}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def samples(result: dict[str, Any], count: int) -> str:
    """The first `count` questions of a comparison, each with both models' words and the right answer."""
    blocks = []
    for sample in result["samples"][: max(0, count)]:
        lines = [shorten(sample["question"], 200)]
        for name in ("before", "after", "answer"):
            lines.append(f"  {'right' if name == 'answer' else name:<8}{shorten(sample[name], 200) or '(nothing)'}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters; line breaks become slashes."""
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return text if len(text) <= length else f"{text[:length]} … (+{len(text) - length:,} characters)"


def number(value: Any) -> str:
    """A score as people read it: three decimals, "-" for none."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def size(nbytes: float) -> str:
    """Bytes in decimal units: 13_476_831_232 → "13.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1_000
    return f"{nbytes:.3g} TB"
