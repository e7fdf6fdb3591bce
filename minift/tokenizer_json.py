"""Hugging Face's `tokenizer.json`: read through their package `tokenizers` (the `hf` extra), made from SentencePiece.

The file describes a whole pipeline: a normaliser, a first cut, the merges of a BPE vocabulary, added tokens, a decoder.
Llama 3 and SmolLM come with byte-level pieces, Llama 2's file reproduces SentencePiece. Here it is only run; which ids
are BOS and EOS is said by the files beside it (`special_ids`).

The other way round, `make_json` writes a SentencePiece BPE vocabulary as such a file, so that a model made here can be
loaded by tools that read no other. The result is held against SentencePiece, piece by piece, before it is given out.

Read next: `stream.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minift.config import read_json
from minift.errors import InputError
from minift.extras import need
from minift.tokenizer import SentencePieceTokenizer, Tokenizer

SPACE = "▁"


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` and the files that belong to it.

    Args:
        text: the content of that file.
        folder: where the files lie that say which tokens are BOS and EOS.
        files: the bytes of the tokenizer's files by name, for saving.

    Raises:
        InputError: for a damaged file, one that changes texts, unknown special tokens, or without the `hf` extra.
    """

    def __init__(self, text: str, folder: Path, files: Mapping[str, bytes]):
        tokenizers = need("tokenizers", "hf", f"{folder / 'tokenizer.json'}")
        where = str(folder / "tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing more precise
            raise InputError(f"{where}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # both may be left in the file by somebody's training run
        self._tokenizer.no_padding()
        self.text, self.files = text, dict(files)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = special_ids(folder, self._tokenizer.token_to_id)
        for name, id in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if not 0 <= id < self.vocab_size:
                raise InputError(f"{where}: {name} is id {id}, outside its vocabulary of {self.vocab_size}")
        self._probe(where)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as they stand in the vocabulary ("▁" or "Ġ" is a space)."""
        return [self._tokenizer.id_to_token(id) or "" for id in self._checked(ids)]

    def _ids(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special  # True: as the characters that they are
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


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
            id = token_to_id(token)
            if id is None:
                raise InputError(f"{file}: {kind}_token {token!r} is not in the vocabulary")
            found[kind] = id
    return found


def special_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> tuple[int, int]:
    """(BOS, EOS): the named tokens, or else the ids in the model's `config.json`.

    Raises:
        InputError: when neither says so, or a named token is not in the vocabulary.
    """
    found = named_ids(folder, token_to_id)
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for kind in ("bos", "eos"):
        id = values.get(f"{kind}_token_id")
        id = id[0] if isinstance(id, list) and id else id
        if isinstance(id, int) and not isinstance(id, bool):
            found.setdefault(kind, id)
        if kind not in found:
            raise InputError(f"{folder}: no file says which token is {kind.upper()}; add tokenizer_config.json")
    return found["bos"], found["eos"]


def added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that were added to a folder's vocabulary, by name: {"<|im_start|>": 32000}."""
    tokens: dict[str, int] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            tokens.update({str(name): int(id) for name, id in read_json(folder / "added_tokens.json").items()})
        if (folder / "tokenizer_config.json").is_file():
            described = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
            tokens.update({str(entry["content"]): int(id) for id, entry in described.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: its added tokens are not a table of names and ids ({error})") from None
    return tokens


def with_added_tokens(tokenizer: SentencePieceTokenizer, folder: Path, added: Mapping[str, int]) -> Tokenizer:
    """SentencePiece's vocabulary and the tokens that a folder adds behind it, as one tokenizer.

    Raises:
        InputError: for a table that is none, ids that do not follow the vocabulary's, or without the `hf` extra.
    """
    described = json.loads(make_json(tokenizer))
    behind = sorted((id, name) for name, id in added.items() if id >= tokenizer.vocab_size)
    for expected, (id, name) in enumerate(behind, start=tokenizer.vocab_size):
        if id != expected:
            raise InputError(f"{folder}: added token {name!r} has id {id}; the next free one is {expected}")
        described["added_tokens"].append(_added(id, name))
    return JsonTokenizer(json.dumps(described), folder, tokenizer.files)


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


def huggingface_files(tokenizer: Tokenizer) -> dict[str, str]:
    """What Hugging Face's tools need to read a tokenizer and what it does not have yet: texts by file name."""
    files: dict[str, str] = {}
    if "tokenizer.json" not in tokenizer.files:
        assert isinstance(tokenizer, JsonTokenizer | SentencePieceTokenizer)
        files["tokenizer.json"] = tokenizer.text if isinstance(tokenizer, JsonTokenizer) else make_json(tokenizer)
    if "tokenizer_config.json" not in tokenizer.files:
        bos, eos = tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id])
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # take tokenizer.json as it is
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
        }
        files["tokenizer_config.json"] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return files


def _added(id: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _hold_against(made: Any, tokenizer: SentencePieceTokenizer, pieces: list[str]) -> None:
    """Raise InputError unless both give the same ids for every piece's own text, alone and after a line break."""
    made.encode_special_tokens = True
    for piece in pieces:
        text = piece.replace(SPACE, " ")
        for probe in (text, f"\n{text} {text}"):
            if made.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe, bos=False):
                raise InputError(
                    f"this SentencePiece model cannot be written as a tokenizer.json: {probe!r} would get other ids"
                )
