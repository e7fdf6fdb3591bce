"""What a chat template writes, and where in it the data's own text and the model's are, never by looking for them.

A text's places are found by writing characters into the conversation that are in no text of it, and by proving that the
text without them is the ordinary one. There are two uses:

* The template marks what the model writes: `{% generation %} … {% endgeneration %}`. One character is written before
  it, another after it.
* The data may spell the name of an added token, as in "What is <|im_end|>?". A character is written into each such
  name, so that it can be told from the template's own `<|im_end|>`, however the template moves and trims the data. A
  name that the template itself looks for in the data (`</think>`) is no longer found with a character in it: the text
  changes, and the name stays a marker.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from minift.errors import InputError, need, one_line
from minift.prompts import Turn

if TYPE_CHECKING:
    from minift.tokenizer.jinja import Renderer

Place: TypeAlias = tuple[int, int]  # a stretch of a text: its first character, and the one after its last

_PROBE = (Turn("user", "Seventeen"), Turn("assistant", "Thirty-nine"))
_WHERE = "a first question"


@dataclass
class ChatText:
    """A chat template, and what its tokenizer says.

    Attributes:
        source: the template.
        where: its file, for messages.
        names: those of the tokenizer's added tokens.
        variables: what the template sees by name, such as `bos_token`.
        rendered: whether markers in the data's text count, too.
        now: the time that a template may write. It is the same in all texts of one object.
    """

    source: str
    where: str
    names: tuple[str, ...]
    variables: dict[str, str]
    rendered: bool = False
    now: datetime = field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        self.names = tuple(sorted({name for name in self.names if name.strip()}, key=len, reverse=True))
        self.name = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")  # the longest first; or nothing
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def __getstate__(self) -> dict[str, Any]:  # a worker compiles the template itself
        return {name: value for name, value in self.__dict__.items() if name != "_renderer"}

    def render(self, turns: Sequence[Turn], where: str, prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        """Return the text of turns, as `apply_chat_template` of `transformers` gives it.

        Args:
            where: the conversation's `file:line`, for messages.
            prompt: whether to write what comes before the next answer.
            marks: what to write before and after each text that the template marks with `{% generation %}`.

        Raises:
            InputError: when the template refuses the turns, fails, or takes too long.
        """
        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if self.writes_parts else turn.text}
            for turn in turns
        ]
        return self._renderer.render(messages, prompt, where, marks)

    @property
    def starts(self) -> list[int] | None:
        """Return where each turn begins in the text that was rendered last, as `Renderer.starts` does."""
        return self._renderer.starts

    def ends_turn(self, text: str) -> bool:
        """Return whether a text ends in an added token, white space after it left out."""
        return text.rstrip().endswith(self.names)

    def marked(self, turns: Sequence[Turn], where: str, text: str) -> list[Place]:
        """Return the stretches of the turns' text that the template marks, neighbours joined.

        Raises:
            InputError: when it is not certain which they are.
        """
        before, after = self._unused(turns, 2)
        pieces = re.split(f"([{before}{after}])", self.render(turns, where, marks=(before, after)))
        if "".join(pieces[::2]) != text or pieces[1::2] != [before, after] * (len(pieces) // 4):
            raise InputError(
                f"{where}: the chat template {self.where} changes its text inside or around {{% generation %}}, "
                "so that it is not certain what of it is learned; use a template without this tag"
            )
        edges = list(accumulate(map(len, pieces[::2])))
        places = list[Place]()
        for start, end in zip(edges[:-1:2], edges[1::2], strict=True):
            if places and places[-1][1] == start:
                start, _ = places.pop()
            places.append((start, end))
        return [(start, end) for start, end in places if start < end]

    def data_names(self, turns: Sequence[Turn], where: str, text: str, prompt: bool = False) -> list[Place]:
        """Return the places in the turns' text where the data, not the template, spell names of added tokens.

        Raises:
            InputError: when the template changes such a name.
        """
        if self.rendered:
            return []
        found = {name for turn in turns for name in self.name.findall(turn.text)}
        if not found:
            return []
        places = self._spelled(turns, where, text, prompt, found)
        if places is not None:
            return places
        kept, looked_for = set[str](), set[str]()
        for name in sorted(found):
            is_kept = self._spelled(turns, where, text, prompt, {*kept, name}) is not None
            (kept if is_kept else looked_for).add(name)
        for other in looked_for:  # some templates look for two together: `<think>` and `</think>`
            if self._spelled(turns, where, text, prompt, {other}) is not None:
                pairs = {name for name in kept if self._spelled(turns, where, text, prompt, {name, other}) is None}
                kept -= {name for name in pairs if name in self.source}
        foreign = sorted(name for name in looked_for if name not in self.source)
        places = self._spelled(turns, where, text, prompt, kept)
        if places is None or foreign:
            raise InputError(
                one_line(
                    f"{where}: holds {', '.join(foreign or sorted(found))}, and the chat template {self.where} does "
                    "not write it as it is; take it out, or let it count as a marker (--rendered)"
                )
            )
        return places

    def _spelled(
        self, turns: Sequence[Turn], where: str, text: str, prompt: bool, names: set[str]
    ) -> list[Place] | None:
        """Return the places of names in a text that the data spell, or None where the template looks for them."""
        (inside,) = self._unused(turns, 1)

        def spelled(match: re.Match[str]) -> str:
            name = match.group()
            return name[0] + inside + name[1:] if name in names else name

        changed = [Turn(turn.role, self.name.sub(spelled, turn.text)) for turn in turns]
        try:
            pieces = self.render(changed, where, prompt).split(inside)
        except InputError:
            return None
        if "".join(pieces) != text:
            return None
        ends = list(accumulate(map(len, pieces)))[:-1]
        matches = [self.name.match(text, end - 1) for end in ends]
        return None if None in matches else [match.span() for match in matches if match]

    def _unused(self, turns: Sequence[Turn], count: int) -> list[str]:
        """Return characters of Unicode's private use area that are in no text."""
        texts = [self.source, *self.variables.values(), *(turn.text for turn in turns)]
        unused = (c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
        found = [c for c, _ in zip(unused, range(count), strict=False)]
        if len(found) < count:
            raise InputError("a conversation holds every character of Unicode's private use area")
        return found

    @cached_property
    def _renderer(self) -> "Renderer":
        need("jinja2", "chat", f"the chat template {self.where}")
        from minift.tokenizer.jinja import Renderer

        return Renderer(self.source, self.where, self.variables, self.now)

    # What a template does with every conversation ---------------------------------------------------------------------

    @cached_property
    def writes_parts(self) -> bool:
        """Return whether a message's content must be a list of parts, as templates for images have it.

        Raises:
            InputError: when the template writes the texts of turns neither from a list nor from a text.
        """
        failed: InputError | None = None
        for self.__dict__["writes_parts"] in (False, True):  # `render` asks for it
            try:
                text = self.render(_PROBE, _WHERE)
            except InputError as error:
                failed = failed or error
                continue
            if all(turn.text in text for turn in _PROBE):
                return bool(self.__dict__["writes_parts"])
        del self.__dict__["writes_parts"]
        raise failed or InputError(f"{self.where}: does not write the texts of a question and its answer")

    @cached_property
    def ending(self) -> str:
        """The text after an answer."""
        return self.render(_PROBE, _WHERE).rpartition(_PROBE[-1].text)[2]

    @cached_property
    def drops_system(self) -> bool:
        """Return whether the text of the system is left out, in silence."""
        turns = [Turn("system", "Eighty-one"), _PROBE[0]]
        try:
            return turns[0].text not in self.render(turns, _WHERE, prompt=True)
        except InputError:
            return False  # a conversation with such a text is refused in the template's own words
