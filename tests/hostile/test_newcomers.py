"""The promise to a new user: wherever the command runs, it works, or it says why in one line.

A small finetuning run is started in a process of its own, in circumstances in which programs are seldom tested:

* no home, no cache, no terminal, a source tree that cannot be written, `python -O`;
* locales whose encoding is not UTF-8, or in which I has no dot: data are UTF-8 there, too, and so is what is written;
* spaces and characters of several scripts in every path, and another working directory;
* standard output and error that are closed, full, or pipes whose reader has left;
* one core, and two gibibytes of memory.

Every line on standard error but the progress bar is counted.
"""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, completed

QUESTION, ANSWER = "Где? İstanbul, Iğdır: 数据 🦙", "naïve ✓"  # noqa: RUF001
PAIRS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(9)]
PAIRS += [{"question": QUESTION, "answer": ANSWER}]
ALL = {"compare.json", "config.json", "final", "metrics.jsonl", "report.html"}  # of a finished run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """Make a folder with a model and pairs, and the same under difficult names."""
    folder = tmp_path_factory.mktemp("newcomer")
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    shutil.copytree(small_checkpoint, folder / "model")
    hard = folder / "a b'ğ\"ü 数据"
    hard.mkdir()
    shutil.copy(folder / "pairs.jsonl", hard / "données I.jsonl")
    shutil.copytree(small_checkpoint, hard / "modèle İ")
    return folder


def variables(**changes: str | None) -> dict[str, str]:
    """Return the environment of a process: little more than a path. None removes a variable."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    given = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", **changes}
    return {name: value for name, value in given.items() if value is not None}


def run(
    *words: str | Path, python: tuple[str, ...] = (), redirected: str = "", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run `minift …` by a shell, which can close its streams. The output is bytes."""
    command = shlex.join([sys.executable, *python, "-m", "minift", *map(str, words)])
    return completed(["sh", "-c", f"{command} {redirected}"], **{"env": variables(), "text": False, **options})


