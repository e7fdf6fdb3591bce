"""Which kernels a run takes. The table of all of them is in `kernels/__init__.py`."""

import torch

from minift.config import TrainConfig


def choose(config: TrainConfig, device: torch.device) -> tuple[str, ...]:
    """Return the names of the kernels that a training run of this config takes on a device, in the table's order.

    Args:
        config: with its dtype and `compile` decided; of the rest, `lora_rank` and `parallel` count.
    """
    on_cpu, eager = device.type == "cpu", not config.compile
    whole = on_cpu and eager and config.dtype == "bfloat16" and not config.lora_rank and config.parallel != "fsdp"
    taken = {
        "norm": eager,
        "attention": on_cpu,
        "flex": not on_cpu,
        "cross_entropy": True,
        "targets": True,
        "layer": whole,
        "adamw": True,
        "malloc": on_cpu,
        "compiling": not eager,
    }
    return tuple(name for name, take in taken.items() if take)


def choose_for_reading(device: torch.device) -> tuple[str, ...]:
    """Return the names of the kernels for a model that is not trained: to evaluate it, or to generate text."""
    return ("norm", "attention") if device.type == "cpu" else ("norm", "flex")


def bfloat16_in_hardware(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware: GPUs from Ampere on, CPUs with AVX-512-BF16 or AMX.

    Elsewhere it is emulated, several times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not public
    return supported is not None and bool(supported())
