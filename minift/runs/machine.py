"""Choose what a run computes on and writes: its device, its dtype, whether its model is compiled, its result's format.

Each is as asked for, or else what is fastest and safe on this machine.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from minift.config import TrainConfig
from minift.distributed.world import World, is_main_process
from minift.errors import InputError, need
from minift.formats.open import huggingface_folder
from minift.kernels.choice import bfloat16_in_hardware
from minift.storage.system import WINDOWS

# Operations (`costs/flops.py`) from which a run is compiled by default. On two cores of an Intel Xeon compiling took 26
# s and made a step of bundled pretraining 1.12 times as fast, which pays from 6e13 on; one of stories15m was hardly any
# faster (0.99 to 1.03 times). On an AMD EPYC it saved more. On an H200 it took 10 s, and a step of TinyLlama's shape (4
# x 4,096 tokens) 0.27 s in place of 0.34 s, which pays from 2e16 on. `python -m benchmarks ladder` measures it
# anywhere.
COMPILING_PAYS = {"cpu": 1e14, "cuda": 5e16}
CXX = ("cl",) if WINDOWS else ("g++", "clang++")  # what PyTorch calls to compile for a CPU
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of versions 2 and 1


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device that a run trains on.

    Raises:
        InputError: for a GPU that is not there, and for float16 on a CPU.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no GPU; use --device cpu")
    if name == "cpu" and config.dtype == "float16":
        raise InputError(
            "float16 arithmetic on a CPU is hundreds of times slower than bfloat16; use --dtype bfloat16 or float32"
        )
    return torch.device(name)


def choose_dtype(config: TrainConfig, device: torch.device) -> str:
    """Return the dtype that a run computes in: the one asked for, or for "auto" the fastest that is safe.

    That is bfloat16 where the machine multiplies it in hardware, and float32 elsewhere.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if bfloat16_in_hardware(device) else "float32"


def choose_save_format(config: TrainConfig, model: str | None) -> str:
    """Return the format of `final/`: the one asked for, or for "auto" hf where the model is a Hugging Face folder.

    On a machine without the `hf` extra, which can read some of those folders but write none, it is native, with a note.
    """
    if config.save_format != "auto":
        return config.save_format
    if model is None or huggingface_folder(model) is None:
        return "native"
    try:
        for package in ("tokenizers", "safetensors"):
            need(package, "hf", "a Hugging Face folder")
    except InputError as error:
        if is_main_process():
            print(f"note: final/ will be a minift checkpoint: {error}")
        return "native"
    return "hf"


def check_compiler(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError when `compile` is asked for and what it needs on this device is not installed."""
    if config.compile and not _can_compile(device):
        if device.type == "cpu":
            raise InputError(f"compiling for a CPU needs a C++ compiler ({' or '.join(CXX)}), and none is installed")
        raise InputError("compiling for a GPU needs Triton and a C compiler (gcc or clang), and one is not installed")


def choose_compile(config: TrainConfig, device: torch.device, flops: float) -> bool:
    """Return whether a run of so many operations compiles its model: as asked for, or else where that saves time.

    That is known for rows of one length (for others the compiler would start again), and for Linux: on other systems a
    compiler that is there may lack what PyTorch needs, and a run that did not ask for it would end.
    """
    if config.compile is not None:
        return config.compile
    return flops >= COMPILING_PAYS[device.type] and sys.platform == "linux" and _can_compile(device)


def _can_compile(device: torch.device) -> bool:
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX") or CXX[0], *CXX)))
    c_compilers = (os.environ.get("CC") or "gcc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, c_compilers))


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on a device, for all processes together; None where it is not known.

    On a CPU these are Linux's own estimate, within the limit of a container, or half of all memory on other systems.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limits = [Path(file).read_text(encoding="ascii").strip() for file in CGROUP_LIMITS if Path(file).is_file()]
        return min([*found, *(int(limit) for limit in limits if limit.isdigit())], default=None)
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def memory_of_rank(world: World) -> int | None:
    """Return the free bytes that each rank can count on, the same on all of them. Call on all ranks."""
    found = world.gather(free_memory(world.device))
    if None in found:
        return None
    sharing = (
        int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if world.device.type == "cpu" and world.parallel else 1
    )
    return int(min(found)) // sharing
