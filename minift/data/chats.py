"""Messages → turns: a chat as data sets hold it, under the names of OpenAI's files or those of ShareGPT.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 0}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}

A content may also be a list of text parts. The assistant's turns are learned, except blank ones and those of weight 0.
Tools and pictures cannot be learned from text alone: a message that has them is refused by name.

    minift data format chats.jsonl
"""

import json
import re
from collections import Counter
from typing import Any

from minift.errors import InputError
from minift.prompts import Turn

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing", "bard", "bot"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_KEYS = (("role", "content"), ("from", "value"))  # of a message: who speaks, and what
_REFUSED = {
    "tool_calls": "tools",
    "function_call": "tools",
    "tool_call_id": "tools",
    "images": "pictures",
    "image": "pictures",
    "videos": "films",
    "audio": "sounds",
    "audios": "sounds",
}
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response")


def read_turns(messages: Any, where: str, unread: Counter[str] | None = None) -> tuple[Turn, ...]:
    """Return the turns of a list of messages; those of the assistant are learned.

    Args:
        where: the place of the list, for messages: file, line and key.
        unread: counts the keys of messages that hold something and are not read.

    Raises:
        InputError: for what is no list of messages, an unknown role, or a message with tools or pictures.
    """
    if isinstance(messages, str):  # the cell of a table
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise InputError(f"{where} is a text, and no list of messages in JSON: {error}") from None
    if not isinstance(messages, list) or not messages:
        state = "is empty" if messages == [] else f"is {type(messages).__name__}, not a list of messages"
        raise InputError(f"{where} {state}")
    turns = [_turn(message, f"{where}[{place}]", unread) for place, message in enumerate(messages)]
    return tuple(turns)


def _turn(message: Any, where: str, unread: Counter[str] | None) -> Turn:
    if not isinstance(message, dict):
        raise InputError(f"{where} is {type(message).__name__}, not a message: an object with role and content")
    known_as = keys_by_name(message)
    names = next((keys for keys in _KEYS if keys[0] in known_as and keys[1] in known_as), None)
    speaker, said = (known_as[name] for name in names) if names else ("", "")
    check_refused(message, where)
    if not speaker:
        known = " or ".join(map(" and ".join, _KEYS))
        raise InputError(f"{where}: no {known} in {sorted(message)}")
    name = message[speaker]
    role = _ROLE_OF.get(name.strip().lower(), "") if isinstance(name, str) else ""
    if not role:
        if name in _TOOL_ROLES:
            raise InputError(f"{where}: its role is {name!r}; minift does not learn the use of tools")
        known = ", ".join(name for names in ROLES.values() for name in names)
        raise InputError(f"{where}: its role is {name!r}; known: {known}")
    if unread is not None:
        unread.update(f"messages: {key}" for key in unread_keys(message, {speaker, said, "weight"}))
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise InputError(f"{where}: its weight is {weight!r}; known: 0 and 1")
    text = _text(message[said], f"{where}: its {said}")
    return Turn(role, text, learned=role == "assistant" and weight != 0 and text.strip() != "")


def _text(content: Any, where: str) -> str:
    """Return a content that is a text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} is {type(content).__name__}, not a text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where} holds a part of the type {kind!r}; minift learns from text alone")
        texts.append(text)
    return "".join(texts)


def keys_by_name(values: dict[str, Any]) -> dict[str, str]:
    """Return the keys of a record or a message by their names in small letters, and by themselves."""
    return {key.strip().lower(): key for key in reversed(values)} | {key: key for key in values}


def check_refused(values: dict[str, Any], where: str) -> None:
    """Raise InputError for a message or a record that comes with tools, pictures or sounds."""
    for key, kind in _REFUSED.items():
        if values.get(key):
            raise InputError(f"{where}: has {kind} ({key}), and minift learns from text alone")


# What tells one record from another, and changes nothing that could be learned.
HARMLESS = re.compile(
    r"(.*_)?(id|idx|index|uid|uuid|guid|hash|sources?|url|link|dataset|origin|(sub)?category|lang(uage)?|license|split)"
    r"|timestamp|date|time|(created|updated)(_at)?|model(_name)?|score|rating|tags?|meta(data)?"
    r"|num_(turns|tokens)|n_tokens|tokens?(_count)?|entity|relation"  # the last two: of the bundled pairs
)


_LEARNED = re.compile(r"(is_)?(train(able|ed|ing)?|learn(ed|able)?|mask(ed)?|loss|weight|ignore)")


def unread_keys(values: dict[str, Any], read: set[str]) -> list[str]:
    """Return the keys under which a record or a message holds something that is not read, and could change the task.

    A number or a truth value is only named where its key says that it is about what is learned.
    """
    return [
        key
        for key, value in values.items()
        if key not in read and not HARMLESS.fullmatch(key.strip().lower())
        if (isinstance(value, str | list | dict) and value and not str(value).isspace())
        or (isinstance(value, bool | int | float) and _LEARNED.fullmatch(key.strip().lower()))
    ]
