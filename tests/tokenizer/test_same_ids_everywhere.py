"""The promise of `tokenizer/huggingface.py` and `make_json.py`: a tokenizer gives the ids here that it gives elsewhere.

Every kind of `tokenizer.json` in `kinds.py` is compared with `transformers` on the same folder, and a `tokenizer.json`
that is made here with `sentencepiece` on the file that it was made of.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minift.cli import main
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer.kinds import (
    CHAT_TOKENS,
    CHATS,
    SAMPLE,
    edit,
    nasty,
    random_unicode,
    refused,
    trained,
    write_config,
)

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("text", [*SAMPLE, "▁ a▁▁b", "<unk> and </s>x<|end_of_text|>", *CHATS])
def test_ids_and_text_are_those_of_transformers(each: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert each.encode(text, bos=False) == ids
    assert each.decode(ids) == theirs.decode([id for id in ids if id not in (each.bos_id, each.eos_id)])
    assert each.pieces(ids) == theirs.convert_ids_to_tokens(ids)
    assert each.encode(text, eos=True) == [*theirs(text)["input_ids"], theirs.eos_token_id]


def test_ids_and_text_of_any_text_are_those_of_transformers(each: Tokenizer, theirs: Any) -> None:
    rng = random.Random(3)
    for text in [*random_unicode(300), *nasty(300)]:
        if rng.random() < 0.5:
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(CHAT_TOKENS) + text[place:]
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert each.encode(text, bos=False) == ids, ascii(text)
        bare = [id for id in ids if id not in (each.bos_id, each.eos_id)]  # which leave no trace here
        assert each.decode(ids) == theirs.decode(bare), ascii(text)


def test_the_vocabulary_is_that_of_transformers(each: Tokenizer, theirs: Any) -> None:
    assert each.vocab_size == len(theirs)
    assert (each.bos_id, each.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    every = range(each.vocab_size)
    assert each.pieces(every) == theirs.convert_ids_to_tokens(list(every))


def test_repr_says_kind_size_bos_and_eos(folders: dict[str, Path]) -> None:
    made = load_tokenizer(folders["llama 3"])
    said = f"BOS {made.bos_id} '<|begin_of_text|>', EOS {made.eos_id} '<|end_of_text|>'"
    assert repr(made) == f"<JsonTokenizer: {made.vocab_size} ids, {said}>"


def test_a_sentencepiece_models_ids_and_text_are_those_of_sentencepiece(model_file: Path) -> None:
    ours, theirs = load_tokenizer(model_file), sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in [*SAMPLE, *CHATS, *nasty(300)]:
        assert ours.encode(text, bos=False) == theirs.encode(text), ascii(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), ascii(text)


def test_a_tokenizer_json_made_of_sentencepiece_gives_its_ids_and_its_text(model_file: Path, tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    (tmp_path / "tokenizer.json").write_text(make_json(SentencePieceTokenizer(model_file.read_bytes())))
    write_config(tmp_path, "<s>", "</s>")
    made = load_tokenizer(tmp_path)
    assert isinstance(made, JsonTokenizer)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (theirs.vocab_size(), 1, 2)
    for text in [*SAMPLE, *nasty(3000), *random_unicode(300)]:
        ids = theirs.encode(text)
        assert made.encode(text, bos=False, special=False) == ids, ascii(text)
        assert made.decode(ids) == theirs.decode(ids), ascii(text)
    assert made.pieces(range(made.vocab_size)) == [theirs.id_to_piece(id) for id in range(made.vocab_size)]
    elsewhere = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # other tools get BOS from the file
    assert elsewhere.encode("Mexico City").ids == [1, *theirs.encode("Mexico City")]
    assert elsewhere.encode("a", "b").ids == [*theirs.encode("a"), *theirs.encode("b")]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nfkc_cf"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["<mask>"]},
        {"user_defined_symbols": ["Mexico"]},
    ],
    ids=str,
)
def test_a_sentencepiece_model_that_a_tokenizer_json_cannot_say_is_refused(changes: dict[str, Any]) -> None:
    refused(lambda: make_json(SentencePieceTokenizer(trained(**changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_dummy_prefix": False},
        {"model_type": "char"},
        {"control_symbols": ["<ctl>"]},
        {"unk_piece": "[U]", "bos_piece": "[B]", "eos_piece": "[E]"},
        {"split_by_whitespace": False},
    ],
    ids=str,
)
def test_other_sentencepiece_models_give_the_same_ids_as_a_tokenizer_json(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    original = SentencePieceTokenizer(trained(**changes))
    (tmp_path / "tokenizer.json").write_text(make_json(original))
    write_config(tmp_path, *original.pieces([1, 2]))
    made = load_tokenizer(tmp_path)
    for text in [*SAMPLE, "Mexico  City<ctl>[B][E]<mask>", *nasty(300)]:
        assert made.encode(text, bos=False, special=False) == original.encode(text, bos=False), ascii(text)
        assert made.encode_continuation(text, special=False) == original.encode_continuation(text), ascii(text)


def test_a_truncation_or_padding_that_was_left_in_the_file_does_nothing(own: Path) -> None:
    before = load_tokenizer(own)
    left = tokenizers.Tokenizer.from_file(str(own / "tokenizer.json"))
    left.enable_truncation(max_length=3)
    left.enable_padding(length=50, pad_id=5, pad_token="x")
    left.save(str(own / "tokenizer.json"))
    assert len(left.encode("What is the capital of Mexico?").ids) == 50
    after = load_tokenizer(own)
    for text in SAMPLE:
        assert after.encode(text) == before.encode(text)
        assert after.encode_continuation(text) == before.encode_continuation(text)


def test_a_dropout_that_was_left_in_the_file_does_nothing(own: Path) -> None:
    before = load_tokenizer(own)
    edit(own, lambda values: values["model"].update(dropout=0.9))
    after = load_tokenizer(own)
    for text in SAMPLE:
        assert after.encode(text) == before.encode(text)


def test_show_prints_the_pieces_of_a_tokenizer_json(
    folder: Path, each: Tokenizer, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<|im_start|>What is the capital of Mexico?<|im_end|>"
    for path in (folder, folder / "tokenizer.json"):
        assert main(["tokenizer", "show", text, "--model", str(path)]) == 0
        *rows, summary = capsys.readouterr().out.splitlines()
        ids = theirs(text)["input_ids"]
        assert [row.split() for row in rows] == [
            [str(id), piece] for id, piece in zip(ids, theirs.convert_ids_to_tokens(ids), strict=True)
        ]
        assert summary.startswith(f"{len(ids)} ids")
        assert str(each.vocab_size) in summary
