"""The tokenizer of Llama 1 and 2, and of the bundled base: SentencePiece's `tokenizer.model`, read and trained.

The file holds a vocabulary of pieces with scores. A text begins as single characters; the two neighbours whose joined
piece has the best score are merged, again and again, until no two neighbours make a piece (byte-pair encoding).

Source: Kudo & Richardson, "SentencePiece" (arXiv 1808.06226).
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.word_cache import WordCache, merges_stay_in_words
from minift.values import check_number


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`.

    Args:
        serialized: the content of that file.
        where: the file's name, for messages.
        files: the content of other files that belong to it, by name.

    Raises:
        InputError: for a damaged file, one without BOS or EOS, or one that drops line breaks.
    """

    def __init__(self, serialized: bytes, where: str = "tokenizer", files: Mapping[str, bytes] | None = None):
        self.files = {**(files or {}), "tokenizer.model": serialized}
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(serialized)
            self.processor.id_to_piece(list(range(self.processor.vocab_size())))
        except (RuntimeError, ValueError):  # ValueError: a piece that is not Unicode
            raise InputError(f"{where}: not a SentencePiece model{_tiktoken_hint(serialized)}") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{where}: has no BOS or no EOS piece; minift needs both")
        self._set_anchor(where)

    def _piece(self, id: int) -> str:
        piece: str = self.processor.id_to_piece(id)
        return piece

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None if the vocabulary has no such piece."""
        id: int = self.processor.piece_to_id(piece)  # SentencePiece gives the id of <unk> for an unknown piece
        return id if self.processor.id_to_piece(id) == piece else None

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def _text(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def _many_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if self._words is not None:
            return self._words.encode(texts)
        return [np.array(ids, np.int32) for ids in self.processor.encode(texts, num_threads=1)]

    @cached_property
    def _words(self) -> WordCache | None:
        return WordCache(self.processor) if merges_stay_in_words(self.processor) else None


def _tiktoken_hint(content: bytes) -> str:
    """Return what to add to a refusal of Llama 3's own `tokenizer.model`, whose lines are "base64 rank"."""
    first = content[:100].split(b"\n")[0].split()
    if len(first) == 2 and first[1].isdigit():
        return " but tiktoken's ranks, as Llama 3 has them; copy the model's tokenizer.json into the same folder"
    return ""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a new vocabulary of `vocab_size` pieces with byte fallback, as Llama's was made.

    The first ids are those of Llama: 0 unknown, 1 BOS, 2 EOS, then the 256 bytes. Text is kept as it is (no
    normalisation), and each digit is a piece. The same texts give the same vocabulary.

    Args:
        texts: the documents; they are read once, and their lines are held in memory.
        vocab_size: the number of pieces, the first 259 included.

    Raises:
        InputError: when there is no text, or too little for so many pieces.
    """
    check_number("vocab_size", vocab_size, least=1, below=2**24)  # the trainer counts up to it, however little text
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise InputError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            character_coverage=0.9999,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"cannot make {vocab_size} pieces from this text: {reason}") from None
    return SentencePieceTokenizer(model.getvalue())
