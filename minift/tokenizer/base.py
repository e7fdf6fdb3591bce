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

import io
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.storage.adapters import base_of, is_adapter
from minift.storage.links import check_links
from minift.tokenizer.word_cache import WordCache, fits
from minift.values import check_number

# Everything that a tokenizer may consist of. All of it travels with every save, used here or not: chat templates and
# added tokens are what other tools need to go on with the model.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


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


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`.

    Args:
        serialized: the bytes of that file.
        files: further files that belong to it, by name.
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
        self._probe(where)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as they stand in the vocabulary ("▁" is a space)."""
        return [self.processor.id_to_piece(id) for id in self._checked(ids)]

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece by its name, or None."""
        id: int = self.processor.piece_to_id(piece)  # of an unknown one, the id of <unk>
        return id if self.processor.id_to_piece(id) == piece else None

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    @cached_property
    def _words(self) -> WordCache | None:
        return WordCache(self.processor) if fits(self.processor) else None

    def _many_ids(self, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
        if self._words is not None:
            return self._words.encode(texts)
        return [np.array(ids, np.int32) for ids in self.processor.encode(texts, num_threads=1)]

    def _text(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


def _tiktoken_hint(content: bytes) -> str:
    """Llama 3's own `tokenizer.model` has the name, but lines of "base64 rank"."""
    first = content[:100].split(b"\n")[0].split()
    looks = len(first) == 2 and first[1].isdigit()
    return " but tiktoken's ranks, as Llama 3 has them; put the model's tokenizer.json beside it" if looks else ""


def tokenizer_bin(tokenizer: SentencePieceTokenizer) -> bytes:
    """A vocabulary as llama2.c's `run.c` reads it: for each piece its score, its length and its bytes.

    Source: `tokenizer/base.py` in karpathy/llama2.c.
    """
    processor, pieces = tokenizer.processor, []
    for id, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size))):
        text = f"\n{piece}\n" if id in (tokenizer.bos_id, tokenizer.eos_id) else piece.replace("▁", " ")
        pieces.append((processor.GetScore(id), text.encode()))
    head = struct.pack("<I", max(len(text) for _, text in pieces))
    return head + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in pieces)


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


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's tokenizer files, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, beside a model's `.bin` file, or in a tokenizer's own file.

    Where a folder has both kinds, `tokenizer.json` counts: that is what `transformers` uses.

    Raises:
        InputError: when there is none, the file is damaged, or a `tokenizer.json` needs the `hf` extra.
    """
    path = Path(path)
    named = not path.is_dir() and path.suffix != ".bin"  # the file itself, not something in its folder
    folder = path if path.is_dir() else path.parent
    file = path if named else next((folder / n for n in _KINDS if (folder / n).is_file()), None)
    if file is None:
        if is_adapter(folder):  # the tokenizer is that of the model which it is for
            return load_tokenizer(base_of(folder))
        raise InputError(
            f"{folder}: has no tokenizer.model and no tokenizer.json; put the model's there "
            "(or make a folder of both with minift convert --tokenizer)"
        )
    try:
        if not named:
            check_links(folder, () if path.is_dir() else TOKENIZER_FILES)
        content = file.read_bytes()
        files = tokenizer_files(folder)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    from minift.tokenizer.huggingface import JsonTokenizer, added_tokens, named_ids, with_added_tokens

    if file.suffix == ".json":
        if file.name != "tokenizer.json":
            files = {"tokenizer.json": content}
        try:
            return JsonTokenizer(content.decode(), folder, files)
        except UnicodeDecodeError:
            raise InputError(f"{file}: not UTF-8 text") from None
    if named:
        return SentencePieceTokenizer(content, str(file))
    tokenizer = SentencePieceTokenizer(content, str(file), files)
    if any(id >= tokenizer.vocab_size for id in added_tokens(folder)):
        return with_added_tokens(tokenizer, folder)
    special = named_ids(folder, tokenizer.piece_id)
    tokenizer.bos_id, tokenizer.eos_id = special.get("bos", tokenizer.bos_id), special.get("eos", tokenizer.eos_id)
    return tokenizer


_KINDS = ("tokenizer.json", "tokenizer.model")


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A new BPE vocabulary of `vocab_size` pieces with byte fallback, made as Llama's was.

    The first ids are those of Llama: 0 unknown, 1 BOS, 2 EOS, then the 256 bytes. Text is kept as it is (no
    normalisation) and digits are separate pieces. Training is deterministic.

    Args:
        texts: the documents; they are read once, and their lines are held in memory.
        vocab_size: pieces, the 259 above included.

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
