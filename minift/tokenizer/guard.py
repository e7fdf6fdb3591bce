"""What a tokenizer.json may ask for."""

import json
import re
from collections.abc import Iterator
from typing import Any

from minift.errors import InputError

# What an expression of Oniguruma consists of, as far as it matters here: an escaped character (or a \p{…}), a class of
# characters (which may hold others), the borders of a group, a choice, a quantifier, any other character.
_PARTS = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[|\]|\((?:\?[^:=!>()]*[:=!>])?|\)|\||[*+?][?+]?|\{\d*,?\d*\}[?+]?|.", re.DOTALL
)
_ONCE = ("?", "??", "?+", "{1}", "{0,1}", "{,1}")


def _check_values(text: str, where: str) -> None:
    """Raise InputError for what the package takes, and then does not come back from, or breaks down over.

    The expressions `(a+)+` and `(a|aa)+` match a text of n letters in 2ⁿ ways, all of which are tried where a match
    fails in the end; and a decoder that strips the end of a text breaks down where it is shorter. No published
    tokenizer has such things; with a hostile one, some word of somebody's data would end a run.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return  # which the package refuses by itself
    for entry in _objects(values):
        pattern, count = entry.get("Regex"), entry.get("type") == "Strip" and entry.get("stop")
        if isinstance(pattern, str) and _repeats_what_varies(pattern):
            raise InputError(f"{where}: the expression {pattern!r} repeats a part that varies, and may never end")
        if count:
            raise InputError(f"{where}: its decoder strips {count!r} characters off a text's end, which may have none")


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    waiting: list[Any] = [[values]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            value = value.values()
        waiting.extend(inner for inner in value if isinstance(inner, dict | list))


def _repeats_what_varies(pattern: str) -> bool:
    """Whether a group that holds a choice or a quantifier has a quantifier itself, other than one that means once."""
    varies = [False]  # whether each open group does, the whole expression first
    in_class, closed = 0, False  # depth of classes; whether the last part was the end of a group that varies
    for part in _PARTS.findall(pattern):
        quantifier = part[0] in "*+?" or (part[0] == "{" and len(part) > 1)
        if in_class or part == "[":
            in_class += (part == "[") - (part == "]")
            closed = False
        elif part[0] == "(":
            varies.append(False)
            closed = False
        elif part == ")" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif quantifier:
            if closed and part not in _ONCE:
                return True
            varies[-1] |= part[0] != "{" or "," in part
        else:
            varies[-1] |= part == "|"
            closed = False
    return False
