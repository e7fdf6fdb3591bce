"""Which ids are BOS, EOS and added tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minift.errors import InputError
from minift.values import read_json

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def named_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
    """The ids of the tokens that a folder names as its "bos" and "eos", as far as it does.

    `tokenizer_config.json` counts before `special_tokens_map.json`. Raises InputError for a token that is not in the
    vocabulary.
    """
    found: dict[str, int] = {}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        values = read_json(file) if file.is_file() else {}
        for kind in ("bos", "eos"):
            token = values.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str) or kind in found:
                continue
            id = token_to_id(token) if _is_text(token) else None
            if id is None:
                raise InputError(f"{file}: {kind}_token {token!r} is not in the vocabulary")
            found[kind] = id
    return found


def special_ids(
    folder: Path, token_to_id: Callable[[str], int | None], special: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(BOS, EOS): the named tokens; or else `special`; or else the ids in the model's config.

    Raises:
        InputError: when nothing says so, or a named token is not in the vocabulary.
    """
    found = named_ids(folder, token_to_id)
    configs = [read_json(file) for name in ("config.json", "minift.json") if (file := folder / name).is_file()]
    for place, kind in enumerate(("bos", "eos")):
        if special is not None:
            found.setdefault(kind, special[place])
        for values in configs:
            id = values.get(f"{kind}_token_id")
            id = id[0] if isinstance(id, list) and id else id
            if isinstance(id, int) and not isinstance(id, bool):
                found.setdefault(kind, id)
        if kind not in found:
            raise InputError(f"{folder}: no file says which token is {kind.upper()}; add tokenizer_config.json")
    return found["bos"], found["eos"]


def added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """The tokens that a folder's files add to the vocabulary: by id, the name (`content`) and how it is matched.

    Raises:
        InputError: for a table that does not say that.
    """
    tokens: dict[int, dict[str, Any]] = {}
    names, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if names.is_file():
        for name, id in read_json(names).items():
            if not isinstance(id, int) or isinstance(id, bool) or id < 0 or not name or not _is_text(name):
                raise InputError(f"{names}: {name!r} with id {id!r} is no added token")
            if id in tokens:
                raise InputError(f"{names}: {name!r} and {tokens[id]['content']!r} have the same id, {id}")
            tokens[id] = {"content": name}
    described = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    for id, entry in described.items() if isinstance(described, dict) else [(None, described)]:
        content = entry.get("content") if isinstance(entry, dict) else None
        named = isinstance(content, str) and content != "" and _is_text(content)
        if not isinstance(id, str) or not id.isdecimal() or not named:
            raise InputError(f"{config}: added_tokens_decoder has {id!r}: {entry!r}, which is no added token")
        tokens[int(id)] = {"content": content, **{flag: entry.get(flag) is True for flag in _FLAGS}}
    return tokens


def _is_text(name: str) -> bool:
    """Whether a name can be a token's: not if it holds half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
