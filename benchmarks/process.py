"""Measure in a child process, so that memory, caches and threads of other measurements do not count.

A benchmark that is started with `--measure WORDS` is such a process: it measures one thing and prints it as JSON.
Memory is read from /proc on Linux; elsewhere the system says only what a process took at its peak.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from minift.errors import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

M_MMAP_THRESHOLD, RETURNED = -3, 2**20  # for mallopt: freed blocks from this size on go back to the system
ROOT = Path(__file__).resolve().parent.parent


def fresh(benchmark: str, *words: object, cores: int | None = None, stdin: Iterable[bytes] | None = None) -> Any:
    """Run `python -m benchmarks BENCHMARK --measure WORDS`. Return what it measures.

    If that is an object, it gets "at", the time of day when the process was started.

    Args:
        cores: how many the process may run on; by default all.
        stdin: blocks to write to its standard input.

    Raises:
        InputError: when it fails, with the last line of its standard error.
    """
    command = [sys.executable, "-m", "benchmarks", benchmark, "--measure", *map(str, words)]
    pipe = subprocess.PIPE
    if cores is not None:
        check_system("sched_setaffinity", "keeping a process to some of the cores")
    at, child = time.time(), subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    if cores is not None:
        os.sched_setaffinity(child.pid, sorted(os.sched_getaffinity(0))[:cores])
    assert child.stdin is not None
    try:
        for block in stdin or ():
            child.stdin.write(block)
    except BrokenPipeError:
        pass  # it has failed; its standard error says why
    stdout, stderr = child.communicate()
    if child.returncode:
        raise InputError(f"{words[0]} failed: {(stderr.decode().strip().splitlines() or ['no message'])[-1]}")
    answer = json.loads(stdout.splitlines()[-1])
    return {"at": at, **answer} if isinstance(answer, dict) else answer


class Worker:
    """A child process that measures each time it is asked, so that several can take turns.

    It is `python -m benchmarks BENCHMARK --measure WORDS`. It prints a first line of JSON when it is ready (`ready`),
    and then answers each line on its standard input with a line of JSON, until the input ends.

        with Worker("peers", "minift") as worker:
            print(worker.ready, worker.ask("step"))
    """

    def __init__(self, benchmark: str, *words: object, env: dict[str, str] | None = None, wait: bool = True):
        """Start the process; with `wait`, return when it is ready. Processes that must start together do not wait."""
        command = [sys.executable, "-m", "benchmarks", benchmark, "--measure", *map(str, words)]
        self._name = str(words[0])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=self._errors,
            encoding="utf-8",
            env={**os.environ, **(env or {})},
        )
        if wait:
            self.ready  # noqa: B018

    @cached_property
    def ready(self) -> Any:
        """Return its first answer; wait for it if necessary."""
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._errors.close()

    def ask(self, words: str) -> Any:
        """Send a line and return the answer. Raise InputError with the last line of standard error when it fails."""
        self.tell(words)
        return self.answer()

    def tell(self, words: str) -> None:
        """Send a line and do not wait for the answer."""
        assert self.ready is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(words + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed; its standard error says why

    def answer(self) -> Any:
        """Return its next answer. Raise InputError as `ask` does."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(("{", "[")):  # a library may print other lines
                return json.loads(line)
        self._child.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()
        raise InputError(f"{self._name} failed: {(last or ['no message'])[-1]}")


def resident() -> int:
    """Return the resident memory of this process in bytes, pages of mapped files included. On Linux only."""
    check_system("sched_setaffinity", "the memory that a process holds at a moment")
    return _status("VmRSS:")


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    if os.path.exists("/proc/self/status"):
        return _status("VmHWM:")
    if resource is not None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes
    return _peak_on_windows()


def peak_of_children() -> int:
    """Return the peak resident memory of the largest child process that has ended, in bytes. Not on Windows."""
    if resource is None:
        raise InputError("the memory of child processes needs Linux or macOS")
    kibibytes = os.path.exists("/proc/self/status")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1024 if kibibytes else 1)


def check_system(name: str, what: str) -> None:
    """Raise InputError unless `os` has a name that only Linux has."""
    if not hasattr(os, name):
        raise InputError(f"{what} needs Linux")


def peak_of(device: str) -> int:
    """Return the peak memory of this process on a device, in bytes; on a GPU, what PyTorch allocated for tensors."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak()


def held_by(device: str) -> int:
    """Return the bytes that this process holds on a device now; on a GPU, those of tensors."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident()


def forget_peak_of(device: str) -> None:
    """Reset the peak memory of a device to what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        check_system("sched_setaffinity", "forgetting the peak of a process's memory")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def give_back_freed() -> None:
    """Let the C library release large blocks to the system when they are freed. Call before any was freed.

    Raises:
        InputError: when the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another library, or Windows
        raise InputError("resident memory without holes needs glibc's mallopt") from None
    mallopt(M_MMAP_THRESHOLD, RETURNED)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status has no {key}")


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows; of its fields, those up to the peak have their own names."""

    _fields_: ClassVar = [
        ("size", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    ]


def _peak_on_windows() -> int:
    kernel, counters = ctypes.WinDLL("kernel32"), _Counters(ctypes.sizeof(_Counters))  # type: ignore[attr-defined]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size):
        raise InputError("Windows does not say how much memory this process took")
    return int(counters.peak)
