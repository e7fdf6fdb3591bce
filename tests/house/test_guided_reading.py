"""The promise of the guided reading in minift/README.md: its lines are in the files, and its commands run."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, completed

SECTION = (ROOT / "minift" / "README.md").read_text(encoding="utf-8").split("## A guided reading")[1].split("\n## ")[0]
STOPS = re.split(r"^### ", SECTION, flags=re.M)[1:]


def block(stop: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", stop, flags=re.M | re.S)
    return str(found)


def test_there_are_eight_stops() -> None:
    assert [stop.split(".")[0] for stop in STOPS] == list("12345678")


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.split("\n")[0])
def test_the_lines_stand_in_the_file(stop: str) -> None:
    (file,) = re.findall(r"`(minift/[a-z_/]+\.py)`:$", stop, flags=re.M)
    lines = block(stop, "python")
    assert lines in (ROOT / file).read_text(encoding="utf-8")
    assert 5 <= len(lines.splitlines()) <= 11
    assert "Look " in stop or "Open " in stop


@pytest.mark.slow
def test_every_command_runs_as_written(tmp_path: Path) -> None:
    """In a fresh copy, one after the other, with `minift` and `python` found as in an active environment."""
    copy, bin = tmp_path / "a fresh clone", tmp_path / "bin"
    for name in ("minift", "benchmarks", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    bin.mkdir()
    for name, words in (("minift", "-m minift"), ("python", "")):
        (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (bin / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(copy)}
    said = []
    for stop in STOPS:
        done = completed(["sh", "-e", "-c", block(stop, "sh")], cwd=copy, env=env)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    # What the reader is told to look for.
    assert "### Question:" in said[0]
    assert said[1].count("▁Mexico ") == 2 or said[1].count("▁Mexico") == 2
    rows = [line.split() for line in said[2].splitlines() if line[:5].strip().isdigit()]
    assert [row[3] for row in rows] == ["0"] * 7 + ["1"] * 3
    assert rows[7][1:3] == ["?", "▁Mexico"]
    assert float(rows[7][4]) < 1e-6
    assert rows[7][7] == "⏎"
    assert "activations for the backward pass" in said[3]
    assert said[4].count("sees no other document") == 3
    assert "gradient" in said[4]
    last = next(line for line in said[5].splitlines() if line.startswith("29 + 1"))
    assert float(last.split("%")[1].split()[0]) < 0.9  # the cosine
    assert "after" in said[6]
    assert (copy / "runs" / "reading" / "report.html").is_file()
    asked = next(line.split() for line in said[7].splitlines() if line.split()[1:2] == ["?"])
    assert asked[7] == "⏎"
    assert asked[11] == "▁Mexico"
    assert said[7].splitlines()[-1] == "Mexico City"
    assert {file.name for file in copy.glob("*.html")} == {"before.html", "after.html"}
