"""Measuring in a process of its own: what others left in memory, in caches or in threads does not count.

A benchmark that is started with `--measure WORDS` is such a process: it measures one thing and prints it as JSON.
Resident memory is read from /proc, so it needs Linux. Read next: `load.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minift.errors import InputError

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


def resident() -> int:
    """Bytes of this process that are in memory, pages of mapped files included."""
    return _status("VmRSS:")


def peak() -> int:
    """The most that this ever was."""
    return _status("VmHWM:")


def forget_peak() -> None:
    """Let the peak start from what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status has no {key}")
