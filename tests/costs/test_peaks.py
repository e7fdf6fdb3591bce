"""The promise of `costs/peaks.py`: dense rates with their sources, each for the GPU of exactly that name.

Rates are computed again from what a multiprocessor does in a clock, how many there are, and the clock. What it does in
a clock is written here from the architectures' whitepapers, and nowhere in the table. Names are those that `nvidia-smi`
and `torch.cuda.get_device_name` print.
"""

import itertools
import re

import pytest

from minift.costs.peaks import PEAKS, Peak, peak_of

# FLOPs of a multiprocessor in a clock: products of float16 that add up in float32, TF32, float32. NVIDIA's whitepapers:
# Tesla P100 and V100, Turing, A100, Ampere GA102, H100, Ada, RTX Blackwell.
A_CLOCK = {
    "GP100": (None, None, 128),
    "GV100": (1_024, None, 128),
    "TU1": (1_024, None, 128),
    "GA100": (2_048, 1_024, 128),
    "GA10": (1_024, 512, 256),
    "GH100": (4_096, 2_048, 256),
    "AD10": (1_024, 512, 256),
    "GB20": (1_024, 512, 256),
}
HALF_RATE = (512, 256, 256)
NEAR = 0.015  # data sheets round, and some give a rate at another clock than the whitepaper

GPUS = [
    ("Tesla P100-PCIE-16GB", "float32", 9.3),
    ("Tesla V100-SXM2-32GB", "float16", 125),
    ("Tesla V100-SXM2-32GB", "bfloat16", None),
    ("Tesla T4", "float16", 65),
    ("NVIDIA A10", "bfloat16", 125),
    ("NVIDIA A10G", "bfloat16", 70),
    ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
    ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
    ("A100-SXM4-40GB", "bfloat16", 312),  # of an older driver
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H100 PCIe", "bfloat16", 756.5),
    ("NVIDIA H100 NVL", "bfloat16", 835.5),
    ("NVIDIA H200", "float32", 66.9),
    ("NVIDIA H20", "bfloat16", 148),
    ("NVIDIA GH200 480GB", "bfloat16", 989),
    ("NVIDIA B200", "bfloat16", 2250),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40", "bfloat16", 181.05),
    ("NVIDIA L40S", "bfloat16", 362.05),
    ("NVIDIA RTX A6000", "bfloat16", 154.8),
    ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
    ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
    ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", 80),
    ("NVIDIA GeForce RTX 4070", "bfloat16", 58.3),
    ("NVIDIA GeForce RTX 4070 Ti", "bfloat16", 80.2),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "bfloat16", 88.2),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("NVIDIA GeForce RTX 5090", "float16", 209.5),
    ("AMD Instinct MI300X", "bfloat16", 1307.4),
]
UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 3070 with Max-Q Design",
    "NVIDIA RTX A5000 Laptop GPU",
    "NVIDIA RTX 5000 Ada Generation Laptop GPU",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "GRID A100-10C",
    "NVIDIA A10-24Q",
    "NVIDIA A100X",
    "NVIDIA H100 64GB HBM2",
    "NVIDIA",
    "",
]


@pytest.mark.parametrize(("gpu", "dtype", "tera"), GPUS)
def test_a_name_has_the_rate_of_its_gpu(gpu: str, dtype: str, tera: float | None) -> None:
    peak = peak_of(gpu)
    assert peak is not None
    assert peak.flops(dtype) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize("gpu", UNKNOWN)
def test_of_a_part_of_a_gpu_a_laptop_and_an_unlisted_one_nothing_is_known(gpu: str) -> None:
    assert peak_of(gpu) is None


def test_no_name_is_of_two_gpus() -> None:
    names = [name for peak in PEAKS for name in peak.names]
    assert len(names) == len(set(names))
    for name, peak in ((name, one) for one in PEAKS for name in one.names):
        vendor = "" if name.startswith("AMD") else "NVIDIA "
        assert peak_of(vendor + name) is peak
    assert len(PEAKS) >= 40


@pytest.mark.parametrize("peak", [peak for peak in PEAKS if peak.sms and peak.clock], ids=lambda peak: peak.names[0])
def test_a_rate_is_that_of_its_multiprocessors(peak: Peak) -> None:
    assert peak.sms
    assert peak.clock
    a_clock = next(rates for chip, rates in A_CLOCK.items() if peak.chip.startswith(chip))
    a_clock = HALF_RATE if "half rate" in peak.chip else a_clock
    for rate, flops in zip((peak.half, peak.tf32, peak.float32), a_clock, strict=True):
        if peak.chip == "GH100" and rate == peak.float32:
            continue  # whose float32 cores have a clock of their own
        assert rate == (flops and pytest.approx(flops * peak.sms * peak.clock * 1e6 / 1e12, rel=NEAR))


def test_most_rates_are_computed_again() -> None:
    assert sum(1 for peak in PEAKS if peak.sms) > 0.8 * len(PEAKS)


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: peak.names[0])
def test_rates_are_dense_plausible_and_have_a_source(peak: Peak) -> None:
    """Products of half precision are 2 times (GeForce) to 30 times (B200) as fast as those of float32."""
    assert re.match(r"(NVIDIA|AMD) ", peak.source)
    if peak.half:
        assert 1.98 <= peak.half / peak.float32 <= 32
    if peak.half and peak.tf32:
        assert peak.half / peak.tf32 == pytest.approx(2, rel=0.03)
    assert ("half rate" in peak.chip) == (
        peak.half is not None and peak.half / peak.float32 < 2.1 and "AMD" not in peak.source
    )
    assert 100 < peak.bandwidth < 10_000
    assert peak.bytes_per_second == peak.bandwidth * 1e9


def test_a_name_never_has_the_rate_of_one_that_it_begins_with() -> None:
    """RTX 4070 and 4070 Ti, L4 and L40S, A10 and A100: the shorter name is a part of the longer."""
    names = [(name, peak) for peak in PEAKS for name in peak.names]
    inside = [(a, b) for a, b in itertools.permutations(names, 2) if a[0] in b[0] and a[1] is not b[1]]
    assert len(inside) > 15
    for (_, shorter), (name, _) in inside:
        assert peak_of(name) is not shorter
