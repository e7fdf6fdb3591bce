"""The promise of a run's place: earlier runs stay, numbered, unless `--overwrite` says so; and then only a run goes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minift.cli import main
from minift.config import TrainConfig
from minift.distributed.world import World
from minift.errors import InputError
from minift.runs import common, loop
from minift.runs.finetune import finetune, finetune_job
from minift.runs.folder import own_folder, start_folder
from minift.runs.place import check_replaceable, is_free, is_run, newest_run, next_name, remove_run
from minift.runs.progress import Best
from minift.storage.lock import LOCK, locked
from tests.helpers import write_jsonl
from tests.runs.ranks import by_two

FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--steps", "2"]


@pytest.fixture
def words(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a short command without --out, and go to an empty folder."""
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(22)]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return ["finetune", "--model", str(small_checkpoint), "--data", data, *FLAGS]


def make_run(folder: Path, job: str = "finetune") -> Path:
    """Write what tells a run's folder from others."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"job": job, "inputs": {}, "train": {}}))
    (folder / "metrics.jsonl").write_text("")
    (folder / "step_000003").mkdir()
    (folder / "step_000003" / "model.pt").write_bytes(b"weights")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Numbered names -------------------------------------------------------------------------------------------------------


def test_each_run_without_a_place_gets_its_own(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--seed", "1"]) == 0
    assert "taken" not in capsys.readouterr().out
    before = content(Path("runs/finetune"))
    for number in (2, 3):
        assert main([*words, "--seed", str(number)]) == 0
        printed = capsys.readouterr().out
        assert f"runs/finetune is taken; this run's folder is runs/finetune-{number}\n" in printed
        assert f"saved: runs/finetune-{number}/final" in printed
        assert f"look at it: runs/finetune-{number}/report.html" in printed
        assert "runs/finetune/" not in printed
    assert content(Path("runs/finetune")) == before
    assert sorted(os.listdir("runs")) == ["finetune", "finetune-2", "finetune-3"]
    shutil.rmtree("runs/finetune-2/final")
    os.utime("runs/finetune-2/config.json", ns=(2**62, 2**62))
    assert main(["finetune", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "--resume: runs/finetune-2, the newest of 3 runs\n" in printed
    assert "saved: runs/finetune-2/final" in printed
    assert json.loads(Path("runs/finetune-2/config.json").read_text())["train"]["seed"] == 2


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert is_free(out)
    assert newest_run(out) == (out, 0)
    make_run(out)
    assert not is_free(out)
    assert next_name(out) == tmp_path / "mine-2"
    assert newest_run(out) == (out, 1)
    for name in ("mine-4", "mine-x", "mine-05", "mine-1", "mine-2b", "min-9", "mine.-8", "mine-99999999999"):
        (tmp_path / name).mkdir()
    assert next_name(out) == tmp_path / "mine-5"
    assert newest_run(out) == (out, 1)  # the others hold no run
    make_run(tmp_path / "mine-3")
    os.utime(out / "config.json", ns=(10, 10))
    os.utime(tmp_path / "mine-3" / "config.json", ns=(11, 11))
    assert newest_run(out) == (tmp_path / "mine-3", 2)
    os.utime(out / "config.json", ns=(12, 12))
    assert newest_run(out) == (out, 2)


def test_a_place_that_was_given_is_never_changed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways are named. A process that torchrun may start again would not find a numbered folder."""
    out = make_run(tmp_path / "run")
    before = content(out)
    assert main([*words, "--out", str(out)]) == 2
    ways = f"continue it with --resume, replace it with --overwrite, or give --out {out}-2"
    assert f"{out}: already holds a run; {ways}" in capsys.readouterr().err
    assert content(out) == before


