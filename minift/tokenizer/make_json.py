"""A `tokenizer.json` made of a SentencePiece vocabulary, so that tools which read no other file can load the model.

The ids of the result are compared with SentencePiece's for every piece before it is returned.
"""

import json
from typing import Any

from minift.errors import InputError, need
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from minift.tokenizer.word_cache import SPACE


def make_json(tokenizer: SentencePieceTokenizer) -> str:
    """Return the text of a `tokenizer.json` that gives the same ids as a SentencePiece BPE vocabulary.

    Raises:
        InputError: when the ids would differ (a unigram vocabulary, a normaliser), or without the `hf` extra.
    """
    tokenizers = need("tokenizers", "hf", "writing a tokenizer.json")
    processor, size = tokenizer.processor, tokenizer.vocab_size
    pieces = [processor.id_to_piece(id) for id in range(size)]
    special = [id for id in range(size) if processor.IsControl(id) or processor.IsUnknown(id)]
    mergeable = {piece: id for id, piece in enumerate(pieces) if id not in special and not processor.IsByte(id)}
    adds_space = tokenizer.encode("a", bos=False) != [mergeable.get("a")]
    bos = pieces[tokenizer.bos_id]
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(id, pieces[id]) for id in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": SPACE}] if adds_space else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _adds(bos, tokenizer.bos_id) if tokenizer.adds_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": _merges(tokenizer, mergeable),
        },
    }
    text = json.dumps(values, ensure_ascii=False)
    _check_same_ids(tokenizers.Tokenizer.from_str(text), tokenizer, list(mergeable))
    return text


def _adds(bos: str, id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before a text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def _merges(tokenizer: SentencePieceTokenizer, mergeable: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that are merged, the first to be merged first.

    SentencePiece's file does not hold them, but they follow from it: a piece can be made of any two pieces that join to
    it, and the pair that makes the piece with the best score is merged first.
    """

    def order(piece: str) -> tuple[float, int]:
        return -tokenizer.processor.GetScore(mergeable[piece]), mergeable[piece]

    merges = []
    for piece in sorted(mergeable, key=order):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in mergeable and pair[1] in mergeable]
        merges += sorted(splits, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
    return merges


def _added_token(id: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _check_same_ids(made: Any, tokenizer: SentencePieceTokenizer, pieces: list[str]) -> None:
    """Raise InputError unless both give the same ids for every piece's own text, alone and after a line break."""
    made.encode_special_tokens = True
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    texts += ["ﬁ ² Ａ Å", "e\u0301 \u3000 ABC", " a  b "]  # what a normaliser would change  # noqa: RUF001
    for text in texts:
        for probe in (text, f"\n{text} {text}"):
            if made.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe, bos=False):
                raise InputError(
                    f"this SentencePiece model cannot be written as a tokenizer.json: {probe!r} would get other ids"
                )
