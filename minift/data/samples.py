"""A record, token by token, as it trains: what is learned of it, what is given, and what is cut.

The states are read from the tensors of a batch, not from the template.

    minift data audit data/pairs.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from minift.config import TrainConfig
from minift.errors import InputError
from minift.pack import IGNORE, Example, collate, encode_spans
from minift.prompts import Conversation, Template, has_answer
from minift.tokenizer.base import Tokenizer

UNCUT = 2**40  # a length that cuts nothing


@dataclass(frozen=True)
class Piece:
    """A token of a sample: what it adds to the text, and what becomes of it ("given", "learned" or "cut")."""

    text: str
    state: str


@dataclass(frozen=True)
class Sample:
    """A record that is shown: the tokens of each of its examples, and the findings that it is an example of."""

    where: str
    findings: tuple[str, ...]
    examples: tuple[tuple[Piece, ...], ...]


def encode_twice(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, config: TrainConfig
) -> list[tuple[Example | None, Example | None]]:
    """Return the examples of a conversation, each before it is cut, and as it trains; None as `encode_conversation`."""
    if not has_answer(conversation):
        return [(None, None)]
    once, found = cast(Tokenizer, _Once(tokenizer)), list[tuple[Example | None, Example | None]]()
    for spans in template.examples(conversation, config.learn):
        uncut = encode_spans(spans, once, UNCUT)
        fits = uncut is not None and len(uncut) <= config.max_length
        found.append((uncut, uncut if fits else encode_spans(spans, once, config.max_length)))
    return found


class _Once:
    """A tokenizer that encodes each text once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: dict[tuple[Any, ...], list[int]] = {}

    def encode(self, parts: list[str], bos: bool = True, eos: bool = False) -> list[int]:
        key = (*parts, bos, eos)
        if key not in self._ids:
            self._ids[key] = self._tokenizer.encode(parts, bos, eos)
        return self._ids[key]

    def encode_continuation(self, parts: list[str], eos: bool = False, after: str = "") -> list[int]:
        key = (*parts, eos, after)
        if key not in self._ids:
            self._ids[key] = self._tokenizer.encode_continuation(parts, eos, after=after)
        return self._ids[key]


def sample(
    conversation: Conversation,
    findings: tuple[str, ...],
    template: Template,
    tokenizer: Tokenizer,
    config: TrainConfig,
) -> Sample:
    """Return a record token by token, as the tensors of its batch say what is learned."""
    try:
        encoded = encode_twice(conversation, template, tokenizer, config)
    except InputError:  # the template has no place for it
        encoded = []
    examples = [_pieces(uncut, example, tokenizer) for uncut, example in encoded if uncut is not None]
    if not examples:  # nothing of it trains: its text, as it is
        examples = [tuple(Piece(f"{turn.role}: {turn.text}\n", "cut") for turn in conversation.turns)]
    return Sample(conversation.where, findings, tuple(examples))


def _pieces(uncut: Example, example: Example | None, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    ids, states = list[int](), list[str]()
    if example is not None:
        batch = collate([example], tokenizer.eos_id, length=len(example), pack=False)
        ids, states = [int(batch.tokens[0, 0])], ["given"]
        following = (example.prompt + example.answer)[1:]
        for id, target in zip(following, batch.targets[0].tolist(), strict=True):
            ids.append(id)
            states.append("given" if target == IGNORE else "learned")
    left = (uncut.prompt + uncut.answer)[len(ids) :]
    return tuple(_text_pieces([*ids, *left], [*states, *["cut"] * len(left)], tokenizer))


def _text_pieces(ids: Sequence[int], states: Sequence[str], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the text of ids; those that are parts of one character are one piece."""
    waiting, begun = list[int](), False
    for place, (id, state) in enumerate(zip(ids, states, strict=True)):
        if id in (tokenizer.bos_id, tokenizer.eos_id) and not waiting:
            yield Piece(tokenizer.pieces([id])[0], state)
            continue
        waiting.append(id)
        text = tokenizer.decode_continuation(waiting) if begun else tokenizer.decode(waiting)
        ends = place + 1 == len(ids) or states[place + 1] != state or len(waiting) > 3
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not ends:
            continue
        yield Piece(text or "".join(tokenizer.pieces(waiting)), state)
        waiting, begun = [], True
