"""The promise that a run is resumed by its folder alone, from wherever one stands.

Runs are begun with relative paths of every kind, and resumed from another folder: each ends as the run that was not
stopped. Flags that are given again may write a path in another way.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from minift.cli import main
from minift.runs.inputs import from_anywhere, same_input
from minift.tokenizer.base import Tokenizer
from tests.helpers import SMALL, write_jsonl

COMMON = "--device cpu --dtype float32 --steps 4 --save-every 2 --keep 0 --batch-size 2 --warmup 1"
FINETUNE = "--model models/small --data pairs.jsonl --test ./held/out.jsonl --template mine.txt --max-length 64"
PRETRAIN = (
    "--config shape.json --data pages/*.jsonl --tokenizer models/small --validation pages/a.jsonl --max-length 16"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, tokenizer: Tokenizer) -> Path:
    """Return a folder of inputs and of both runs, made in it; its name would be a pattern in a glob."""
    folder = tmp_path_factory.mktemp("home") / "runs [1] of *"
    for name in ("models", "held", "pages"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(small_checkpoint, folder / "models" / "small")
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    write_jsonl(folder / "pairs.jsonl", pairs[:9])
    write_jsonl(folder / "held" / "out.jsonl", pairs[9:])
    (folder / "mine.txt").write_text("Q: {question}\nA: {answer}")
    for name in "ab":
        write_jsonl(
            folder / "pages" / f"{name}.jsonl", [{"text": f"{name} page {i} of some words."} for i in range(20)]
        )
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["finetune", *FINETUNE.split(), *COMMON.split(), "--out", "finetune"]) == 0
        assert main(["pretrain", *PRETRAIN.split(), *COMMON.split(), "--out", "pretrain"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def stopped(home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a copy of a run as it was when it had been killed after step 2."""
    out = tmp_path / "moved" / "run"
    shutil.copytree(home / request.param, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000004")
    return out


both = pytest.mark.parametrize("stopped", ["finetune", "pretrain"], indirect=True)


def job_of(out: Path) -> str:
    return str(json.loads((out / "config.json").read_text())["job"])


def assert_done(out: Path, home: Path) -> None:
    ours, theirs = (torch.load(run / "final" / "model.pt", weights_only=True) for run in (out, home / job_of(out)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@both
@pytest.mark.parametrize("form", ["absolute", "relative", "the folder itself"])
def test_a_run_is_resumed_from_another_folder(
    stopped: Path, home: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder was moved, too."""
    place, word = {
        "absolute": (Path("/"), str(stopped)),
        "relative": (tmp_path, "moved/run"),
        "the folder itself": (stopped, "."),
    }[form]
    monkeypatch.chdir(place)
    assert main([job_of(stopped), "--resume", "--out", word]) == 0
    assert_done(stopped, home)


@both
def test_flags_that_are_given_again_name_the_same_files(
    stopped: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command that began the run did, from its folder; and from a folder below, by other paths."""
    job = job_of(stopped)
    words = (FINETUNE if job == "finetune" else PRETRAIN).split()
    monkeypatch.chdir(home)
    assert main([job, "--resume", *words, "--out", str(stopped)]) == 0
    assert_done(stopped, home)
    monkeypatch.chdir(home / "held")
    words = [f"../{word}" if "/" in word or "." in word else word for word in words]
    assert main([job, "--resume", *words, "--out", str(stopped)]) == 0


@pytest.mark.parametrize("stopped", ["finetune"], indirect=True)
def test_another_file_of_that_name_is_refused(
    stopped: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(home / "pairs.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--resume", "--data", "pairs.jsonl", "--out", str(stopped)]) == 2
    assert f"--data is ['pairs.jsonl'], but the run in {stopped} has" in capsys.readouterr().err


@both
def test_a_run_of_an_earlier_version_goes_on_where_it_was_begun(
    stopped: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its paths are as they were given. From elsewhere the message says where to resume it."""
    run = json.loads((stopped / "config.json").read_text())
    del run["contents"]
    for part in ("inputs", "train"):
        text = json.dumps(run[part])
        run[part] = json.loads(text.replace(f"{json.dumps(str(home))[1:-1]}/", ""))
    (stopped / "config.json").write_text(json.dumps(run))
    monkeypatch.chdir(tmp_path)
    assert main([run["job"], "--resume", "--out", str(stopped)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"no such file in {tmp_path}; the run was begun in another folder: resume it there" in message
    assert str(stopped / "config.json") in message
    monkeypatch.chdir(home)
    assert main([run["job"], "--resume", "--out", str(stopped)]) == 0
    assert "has no checksums of what the run was made from" in capsys.readouterr().out
    assert_done(stopped, home)


@pytest.mark.parametrize("stopped", ["finetune"], indirect=True)
def test_inputs_that_were_moved_may_be_named_in_the_config(
    stopped: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped / "config.json"
    text = file.read_text()
    gone = str(home / "pairs.jsonl")
    place = shutil.move(shutil.copy(gone, tmp_path), tmp_path / "elsewhere.jsonl")
    file.write_text(text.replace(gone, "/nowhere/pairs.jsonl"))
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message == (
        "minift: error: /nowhere/pairs.jsonl: no such file; the run was begun with it: put it back, "
        f"or write its new place into {file}"
    )
    file.write_text(text.replace(gone, str(place)))
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 0
    assert_done(stopped, home)


@pytest.mark.parametrize("stopped", ["finetune"], indirect=True)
@pytest.mark.parametrize("change", ["the same", "other", "none"])
def test_standard_input_must_give_the_same_again(
    stopped: Path, home: Path, change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped / "config.json"
    file.write_text(file.read_text().replace(str(home / "pairs.jsonl"), "-"))
    data = (home / "pairs.jsonl").read_bytes()
    read, write = os.pipe()
    os.write(write, {"the same": data, "other": data.replace(b"number", b"digit"), "none": b""}[change])
    os.close(write)
    with os.fdopen(read) as opened:
        monkeypatch.setattr("sys.stdin", opened)
        assert main(["finetune", "--resume", "--out", str(stopped)]) == (0 if change == "the same" else 2)
    shown = capsys.readouterr()
    assert "note: the run reads standard input, and needs the same data there again" in shown.out
    if change == "the same":
        assert_done(stopped, home)
    else:
        (message,) = shown.err.splitlines()
        assert message.startswith("minift: error: -: ")
        assert ("the data has changed since" if change == "other" else "holds no records") in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "bundled"),
        ("model", "owner/model"),
        ("config", "stories15m"),
        ("data", ["-"]),
        ("template", "qa"),
        ("template", "chat"),
        ("text_field", "text"),
        ("fields", ["question", "answer"]),
        ("encoding", "utf-8"),
    ],
)
def test_what_is_no_path_is_recorded_as_it_is(name: str, value: str | list[str]) -> None:
    assert from_anywhere(name, value) == value


def test_paths_and_globs_are_recorded_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [b]"
    folder.mkdir()
    (folder / "x.jsonl").touch()
    monkeypatch.chdir(folder)
    assert from_anywhere("data", ["x.jsonl", "*.jsonl"]) == [f"{folder}/x.jsonl", f"{tmp_path}/a [[]b]/*.jsonl"]
    assert from_anywhere("model", "./bundled") == f"{folder}/./bundled"
    assert from_anywhere("template", "mine.jinja") == f"{folder}/mine.jinja"
    assert same_input("data", ["x.jsonl"], (f"{tmp_path}/a [b]/../a [b]/x.jsonl",))
    assert not same_input("data", ["x.jsonl"], ["x.jsonl", "x.jsonl"])
    assert not same_input("text_field", "x.jsonl", f"{folder}/x.jsonl")
