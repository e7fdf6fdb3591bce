"""Make the page of an audit: findings, counts, lengths, and records token by token as they train.

What becomes of a token is never said by colour alone: what is learned is underlined, what is cut is struck through.

    minift data audit data/pairs.jsonl --html audit.html
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from minift.data.audit import Audit
from minift.data.findings import Finding
from minift.data.samples import Piece, Sample
from minift.look.pages.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks
from minift.look.pages.document import document, table, text
from minift.look.report import visible

TOKENS = 160  # of a run of one kind that are shown; the middle of a longer one is left out
RUNS = 24  # of an example
EXAMPLES = 4  # of a record
CHARACTERS = 200  # of a piece
BARS = 32  # of the histogram
KEY = {
    "learned": "learned: it counts in the loss",
    "given": "given: the model reads it, and it does not count",
    "cut": "cut: it is never seen",
}


def audit_page(result: Audit, model: str) -> str:
    """Return the page of an audit.

    Args:
        model: the name of the model whose tokenizer made the tokens.
    """
    files = ", ".join(result.files[:4]) + (f" and {len(result.files) - 4:,} more" if len(result.files) > 4 else "")
    key = " ".join(f"<{_TAG[state]} class={state}>{words}</{_TAG[state]}>" for state, words in KEY.items())
    samples = "\n".join(_sample(number, sample) for number, sample in enumerate(result.samples))
    places = {name: number for number, one in reversed(list(enumerate(result.samples))) for name in one.findings}
    body = f"""<header>
