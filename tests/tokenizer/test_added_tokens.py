"""The promise about added tokens: each has the id that its files say, as in `transformers`, and every save keeps it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.formats.convert import convert
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import TOKENIZER_FILES, check_fit, load_tokenizer
from minift.tokenizer.save import save_tokenizer
from tests.tokenizer.kinds import (
    CHAT_TOKENS,
    CHATS,
    SAMPLE,
    edit,
    model_for,
    read_by_transformers,
    refused,
    write_config,
)

pytest.importorskip("tokenizers")


def test_chat_tokens_survive_a_save(each: Tokenizer, tmp_path: Path) -> None:
    save_model(tmp_path / "saved", model_for(each), each)
    again = load_tokenizer(tmp_path / "saved")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (each.vocab_size, each.bos_id, each.eos_id)
    assert again.files == each.files
    for text in [*CHATS, *SAMPLE]:
        assert again.encode(text) == each.encode(text)
    check_fit(load_model(tmp_path / "saved").config, again, exact=True)


def test_every_file_travels_byte_for_byte_through_every_format(own: Path, tmp_path: Path) -> None:
    (own / "chat_template.jinja").write_bytes(b"{{ bos_token }}\r\n{%- for m in messages %}\xc3\xa9{%- endfor %}  \n\n")
    (own / "chat_template.json").write_bytes(b'{ "chat_template": "x" }')
    (own / "special_tokens_map.json").write_bytes(b'{"pad_token":   "<|im_end|>"}\r\n')
    (own / "added_tokens.json").write_bytes(b"{}")
    (own / "tokenizer.json").write_bytes((own / "tokenizer.json").read_bytes() + b"\n \n")
    there = {name: (own / name).read_bytes() for name in TOKENIZER_FILES if (own / name).exists()}
    assert len(there) == 6
    made = load_tokenizer(own)
    save_model(tmp_path / "native", model_for(made), made)
    steps = [("native", "hf"), ("hf", "meta"), ("meta", "hf-2"), ("hf-2", "native-2"), ("native-2", "meta-2")]
    for source, to in steps:
        assert main(["convert", str(tmp_path / source), str(tmp_path / to), "--to", to.split("-")[0]]) == 0
    for name in ("native", "hf", "meta", "hf-2", "native-2", "meta-2"):
        found = {file: (tmp_path / name / file).read_bytes() for file in there}
        assert found == there
        again = load_tokenizer(tmp_path / name)
        assert [again.encode(text) for text in CHATS] == [made.encode(text) for text in CHATS]
    for name in ("hf", "hf-2"):
        theirs = read_by_transformers(tmp_path / name)
        for text in [*CHATS, *SAMPLE]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == made.encode(text, bos=False)


@pytest.mark.parametrize("to", ["native", "hf", "meta"])  # llama2.c's format has no other ids than 1 and 2
def test_a_tokenizer_whose_ids_only_the_model_says_can_be_loaded_from_every_format(
    llama_3: Path, tmp_path: Path, to: str
) -> None:
    named = load_tokenizer(llama_3)
    (llama_3 / "tokenizer_config.json").unlink()
    (llama_3 / "config.json").write_text(json.dumps({"bos_token_id": named.bos_id, "eos_token_id": named.eos_id}))
    made = load_tokenizer(llama_3)
    save_model(tmp_path / "native", model_for(made), made)
    destination = tmp_path / "to" / "model"
    convert(tmp_path / "native", destination, to)
    again = load_tokenizer(destination)
    assert (again.bos_id, again.eos_id) == (made.bos_id, made.eos_id)
    assert again.encode(CHATS[0]) == made.encode(CHATS[0])


def test_saved_files_say_which_ids_are_bos_and_eos_where_only_the_model_did(llama_3: Path, tmp_path: Path) -> None:
    (llama_3 / "tokenizer_config.json").unlink()
    (llama_3 / "config.json").write_text('{"bos_token_id": 3, "eos_token_id": 4}')
    (tmp_path / "alone").mkdir()
    save_tokenizer(tmp_path / "alone", load_tokenizer(llama_3), "native")
    again = load_tokenizer(tmp_path / "alone")
    assert (again.bos_id, again.eos_id) == (3, 4)


def test_no_tokenizer_bin_lacks_added_tokens(sentencepiece_folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, load_tokenizer(sentencepiece_folder), "llama2c")
    assert (tmp_path / "tokenizer.bin").exists()
    (tmp_path / "tokenizer.bin").unlink()
    (sentencepiece_folder / "added_tokens.json").write_text('{"<|im_start|>": 2048}')
    save_tokenizer(tmp_path, load_tokenizer(sentencepiece_folder), "llama2c")
    assert not (tmp_path / "tokenizer.bin").exists()


def test_a_tokenizer_json_of_another_name_is_saved_as_one(llama_3: Path, tmp_path: Path) -> None:
    (llama_3 / "tokenizer.json").rename(llama_3 / "mine.json")
    made = load_tokenizer(llama_3 / "mine.json")
    save_model(tmp_path / "saved", model_for(made), made)
    assert load_tokenizer(tmp_path / "saved").encode(CHATS[0]) == made.encode(CHATS[0])


def added_decoder(names: dict[str, int], **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(id): {"content": name, **plain, **flags} for name, id in names.items()}}


def chat_ids(text: str, added: dict[str, int]) -> list[int]:
    """Return what SentencePiece gives for each part between two added tokens, as Llama 2's own tokenizer does it."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(bundled("base") / "tokenizer.model"))
    ids: list[int] = []
    while text:
        starts = [(text.index(name), name) for name in added if name in text]
        place, name = min(starts, default=(len(text), ""))
        ids += theirs.encode(text[:place]) + ([added[name]] if name else [])
        text = text[place + len(name) :]
    return ids


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "both"])
def test_added_tokens_after_a_sentencepiece_vocabulary_have_their_ids(
    sentencepiece_folder: Path, tmp_path: Path, where: str
) -> None:
    added = {"<|im_end|>": 2049, "<|im_start|>": 2048}  # in no order
    if where != "added_tokens_decoder":
        (sentencepiece_folder / "added_tokens.json").write_text(json.dumps(added))
    if where != "added_tokens.json":
        more = added_decoder({"<unk>": 0, "<s>": 1, "</s>": 2, **added})
        write_config(sentencepiece_folder, "<s>", "</s>", **more)
    plain, made = load_tokenizer(bundled("base")), load_tokenizer(sentencepiece_folder)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (2050, 1, 2)
    assert made.pieces([2048, 2049]) == list(CHAT_TOKENS)
    for text in CHATS:
        assert made.encode(text, bos=False) == chat_ids(text, added)
        assert made.encode(text, special=False) == plain.encode(text)
    for text in SAMPLE:
        assert made.encode(text) == plain.encode(text)
        assert made.encode_continuation(text) == plain.encode_continuation(text)
    save_model(tmp_path / "native", model_for(made), made)
    for source, to in (("native", "hf"), ("hf", "meta"), ("native", "meta-2"), ("meta", "native-2")):
        convert(tmp_path / source, tmp_path / to, to.split("-")[0])
    for name in ("native", "hf", "meta", "meta-2", "native-2"):
        again = load_tokenizer(tmp_path / name)
        assert [again.encode(text) for text in CHATS] == [made.encode(text) for text in CHATS]
        assert (tmp_path / name / "tokenizer.model").read_bytes() == plain.files["tokenizer.model"]
    theirs = read_by_transformers(tmp_path / "hf")
    for text in CHATS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == chat_ids(text, added)


