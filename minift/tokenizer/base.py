"""Text ⇄ ids: encode, decode, and train a new vocabulary.

A tokenizer cuts text into pieces that it knows by number. Two kinds are read: SentencePiece's `tokenizer.model`, here,
and Hugging Face's `tokenizer.json`, in `tokenizer/huggingface.py`. Llama's way has three habits that matter downstream:

* a space is part of the piece that follows it ("▁Mexico"), and a text's *first* piece gets such a space too, so
  that a word has the same id at the start of a text and inside it (Llama 3's byte-level pieces add none);
* a character without a piece falls back to its UTF-8 bytes (`<0x0A>` is the newline), so nothing is unknown;
* BOS and EOS are ids that no text can produce: `encode("<s>")` is three characters, not BOS. In a `tokenizer.json`
  there are *added* tokens too (`<|im_start|>`), which a text does produce, as chat templates need it; `special=False`
  is for text from strangers, in which they are only characters.

The added first space is why there are two ways to encode. `encode` is for a text that stands alone.
`encode_continuation` is for text that continues another text: nothing is added, so that
`ids(prompt) + continuation_ids(answer)` stands for exactly the characters `prompt + answer` (see `prompts.py`).

    minift tokenizer show "What is the capital of Mexico?"

Source: Kudo & Richardson, "SentencePiece" (arXiv 1808.06226). Read next: `tokenizer/word_cache.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.config import LlamaConfig
from minift.errors import InputError


class Tokenizer(ABC):
    """Text to ids and back, whatever the kind of vocabulary.

    Attributes:
        vocab_size: every id is below it.
        bos_id, eos_id: the ids that begin and end a document.
        files: the bytes of the tokenizer's files by name, so that every save can carry a copy.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    files: Mapping[str, bytes]
    _anchor: list[int]
    _adds_space: bool

    def _probe(self, where: str) -> None:
        """Find out how this vocabulary treats the start of a text. Raises InputError for one that changes texts."""
        # Text after this newline gets no added space, because it is not at the start. See `encode_continuation`.
        self._anchor = self._ids("\n", special=False)
        self._adds_space = self._ids("\na", special=False) != self._anchor + self._ids("a", special=False)
        if self._text(self._anchor) != "\n":
            raise InputError(f"{where}: drops line breaks; minift needs a tokenizer that keeps a text as it is")

    def encode(self, text: str, bos: bool = True, eos: bool = False, special: bool = True) -> list[int]:
        """The ids of a text that stands alone, with BOS in front and, if asked, EOS behind.

        Args:
            special: whether the name of a special token, such as `<|im_start|>`, stands for that token. (SentencePiece
                never takes a text so.)

        Raises:
            InputError: for a string that is not Unicode text (half a surrogate pair).
        """
        ids = self._checked_ids(text, special)
        if special and ids[:1] == [self.bos_id]:  # a chat's text may begin with the name of BOS: there is exactly one
            bos = False
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_continuation(self, text: str, eos: bool = False, special: bool = True) -> list[int]:
        """The ids of a text that continues another one: no BOS, and no space added in front.

        Where a space would be added, the text is encoded behind a newline, whose ids are then taken off again: newlines
        are byte pieces in Llama's vocabulary and never merge with what follows. Raises InputError as `encode`.
        """
        if not self._adds_space:
            return self._checked_ids(text, special) + [self.eos_id] * eos
        anchored = self._checked_ids("\n" + text, special)
        if anchored[: len(self._anchor)] != self._anchor:
            raise InputError("this tokenizer joins a line break with what follows it; minift cannot mask such a prompt")
        return anchored[len(self._anchor) :] + [self.eos_id] * eos

    def encode_documents(self, texts: Sequence[str]) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """The ids of many texts, each with BOS and EOS, and special tokens as characters: faster than one by one.

        Returns:
            ids: int32, those of all texts one behind the other.
            lengths: int64, of each text.

        Raises:
            InputError: as `encode`.
        """
        for text in texts:
            _check_unicode(text)
        encoded = self._many_ids(texts)
        bos, eos = np.array([self.bos_id], np.int32), np.array([self.eos_id], np.int32)
        return np.concatenate([part for ids in encoded for part in (bos, ids, eos)]), np.array(
            [len(ids) + 2 for ids in encoded]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that begin a text. BOS and EOS leave no trace. Raises InputError for an id out of range."""
        return self._text(self._text_ids(ids))

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The inverse of `encode_continuation`: a leading space is kept."""
        if not self._adds_space:
            return self.decode(ids)
        return self._text(self._anchor + self._text_ids(ids))[1:]

    @abstractmethod
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as they stand in the vocabulary, for people to look at ("▁" or "Ġ" is a space)."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @abstractmethod
    def _ids(self, text: str, special: bool) -> list[int]:
        """The ids of Unicode text, nothing added but what the vocabulary itself adds."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The text of ids that are in range."""

    def _many_ids(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        return [np.array(self._checked_ids(text, special=False), np.int32) for text in texts]

    def _checked_ids(self, text: str, special: bool) -> list[int]:
        _check_unicode(text)
        return self._ids(text, special)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise InputError(f"id {id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return [int(id) for id in ids]

    def _text_ids(self, ids: Sequence[int]) -> list[int]:
        return [id for id in self._checked(ids) if id not in (self.bos_id, self.eos_id)]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text is not Unicode: it holds bytes that are not UTF-8, or half a character") from None


class TextStream:
    """The text of ids that come one by one: shown as soon as it is certain, and never half a character.

    A character may be spread over several ids; until its last one has come, `add` returns the empty string. The parts
    joined are the text of the whole, leading space included. (Where ids end inside a character, a `tokenizer.json` with
    byte fallback gives up the whole run of bytes in `decode`; here the characters before it have been shown.)

        stream = TextStream(tokenizer)
        for id in generate.stream(model, prompt, 64):
            print(stream.add(id), end="", flush=True)
        print(stream.end())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def add(self, id: int) -> str:
        """The text that this id completes."""
        self._waiting.append(id)
        text = self._tokenizer.decode_continuation(self._waiting)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the start of a character, or (rarely) that character itself
            return ""
        self._waiting.clear()
        return text

    def end(self) -> str:
        """What was still waiting: empty, unless the text ends inside a character."""
        text = self._tokenizer.decode_continuation(self._waiting)
        self._waiting.clear()
        return text


def check_fit(shape: LlamaConfig, tokenizer: Tokenizer, exact: bool = False) -> None:
    """Raise InputError unless a tokenizer and a model belong together.

    The tokenizer must not know ids that the model lacks, and their BOS and EOS must be the same. A published model may
    have spare ids; where a model is made for a tokenizer (`exact`), it has as many.
    """
    if tokenizer.vocab_size > shape.vocab_size or (exact and tokenizer.vocab_size != shape.vocab_size):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model a vocabulary of {shape.vocab_size}: "
            "they do not fit"
        )
    if shape.bos_token_id != tokenizer.bos_id:
        raise InputError(
            f"the model's bos_token_id is {shape.bos_token_id}, the tokenizer's is {tokenizer.bos_id}: they do not fit"
        )
    if tokenizer.eos_id not in shape.eos_token_ids:
        raise InputError(
            f"the model's eos_token_id is {shape.eos_token_id}, the tokenizer's is {tokenizer.eos_id}: they do not fit"
        )
