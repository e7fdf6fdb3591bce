"""Make the skeleton of every page: one HTML file with its style and its script in it, which opens anywhere, offline.

The words on a page come from models and from users, so all of them go through `text`, which leaves no markup for a
browser to obey. In addition a policy in the page's head forbids all requests: not even a picture may be fetched.
"""

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

# Nothing may be loaded, sent or framed; style and script are in the page itself.
OWN = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
POLICY = f"default-src 'none'; {OWN}; base-uri 'none'; form-action 'none'"
JOINERS = "\u200c\u200d"  # invisible, but part of how scripts and emoji are written


def document(title: str, body: str, script: str = "") -> str:
    """Return a complete page.

    Args:
        title: plain text.
        body: HTML, with a `<main>` in it.
        script: the name of a script in this folder, which runs when the page is loaded; none if empty.
    """
    style = _file("page.css")
    code = f"<script>\n{_file(script)}</script>\n" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Return words for a page: markup becomes characters, and invisible characters are spelled out."""
    shown = "".join(c if c.isprintable() or c in JOINERS or c == "\n" else _spelled(c) for c in str(value))
    return html.escape(shown)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of cells that are HTML already. The first cell of a row names it. A wide table scrolls alone."""
    lines = [
        f'<p class="soft">{caption}</p><div class="wide" tabindex="0" role="region" aria-label="{caption}"><table>'
    ]
    lines.append("<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead><tbody>")
    for name, *cells in rows:
        lines.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def data(name: str, values: Any) -> str:
    """Return values for the page's script, as an element that no browser runs and no text in them can end."""
    packed = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{packed}</script>'


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _file(name: str) -> str:
    return resources.files("minift.look.pages").joinpath(name).read_text(encoding="utf-8")
