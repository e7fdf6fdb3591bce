"""Where a chat template comes from, and what it sees besides the messages, as `transformers` has both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minift.errors import InputError, one_line
from minift.tokenizer.base import Tokenizer

# The newest way first. `transformers` reads the last only for models that see images.
SOURCES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
_DEFAULTS = {  # of the classes that have any, for a `tokenizer_config.json` without the names
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Return whether a chat template came with the tokenizer. Raises InputError for a damaged file."""
    files = tokenizer.files
    return SOURCES[0] in files or any(_json(files, name).get("chat_template") is not None for name in SOURCES[1:])


def chat_source(files: Mapping[str, bytes], path: str | None) -> tuple[str, str]:
    """Return the text of a chat template, and the name of its file.

    Args:
        files: the content of a tokenizer's files, by name.
        path: a `.jinja` file that is used instead.

    Raises:
        InputError: where there is none, or it cannot be read.
    """
    if path is not None:
        try:
            return _text(Path(path).read_bytes(), path), path
        except OSError as error:
            raise InputError(one_line(f"{path}: cannot be read: {error.strerror or error}")) from None
    found = find_chat_source(files)
    if found is None:
        raise InputError(
            f"the model's folder has no chat template ({', '.join(SOURCES)} were looked for); give a template of your "
            "own (--template FILE.jinja), or choose one of minift's (--template qa, llama2, llama3 …)"
        )
    return found


def chat_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names of the special tokens as a template sees them: `bos_token`, `eos_token`, …

    They are those that the files name. Without any such file they are the tokenizer's BOS and EOS.
    """
    files = tokenizer.files
    if "tokenizer_config.json" not in files and "special_tokens_map.json" not in files:
        bos, eos = tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id])
        return {"bos_token": bos, "eos_token": eos}
    values = _json(files, "tokenizer_config.json")
    values = {**_DEFAULTS.get(str(values.get("tokenizer_class")).removesuffix("Fast"), {}), **values}
    if "added_tokens_decoder" not in values:  # the older way
        values = {**values, **_json(files, "special_tokens_map.json")}
    more = values.get("extra_special_tokens")
    values = {**(more if isinstance(more, dict) else {}), **values}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in values.items()}
    return {name: token for name, token in tokens.items() if name.endswith("_token") and isinstance(token, str)}


def find_chat_source(files: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Return the text of the chat template in a tokenizer's files, and the name of its file; None where there is none.

    Raises:
        InputError: for a damaged file, or several templates without a default.
    """
    if SOURCES[0] in files:
        return _text(files[SOURCES[0]], SOURCES[0]), SOURCES[0]
    for name in SOURCES[1:]:
        value = _json(files, name).get("chat_template")
        if isinstance(value, list):
            value = _default(value, name)
        if isinstance(value, str):
            return value, name
        if value is not None:
            raise InputError(f"{name}: chat_template is of type {type(value).__name__}; it must be a text")
    return None


def _default(templates: list[Any], where: str) -> str:
    named = {
        entry["name"]: entry.get("template")
        for entry in templates
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    if not isinstance(named.get("default"), str):
        raise InputError(
            one_line(
                f"{where}: has the chat templates {', '.join(named) or '(none)'}, and none is the default; write the "
                "one to use into a file and give it (--template FILE.jinja)"
            )
        )
    return str(named["default"])


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(one_line(f"{where}: not UTF-8 text")) from None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(one_line(f"{name}: not valid JSON: {error}")) from None
    if not isinstance(values, dict):
        raise InputError(f"{name}: holds {type(values).__name__}, not a JSON object")
    return values