def finetune(inputs: Path, out: Path, *more: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    words = ("--model", inputs / "model", "--data", inputs / "pairs.jsonl", "--steps", "3", "--dtype", "float32")
    return run("finetune", *words, "--device", "cpu", "--out", out, *more, **options)


def complaints(result: subprocess.CompletedProcess[bytes]) -> list[str]:
    """Return the lines on standard error but for the progress bar's. A line that is drawn again begins with \\r."""
    text = result.stderr.decode("utf-8", "backslashreplace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("training:")]


def check_done(result: subprocess.CompletedProcess[bytes], out: Path) -> None:
    """Check that the run is complete, that it printed no complaint, and that the pairs were read as UTF-8."""
    assert (result.returncode, complaints(result)) == (0, [])
    assert {file.name for file in out.iterdir()} - {"curves.png"} == ALL
    held_out = json.loads((out / "compare.json").read_text(encoding="utf-8"))["samples"]
    assert {sample["question"] for sample in held_out} <= {pair["question"] for pair in PAIRS}
    assert 'charset="utf-8"' in (out / "report.html").read_text(encoding="utf-8")


# Where there is nothing -----------------------------------------------------------------------------------------------

SPARE: dict[str, dict[str, Any]] = {
    "nothing but a path": {"env": variables(HOME=None, TMPDIR=None, LC_ALL=None)},
    "a home that is not there": {"env": variables(HOME="/nonexistent"), "python": ("-O",)},
    "a home that cannot be written": {"env": variables(HOME="/dev/null", TERM="dumb", COLUMNS="1")},
}


@pytest.mark.parametrize("options", SPARE.values(), ids=SPARE)
def test_a_run_needs_nothing_around_it(inputs: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    check_done(finetune(inputs, tmp_path / "run", **options), tmp_path / "run")


def test_a_source_tree_that_cannot_be_written_is_enough(inputs: Path, tmp_path: Path) -> None:
    """Nothing is written next to the modules."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "minift", source / "minift", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(source.rglob("*"))
    env = variables(PYTHONPATH=str(source), PYTHONDONTWRITEBYTECODE="1")
    for path in (*before, source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        check_done(finetune(inputs, tmp_path / "run", env=env), tmp_path / "run")
    finally:
        for path in (*before, source):
            path.chmod(0o755)
    assert sorted(source.rglob("*")) == before


def test_one_core_and_two_gibibytes_are_enough(inputs: Path, tmp_path: Path) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    result = finetune(inputs, tmp_path / "run", env=variables(OMP_NUM_THREADS=None), preexec_fn=little)
    check_done(result, tmp_path / "run")


# Languages ------------------------------------------------------------------------------------------------------------

# Each locale, with its source and its charset where it has to be made.
LOCALES: dict[str, tuple[str, ...]] = {
    "C": (),
    "tr_TR.UTF-8": ("tr_TR", "UTF-8"),
    "tr_TR.ISO-8859-9": ("tr_TR", "ISO-8859-9"),
    "zh_CN.GB18030": ("zh_CN", "GB18030"),
}


@pytest.fixture(scope="module")
def made_locale(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Return a function that makes a locale and returns the variables that choose it."""
    folder = tmp_path_factory.mktemp("locales")

    def make(name: str) -> dict[str, str]:
        if not LOCALES[name]:
            return {"LC_ALL": name, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # or Python replaces it by UTF-8
        source, charset = LOCALES[name]
        if shutil.which("localedef") is None:
            pytest.skip(f"there is no localedef to make the locale {name}")
        done = completed(["localedef", "-i", source, "-f", charset, folder / name])
        if not (folder / name).is_dir():
            pytest.skip(f"the locale {name} cannot be made: {done.stderr.strip()}")
        return {"LC_ALL": name, "LOCPATH": str(folder)}

    return make


@pytest.mark.parametrize("name", LOCALES)
def test_data_are_utf_8_in_every_locale(
    inputs: Path, tmp_path: Path, made_locale: Callable[[str], dict[str, str]], name: str
) -> None:
    """What a terminal cannot show is escaped; names that PyTorch cannot open are refused, with a remedy."""
    env = variables(**made_locale(name))
    encoding = completed([sys.executable, "-c", "import sys; print(sys.stdout.encoding)"], env=env).stdout.strip()
    assert ("utf" in encoding) == (name == "tr_TR.UTF-8")
    check_done(finetune(inputs, tmp_path / "run", "--test", str(inputs / "pairs.jsonl"), env=env), tmp_path / "run")
    samples = json.loads((tmp_path / "run" / "compare.json").read_text(encoding="utf-8"))["samples"]
    assert (samples[-1]["question"], samples[-1]["answer"]) == (QUESTION, ANSWER)
    assert QUESTION in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    (hard,) = (path for path in inputs.iterdir() if " " in path.name)
    shown = run("data", "peek", "-n", "10", hard / "données I.jsonl", env=env)
    assert (shown.returncode, complaints(shown)) == (0, [])
    assert f"question: {QUESTION}".encode(encoding, "backslashreplace") in shown.stdout
    result = run("info", "--model", hard / "modèle İ", env=env)
    if "utf" not in encoding:
        (line,) = complaints(result)
        assert result.returncode == 2
        assert line.endswith("set PYTHONUTF8=1")
        result = run("info", "--model", hard / "modèle İ", env={**env, "PYTHONUTF8": "1"})
    assert (result.returncode, complaints(result)) == (0, [])


def test_every_file_is_opened_with_its_encoding(inputs: Path, tmp_path: Path) -> None:
    """And is closed explicitly. Only minift's own files count, not the packages in a `.venv` of this folder."""
    warned = ("-W", "always::EncodingWarning", "-W", "always::ResourceWarning", "-W", "always::DeprecationWarning")
    env = variables(PYTHONWARNDEFAULTENCODING="1")
    for result in (
        finetune(inputs, tmp_path / "run", "--save-every", "2", "--keep", "0", python=warned, env=env),
        run("generate", "--model", tmp_path / "run" / "final", "--prompt", "What is 1?", python=warned, env=env),
    ):
        assert result.returncode == 0
        assert [line for line in complaints(result) if f"{ROOT / 'minift'}{os.sep}" in line] == []


# Paths ----------------------------------------------------------------------------------------------------------------


def test_any_name_will_do_from_anywhere(inputs: Path, tmp_path: Path) -> None:
    """Spaces, quotation marks and four scripts are in the names of the model, the data and the run."""
    (hard,) = (path for path in inputs.iterdir() if " " in path.name)
    here = tmp_path / "ici là-bas"
    here.mkdir()
    words = ["--model", hard / "modèle İ", "--data", hard / "données I.jsonl", "--dtype", "float32", "--steps", "3"]
    result = run("finetune", *words, "--save-every", "2", "--keep", "0", "--out", "ein Lauf/наш 🦙", cwd=here)
    out = here / "ein Lauf" / "наш 🦙"
    assert (result.returncode, complaints(result)) == (0, [])
    assert "step_000002" in {file.name for file in out.iterdir()}
    shutil.rmtree(out / "final")
    again = run("finetune", "--resume", "--out", "наш 🦙", cwd=out.parent)
    assert (again.returncode, complaints(again)) == (0, [])
    assert (out / "final").is_dir()
    command = again.stdout.decode().split("look at it: ")[0].split("saved: ")[1]
    assert "наш 🦙/final" in command
    said = run("generate", "--model", out / "final", "--prompt", QUESTION, "--max-new-tokens", "2", cwd="/")
    assert (said.returncode, complaints(said)) == (0, [])


# Streams --------------------------------------------------------------------------------------------------------------

UNBUFFERED = {"": variables(), "unbuffered": variables(PYTHONUNBUFFERED="1")}
BROKEN = {
    "stdout is closed": ">&-",
    "stderr is closed": "2>&-",
    "all are closed": "<&- >&- 2>&-",
    "stderr is full": "2>/dev/full",
    "stdout has lost its reader": "| head -n 1",
    "both have lost their reader": "2>&1 | head -c 3",
}


@pytest.mark.parametrize("redirected", BROKEN.values(), ids=BROKEN)
def test_a_run_goes_on_without_its_streams(inputs: Path, tmp_path: Path, redirected: str) -> None:
    """Unbuffered output makes it notice that its reader has left."""
    out, status = tmp_path / "run", tmp_path / "status"
    first, pipe, reader = redirected.partition("|")
    words = f"{first}; echo $? >{shlex.quote(str(status))}"
    shown = f"; }} | {reader}" if pipe else "; }"
    given = {"model": inputs / "model", "data": inputs / "pairs.jsonl", "steps": 3, "out": out}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = shlex.join([sys.executable, "-m", "minift", "finetune", *options])
    line = f"{{ {command} {words}{shown}"  # the braces hold the command, and the echo of its exit code
    result = completed(["sh", "-c", line], env=UNBUFFERED["unbuffered"], text=False)
    assert status.read_text() == "0\n"
    assert complaints(result) == []
    assert {file.name for file in out.iterdir()} - {"curves.png"} == ALL
    state = (out / "final" / "model.pt").read_bytes()
    assert b"parameters, all of them trained" not in state  # the number of a closed stream was not given to this file


@pytest.mark.parametrize("env", UNBUFFERED.values(), ids=["buffered", "unbuffered"])
def test_a_full_disk_under_the_output_is_said_in_one_line(inputs: Path, tmp_path: Path, env: dict[str, str]) -> None:
    for words in (["info", "--config", "bundled"], ["--version"], ["finetune", "--help"]):
        result = run(*words, redirected=">/dev/full", env=env)
        assert result.returncode == 1
        assert complaints(result) == ["minift: error: standard output: cannot be written: No space left on device"]


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_wrong_input_is_refused_though_no_stream_can_show_it(redirected: str) -> None:
    result = run("info", "--config", "none", redirected=redirected)
    assert (result.returncode, result.stdout, result.stderr) == (2, b"", b"")


@pytest.mark.parametrize("env", UNBUFFERED.values(), ids=["buffered", "unbuffered"])
def test_a_listing_ends_quietly_when_its_reader_has_left(inputs: Path, env: dict[str, str]) -> None:
    for words in (["data", "peek", "-n", "10", inputs / "pairs.jsonl"], ["finetune", "--help"]):
        read, write = os.pipe()
        os.close(read)
        try:
            result = run(*words, env=env, stdout=write)
        finally:
            os.close(write)
        assert (result.returncode, complaints(result)) == (0, [])


def test_a_closed_input_is_no_data(inputs: Path) -> None:
    result = run("data", "peek", "-", redirected="<&-")
    assert result.returncode == 2
    assert len(complaints(result)) == 1
