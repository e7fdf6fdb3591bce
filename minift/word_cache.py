"""SentencePiece, several times as fast: words that were met before are looked up.

SentencePiece cuts a text by merging the best neighbours again and again until no two pieces can be merged. Nearly all
the time of a data pipeline goes there, and nearly all of it is spent on the same words, over and over. But in a
vocabulary like Llama's a space occurs in a piece only at its beginning ("▁Mexico"; or alone, "▁▁"), so no merge ever
crosses from the end of a word to the space behind it. The pieces of a text are then those of its words, one after the
other, and those of a word can be kept in a table: the ids are the same, to the last one.

    "What is  new"   →   " What", " is", "  new"   →   ids(" What") + ids(" is") + ids("  new")

`fits` says whether a vocabulary is of that kind; where it is not, the text is encoded as a whole. Measured by
`python -m benchmarks data`. Read next: `stream.py`.
"""

import re
from collections.abc import Iterator

import sentencepiece

SPACE = "\u2581"  # "▁", as which a space stands in the vocabulary
TABLE_SIZE = 2**18  # words that are kept: some 60 MB at most
LONGEST = 32  # characters of a word that is kept; longer ones are rarely met again

# A word, with the spaces before it; the last one also with those behind it, which belong to no other.
_WORD = re.compile(r" *[^ ]+(?: +\Z)?")


class WordCache:
    """The ids of texts, by a table of words.

    Args:
        processor: of a vocabulary that `fits`.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self._processor = processor
        self._table: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The same ids as `processor.encode(text)`, in new list."""
        if SPACE in text or not text.strip(" "):  # "▁" itself is taken for a space; and a text of spaces has no word
            return list(self._processor.encode(text))
        table = self._table
        ids: list[int] = []
        for word in _WORD.findall(" " + text):  # SentencePiece adds that space
            known = table.get(word)
            if known is None:
                known = self._processor.encode(word[1:])  # … and here again
                if len(table) < TABLE_SIZE and len(word) <= LONGEST:
                    table[word] = known
            ids += known
        return ids


def fits(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the pieces of a text are those of its words, by what the model file says.

    It takes a BPE vocabulary that adds a space in front of a text, changes nothing else in it, and has no piece, of any
    kind, in which a space follows another character.
    """
    model = _Message(processor.serialized_model_proto())
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
    return as_llama and not any(map(_crosses, model.all(1)))


def _crosses(content: bytes) -> bool:
    """Whether a piece, as the file has it, may be matched across the border of two words."""
    space = SPACE.encode()
    if content.find(space, 3) < 0 and b"\x18\x04" not in content:  # by far the most: a look at the bytes is enough
        return False
    piece = _Message(content)
    user_defined = piece.number(3, 1) == 4  # those are taken out of a text before anything is merged
    return user_defined or SPACE in b"".join(piece.all(1)).decode().lstrip(SPACE)


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


def _wire(data: bytes) -> Iterator[tuple[int, int | bytes]]:
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
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[place : place + length]
        place += length
