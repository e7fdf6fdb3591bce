"""The promise that a disk may fail at any moment: what was saved before is there, and the reason is one line.

`faulty_disk.c` stands between a process and the system, and makes each call of a save fail in turn: once, from then
on, or by a loss of power that also takes what had not been flushed. Whole runs then meet disks that are really full, a
limit on the size of files, and a folder that may only be read.
"""

import json
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from tests.helpers import ROOT, completed, write_jsonl

pytestmark = pytest.mark.slow


def run_campaign(folder: Path, *flags: str) -> list[dict[str, Any]]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = folder / "faulty_disk.so"
    source = ROOT / "tests" / "hostile" / "faulty_disk.c"
    completed([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hostile.faulty_disk", str(folder), *flags]
    done = completed(command, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of every save."""
    return run_campaign(tmp_path_factory.mktemp("disk"))


def test_every_call_of_every_save_has_failed_in_every_way(saves: list[dict[str, Any]]) -> None:
    counts = Counter((it["save"], it["disk"], it["calls"]) for it in saves)
    assert len(counts) == 9
    assert all(
        count == (-(-calls // 4) if disk == "stays full" else calls) for (_, disk, calls), count in counts.items()
    )
    least = {"step": 60, "model": 30, "file": 5}  # open, write, flush, rename, remove: of each file, and the folders
    assert all(calls >= least[save] for save, _, calls in counts)


@pytest.mark.parametrize("disk", ["fails once", "stays full"])
def test_a_save_that_fails_says_so_in_one_line_and_leaves_the_older_one(saves: list[dict[str, Any]], disk: str) -> None:
    """One that fails only in removing what is not needed any more has not failed, or has nothing to be undone."""
    failed = [it for it in saves if it["disk"] == disk]
    assert {it["code"] for it in failed} == {0, 1}
    for it in failed:
        assert it["found"] == ("new" if it["code"] == 0 or "cannot be removed" in it["said"] else "old"), it
        if it["code"]:
            reason = "No space left on device|Input/output error"
            assert it["said"].startswith(it["folder"]), it
            assert any(it["said"].endswith(f": {what}") for what in reason.split("|")), it
            assert not [name for name in it["left"] if name.endswith(".partial")], it


def test_a_loss_of_power_leaves_the_older_or_the_newer_one(saves: list[dict[str, Any]]) -> None:
    lost = [it for it in saves if it["disk"] == "loses power"]
    assert {it["code"] for it in lost} == {137}
    assert {it["found"] for it in lost} == {"old", "new"}
    for save in ("step", "model", "file"):  # it is the newer one from some call on, and stays so
        found = [it["found"] for it in lost if it["save"] == save]
        assert found == sorted(found, reverse=True)


def test_the_next_save_succeeds_and_nothing_is_left_over(saves: list[dict[str, Any]]) -> None:
    for it in saves:
        assert (it["then"], it["as_good"]) == ("new", True), it


def test_saves_that_flush_nothing_would_have_been_noticed(tmp_path: Path) -> None:
    careless = run_campaign(tmp_path, "--careless")
    assert any(it["found"] not in ("old", "new") for it in careless)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finetune(tmp_path: Path, small_checkpoint: Path) -> list[str]:
    """The words of a short run, without `--out`. A checkpoint of it has about 0.8 MB."""
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["finetune", "--model", small_checkpoint, "--data", data, "--steps", 4, "--save-every", 1, "--keep", "0"]
    return [str(word) for word in (*words, "--batch-size", 4, "--device", "cpu", "--dtype", "float32")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    place = tmp_path / "small disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(place)]
    if not shutil.which("mount") or completed(mount).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    completed(["umount", place], check=True)


def last_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    finetune: list[str], small_disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed before the first step; what fills it later, when that comes."""
    out, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_800_000)
    assert main([*finetune, "--out", str(out)]) == 1
    assert "saves need up to" in last_line(capfd.readouterr().err)
    monkeypatch.setattr("minift.runs.common.check_space", lambda out, needed: None)
    assert main([*finetune, "--out", str(out)]) == 1
    assert last_line(capfd.readouterr().err).endswith("cannot be written: No space left on device")
    assert [path.name for path in out.glob("step_*")] == ["step_000001"]
    assert not list(out.glob(".*"))
    ballast.unlink()
    assert main(["finetune", "--resume", "--keep", "1", "--out", str(out)]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == [1, 2, 3, 4]


def test_a_limit_on_the_size_of_files_ends_a_run_in_one_line(finetune: list[str], tmp_path: Path) -> None:
    """As a quota does; the system also sends a signal, which must not kill the run in the middle of a save."""
    out = tmp_path / "run"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    command = [sys.executable, "-m", "minift", *finetune, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = completed(command, preexec_fn=limit, env=env)
    assert done.returncode == 1, done.stderr
    assert last_line(done.stderr) == f"minift: error: {out / 'step_000001'}: cannot be written: File too large"
    assert not list(out.glob("*step*"))
    assert main(["finetune", "--resume", "--out", str(out)]) == 0


def test_a_folder_that_may_only_be_read_is_named(
    finetune: list[str], small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    completed(["mount", "-o", "remount,ro", small_disk], check=True)
    for out in (small_disk, small_disk / "run", small_disk / "a" / "b"):
        capfd.readouterr()
        assert main([*finetune, "--out", str(out)]) == 2
        assert last_line(capfd.readouterr().err) == f"minift: error: {out}: cannot be written: Read-only file system"
