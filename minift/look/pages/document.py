"""The skeleton of every page: one HTML file that carries its style and its script, and opens anywhere, offline.

What stands on a page comes from models and from users, so all of it goes through `text`, which leaves nothing for a
browser to obey. A policy in the page's head forbids requests besides: not even a picture may be fetched.

Read next: `xray.py`.
"""

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

# Nothing may be loaded, sent or framed; style and script are the page's own.
OWN = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
POLICY = f"default-src 'none'; {OWN}; base-uri 'none'; form-action 'none'"
JOINERS = "\u200c\u200d"  # invisible, but part of how scripts and emoji are written


def document(title: str, body: str, script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, with a `<main>` in it.
        script: the name of a script in this folder, to run when the page is there.
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
    """Words for a page: markup becomes characters, and characters that cannot be seen are spelled out."""
    shown = "".join(c if c.isprintable() or c in JOINERS or c == "\n" else _spelled(c) for c in str(value))
    return html.escape(shown)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table of cells that are HTML already; the first of each row names it. Wide ones scroll by themselves."""
    lines = [
        f'<p class="soft">{caption}</p><div class="wide" tabindex="0" role="region" aria-label="{caption}"><table>'
    ]
    lines.append("<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead><tbody>")
    for name, *cells in rows:
        lines.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def data(name: str, values: Any) -> str:
    """Values for the page's script, as an element that no browser runs. No text in them can end the element."""
    packed = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{packed}</script>'


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _file(name: str) -> str:
    return resources.files("minift.look.pages").joinpath(name).read_text(encoding="utf-8")
