"""The promise that the suite comes to its end: a test that hangs fails, is named, and the others go on.

A small suite of its own, with the settings and the fixtures of this one but a shorter time, has one test of each kind
that waits for ever, and more that must still be run.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from tests.helpers import ROOT, HangError, completed, time_limit

SUITE = """
import multiprocessing, os, signal, subprocess, threading, time
import pytest
from tests.conftest import no_process_is_left
from tests.helpers import HangError, time_limit

fork = multiprocessing.get_context("fork")

def test_a_wait_for_a_process():
    fork.Process(target=time.sleep, args=(1000,)).start()
    multiprocessing.active_children()[0].join()

def test_a_wait_for_a_pipe():
    ours, theirs = fork.Pipe()
    ours.recv()

def test_a_wait_for_output():
    subprocess.run(["sleep", "1000"], capture_output=True)

def test_a_wait_after_a_limit_of_its_own():
    with time_limit(5):
        pass
    lock = threading.Lock()
    lock.acquire(), lock.acquire()

def test_a_process_that_is_left():
    fork.Process(target=time.sleep, args=(1000,), name="left").start()

def test_good():
    pass

def test_a_wait_in_C():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs signals")
def test_a_suite_with_tests_that_hang_comes_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(SUITE)
    settings = (ROOT / "pyproject.toml").read_text()
    for old, new in (("timeout = 900", "timeout = 2"), ("faulthandler_timeout = 1200", "faulthandler_timeout = 5")):
        assert settings.count(f"\n{old}\n") == 1
        settings = settings.replace(f"\n{old}\n", f"\n{new}\n")
    (tmp_path / "pyproject.toml").write_text(settings.replace('testpaths = ["tests"]', ""))
    words = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "test_hangs.py"]
    done = completed(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    ends = set(re.findall(r"^(?:FAILED|ERROR) test_hangs\.py::(\w+)", done.stdout, re.MULTILINE))
    assert ends == set(re.findall(r"def (test_\w+)", SUITE)) - {"test_good"}, done.stdout
    assert "5 failed, 2 passed, 2 errors" in done.stdout  # the waited-for process is left, too
    assert done.stdout.count("Failed: Timeout (>2.0s)") >= 4
    assert "worker 'gw0' crashed while running 'test_hangs.py::test_a_wait_in_C'" in done.stdout
    assert "name='left'" in done.stdout
    assert done.returncode == 1


def compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_limit_leaves_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.LEAST", 0)

    def limit_then(seconds: float, then: Callable[[float], object]) -> None:
        with time_limit(seconds):
            compute(0.05)
        then(50)

    for then in (compute, time.sleep):
        with pytest.raises(HangError, match=r"not done in 0\.3 s"), time_limit(0.3):
            limit_then(100, then)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_a_command_that_is_not_done_in_time_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        completed(["sh", "-c", f"sleep 1000 & echo $! > '{tmp_path / 'pid'}'; sleep 1000; true"], timeout=1)
    assert time.monotonic() - begun < 60
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the command's own process lives on"
        time.sleep(0.01)


def take_the_bars_lock_and_die() -> None:
    with tqdm.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_while_it_shows_a_bar_takes_no_lock_with_it() -> None:
    """Or the bars of this process, and of all that it starts, wait for ever."""
    tqdm(total=1, file=sys.stderr).close()  # as any run in this process
    process = multiprocessing.get_context("fork").Process(target=take_the_bars_lock_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with time_limit(1):
        tqdm(total=1, file=sys.stderr).close()
