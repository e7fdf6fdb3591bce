"""Measuring in a process of its own: what others left in memory, in caches or in threads does not count.

A benchmark that is started with `--measure WORDS` is such a process: it measures one thing and prints it as JSON.
Resident memory is read from /proc, so it needs Linux. Read next: `load.py`.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minift.errors import InputError

M_MMAP_THRESHOLD, RETURNED = -3, 2**20  # for mallopt: blocks of this size go back to the system when they are freed
ROOT = Path(__file__).resolve().parent.parent


def fresh(benchmark: str, *words: object, cores: int | None = None, stdin: Iterable[bytes] | None = None) -> Any:
    """What `python -m benchmarks BENCHMARK --measure WORDS` measures.

    Args:
        cores: how many the process may run on; by default all.
        stdin: what to feed it.

    Raises:
        InputError: with its last words, when it fails.
    """
    command = [sys.executable, "-m", "benchmarks", benchmark, "--measure", *map(str, words)]
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    os.sched_setaffinity(child.pid, allowed)
    assert child.stdin is not None
    try:
        for block in stdin or ():
            child.stdin.write(block)
    except BrokenPipeError:
        pass  # it has failed, and says why
    stdout, stderr = child.communicate()
    if child.returncode:
        raise InputError(f"{words[0]} failed: {(stderr.decode().strip().splitlines() or ['no message'])[-1]}")
    return json.loads(stdout.splitlines()[-1])


class Worker:
    """A fresh process that measures again and again, whenever it is asked to: so that several can take turns.

    It is `python -m benchmarks BENCHMARK --measure WORDS`. It prints a first line of JSON when it is ready (`ready`),
    and then answers each line that it is sent by a line of JSON, until there is no more.

        with Worker("peers", "minift") as worker:
            print(worker.ready, worker.ask("step"))
    """

    def __init__(self, benchmark: str, *words: object, env: dict[str, str] | None = None, wait: bool = True):
        """`wait`: until it is ready, which those that can only start together must not."""
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
            text=True,
            env={**os.environ, **(env or {})},
        )
        if wait:
            self.ready  # noqa: B018

    @cached_property
    def ready(self) -> Any:
        """Its first line, when it has come."""
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._errors.close()

    def ask(self, words: str) -> Any:
        """What the process answers. Raises InputError with its last words, when it fails."""
        self.tell(words)
        return self.answer()

    def tell(self, words: str) -> None:
        """Ask, and let it work."""
        assert self.ready is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(words + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed, and says why

    def answer(self) -> Any:
        """What it says next. Raises InputError as `ask`."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(("{", "[")):  # a library may print other things
                return json.loads(line)
        self._child.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()
        raise InputError(f"{self._name} failed: {(last or ['no message'])[-1]}")


def resident() -> int:
    """Bytes of this process that are in memory, pages of mapped files included."""
    return _status("VmRSS:")


def peak() -> int:
    """The most that this ever was."""
    return _status("VmHWM:")


def peak_of(device: str) -> int:
    """The most memory of a device that this process ever had, in bytes: of a GPU what PyTorch allocated."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak()


def held_by(device: str) -> int:
    """Bytes of a device that this process holds now: of a GPU what tensors take."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident()


def forget_peak_of(device: str) -> None:
    """Let the peak start from what there is now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def give_back_freed() -> None:
    """Have the C library give large blocks back to the system when they are freed. It must not have freed any yet.

    Raises:
        InputError: when it is not glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise InputError("resident memory without holes needs glibc's mallopt")
    library.mallopt(M_MMAP_THRESHOLD, RETURNED)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status has no {key}")
