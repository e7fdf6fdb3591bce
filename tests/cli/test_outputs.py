"""A file of results that cannot be written is refused before the work, and of a model's files not one is a model."""

from pathlib import Path

import pytest

from minift.cli import main
from tests.helpers import write_jsonl


@pytest.fixture
def words(small_checkpoint: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Return for each command with --json or --html its words without them."""
    data = str(write_jsonl(tmp_path / "x.jsonl", [{"question": f"Q{i}?", "answer": "A"} for i in range(4)]))
    model = str(small_checkpoint)
    return {
        "compare": ["compare", model, model, "--data", data],
        "evaluate": ["evaluate", "--model", model, "--data", data],
        "explain": ["explain", "x", "--model", model],
        "info": ["info", "--model", model],
        "stats": ["data", "stats", data],
        "audit": ["data", "audit", data],
    }


@pytest.mark.parametrize("name", ["compare", "evaluate", "explain", "info", "stats", "audit"])
def test_a_file_that_cannot_be_written_is_said_at_once(
    words: dict[str, list[str]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    places = {"none/x.json": "there is no folder", "folder": "is a folder", "file/x.json": "there is no folder"}
    for place, reason in places.items():
        assert main([*words[name], "--json", str(tmp_path / place)]) == 2
        out, err = capsys.readouterr()
        assert out == ""  # nothing was computed
        assert err.startswith(f"minift: error: {tmp_path / place}: cannot be written: {reason}")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["compare", "explain", "audit"])
def test_two_results_need_two_files(
    words: dict[str, list[str]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = str(tmp_path / "both")
    assert main([*words[name], "--json", both, "--html", both]) == 2
    assert "--json names the same file" in capsys.readouterr().err
    assert main([*words[name], "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert not Path(both).exists()


def test_a_tokenizer_that_could_not_be_saved_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> None:
        pytest.fail("it was trained")

    monkeypatch.setattr("minift.tokenizer.sentencepiece.train_tokenizer", train)
    pages = write_jsonl(tmp_path / "pages.jsonl", [{"text": "A page."}])
    words = ["tokenizer", "train", "--data", str(pages), "--vocab-size", "300", "--out"]
    assert main([*words, str(pages / "new" / "tokenizer.model")]) == 2
    assert f"cannot be written: {pages} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["tokenizer.model", "model.pt", "config.json"])
def test_a_file_of_a_model_is_answered_with_its_folder(
    small_checkpoint: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_checkpoint / file
    for words in (["generate", "--prompt", "x", "--model", str(path)], ["info", "--model", str(path)]):
        assert main(words) == 2
        assert (
            f"{path}: is one file of a model; give the folder that it is in, {path.parent}" in capsys.readouterr().err
        )
