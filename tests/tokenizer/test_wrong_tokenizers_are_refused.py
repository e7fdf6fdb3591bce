"""The promise to a user: a tokenizer that is damaged, missing or of another model is refused in one line."""

import copy
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minift.checkpoint import save_model
from minift.cli import main
from minift.config import LlamaConfig
from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.load import check_fit, load_tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import SMALL, small_model
from tests.tokenizer.kinds import edit, refused, trained

pytest.importorskip("tokenizers")


def shape(tokenizer: Tokenizer, **changes: Any) -> LlamaConfig:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return LlamaConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size, **ids, **changes})


def test_a_tokenizer_fits_a_model_with_its_ids(each: Tokenizer) -> None:
    size, eos = each.vocab_size, each.eos_id
    check_fit(shape(each), each, exact=True)
    check_fit(shape(each, vocab_size=size + 62), each)  # spare ids
    for ends in ((eos,), (eos, 7), (7, 8, eos)):
        check_fit(shape(each, eos_token_id=ends), each)
    refused(lambda: check_fit(shape(each, vocab_size=size + 62), each, exact=True), str(size), str(size + 62))
    refused(lambda: check_fit(shape(each, eos_token_id=(7, 8)), each), "eos_token_id", str(eos))
    refused(lambda: check_fit(shape(each, eos_token_id=8), each), "eos_token_id", "8")
    refused(lambda: check_fit(shape(each, bos_token_id=8), each), "bos_token_id", "8")
    smaller = shape(each, vocab_size=size - 1, bos_token_id=0, eos_token_id=0)
    refused(lambda: check_fit(smaller, each), str(size), str(size - 1))


def test_a_vocabulary_bigger_than_the_model_is_refused_by_the_command(
    llama_3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", small_model(), None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_3 / name, tmp_path / "model")
    assert main(["generate", "--model", str(tmp_path / "model"), "--prompt", "a", "--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "they do not fit" in line


def test_ends_that_differ_say_where_they_are_and_what_to_do(each: Tokenizer) -> None:
    said = "if it is this one, config.json has to say the ids of tokenizer_config.json or tokenizer.model"
    refused(lambda: check_fit(shape(each, bos_token_id=8), each), "bos_token_id is 8", said)
    refused(lambda: check_fit(shape(each, eos_token_id=8), each), "eos_token_id is 8", said)


def test_random_damage_is_refused_in_one_line_or_harmless(own: Path) -> None:
    rng, file = random.Random(6), own / "tokenizer.json"
    whole, messages = file.read_bytes(), []
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(rng.choice((2000, len(damaged))))
            damaged[place] = rng.choice((damaged[place] ^ 1 << rng.randrange(8), *b'019"{}[]:,- \x00\xff'))
        file.write_bytes(damaged)
        try:
            made = load_tokenizer(own)
            made.decode(made.encode("What is the capital of Mexico? <|im_end|>\n日\x00"))
            made.pieces(range(made.vocab_size))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if len(message.splitlines()) != 1]


WHOLE_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "white space": lambda whole: b" \n",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole.rstrip()[:-1],
    "text": lambda whole: b"not JSON",
    "null": lambda whole: b"null",
    "a list": lambda whole: b"[]",
    "a string": lambda whole: b'"x"',
    "an empty object": lambda whole: b"{}",
    "JSON of something else": lambda whole: b'{"bos_token": "<s>", "version": "1.0"}',
    "deep": lambda whole: b"[" * 100_000,
    "deep in the model": lambda whole: b'{"version": "1.0", "model": ' + b'{"type": ' * 10_000,
    "zeros": lambda whole: bytes(1000),
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "twice": lambda whole: whole + whole,
    "not UTF-8": lambda whole: whole.replace(b"<|im_start|>", b"<|im_st\xffart|>"),
}


@pytest.mark.parametrize("damage", WHOLE_FILES.values(), ids=WHOLE_FILES.keys())
def test_a_file_that_is_no_tokenizer_is_refused(llama_3: Path, damage: Callable[[bytes], bytes]) -> None:
    file = llama_3 / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json")


WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}


