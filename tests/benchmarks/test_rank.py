"""The promise of `ops --rank`: a class's table is made to its end, whatever a submission does.

Few processes are started here: each takes the time of importing PyTorch.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ops, process, rank, record
from benchmarks.added import ratio
from benchmarks.contract import describe
from benchmarks.samples import Sample, Samples
from benchmarks.user_file import submissions
from minift.errors import InputError
from tests.helpers import SMALL, run_here

RIGHT = "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight"


def samples(name: str, *seconds: float) -> Samples:
    return Samples(name, "wall", "warm", tuple(Sample(0.0, one, 1, i) for i, one in enumerate(seconds)), "repeats", 0.0)


def timed(
    name: str, speed: float, spread: float = 0.01, control: tuple[float, float, float] | None = None
) -> rank.Timed:
    """An entry that is `speed` times as fast as `used`, more or less."""
    used = samples("used", *[1.0] * 9)
    own = samples("own", *(1 / (speed * (1 + spread * (i - 4) / 4)) for i in range(9)))
    found = ratio(used, own)
    assert found is not None
    return rank.Timed(name, own, used, found, control)


def between(name: str, value: float, low: float, high: float) -> rank.Timed:
    """An entry with this interval."""
    return rank.Timed(name, samples("own", 1.0), samples("used", 1.0), (value, low, high), None)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    size = ["--batch-size=2", "--length=12", "--dtype=float32", "--device=cpu", "--repeats=6", "--caches=warm"]
    return [f"--config={tmp_path / 'shape.json'}", *size]


# Processes ------------------------------------------------------------------------------------------------------------


def measure(file: Path, text: str, words: list[str], seconds: float = 120, nbytes: float = 64e9) -> dict[str, Any]:
    file.write_text("import os, sys, torch\n" + text)
    return rank.measure(f"{file}:norm", "norm", words, seconds, nbytes)


def test_a_right_one_is_timed_whatever_it_prints(words: list[str], tmp_path: Path) -> None:
    text = f"""
print('{{"own": 1}}', file=sys.stderr)
def norm(x, weight, eps):
    print('{{"error": null}}' * 100)
    return {RIGHT}
