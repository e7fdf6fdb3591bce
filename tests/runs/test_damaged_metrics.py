"""The promise that a damaged `metrics.jsonl` neither ends a run nor goes unnoticed.

The file is spoiled in every way that a disk, a power cut or an editor does it. A resumed run takes the same steps as
ever, keeps each line that it can, says what is lost, and puts what it cannot use aside.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minift.checkpoint import load_model
from minift.cli import main
from minift.errors import InputError
from minift.runs import loop
from minift.runs.metrics import cut_metrics, read_metrics
from minift.runs.progress import Best
from tests.helpers import write_jsonl

STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """Return the folder of a run of six steps, saved after the fourth and evaluated after each second one."""
    folder = tmp_path_factory.mktemp("whole")
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    data = write_jsonl(folder / "pairs.jsonl", pairs)
    words = (
        f"--device cpu --dtype float32 --steps {STEPS} --save-every 4 --keep 0 --eval-every 2 --batch-size 2 --warmup 1"
    )
    inputs = ["--model", str(small_checkpoint), "--data", str(data)]
    assert main(["finetune", *inputs, *words.split(), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, as if it had been killed after step 5."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    lines = lines_of(out)
    assert [json.loads(line)["step"] for line in lines if b'"loss"' in line] == list(range(1, STEPS + 1))
    (out / "metrics.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 5))
    return out


def lines_of(out: Path) -> list[bytes]:
    return (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def steps_of(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out / "metrics.jsonl") if record["step"]]


def spoil(out: Path, step: int, change: Callable[[bytes], bytes]) -> bytes:
    """Change the line of a step; return what is now in its place."""
    lines = lines_of(out)
    place = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == step)
    lines[place] = change(lines[place])
    (out / "metrics.jsonl").write_bytes(b"".join(lines))
    return lines[place]


def with_value(key: str, value: object) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps({**json.loads(line), key: value}).encode() + b"\n"


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "torn": (lambda line: line[:20] + b"\n", "not valid JSON"),
    "zeros": (lambda line: b"\0" * len(line) + b"\n", "not valid JSON"),
    "bytes": (lambda line: b"\xff\xfe\x80" + line, "not UTF-8 text"),
    "a list": (lambda line: b"[1, 2]\n", "holds list, not an object"),
    "empty": (lambda line: b"\n", "it is empty"),
    "deep": (lambda line: b"[" * 100_000 + b"\n", "nested too deeply"),
    "no step": (lambda line: b'{"loss": 1.0}\n', "its step is None"),
    "a step of text": (with_value("step", "2"), "its step is '2'"),
    "a step below 0": (with_value("step", -2), "its step is -2"),
    "twice": (with_value("step", 1), "its step is 1, and that of a line before it 1"),
    "a loss of text": (with_value("loss", "low"), "its loss is 'low', not a number"),
    "no speed": (with_value("tokens_per_second", None), "its tokens_per_second is None, not a number"),
    "a strange validation loss": (with_value("validation_loss", [1]), "its validation_loss is [1], not a number"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_put_aside_and_named(
    stopped: Path, whole: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = DAMAGE[damage]
    bad = spoil(stopped, 2, change)
    with pytest.raises(InputError, match=r"metrics.jsonl:\d: not the line of a step: "):
        Best.of(stopped / "metrics.jsonl")
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 0
    shown = capsys.readouterr().out
    assert f"moved to metrics.jsonl.damaged: {reason}" in shown
    assert "steps without a line: 2 (the report and the lowest validation loss lack them)" in shown
    assert steps_of(stopped) == [1, 3, 4, 5, 6]
    assert (stopped / "metrics.jsonl.damaged").read_bytes() == bad
    ours, theirs = (torch.load(out / "final" / "model.pt", weights_only=True) for out in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("change", "said", "steps"),
    [
        (Path.unlink, "missing; steps without a line: 1 to 4 (", [5, 6]),
        (lambda file: file.write_bytes(b""), "incomplete; steps without a line: 1 to 4 (", [5, 6]),
        (lambda file: file.write_bytes(b"".join(lines_of(file.parent)[:-3])), "incomplete; steps without", None),
        (lambda file: file.write_bytes(os.urandom(3_000)), "moved to metrics.jsonl.damaged: ", [5, 6]),
    ],
    ids=["missing", "empty", "short", "random bytes"],
)
def test_lost_lines_are_counted(
    stopped: Path,
    change: Callable[[Path], object],
    said: str,
    steps: list[int] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(stopped / "metrics.jsonl")
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 0
    shown = capsys.readouterr().out
    assert f"{stopped / 'metrics.jsonl'}: " in shown
    assert said in shown
    assert steps is None or steps_of(stopped) == steps
    assert (stopped / "report.html").exists()


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b"\0" * 50, b"\xff\n\xfe\n", b""], ids=repr)
def test_what_is_torn_after_the_last_save_is_taken_again_without_a_word(
    stopped: Path, whole: Path, torn: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a power cut leaves it: the lines up to a save are on the disk."""
    lines = [line for line in lines_of(stopped) if json.loads(line)["step"] <= 4]
    (stopped / "metrics.jsonl").write_bytes(b"".join(lines) + torn)
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 0
    assert "metrics.jsonl: " not in capsys.readouterr().out
    assert steps_of(stopped) == steps_of(whole)
    assert not (stopped / "metrics.jsonl.damaged").exists()


