"""The promise that a run may be stopped anywhere, and continues as if it had not been stopped.

Real processes get real signals while they train: after Ctrl-C and SIGTERM they finish the step and save. The command
that they print is then run. The result is compared with a run in this process that was never stopped: every loss,
learning rate and gradient norm, and every bit of the final weights. (`test_resume_bitwise.py` is about kill -9.)
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model
from minift.cli import main
from minift.runs.steps import step_folders
from minift.tokenizer.base import Tokenizer
from tests.helpers import ROOT, SMALL, write_jsonl

STEPS = 120  # some seconds of training: a signal sent after a few steps comes long before the end
SAVE_EVERY = 30


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, in this process as in the others, so that every sum is taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(words: Sequence[str | Path], folder: Path) -> subprocess.Popen[str]:
    """Start `minift` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minift", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop(words: Sequence[str | Path], folder: Path, out: Path, after: int, number: signal.Signals) -> tuple[int, str]:
    """Start a run, send it a signal once it has taken `after` steps, and return its exit code and what it printed."""
    process = start(words, folder)
    file = out / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_bytes().count(b"\n") < after:
        assert process.poll() is None, process.communicate(timeout=60)[1]
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=240)
    assert "Traceback" not in stderr
    return process.returncode, stdout


def assert_same_run(out: Path, whole: Path) -> None:
    """Check that two runs have the same numbers at every step (but for the times), and the same weights at the end."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss")
    mine, theirs = metrics(out), metrics(whole)
    assert [record["step"] for record in theirs] == list(range(1, STEPS + 1))
    assert [[record.get(key) for key in keys] for record in mine] == [
        [record.get(key) for key in keys] for record in theirs
    ]
    a, b = (torch.load(run / "final" / "model.pt", weights_only=True) for run in (out, whole))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """Return for each job the words of a run of STEPS steps, which takes some seconds."""
    folder = tmp_path_factory.mktemp("inputs with spaces")
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(50)]
    pages = [{"text": f"The number {i} comes after the number {i - 1}, and before {i + 1}."} for i in range(90)]
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(folder)
    data, test = write_jsonl(folder / "pairs.jsonl", pairs[:45]), write_jsonl(folder / "test.jsonl", pairs[45:])
    corpus = write_jsonl(folder / "pages.json.gz", pages)
    common = ["--device", "cpu", "--steps", STEPS, "--save-every", SAVE_EVERY, "--keep", 0, "--grad-accum", 2]
    finetune = ["finetune", "--model", small_checkpoint, "--data", data, "--test", test, "--batch-size", 4]
    pretrain = ["pretrain", "--config", folder / "shape.json", "--data", corpus, "--tokenizer", folder]
    pretrain += ["--validation", corpus, "--batch-size", 2, "--max-length", 48]
    return {
        "finetune": [str(word) for word in (*finetune, "--eval-every", 50, *common)],
        "pretrain": [str(word) for word in (*pretrain, "--eval-every", 50, *common, "--dtype", "float32")],
    }


@pytest.fixture(scope="module", params=["finetune", "pretrain"])
def job(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(inputs: dict[str, list[str]], job: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*inputs[job], "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number"), [("finetune", signal.SIGTERM), ("pretrain", signal.SIGINT)], indirect=["job"]
)
def test_a_stopped_run_prints_the_command_that_continues_it_exactly(
    inputs: dict[str, list[str]],
    job: str,
    whole: Path,
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "a run"  # with a space, so that the printed command has to quote it
    code, stdout = stop([*inputs[job], "--out", out], tmp_path, out, after=7, number=number)
    assert code == 1
    taken = len(metrics(out))
    assert 7 <= taken < STEPS
    assert step_folders(out) == [out / f"step_{taken:06d}"]
    assert not (out / "final").exists()

    printed = re.search(r"^stopped and saved; continue with: (.+)$", stdout, re.MULTILINE)
    assert printed, stdout
    words = shlex.split(printed[1])
    assert words[0] == "minift" or words[:3] == [sys.executable, "-m", "minift"]  # the one that this machine has
    assert main(words[words.index("minift") + 1 :]) == 0
    assert f"{out}: continues after step {taken} of {STEPS}" in capsys.readouterr().out  # no step is taken again
    assert_same_run(out, whole)


@pytest.mark.slow
def test_every_saved_folder_can_be_continued(
    inputs: dict[str, list[str]], job: str, whole: Path, tmp_path: Path
) -> None:
    """As if the run had been killed right after this save, for instance by a power cut."""
    folders = sorted(folder.name for folder in whole.glob("step_*"))
    assert folders == [f"step_{i:06d}" for i in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]
    assert {file.name for file in (whole / folders[0]).iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "model.pt",
        "tokenizer.model",
        "training.pt",
    }
    load_model(whole / folders[0])  # it is a checkpoint like any other, too
    out, step = tmp_path / "run", 2 * SAVE_EVERY
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    shutil.copytree(whole / f"step_{step:06d}", out / f"step_{step:06d}")
    (out / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").read_text().splitlines(keepends=True)[:step]))
    # Flags that equal the run's settings are accepted.
    assert main([*inputs[job], "--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(whole: Path, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in whole.rglob("*") if file.is_file()}

    before = look()
    assert main([job, "--resume", "--out", str(whole)]) == 0
    capsys.readouterr()
    after = look()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name] and not name.endswith("compare.json")] == []


def test_a_second_signal_interrupts_at_once(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A user who presses Ctrl-C twice does not want to wait for the step. The old handlers are restored."""
    from minift import train

    data = write_jsonl(tmp_path / "x.jsonl", [{"question": f"What is {i}?", "answer": "A number."} for i in range(9)])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def impatient(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(train, "train_step", impatient)
    words = ["finetune", "--model", small_checkpoint, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
    assert main([str(word) for word in words]) == 1
    printed = capfd.readouterr()
    assert "stopping after this step" in printed.err
    assert "stopping now" in printed.err
    assert printed.out.splitlines()[-1].startswith("stopped and saved; continue with: ")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
