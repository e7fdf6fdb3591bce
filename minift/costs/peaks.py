"""List the peaks of common GPUs, as their makers publish them: dense products by dtype, and the memory's bandwidth.

*Dense.* A data sheet's larger number is "with sparsity" and twice as much; it is nowhere here.

*With float32 accumulation*, because PyTorch's products of float16 and bfloat16 add up in float32. A GeForce card, an
A10G and an L40 do that at half the rate at which they add up in float16.

*By name*, as `torch.cuda.get_device_name` gives it, and the whole name: of a laptop's chip, a slice of a GPU (MIG) or a
virtual one, which begin with the same words and are slower, nothing is known. So is a GPU that is not listed.

Where no document gives a rate, it is SMs x FLOPs a clock of one SM x boost clock; a test computes every rate so that
has SMs and a clock here.
"""

import itertools
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9
WITHOUT_BFLOAT16 = ("GP100", "GV100", "TU104")  # chips

_P100 = "NVIDIA Tesla P100 data sheet, specifications; it has no products of float16 that add up in float32"
_V100 = "NVIDIA V100 Tensor Core GPU data sheet (2020), specifications"
_T4 = "NVIDIA T4 data sheet, specifications; memory: T4 product brief"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet, specifications"
_A800 = "NVIDIA A800 data sheets, specifications: an A100 with a slower NVLink"
_A30 = "NVIDIA A30 data sheet, specifications"
_A10 = "NVIDIA A10 data sheet, specifications"
_A10G = "NVIDIA A10G data sheet, specifications"
_A40 = "NVIDIA A40 data sheet, specifications"
_RTX_A = "NVIDIA RTX A-series data sheets: single precision, and half of 'tensor performance', which is with sparsity"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A; clocks: GeForce RTX 30 product pages"
_H100 = "NVIDIA H100 data sheet, half of the rates with sparsity; clocks: H100 architecture whitepaper, table of GPUs"
_NVL = "NVIDIA H100 NVL and H200 NVL data sheets, half of the rates with sparsity"
_H200 = "NVIDIA H200 data sheet, half of the rates with sparsity"
_H800 = "NVIDIA H800 data sheets, half of the rates with sparsity: an H100 with a slower NVLink"
_H20 = "NVIDIA H20 specifications, as published with HGX H20"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip data sheet, half of the rates with sparsity"
_HGX_B = "NVIDIA HGX B200 and B300 data sheets, a GPU's share, half of the rates with sparsity"
_GB200 = "NVIDIA GB200 NVL72 data sheet, a GPU's share, half of the rates with sparsity"
_L4 = "NVIDIA L4 data sheet, half of the rates with sparsity"
_L40 = "NVIDIA L40 and L40S data sheets, the rates without sparsity"
_L20 = "NVIDIA L20 specifications"
_RTX_ADA = (
    "NVIDIA RTX Ada Generation data sheets: single precision, and a quarter of 'tensor performance' (FP8, sparse)"
)
_AD102 = (
    "NVIDIA Ada GPU architecture whitepaper, appendix A; others by formula from cores and clock of the product page"
)
_GB202 = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix; others by formula from the product page"
_RTX_PRO = "NVIDIA RTX PRO 6000 Blackwell data sheets: single precision and memory; half by formula"
_MI200 = "AMD Instinct MI250X and MI210 data sheets, matrix rates; a device is one of the MI250X's two dies"
_MI300 = "AMD Instinct MI300X and MI325X data sheets, matrix rates without sparsity"


