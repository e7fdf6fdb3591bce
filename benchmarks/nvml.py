"""Ask NVIDIA's management library what a GPU does: its clock, why it is slowed down, temperature, power and energy.

The package is optional (`pip install minift[gpu]`). What a GPU or its driver does not say is None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minift.errors import InputError, need

# Why a GPU runs below the clock that it is set to (nvmlClocksEventReasons in nvml.h). A GPU that is idle, or whose
# clock was set by its owner, is not slowed down.
REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU, through the module `pynvml` or one with the same functions."""

    library: Any
    handle: Any

    def driver(self) -> str:
        """Return the version of the driver."""
        version = self.library.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)

    def megahertz(self) -> float | None:
        """Return the clock of the multiprocessors, in MHz."""
        return self._ask(self.library.nvmlDeviceGetClockInfo, self.library.NVML_CLOCK_SM)

    def reasons(self) -> frozenset[str] | None:
        """Return why the clock is lowered now, of REASONS."""
        bits = self._ask(self.library.nvmlDeviceGetCurrentClocksThrottleReasons)
        return None if bits is None else frozenset(reason for bit, reason in REASONS.items() if int(bits) & bit)

    def celsius(self) -> float | None:
        """Return the temperature."""
        return self._ask(self.library.nvmlDeviceGetTemperature, self.library.NVML_TEMPERATURE_GPU)

    def watts(self) -> float | None:
        """Return the power that the board draws now."""
        milliwatts = self._ask(self.library.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1e3

    def joules(self) -> float | None:
        """Return the energy that the board has taken since its driver was loaded."""
        millijoules = self._ask(self.library.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def _ask(self, function: Callable[..., float], *words: Any) -> float | None:
        try:
            return float(function(self.handle, *words))
        except self.library.NVMLError:
            return None  # older cards and virtual ones do not say everything


def find(library: Any = None) -> Gpu:
    """Return the GPU that PyTorch uses.

    Args:
        library: the module `pynvml`; by default it is imported.

    Raises:
        InputError: when the package is not installed, or the driver has no such library.
    """
    library = library or need("pynvml", "gpu", "watching a GPU")
    try:
        library.nvmlInit()
        try:  # by its UUID: CUDA_VISIBLE_DEVICES changes CUDA's numbers, not those of this library
            handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        except (library.NVMLError, AttributeError):
            handle = library.nvmlDeviceGetHandleByIndex(0)
    except library.NVMLError as error:
        raise InputError(f"watching a GPU: NVIDIA's management library says {error}") from None
    return Gpu(library, handle)
