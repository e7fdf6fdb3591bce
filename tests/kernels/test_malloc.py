"""The promise of `kernels/malloc.py`: freed memory is not asked of the system again. The system's page faults tell."""

import sys
from types import SimpleNamespace

import pytest
import torch

from minift.config import TrainConfig
from minift.kernels import choose, malloc, with_kernels
from minift.runs.start import start_state
from tests.helpers import ROOT, completed, small_model

PAGES = 64 * 2**20 // 4_096  # of a block of 64 MiB

# Ten times a block is taken, filled and freed; what is printed is how often the system had to find a page for one.
# Twenty times come before: an aligned block does not fit where one of its size was freed, only where that has merged
# with a neighbour, so the first few take new memory.
FAULTS = """
import resource
import torch
from minift.kernels.malloc import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
{first}
for _ in range(20):
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""


def faults(first: str) -> int:
    """Page faults of a process of its own."""
    script = FAULTS.format(first=first)
    done = completed([sys.executable, "-c", script], cwd=ROOT, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(malloc.ctypes.CDLL(None), "gnu_get_libc_version"), reason="not the GNU C library")
def test_freed_memory_is_taken_again_without_the_system() -> None:
    assert faults("assert keep_freed_memory()") < PAGES / 10
    assert faults("") >= 5 * PAGES / 512  # even in pages of 2 MB


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: SimpleNamespace())  # has no mallopt either
    assert not malloc.keep_freed_memory()


def test_training_on_a_cpu_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither training elsewhere, nor plain training, nor a model with kernels that is not trained."""
    called: list[bool] = []
    monkeypatch.setattr("minift.kernels.swap.keep_freed_memory", lambda: called.append(True))
    model = small_model()
    config = TrainConfig(steps=1, device="cpu", dtype="float32")
    with_kernels(model, ["malloc"])
    start_state(model, None, config, plain=True)  # type: ignore[arg-type]  # no data to keep the place of
    assert called == []
    start_state(model, None, config)  # type: ignore[arg-type]
    assert called == [True]
    start_state(model.to(torch.device("meta")), None, config)  # type: ignore[arg-type]
    assert called == [True]
    assert "malloc" not in choose(config, torch.device("cuda"))
