"""The model's own chat template: a conversation as text, and what of it is learned, by construction.

An instruct model comes with a Jinja template (`chat_template.jinja`, or a key of `tokenizer_config.json`), and every
other program prompts it through that. So minift renders the same text, and has to know which characters of it the model
would have written. It never looks for an answer in the text. There are two ways to know:

* The template marks it, `{% generation %} … {% endgeneration %}`. The places are those of two characters that are
  written around it and are in no text of the conversation; the text without them must equal the ordinary one.
* Otherwise by prefixes. P is the text of the turns before an answer with `add_generation_prompt`, which is what a model
  is given in use; F is the text up to the answer, included. P must be the beginning of F, and F that of the text in
  one; then the answer is the rest of F after P, with the token that ends its turn:

      P  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎
      F  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello.<|im_end|>⏎
      learned                                                Hello.<|im_end|>⏎

Some templates write earlier turns in another way once they are earlier: they drop their reasoning. Then each answer
becomes an example of its own, which ends with it: that is how the model was asked for it. A template whose P is not the
beginning of F, or that writes no token after an answer, is refused with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from minift.errors import InputError, need, one_line
from minift.prompts import Conversation, Pair, Span, Template, Turn
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat_files import chat_source, chat_variables, has_chat_template

if TYPE_CHECKING:
    from minift.tokenizer.jinja import Renderer

__all__ = ["ChatTemplate", "chat_template", "has_chat_template"]

_PROBE = (Turn("user", "Seventeen"), Turn("assistant", "Thirty-nine"))

Place = tuple[int, int]  # a stretch of a text: its first character, and the one after its last


def chat_template(tokenizer: Tokenizer, path: str | None = None, rendered: bool = False) -> "ChatTemplate":
    """Return the chat template that came with a tokenizer, or the one in a `.jinja` file.

    Args:
        path: the file of a template of your own, for this tokenizer.
        rendered: whether markers in the data's text count, too: somebody has written the data in a template already.

    Raises:
        InputError: where there is none, it is no template, or the `chat` extra is missing.
    """
    source, where = chat_source(tokenizer.files, path)
    names = tokenizer.marker_names or tuple(tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id]))
    template = ChatTemplate(source, where, names, chat_variables(tokenizer), rendered)
    if not tokenizer.marker_names:  # SentencePiece finds no names in a text
        template.bos, template.eos = names
    template.check()
    return template


@dataclass
class ChatTemplate(Template):
    """A chat template.

    Attributes:
        source: the template.
        where: its file, for messages.
        names: those of the tokenizer's added tokens. At least one of them ends a turn.
        variables: what the template sees by name, such as `bos_token`.
        rendered: whether markers in the data's text count, too.
        bos, eos: the names of these tokens, where they must be asked for instead of being written in the text.
        now: the time that a template may write. It is the same in all texts of one object.
    """

    source: str
    where: str
    names: tuple[str, ...]
    variables: dict[str, str]
    rendered: bool = False
    bos: str = ""
    eos: str = ""
    now: datetime = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.now = self.now or datetime.now()
        longest_first = sorted({name for name in self.names if name.strip()}, key=len, reverse=True)
        self._name = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def __getstate__(self) -> dict[str, Any]:  # a worker compiles the template itself
        return {name: value for name, value in self.__dict__.items() if name != "_renderer"}

    def check(self) -> None:
        """Raise InputError unless this is a template that writes the texts of turns."""
        _ = self._ending

    # Examples ---------------------------------------------------------------------------------------------------------

    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return one text of all turns up to the last that is learned, or one for each of these.

        Raises:
            InputError: with `file:line`, for a conversation that the template refuses, or fails on, or where it is not
                certain what of its text is learned.
        """
        turns, where = self._turns(conversation)
        learned = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
        if not learned:
            return [self._spans(turns, where, [])]
        learned = learned if learn == "all" else learned[-1:]
        turns = turns[: learned[-1] + 1]
        prompts = {place: self._render(turns[:place], where, prompt=True) for place in learned}
        texts = {place: self._render(turns[: place + 1], where) for place in learned}
        for place in learned:
            if not texts[place].startswith(prompts[place]):
                raise InputError(one_line(f"{where}: {self._unproven(prompts[place], texts[place])}"))
        if self._marks_answers:
            return self._marked_examples(turns, where, prompts, texts)
        stretches = [
            (len(prompts[place]), self._end(prompts[place], texts[place], texts[learned[-1]])) for place in learned
        ]
        if all(end for _, end in stretches):
            return [self._spans(turns, where, stretches)]
        return [self._spans(turns[: place + 1], where, [(len(prompts[place]), len(texts[place]))]) for place in learned]

    def prompt(self, conversation: Conversation) -> list[Span]:
        """Return what a model is given that is to answer the last question: in training the same comes before it."""
        turns, where = self._turns(conversation)
        return self._spans(self._before_answer(conversation, turns), where, [], prompt=True)

    def answer_parts(self, conversation: Conversation) -> list[str]:
        """Return the parts of the last answer, as it follows its prompt, without what ends its turn."""
        turns, where = self._turns(conversation)
        before = self._before_answer(conversation, turns)
        turns = (*before, Turn("assistant", conversation.answer))
        prompt, text = self._render(before, where, prompt=True), self._render(turns, where)
        if not text.startswith(prompt):
            raise InputError(one_line(f"{where}: {self._unproven(prompt, text)}"))
        end = len(text.removesuffix(self._ending))
        return self._parts(text, self._data_names(turns, where, text), (len(prompt), max(len(prompt), end)))

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the tokens that end a turn of the assistant.

        Raises:
            InputError: when the template ends a turn with no token of the tokenizer.
        """
        names = list(dict.fromkeys(self._name.findall(self._ending)))
        ids = [tokenizer.eos_id] if self.eos in names and self.eos else []
        for name in names:
            if name not in (self.bos, self.eos):
                ids += tokenizer.encode(name, bos=False)[:1]
        if not ids:
            raise InputError(one_line(f"{self.where}: {self._unended(self._ending)}"))
        return ids

    def _turns(self, conversation: Conversation) -> tuple[Sequence[Turn], str]:
        where = conversation.where or "a conversation"
        if not conversation.turns:
            raise InputError(f"{where}: has no turns")
        if self._drops_system and any(turn.role == "system" and turn.text.strip() for turn in conversation.turns):
            raise InputError(f"{where}: has a system text, and the chat template {self.where} does not write it")
        return conversation.turns, where

    def _before_answer(self, conversation: Conversation, turns: Sequence[Turn]) -> Sequence[Turn]:
        before = turns[:-1] if isinstance(conversation, Pair) else conversation.until_answer()
        if not before:
            raise InputError(f"{conversation.where or 'a conversation'}: nothing comes before its answer")
        return before

    # Which characters are learned -------------------------------------------------------------------------------------

    def _end(self, prompt: str, text: str, whole: str) -> int:
        """Return where a turn ends in the text in one, or 0 where that writes it in another way than its own text."""
        if not whole.startswith(prompt):
            return 0
        if whole.startswith(text):
            return len(text)
        # A template may write EOS at the end of a text, whatever turn is the last.
        shorter = text.removesuffix(self.variables.get("eos_token", ""))
        ends = self._ends_turn(shorter[len(prompt) :])
        return len(shorter) if ends and whole.startswith(shorter) else 0

    def _marked_examples(
        self, turns: Sequence[Turn], where: str, prompts: dict[int, str], texts: dict[int, str]
    ) -> list[list[Span]]:
        """Return the examples of a template that says itself what the model writes."""
        learned, whole = list(prompts), texts[len(turns) - 1]
        starts = {
            place: len(prompts[place] if place in prompts else self._render(turns[:place], where, prompt=True))
            for place, turn in enumerate(turns)
            if turn.role == "assistant"
        }
        of_turn: dict[int, list[Place]] = {place: [] for place in starts}
        marked = self._marked(turns, where, whole)
        for start, end in marked:
            turn = max((place for place in starts if starts[place] < end), default=None)
            if turn is not None:
                of_turn[turn].append((start, end))
        in_one = all(
            of_turn[place]
            and whole.startswith(prompts[place])
            and texts[place].startswith(whole[: of_turn[place][-1][1]])
            for place in learned
        )
        if not marked:
            raise InputError(f"{where}: the chat template {self.where} marks nothing of it with {{% generation %}}")
        if in_one:
            stretches = [piece for place in learned for piece in _cut(of_turn[place], starts[place])]
            return [self._spans(turns, where, stretches)]
        examples = []
        for place in learned:
            own = [
                (start, end)
                for start, end in self._marked(turns[: place + 1], where, texts[place])
                if end > len(prompts[place])
            ]
            examples.append(self._spans(turns[: place + 1], where, _cut(own, len(prompts[place]))))
        return examples

    def _marked(self, turns: Sequence[Turn], where: str, text: str) -> list[Place]:
        """Return the stretches of a text that the template marks, neighbours joined."""
        before, after = self._unused(turns, 2)
        marked = self._render(turns, where, marks=(before, after))
        pieces = re.split(f"([{before}{after}])", marked)
        if "".join(pieces[::2]) != text or pieces[1::2] != [before, after] * (len(pieces) // 4):
            raise InputError(
                f"{where}: the chat template {self.where} changes its text inside or around {{% generation %}}, "
                "so that it is not certain what of it is learned; use a template without this tag"
            )
        ends = [0]
        for piece in pieces[::2]:
            ends.append(ends[-1] + len(piece))
        places = list[Place]()
        for start, end in zip(ends[1:-1:2], ends[2:-1:2], strict=True):
            if places and places[-1][1] == start:
                start = places.pop()[0]
            places.append((start, end))
        return [place for place in places if place[0] < place[1]]

    def _unproven(self, prompt: str, text: str) -> str:
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(map(len, (prompt, text)))
        )
        return (
            f"the chat template {self.where} asks for an answer with {prompt[same:][:80]!r}, and writes the same "
            f"answer after {text[max(0, same - 40) : same]!r} without it; what is learned would never follow what the "
            "model is asked with. Use a template of your own (--template FILE.jinja), or one of minift's"
        )

    def _unended(self, text: str) -> str:
        return (
            f"the chat template {self.where} ends the assistant's turn with {text[-40:]!r}, which is no token of the "
            "tokenizer: a model that learns it never stops. Use a template of your own (--template FILE.jinja), or one "
            "of minift's"
        )

    def _ends_turn(self, text: str) -> bool:
        text = text.rstrip()
        return any(text.endswith(name) for name in self.names if name.strip())

    # Texts ------------------------------------------------------------------------------------------------------------

    def _spans(self, turns: Sequence[Turn], where: str, learned: Sequence[Place], prompt: bool = False) -> list[Span]:
        """Return a text in spans, those at the places `learned` learned. Raise InputError where one ends no turn."""
        text = self._render(turns, where, prompt=prompt)
        names = self._data_names(turns, where, text, prompt)
        learned = sorted(learned)
        for (start, end), after in zip(learned, [*learned[1:], (len(text) + 1, 0)], strict=True):
            if end != after[0] and not self._ends_turn(text[start:end]):
                raise InputError(one_line(f"{where}: {self._unended(text[start:end])}"))
        edges = sorted({0, len(text), *(edge for place in learned for edge in place)})
        spans = [Span(self._parts(text, names, place), learned=place in set(learned)) for place in pairwise(edges)]
        return [part for span in spans for part in self._with_flags(span)] if self.bos or self.eos else spans

    def _with_flags(self, span: Span) -> list[Span]:
        """Return a span in pieces that begin with BOS and end with EOS where their names are in the template's text."""
        spans, parts, bos = list[Span](), list[str](), False
        for place, part in enumerate(span.parts):
            if place % 2:
                parts.append(part)
                continue
            pieces = self._name.split(part)
            names = [*self._name.findall(part), ""]
            for number, (piece, name) in enumerate(zip(pieces, names, strict=True)):
                parts = [*parts, piece] if number == 0 or not parts else parts
                if name == self.bos and name:
                    if any(parts) or bos:
                        spans.append(Span(parts, span.learned, bos))
                    parts, bos = [], True
                elif name:
                    spans.append(Span(parts, span.learned, bos, eos=True))
                    parts, bos = [], False
        return [*spans, Span(parts, span.learned, bos)] if any(parts) or bos else spans

    def _parts(self, text: str, names: Sequence[Place], place: Place) -> list[str]:
        """Return a stretch of a text in parts, at odd places the names of added tokens that the data spell."""
        start, end = place
        inside = [name for name in names if start <= name[0] and name[1] <= end]
        edges = [start, *(edge for name in inside for edge in name), end]
        return [text[a:b] for a, b in pairwise(edges)]

    def _data_names(self, turns: Sequence[Turn], where: str, text: str, prompt: bool = False) -> list[Place]:
        """Return the places in a text where the data, not the template, spell names of added tokens.

        A character that is in no text is written into each of these names. Where the text without it is the ordinary
        one, its places are theirs. A name that the template itself looks for in the data (`</think>`) stays a marker.
        """
        found = {name for turn in turns for name in self._name.findall(turn.text)}
        if self.rendered or not found:
            return []
        (spell,) = self._unused(turns, 1)
        places = self._spelled(turns, where, text, prompt, spell, found)
        if places is None:
            looked_for = {name for name in found if self._spelled(turns, where, text, prompt, spell, {name}) is None}
            places = self._spelled(turns, where, text, prompt, spell, found - looked_for)
            foreign = [name for name in looked_for if name not in self.source]
            if places is None or foreign:
                raise InputError(
                    one_line(
                        f"{where}: holds {', '.join(sorted(foreign or found))}, and the chat template {self.where} "
                        "does not keep it as it is; take it out, or let it count as a marker (--rendered)"
                    )
                )
        return places

    def _spelled(
        self, turns: Sequence[Turn], where: str, text: str, prompt: bool, spell: str, names: set[str]
    ) -> list[Place] | None:
        """Return the places of names in a text that the data spell, or None where the template looks for them."""

        def spelled(match: re.Match[str]) -> str:
            name = match.group()
            return name[0] + spell + name[1:] if name in names else name

        changed = [Turn(turn.role, self._name.sub(spelled, turn.text)) for turn in turns]
        try:
            pieces = self._render(changed, where, prompt=prompt).split(spell)
        except InputError:
            return None
        if "".join(pieces) != text:
            return None
        places, end = list[Place](), 0
        for piece in pieces[:-1]:
            end += len(piece)
            match = self._name.match(text, end - 1)
            if match is None:
                return None
            places.append(match.span())
        return places

    def _unused(self, turns: Sequence[Turn], count: int) -> list[str]:
        """Return characters that are in no text."""
        used = set("".join([self.source, *self.variables.values(), *(turn.text for turn in turns)]))
        return [c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used][:count]

    def _render(
        self, turns: Sequence[Turn], where: str, prompt: bool = False, marks: tuple[str, str] = ("", "")
    ) -> str:
        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if self._writes_parts else turn.text}
            for turn in turns
        ]
        return self._renderer.render(messages, prompt, where, marks)

    @cached_property
    def _renderer(self) -> "Renderer":
        need("jinja2", "chat", f"the chat template {self.where}")
        from minift.tokenizer.jinja import Renderer

        return Renderer(self.source, self.where, self.variables, self.now)

    # What a template does with every conversation ---------------------------------------------------------------------

    @cached_property
    def _writes_parts(self) -> bool:
        """Return whether a message's content must be a list of parts, as templates for images have it."""
        self._writes_parts = False
        try:
            if all(turn.text in self._render(_PROBE, "a first question") for turn in _PROBE):
                return False
            failed = InputError(one_line(f"{self.where}: does not write the texts of a question and its answer"))
        except InputError as error:
            failed = error
        self._writes_parts = True
        try:
            if all(turn.text in self._render(_PROBE, "a first question") for turn in _PROBE):
                return True
        except InputError:
            pass
        del self._writes_parts
        raise failed

    @cached_property
    def _ending(self) -> str:
        """The text after an answer."""
        return self._render(_PROBE, "a first question").rpartition(_PROBE[-1].text)[2]

    @cached_property
    def _drops_system(self) -> bool:
        turns = [Turn("system", "Eighty-one"), Turn("user", "Seventeen")]
        try:
            return turns[0].text not in self._render(turns, "a first question", prompt=True)
        except InputError:
            return False  # a conversation with a system text is refused in the template's own words

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the tokens that end its turns."""
        return []


def _cut(places: Sequence[Place], at: int) -> list[Place]:
    """Return stretches, one that goes on across a place cut there: what is encoded apart in use is so in training."""
    return [
        piece for start, end in places for piece in ([(start, at), (at, end)] if start < at < end else [(start, end)])
    ]
