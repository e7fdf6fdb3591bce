"""The promise of the benchmarks: each runs from its command, on any machine, and records what it was run on.

Here they run on tiny shapes. Their numbers are not looked at: a slow machine is no defect.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import arguments, data, process, prose
from benchmarks.__main__ import BENCHMARKS, main
from minift.errors import InputError
from minift.storage.names import bundled
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT, SMALL, run_here, write_jsonl


def benchmark(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_load(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
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


def test_wrong_input_is_one_line() -> None:
    done = benchmark("ladder", "--config", "nonesuch")
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: error: unknown preset 'nonesuch'")
    assert len(done.stderr.splitlines()) == 1


WRONG = [
    (["load", "--repeats", "0"], "--repeats is 0; it must be at least 1"),
    (["ladder", "--length", "1"], "max_length is 1"),
    (["ops", "--dtype", "int8"], "argument --dtype"),
    (["peers", "--json", "/dev/null/result.json"], "/dev/null/result.json: cannot be written"),
    (["nonesuch"], "nonesuch"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_named(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "load" in words:
        pytest.importorskip("safetensors")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    try:
        code: object = main()
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_without_a_name_it_is_a_tour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    taken = []
    for name, module in BENCHMARKS.items():
        monkeypatch.setattr(module, "run", lambda options, name=name: taken.append((name, options.name)))
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 0
    assert taken == [(name, name) for name in ("step", "ladder", "generate")]
    assert capsys.readouterr().out.count("python -m benchmarks ") == 3  # each says how it is called


def test_every_benchmark_is_explained() -> None:
    (overview,) = re.findall(r"^## Measure it\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    explained = (ROOT / "benchmarks" / "README.md").read_text()
    for name in BENCHMARKS:
        assert re.search(rf"^\|.*`{name}\b", overview, re.MULTILINE), name
        assert f"\n## `{name}`: " in explained, name


def test_a_file_to_write_is_tried_and_left_as_it_is(tmp_path: Path) -> None:
    new, old = tmp_path / "folder" / "new.json", tmp_path / "old.png"
    old.write_text("a result")
    arguments.check_files(argparse.Namespace(json=str(new), plot=str(old), trace=None))
    assert not new.exists()
    assert old.read_text() == "a result"
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        arguments.check_files(argparse.Namespace(json=str(tmp_path)))


@pytest.mark.parametrize(("name", "remedy"), [("ops", "--no-compile"), ("peers", "--sides"), ("ladder", "--rungs")])
def test_without_a_compiler_it_says_what_to_leave_out(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    with pytest.raises(InputError, match=rf"needs a C\+\+ compiler .*; to do without, give .*{remedy}"):
        BENCHMARKS[name].run(parser.parse_args(["--device", "cpu"]))


@pytest.mark.slow
def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every side has read the same text, and the ratios are those of the times."""
    pytest.importorskip("tokenizers")
    measured: list[str] = []

    def fresh(benchmark: str, *words: object, **options: object) -> dict[str, float]:
        measured.append(str(words[0]))
        return data._measure(*map(str, words))

    monkeypatch.setattr(process, "fresh", fresh)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # one side switches off the network and threads
    texts = [f"Page {i} is about the number {i}, which comes after {i - 1}." * 8 for i in range(300)]
    file = write_jsonl(tmp_path / "x.json.gz", [{"text": text, "timestamp": "", "url": ""} for text in texts])
    result = run_here("data", tmp_path, "--data", file, "--repeats", 1, "--tokenizer", "bundled")
    assert (result["pieces"], result["vocabulary"]) == (2_048, "given")
    assert str(tmp_path) not in json.dumps(result)  # a record does not say where the data lay
    assert result["characters"] == sum(map(len, texts))
    tokenizer = load_tokenizer(bundled("base"))
    assert result["tokens"] == sum(len(tokenizer.encode(text, bos=False)) for text in texts)
    sides = result["characters_per_second"]
    assert measured == [*reversed(sides), *sides]  # in turns; the first is not counted
    assert {"parts alone", "minift", "minift, 2 workers"} <= set(sides)
    assert ("datasets, loop" in sides) == (importlib.util.find_spec("datasets") is not None)
    printed = capsys.readouterr().out
    for name, speed in sides.items():
        assert name in printed
        ratio = speed["median"] / sides["parts alone"]["median"]
        assert result["times_as_fast_as"][name]["parts alone"] == pytest.approx(ratio)
    monkeypatch.setattr(data, "TRAINED_ON", 10)  # one page
    result = run_here("data", tmp_path, "--data", file, "--repeats", 1, "--pieces", 285)
    assert (result["pieces"], result["vocabulary"]) == (285, "trained on some of the text")


@pytest.mark.slow
def test_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"Page {i} is about {i}. " * 50}).encode() + b"\n" for i in range(100)]
    monkeypatch.setattr(prose, "lines", lambda megabytes: iter(lines))
    first, second = run_here("stream", tmp_path, "--megabytes", 0.5, 1)["runs"]
    assert 1.9 < second["documents"] / first["documents"] < 2.1
    assert second["tokens"] > 1.5 * first["tokens"] > 0
    assert 1e8 < first["peak_bytes"] < 1e9


@pytest.mark.slow
def test_packing(tmp_path: Path) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({**SMALL, "vocab_size": load_tokenizer(bundled("base")).vocab_size}))
    words = ["--batch-size", 8, "--max-length", 64, "--repeats", 1, "--device", "cpu", "--config", shape]
    result = run_here("packing", tmp_path, *words)
    assert result["positions"]["packed"] < result["positions"]["padded"]
    assert result["largest_relative_difference_of_loss"] < 1e-2  # bfloat16 on different shapes
    assert result["targets_per_second"]["packed"]["n"] == 1