@dataclass(frozen=True)
class Peak:
    """The rates that a document promises of one kind of GPU.

    Attributes:
        names: as PyTorch gives them, without "NVIDIA" and "Tesla".
        half: products of float16 (and of bfloat16, where the chip has it), 10^12 FLOPs a second.
        tf32: products of float32 numbers rounded to TF32, in the same unit.
        float32: products of float32.
        bandwidth: of the memory, 10^9 bytes a second; of the smallest model where several have one name.
        chip: of which it is made.
        source: the document and its section.
        sms, clock: streaming multiprocessors, and the boost clock of their tensor cores in MHz, where published.
    """

    names: tuple[str, ...]
    half: float | None
    tf32: float | None
    float32: float
    bandwidth: float
    chip: str
    source: str
    sms: int | None = None
    clock: int | None = None

    def flops(self, dtype: str) -> float | None:
        """Return the dense rate in FLOPs a second for "float16", "bfloat16", "tf32" or "float32"; None: it has none."""
        if dtype == "bfloat16" and self.chip in WITHOUT_BFLOAT16:
            return None
        rate = {"float16": self.half, "bfloat16": self.half, "tf32": self.tf32, "float32": self.float32}[dtype]
        return rate * TERA if rate else None

    @property
    def bytes_per_second(self) -> float:
        """Return the memory's bandwidth in bytes a second."""
        return self.bandwidth * GIGA


