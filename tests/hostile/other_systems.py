"""Takes away what Windows or macOS lacks, and gives what they have instead.

As `sitecustomize.py` it is imported first in a process, and in those that the process starts; `become` then reads which
system it is to be. As a program it runs minift's commands in a folder, and writes down how they went:

    python tests/hostile/other_systems.py FOLDER

PyTorch and the other packages are those for Linux, and some of them need what is missing elsewhere. So modules and
names are hidden from minift and its benchmarks alone. What a call does to a file, it does for everything.
"""

import builtins
import errno
import inspect
import io
import json
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

OURS = ("minift", "benchmarks")
MODULES = {
    "windows": {"fcntl", "resource", "termios", "tty", "pty", "readline", "pwd", "grp", "posix", "syslog"},
    "macos": {"spwd"},
}
OS_NAMES = {
    "windows": """O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown confstr ctermid fchdir fchmod fchown
        fdatasync fork forkpty get_blocking getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority
        getsid getuid initgroups killpg lchown lockf major makedev memfd_create minor mkfifo mknod nice openpty
        pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork
        sched_getaffinity sched_setaffinity sched_yield sendfile set_blocking seteuid setgid setpgid setpgrp setpriority
        setsid setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 writev""",
    "macos": "sched_getaffinity sched_setaffinity memfd_create posix_fadvise pipe2 eventfd splice fdatasync getrandom",
}
SIGNAL_NAMES = {
    "windows": """ITIMER_PROF ITIMER_REAL ITIMER_VIRTUAL SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT
        SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm getitimer pause pthread_kill pthread_sigmask setitimer
        siginterrupt sigpending sigwait""",
    "macos": "SIGSTKFLT SIGPWR sigtimedwait sigwaitinfo",
}
IN_USE = "The process cannot access the file because it is being used by another process"
F_FULLFSYNC = 51
PEAK = 123_000_000  # bytes that every process of Windows takes


class Hiding(ModuleType):
    """A module without some of its names."""

    def __init__(self, real: ModuleType, hidden: str, **own: Any):
        super().__init__(real.__name__)
        self.__dict__.update(own, _real=real, _hidden=frozenset(hidden.split()))

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._real, name)


