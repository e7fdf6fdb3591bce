"""A model may have more ids than its tokenizer: its vocabulary is padded, to a multiple of 64 or by a tool.

Such an id stands for no text, as in `transformers`. A model that chooses it is asked to go on, and no command ends.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.generate import generate
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.stream import TextStream
from tests.helpers import small_model, write_jsonl

PAIRS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(20)]


def test_an_id_beyond_the_vocabulary_stands_for_no_text(any_kind: Tokenizer) -> None:
    size = any_kind.vocab_size
    ids = any_kind.encode("Mexico City, 日本 🙂")
    padded = [size, *(each for id in ids for each in (id, size + id))]
    assert any_kind.decode(padded) == any_kind.decode(ids) == "Mexico City, 日本 🙂"
    ids = any_kind.encode_continuation(" Mexico City, 日本 🙂")
    padded = [size, *(each for id in ids for each in (id, size + id))]
    assert any_kind.decode_continuation(padded) == any_kind.decode_continuation(ids) == " Mexico City, 日本 🙂"
    assert any_kind.pieces([size, 10**9]) == ["", ""]
    stream = TextStream(any_kind)
    assert "".join(map(stream.add, padded)) + stream.end() == " Mexico City, 日本 🙂"


def test_transformers_gives_it_no_text_either(each: Tokenizer, theirs: Any) -> None:
    ids = each.encode("Mexico City", bos=False)
    padded = [ids[0], each.vocab_size, *ids[1:], each.vocab_size + 63]
    assert theirs.decode(padded) == theirs.decode(ids) == each.decode(padded)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A checkpoint that always chooses the id after its tokenizer's last one."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    size = tokenizer.vocab_size
    model = small_model(vocab_size=size + 64, max_position_embeddings=256, tie_word_embeddings=False, std=0.02)
    with torch.no_grad():
        model.embed_tokens.weight.fill_(1)
        model.norm.weight.fill_(1)
        for layer in model.layers:  # add nothing to it
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[size] = 1
    save_model(folder, model, tokenizer)
    assert generate(load_model(folder), [tokenizer.encode("Why?")], 5) == [[size] * 5]
    return folder


@pytest.mark.parametrize("temperature", ["0", "0.2"])
def test_a_command_goes_on_after_such_an_id(
    padded: Path, tmp_path: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    model = ("--model", str(padded), "--device", "cpu")
    sampled = ("--max-new-tokens", "5", "--temperature", temperature)
    assert main(["generate", *model, "--prompt", "Why?", *sampled]) == 0
    assert main(["evaluate", *model, "--data", str(data), "--mistakes", "3"]) == 0
    assert main(["compare", str(padded), "bundled", "--data", str(data), "--device", "cpu"]) == 0
    assert main(["explain", "Why?", *model[:2]]) == 0
    assert "outside" not in capsys.readouterr().err


def test_a_finetune_comes_to_its_end(padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    words = ("--model", str(padded), "--data", str(data), "--out", str(out), "--device", "cpu")
    assert main(["finetune", *words, "--steps", "1", "--lr", "1e-9"]) == 0
    assert {sample["after"] for sample in json.loads((out / "compare.json").read_text())["samples"]} == {""}
    assert generate(load_model(out / "final"), [[1, 5]], 3)  # it is a model that can be used
