"""Text ⇄ ids with SentencePiece: encode, decode, and train a new vocabulary.

A tokenizer cuts text into pieces that it knows by number. Llama's way has three habits that matter downstream:

* a space is part of the piece that follows it ("▁Mexico"), and a text's *first* piece gets such a space too, so
  that a word has the same id at the start of a text and inside it;
* a character without a piece falls back to its UTF-8 bytes (`<0x0A>` is the newline), so nothing is unknown;
* BOS and EOS are ids that no text can produce: `encode("<s>")` is three characters, not BOS.

The added first space is why there are two ways to encode. `encode` is for a text that stands alone.
`encode_continuation` is for text that continues another text: nothing is added, so that
`ids(prompt) + continuation_ids(answer)` stands for exactly the characters `prompt + answer` (see `prompts.py`).

    minift tokenizer show "What is the capital of Mexico?"

Source: Kudo & Richardson, "SentencePiece" (arXiv 1808.06226). Read next: `stream.py`.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from minift.config import LlamaConfig, check_number
from minift.errors import InputError


class Tokenizer:
    """A SentencePiece model: text to ids and back.

    Attributes:
        vocab_size: number of pieces; every id is below it.
        bos_id, eos_id: the ids that begin and end a document.
        serialized: the bytes of the `tokenizer.model` file, so that every save can carry a copy.
    """

    def __init__(self, serialized: bytes, where: str = "tokenizer"):
        self.serialized = serialized
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(serialized)
        except RuntimeError:
            raise InputError(f"{where}: not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{where}: has no BOS or no EOS piece; minift needs both")
        # Text after this newline gets no added space, because it is not at the start. See `encode_continuation`.
        self._anchor: list[int] = self._processor.encode("\n")
        if self._processor.decode(self._anchor) != "\n":
            raise InputError(f"{where}: drops line breaks; minift needs a tokenizer that keeps a text as it is")

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """The ids of a text that stands alone, with BOS in front and, if asked, EOS behind.

        Raises:
            InputError: for a string that is not Unicode text (half a surrogate pair).
        """
        ids = self._ids(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_continuation(self, text: str, eos: bool = False) -> list[int]:
        """The ids of a text that continues another one: no BOS, and no space added in front.

        The text is encoded behind a newline, whose ids are then taken off again: newlines are byte pieces in Llama's
        vocabulary and never merge with what follows.
        """
        anchored = self._ids("\n" + text)
        if anchored[: len(self._anchor)] != self._anchor:
            raise InputError("this tokenizer joins a line break with what follows it; minift cannot mask such a prompt")
        return anchored[len(self._anchor) :] + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that begin a text. BOS and EOS leave no trace. Raises InputError for an id out of range."""
        return self._processor.decode(self._text_ids(ids))

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The inverse of `encode_continuation`: a leading space is kept."""
        return self._processor.decode(self._anchor + self._text_ids(ids))[1:]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as they stand in the vocabulary, for people to look at ("▁" is a space)."""
        return [self._processor.id_to_piece(id) for id in self._checked(ids)]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` into `folder`."""
        (Path(folder) / "tokenizer.model").write_bytes(self.serialized)

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "the text is not Unicode: it holds bytes that are not UTF-8, or half a character"
            ) from None
        ids: list[int] = self._processor.encode(text)
        return ids

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise InputError(f"id {id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return [int(id) for id in ids]

    def _text_ids(self, ids: Sequence[int]) -> list[int]:
        return [id for id in self._checked(ids) if id not in (self.bos_id, self.eos_id)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a `tokenizer.model` file.

    Raises:
        InputError: when there is none, or the file is not a SentencePiece model.
    """
    path = Path(path)
    file = path / "tokenizer.model" if path.is_dir() else path
    try:
        serialized = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    return Tokenizer(serialized, where=str(file))


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
    for name, id in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if getattr(shape, name) != id:
            raise InputError(f"the model's {name} is {getattr(shape, name)}, the tokenizer's is {id}: they do not fit")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A new BPE vocabulary of `vocab_size` pieces with byte fallback, made as Llama's was.

    The first ids are those of Llama: 0 unknown, 1 BOS, 2 EOS, then the 256 bytes. Text is kept as it is (no
    normalisation) and digits are separate pieces. Training is deterministic.

    Args:
        texts: the documents; they are read once, and their lines are held in memory.
        vocab_size: pieces, the 259 above included.

    Raises:
        InputError: when there is no text, or too little for so many pieces.
    """
    check_number("vocab_size", vocab_size, least=1)
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
    return Tokenizer(model.getvalue())