def become(system: str) -> None:
    """Make this process one on Windows or macOS, as far as minift can see."""
    import ctypes
    import signal

    shown: dict[str, ModuleType] = {
        "signal": Hiding(signal, SIGNAL_NAMES[system]),
        "ctypes": Hiding(ctypes, "", CDLL=_other_library),
    }
    if system == "windows":
        shown["os"] = Hiding(os, OS_NAMES[system], name="nt", linesep="\r\n")
        shown["ctypes"] = Hiding(ctypes, "", CDLL=_no_library, WinDLL=_Kernel)
        shown["msvcrt"] = _msvcrt()
        _hold_open_files()
    else:
        shown["os"] = Hiding(os, OS_NAMES[system])
        shown["fcntl"], shown["resource"] = _fcntl_of_macos(), _resource_of_macos()
    _spawn()
    _hide_proc(text="cp1252" if system == "windows" else None)
    real_import = builtins.__import__

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and _is_ours(globals or {}):
            if name in MODULES[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in shown:
                return shown[name]
        return real_import(name, globals, locals, fromlist, level)

    builtins.__import__ = importing


def _is_ours(globals: Any) -> bool:
    return str(globals.get("__name__", "")).split(".")[0] in OURS


# What the systems have ------------------------------------------------------------------------------------------------


def _no_library(name: Any, *rest: Any) -> None:
    raise TypeError("bad argument type for built-in operation")


def _other_library(name: Any, *rest: Any) -> Any:
    return object()  # without the functions of the GNU C library


class _Kernel:
    """The functions of kernel32.dll that say how much memory a process took."""

    def __init__(self, name: str):
        assert name == "kernel32"

        def memory(process: int, place: Any, size: int) -> int:
            import ctypes
            import struct

            counters = struct.pack("<IIQ7Q", 72, 0, PEAK, *[0] * 7)  # PROCESS_MEMORY_COUNTERS of 64 bits
            ctypes.memmove(place, counters, size)
            return int((process, size) == (-1, 72))

        self.K32GetProcessMemoryInfo = memory
        self.GetCurrentProcess = lambda: -1


def _msvcrt() -> ModuleType:
    import fcntl

    def locking(descriptor: int, mode: int, nbytes: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, nbytes)
        except OSError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    module = ModuleType("msvcrt")
    module.__dict__.update(locking=locking, LK_LOCK=1, LK_NBLCK=2, LK_UNLCK=0)
    return module


def _fcntl_of_macos() -> ModuleType:
    import fcntl

    fsync = os.fsync

    def control(descriptor: int, command: int, *argument: Any) -> Any:
        if command != F_FULLFSYNC:
            return fcntl.fcntl(descriptor, command, *argument)
        flushed.append(descriptor)
        return fsync(descriptor)

    flushed: list[int] = []
    return Hiding(fcntl, "F_SETPIPE_SZ", fcntl=control, F_FULLFSYNC=F_FULLFSYNC, flushed=flushed)


def _resource_of_macos() -> ModuleType:
    import resource

    def usage(of: int) -> Any:
        return SimpleNamespace(ru_maxrss=resource.getrusage(of).ru_maxrss * 1024)  # there in bytes

    return Hiding(resource, "RLIMIT_NICE", getrusage=usage)


def _spawn() -> None:
    """Start every process of `multiprocessing` from nothing."""
    import multiprocessing
    from multiprocessing import context

    contexts = {"spawn": context._concrete_contexts["spawn"]}
    context._concrete_contexts = contexts
    context._default_context._default_context = contexts["spawn"]
    multiprocessing.get_all_start_methods = lambda: ["spawn"]


# What the systems do to files -----------------------------------------------------------------------------------------


def _hold_open_files() -> None:
    """Make calls of `os` fail as those of Windows do: for files that this process has open or mapped, and folders."""
    import fcntl
    import shutil

    shutil._use_fd_functions = False
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace", "unlink", "listdir", "readlink")}
    real_open = io.open

    def used() -> list[str]:
        """Return the files that this process has open or mapped."""
        found = []
        for number in real["listdir"]("/proc/self/fd"):
            try:
                found.append(real["readlink"](f"/proc/self/fd/{number}"))
            except OSError:
                continue
        with real_open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            found += [line.split(None, 5)[5].rstrip("\n") for line in maps if line.count("/")]
        return found

    def check(path: Any) -> None:
        place = os.path.realpath(os.fspath(path))
        for file in used():
            if file == place or file.startswith(place + "/"):
                raise PermissionError(errno.EACCES, IN_USE, os.fspath(path))

    def open_file(path: Any, *rest: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real["open"](path, *rest, **options)

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real["fsync"](number)

    def rename(source: Any, target: Any, **options: Any) -> None:
        check(source)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", source)
        real["rename"](source, target, **options)

    def replace(source: Any, target: Any, **options: Any) -> None:
        check(source)
        check(target)
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", source)
        real["replace"](source, target, **options)

    def unlink(path: Any, **options: Any) -> None:
        if (
            sys._getframe(1).f_globals["__name__"] != "tempfile"
        ):  # which asks Windows to remove its file when it is closed
            check(path)
        real["unlink"](path, **options)

    for function, names in {
        open_file: ["open"],
        fsync: ["fsync"],
        rename: ["rename"],
        replace: ["replace"],
        unlink: ["unlink", "remove"],
    }.items():
        for name in names:
            setattr(os, name, function)


def _hide_proc(text: str | None) -> None:
    """Let nothing open a file of /proc; with `text`, read and write text in this encoding, and lines ending in CRLF.

    A text file that minift opens without naming an encoding is an error.
    """
    real_open, real_stat, real_os_open = io.open, os.stat, os.open

    def check(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    signature = inspect.signature(real_open)

    def opening(*words: Any, **options: Any) -> Any:
        given = signature.bind(*words, **options).arguments
        check(given["file"])
        mode = given.get("mode", "r")
        if text is not None and "b" not in mode:
            if given.get("encoding") in (None, "locale"):
                _check_caller(given["file"])
                given["encoding"] = text
            if given.get("newline") is None and not mode.startswith("r"):
                given["newline"] = "\r\n"
        return real_open(**given)

    def stat(path: Any, **options: Any) -> Any:
        check(path)
        return real_stat(path, **options)

    def os_open(path: Any, *rest: Any, **options: Any) -> int:
        check(path)
        return real_os_open(path, *rest, **options)

    io.open = builtins.open = opening
    os.stat, os.open = stat, os_open


def _check_caller(file: Any) -> None:
    """Raise EncodingWarning when it is minift that opens a text without naming its encoding."""
    frame = sys._getframe(2)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ("pathlib", "gzip", "io"):
        frame = frame.f_back
    if _is_ours(frame.f_globals):
        raise EncodingWarning(f"{file}: opened as text by {frame.f_globals['__name__']} without an encoding")


if __name__ == "sitecustomize" and os.environ.get("MINIFT_TEST_SYSTEM"):
    become(os.environ["MINIFT_TEST_SYSTEM"])


# The commands ---------------------------------------------------------------------------------------------------------


def run_commands() -> dict[str, Any]:
    """Run minift's commands in this folder; return the exit code of each that is not 0, and what came of some."""
    import subprocess
    import threading
    import time
    from _thread import interrupt_main
    from pathlib import Path

    from minift.checkpoint import load_model, save_model
    from minift.cli import main
    from minift.storage.lock import locked
    from minift.tokenizer.load import load_tokenizer

    failed: dict[str, int] = {}

    def run(*words: Any, code: int = 0) -> None:
        found = main([str(word) for word in words])
        if found != code:
            failed[" ".join(map(str, words))] = found

    def run_and_stop(out: Path, *words: Any) -> None:
        """Run until some steps are saved, then press Ctrl-C."""

        def press() -> None:
            while not list(out.glob("step_*")):
                time.sleep(0.01)
            interrupt_main()

        presser = threading.Thread(target=press, daemon=True)
        presser.start()
        run(*words, "--out", out, code=1)
        presser.join()

    options = ["--model", "small", "--data", "pairs.jsonl", "--test", "test.jsonl", "--batch-size", 4, "--lr", 1e-2]
    options += ["--dtype", "float32", "--device", "cpu", "--save-every", 2, "--keep", 1]
    long = ["--steps", 40, "--eval-every", 5, "--patience", 40]
    run("finetune", *options, *long, "--template", "mine.txt", "--out", "runs/whole")
    run_and_stop(Path("runs/stopped"), "finetune", *options, *long, "--template", "mine.txt")
    run("finetune", "--resume", "--out", "runs/stopped")
    run("finetune", *options, "--steps", 3, "--lora-rank", 2, "--out", "runs/lora")

    for to in ("hf", "meta", "llama2c"):
        run("convert", "runs/whole/final", f"as {to}", "--to", to)
        run("convert", f"as {to}", f"from {to}", "--to", "native")
        run("convert", "runs/lora/final", f"as {to}", "--to", to, "--force")
    run("convert", "runs/lora/adapter", "merged", "--to", "native")

    run("info", "--model", "runs/whole/final", "--json", "info.json")
    run("generate", "--model", "runs/whole/final", "--prompt", "What comes after 3? → ✓", "--max-new-tokens", 8)
    run("evaluate", "--model", "runs/whole/final", "--data", "test.jsonl", "--template", "mine.txt", "--mistakes", 1)
    run("compare", "small", "runs/whole/final", "--data", "test.jsonl", "--json", "scores.json", "--html", "two.html")
    run("explain", "Größe → 日本 ✓", "--model", "small", "--html", "xray.html")
    run("data", "audit", "pairs.jsonl", "--model", "small", "--html", "audit.html")
    run("data", "format", "pairs.jsonl", "-n", 2)
    run("data", "format", "pairs.jsonl", "--out", "written.jsonl")
    run("data", "peek", "pages*.jsonl", "-n", 1)
    run("data", "stats", "pages*.jsonl")
    run("tokenizer", "show", "Größe → 日本 ✓")

    pages = ["--config", "small/config.json", "--tokenizer", "small/tokenizer.model", "--data", "pages*.jsonl"]
    pages += ["--dtype", "float32", "--device", "cpu", "--max-length", 32, "--batch-size", 2, "--workers", 2]
    pages += ["--save-every", 2, "--keep", 1]
    run("pretrain", *pages, "--steps", 30, "--out", "runs/pages")
    run_and_stop(Path("runs/pages again"), "pretrain", *pages, "--steps", 30)
    run("pretrain", "--resume", "--workers", 1, "--out", "runs/pages again")

    model = load_model("from hf")
    save_model("from hf", model, load_tokenizer("from hf"))  # replaces the folder that it was loaded from
    with locked(Path("runs/whole")):
        words = [sys.executable, "-m", "minift", "finetune", "--resume", "--out", "runs/whole"]
        refused = subprocess.run(words, capture_output=True, encoding="cp1252")
    options = [
        "--config",
        os.path.abspath("small/config.json"),
        "--batch-size",
        "2",
        "--length",
        "16",
        "--device",
        "cpu",
    ]
    words = [sys.executable, "-m", "benchmarks", "ladder", *options, "--rungs", "plain", "--repeats", "1"]
    ladder = subprocess.run([*words, "--json", "ladder.json"], capture_output=True, encoding="cp1252")
    script = subprocess.run([sys.executable, "script.py"], capture_output=True, encoding="cp1252")
    return {
        "failed": failed,
        "refused": [refused.returncode, refused.stderr],
        "ladder": [ladder.returncode, ladder.stderr[-2000:]],
        "script": [script.returncode, script.stderr[-2000:]],
        "flushed": len(getattr(sys.modules["minift.storage.system"].fcntl, "flushed", ())),
        "system": os.environ.get("MINIFT_TEST_SYSTEM", ""),
    }


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    result = run_commands()
    with open("result.json", "w", encoding="utf-8") as file:
        json.dump(result, file)
