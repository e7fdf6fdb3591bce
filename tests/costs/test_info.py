"""The promise of `minift info`: the numbers of `costs/` for a model of every format, without reading its weights."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.cli import main
from minift.config import LlamaConfig
from minift.costs.flops import (
    count_parameters,
    forward_flops_per_token,
)
from minift.costs.memory import inference_memory, training_memory
from minift.formats.convert import convert
from minift.formats.files import TensorFile
from minift.formats.shapes import model_without_weights
from tests.helpers import small_model


def told(file: Path, *words: str | Path) -> dict[str, Any]:
    """What `minift info --json` writes."""
    assert main(["info", *map(str, words), "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
def test_info_of_a_model_of_every_format(
    small_checkpoint: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "hf":
        pytest.importorskip("safetensors")
        pytest.importorskip("tokenizers")
    model = tmp_path / ("model.bin" if to == "llama2c" else "model")
    convert(small_checkpoint, model, to, shards=2 if to == "meta" else 1)
    found = told(tmp_path / "info.json", "--model", model, "--batch-size", "3", "--max-length", "70", "--device", "cpu")
    config = LlamaConfig.from_file(small_checkpoint / "config.json")
    weights = torch.load(small_checkpoint / "model.pt", weights_only=True)
    numel = sum(tensor.numel() for tensor in weights.values())
    assert (found["format"], found["model"]) == (to, str(model))
    assert found["parameters"] == numel
    assert found["parameters_without_embedding"] == numel - weights["embed_tokens.weight"].numel()
    assert found["stored"] == {"float32": 4 * numel}
    names = {
        "native": ["model.pt"],
        "hf": ["model.safetensors"],
        "meta": ["consolidated.00.pth", "consolidated.01.pth"],
        "llama2c": ["model.bin"],
    }
    assert found["files"] == names[to]
    assert found["tokenizer"].endswith("2,048 ids")
    shape = {key: value for key, value in config.to_dict().items() if key != "initializer_range"}
    assert {key: found["shape"][key] for key in shape} == shape
    assert found["tied"] is True
    assert found["notes"] == []
    assert (found["batch_size"], found["length"], found["device"]) == (3, 70, "cpu")
    assert found["forward_flops_per_token"] == forward_flops_per_token(config, 70)
    assert found["training_flops_per_token"] == 3 * found["forward_flops_per_token"]
    assert found["training_memory"]["bfloat16"] == training_memory(config, "bfloat16", 3, 70, device="cpu")
    assert found["inference_memory"]["float16"] == inference_memory(config, "float16", 3, 70)
    shown = capsys.readouterr().out
    for fact in (
        f"({to})",
        f"{numel:,}",
        "4 heads of 6, 2 for keys and values (grouped-query)",
        "one matrix",
        "T = 70",
    ):
        assert fact in shown
    assert "training on cpu, 3 x 70 tokens" in shown


def test_info_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path / "info.json", "--config", "llama2-7b")
    assert (found["config"], found["parameters"], found["length"]) == ("llama2-7b", 6_738_415_616, 4_096)
    shown = capsys.readouterr().out
    assert "6,738,415,616" in shown
    assert f"{found['forward_flops_per_token'] / 1e9:.3g} G forward" in shown
    assert f"{found['training_flops_per_token'] / 1e9:.3g} G in training" in shown
    config = small_model(num_key_value_heads=1, tie_word_embeddings=False).config
    (tmp_path / "config.json").write_text(config.to_json())
    found = told(tmp_path / "info.json", "--config", tmp_path / "config.json", "--max-length", "64")
    assert found["parameters"] == count_parameters(config).total
    shown = capsys.readouterr().out
    assert "(multi-query)" in shown
    assert "two matrices" in shown


def test_the_page_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path / "info.json", "--config", "bundled", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    totals = [line.split()[1:] for line in lines if line.startswith("total")]
    for row, ledgers in zip(totals, (found["training_memory"], found["inference_memory"]), strict=True):
        cells = [float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] for value, unit in zip(row[::2], row[1::2])]  # noqa: B905
        for cell, ledger in zip(cells, ledgers.values(), strict=True):
            assert cell == pytest.approx(sum(ledger.values()), rel=0.06)


def test_info_does_not_read_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2.2 GB, of which only the header is there."""
    pytest.importorskip("safetensors")
    config = LlamaConfig.preset("tinyllama-1.1b")
    weights = model_without_weights(config).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + 2 * tensor.numel()
        theirs = name if name == "lm_head.weight" else f"model.{name}"
        header[theirs] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(config.to_json())
    monkeypatch.delattr(TensorFile, "read")
    found = told(tmp_path / "info.json", "--model", tmp_path)
    assert found["parameters"] == 1_100_048_384
    assert found["stored"] == {"bfloat16": 2 * 1_100_048_384}
    assert found["tokenizer"].startswith("none")


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ([], "--model"),
        (["--model", "bundled", "--config", "bundled"], "not allowed with"),
        (["--model", "nowhere"], "nowhere: no such file"),
        (["--config", "llama9"], "unknown preset 'llama9'"),
        (["--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--model", "bundled", "--batch-size", "0"], "batch_size is 0"),
        (["--model", "bundled", "--batch-size", "many"], "many"),
        (["--model", "bundled", "--max-length", "0"], "max_length is 0"),
        (["--model", "bundled", "--max-length", "513"], "max_length is 513; it must be below 513"),
        (["--model", "bundled", "--device", "tpu"], "device is 'tpu'"),
        (["--model", "bundled", "--json", "nowhere/info.json"], "nowhere/info.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_line_and_exit_2(
    words: list[str], culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minift: error: ")
    assert culprit in line
