"""Conversations → examples, all of a data set, and what becomes of those without a target.

examples, dropped = encode_conversations(pairs, template_named("qa"), tokenizer, max_length=256)
"""

from collections.abc import Callable, Iterable

from minift.errors import InputError
from minift.pack import Example, encode_conversation
from minift.prompts import Conversation, Template, has_answer
from minift.tokenizer.base import Tokenizer


def encode_conversations(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    learn: str = "all",
    refuse: Callable[[InputError], object] | None = None,
    what: str = "record",
) -> tuple[list[Example], int]:
    """Return the examples of all conversations, and how many were dropped because they have no target.

    Args:
        learn: "all" answers of a conversation, or only the "last".
        refuse: is told why a conversation has no place in the template; by default the first reason is raised.
        what: what a conversation is called, for the message.

    Raises:
        InputError: when no example is left.
    """
    found, examples, dropped, reason = list(conversations), list[Example](), 0, ""
    for conversation in found:
        try:
            encoded = encode_conversation(conversation, template, tokenizer, max_length, learn)
        except InputError as fault:
            if refuse is None:
                raise
            refuse(fault)
            reason = reason or str(fault)
            continue
        examples += [example for example in encoded if example is not None]
        dropped += encoded.count(None)
    if not examples:
        raise InputError(reason or f"no {what} has a target within max_length {max_length}; {_remedy(found)}")
    return examples, dropped


def _remedy(conversations: list[Conversation]) -> str:
    """Return what to do about records of which none has a target."""
    if any(map(has_answer, conversations)):
        return "raise it"
    return "none has an answer of the assistant that is not blank and not of weight 0"
