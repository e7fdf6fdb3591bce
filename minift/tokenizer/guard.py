"""What a `tokenizer.json` of unknown origin may not hold: parts on which the package `tokenizers` hangs or crashes."""

import json
import re
from collections.abc import Iterator
from typing import Any

from minift.errors import InputError

# The parts of a regular expression of Oniguruma, as far as they matter here: an escaped character (or a \p{…}), the
# ends of a class of characters (which may hold classes), the ends of a group, a choice, a quantifier, any other one.
_PARTS = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[|\]|\((?:\?[^:=!>()]*[:=!>])?|\)|\||[*+?][?+]?|\{\d*,?\d*\}[?+]?|.", re.DOTALL
)
_AT_MOST_ONCE = ("?", "??", "?+", "{1}", "{0,1}", "{,1}")


def check_pipeline(text: str, where: str) -> None:
    """Raise InputError for a `tokenizer.json` that the package accepts, and then never returns from, or crashes on.

    The expressions `(a+)+` and `(a|aa)+` match a text of n letters in 2ⁿ ways, and a match that fails in the end tries
    them all. A decoder that strips the end of a text crashes where the text is shorter. No published tokenizer has such
    parts; in a hostile one, some word of the user's data would end a run.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return  # the package refuses it
    for entry in _objects(values):
        pattern, count = entry.get("Regex"), entry.get("type") == "Strip" and entry.get("stop")
        if isinstance(pattern, str) and may_match_forever(pattern):
            raise InputError(f"{where}: the expression {pattern!r} repeats a part that varies, and may never end")
        if count:
            raise InputError(f"{where}: its decoder strips {count!r} characters off a text's end, which may be shorter")


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects in a JSON value, however deep."""
    waiting: list[Any] = [[values]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            value = value.values()
        waiting.extend(inner for inner in value if isinstance(inner, dict | list))


def may_match_forever(pattern: str) -> bool:
    """Return whether an expression repeats a group that holds a choice or a quantifier.

    Only such an expression can match one text in exponentially many ways. Quantifiers that mean "at most once" are
    harmless.
    """
    varies = [False]  # for each open group, whether it holds a choice or a quantifier; the first is the expression
    class_depth, closed = 0, False  # `closed`: the last part was the end of a group that varies
    for part in _PARTS.findall(pattern):
        quantifier = part[0] in "*+?" or (part[0] == "{" and len(part) > 1)
        if class_depth or part == "[":
            class_depth += (part == "[") - (part == "]")
            closed = False
        elif part[0] == "(":
            varies.append(False)
            closed = False
        elif part == ")" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif quantifier:
            if closed and part not in _AT_MOST_ONCE:
                return True
            varies[-1] |= part[0] != "{" or "," in part
        else:
            varies[-1] |= part == "|"
            closed = False
    return False
