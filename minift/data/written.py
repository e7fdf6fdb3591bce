"""Conversations → records again: in minift's own form, or as the text that a template makes of them.

What is written is read back as the same turns, and trains the same way.

    minift data format data/pairs.jsonl --template qa --out pairs-qa.jsonl
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minift.data.templates import MARKER, TEMPLATES, carried_template
from minift.errors import InputError
from minift.prompts import Chat, Conversation, Pair, Span, Template, Turn, has_answer


def record_of(conversation: Conversation, system: str = "") -> dict[str, Any]:
    """Return the record that is read as this conversation, with a system text if it has none."""
    if system and not conversation.system:
        if isinstance(conversation, Chat):
            conversation = replace(conversation, turns=(Turn("system", system), *conversation.turns))
        elif conversation.question:
            conversation = replace(conversation, system=system)
    more = {"metric": conversation.metric} if conversation.metric else {}
    if isinstance(conversation, Pair):
        if not conversation.question:
            return {"text": conversation.answer}
        for name in ("context", "system"):
            if value := getattr(conversation, name):
                more[name] = value
        return {"question": conversation.question, "answer": conversation.answer, **more}
    messages = [
        {"role": turn.role, "content": turn.text}
        | ({"weight": 0} if turn.role == "assistant" and not turn.learned else {})
        for turn in conversation.turns
    ]
    return {"messages": messages, **more}


def written(
    conversations: Sequence[Conversation], template: Template, as_text: bool
) -> tuple[list[dict[str, Any]], str]:
    """Return the records of conversations in a template, and in words how they are to be read.

    With `as_text` each is its whole text. Else each is what is given and what is learned: as a question and an answer,
    if `auto` then puts the template's own separator between them; otherwise with the separator and the end.

    Raises:
        InputError: as `Template.examples`; for a chat of several answers in a template that needs ids between them.
    """
    if not any(map(has_answer, conversations)):
        raise InputError("nothing is learned of these records, so that nothing would be written")
    if as_text:
        examples = [spans for conversation in conversations for spans in template.examples(conversation)]
        return [{"text": _text(spans)} for spans in examples], _rendered([span for spans in examples for span in spans])
    halves = [(given, learned, one) for one in conversations for given, learned in _halves(one, template)]
    metrics = [{"metric": one.metric} if one.metric else {} for _, _, one in halves]
    if all(_is_natural(*half) for half in halves):
        records = [{"question": given, "answer": one.answer} for given, _, one in halves]
        reading = ""
    else:
        records = [{"prompt": given, "completion": learned} for given, learned, _ in halves]
        spans = [span for one in conversations for example in template.examples(one) for span in example]
        reading = f"; train on it with --template joined{_rendered(spans).removeprefix('; train on it with')}"
    return [{**record, **metric} for record, metric in zip(records, metrics, strict=True)], reading


def _rendered(spans: Sequence[Span]) -> str:
    """Return how texts are to be read in which a template has written markers, in words; "" where it has not."""
    markers = any(MARKER.search(part) for span in spans for part in span.parts[::2])
    return "; train on it with --rendered" if markers else ""


def _halves(conversation: Conversation, template: Template) -> list[tuple[str, str]]:
    """Return, for each learned stretch of a conversation, all text before it, and its own."""
    halves = []
    for spans in template.examples(conversation):
        for place, span in enumerate(spans):
            if span.learned:
                halves.append((_text(spans[:place]), span.text))
    return halves


def _is_natural(given: str, learned: str, conversation: Conversation) -> bool:
    """Return whether `auto` reads what is given and the bare answer as this text."""
    if isinstance(conversation, Chat):
        return False
    natural = TEMPLATES["carried" if carried_template(given) else "plain"]
    pair = Pair(given, conversation.answer)
    ((question, answer),) = [(spans[0].text, spans[-1].text) for spans in natural.examples(pair)]
    return (question, answer) == (given, learned)


def _text(spans: Sequence[Span]) -> str:
    """Return the text of spans. Raise InputError where only ids could stand between two of them."""
    if any(span.bos for span in spans[1:]) or any(span.eos for span in spans[:-1]):
        raise InputError("a chat of several answers ends each with EOS in this template, which is no text; use chat")
    return "".join(span.text for span in spans)