"""
    answer = measure(tmp_path / "noisy.py", text, words)
    assert set(answer) == {"own", "used", "used again"}, answer
    assert all(len(Samples.from_dict(side, answer[side]).samples) == 6 for side in answer)


def test_what_it_writes_is_in_a_folder_of_its_own(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither in the folder of who calls nor in the repository, and is removed; a relative --config is found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "class").mkdir()
    written = "open('left_behind.txt', 'w').write(os.getcwd())\n"
    said = f"import os\n{written}print(os.getcwd(), file=open({str(tmp_path / 'where')!r}, 'a'))\n"
    (tmp_path / "class" / "anna.py").write_text(f"{said}import torch\ndef norm(x, weight, eps): return {RIGHT}\n")
    run_here("ops", tmp_path, "--config=shape.json", *words[1:], "--no-compile", "--rank", "class", "--against", "norm")
    where = Path((tmp_path / "where").read_text().strip())
    assert where not in (tmp_path, process.ROOT)
    assert not where.exists()
    assert not (tmp_path / "left_behind.txt").exists()
    assert not (process.ROOT / "left_behind.txt").exists()
    ranked = record.read(tmp_path / "result.json")["ranked"]["norm"]["submissions"]["anna"]
    assert len(ranked["used_as_fast_as_itself"]) == 3


def python(text: str, seconds: float = 120, nbytes: float = 64e9) -> str | None:
    """What is said of a process that does not import PyTorch."""
    return rank.bounded([sys.executable, "-c", text], seconds, nbytes, Path(tempfile.gettempdir()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('x' * 10**7)", None),
        ("import os; os._exit(3)", "its process ended with exit code 3"),
        ("import sys; sys.exit('no\\nluck')", "its process ended with exit code 1: luck"),
        ("import os; os.abort()", "its process was ended by SIGABRT"),
    ],
)
def test_how_a_process_ended_is_said(text: str, said: str | None) -> None:
    assert python(text) == said


def test_one_that_ends_its_process_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "bounded", lambda *_: None)
    assert rank.measure("x.py:norm", "norm", [], 1, 1) == {"error": "its process ended before it was done"}


def test_one_that_never_ends_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    started = f"""
import pathlib, subprocess
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(subprocess.Popen(['sleep', '1000']).pid))
while True: pass
"""
    allowed = 1.0
    while not (tmp_path / "pid").exists():  # on a busy machine, starting Python takes its time
        assert allowed < 300
        assert python(started, seconds=allowed) == f"it took more than {allowed:g} s (--limit)"
        allowed *= 4
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("what it started is still there")


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_that_takes_too_much_memory_is_ended() -> None:
    said = python("kept = []\nwhile True: kept.append(bytearray(10**6))", nbytes=1e8)
    assert said is not None
    assert said.endswith("GB of memory; 0.1 GB are allowed (--memory)")


def test_of_all_that_it_prints_its_last_words_are_said() -> None:
    said = python("import sys\nfor _ in range(10**5): sys.stderr.write('x' * 99 + chr(10))\nsys.exit('the end')")
    assert said == "its process ended with exit code 1: the end"


# The table ------------------------------------------------------------------------------------------------------------


def test_a_place_is_one_more_than_the_number_of_those_that_are_surely_faster() -> None:
    entries = [
        between("slow", 0.5, 0.49, 0.51),
        between("first", 2.0, 1.95, 2.05),
        between("wide", 1.9, 1.55, 2.0),  # reaches the first, and the one that follows
        between("third", 1.6, 1.58, 1.62),  # below the first, not below the wide one
        between("overlaps the fastest only in part", 1.5, 1.45, 1.57),
    ]
    assert rank.places(entries) == [5, 1, 1, 2, 3]
    assert rank.places([]) == []


def test_one_that_is_too_noisy_has_no_place_and_takes_none() -> None:
    """As was seen: next to an interval from 0.89 to 0.91, one from 0.44 to 0.73 had the first place, too."""
    noisy, sure, unknown = between("forker", 0.56, 0.44, 0.73), timed("sure", 0.9), timed("few", 1.0)
    faster = between("faster and noisy", 4.0, 2.0, 6.0)
    unknown = dataclasses.replace(unknown, ratio=(1.0, -math.inf, math.inf))
    assert rank.places([noisy, sure, unknown, faster]) == [None, 1, None, None]
    lines = {
        line.split("|")[2].strip(): line for line in rank.table(sure, [noisy, unknown]).splitlines() if "|" in line
    }
    assert lines["forker"].split("|")[1].strip() == ""
    assert "0.44 and 0.73, too noisy to tell" in lines["forker"]
    assert "too few turns" in lines["few"]


def test_a_machine_that_makes_used_differ_from_itself_is_said_once() -> None:
    entries = [timed("anna", 1.0, control=(1.0, 0.98, 1.02)), timed("bob", 1.0, control=(1.1, 1.05, 1.2))]
    assert "Caution" not in rank.table(timed(rank.FORMULA, 0.8), entries[:1])
    lines = [line for line in rank.table(timed(rank.FORMULA, 0.8), entries).splitlines() if "Caution" in line]
    assert len(lines) == 1
    assert "in 1 of 3 processes" in lines[0]
    assert "bob 1.10 (1.05 to 1.20)" in lines[0]
    assert "anna" not in lines[0]


def test_a_file_name_does_not_break_the_table() -> None:
    header, _, row, *_ = rank.table(timed(rank.FORMULA, 0.8), [timed("na|me", 2.0)]).splitlines()
    assert "na\\|me" in row
    assert len(re.split(r"(?<!\\)\|", row)) == len(header.split("|"))


def test_the_table_is_sorted_and_names_the_wrong_ones() -> None:
    entries = [rank.Wrong("x|y", "a reason"), timed("slow", 0.5), timed("fast", 2.0)]
    lines = rank.table(timed(rank.FORMULA, 0.8), entries).splitlines()
    assert [line.split("|")[2].strip() for line in lines[:5]] == ["file", "-" * 11, "fast", rank.FORMULA, "slow"]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["1", "", "2"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == ["", rank.RULE, "", "* x|y: wrong: a reason"]


def test_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The processes are left out: what they would answer is given."""
    folder = tmp_path / "class"
    folder.mkdir()
    for name in ("anna", "bob", "_notes"):
        (folder / f"{name}.py").write_text("def norm(x, weight, eps): ...\n")
    (folder / "bob.py").write_text("def loss(hidden, weight, targets): ...\n")
    (folder / "carl.py").write_text("def norm(:\n")
    (folder / "broken.py").symlink_to("nonesuch.py")
    (folder / "adir.py").mkdir()
    asked = []

    def answer(place: str, operation: str, words: list[str], seconds: float, nbytes: float) -> dict[str, Any]:
        file, name = Path(place.rpartition(":")[0]), place.rpartition(":")[2]
        asked.append((operation, file.stem, seconds, nbytes))
        assert f"def {name}(" in file.read_text()
        used = samples("used", *[1.0] * 6).to_dict()
        return {"own": samples("own", *[0.5] * 6).to_dict(), "used": used, "used again": used}

    monkeypatch.setattr(rank, "measure", answer)
    with pytest.raises(SystemExit) as ended:
        run_here("ops", tmp_path, *words, "--no-compile", "--rank", folder, "--limit", 7, "--memory", 2)
    assert ended.value.code == 1
    files = [("norm", "formula"), ("norm", "anna"), ("loss", "formula"), ("loss", "bob")]
    assert asked == [(*pair, 7.0, 2e9) for pair in files], "no process for a file that has no such function"
    printed = capsys.readouterr().out
    assert "norm: 5 submissions, 4 wrong; 2 x 12 tokens of a config.json, float32 on cpu, warm caches" in printed
    assert "* bob: wrong: bob.py: no function norm; there is loss" in printed
    assert "* carl: wrong: carl.py:1: SyntaxError: " in printed
    assert "* broken: wrong: broken.py is a link to nonesuch.py, which is not there" in printed
    assert "* adir: wrong: adir.py is a folder, not a file" in printed
    assert str(folder) not in printed
    ranked = json.loads((tmp_path / "result.json").read_text())["ranked"]
    assert ranked["norm"]["submissions"]["anna"]["times_as_fast_as_used"] == [2.0, 2.0, 2.0]
    assert ranked["norm"]["submissions"]["bob"]["error"] == "bob.py: no function norm; there is loss"
    assert ranked["norm"]["submissions"]["adir"] == {"error": "adir.py is a folder, not a file"}
    assert len(ranked["loss"]["submissions"]["bob"]["sha256"]) == 64
    assert ranked["norm"]["formula"]["own"]["samples"][0][1] == 0.5