# names, half, tf32, float32, GB/s, chip, source, SMs, MHz
PEAKS = (
    # Data centres
    Peak(("P100-SXM2-16GB",), None, None, 10.6, 732, "GP100", _P100, 56, 1480),
    Peak(("P100-PCIE-16GB",), None, None, 9.3, 732, "GP100", _P100, 56, 1303),
    Peak(("P100-PCIE-12GB",), None, None, 9.3, 549, "GP100", _P100, 56, 1303),
    Peak(("V100-SXM2-16GB", "V100-SXM2-32GB"), 125, None, 15.7, 900, "GV100", _V100, 80, 1530),
    Peak(("V100-PCIE-16GB", "V100-PCIE-32GB"), 112, None, 14.0, 900, "GV100", _V100, 80, 1380),
    Peak(("V100S-PCIE-32GB",), 130, None, 16.4, 1134, "GV100", _V100, 80, 1597),
    Peak(("T4",), 65, None, 8.1, 320, "TU104", _T4, 40, 1590),
    Peak(("A100-SXM4-40GB", "A100-PCIE-40GB"), 312, 156, 19.5, 1555, "GA100", _A100, 108, 1410),
    Peak(("A100-SXM4-80GB", "A100-SXM-80GB"), 312, 156, 19.5, 2039, "GA100", _A100, 108, 1410),
    Peak(("A100 80GB PCIe", "A100-PCIE-80GB"), 312, 156, 19.5, 1935, "GA100", _A100, 108, 1410),
    Peak(("A800-SXM4-80GB",), 312, 156, 19.5, 2039, "GA100", _A800, 108, 1410),
    Peak(("A800 80GB PCIe",), 312, 156, 19.5, 1935, "GA100", _A800, 108, 1410),
    Peak(("A800-SXM4-40GB", "A800 40GB Active"), 312, 156, 19.5, 1555, "GA100", _A800, 108, 1410),
    Peak(("A30",), 165, 82, 10.3, 933, "GA100", _A30, 56, 1440),
    Peak(("A10",), 125, 62.5, 31.2, 600, "GA102", _A10, 72, 1695),
    Peak(("A10G",), 70, 35, 35.0, 600, "GA102, half rate", _A10G, 80, 1710),
    Peak(("A40",), 149.7, 74.8, 37.4, 696, "GA102", _A40, 84, 1740),
    Peak(("H100 80GB HBM3",), 989, 494, 66.9, 3352, "GH100", _H100, 132, 1830),
    Peak(("H100 PCIe",), 756.5, 378, 51.2, 2039, "GH100", _H100, 114, 1620),
    Peak(("H100 NVL",), 835.5, 417.5, 60.0, 3900, "GH100", _NVL),
    Peak(("H200",), 989, 494, 66.9, 4800, "GH100", _H200, 132, 1830),
    Peak(("H200 NVL",), 835.5, 417.5, 60.0, 4800, "GH100", _NVL),
    Peak(("H800",), 989, 494, 66.9, 3352, "GH100", _H800, 132, 1830),
    Peak(("H800 PCIe",), 756.5, 378, 51.2, 2039, "GH100", _H800, 114, 1620),
    Peak(("H20",), 148, 74, 44.0, 4000, "GH100", _H20),
    Peak(("GH200 480GB", "GH200 120GB"), 989, 494, 66.9, 4000, "GH100", _GH200, 132, 1830),
    Peak(("GH200 144G HBM3e",), 989, 494, 66.9, 4900, "GH100", _GH200, 132, 1830),
    Peak(("B200",), 2250, 1100, 75.0, 7700, "GB100", _HGX_B),
    Peak(("B300 SXM6 AC",), 2250, 1125, 75.0, 8000, "GB100", _HGX_B),
    Peak(("GB200",), 2500, 1250, 80.0, 8000, "GB100", _GB200),
    Peak(("L4",), 121, 60.5, 30.3, 300, "AD104", _L4, 58, 2040),
    Peak(("L20",), 119.5, 59.8, 59.8, 864, "AD102, half rate", _L20),
    Peak(("L40",), 181.05, 90.5, 90.5, 864, "AD102, half rate", _L40, 142, 2490),
    Peak(("L40S",), 362.05, 183, 91.6, 864, "AD102", _L40, 142, 2520),
    # Workstations
    Peak(("RTX A4000",), 76.7, 38.3, 19.2, 448, "GA104", _RTX_A, 48, 1560),
    Peak(("RTX A4500",), 94.6, 47.3, 23.7, 640, "GA102", _RTX_A, 56, 1650),
    Peak(("RTX A5000",), 111.1, 55.6, 27.8, 768, "GA102", _RTX_A, 64, 1695),
    Peak(("RTX A6000",), 154.8, 77.4, 38.7, 768, "GA102", _RTX_A, 84, 1800),
    Peak(("RTX 4000 Ada Generation",), 106.9, 53.5, 26.7, 360, "AD104", _RTX_ADA, 48, 2175),
    Peak(("RTX 4500 Ada Generation",), 158.5, 79.3, 39.6, 432, "AD104", _RTX_ADA, 60, 2580),
    Peak(("RTX 5000 Ada Generation",), 261.1, 130.6, 65.3, 576, "AD102", _RTX_ADA, 100, 2550),
    Peak(("RTX 6000 Ada Generation",), 364.2, 182.1, 91.1, 960, "AD102", _RTX_ADA, 142, 2505),
    Peak(("RTX PRO 6000 Blackwell Workstation Edition",), 503.8, 251.9, 126.0, 1792, "GB202", _RTX_PRO, 188, 2617),
    Peak(
        ("RTX PRO 6000 Blackwell Max-Q Workstation Edition",), 438.9, 219.5, 109.7, 1792, "GB202", _RTX_PRO, 188, 2280
    ),
    Peak(("RTX PRO 6000 Blackwell Server Edition",), 480, 240, 120.0, 1597, "GB202", _RTX_PRO),
    # GeForce
    Peak(("GeForce RTX 3060",), 25.5, 12.7, 12.7, 240, "GA106, half rate", _GA102, 28, 1777),
    Peak(("GeForce RTX 3060 Ti",), 32.4, 16.2, 16.2, 448, "GA104, half rate", _GA102, 38, 1665),
    Peak(("GeForce RTX 3070",), 40.6, 20.3, 20.3, 448, "GA104, half rate", _GA102, 46, 1725),
    Peak(("GeForce RTX 3070 Ti",), 43.5, 21.7, 21.7, 608, "GA104, half rate", _GA102, 48, 1770),
    Peak(("GeForce RTX 3080",), 59.5, 29.8, 29.8, 760, "GA102, half rate", _GA102, 68, 1710),
    Peak(("GeForce RTX 3080 Ti",), 68.2, 34.1, 34.1, 912, "GA102, half rate", _GA102, 80, 1665),
    Peak(("GeForce RTX 3090",), 71.0, 35.6, 35.6, 936, "GA102, half rate", _GA102, 82, 1695),
    Peak(("GeForce RTX 3090 Ti",), 80.0, 40.0, 40.0, 1008, "GA102, half rate", _GA102, 84, 1860),
    Peak(("GeForce RTX 4060",), 30.2, 15.1, 15.1, 272, "AD107, half rate", _AD102, 24, 2460),
    Peak(("GeForce RTX 4060 Ti",), 44.1, 22.1, 22.1, 288, "AD106, half rate", _AD102, 34, 2535),
    Peak(("GeForce RTX 4070",), 58.3, 29.1, 29.1, 504, "AD104, half rate", _AD102, 46, 2475),
    Peak(("GeForce RTX 4070 SUPER",), 71.0, 35.5, 35.5, 504, "AD104, half rate", _AD102, 56, 2475),
    Peak(("GeForce RTX 4070 Ti",), 80.2, 40.1, 40.1, 504, "AD104, half rate", _AD102, 60, 2610),
    Peak(("GeForce RTX 4070 Ti SUPER",), 88.2, 44.1, 44.1, 672, "AD103, half rate", _AD102, 66, 2610),
    Peak(("GeForce RTX 4080",), 97.5, 48.7, 48.7, 717, "AD103, half rate", _AD102, 76, 2505),
    Peak(("GeForce RTX 4080 SUPER",), 104.4, 52.2, 52.2, 736, "AD103, half rate", _AD102, 80, 2550),
    Peak(("GeForce RTX 4090",), 165.2, 82.6, 82.6, 1008, "AD102, half rate", _AD102, 128, 2520),
    Peak(("GeForce RTX 4090 D",), 147.1, 73.5, 73.5, 1008, "AD102, half rate", _AD102, 114, 2520),
    Peak(("GeForce RTX 5060",), 38.4, 19.2, 19.2, 448, "GB206, half rate", _GB202, 30, 2497),
    Peak(("GeForce RTX 5060 Ti",), 47.4, 23.7, 23.7, 448, "GB206, half rate", _GB202, 36, 2572),
    Peak(("GeForce RTX 5070",), 61.7, 30.9, 30.9, 672, "GB205, half rate", _GB202, 48, 2512),
    Peak(("GeForce RTX 5070 Ti",), 87.9, 43.9, 43.9, 896, "GB203, half rate", _GB202, 70, 2452),
    Peak(("GeForce RTX 5080",), 112.6, 56.3, 56.3, 960, "GB203, half rate", _GB202, 84, 2617),
    Peak(("GeForce RTX 5090",), 209.5, 104.8, 104.8, 1792, "GB202, half rate", _GB202, 170, 2407),
    # AMD, as PyTorch's build for ROCm names them
    Peak(("AMD Instinct MI210",), 181, None, 45.3, 1638, "CDNA 2", _MI200),
    Peak(("AMD Instinct MI250X",), 191.5, None, 47.9, 1638, "CDNA 2", _MI200),
    Peak(("AMD Instinct MI300X", "AMD Instinct MI300X OAM"), 1307.4, 653.7, 163.4, 5325, "CDNA 3", _MI300),
    Peak(("AMD Instinct MI325X", "AMD Instinct MI325X OAM"), 1307.4, 653.7, 163.4, 6000, "CDNA 3", _MI300),
)

_BY_NAME = dict(itertools.chain.from_iterable(((name, peak) for name in peak.names) for peak in PEAKS))


def peak_of(gpu: str) -> Peak | None:
    """Return what is published of a GPU of this name, or None where nothing is known."""
    return _BY_NAME.get(gpu.removeprefix("NVIDIA ").removeprefix("Tesla "))
