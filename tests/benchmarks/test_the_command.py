"""The promise of the benchmarks: each runs from its command, on any machine, and records what it was run on.

Here they run on tiny shapes. Their numbers are not looked at: a slow machine is no defect.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import arguments, data, process, prose, tour
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.operations import OPERATIONS
from benchmarks.words import SYNONYMS
from minift.config import DEVICES, DTYPES
from minift.errors import InputError, RunError
from minift.storage.names import bundled
from minift.storage.system import command_line
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
    (["ops", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
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
    assert main() == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


ENDED = {
    "ops": ["--config", "shape.json", "--only", "norm", "--repeats", "100000", "--no-compile", "--device", "cpu"],
    "peers": ["--config", "shape.json", "--sides", "minift", "--repeats", "100000", "--device", "cpu", "--length", "8"],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("name", ENDED)
def test_a_signal_ends_it_with_a_line_and_leaves_no_process(name: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    words = [word.replace("shape.json", str(tmp_path / "shape.json")) for word in ENDED[name]]
    files = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-m", "benchmarks", name, *words], cwd=ROOT, text=True, **files)  # type: ignore[call-overload]
    time.sleep(6)
    started = command.descendants(child.pid)
    assert bool(started) == (name == "peers")
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "benchmarks: interrupted\n")
    end = time.monotonic() + 20
    while any(map(is_running, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, started))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended: one that was not waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunError("the disk is full"), 2, "benchmarks: error: the disk is full\n"),
        (OSError(28, "No space left on device"), 2, "benchmarks: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "benchmarks: interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_ends_it_is_one_line_and_never_the_code_of_a_finding(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: Sequence[str]) -> int:
        raise error

    monkeypatch.setattr(command, "run", fail)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ops"])
    assert main() == code
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_a_signal_is_an_interrupt_and_ends_the_processes_that_were_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        monkeypatch.setattr(command, "descendants", lambda: [child.pid])

        def signalled(words: Sequence[str]) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            return 0

        monkeypatch.setattr(command, "run", signalled)
        monkeypatch.setattr(sys, "argv", ["benchmarks", "ops"])
        assert main() == 130
        assert child.wait(30) == -signal.SIGTERM
    assert capsys.readouterr().err == "benchmarks: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


class Machine:
    """A clock that only the tour's parts move, each by its usual seconds times `slower`."""

    def __init__(self, slower: float):
        self.now, self.slower, self.taken = 0.0, slower, list[str]()

    def __call__(self) -> float:
        return self.now

    def run(self, words: Sequence[str]) -> None:
        self.now += tour.PARTS[tuple(words)] * self.slower
        self.taken.append(words[0])


def test_without_a_name_it_is_a_tour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    taken = []
    monkeypatch.setattr(command, "run", lambda words: taken.append(words[0]))
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 0
    assert taken == ["step", "generate", "ladder"]
    out = capsys.readouterr().out
    assert out.count("\npython -m benchmarks ") == 3  # each says how it is called
    assert "Left out" not in out
    assert re.search(r"Not part of the tour: load, .*peers", out)


@pytest.mark.parametrize("words", tour.PARTS, ids=lambda words: words[0])
def test_a_part_of_the_tour_can_be_parsed(words: tuple[str, ...]) -> None:
    options = command.make_parser(words).parse_args(words)
    assert options.json is None


@pytest.mark.parametrize(("slower", "left_out"), [(1.0, 0), (4.1, 0), (4.3, 1), (9.4, 1), (9.6, 2)])
def test_the_tour_ends_in_three_minutes(slower: float, left_out: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On a slower machine later parts are left out, each with its command and how long it would take."""
    machine = Machine(slower)
    tour.take(machine.run, BENCHMARKS, machine)
    assert machine.now <= tour.BUDGET
    assert len(machine.taken) == 3 - left_out
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out")]
    assert len(said) == left_out
    for line, (words, seconds) in zip(said, list(tour.PARTS.items())[3 - left_out :], strict=True):
        assert line.endswith(f"python -m benchmarks {command_line(words)}")
        assert f"about {seconds * slower:,.0f} s" in line


MISTYPED = [
    (["ops", "--only", "rmsnorm"], "unknown 'rmsnorm' (did you mean norm?); choose from embedding, norm, "),
    (["ops", "--only", "mlp"], "(did you mean swiglu?)"),
    (["ops", "--only", "norm", "Cross_Entropy"], "(did you mean loss?)"),
    (["ops", "--only", "sdpa"], "(did you mean attention?)"),
    (["opps"], "unknown 'opps' (did you mean ops?); choose from load, data, "),
    (["inference"], "(did you mean generate?)"),
    (["step", "--dtype", "bf16"], "(did you mean bfloat16?)"),
    (["memory", "--dtypes", "fp32"], "(did you mean float32?)"),
    (["load", "--convert", "natve"], "(did you mean native?)"),
    (["step", "--device", "gpu"], "(did you mean cuda?)"),
    (["step", "--repeat", "3"], "--repeat (did you mean --repeats?)"),
    (["lesson", "leak"], "(did you mean leakage?)"),
    (["ladder", "--rungs", "AMP"], "(did you mean + AMP?)"),
    (["peers", "--sides", "mini, compiled"], "(did you mean minift, compiled?)"),
    (["peers", "--config", "stories15"], "(did you mean stories15m?)"),
]


@pytest.mark.parametrize(
    ("words", "said"), MISTYPED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistyped_word_is_answered_with_the_one_that_is_meant(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: error: ")
    assert said in line


def test_a_list_may_be_empty() -> None:
    words = ["load", "--convert", "--repeats", "2"]
    assert command.make_parser(words).parse_args(words).convert == []


def test_each_synonym_means_something_that_is_here() -> None:
    known = {*OPERATIONS, *BENCHMARKS, *DTYPES, *DEVICES}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_a_help_does_not_wait_for_torch() -> None:
    """It lists every benchmark with the first line of its module, and takes less than half a second of computing."""
    code = (
        "import sys, time\n"
        "from benchmarks.__main__ import main\n"
        "sys.argv = ['benchmarks', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *shown, last = done.stdout.splitlines()
    heavy, _, seconds = last.rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 0.5
    text = " ".join(" ".join(shown).split())
    for name, module in BENCHMARKS.items():
        assert f" {name} {(module.__doc__ or '').splitlines()[0]}" in text


def test_no_table_is_still_to_be_filled_in() -> None:
    """A word such as SPEED-TABLE stands where a table will be."""
    assert re.findall(r"\b[A-Z0-9]+-TABLE\b", (ROOT / "benchmarks" / "README.md").read_text()) == []


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
