"""Show an audit in a terminal: counts, findings, and some records with what is learned of them.

The numbers come from `data/audit.py`; here they only become text.

    minift data audit data/pairs.jsonl
"""

import textwrap
from itertools import groupby

from minift.data.audit import Audit
from minift.data.findings import Finding
from minift.data.samples import Piece
from minift.errors import one_line
from minift.look.report import visible

WIDTH = 100  # columns
SHOWN = 600  # characters of a record


def audit_text(result: Audit, samples: int) -> str:
    """Return an audit as text.

    Args:
        samples: how many records are shown.
    """
    lines = [*_counts(result), "", *_findings(result.findings)]
    drawn = [one for one in result.samples if not one.findings][:samples]
    if drawn:
        lines += ["", "records as they are learned: [learned], ~cut~"]
    for one in drawn:
        lines += [f"--- {one_line(one.where)}", *(record_text(pieces) for pieces in one.examples)]
    return "\n".join(lines)


def _counts(result: Audit) -> list[str]:
    lines = [f"{'template':<24}{result.template:>14}", f"{'max length':<24}{result.max_length:>14,}"]
    for name, value in result.counts.items():
        if name.startswith("padding"):
            lines.append(f"{name:<24}{value:>14.1%}")
        elif value or name != "system turns":
            lines.append(f"{name:<24}{value:>14,}")
    return lines


def _findings(findings: list[Finding]) -> list[str]:
    lines = list[str]()
    for changes, group in groupby(findings, key=lambda finding: finding.changes):
        lines.append("changes what is learned or measured" if changes else "worth knowing")
        for one in group:
            example = f"{one_line(one.where)}: {one.detail}" if one.where and one.detail else one.where or one.detail
            lines += _wrapped(f"{one.text} ({one.name})", "  * ")
            lines += _wrapped(example, "    ") if example else []
            lines += _wrapped(f"→ {one.remedy}", "    ")
    return lines or ["no findings"]


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def record_text(pieces: tuple[Piece, ...]) -> str:
    """Return the text of a record, what is learned of it in [ ], what is cut between ~ ~."""
    parts = list[str]()
    for state, group in groupby(pieces, key=lambda piece: piece.state):
        text = "".join(piece.text for piece in group)
        if len(text) > 1.2 * SHOWN:
            text = f"{text[: SHOWN // 2]} … (+{len(text) - SHOWN:,} characters) … {text[-SHOWN // 2 :]}"
        shown = "\n".join(visible(line, space=" ") for line in text.split("\n"))
        parts.append({"given": "{}", "learned": "[{}]", "cut": "~{}~"}[state].replace("{}", shown))
    return "".join(parts)
