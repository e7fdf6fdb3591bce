"""The tokenizer of Llama 3, SmolLM and most other models: Hugging Face's `tokenizer.json`.

The file describes a pipeline: a normaliser, a first cut, the merges of a BPE vocabulary, added tokens, a decoder.
Llama 3 and SmolLM come with byte-level pieces; the file of Llama 2 reproduces SentencePiece. Here the pipeline is only
run, by Hugging Face's package `tokenizers` (the `hf` extra). Which ids are BOS and EOS is said by the files in the same
folder (`special.py`).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import InputError, need
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.guard import check_pipeline
from minift.tokenizer.markers import Markers
from minift.tokenizer.special import added_tokens, special_ids


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` and the files that belong to it.

    Args:
        text: the content of that file.
        folder: where the files are that say which tokens are BOS and EOS, and which were added.
        files: the content of the tokenizer's files by name, for saving.
        special: (BOS, EOS) where those files do not say.

    Raises:
        InputError: for a damaged file, one that drops line breaks, unknown special tokens, or without the `hf` extra.
    """

    def __init__(self, text: str, folder: Path, files: Mapping[str, bytes], special: tuple[int, int] | None = None):
        self._where = str(folder / "tokenizer.json")
        tokenizers = need("tokenizers", "hf", self._where)
        self.files = dict(files)
        check_pipeline(text, self._where)
        with _silent_stderr(), _as_input_error(f"{self._where}: not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()  # a training run may have left this, padding and dropout in the file
            self._tokenizer.no_padding()
            if hasattr(self._tokenizer.model, "dropout"):
                self._tokenizer.model.dropout = None  # it makes ids random
            _add_tokens(self._tokenizer, added_tokens(folder), folder)
            self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            self.bos_id, self.eos_id = special_ids(folder, self._tokenizer.token_to_id, special)
            for name, id in (("BOS", self.bos_id), ("EOS", self.eos_id)):
                if not 0 <= id < self.vocab_size:
                    raise InputError(f"{self._where}: {name} is id {id}, outside its vocabulary of {self.vocab_size}")
            bare, given = (self._tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
            self.adds_bos = given[:1] != bare[:1]  # by the post-processor, which is what `transformers` goes by
            self._markers = Markers(self._tokenizer)
            self.marker_names = tuple(self._markers.names)
            self._set_anchor(self._where)

    @property
    def text(self) -> str:
        """Return the content of a `tokenizer.json` that gives the same ids, added tokens included."""
        text: str = self._tokenizer.to_str()
        return text

    def _piece(self, id: int) -> str:
        piece: str | None = self._tokenizer.id_to_token(id)
        return piece or ""

    def _ids(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special  # the package's name for "encode them as characters"
        with _as_input_error(f"{self._where}: cannot encode"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _part_ids(self, parts: list[str]) -> list[int]:
        apart = self._markers.cut(parts) if any(parts[::2]) and len(parts) > 1 else None
        if apart is None:
            return super()._part_ids(parts)
        first, after = apart
        ids = self._ids(first, special=False) if first else []
        for marker, text in after:
            ids += self._ids(marker, special=True) + (self._after_marker(marker, text) if text else [])
        return ids

    def _lead(self, after: str) -> tuple[str, list[int]]:
        marker = next((name for name in self.marker_names if after.endswith(name)), "")
        return (marker, self._ids(marker, special=True)) if marker else super()._lead(after)

    def _after_marker(self, marker: str, text: str) -> list[int]:
        """Return the ids of a text after a marker, where some vocabularies add a space and others do not."""
        if self._ids(marker + "a", special=True) == self._ids(marker, special=True) + self._ids("a", special=False):
            return self._ids(text, special=False)
        return self.encode_continuation(text, special=False)

    def _text(self, ids: list[int]) -> str:
        with _as_input_error(f"{self._where}: cannot decode"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _add_tokens(tokenizer: Any, added: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Add the tokens that are missing, and make all added tokens special, so that `special=False` applies to them all.

    Raises:
        InputError: for a token whose id is not the one that the package gives it.
    """
    tokenizers = need("tokenizers", "hf", str(folder))
    present = tokenizer.get_added_tokens_decoder()
    missing = {
        id: added[id] for id in sorted(added) if id not in present or present[id].content != added[id]["content"]
    }
    for token in [*present.values(), *(tokenizers.AddedToken(**token) for token in missing.values())]:
        tokenizer.add_special_tokens([token])
    for id, token in missing.items():
        found = tokenizer.token_to_id(token["content"])
        if found != id:
            raise InputError(f"{folder}: added token {token['content']!r} has id {id}; the vocabulary makes it {found}")


@contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Raise as an InputError what the package raises in here. (It is written in Rust; a panic is no `Exception`.)"""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error}") from None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the several lines away from stderr that a panic writes there, in addition to the one line of its error."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
