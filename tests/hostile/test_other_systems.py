"""The promise that minift runs on Windows and macOS, as far as Linux can tell.

`other_systems.py` takes away what the other system lacks: modules, names, a rename over a file that is there, files
that are replaced while they are open or mapped, forked processes, UTF-8, line feeds. Then the main job, a resumed one,
every conversion, the pages and the rest of the commands run in such a process, and give the numbers of one that has it
all. What can be held only by calling a part of minift with a system's answers is at the end.
"""

import ctypes
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minift.cli import streams
from minift.config import TrainConfig
from minift.data import encode
from minift.errors import InputError, is_out_of_memory, out_of_memory
from minift.runs import machine
from minift.storage import links, system
from tests.helpers import ROOT

SYSTEMS = ("linux", "windows", "macos")
PEAK = 123_000_000  # bytes that every process of the emulated Windows takes
PRELUDE = Path(__file__).with_name("other_systems.py")
ANSWERS = ["Größe → 日本 ✓", "The number {}.", "C:\\Users\\{}"]


def environment(name: str, folder: Path) -> dict[str, str]:
    """Return the environment of a process on a system; its first module is put into `folder`."""
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "MINIFT_TEST_SYSTEM": name}
    if name == "linux":
        return {**env, "PYTHONPATH": str(ROOT)}
    folder.mkdir()
    shutil.copy(PRELUDE, folder / "sitecustomize.py")
    return {**env, **({"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"} if name == "windows" else {})}


