"""What several tests share: small random models, the bundled tokenizer, and running the command line.

The whole suite runs on two cores of a CPU: as two processes (pytest-xdist) of one thread each, which their own
subprocesses inherit. What needs a GPU is marked `cuda` and skipped without one.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock, tqdm

from minift.checkpoint import save_model
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT, completed, small_model

# The bars of this process and of all that it forks share a lock, unless told otherwise: one that is killed while it has
# the lock leaves it locked for the others. A bar's own thread could have it during a fork.
TqdmDefaultWriteLock.mp_lock = None
tqdm.monitor_interval = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and run the slow tests last.

    Several processes share the files out in this order: those with slow tests come first, then those with most tests.
    So the last files are small ones, and no process waits long for another at the end.
    """
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        size = Counter(item.path for item in items)
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, -size[item.path], item.path))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """End the processes that a test has left, and fail with their names: Python would wait for them at its own end."""
    before = multiprocessing.active_children()
    yield
    left = [process for process in multiprocessing.active_children() if process not in before]
    for process in left:
        process.kill()
        process.join(30)
    assert not left, "processes were left, and are killed"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the bundled base."""
    return load_tokenizer(bundled("base"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A minift checkpoint with random weights and the bundled tokenizer: fast to train in the tests of jobs."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, std=0.02)
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def minift() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `minift …` as a user does, in a process of its own; `cwd` and `env` may be given."""

    def run(*words: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "minift", *map(str, words)]
        return completed(command, cwd=cwd, env=env, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs that do not belong to the project."""
    folder = os.environ.get("MINIFT_REAL_DATA")
    if not folder:
        pytest.skip("MINIFT_REAL_DATA is not set: no real inputs to try")
    return Path(folder)
