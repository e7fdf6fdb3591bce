"""Hugging Face's `tokenizer.json`: read through their package `tokenizers` (the `hf` extra), made from SentencePiece.

The file describes a whole pipeline: a normaliser, a first cut, the merges of a BPE vocabulary, added tokens, a decoder.
Llama 3 and SmolLM come with byte-level pieces, Llama 2's file reproduces SentencePiece. Here it is only run; which ids
are BOS and EOS is said by the files beside it (`special_ids`).

The other way round, `make_json` writes a SentencePiece BPE vocabulary as such a file, so that a model made here can be
loaded by tools that read no other. The result is held against SentencePiece, piece by piece, before it is given out.

Read next: `data/stream.py`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import InputError, need
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.guard import _check_values
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from minift.tokenizer.special import added_tokens, special_ids


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
