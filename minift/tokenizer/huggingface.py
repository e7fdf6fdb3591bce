"""Hugging Face's `tokenizer.json`: read through their package `tokenizers` (the `hf` extra), made from SentencePiece.

The file describes a whole pipeline: a normaliser, a first cut, the merges of a BPE vocabulary, added tokens, a decoder.
Llama 3 and SmolLM come with byte-level pieces, Llama 2's file reproduces SentencePiece. Here it is only run; which ids
are BOS and EOS is said by the files beside it (`special_ids`).

The other way round, `make_json` writes a SentencePiece BPE vocabulary as such a file, so that a model made here can be
loaded by tools that read no other. The result is held against SentencePiece, piece by piece, before it is given out.

Read next: `data/stream.py`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import InputError
from minift.extras import need
from minift.tokenizer.base import SentencePieceTokenizer, Tokenizer
from minift.values import read_json

SPACE = "▁"


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` and the files that belong to it.

    Args:
        text: the content of that file.
        folder: where the files lie that say which tokens are BOS and EOS, and which were added.
        files: the bytes of the tokenizer's files by name, for saving.
        special: (BOS, EOS) where those files do not say.

    Raises:
        InputError: for a damaged file, one that changes texts, unknown special tokens, or without the `hf` extra.
    """

    def __init__(self, text: str, folder: Path, files: Mapping[str, bytes], special: tuple[int, int] | None = None):
        self._where = str(folder / "tokenizer.json")
        tokenizers = need("tokenizers", "hf", self._where)
        self.files = dict(files)
        _check_values(text, self._where)
        with _quiet(), _refusing(f"{self._where}: not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()  # both may be left in the file by somebody's training run
            self._tokenizer.no_padding()
            if hasattr(self._tokenizer.model, "dropout"):
                self._tokenizer.model.dropout = None  # and so may this, which makes ids random
            _add_tokens(self._tokenizer, added_tokens(folder), folder)
            self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            self.bos_id, self.eos_id = special_ids(folder, self._tokenizer.token_to_id, special)
            for name, id in (("BOS", self.bos_id), ("EOS", self.eos_id)):
                if not 0 <= id < self.vocab_size:
                    raise InputError(f"{self._where}: {name} is id {id}, outside its vocabulary of {self.vocab_size}")
            self._probe(self._where)

    @property
    def text(self) -> str:
        """What a `tokenizer.json` has to say to give the same ids, added tokens included."""
        text: str = self._tokenizer.to_str()
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as they stand in the vocabulary ("▁" or "Ġ" is a space)."""
        return [self._tokenizer.id_to_token(id) or "" for id in self._checked(ids)]

    def _ids(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special  # True: as the characters that they are
        with _refusing(f"{self._where}: cannot encode"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _text(self, ids: list[int]) -> str:
        with _refusing(f"{self._where}: cannot decode"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _check_values(text: str, where: str) -> None:
    """Raise InputError for what the package takes, and then does not come back from, or breaks down over.

    The expressions `(a+)+` and `(a|aa)+` match a text of n letters in 2ⁿ ways, all of which are tried where a match
    fails in the end; and a decoder that strips the end of a text breaks down where it is shorter. No published
    tokenizer has such things; with a hostile one, some word of somebody's data would end a run.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return  # which the package refuses by itself
    for entry in _objects(values):
        pattern, count = entry.get("Regex"), entry.get("type") == "Strip" and entry.get("stop")
        if isinstance(pattern, str) and _repeats_what_varies(pattern):
            raise InputError(f"{where}: the expression {pattern!r} repeats a part that varies, and may never end")
        if count:
            raise InputError(f"{where}: its decoder strips {count!r} characters off a text's end, which may have none")


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    waiting: list[Any] = [[values]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            value = value.values()
        waiting.extend(inner for inner in value if isinstance(inner, dict | list))


# What an expression of Oniguruma consists of, as far as it matters here: an escaped character (or a \p{…}), a class of
# characters (which may hold others), the borders of a group, a choice, a quantifier, any other character.
_PARTS = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[|\]|\((?:\?[^:=!>()]*[:=!>])?|\)|\||[*+?][?+]?|\{\d*,?\d*\}[?+]?|.", re.DOTALL
)
_ONCE = ("?", "??", "?+", "{1}", "{0,1}", "{,1}")


def _repeats_what_varies(pattern: str) -> bool:
    """Whether a group that holds a choice or a quantifier has a quantifier itself, other than one that means once."""
    varies = [False]  # whether each open group does, the whole expression first
    in_class, closed = 0, False  # depth of classes; whether the last part was the end of a group that varies
    for part in _PARTS.findall(pattern):
        quantifier = part[0] in "*+?" or (part[0] == "{" and len(part) > 1)
        if in_class or part == "[":
            in_class += (part == "[") - (part == "]")
            closed = False
        elif part[0] == "(":
            varies.append(False)
            closed = False
        elif part == ")" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif quantifier:
            if closed and part not in _ONCE:
                return True
            varies[-1] |= part[0] != "{" or "," in part
        else:
            varies[-1] |= part == "|"
            closed = False
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from stderr what a panic says there by itself: several lines, beside the one that it becomes."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the package raises in here is the file's fault. (It is written in Rust; a panic is no `Exception`.)"""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error}") from None


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


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _is_text(name: str) -> bool:
    """Whether a name can be a token's: not if it holds half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _add_tokens(tokenizer: Any, added: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Add what is not there yet, and make all added tokens special: `special=False` is to turn all of them off.

    Raises:
        InputError: for a token whose id is not the one that it would get.
    """
    tokenizers = need("tokenizers", "hf", str(folder))
    there = tokenizer.get_added_tokens_decoder()
    for token in there.values():
        token.special = True
    missing = {id: added[id] for id in sorted(added) if id not in there or there[id].content != added[id]["content"]}
    for token in [*there.values(), *(tokenizers.AddedToken(**token) for token in missing.values())]:
        tokenizer.add_special_tokens([token])
    for id, token in missing.items():
        found = tokenizer.token_to_id(token["content"])
        if found != id:
            raise InputError(f"{folder}: added token {token['content']!r} has id {id}; the vocabulary makes it {found}")


