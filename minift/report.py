"""What people look at: a comparison as a table and as two columns of words.

The numbers are made by `evaluate.compare`; here they only become text. Try it:

    minift compare bundled runs/finetune/final --data data/test.jsonl
"""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The scores of a comparison (`evaluate.compare`), before beside after, as aligned text."""
    before, after = result["before"], result["after"]
    rows = [
        (f"exact match of answers (n = {before['n']})", "exact_match"),
        (f"token F1 of answers (n = {before['n_token_f1']})", "token_f1"),
        ("perplexity of the right answers", "perplexity"),
        ("bits per byte of the right answers", "bits_per_byte"),
    ]
    lines = [f"{'':<38}{'before':>12}{'after':>12}"]
    for label, key in rows:
        if before[key] is not None:
            lines.append(f"{label:<38}{number(before[key]):>12}{number(after[key]):>12}")
    if result["skipped"]:
        lines.append(f"{result['skipped']} held-out pairs were left out: no answer, or too long for the model")
    return "\n".join(lines)


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
