"""The ids that begin and end a text, where config.json leaves them open or does not know a chat model's own.

`transformers` runs such folders: the tokenizer's files say which token it is.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.errors import InputError
from minift.formats.open import open_model
from minift.tokenizer.load import check_fit, load_tokenizer
from tests.helpers import instruct_model, write_jsonl

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")


def change(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **changes}))


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """A chat model whose tokenizer ends a text with <|im_end|>, while its config still has the base's ids."""
    folder = instruct_model(tmp_path / "model")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    added = {vocabulary - 2: "<|im_start|>", vocabulary - 1: "<|im_end|>"}
    decoder = {str(id): {"content": name, "special": True} for id, name in added.items()}
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>", added_tokens_decoder=decoder)
    return folder


def test_a_chat_models_own_end_counts(chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As long as config.json does not say otherwise, training and asking stop there."""
    opened, tokenizer = open_model(chatml), load_tokenizer(chatml)
    assert opened.config.eos_token_ids == (2, tokenizer.eos_id)
    check_fit(opened.config, tokenizer)
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"question": f"{n}?", "answer": f"{n}."} for n in range(12)])
    out = tmp_path / "run"
    words = ("--model", str(chatml), "--data", str(data), "--out", str(out), "--device", "cpu")
    assert main(["finetune", *words, "--steps", "1"]) == 0
    assert main(["generate", "--model", str(out / "final"), "--prompt", "1?", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    "ends", [{"bos_token_id": None}, {"eos_token_id": None}, dict.fromkeys(["bos_token_id", "eos_token_id"])]
)
def test_ids_that_are_null_are_those_that_the_tokenizer_names(chatml: Path, ends: dict[str, None]) -> None:
    change(chatml / "config.json", **ends)
    (chatml / "generation_config.json").unlink()
    config, tokenizer = open_model(chatml).config, load_tokenizer(chatml)
    check_fit(config, tokenizer)
    assert config.eos_token_ids == ((tokenizer.eos_id,) if "eos_token_id" in ends else (2, tokenizer.eos_id))
    assert config.bos_token_id == tokenizer.bos_id


def test_a_null_end_is_generation_configs_where_no_token_is_named(chatml: Path) -> None:
    """And not 2, which may be any piece of its vocabulary."""
    (chatml / "tokenizer_config.json").unlink()
    change(chatml / "config.json", eos_token_id=None)
    change(chatml / "generation_config.json", eos_token_id=[7, 9])
    assert open_model(chatml).config.eos_token_ids == (7, 9)


def test_a_damaged_tokenizer_config_is_said_by_the_tokenizer(chatml: Path) -> None:
    (chatml / "tokenizer_config.json").write_text('{"added_tokens_decoder": 5}')
    assert open_model(chatml).config.eos_token_ids == (2,)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        load_tokenizer(chatml)


def test_ids_of_another_vocabulary_are_still_refused(chatml: Path) -> None:
    change(chatml / "config.json", bos_token_id=7)
    with pytest.raises(InputError, match="the model's bos_token_id is 7, the tokenizer's is 1"):
        check_fit(open_model(chatml).config, load_tokenizer(chatml))
