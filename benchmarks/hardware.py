"""Describe the machine that measures: its processor, caches, memory and GPU, and what else it has to do.

What a system does not say is None, and is recorded so: a virtual machine often has no governor.

    python -c "from benchmarks import hardware; print(hardware.describe(), hardware.load())"
"""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import nvml
from minift.errors import InputError
from minift.storage.system import usable_cores

PROC, CORES = Path("/proc"), Path("/sys/devices/system/cpu")
FLAGS = (  # on which PyTorch's kernels depend; others are left out
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "sve2", "bf16", "i8mm"),
)
BUSY = 0.05  # of the cores' time; less is usual
LOOK = 0.2  # seconds over which the load of a moment is counted: 20 ticks of a core's clock


def describe() -> dict[str, Any]:
    """Return the machine's processor, cores, caches, memory, system and, if there is one, GPU.

    `threads` are those that PyTorch computes with, `affinity` the cores that this process may use.
    """
    cores = affinity()
    return {
        "cpu": cpu(),
        "flags": flags(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "affinity": cores,
        "governor": governor(cores),
        "caches": caches(cores),
        "memory_bytes": memory(),
        "system": platform.platform(),
        **({"gpu": gpu()} if torch.cuda.is_available() else {}),
    }


def cpu() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor()


def flags() -> list[str]:
    """Return which of FLAGS the processor has."""
    has = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in FLAGS if flag in has]


def affinity() -> list[int] | None:
    """Return the cores that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def governor(cores: Sequence[int] | None) -> str | None:
    """Return what chooses these cores' frequency: "performance", or several names; None where nothing is said."""
    files = [CORES / f"cpu{core}" / "cpufreq" / "scaling_governor" for core in cores or ()]
    names = {name for name in map(_text, files) if name}
    return ", ".join(sorted(names)) or None


def caches(cores: Sequence[int] | None) -> dict[str, int]:
    """Return the bytes of the caches of data that the first of these cores sees: {"L1d": …, "L2": …, "L3": …}."""
    found = {}
    for folder in sorted((CORES / f"cpu{(cores or [0])[0]}" / "cache").glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        number = re.fullmatch(r"(\d+)([KMG])", size or "")
        if level and number and kind != "Instruction":
            found[f"L{level}" + ("d" if kind == "Data" else "")] = (
                int(number[1]) << {"K": 10, "M": 20, "G": 30}[number[2]]
            )
    return found


def memory() -> int | None:
    """Return the bytes of the machine's memory; None on Windows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def gpu(watched: nvml.Gpu | None = None) -> dict[str, Any]:
    """Return the GPU, the libraries that compute on it and, where the extra `gpu` is installed, its driver and state.

    Args:
        watched: asks the GPU; by default through NVIDIA's library, if it is there.
    """
    device = torch.cuda.get_device_properties(0)
    found = {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        return {**found, **state(watched or nvml.find())}
    except InputError:
        return found


def state(watched: nvml.Gpu) -> dict[str, Any]:
    """Return the driver of a GPU, and its clock, power, temperature and why it is slowed down, as they are now."""
    reasons = watched.reasons()
    return {
        "driver": watched.driver(),
        "clocks": {"megahertz": watched.megahertz(), "lowered_by": None if reasons is None else sorted(reasons)},
        "watts": watched.watts(),
        "celsius": watched.celsius(),
    }


# What else the machine has to do --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticks:
    """What the usable cores have done since the machine started, in seconds; and this process and its children.

    Attributes:
        all: idle time included.
        busy: of all processes.
        stolen: taken by the host of a virtual machine, for others.
        own: of this process, and of its children that have ended.
    """

    all: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls, proc: Path | None = None, cores: Sequence[int] | None = None) -> "Ticks | None":
        """Return them as they are now; None on a system without /proc/stat.

        Args:
            proc: the folder of the system's counters; by default PROC.
            cores: which cores count; by default those that this process may use.
        """
        text, hertz = _text((proc or PROC) / "stat"), os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        lines = [line.split() for line in (text or "").splitlines()]
        names = {f"cpu{core}" for core in (affinity() or () if cores is None else cores)}
        try:  # man 5 proc_stat: guests' time (the last two numbers) is in the users' already
            counts = [[int(word) / hertz for word in words[1:9]] for words in lines if words and words[0] in names]
        except ValueError:
            return None
        if not counts or any(len(one) < 8 for one in counts):
            return None
        user, nice, system, idle, waiting, interrupts, soft, stolen = map(sum, zip(*counts, strict=True))
        busy = user + nice + system + interrupts + soft
        return cls(busy + idle + waiting + stolen, busy, stolen, sum(os.times()[:4]))


def shares(before: Ticks | None, after: Ticks | None) -> tuple[float | None, float | None]:
    """Return the shares of the time between that other processes had, and that the host took; None where unknown."""
    if before is None or after is None or after.all <= before.all:
        return None, None
    others = (after.busy - before.busy) - (after.own - before.own)
    time_of_cores = after.all - before.all
    return max(0.0, others / time_of_cores), max(0.0, (after.stolen - before.stolen) / time_of_cores)


def load(sleep: Callable[[float], object] = time.sleep) -> list[float | None]:
    """Return the mean number of waiting processes of the last minute, and the shares of other processes and the host.

    The shares are those of the next LOOK seconds, in which this process does nothing.
    """
    before = Ticks.now()
    sleep(LOOK)
    waiting = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return [waiting, *shares(before, Ticks.now())]


def busy_in_words(before: Ticks | None) -> str:
    """Return a sentence on what others had of the cores since `before`; "" where that was little, or is not known."""
    others, stolen = shares(before, Ticks.now())
    said = [f"other processes had {others:.0%}"] if others is not None and others > BUSY else []
    said += [f"the host took {stolen:.0%}"] if stolen is not None and stolen > BUSY else []
    return f"a busy machine: {' and '.join(said)} of the cores' time meanwhile" if said else ""


def _cpuinfo(key: str) -> str | None:
    """Return the first value of a key of /proc/cpuinfo."""
    found = re.search(rf"^{key}\s*:\s*(.*)$", _text(PROC / "cpuinfo") or "", re.MULTILINE)
    return found[1] if found else None


def _text(file: Path) -> str | None:
    """Return what a file of the system says; None where it is not there."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