def test_the_flags_of_added_tokens_count_as_they_do_in_transformers(sentencepiece_folder: Path, tmp_path: Path) -> None:
    decoder = added_decoder({"<|im_start|>": 2048}, rstrip=True)["added_tokens_decoder"]
    decoder |= added_decoder({"<|im_end|>": 2049}, lstrip=True)["added_tokens_decoder"]
    write_config(sentencepiece_folder, "<s>", "</s>", added_tokens_decoder=decoder)
    made = load_tokenizer(sentencepiece_folder)
    save_model(tmp_path / "hf", model_for(made), made, format="hf")
    theirs = read_by_transformers(tmp_path / "hf")
    for text in [*CHATS, "<|im_start|> user\nhi <|im_end|> \n<|im_start|>\nassistant\n"]:
        assert made.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_tokens_that_only_the_config_adds_have_the_ids_that_transformers_gives(own: Path) -> None:
    size = load_tokenizer(own).vocab_size
    edit(own, lambda values: values.update(added_decoder({"<|eot|>": size})), "tokenizer_config.json")
    made, theirs = load_tokenizer(own), read_by_transformers(own)
    assert theirs("a<|eot|>", add_special_tokens=False)["input_ids"][-1] == size
    assert made.encode("a<|eot|>", bos=False) == theirs("a<|eot|>", add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_folder_with_nothing_but_added_tokens_keeps_its_bos_and_eos(tmp_path: Path) -> None:
    shutil.copy(bundled("base") / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 2048}')
    made = load_tokenizer(tmp_path)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (2049, 1, 2)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ('{"<a>": 2049}', ("<a>", "2049", "2048")),
        ('{"<a>": 2048, "<b>": 2050}', ("<b>", "2050", "2049")),
        ('{"<a>": 2048, "<b>": 2048}', ("<a>", "<b>", "2048")),
        ('{"<a>": 5000}', ("<a>", "5000")),
        ('{"<a>": 1e30}', ("<a>",)),
    ],
)
def test_a_gap_in_the_added_tokens_is_refused(sentencepiece_folder: Path, table: str, names: tuple[str, ...]) -> None:
    (sentencepiece_folder / "added_tokens.json").write_text(table)
    refused(lambda: load_tokenizer(sentencepiece_folder), *names)


