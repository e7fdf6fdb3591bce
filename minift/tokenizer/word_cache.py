"""SentencePiece, faster: words that were met before are looked up.

SentencePiece cuts a text by merging the best neighbours again and again until no two pieces can be merged. Nearly all
the time of a data pipeline goes there, and nearly all of it is spent on the same words, over and over. But in a
vocabulary like Llama's a space occurs in a piece only at its beginning ("▁Mexico"; or alone, "▁▁"), and a line break
in none, so no merge ever crosses the border of a word. The pieces of a text are then those of its words, one after the
other, and those of a word can be kept in a table: the ids are the same, to the last one.

    "What is  new\n?"   →   " What" · " is" · "  new" · "\n" · "?"   →   their ids, joined

Of ten words of a text some nine have been met before, or stand in the same chunk of texts twice. `fits` says whether a
vocabulary is of that kind; where it is not, texts are encoded as a whole.

Measured by `python -m benchmarks data`. Read next: `data/records.py`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import sentencepiece

SPACE = "\u2581"  # "▁", as which a space stands in the vocabulary
TABLE_SIZE = 2**17  # words that are kept, some 25 MB: those met first, so the frequent ones are among them
TOGETHER = 300  # new words that are encoded as one text
LONGEST = 32  # characters of a word that is kept; longer ones are rarely met again

# Line breaks; a word with the spaces before it; spaces at a line's end.
_WORD = re.compile(r"\n+| *[^ \n]+| +")


class WordCache:
    """The ids of texts, by a table of words.

    Args:
        processor: of a vocabulary that `fits`.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self._processor = processor
        self._table: dict[str, bytes] = {}  # the ids of a word as int32: bytes are joined faster than lists
        self._break = processor.encode("\n")[-1]  # a byte's id, which stands for nothing else

    def encode(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        """The same ids as `processor.encode(texts)`, int32. Give it many texts: a call of SentencePiece is dear."""
        # SentencePiece adds that space, and takes "▁" itself for one.
        split = [_WORD.findall(" " + text.replace(SPACE, " ")) if text else [] for text in texts]
        new = list(set(chain.from_iterable(split)).difference(self._table))
        for start in range(0, len(new), TOGETHER):
            words = new[start : start + TOGETHER]
            self._table.update(zip(words, self._encode_words(words), strict=True))
        ids_of = self._table.__getitem__
        encoded = [np.frombuffer(b"".join(map(ids_of, words)), np.int32) for words in split]
        self._forget(new)
        return encoded

    def _encode_words(self, words: list[str]) -> list[bytes]:
        """The ids of each word as they are inside a text: all in one text, a line break before and behind each."""
        given = "\n" + "\n".join("" if word[0] == "\n" else word for word in words) + "\n"
        ids = np.array(self._processor.encode(given), np.int32)
        breaks = np.flatnonzero(ids == self._break).tolist()
        data = ids.tobytes()
        between = [data[4 * a + 4 : 4 * b] for a, b in pairwise(breaks)]
        line_break = np.array([self._break], np.int32).tobytes()
        return [
            line_break * len(word) if word[0] == "\n" else found for word, found in zip(words, between, strict=True)
        ]

    def _forget(self, new: list[str]) -> None:
        full = len(self._table) > TABLE_SIZE
        for word in new:
            if full or len(word) > LONGEST:
                del self._table[word]


def fits(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the pieces of a text are those of its words, by what the model file says.

    It takes a BPE vocabulary that adds a space in front of a text, changes nothing else in it, and has no piece, of any
    kind, in which a space follows another character, or with a line break.
    """
    try:
        return _fits(processor, _Message(processor.serialized_model_proto()))
    except _GroupError:
        return False


def _fits(processor: sentencepiece.SentencePieceProcessor, model: "_Message") -> bool:
    trainer, normalizer = (_Message(b"".join(model.all(number))) for number in (2, 3))
    # The numbers of the fields, and their values where the file says nothing, are those of sentencepiece_model.proto.
    as_llama = (
        trainer.number(3, 1) == 2  # model_type: BPE
        and not trainer.number(24, 0)  # treat_whitespace_as_suffix
        and not any(normalizer.all(2))  # precompiled_charsmap: nothing is replaced
        and normalizer.number(3, 1) == 1  # add_dummy_prefix
        and normalizer.number(4, 1) == 0  # remove_extra_whitespaces
        and normalizer.number(5, 1) == 1  # escape_whitespaces
    )
    line_break = processor.encode("\n")[-1:]
    return as_llama and processor.is_byte(line_break)[0] and not any(map(_crosses, model.all(1)))


def _crosses(content: bytes) -> bool:
    """Whether a piece, as the file has it, may be matched across the border of two words."""
    space = SPACE.encode()
    if content.find(space, 3) < 0 and b"\x18\x04" not in content and b"\n" not in content[2:]:  # by far the most
        return False
    piece = _Message(content)
    user_defined = piece.number(3, 1) == 4  # those are taken out of a text before anything is merged
    text = b"".join(piece.all(1)).decode()
    return user_defined or "\n" in text or SPACE in text.lstrip(SPACE)


class _Message:
    """The fields of a Protocol Buffers message: numbers and bytes, by the field's number.

    Source: protobuf.dev, "Encoding". (SentencePiece brings no reader that does without another package.)
    """

    def __init__(self, data: bytes):
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _wire(data):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[bytes]:
        return [value for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def number(self, number: int, otherwise: int) -> int:
        values = [value for value in self._fields.get(number, []) if isinstance(value, int)]
        return values[-1] if values else otherwise


class _GroupError(Exception):
    """A field of a kind that nobody writes any more, and whose end only its content tells."""


def _wire(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and the strings of bytes in a message. (There may be floats, too; they are passed over.)"""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise _GroupError
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if kind == 2:
            yield key >> 3, data[place : place + length]
        place += length