<h1>What this data set teaches</h1>
<p>{text(files)}, with the tokenizer of {text(model)}, in the template {text(result.template)}, cut to
{result.max_length:,} tokens. All is counted of the ids and masks that train.</p>
</header>
<main>
<section>{_findings(result.findings, places)}</section>
<div class="sides">
<section><h2>Counts</h2>
{_counts(result.counts)}</section>
<section><h2>Lengths</h2>
{histogram(result.lengths, result.max_length)}</section>
</div>
<section><h2>Records</h2>
<p>The first record of each finding, then records that were drawn by the seed. A thin line ends each token.</p>
<p class="key">{key}</p>
{samples}</section>
</main>"""
    return document("What this data set teaches", body)


def _findings(findings: Sequence[Finding], places: Mapping[str, int]) -> str:
    if not findings:
        return '<h2>Findings</h2>\n<p class="good">None.</p>'
    parts = list[str]()
    for changes, group in groupby(findings, key=lambda finding: finding.changes):
        parts.append(f"<h2>{'Changes what is learned or measured' if changes else 'Worth knowing'}</h2>")
        cards = "".join(_card(one, places) for one in group)
        parts.append(f'<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _card(finding: Finding, places: Mapping[str, int]) -> str:
    number, _, words = finding.text.partition(" ")
    example = ": ".join(text(part) for part in (finding.where, finding.detail) if part)
    where = f'<p class="soft">{example}</p>' if example else ""
    shown = places.get(finding.name)
    link = f' <a href="#record{shown}">See the record.</a>' if shown is not None else ""
    return (
        f'<article class="card{" changes" if finding.changes else ""}"><h3>{text(finding.name)}</h3>'
        f"<p><strong>{text(number)}</strong> {text(words)}.</p>{where}"
        f"<p>{text(finding.remedy[:1].upper() + finding.remedy[1:])}.{link}</p></article>"
    )


def _counts(counts: Mapping[str, float]) -> str:
    rows = [
        (text(name), f"{value:.1%}" if name.startswith("padding") else f"{value:,}") for name, value in counts.items()
    ]
    return table(("what", "number"), rows, "Of all records of the files").replace("<td>", '<td class="n">')


# Lengths --------------------------------------------------------------------------------------------------------------


def histogram(lengths: Mapping[int, int], limit: int) -> str:
    """Return how many examples have how many tokens, as a chart with a line at `limit`."""
    if not lengths:
        return "<p>No example has a target.</p>"
    total = sum(lengths.values())
    reach = _at_most(lengths, 0.995 * total)
    end = max(limit * 1.2, reach) if limit <= 2 * reach else reach * 1.2
    xs = [tick for tick in ticks(0.0, end) if tick <= end]
    counts = [0] * BARS
    for length, count in lengths.items():
        counts[min(BARS - 1, int(BARS * length / end))] += count
    most, longest = max(counts), max(lengths)
    above = sum(count for length, count in lengths.items() if length > limit)
    ys = [tick for tick in ticks(0.0, float(most), about=4) if tick == int(tick)]

    def x_of(value: float) -> float:
        return LEFT + value / end * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - value / ys[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>' for y in ys]
    parts += [f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:,.0f}</text>' for y in ys]
    parts += [f'<text x="{x_of(x):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{x:,.0f}</text>' for x in xs]
    for place, count in enumerate(counts):
        left, right = x_of(place * end / BARS), x_of((place + 1) * end / BARS)
        if count:
            top = min(y_of(count), HEIGHT - BOTTOM - 1.0)  # one example is seen among a million
            parts.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
            )
    if limit <= end:
        at = x_of(limit)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens of an example, before it is cut'
        "</text>"
    )
    words = f"{above:,} of {total:,} examples are longer than {limit:,} tokens; the longest has {longest:,}"
    more = f" The last bar holds all from {(BARS - 1) * end / BARS:,.0f} on." if longest > end else ""
    line = f" The dashed line is at {limit:,} tokens." if limit <= end else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Lengths: {words}">{"".join(parts)}</svg>'
        f"<figcaption>{words}.{line}{more}</figcaption></figure>"
    )


def _at_most(lengths: Mapping[int, int], count: float) -> int:
    """Return the least length that `count` examples do not exceed."""
    for length in sorted(lengths):
        count -= lengths[length]
        if count <= 0:
            return length
    return max(lengths)


# Records --------------------------------------------------------------------------------------------------------------

_TAG = {"learned": "mark", "given": "span", "cut": "s"}


def _sample(number: int, sample: Sample) -> str:
    names = f' <span class="soft">{text(", ".join(sample.findings))}</span>' if sample.findings else ""
    texts = [f'<div class="text tokens" dir="auto">{"".join(_runs(one))}</div>' for one in sample.examples[:EXAMPLES]]
    left = len(sample.examples) - EXAMPLES
    more = f'<p class="soft">and {left:,} more examples</p>' if left > 0 else ""
    return (
        f'<article class="sample" id="record{number}"><h3>{text(sample.where)}{names}</h3>'
        f"{''.join(texts)}{more}</article>"
    )


def _runs(pieces: Sequence[Piece]) -> Iterator[str]:
    """Yield the tokens of an example, neighbours of one kind together."""
    runs = [(state, list(group)) for state, group in groupby(pieces, key=lambda piece: piece.state)]
    for state, run in runs[:RUNS]:
        left = len(run) - TOKENS
        parts = [run] if left <= 0 else [run[: TOKENS // 2], run[-TOKENS // 2 :]]
        texts = ["".join(f"<i>{_shown(piece.text)}</i>" for piece in part) for part in parts]
        middle = f' <span class="soft">… {left:,} more tokens …</span> '
        yield f"<{_TAG[state]} class={state}>{middle.join(texts)}</{_TAG[state]}>"
    if len(runs) > RUNS:
        yield f' <span class="soft">… {sum(len(run) for _, run in runs[RUNS:]):,} more tokens</span>'


def _shown(piece: str) -> str:
    """Return a piece as part of the text, a line break also as a sign."""
    short = piece if len(piece) <= CHARACTERS else f"{piece[:CHARACTERS]} … (+{len(piece) - CHARACTERS:,} characters)"
    return text(visible(short, space=" ").replace("⏎", "⏎\n"))