def test_a_last_line_without_its_end_is_whole(stopped: Path) -> None:
    """The next line is not glued to it."""
    lines = [line for line in lines_of(stopped) if json.loads(line)["step"] <= 4]
    (stopped / "metrics.jsonl").write_bytes(b"".join(lines)[:-1])
    assert cut_metrics(stopped / "metrics.jsonl", 4) == ""
    assert (stopped / "metrics.jsonl").read_bytes() == b"".join(lines)


def test_lines_are_cut_by_their_steps(tmp_path: Path) -> None:
    """Not by their number: a line of step 0 says what was measured before the first one."""
    numbers = dict.fromkeys(("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"), 1.0)
    first = {"step": 0, "validation_loss": 2.5}
    file = write_jsonl(tmp_path / "metrics.jsonl", [first, *({"step": i, **numbers} for i in range(1, 6))])
    assert cut_metrics(file, 3) == ""
    assert [record["step"] for record in read_metrics(file)] == [0, 1, 2, 3]
    assert Best.of(file).loss == 2.5
    before = file.stat().st_mtime_ns
    assert cut_metrics(file, 3) == cut_metrics(file, None) == ""
    assert file.stat().st_mtime_ns == before
    assert cut_metrics(file, -1) == ""  # a run that begins again
    assert read_metrics(file) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda file, other: file.mkdir(),
        lambda file, other: os.mkfifo(file),
        lambda file, other: file.symlink_to(other),
        lambda file, other: file.symlink_to(file),
    ],
    ids=["folder", "pipe", "link", "loop"],
)
def test_what_is_no_file_is_refused(
    stopped: Path, tmp_path: Path, make: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = stopped / "metrics.jsonl", tmp_path / "thesis.txt"
    other.write_text("the only copy")
    file.unlink()
    make(file, other)
    assert main(["finetune", "--resume", "--out", str(stopped)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"{file}: is a link, a folder or a pipe, not the file of a run's metrics; move it away" in message
    assert other.read_text() == "the only copy"


@pytest.mark.parametrize("lost", [True, False])
def test_a_finished_run_is_compared_again_all_the_same(
    whole: Path, tmp_path: Path, lost: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    if lost:
        (out / "metrics.jsonl").unlink()
    else:
        spoil(out, 3, lambda line: line[:9] + b"\n")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert f"{out / 'metrics.jsonl'}: {'missing' if lost else 'line '}" in shown.out
    assert steps_of(out) == ([] if lost else [1, 2, 4, 5, 6])


def test_a_line_that_was_lost_is_never_one_of_two(tmp_path: Path) -> None:
    """Damage that is put aside is added to what was put aside before."""
    numbers = dict.fromkeys(("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"), 1.0)
    file = tmp_path / "metrics.jsonl"
    for bad in (b"first", b"second"):
        write_jsonl(file, [bad, {"step": 1, **numbers}])
        assert "line 1 moved to metrics.jsonl.damaged: not valid JSON" in cut_metrics(file, 1)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"first\nsecond\n"


# During the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, STEPS])
@pytest.mark.parametrize("way", ["removed", "replaced", "cut"])
def test_what_another_program_does_to_the_file_is_said(
    whole: Path,
    tmp_path: Path,
    way: str,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once; the run goes on, and no line that is still there is lost."""
    out, shown = tmp_path / "run", loop.show

    def spoiled(bar: object, record: dict[str, float]) -> None:
        shown(bar, record)
        if record["step"] == step:
            file = out / "metrics.jsonl"
            content = file.read_bytes()
            if way == "cut":
                os.truncate(file, len(content.splitlines(keepends=True)[0]))
            else:
                file.unlink()
            if way == "replaced":
                file.write_bytes(content[:-20])

    monkeypatch.setattr(loop, "show", spoiled)
    inputs = json.loads((whole / "config.json").read_text())["inputs"]
    words = ["--model", inputs["model"], "--data", *inputs["data"], "--steps", str(STEPS), "--eval-every", "2"]
    words += ["--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--warmup", "1", "--out", str(out)]
    assert main(["finetune", *words]) == 0
    (said,) = [
        line for line in capsys.readouterr().out.splitlines() if str(out / "metrics.jsonl") in line and "note" in line
    ]
    if way == "cut":
        assert "during the run; the report lacks those steps" in said
        assert steps_of(out)[0] == 1
        assert steps_of(out)[1:] == list(range(step, STEPS + 1))
    else:
        assert said.endswith("was removed or replaced during the run; its lines are written again")
        assert steps_of(out) == list(range(1, STEPS + 1))
        assert torch.equal(*(load_model(it / "final").embed_tokens.weight for it in (out, whole)))
