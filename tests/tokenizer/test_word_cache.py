"""The promise of `tokenizer/word_cache.py`: the ids are SentencePiece's own, to the last one, or the cache is not used.

Random texts of what is hard (runs of spaces, other white space, "▁" itself, bytes, long words) go through both, for the
bundled vocabulary, one that is trained here, and Llama 2's. Vocabularies of other kinds are trained, each unlike
Llama's in one habit: `merges_stay_in_words` is false for them, and for most an example shows that a table of words
would give other ids.
"""

import gzip
import io
import json
import pickle
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from minift.errors import InputError
from minift.storage.names import bundled
from minift.tokenizer import word_cache
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer, train_tokenizer
from minift.tokenizer.word_cache import WordCache, merges_stay_in_words
from tests.helpers import ROOT

EDGES = [
    *("", " ", "  ", "   ", "a", " a", "a ", "  a", "a  ", "  a  ", "a b", "a  b", "a   b    c     ", " a  b "),
    *("\n", "\n\n", " \n", "\n ", " \n ", "a\nb", "a \n b", "a\n\n  b", "\ta", "a\t\tb", "\t \t", "\r\n", "a\r\n b"),
    *("\u2581", "a\u2581b", "\u2581a", "a\u2581", " \u2581 ", "\u2581\u2581 a", "a b\u2581c d"),
    *("\x00", "a\x00b", "a \x00 b", "\x00 ", " \x00", "a\x00 b c", "\x01\x02 \x7f", "\ufeff", "\ufeff a", "a\ufeff b"),
    *("\U0001f642", "a \U0001f642 b", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family", "\U0001f1f2\U0001f1fd  x"),
    *(
        "e\u0301",
        "\u0301",
        " \u0301 a",
        "a\u0301 \u0301b",
        "n\u0303  o",
        "\ud55c\uad6d\uc5b4  \ub9d0",
        "\u4e2d\u6587 \u5b57",
    ),
    *("a\u00a0b", "\u00a0", "a\u2003b", "\u3000a", "a\u2028b", "a\u200bb c", "a\u0085b", "\u1680 a", "a \u202f"),
    *("<s>", "</s>", "a <s> b", "<unk>", "<0x0A>", "a <0x20> b", "[INST] a [/INST]", "<|im_start|>"),
    *("x" * 31, "x" * 32, "x" * 33, " " + "x" * 500, "x" * 31 + " y", " " * 100 + "x", "x" + " " * 100, " " * 300),
    *("1234567890", "3.14 159 ", "12  34", "\ufffd", "\U0010ffff a", "\ue000 b"),
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [
        "the",
        "Mexico",
        "capital",
        "of",
        "is",
        "City",
        "x",
        "1",
        "42",
        ".",
        ",",
        "The",
        "\u00e9t\u00e9",
        "Stra\u00dfe",
    ]
    odd = [
        *"\n\t\r\x00\x1f\u2581\u00a0\u2003\u3000\u200b\u0301\u0308\U0001f642\u4e2d",
        "\u2581\u2581",
        "<s>",
        "longest" * 7,
    ]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 25)):
            kind = rng.random()
            if kind < 0.35:
                parts.append(" " * rng.choice([1, 1, 1, 2, 3, 9]))
            elif kind < 0.8:
                parts.append(rng.choice(words))
            elif kind < 0.92:
                parts.append(rng.choice(odd))
            else:
                point = rng.choice([rng.randrange(0x300), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                parts.append(chr(point))
        text = "".join(parts)
        texts.append(text if rng.random() < 0.3 else text.replace("\u2581", ""))  # a "▁" changes the whole text
    return texts


def pages(count: int) -> list[str]:
    """Return the first bundled pages, of each shard."""
    texts = []
    for shard in sorted((ROOT / "data" / "pages").glob("*.json.gz")):
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in islice(lines, count // 4)]
    assert len(texts) == count
    return texts


@pytest.fixture(scope="module")
def some_pages() -> list[str]:
    return pages(2_000)


@pytest.fixture(scope="module", params=["bundled", "trained", "spaces", "llama2"])
def processor(request: pytest.FixtureRequest, some_pages: list[str]) -> sentencepiece.SentencePieceProcessor:
    if request.param == "bundled":
        tokenizer: Tokenizer = load_tokenizer(bundled("base"))
    elif request.param == "llama2":
        tokenizer = load_tokenizer(request.getfixturevalue("real_data") / "tokenizer.model")
    elif request.param == "trained":
        tokenizer = train_tokenizer(some_pages[:100], 700)
    else:  # pieces of several spaces, and of spaces and a word
        code = [f"def f{i}():\n    if  x{i}:\n        return    x  +  {i}\n\tpass   " for i in range(60)]
        tokenizer = train_tokenizer(code, 320)
        assert {"\u2581\u2581", "\u2581\u2581\u2581"} & set(tokenizer.pieces(range(320)))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer.processor


def look_up(cache: WordCache, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in cache.encode(texts)]


def documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return what `encode_documents` gives for each text."""
    ids, lengths = tokenizer.encode_documents(texts)
    assert ids.dtype == np.int32
    assert lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def check(processor: sentencepiece.SentencePieceProcessor, texts: list[str], rounds: int = 2) -> WordCache:
    """Compare the ids of every text: when the cache is empty and when its words are known, alone and with others."""
    assert merges_stay_in_words(processor)
    cache = WordCache(processor)
    expected = [processor.encode(text) for text in texts]
    for size in (1, 37)[:rounds]:
        for start in range(0, len(texts), size):
            found = look_up(cache, texts[start : start + size])
            assert found == expected[start : start + size], repr(texts[start : start + size])
    return cache


def test_edge_cases_have_the_same_ids(processor: sentencepiece.SentencePieceProcessor) -> None:
    check(processor, EDGES)
    check(processor, [a + b for a in EDGES[:60] for b in EDGES[:60]], rounds=1)


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_have_the_same_ids(processor: sentencepiece.SentencePieceProcessor, seed: int) -> None:
    check(processor, random_texts(1_500, seed))


def test_the_bundled_pages_have_the_same_ids(
    processor: sentencepiece.SentencePieceProcessor, some_pages: list[str]
) -> None:
    check(processor, some_pages, rounds=1)


@pytest.mark.parametrize("size", [0, 1, 50])
def test_a_full_table_gives_the_same_ids(
    processor: sentencepiece.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(word_cache, "TABLE_SIZE", size)
    cache = check(processor, random_texts(300, seed=9) + EDGES)
    assert len(cache._table) <= size


def test_the_table_keeps_no_long_words(processor: sentencepiece.SentencePieceProcessor) -> None:
    cache = check(processor, random_texts(300, seed=8) + EDGES)
    assert max(map(len, cache._table)) <= word_cache.LONGEST_WORD


def test_no_text_has_no_ids(processor: sentencepiece.SentencePieceProcessor) -> None:
    cache = WordCache(processor)
    assert look_up(cache, []) == []
    assert look_up(cache, [""]) == [[]]
    assert look_up(cache, ["", "a", ""]) == [[], processor.encode("a"), []]


def test_the_tokenizer_looks_words_up_and_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    texts = [*EDGES, *random_texts(200, seed=7)]
    for _ in range(2):
        assert documents(tokenizer, texts) == [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    assert tokenizer._words is not None
    assert len(tokenizer._words._table) > 20
    elsewhere = pickle.loads(pickle.dumps(tokenizer))  # as where workers are not forked
    assert documents(elsewhere, texts) == documents(tokenizer, texts)


def test_half_a_character_is_refused_and_spoils_nothing(tokenizer: Tokenizer) -> None:
    texts = ["some words", "half \ud83d of a pair", "more words"]
    for _ in range(2):
        with pytest.raises(InputError, match="half a character"):
            tokenizer.encode_documents(texts)
        good = [texts[0], "of a pair", texts[2]]
        assert documents(tokenizer, good) == [tokenizer.encode(text, eos=True) for text in good]


# Vocabularies that do not fit -----------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "vocab_size": 340,
    "num_threads": 1,
    "minloglevel": 2,
}
LINES = ["of the people by the people for the people in the city of the lake"] * 20 + [
    f"a  word of the number {i} and  of the  other number {i * 7}, in the city" for i in range(60)
]


def trained(**changes: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a vocabulary as `train_tokenizer` does, except for the changes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **{**LLAMA, **changes})
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return processor


def differ(processor: sentencepiece.SentencePieceProcessor, text: str) -> bool:
    """Return whether a table of words would give other ids."""
    try:
        return look_up(WordCache(processor), [text]) != [processor.encode(text)]
    except ValueError:  # the line breaks between the words are lost
        return True


def test_a_vocabulary_as_llamas_fits() -> None:
    processor = trained()
    check(processor, [*EDGES, *LINES, *random_texts(300, seed=6)])
    check(trained(control_symbols=["<|x|>", "<a b>"]), [*EDGES, "a <|x|> b", "<a b>"])  # no text has them


@pytest.mark.parametrize(
    ("changes", "example"),
    [
        ({"split_by_whitespace": False}, "in the city of the lake"),
        ({"split_by_whitespace": False, "max_sentencepiece_length": 8}, "of the people by the people"),
        ({"user_defined_symbols": ["of\u2581the"]}, "people of the lake"),
        ({"user_defined_symbols": ["\u2581the\u2581"]}, "in the city"),
        ({"treat_whitespace_as_suffix": True}, "of\nthe people"),
        ({"add_dummy_prefix": False}, "people of the city"),
        ({"remove_extra_whitespaces": True}, None),
        ({"normalization_rule_name": "nmt_nfkc"}, "a\u3000word\u00a0of the"),
        ({"normalization_rule_name": "nfkc"}, "a\u3000\u3000word \u00a0 of the"),
        ({"model_type": "unigram", "vocab_size": 290}, None),
        ({"model_type": "char", "vocab_size": 300, "hard_vocab_limit": False}, None),
        ({"user_defined_symbols": ["people"]}, None),
        ({"user_defined_symbols": ["\n"]}, None),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, None),
    ],
    ids=str,
)
def test_another_kind_of_vocabulary_does_not_fit(changes: dict[str, Any], example: str | None) -> None:
    processor = trained(**changes)
    assert not merges_stay_in_words(processor)
    if changes.get("normalization_rule_name", "identity") == "identity" and example is not None:
        assert differ(processor, example)
    kept = [text for text in EDGES if "\n" not in text]
    if not {"remove_extra_whitespaces", "normalization_rule_name", "treat_whitespace_as_suffix"} & changes.keys():
        tokenizer = SentencePieceTokenizer(processor.serialized_model_proto())
        assert tokenizer._words is None
        for text in (*kept, *LINES[18:30]):
            assert documents(tokenizer, [text]) == [[1, *processor.encode(text), 2]]


def test_a_vocabulary_without_bytes_does_not_fit() -> None:
    assert not merges_stay_in_words(trained(byte_fallback=False, vocab_size=100))


@pytest.mark.parametrize(
    ("settings", "text"),
    [(b"\x12\x03\xc0\x01\x01", "in the city"), (b"\x1a\x02\x28\x00", "\u2581 in the city")],
    ids=["treat_whitespace_as_suffix", "no escape_whitespaces"],
)
def test_the_same_pieces_with_another_setting_do_not_fit(settings: bytes, text: str, tokenizer: Tokenizer) -> None:
    """Add a field to the trainer's or the normaliser's settings, at the end of the file: a reader joins both parts."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer.processor.serialized_model_proto() + settings)
    assert differ(processor, text)
    assert not merges_stay_in_words(processor)


@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_a_piece_with_a_space_after_a_character_does_not_fit(spaces: int, tokenizer: Tokenizer) -> None:
    """Make a model file in which the last piece is another one, with a space or a line break after an "e"."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    last = tokenizer.vocab_size - 1
    old = tokenizer.processor.id_to_piece(last).encode()
    content = tokenizer.processor.serialized_model_proto()
    field = b"\x0a" + bytes([len(old)]) + old
    assert content.count(field) == 1
    place = content.index(field)
    start = max(i for i in range(place) if content[i : i + 2] == bytes([0x0A, content[place - 1]]) and i == place - 2)
    before = "\u2581" * (spaces - 1)
    for piece, fit in [(before + "e\u2581", False), (before + "e\n", False), (before + "\u2581e", True)]:
        new = b"\x0a" + bytes([len(piece.encode())]) + piece.encode()
        size = content[start + 1] + len(new) - len(field)
        changed = content[:start] + bytes([0x0A, size]) + new + content[place + len(field) :]
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(changed)
        except RuntimeError:
            assert fit  # the vocabulary has such a piece already
            continue
        assert processor.id_to_piece(last) == piece
        assert merges_stay_in_words(processor) == fit
        if fit:
            check(processor, [*EDGES, *random_texts(300, seed=5)])


def test_a_file_that_is_no_model_is_not_looked_into(tmp_path: Path) -> None:
    for content in (b"", b"\x0a\xff\xff", b"x" * 100):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match="tokenizer"):
            load_tokenizer(tmp_path)
