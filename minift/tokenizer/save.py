"""A tokenizer's files in a new folder, with those that the programs of a format look for."""

import json
import struct
from pathlib import Path

from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from minift.tokenizer.word_cache import SPACE


def save_tokenizer(folder: Path, tokenizer: Tokenizer, format: str) -> None:
    """Write a tokenizer's files, and those that the programs of a format look for.

    Hugging Face's tools read `tokenizer.json`, which is made of a SentencePiece model where there is none. llama2.c's
    programs read `tokenizer.bin`. Where only the model's config said which ids are BOS and EOS, a file says so now.

    Raises:
        InputError: when the `hf` extra is missing, or a `tokenizer.json` cannot give the same ids.
    """
    tokenizer.save(folder)
    if format == "hf" or not isinstance(tokenizer, SentencePieceTokenizer):
        made = config_file(tokenizer) | (json_file(tokenizer) if format == "hf" else {})
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    if format == "llama2c" and "tokenizer.model" in tokenizer.files:  # a JsonTokenizer may have it, too
        pieces = SentencePieceTokenizer(tokenizer.files["tokenizer.model"])
        if pieces.vocab_size == tokenizer.vocab_size:
            (folder / "tokenizer.bin").write_bytes(_tokenizer_bin(pieces))


def json_file(tokenizer: Tokenizer) -> dict[str, str]:
    """Return, by its name, the `tokenizer.json` for a tokenizer that has none; nothing for one that has it."""
    if "tokenizer.json" in tokenizer.files:
        return {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"tokenizer.json": make_json(tokenizer)}
    assert isinstance(tokenizer, JsonTokenizer)
    return {"tokenizer.json": tokenizer.text}


def config_file(tokenizer: Tokenizer) -> dict[str, str]:
    """Return, by its name, a `tokenizer_config.json` with the names of BOS and EOS, for a tokenizer that has none."""
    if "tokenizer_config.json" in tokenizer.files:
        return {}
    bos, eos = tokenizer.pieces([tokenizer.bos_id, tokenizer.eos_id])
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # use tokenizer.json as it is
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer_config.json": json.dumps(values, indent=2, ensure_ascii=False) + "\n"}


def _tokenizer_bin(tokenizer: SentencePieceTokenizer) -> bytes:
    """Return a vocabulary as llama2.c's `run.c` reads it: for each piece its score, its length and its bytes.

    Source: `tokenizer.py` in karpathy/llama2.c.
    """
    processor, pieces = tokenizer.processor, []
    for id, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size))):
        text = f"\n{piece}\n" if id in (tokenizer.bos_id, tokenizer.eos_id) else piece.replace(SPACE, " ")
        pieces.append((processor.GetScore(id), text.encode()))
    head = struct.pack("<I", max(len(text) for _, text in pieces))
    return head + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in pieces)