def test_a_process_that_may_be_started_again_keeps_to_its_place(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/finetune"))
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for name, value in (env | {"TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(name, value)
    code = "import sys; from minift.cli import main; sys.exit(main(sys.argv[1:]))"
    for more, message in (([], "already holds a run"), (["--overwrite"], "torchrun's --max-restarts")):
        done = subprocess.run([sys.executable, "-c", code, *words, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_place_without_a_name(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`.` is a folder like others: the numbered name that is proposed stands next to it."""
    out = make_run(Path("runs/mine")).resolve()
    monkeypatch.chdir(out)
    assert main([*words, "--out", "."]) == 2
    assert f".: already holds a run; continue it with --resume, replace it with --overwrite, or give --out {out}-2" in (
        capsys.readouterr().err
    )


# Replacing a run ------------------------------------------------------------------------------------------------------


def test_a_run_with_all_that_it_may_write_can_be_replaced(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["--save-every", "1", "--keep", "0", "--eval-every", "1", "--patience", "2", "--out", str(out)]
    events = ["--tensorboard"] if find_spec("tensorboard") else []
    assert main([*words, *more, *events, "--lora-rank", "2", "--seed", "1"]) == 0
    shutil.copytree(out / "step_000001", out / "best")
    (out / "best.json").write_text("{}")
    (out / ".step_000009.partial").mkdir()
    (out / ".step_000009.partial" / "x").write_text("half")
    first = set(os.listdir(out))
    assert {"adapter", "best", "final", "step_000001", "compare.json", "report.html"} < first
    assert main([*words, "--out", str(out), "--overwrite", "--seed", "2"]) == 0
    assert f"{out}: the earlier run is removed" in capsys.readouterr().out
    assert set(os.listdir(out)) == {"config.json", "metrics.jsonl", "final", "compare.json", "report.html"} | (
        {"curves.png"} & first
    )
    assert json.loads((out / "config.json").read_text())["train"]["seed"] == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert main([*words, "--out", str(tmp_path / "new"), "--overwrite"]) == 0  # where there is none, it begins


def test_one_of_several_processes_removes_it(words: list[str], tmp_path: Path) -> None:
    job = finetune_job(words[words.index("--model") + 1], [words[words.index("--data") + 1]])
    config = TrainConfig(steps=2, batch_size=4, dtype="float32", device="cpu", parallel="ddp", save_every=1)
    out = make_run(tmp_path / "run")
    by_two(finetune, job, config, out, False, False, (), True)
    assert (out / "compare.json").is_file()
    assert not (out / "step_000003").exists()


def test_no_process_reads_the_metrics_of_the_earlier_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the one that removes it takes: an evaluation in them would end or steer one process alone."""
    out, start, of = make_run(tmp_path / "run"), common.start_folder, Best.of

    def slow(*arguments: Any) -> None:
        time.sleep(1)
        start(*arguments)

    def checked(metrics: Path) -> Best:
        assert not metrics.exists(), "the earlier run is still there"
        return of(metrics)

    monkeypatch.setattr(common, "start_folder", slow)
    monkeypatch.setattr(loop, "Best", SimpleNamespace(of=checked))
    job = finetune_job(words[words.index("--model") + 1], [words[words.index("--data") + 1]])
    config = TrainConfig(steps=2, batch_size=2, dtype="float32", device="cpu", parallel="ddp")
    assert (out / "metrics.jsonl").exists()
    by_two(finetune, job, config, out, False, False, (), True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--template", "chat"], "has no chat template"),
        (["--max-length", "4096"], "more than the model's"),
        (["--freeze", "nothing"], "matches no parameter"),
        (["--resume"], "give one of them"),
        (["--lr", "-1"], "lr is -1"),
        (["--patience", "2", "--eval-every", "0"], "--patience needs held-out data"),
    ],
)
def test_a_mistake_costs_no_earlier_run(
    words: list[str], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_run(tmp_path / "run")
    before = content(out)
    assert main([*words, *more, "--out", str(out), "--overwrite"]) == 2
    assert message in capsys.readouterr().err
    assert content(out) == before


def test_pretraining_replaces_runs_too(small_checkpoint: Path, tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", "pretrain")
    data = write_jsonl(tmp_path / "pages.jsonl", [{"text": f"page {i} of many"} for i in range(60)])
    words = ["pretrain", "--model", str(small_checkpoint), "--out", str(out), *FLAGS, "--max-length", "16"]
    before = content(out)
    assert main([*words, "--overwrite", "--data", str(tmp_path / "missing.jsonl")]) == 2
    assert content(out) == before
    assert main([*words, "--overwrite", "--data", str(data)]) == 0
    assert (out / "final").is_dir()
    assert not (out / "step_000003").exists()


def foreign(out: Path) -> Iterator[tuple[Path, str]]:
    """Yield folders in which something is not a run's, and the name of it."""
    for name in ("notes.txt", "step_1.txt", "step_x", "checkpoints", ".git", "final2", ".notes.old", "x.partial"):
        folder = make_run(out / name)
        (folder / name).write_text("mine")
        yield folder, name
    for place, name in (("tensorboard", "notes.txt"), ("final", "chapter.txt"), (".thesis.old", "x")):
        folder = make_run(out / f"in {place}")
        (folder / place).mkdir()
        (folder / place / name).write_text("mine")
        yield folder, place if place.startswith(".") else f"{place}/{name}"
    for name in ("nested", "linked"):
        folder = make_run(out / name)
        (folder / "final").mkdir()
        yield folder, f"final/{name}"
        if name == "nested":
            (folder / "final" / name).mkdir()
        else:
            (folder / "final" / name).symlink_to(out)
    folder = make_run(out / "sums")
    (folder / "step_000003" / "SHA256SUMS").write_text(f"{'0' * 64}  model.pt\n")
    (folder / "step_000003" / "notes.txt").write_text("mine")
    yield folder, "step_000003/notes.txt"
    folder = make_run(out / "link")
    (folder / "best").symlink_to(out)
    yield folder, "best"
    folder = make_run(out / "folder")
    (folder / "report.html").mkdir()
    yield folder, "report.html"


def test_what_is_not_a_runs_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, name in list(foreign(tmp_path / "several")):
        before = content(folder)
        with pytest.raises(InputError, match=f"{folder / name}: was not written by the run"):
            check_replaceable(folder)
        assert content(folder) == before
    folder, name = next(foreign(tmp_path / "again"))
    assert main([*words, "--out", str(folder), "--overwrite"]) == 2
    assert "was not written by the run" in capsys.readouterr().err
    assert (folder / name).read_text() == "mine"


def test_a_folder_that_is_no_run_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_checkpoint, model)
    file = tmp_path / "file"
    file.write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    for path in (model, file, other):
        assert not is_run(path)
        with pytest.raises(InputError, match="holds no run, and --overwrite replaces nothing else"):
            check_replaceable(path)


def test_a_link_to_a_run_is_not_followed(tmp_path: Path) -> None:
    run, link = make_run(tmp_path / "run"), tmp_path / "link"
    link.symlink_to(run)
    with pytest.raises(InputError, match="is a link, which --overwrite does not follow"):
        check_replaceable(link)
    assert is_run(run)


def test_a_run_is_not_replaced_by_one_that_reads_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words, "--lora-rank", "2", "--out", str(out)]) == 0
    before = content(out)
    copy = tmp_path / "adapter"
    shutil.copytree(out / "adapter", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(out / "final")}))
    (tmp_path / "linked").symlink_to(out / "final")
    for given in (
        ["--model", str(out / "final")],
        ["--model", str(out / "adapter")],
        ["--model", str(copy)],  # whose base is in it
        ["--model", str(tmp_path / "linked")],
        ["--data", str(out / "*.jsonl")],
        ["--test", str(out / "compare.json")],
    ):
        capsys.readouterr()
        assert main([*words, *given, "--out", str(out), "--overwrite"]) == 2
        assert "the new run would read it, and --overwrite remove it" in capsys.readouterr().err
        assert content(out) == before


def test_a_run_in_use_is_not_replaced(words: list[str], tmp_path: Path) -> None:
    out = make_run(tmp_path / "run")
    before = content(out)
    with locked(out):
        code = "import sys; from minift.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *words, "--out", str(out), "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert "another run is writing it" in done.stderr
    assert content(out) == before


def test_what_came_in_between_is_found_under_the_lock(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run")
    check_replaceable(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"), own_folder(out, False, World(), True):
        pass
    assert (out / "metrics.jsonl").exists()
    (out / "notes.txt").unlink()
    with own_folder(out, False, World(), True):
        assert (out / "metrics.jsonl").exists()  # there are more checks to come
        job = finetune_job("bundled")
        start_folder(job, TrainConfig(), out, {})
        assert sorted(os.listdir(out)) == [LOCK, "config.json"]


def test_a_removal_that_is_cut_short_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config.json, by which a run is recognised, goes last."""
    out = make_run(tmp_path / "run")
    (out / "final").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(InputError, match="cannot be removed: Operation not permitted"):
            remove_run(out)
    check_replaceable(out)
    remove_run(out)
    assert is_free(out)
