"""What a run computes on: its device, its dtype, and whether its model is compiled.

Each is what was asked for, or else what is fastest and safe on this machine. Read next: `train.py`.
"""

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager
from typing import Any

import torch

from minift.config import TrainConfig
from minift.errors import InputError
from minift.model import Llama

# Operations (flops.py) from which a run is compiled unasked. On two cores of an Intel Xeon compiling took 26 s and made
# a step of bundled pretraining 1.12 times as fast, which pays from 6e13 on; one of stories15m was hardly any faster
# (0.99 to 1.03 times). On an AMD EPYC it saved more. On an H200 it took 10 s, and a step of TinyLlama's shape (4 x
# 4,096 tokens) 0.27 s in place of 0.34 s, which pays from 2e16 on. `python -m benchmarks ladder` measures it anywhere.
COMPILING_PAYS = {"cpu": 1e14, "cuda": 5e16}


def choose_device(config: TrainConfig) -> torch.device:
    """The device that a run trains on.

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
    """The dtype that a run computes in: the one asked for, or for "auto" the fastest that is safe.

    That is bfloat16 where the machine multiplies it in hardware: GPUs from Ampere on, CPUs with AVX-512-BF16 or AMX.
    Elsewhere it is emulated, several times slower than float32.
    """
    if config.dtype != "auto":
        return config.dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    in_hardware = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not public: guarded
    return "bfloat16" if in_hardware is not None and in_hardware() else "float32"


def autocast(model: Llama, config: TrainConfig) -> AbstractContextManager[Any]:
    """The context in which matrix products run in the run's dtype; for float32 it does nothing."""
    dtype = getattr(torch, choose_dtype(config, model.device))
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_compiler(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError when `compile` is asked for and what it needs on this device is not installed."""
    if config.compile and not _can_compile(device):
        if device.type == "cpu":
            raise InputError("compiling for a CPU needs a C++ compiler (g++ or clang++), and none is installed")
        raise InputError("compiling for a GPU needs Triton and a C compiler (gcc or clang), and one is not installed")


def choose_compile(config: TrainConfig, device: torch.device, flops: float) -> bool:
    """Whether a run of so many operations compiles its model: as asked for, or else where it is sure to pay.

    That is known for rows of one length: for others the compiler would start again.
    """
    if config.compile is not None:
        return config.compile
    return flops >= COMPILING_PAYS[device.type] and _can_compile(device)


def choose_written_out(model: Llama, config: TrainConfig, device: torch.device) -> bool:
    """Whether a run takes the layers of short rows by `kernels/layer.py`: in bfloat16 on a CPU, where no compiler does better.

    Beside adapters the weights are frozen, and what is not trained is not written out.
    """
    if device.type != "cpu" or config.compile or choose_dtype(config, device) != "bfloat16":
        return False
    return all(parameter.requires_grad for parameter in model.parameters())


def _can_compile(device: torch.device) -> bool:
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++")))
    c_compilers = (os.environ.get("CC") or "gcc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, c_compilers))
