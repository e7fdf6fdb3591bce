"""Text to ids and back: what a tokenizer does, of whichever kind its file is.

A tokenizer cuts a text into pieces and gives the number of each, its *id*. Three habits of Llama's vocabularies matter:

* A space belongs to the piece that follows it ("▁Mexico"). The *first* piece of a text gets such a space too, so that a
  word has the same id at the start of a text and inside it. (Llama 3's vocabulary adds none.)
* A character without a piece is spelled by its UTF-8 bytes (`<0x0A>` is the line break), so no text is unknown.
* BOS and EOS are ids for the two ends of a document. Not every vocabulary begins a text with BOS: SmolLM's does not.
  To SentencePiece the text "<s>" is three characters, never BOS. A `tokenizer.json` finds the names of its *added
  tokens*, such as `<|im_start|>`, in the text of a template; in that of the data they are only characters.

The added space is why there are two ways to encode. `encode` is for a text on its own, `encode_continuation` for a text
that continues another: it adds nothing, so that `encode(prompt) + encode_continuation(answer)` decodes to exactly
`prompt + answer`. With the bundled vocabulary:

    encode("Mexico City")                  <s> 1   ▁Mexico 1184   ▁City 779
    encode_continuation(" Mexico City")    ▁Mexico 1184   ▁City 779
    encode_continuation("Mexico City")     M 2014   e 1982   x 2031   ico 1181   ▁City 779

Try it: minift tokenizer show "What is the capital of Mexico?"
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minift.errors import InputError


class Tokenizer(ABC):
    """A vocabulary, and the way from text to ids and back."""

    vocab_size: int  # every id is below it; those that a model has beyond it stand for no text
    bos_id: int  # the id that begins a document
    eos_id: int  # the id that ends a document
    adds_bos = True  # whether a text begins with BOS, as the model was trained and as other programs prompt it
    marker_names: tuple[str, ...] = ()  # those of the added tokens, which a template's text may spell
    files: Mapping[str, bytes]  # the content of the tokenizer's files by name: they are saved with a model
    _anchor: list[int]  # the ids of a line break, after which no space is added; empty if the tokenizer adds none

    def encode(self, text: str | list[str], bos: bool = True, eos: bool = False, special: bool = True) -> list[int]:
        """Return the ids of a text on its own: after BOS where this tokenizer adds it and, if asked for, before EOS.

        With `special`, an added token's name is that token; in a text in parts, it is in those at even places. Raises
        InputError for a string that is not Unicode text, because it holds half a surrogate pair.
        """
        parts = _parts(text, special)
        ids = self._part_ids(parts)
        if bos and self.adds_bos and not (parts[0] and ids[:1] == [self.bos_id]):  # the template may have written it
            ids = [self.bos_id, *ids]
        return self._ended(ids, parts) if eos else ids

    def encode_continuation(
        self, text: str | list[str], eos: bool = False, special: bool = True, after: str = ""
    ) -> list[int]:
        """Return the ids of a text that continues another one: no BOS, no added space. Raises InputError as `encode`.

        Where the vocabulary adds a space, the text is encoded after a line break, and the ids of that are removed: in
        Llama's vocabulary a line break is a byte, which never merges with what follows. Where the template wrote a
        marker last (`after`), it is encoded after that, as some vocabularies do add a space there.
        """
        parts = _parts(text, special)
        lead, lead_ids = self._lead(after)
        start = len(lead_ids)
        ids = self._part_ids([lead + parts[0], *parts[1:]] if start else parts)
        if ids[:start] != lead_ids:
            raise InputError("this tokenizer joins a line break with what follows it; minift cannot mask its prompts")
        return self._ended(ids[start:], parts) if eos else ids[start:]

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of many texts, one text after the other, and how many ids each has.

        Every text gets EOS, and BOS as in `encode`; added tokens are only characters. This is faster than `encode`.
        """
        _parts(list(texts), special=False)  # all are Unicode
        encoded = self._many_ids(texts)
        bos, eos = np.array([self.bos_id] * self.adds_bos, np.int32), np.array([self.eos_id], np.int32)
        ids = np.concatenate([part for ids in encoded for part in (bos, ids, eos)])
        return ids, np.array([len(bos) + len(ids) + 1 for ids in encoded])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids that begin a text, BOS and EOS left out. Raises InputError for a negative id."""
        return self._text(self._without_bos_and_eos(ids))

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Return the text of ids that continue another text: the inverse of `encode_continuation`."""
        text = self._text(self._anchor + self._without_bos_and_eos(ids))
        return text[1:] if self._anchor else text

    @abstractmethod
    def _piece(self, id: int) -> str:
        """Return the piece of an id that is in range."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces as the vocabulary writes them, for people to look at ("▁" or "Ġ" is a space)."""
        return [self._piece(id) if id < self.vocab_size else "" for id in self._checked(ids)]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def __repr__(self) -> str:
        kind, (bos, eos) = type(self).__name__, self.pieces([self.bos_id, self.eos_id])
        return f"<{kind}: {self.vocab_size} ids, BOS {self.bos_id} {bos!r}, EOS {self.eos_id} {eos!r}>"

    @abstractmethod
    def _ids(self, text: str, special: bool) -> list[int]:
        """Return the ids of Unicode text, with the added space if the vocabulary adds one."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """Return the text of ids that are in range."""

    def _part_ids(self, parts: list[str]) -> list[int]:
        return self._ids("".join(parts), special=any(parts[::2]))

    def _lead(self, after: str) -> tuple[str, list[int]]:
        """Return a text that ends as `after` does, for what follows it, and its ids."""
        return "\n", self._anchor

    def _ended(self, ids: list[int], parts: list[str]) -> list[int]:
        own = "" if len(parts) < 3 else parts[-1] if any(parts[1:]) else parts[0]  # the template's own text at the end
        return ids if own and self._ids(own.rstrip(), special=True)[-1:] == [self.eos_id] else [*ids, self.eos_id]

    def _many_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.array(self._ids(text, special=False), np.int32) for text in texts]

    def _set_anchor(self, where: str) -> None:
        """Find out what the vocabulary does at a text's start. Raises InputError for one that drops line breaks."""
        line_break = self._ids("\n", special=False)
        if self._text(line_break) != "\n":
            raise InputError(f"{where}: drops line breaks; minift needs a tokenizer that keeps a text as it is")
        adds_space = self._ids("\na", special=False) != line_break + self._ids("a", special=False)
        self._anchor = line_break if adds_space else []

    def _without_bos_and_eos(self, ids: Sequence[int]) -> list[int]:
        return [id for id in self._checked(ids) if id not in (self.bos_id, self.eos_id) and id < self.vocab_size]

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for id in ids:
            if id < 0:
                raise InputError(f"id {id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return [int(id) for id in ids]


def _parts(text: str | list[str], special: bool) -> list[str]:
    """Return a text in parts, those at odd places without special tokens. Raise InputError unless it is Unicode."""
    parts = text if isinstance(text, list) else [text] if special else ["", text]
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        raise InputError("the text is not Unicode: it holds bytes that are not UTF-8, or half a character") from None
    return parts