def test_the_formula_must_be_timed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    (tmp_path / "anna.py").write_text("def norm(): ...\n")
    monkeypatch.setattr(rank, "measure", lambda *_: {"error": "no compiler"})
    with pytest.raises(InputError, match="norm: the formula itself cannot be timed: no compiler"):
        run_here("ops", tmp_path, *words, "--no-compile", "--rank", tmp_path, "--against", "norm")


def test_functions_are_found_without_running_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("raise SystemExit\nnorm = compile_it(3)\nclass rope: ...\n")
    (tmp_path / "b.py").write_text("def loss(): ...\n")
    (tmp_path / "c.py").write_text("def adamw(:\n")
    files, refused = submissions(str(tmp_path))
    assert not refused
    assert [file.name for file in files] == ["a.py", "b.py", "c.py"]
    assert rank.operations_in(files) == ["norm", "loss"]
    with pytest.raises(InputError, match="no function there is named as an operation"):
        rank.operations_in(files[2:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "nonesuch"], "--rank nonesuch: no such folder"),
        (["--rank", "HERE"], "no file NAME.py in it"),
        (["--rank", "HERE", "--add", "x.py:y"], "give one of them"),
        (["--rank", "HERE", "--limit", "0"], "--limit is 0; expected a number above 0"),
        (["--rank", "HERE", "--against", "layer"], "layer: no function of your own"),
    ],
)
def test_options_that_do_not_fit(words: list[str], said: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    options = parser.parse_args([*(word.replace("HERE", str(tmp_path)) for word in words), "--no-compile"])
    with pytest.raises(InputError, match=said):
        ops.run(options)


def test_what_is_no_file_is_said_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "adir.py").mkdir()
    with pytest.raises(InputError, match=r"no file NAME.py in it; adir.py is a folder, not a file"):
        submissions(str(tmp_path))


def test_the_help_says_what_is_ranked_without_against() -> None:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    said = " ".join(parser.format_help().split())
    assert "without --against, a table for each operation that a function in the files is named as" in said


def test_the_file_to_start_from_can_be_submitted() -> None:
    assert "def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:" in describe("norm")