WORD_PIECE = {
    "type": "WordPiece",
    "vocab": {"a": 0},
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": False}


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


PARTS: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "a number for a model": {"model": 3},
    "an unknown model": {"model": {**BPE, "type": "Nonsense"}},
    "a merge of nothing": {"model": {**BPE, "merges": [["a", "b"]]}},
    "a negative id": {"model": {**BPE, "vocab": {"a": -1}}},
    "a huge id": {"model": {**BPE, "vocab": {"a": 2**40}}},
    "a vocabulary that is a list": {"model": {**BPE, "vocab": [["a", 0]]}},
    "an empty vocabulary": {"model": {**BPE, "vocab": {}}},
    "no unknown token": {"model": {**BPE, "unk_token": "<unk>"}},
    "words": {"model": WORD_LEVEL},
    "pieces of words": {"model": WORD_PIECE},
    "unigrams": {"model": UNIGRAM},
    "no unigrams": {"model": {**UNIGRAM, "vocab": []}},
    "an unknown unigram": {"model": {**UNIGRAM, "unk_id": 7}},
    "added tokens that are none": {"added_tokens": {"<s>": 1}},
    "an added token without a name": {"added_tokens": [{"id": 1}]},
    "a normalizer that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a wrong pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}},
    "a pre-tokenizer that is none": {"pre_tokenizer": {"type": "Nonsense"}},
    "a pre-tokenizer that drops": {"pre_tokenizer": {"type": "Whitespace"}},
    "no decoder": {"decoder": None},
    "a decoder that is none": {"decoder": []},
    "a truncation that is none": {"truncation": {"max_length": -1}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_a_part_of_the_wrong_kind_is_refused(llama_3: Path, parts: dict[str, Any]) -> None:
    edit(llama_3, lambda values: values.update(copy.deepcopy(parts)))
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json")


def test_a_decoder_that_strips_the_end_of_a_text_is_refused(llama_3: Path) -> None:
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    edit(llama_3, lambda values: values.update(decoder={"type": "Sequence", "decoders": [values["decoder"], strip]}))
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json", "strips 1 characters")


def test_the_command_refuses_a_damaged_file_in_one_line(llama_3: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (llama_3 / "tokenizer.json").write_bytes((llama_3 / "tokenizer.json").read_bytes()[:1000])
    assert main(["tokenizer", "show", "a", "--model", str(llama_3)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("minift: error: ")
    assert "tokenizer.json" in line


def test_tiktokens_ranks_are_refused_with_a_hint_and_a_tokenizer_json_in_their_folder_is_used(
    llama_3: Path, tmp_path: Path
) -> None:
    ranks = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n" * 500
    (tmp_path / "tokenizer.model").write_bytes(ranks)
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model", "tiktoken's ranks", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "tokenizer.model"), "tiktoken's ranks")
    (llama_3 / "tokenizer.model").write_bytes(ranks)
    made = load_tokenizer(llama_3)
    assert isinstance(made, JsonTokenizer)
    assert made.files["tokenizer.model"] == ranks
    for content in (b"", b"not a model", bytes(100), b"\n \n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert "tiktoken's" not in refused(lambda: load_tokenizer(tmp_path), "tokenizer.model")


@pytest.mark.parametrize("piece", ["bos_id", "eos_id"])
def test_a_sentencepiece_model_without_bos_or_eos_is_refused(piece: str) -> None:
    refused(lambda: SentencePieceTokenizer(trained(**{piece: -1}), "a.model"), "a.model", "no BOS or no EOS")


def test_a_place_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.model", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "model.bin"), str(tmp_path), "tokenizer.model", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "tokenizer.json"), "tokenizer.json", "cannot be read")
    refused(lambda: load_tokenizer(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "tokenizer.json").mkdir()
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path))


def test_the_package_that_is_missing_is_named(llama_3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json", "minift[hf]")
