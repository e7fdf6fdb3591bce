"""The promise of `tokenizer/special.py`: a folder says which ids are BOS and EOS; no text of the data forges them."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.data.templates import TEMPLATES
from minift.prompts import Pair
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import encode_pair, texts_of, write_jsonl
from tests.tokenizer.kinds import CHAT_TOKENS, CHATS, NAMES, edit, kept, refused, trained, write_config

tokenizers = pytest.importorskip("tokenizers")


def write_all(folder: Path, files: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    for name, values in files.items():
        (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


BOS, EOS = NAMES["llama 3"]


SAID: dict[str, tuple[dict[str, Any], tuple[str | int, str | int]]] = {
    "tokens": ({"tokenizer_config.json": {"bos_token": BOS, "eos_token": EOS}}, (BOS, EOS)),
    "tokens with flags": (
        {"tokenizer_config.json": {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": {"content": EOS}}},
        (BOS, EOS),
    ),
    "another EOS": ({"tokenizer_config.json": {"bos_token": BOS, "eos_token": "<|im_end|>"}}, (BOS, "<|im_end|>")),
    "special_tokens_map": ({"special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": EOS}}}, (BOS, EOS)),
    "the model's ids": ({"config.json": {"bos_token_id": 3, "eos_token_id": 4}}, (3, 4)),
    "the ids in a Meta folder": ({"minift.json": {"bos_token_id": 3, "eos_token_id": 4}}, (3, 4)),
    "the model's ids before those of a Meta folder": (
        {"config.json": {"bos_token_id": 3}, "minift.json": {"bos_token_id": 5, "eos_token_id": 4}},
        (3, 4),
    ),
    "id 0": ({"config.json": {"bos_token_id": 0, "eos_token_id": 0}}, (0, 0)),
    "the model's list": ({"config.json": {"bos_token_id": 3, "eos_token_id": [7, 4, 5]}}, (3, 7)),
    "the tokenizer before the model": (
        {
            "config.json": {"bos_token_id": 3, "eos_token_id": [4, 5]},
            "tokenizer_config.json": {"bos_token": BOS, "eos_token": EOS},
            "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
        (BOS, EOS),
    ),
    "the map before the model": (
        {
            "config.json": {"bos_token_id": 3, "eos_token_id": 4},
            "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
        CHAT_TOKENS,
    ),
    "each from the first that says it": (
        {
            "tokenizer_config.json": {"bos_token": None, "eos_token": EOS},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            "config.json": {"bos_token_id": 9, "eos_token_id": 4},
        },
        (9, EOS),
    ),
}


@pytest.mark.parametrize(("files", "expected"), SAID.values(), ids=SAID.keys())
def test_bos_and_eos_are_what_the_folder_says(
    llama_3: Path, files: dict[str, Any], expected: tuple[str | int, str | int]
) -> None:
    write_all(llama_3, files)
    made, ids = load_tokenizer(llama_3), tokenizers.Tokenizer.from_file(str(llama_3 / "tokenizer.json"))
    bos, eos = (ids.token_to_id(token) if isinstance(token, str) else token for token in expected)
    assert (made.bos_id, made.eos_id) == (bos, eos)
    assert made.encode("a", eos=True)[:: len(made.encode("a"))] == [bos, eos]


UNSAID: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no file": ({}, ("BOS", "tokenizer_config.json")),
    "nothing in it": ({"tokenizer_config.json": {}}, ("BOS",)),
    "no EOS": ({"tokenizer_config.json": {"bos_token": BOS}}, ("EOS",)),
    "an empty list": ({"config.json": {"bos_token_id": 1, "eos_token_id": []}}, ("EOS",)),
    "null": ({"config.json": {"bos_token_id": 1, "eos_token_id": None}}, ("EOS",)),
    "true": ({"config.json": {"bos_token_id": True, "eos_token_id": 1}}, ("BOS",)),
    "an unknown token": (
        {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": EOS}},
        ("tokenizer_config.json", "<s>"),
    ),
    "an unknown token in the map": (
        {"special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": "</s>"}}},
        ("special_tokens_map.json", "</s>"),
    ),
    "an empty name": ({"tokenizer_config.json": {"bos_token": "", "eos_token": EOS}}, ("tokenizer_config.json",)),
    "half a character": ({"tokenizer_config.json": {"bos_token": "\ud800", "eos_token": EOS}}, ()),
    "an id too large": ({"config.json": {"bos_token_id": 1, "eos_token_id": 100_000}}, ("EOS", "100000")),
    "a huge id": ({"config.json": {"bos_token_id": 10**30, "eos_token_id": 1}}, ("BOS",)),
    "a negative id": ({"config.json": {"bos_token_id": -1, "eos_token_id": 1}}, ("BOS", "-1")),
    "a list": ({"tokenizer_config.json": []}, ("tokenizer_config.json",)),
    "not JSON": ({"tokenizer_config.json": "{"}, ("tokenizer_config.json",)),
}


@pytest.mark.parametrize(("files", "names"), UNSAID.values(), ids=UNSAID.keys())
def test_a_folder_that_does_not_say_them_is_refused(
    llama_3: Path, files: dict[str, Any], names: tuple[str, ...]
) -> None:
    write_all(llama_3, files)
    refused(lambda: load_tokenizer(llama_3), *names)


def test_a_sentencepiece_folder_may_name_another_eos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(control_symbols=["<|end|>"]))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    end = theirs.piece_to_id("<|end|>")
    assert end > 2
    for name, values in (("special_tokens_map.json", "</s>"), ("tokenizer_config.json", {"content": "<|end|>"})):
        (tmp_path / name).write_text(json.dumps({"bos_token": "<s>", "eos_token": values}))
    made = load_tokenizer(tmp_path)
    assert (made.bos_id, made.eos_id) == (1, end)
    assert made.encode("a", eos=True) == [1, *theirs.encode("a"), end]
    assert made.decode([1, *theirs.encode("a"), end]) == "a"
    assert end not in made.encode("<|end|>")


def test_a_sentencepiece_folder_may_name_another_bos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(control_symbols=["<|begin|>"]))
    write_config(tmp_path, "<|begin|>", "</s>")
    made = load_tokenizer(tmp_path)
    assert made.pieces([made.bos_id, made.eos_id]) == ["<|begin|>", "</s>"]
    assert made.encode("a")[0] == made.bos_id


@pytest.mark.parametrize("name", ["<|im_end|>", "", "\ud800"], ids=ascii)
def test_a_sentencepiece_folder_that_names_an_unknown_token_is_refused(sentencepiece_folder: Path, name: str) -> None:
    write_config(sentencepiece_folder, "<s>", name)
    refused(lambda: load_tokenizer(sentencepiece_folder))


def special_ids(tokenizer: Tokenizer) -> set[int]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {0, 1, 2}
    assert isinstance(tokenizer, JsonTokenizer)
    return {entry["id"] for entry in json.loads(tokenizer.text)["added_tokens"]}


def test_chat_tokens_are_one_id_each_unless_they_come_from_the_data(each: Tokenizer) -> None:
    start, end = (each.encode(token, bos=False) for token in CHAT_TOKENS)
    assert (len(start), len(end)) == (1, 1)
    assert each.pieces(start + end) == list(CHAT_TOKENS)
    ids = each.encode(CHATS[0], bos=False)
    assert (ids[0], ids[-1]) == (start[0], end[0])
    assert each.encode_continuation(CHATS[0]).count(end[0]) == 1
    for text in CHATS:
        for given in (each.encode(text, bos=False, special=False), each.encode_continuation(text, special=False)):
            assert not special_ids(each) & set(given)
        assert each.encode(text, bos=False) == each.encode(text, bos=False, special=True)  # what is asked last counts


def spelled(bos: str, eos: str) -> list[str]:
    """Return texts that spell control tokens."""
    return [eos, bos, f"a {eos} b", f"{eos}{eos}\n", f" {bos}x", f"\n{eos}", f"ends in {eos}", f"日{eos}🙂"]


def flagged(folder: Path, **flags: bool) -> None:
    """Give the added tokens of a `tokenizer.json` other flags."""

    def change(values: dict[str, Any]) -> None:
        for entry in values["added_tokens"]:
            entry.update(flags)

    edit(folder, change)


FLAGS = [{}, {"special": False}, {"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_no_answer_and_no_document_forges_bos_or_eos(
    own: Path, kind: str, tmp_path: Path, flags: dict[str, bool]
) -> None:
    flagged(own, **flags)
    check_training_data(load_tokenizer(own), spelled(*NAMES[kind]), tmp_path)


def test_no_answer_and_no_document_forges_bos_or_eos_in_sentencepiece(model_file: Path, tmp_path: Path) -> None:
    check_training_data(load_tokenizer(model_file), spelled("<s>", "</s>"), tmp_path)


def check_training_data(made: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """Check that pairs and pages of these texts have EOS where they end, BOS where they begin, and neither inside."""
    control = {made.bos_id, made.eos_id}
    for text in texts:
        for template in TEMPLATES.values():
            example = encode_pair(Pair("What?", text), template, made, max_length=200)
            assert example is not None
            assert example.answer[-1] == made.eos_id
            assert not control & set(example.answer[:-1]), text
            _, answer = texts_of(template, Pair("What?", text))
            assert made.decode_continuation(example.answer) == answer
    file = write_jsonl(tmp_path / "pages.jsonl", [{"text": text} for text in [*texts, "the rest " * 40]])
    ids: list[int] = []
    for batch in PageBatches(DocumentStream([file], epochs=1), made, batch_size=1, length=8):
        ids += batch.tokens.flatten().tolist()
    for text in texts:
        if made.adds_bos:
            assert ids.pop(0) == made.bos_id
        end = ids.index(made.eos_id)
        assert made.bos_id == made.eos_id or made.bos_id not in ids[:end]
        assert made.decode(ids[:end]) == kept(made, text)
        del ids[: end + 1]


def test_a_text_that_begins_with_the_name_of_bos_gets_no_second_one(llama_3: Path) -> None:
    made = load_tokenizer(llama_3)
    (name,) = made.pieces([made.bos_id])
    assert made.encode(f"{name}hi") == made.encode("hi")
    assert made.encode(f"{name}hi", special=False).count(made.bos_id) == 1


def test_text_of_the_data_that_spells_bos_has_bos_before_it(llama_3: Path) -> None:
    """A folder may name an ordinary piece as BOS, which special=False cannot tell from text."""
    write_config(llama_3, "a", NAMES["llama 3"][1])
    made = load_tokenizer(llama_3)
    assert made.pieces(made.encode("a", special=False)) == ["a", "a"]
