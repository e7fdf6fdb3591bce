r"""SentencePiece, faster: the ids of a word that was met before are looked up in a table.

SentencePiece merges the best neighbours again and again. That is most of the time in which pages become ids, and most
of it is spent on the same words. But in a vocabulary such as Llama's, a space is only at the beginning of a piece
("▁Mexico", "▁▁"), and no piece holds a line break, so no merge ever crosses the border of a word. The ids of a text are
then the ids of its words, one word after the other, and each word needs SentencePiece only once:

    "What is  new\n?"   →   " What" · " is" · "  new" · "\n" · "?"   →   their ids, joined

The plain twin is `SentencePieceProcessor.encode`: the ids are the same, to the last one. `merges_stay_in_words` says
whether a vocabulary is of that kind; if it is not, SentencePiece gets the texts themselves. Of ten words of a text,
about nine are in the table or stand in the same call twice.

Measured by `python -m benchmarks data`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
import sentencepiece
from numpy.typing import NDArray

SPACE = "\u2581"  # "▁", which SentencePiece writes for a space
TABLE_SIZE = 2**17  # words in the table, about 25 MB: the first ones met, and the frequent words are among them
WORDS_PER_CALL = 300  # new words that SentencePiece gets as one text, because each call of it takes time
LONGEST_WORD = 32  # characters of a word in the table; longer words are rarely met again

# Line breaks; a word with the spaces before it; spaces at the end of a line.
_WORD = re.compile(r"\n+| *[^ \n]+| +")


class WordCache:
    """The ids of texts, by a table of words.

    Args:
        processor: one with a vocabulary for which `merges_stay_in_words`.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self._processor = processor
        self._table: dict[str, bytes] = {}  # the ids of a word as int32: bytes are joined faster than lists
        self._line_break = processor.encode("\n")[-1]  # the id of a byte, which is part of no other character

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, those of `processor.encode(texts)`. One call for many texts is faster."""
        # SentencePiece adds the space before a text itself, and reads "▁" as a space.
        split = [_WORD.findall(" " + text.replace(SPACE, " ")) if text else [] for text in texts]
        new = list(set(chain.from_iterable(split)).difference(self._table))
        for start in range(0, len(new), WORDS_PER_CALL):
            words = new[start : start + WORDS_PER_CALL]
            self._table.update(zip(words, self._encode_words(words), strict=True))
        ids_of = self._table.__getitem__
        encoded = [np.frombuffer(b"".join(map(ids_of, words)), np.int32) for words in split]
        self._limit_table(new)
        return encoded

    def _encode_words(self, words: list[str]) -> list[bytes]:
        """Return the ids of each word inside a text: all are encoded as one text, with line breaks between them."""
        text = "\n" + "\n".join("" if word[0] == "\n" else word for word in words) + "\n"
        ids = np.array(self._processor.encode(text), np.int32)
        breaks = np.flatnonzero(ids == self._line_break).tolist()
        data = ids.tobytes()
        between = [data[4 * a + 4 : 4 * b] for a, b in pairwise(breaks)]
        line_break = np.array([self._line_break], np.int32).tobytes()
        return [
            line_break * len(word) if word[0] == "\n" else found for word, found in zip(words, between, strict=True)
        ]

    def _limit_table(self, new: list[str]) -> None:
        full = len(self._table) > TABLE_SIZE
        for word in new:
            if full or len(word) > LONGEST_WORD:
                del self._table[word]


def merges_stay_in_words(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether the ids of a text are those of its words, by what the model file says.

    They are in a BPE vocabulary that adds a space before a text, changes nothing else in it, and has no piece, of any
    kind, with a line break or with a space after another character.
    """
    line_break = processor.encode("\n")[-1:]
    try:
        model = _Message(processor.serialized_model_proto())
        crossing = any(map(_crosses_words, model.strings(1)))
        return processor.is_byte(line_break)[0] and _has_llamas_settings(model) and not crossing
    except _GroupError:
        return False


def _has_llamas_settings(model: "_Message") -> bool:
    trainer, normalizer = (_Message(b"".join(model.strings(number))) for number in (2, 3))
    # The fields' numbers, and their values where the file leaves them out, are those of sentencepiece_model.proto.
    return (
        trainer.integer(3, default=1) == 2  # model_type: BPE
        and not trainer.integer(24, default=0)  # treat_whitespace_as_suffix
        and not any(normalizer.strings(2))  # precompiled_charsmap: nothing is replaced
        and normalizer.integer(3, default=1) == 1  # add_dummy_prefix
        and normalizer.integer(4, default=1) == 0  # remove_extra_whitespaces
        and normalizer.integer(5, default=1) == 1  # escape_whitespaces
    )


def _crosses_words(content: bytes) -> bool:
    """Return whether a piece, given as the file's bytes, may be found across the border of two words."""
    space = SPACE.encode()
    if content.find(space, 3) < 0 and b"\x18\x04" not in content and b"\n" not in content[2:]:  # nearly all pieces
        return False
    piece = _Message(content)
    user_defined = piece.integer(3, default=1) == 4  # such pieces are cut out of a text before anything is merged
    text = b"".join(piece.strings(1)).decode()
    return user_defined or "\n" in text or SPACE in text.lstrip(SPACE)


class _Message:
    """The fields of a Protocol Buffers message: integers and strings of bytes, by the field's number.

    Source: protobuf.dev, "Encoding". (SentencePiece has no reader of its file that works without another package.)
    """

    def __init__(self, data: bytes):
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _read_fields(data):
            self._fields.setdefault(number, []).append(value)

    def strings(self, number: int) -> list[bytes]:
        """Return all strings of a field."""
        return [value for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def integer(self, number: int, default: int) -> int:
        """Return the last integer of a field, which is the one that counts."""
        values = [value for value in self._fields.get(number, []) if isinstance(value, int)]
        return values[-1] if values else default


class _GroupError(Exception):
    """A field of the obsolete kind "group", whose length the file does not say."""


def _read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the integers and strings of bytes in a message, each with its field's number; leave out floats."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise _GroupError
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if kind == 2:
            yield key >> 3, data[position : position + length]
        position += length
