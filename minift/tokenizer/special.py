"""Which ids are BOS, EOS and added tokens, and whether texts begin with BOS, by what a model's files say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minift.errors import InputError
from minift.values import read_json

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def special_ids(
    folder: Path, token_to_id: Callable[[str], int | None], default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return (BOS, EOS): the tokens that the folder names; without a name `default`; without that the model's ids.

    Raises:
        InputError: when no file says it, or a named token is not in the vocabulary.
    """
    found = named_ids(folder, token_to_id)
    configs = [read_json(file) for name in ("config.json", "minift.json") if (file := folder / name).is_file()]
    for position, kind in enumerate(("bos", "eos")):
        if default is not None:
            found.setdefault(kind, default[position])
        for values in configs:
            id = values.get(f"{kind}_token_id")
            id = id[0] if isinstance(id, list) and id else id
            if isinstance(id, int) and not isinstance(id, bool):
                found.setdefault(kind, id)
        if kind not in found:
            raise InputError(f"{folder}: no file says which token is {kind.upper()}; add tokenizer_config.json")
    return found["bos"], found["eos"]


def named_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
    """Return the ids of the tokens that a folder names as its "bos" and "eos", without those that it does not name.

    A name in `tokenizer_config.json` comes before one in `special_tokens_map.json`. Raises InputError for a token that
    is not in the vocabulary.
    """
    found: dict[str, int] = {}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        values = read_json(file) if file.is_file() else {}
        for kind in ("bos", "eos"):
            token = values.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str) or kind in found:
                continue
            id = token_to_id(token) if _is_unicode(token) else None
            if id is None:
                raise InputError(f"{file}: {kind}_token {token!r} is not in the vocabulary")
            found[kind] = id
    return found


def says_bos(folder: Path) -> bool:
    """Return whether a folder with a `tokenizer.model` begins a text with BOS: unless `add_bos_token` is false.

    That is the default of `LlamaTokenizer` in `transformers`. (A `tokenizer.json` says it in its post-processor.)
    Raises InputError for a value that is neither true nor false.
    """
    file = folder / "tokenizer_config.json"
    value = read_json(file).get("add_bos_token") if file.is_file() else None
    if value not in (None, True, False):
        raise InputError(f"{file}: add_bos_token is {value!r}; it must be true or false")
    return value is not False


def added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the tokens that a folder's files add to the vocabulary: by id, the name (`content`) and its flags.

    Raises:
        InputError: for a file that holds something else in their place.
    """
    tokens: dict[int, dict[str, Any]] = {}
    names, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if names.is_file():
        for name, id in read_json(names).items():
            if not isinstance(id, int) or isinstance(id, bool) or id < 0 or not name or not _is_unicode(name):
                raise InputError(f"{names}: {name!r} with id {id!r} is no added token")
            if id in tokens:
                raise InputError(f"{names}: {name!r} and {tokens[id]['content']!r} have the same id, {id}")
            tokens[id] = {"content": name}
    described = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    for id, entry in described.items() if isinstance(described, dict) else [(None, described)]:
        content = entry.get("content") if isinstance(entry, dict) else None
        named = isinstance(content, str) and content != "" and _is_unicode(content)
        if not isinstance(id, str) or not id.isdecimal() or not named:
            raise InputError(f"{config}: added_tokens_decoder has {id!r}: {entry!r}, which is no added token")
        tokens[int(id)] = {"content": content, **{flag: entry.get(flag) is True for flag in _FLAGS}}
    return tokens


def _is_unicode(name: str) -> bool:
    """Return whether a name can be that of a token: not if it holds half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
