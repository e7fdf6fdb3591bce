"""The promise of the benchmarks: each runs from its command, on any machine, and records what it was run on.

Here they run on tiny shapes. Their numbers are not looked at: a slow machine is no defect.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL


def benchmark(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_load(tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    files: list[str | Path] = ["--folder", tmp_path, "--json", tmp_path / "r.json"]
    done = benchmark("load", "--config", tmp_path / "shape.json", "--repeats", "1", "--convert", "native", *files)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["weights_bytes"] == 2 * (97 * 24 + 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 40 + 2 * 24) + 24)
    assert result["command"].startswith("python -m benchmarks load --config")
    assert result["command"].endswith("--repeats 1 --convert native")  # where files went is nobody's business
    assert {"cpu", "cores", "memory_bytes", "system"} <= set(result["machine"])
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    for name in ("minift", "transformers"):
        times = result["load"][name]
        assert 0 < times["load_seconds"]["min"] <= times["ready_seconds"]["max"]
        assert times["load_seconds"]["n"] == 1
        assert name in done.stdout
    assert set(result["convert_from_hf"]) == {"native"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # the checkpoints are gone


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["load", "--config", "nonesuch"], "nonesuch"),
        (["load", "--repeats", "0"], "--repeats"),
        (["nonesuch"], "nonesuch"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], named: str) -> None:
    done = benchmark(*words)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