def write_inputs(folder: Path, model: Path, end: str) -> None:
    """Write what the commands read, with lines that end in `end`."""
    shutil.copytree(model, folder / "small")
    pairs = [
        json.dumps({"question": f"What comes after {i}?", "answer": ANSWERS[i % 3].format(i + 1)}, ensure_ascii=False)
        for i in range(1100)
    ]
    pages = [json.dumps({"text": f"Page {i}: {'one two three ' * (i % 5 + 1)}"}) for i in range(80)]
    lines = {
        "pairs.jsonl": pairs[:24],
        "test.jsonl": pairs[24:30],
        "many.jsonl": pairs,
        "pages1.jsonl": pages[:50],
        "pages2.jsonl": pages[50:],
        "mine.txt": ["Q: {question}", "A: {answer}"],
        "script.py": ["from minift.cli import main", "main(['data', 'audit', 'many.jsonl', '--model', 'small'])"],
    }
    for name, texts in lines.items():
        (folder / name).write_bytes("".join(text + end for text in texts).encode())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> dict[str, Path]:
    """Run the commands on all systems, at the same time; return their folders."""
    base = tmp_path_factory.mktemp("systems")
    folders, children = {}, {}
    for name in SYSTEMS:
        folder = base / f"on {name}"
        folder.mkdir()
        write_inputs(folder, small_checkpoint, "\r\n" if name == "windows" else "\n")
        command = [sys.executable, str(PRELUDE), str(folder)]
        env = environment(name, base / name)
        with (folder / "log").open("wb") as log:
            children[name] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        folders[name] = folder
    for name, child in children.items():
        assert child.wait(600) == 0, (folders[name] / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    return folders


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def losses(run: Path) -> list[dict[str, float]]:
    """Return what was measured in each step of a run, without times."""
    names = ("step", "loss", "grad_norm", "tokens", "validation_loss")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: record[name] for name in names if name in record} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_command_does_its_work(folders: dict[str, Path], name: str) -> None:
    found = result(folders[name])
    log = (folders[name] / "log").read_text(encoding="utf-8", errors="replace")
    assert found["failed"] == {}, log[-3000:]
    assert "Traceback" not in log
    assert not [path for path in folders[name].rglob(".*") if path.name.endswith((".partial", ".old", ".lock"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS[1:])
def test_the_numbers_are_those_of_linux(folders: dict[str, Path], name: str) -> None:
    """Of a whole run and of one that was stopped and resumed; of adapters, and of pages that two workers encode."""
    there, here = folders["linux"] / "runs", folders[name] / "runs"
    assert len(losses(there / "whole")) == 40
    assert len(losses(there / "pages")) == 30
    for run, same in {"stopped": "whole", "lora": "lora", "pages": "pages", "pages again": "pages"}.items():
        assert losses(here / run) == losses(there / same), run
    for path in ("whole/compare.json", "lora/compare.json"):
        assert json.loads((here / path).read_text(encoding="utf-8"))["samples"], path


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_second_run_is_refused(folders: dict[str, Path], name: str) -> None:
    code, message = result(folders[name])["refused"]
    run = Path("runs", "whole")
    assert (code, message.strip()) == (
        2,
        f"minift: error: {run}: another run is writing it; wait for its end, or choose another --out",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_script_needs_no_guard(folders: dict[str, Path], name: str) -> None:
    """Of what is large enough for two processes: elsewhere each of them would begin the script again."""
    assert result(folders[name])["script"] == [0, ""]


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_benchmark_measures(folders: dict[str, Path], name: str) -> None:
    """Time, and memory as the system counts it."""
    code, said = result(folders[name])["ladder"]
    assert code == 0
    assert all(line.startswith("a busy machine: ") for line in said.splitlines())
    found = json.loads((folders[name] / "ladder.json").read_text(encoding="utf-8"))
    for rung in found["rungs"].values():
        assert 1e8 < rung["peak_bytes"] < 1e10
        assert (rung["peak_bytes"] == PEAK) is (name == "windows")


@pytest.mark.slow
def test_macos_is_asked_to_flush_its_drive(folders: dict[str, Path]) -> None:
    assert result(folders["macos"])["flushed"] > 10
    assert result(folders["linux"])["flushed"] == 0


@pytest.mark.slow
def test_checksums_can_be_checked_by_others(folders: dict[str, Path]) -> None:
    """`sha256sum` takes a carriage return for a part of a name."""
    sums = folders["windows"] / "runs" / "whole" / "final" / "SHA256SUMS"
    assert b"\r" not in sums.read_bytes()
    assert b"\r\n" in (sums.parent / "config.json").read_bytes()  # this is Windows, where text is written


# Parts ----------------------------------------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """Split a command as programs of Windows do: "Parsing C++ command-line arguments", in Microsoft's documentation."""
    words, word, quoted, started, backslashes = [], "", False, False, 0
    for character in f"{line} ":
        if character == "\\":
            backslashes += 1
            started = True
            continue
        if character == '"':
            word += "\\" * (backslashes // 2)
            if backslashes % 2:
                word += '"'
            else:
                quoted = not quoted
            started = True
        else:
            word += "\\" * backslashes
            if character == " " and not quoted:
                words += [word] * started
                word, started = "", False
            else:
                word += character
                started = True
        backslashes = 0
    return words


@pytest.mark.parametrize(
    "words",
    [
        ["minift", "finetune", "--out", r"C:\runs\mine"],
        [r"C:\Program Files\Python\python.exe", "-m", "minift"],
        ["--out", "C:\\my runs\\", "--plain"],
        ["", 'say "hi"', 'a\\"b', "a\\\\ b\\\\", "Größe", "it's"],
        ["a&b", "a|b", "a>b", "a;b", "$HOME", "(x)", "a,b", "@x"],
    ],
)
def test_a_printed_command_is_read_as_it_was_meant(words: list[str]) -> None:
    line = system.command_line(words, windows=True)
    assert words_of(line) == words
    for word in words:  # what a shell of Windows reads as more than text is quoted
        assert system.command_line([word], windows=True).startswith('"') or not set(word) & set("&|<>;$(),@'` ")


def test_a_plain_word_needs_no_quotes() -> None:
    words = ["minift", "finetune", "--resume", "--out", r"C:\runs\mine-2_b.x"]
    assert system.command_line(words, windows=True) == " ".join(words)
    assert system.command_line(["a b", "c"], windows=False) == "'a b' c"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_a_checkout_on_windows_has_the_bytes_of_the_checksums() -> None:
    """Git for Windows would end every line of a text in CRLF, and the bundled base would be damaged."""
    listed = (ROOT / "data" / "base" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    files = [f"data/base/{line.split('  ')[1]}" for line in listed]
    assert "data/base/config.json" in files
    words = ["git", "check-attr", "text", "--", *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines() == [f"{file}: text: unset" for file in files]


@pytest.mark.parametrize(
    "path", [r"C:\runs\mine", r"runs\mine.d\x", r"\\server\share\x", "..", r".\x", "console", "com10"]
)
def test_a_name_that_windows_has(path: str) -> None:
    assert system.forbidden_part(PureWindowsPath(path)) is None


@pytest.mark.parametrize("part", ["a:b", "x.", "x ", "CON", "nul", "aux.txt", "Com1.tar.gz", "lpt9 .x"])
def test_a_name_that_windows_takes_for_something_else(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    path = PurePosixPath("runs", part, "x")
    assert system.forbidden_part(path) == part
    links.check_name(Path(path))  # other systems have it
    monkeypatch.setattr(links, "WINDOWS", True)
    with pytest.raises(InputError, match="Windows"):
        links.check_name(Path(path))


def test_a_move_waits_for_a_program_that_has_the_file_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, rename = [], os.rename

    def scanned(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "in use")
        rename(*paths)

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "rename", scanned)
    with pytest.raises(PermissionError):  # which has another meaning elsewhere, and is no matter of time
        system.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(system, "MOVES_OPEN_FILES", False)
    system.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").exists()


def test_a_killed_worker_is_told_where_its_signal_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGKILL")
    ends = {code: encode._end_of(SimpleNamespace(pid=7, exitcode=code)) for code in (-9, -15, 3)}
    assert "runs out of memory" in ends[-9]
    assert "killed by signal 15" in ends[-15]
    assert ends[3] == "process 7 ended with exit code 3"


def test_windows_says_otherwise_that_memory_is_full() -> None:
    words = (
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 123456"
    )
    error = RuntimeError(f"{words} bytes.")
    assert is_out_of_memory(error)
    assert out_of_memory(error) == "out of memory: 123,456 bytes more could not be allocated"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_only_linux_compiles_what_was_not_asked_for(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(machine, "_can_compile", lambda device: True)
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform=platform))
    config, cpu = TrainConfig(compile=None), torch.device("cpu")
    assert machine.choose_compile(config, cpu, 1e20) is (platform == "linux")
    assert machine.choose_compile(config.replace(compile=True), cpu, 1e20)


class Console(io.RawIOBase):
    """A console of Windows: Python writes UTF-8 to it, and it shows Unicode."""

    def __init__(self, fault: OSError | None = None) -> None:
        self.shown, self.fault = b"", fault

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.fault is not None:
            raise self.fault
        self.shown += bytes(data)
        return len(data)


@pytest.fixture
def pipe() -> Any:
    """A pipe's two ends."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_console_is_written_to_in_unicode(pipe: tuple[int, int]) -> None:
    """And not through its number, which would take the bytes for its code page's."""
    console = Console()
    original = io.TextIOWrapper(io.BufferedWriter(console), "utf-8", line_buffering=True)
    stream = streams._wrap(original, original, streams._Stream(pipe[1], "standard output", ()))
    print("Größe → 日本 ✓", file=stream)
    assert console.shown.decode() == f"Größe → 日本 ✓{os.linesep}"
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


@pytest.mark.parametrize("trains", [False, True])
def test_windows_says_otherwise_that_a_reader_has_left(pipe: tuple[int, int], trains: bool) -> None:
    stream = streams._Stream(pipe[1], "standard output", (BrokenPipeError,) if trains else ())
    stream.console = Console(OSError(errno.EINVAL, "Invalid argument"))
    if trains:
        assert stream.write(b"text") == 4
    else:
        with pytest.raises(BrokenPipeError):
            stream.write(b"text")


@pytest.mark.parametrize(("mode", "shows"), [(3, True), (None, False)])
def test_colours_are_for_a_console_that_has_been_told(
    monkeypatch: pytest.MonkeyPatch, mode: int | None, shows: bool
) -> None:
    modes = [mode]

    class Kernel:
        def __init__(self, name: str):
            assert name == "kernel32"

        def GetStdHandle(self, number: int) -> int:  # noqa: N802
            return 7 if number == -11 else 0

        def GetConsoleMode(self, handle: int, place: Any) -> int:  # noqa: N802
            if modes[-1] is None:
                return 0
            ctypes.cast(place, ctypes.POINTER(ctypes.c_ulong))[0] = modes[-1]
            return int(handle == 7)

        def SetConsoleMode(self, handle: int, mode: int) -> int:  # noqa: N802
            modes.append(mode)
            return int(handle == 7)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert streams.shows_colours()  # elsewhere every terminal does
    monkeypatch.setattr(ctypes, "WinDLL", Kernel, raising=False)
    assert streams.shows_colours() is shows
    assert modes[-1] == (7 if shows else None)