def with_added_tokens(tokenizer: SentencePieceTokenizer, folder: Path) -> Tokenizer:
    """SentencePiece's vocabulary and the tokens that a folder adds behind it, as one tokenizer.

    Raises:
        InputError: when their ids do not follow the vocabulary's, or without the `hf` extra.
    """
    special = tokenizer.bos_id, tokenizer.eos_id
    return JsonTokenizer(make_json(tokenizer), folder, tokenizer.files, special)


def make_json(tokenizer: SentencePieceTokenizer) -> str:
    """A SentencePiece BPE vocabulary as the text of a `tokenizer.json` that gives the same ids.

    The merges are not in SentencePiece's file, but they follow from it: a piece can be made of any two pieces that
    join to it, and the piece that comes first in the vocabulary is merged first.

    Raises:
        InputError: when the ids would differ (a unigram vocabulary, a normaliser), or without the `hf` extra.
    """
    tokenizers = need("tokenizers", "hf", "writing a tokenizer.json")
    processor, size = tokenizer.processor, tokenizer.vocab_size
    pieces = [processor.id_to_piece(id) for id in range(size)]
    kept = [processor.IsControl(id) or processor.IsUnknown(id) for id in range(size)]
    mergeable = {p: id for id, p in enumerate(pieces) if not kept[id] and not processor.IsByte(id)}
    merges = []
    for piece in sorted(mergeable, key=lambda piece: (-processor.GetScore(mergeable[piece]), mergeable[piece])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in mergeable and pair[1] in mergeable]
        merges += sorted(splits, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
    bos = pieces[tokenizer.bos_id]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.encode("a", bos=False) != [mergeable.get("a")] else []
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(id, piece) for id, piece in enumerate(pieces) if kept[id]],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    text = json.dumps(values, ensure_ascii=False)
    _hold_against(tokenizers.Tokenizer.from_str(text), tokenizer, list(mergeable))
    return text


def json_file(tokenizer: Tokenizer) -> dict[str, str]:
    """The `tokenizer.json` by which Hugging Face's tools can read a tokenizer that has none: text by file name."""
    if "tokenizer.json" in tokenizer.files:
        return {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"tokenizer.json": make_json(tokenizer)}
    assert isinstance(tokenizer, JsonTokenizer)
    return {"tokenizer.json": tokenizer.text}


def config_file(tokenizer: Tokenizer) -> dict[str, str]:
    """The `tokenizer_config.json` that names BOS and EOS, for a tokenizer that has none: text by file name."""
    if "tokenizer_config.json" in tokenizer.files:
        return {}
    bos, eos = tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id])
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # take tokenizer.json as it is
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer_config.json": json.dumps(values, indent=2, ensure_ascii=False) + "\n"}


def _added(id: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _hold_against(made: Any, tokenizer: SentencePieceTokenizer, pieces: list[str]) -> None:
    """Raise InputError unless both give the same ids for every piece's own text, alone and after a line break."""
    made.encode_special_tokens = True
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    texts += ["ﬁ ² Ａ Å", "e\u0301 \u3000 ABC", " a  b "]  # what a normaliser would change  # noqa: RUF001
    for text in texts:
        for probe in (text, f"\n{text} {text}"):
            if made.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe, bos=False):
                raise InputError(
                    f"this SentencePiece model cannot be written as a tokenizer.json: {probe!r} would get other ids"
                )
