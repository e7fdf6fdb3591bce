"""A mistyped word is answered with the known one that is nearest, and with the help of the command it was given to."""

import re
import shutil
from pathlib import Path

import pytest

from minift.cli import main
from minift.errors import did_you_mean
from tests.helpers import write_jsonl


@pytest.mark.parametrize(
    ("words", "nearest", "helps"),
    [
        (["finetun"], "finetune", "minift"),
        (["evalute", "--model", "x"], "evaluate", "minift"),
        (["data", "peak", "x"], "peek", "minift data"),
        (["tokenizer", "templtes"], "templates", "minift tokenizer"),
        (["generate", "--modle", "bundled", "--prompt", "x"], "--model", "minift generate"),  # which is then missing
        (
            ["generate", "--model", "bundled", "--prompt", "x", "--max-new-token=3"],
            "--max-new-tokens",
            "minift generate",
        ),
        (["finetune", "--batchsize", "3"], "--batch-size", "minift finetune"),
        (["data", "audit", "x.jsonl", "--max-lenght", "9"], "--max-length", "minift data audit"),
        (["explain", "x", "--model", "bundled", "--learn", "lst"], "last", "minift explain"),
        (["finetune", "--dtype", "bfloat61"], "bfloat16", ""),
        (["finetune", "--schedule", "cosin"], "cosine", ""),
        (["info", "--config", "llama2-7"], "llama2-7b", ""),
        (["finetune", "--lora-rank", "2", "--lora-targets", "q_porj"], "q_proj", ""),
        (["explain", "x", "--model", "bundled", "--colour", "alway"], "always", ""),
        (["convert", "bundled", "out", "--to", "natve"], "native", ""),
        (["convert", "bundled", "out", "--to", "hf", "--dtype", "bflot16"], "bfloat16", ""),
        (["generate", "--model", "bundled", "--prompt", "x", "--template", "alpacca"], "alpaca", ""),
        (["info", "--model", "bundeld"], "bundled", ""),
        (["finetune", "--model", "bundeld"], "bundled", ""),
        (["explain", "x", "--model", "bundeld"], "bundled", ""),
        (["tokenizer", "show", "x", "--model", "bundeld"], "bundled", ""),
        (["data", "stats", "bundled", "--tokenizer", "x"], "", ""),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else None,
)
def test_the_nearest_word_is_named(
    words: list[str], nearest: str, helps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.findall(r"\(did you mean (.*?)\?\)", said) == [nearest] * bool(nearest)
    assert re.findall(r"\(see (.*) --help\)", said) == [helps] * bool(helps)
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_answered_with_its_neighbour(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_checkpoint, tmp_path / "models" / "smollm2")
    write_jsonl(tmp_path / "pairs.jsonl", [{"question": "Q", "answer": "A"}])
    hub = tmp_path / "hub"
    (hub / "models--HuggingFaceTB--SmolLM2-135M").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    for words, nearest in (
        (["info", "--model", "models/smolm2"], "models/smollm2"),
        (["info", "--model", str(tmp_path / "models" / "smollm")], str(tmp_path / "models" / "smollm2")),
        (["info", "--model", "HuggingFaceTB/SmolLM2-135"], "HuggingFaceTB/SmolLM2-135M"),
        (["data", "peek", "pair.jsonl"], "pairs.jsonl"),
    ):
        assert main(words) == 2
        assert re.findall(r"\(did you mean (.*?)\?\)", capsys.readouterr().err) == [nearest]


def test_a_word_like_none_is_answered_without_one() -> None:
    assert did_you_mean("vicuna", ("plain", "qa", "alpaca")) == ""
    assert did_you_mean("plain", ("plain",)) == ""  # it is no other word
    assert did_you_mean("x" * 10**6, ("x" * 99,)) == ""
    assert did_you_mean("", ("a",)) == ""


def test_words_that_look_like_flags_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """After `--`, with a space in them, and as the value of a flag."""
    assert main(["tokenizer", "show", "--", "--text"]) == 0
    assert main(["tokenizer", "show", "--a text"]) == 0
    assert main(["data", "format", "bundled", "--template=--qa"]) == 2
    assert "see minift" not in capsys.readouterr().err
