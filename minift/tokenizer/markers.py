"""A template's markers, told apart from the same words in the data.

`tokenizers` finds the names of added tokens in all of a text, or in none of it. A text in which the data spells one, as
in "<|im_start|>user⏎What is <|im_end|>?<|im_end|>", is therefore cut at the template's own markers, and what is between
them is encoded without added tokens, as `tokenizers` itself cuts a text. Nearly all texts need no cut.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


class Markers:
    """The names of a tokenizer's added tokens.

    Args:
        tokenizer: the package's, all added tokens in it.
    """

    def __init__(self, tokenizer: Any):
        self._tokens = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # or what matches nothing

    @property
    def names(self) -> list[str]:
        """The names."""
        return list(self._tokens)

    def cut(self, parts: Sequence[str]) -> tuple[str, list[tuple[str, str]]] | None:
        """Cut a text at the added tokens that a template wrote in it.

        Args:
            parts: the text as `Template.parts` gives it: the template's own parts are at even places.

        Returns:
            The text before the first marker, and each marker with the text after it; None where no cut is needed,
            because only the template spells added tokens.
        """
        text, starts = "".join(parts), list(accumulate(map(len, parts), initial=0))
        own = [
            (starts[place] + match.start(), starts[place] + match.end())
            for place in range(0, len(parts), 2)
            for match in self._pattern.finditer(parts[place])
        ]
        if own == [match.span() for match in self._pattern.finditer(text)]:
            return None
        return self._cut(text, own)

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[str, str]]]:
        ends, starts = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
        texts = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        markers = [text[start:end] for start, end in spans]
        for place, marker in enumerate(markers):  # some tokens take the white space next to them
            if self._tokens[marker].lstrip:
                texts[place] = texts[place].rstrip()
            if self._tokens[marker].rstrip:
                texts[place + 1] = texts[place + 1].lstrip()
        return texts[0], list(zip(markers, texts[1:], strict=True))
