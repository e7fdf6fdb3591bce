"""Empty the caches, so that a call is timed as it runs in a step: after other work, which has used them.

A call that is repeated finds what it reads in the cache. In a step, each layer reads other weights, and a tensor that
was written by the layer before is often gone. How much repeating flatters depends on the size: nothing for tensors that
no cache holds, a fifth to two fifths of the time for those that it does (measured on GPUs for a softmax). So both are
measured, and named. *warm*: repeated, as fast as it can be. *cold*: one call after the caches are emptied.

They are emptied by reading a buffer of several times their size, with all threads, and so with the caches of all cores.
It is not written: what is written stays in the cache as changed, and the call that is timed would first have to wait
until it is saved.

On a CPU, the size is the last-level cache's, as the system says. On a GPU it is that of the L2, as the device says, and
as measured: larger tensors than it are read more slowly. The larger of both is used.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timers import Events, nothing

MODES = ("warm", "cold")
TIMES = 4  # the caches' size: some caches keep what was used often, and drop what is read once
UNKNOWN = 2**26  # bytes, where a system does not say: the last-level cache of a workstation; a laptop's is smaller
SIZES = tuple(2**20 * round(2 ** (i / 2)) for i in range(20))  # bytes, from 1 MiB to 724 MiB, for the sweep on a GPU
DROP = 1.15  # a cache is seen when it is read so many times as fast as memory
READS = 5  # of each size


@dataclass(frozen=True)
class Cache:
    """The size of the largest cache in bytes: as the system or the device says, and as measured; None if unknown."""

    reported: int | None
    measured: int | None = None

    @property
    def used(self) -> int:
        """Return the size that counts: the larger, or UNKNOWN."""
        return max(self.reported or 0, self.measured or 0) or UNKNOWN

    def sentence(self) -> str:
        """Return the sizes in words, and which of them is used."""

        def size(nbytes: int | None) -> str:
            return "unknown" if nbytes is None else f"{nbytes / 2**20:,.0f} MiB"

        measured = "" if self.measured is None else f", measured {size(self.measured)}"
        return f"cache: reported {size(self.reported)}{measured}; emptied by reading {size(TIMES * self.used)}"


@functools.cache
def cache(device: str) -> Cache:
    """Return the size of a device's largest cache. On a GPU it is measured too, which takes a second."""
    if device != "cuda":
        return Cache(last_level())
    reported = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", None)
    return Cache(reported, knee(_read_speeds()))


@functools.cache
def emptier(device: str) -> Callable[[], object]:
    """Return a function that empties the caches of a device, or queues on its stream what does."""
    buffer = torch.ones(TIMES * cache(device).used // 4, device=device)  # written: pages of zeros would be one page
    return buffer.sum


def before(mode: str, device: str) -> Callable[[], object]:
    """Return what must be done before a sample of this mode, of MODES."""
    return emptier(device) if mode == "cold" else nothing


def last_level(cpus: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Return the bytes of the last-level caches of the cores that this process may use; None if Linux says nothing.

    A processor may have several, each for some of its cores; all that these cores share with each other are counted.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found: dict[int, dict[str, int]] = {}  # by level: the caches' bytes, by the cores that share each
    try:
        for core in cores:
            for index in (cpus / f"cpu{core}" / "cache").glob("index[0-9]*"):
                kind, level, size, shared = (
                    (index / name).read_text(encoding="ascii").strip()
                    for name in ("type", "level", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    found.setdefault(int(level), {})[shared] = _bytes(size)
    except (OSError, ValueError):
        return None
    return sum(found[max(found)].values()) if found else None


def _bytes(size: str) -> int:
    """Return a size such as "32768K" in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


def knee(speeds: Mapping[int, float]) -> int | None:
    """Return the largest size in bytes that is read faster than memory; None if no size is.

    Args:
        speeds: bytes a second by size, up to sizes that no cache holds.
    """
    best, memory = max(speeds.values()), speeds[max(speeds)]
    between = math.sqrt(best * memory)
    return max(size for size, speed in speeds.items() if speed >= between) if best >= DROP * memory else None


def _read_speeds() -> dict[int, float]:
    """Return the speed at which the GPU reads tensors of SIZES again and again, in bytes a second.

    The time of a tensor of one page is subtracted: it is that of a kernel that has little to read.
    """
    timer = Events()
    buffer = torch.ones(max(SIZES) // 4, device="cuda")

    def seconds(nbytes: int) -> float:
        part = buffer[: nbytes // 4]
        return min(timer.seconds(part.sum, 20) for _ in range(READS))

    least = seconds(2**12)
    return {size: size / max(seconds(size) - least, 1e-9) for size in SIZES}
