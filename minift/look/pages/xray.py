"""Make the X-ray as a page: a text coloured by surprise. Pointing, tapping or the arrow keys show what was expected.

Every number comes from `look/explain.py`. The words are in the page as text. The numbers of each token are in the page
as data, which `xray.js` shows.

    minift explain "The capital of France is Paris." --model bundled --html xray.html
"""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from minift.look.explain import Entry, Position, XRay
from minift.look.pages.document import data, document, text
from minift.look.report import visible, xray_total

# A token whose nll is at least so much has the next colour: probabilities of 0.5, 0.2, 0.05, 0.01 and 0.001.
SURPRISE = (0.6931, 1.6094, 2.9957, 4.6052, 6.9078)
KEY = ("0.5 or more", "0.2 or more", "0.05 or more", "0.01 or more", "0.001 or more", "less")


def xray_page(xrays: Mapping[str, XRay]) -> str:
    """Return one page of one model's X-ray, or of two models' X-rays of the same text, side by side.

    Args:
        xrays: by the models' names.
    """
    one_text = len({tuple(at.token for at in xray.positions) for xray in xrays.values()}) == 1
    sides = "\n".join(_side(number, name, xray) for number, (name, xray) in enumerate(xrays.items()))
    key = " ".join(f'<span class="s{level}">{words}</span>' for level, words in enumerate(KEY))
    body = f"""<header>
<h1>Next-token X-ray</h1>
<p>At each token the model predicts the next one. A token's colour shows its probability for the model, given the
tokens before it. Underlined tokens are learned: they count in the loss. The others (a question) are only given.</p>
<p class="key">Probability: {key} <span class="learned-key">learned</span></p>
<p class="soft">Point at a token, tap it, or move with the arrow keys, to see what else the model expected.</p>
</header>
<main>
<div class="sides">
{sides}
</div>
<section id="panel" aria-live="polite" aria-label="The chosen token" tabindex="0">
<p class="soft">No token is chosen.</p></section>
<details id="all"><summary>All positions as a table</summary></details>
<noscript><p>The details of a token need JavaScript, which is switched off in this browser.</p></noscript>
</main>
{data("xrays", {"linked": one_text, "models": [_values(name, xray) for name, xray in xrays.items()]})}"""
    return document("Next-token X-ray", body, "xray.js")


def _side(number: int, name: str, xray: XRay) -> str:
    """Return one model's heading, total and coloured text."""
    documents = []
    several = len({(at.row, at.document) for at in xray.positions}) > 1
    for (row, which), group in groupby(xray.positions, key=lambda at: (at.row, at.document)):
        positions = list(group)
        where = f"Row {row + 1}, document {which + 1}" if several else "The text"
        heading = f'<p class="soft">{where}: its positions start at 0, and it sees no other.</p>' if several else ""
        first = f'<span class="start" aria-hidden="true">{_shown(xray.texts[positions[0].token])}</span>'
        tokens = "".join(_token(xray, at) for at in positions)
        label = f"{where}, token by token, as {text(name)} sees it"
        documents.append(
            f'{heading}<div class="text" role="listbox" aria-orientation="horizontal" aria-label="{label}">'
            f"{first}{tokens}</div>"
        )
    return (
        f'<section aria-labelledby="model{number}" data-model="{number}">\n<h2 id="model{number}">{text(name)}</h2>\n'
        f"<p>{text(xray_total(xray))}</p>\n{''.join(documents)}\n</section>"
    )


def _token(xray: XRay, at: Position) -> str:
    level = sum(at.nll >= bound for bound in SURPRISE)
    name = f"t s{level} learned" if at.learned else f"t s{level}"
    return (
        f'<span class="{name}" role="option" aria-selected="false" tabindex="-1">{_shown(xray.texts[at.next])}</span>'
    )


def _shown(token: str) -> str:
    """Return a token as part of the text: a space is a space, unless it is all there is; a line break is also shown."""
    return html.escape(visible(token, space=" " if token.strip(" ") else "▁").replace("⏎", "⏎\n"))


def _values(name: str, xray: XRay) -> dict[str, Any]:
    """Return what the script shows of a model: numbers, and the text of each id once."""
    number = {id: i for i, id in enumerate(xray.texts)}

    def entries(found: Sequence[Entry]) -> list[list[float]]:
        return [[number[entry.id], _short(entry.value)] for entry in found]

    return {
        "name": visible(name, space=" "),
        "texts": [visible(shown) for shown in xray.texts.values()],
        "positions": [
            [
                at.row + 1,
                at.document + 1,
                at.position,
                number[at.token],
                number[at.next],
                int(at.learned),
                round(at.nll, 6),
                at.rank,
                entries(at.likeliest),
                entries(at.gradient),
            ]
            for at in xray.positions
        ],
    }


def _short(value: float) -> float:
    """Round to four significant digits: all that a page shows, in a third of the bytes."""
    return float(f"{value:.4g}")