@pytest.mark.parametrize(
    "table",
    [
        "",
        "{",
        "[]",
        "null",
        '"<a>"',
        '{"<a>": null}',
        '{"<a>": true}',
        '{"<a>": "x"}',
        '{"<a>": [2048]}',
        '{"<a>": {}}',
        '{"<a>": NaN}',
        '{"<a>": Infinity}',
        '{"<a>": -1e999}',
        '{"<a>": 2048.7}',
        '{"<a>": %s}' % ("9" * 5000),
        '{"\\ud800": 2048}',
        '{"": 2048}',
        '{"\\u2581the": 2048}',
        '{"<s>": 2048}',
    ],
    ids=lambda table: table[:20],
)
def test_a_malformed_table_of_added_tokens_is_refused(sentencepiece_folder: Path, table: str) -> None:
    (sentencepiece_folder / "added_tokens.json").write_text(table)
    refused(lambda: load_tokenizer(sentencepiece_folder))


@pytest.mark.parametrize(
    "table",
    [
        [],
        "x",
        3,
        {"x": {"content": "<a>"}},
        {"2048": {}},
        {"2048": "<a>"},
        {"2048": 3},
        {"2048": None},
        {"2048": {"content": 3}},
        {"2048": {"content": None}},
        {"2048": {"content": ["<a>"]}},
        {"2048": {"content": ""}},
        {"2049": {"content": "<a>"}},
    ],
    ids=str,
)
def test_a_malformed_added_tokens_decoder_is_refused(sentencepiece_folder: Path, table: Any) -> None:
    write_config(sentencepiece_folder, "<s>", "</s>", added_tokens_decoder=table)
    refused(lambda: load_tokenizer(sentencepiece_folder))
