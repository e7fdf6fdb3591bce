"""Measure the roofs of this machine: the highest speed of arithmetic and of memory traffic.

A product of large square matrices is the fastest arithmetic, and a copy of a large tensor the fastest traffic. A
matrix-vector product, which reads each weight once, is most of the work of generating a token. The least time of an
operation is the larger of two: its FLOPs over the speed of the first, and its bytes over that of the second. Which of
them is larger depends on its arithmetic intensity, FLOPs a byte. Data sheets promise more than programs reach; these
roofs are reached by a program, in the same run as what is compared with them.

Source: Williams et al., "Roofline" (Communications of the ACM 52, 2009).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.timing import in_turns

SIDE = {"cpu": 2_048, "cuda": 8_192}  # of the square matrices
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes read and written: more than a cache holds
REPEATS = 7
REPEATS_A_TURN = 3


@dataclass(frozen=True)
class Roof:
    """The highest speeds of the machine, as measured.

    Attributes:
        dtype: the dtype of the matrices.
        flops: floating-point operations a second of a matrix product.
        bandwidth: bytes a second of a copy, read and written.
        matvec_bandwidth: bytes of weights a second that a matrix-vector product reads.
    """

    dtype: str
    flops: float
    bandwidth: float
    matvec_bandwidth: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """Return the least seconds for this work: the larger of the times for arithmetic and for traffic."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def to_dict(self) -> dict[str, str | float]:
        """Return the values for a record."""
        return asdict(self)


def best(roofs: Sequence[Roof]) -> Roof:
    """Return the highest of each value."""
    keys = ("flops", "bandwidth", "matvec_bandwidth")
    return Roof(roofs[0].dtype, *(max(getattr(one, key) for one in roofs) for key in keys))


def measure(device: str, dtype: torch.dtype) -> Roof:
    """Measure the roofs of a device for matrices of a dtype, once."""
    return meter(device, dtype)(REPEATS)


def meter(device: str, dtype: torch.dtype) -> Callable[[int], Roof]:
    """Return a function that measures the roofs now: the best of `repeats` runs, because a roof is a maximum.

    It is for a benchmark that takes minutes, while the machine's clock rate may change: what is measured in a turn is
    compared with the roofs of that turn.
    """
    side, generator = SIDE[device], torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    a, b, vector = random(side, side), random(side, side), random(1, side)
    weights = random(COPIED[device] // 2 // dtype.itemsize // side, side)
    source = random(COPIED[device] // 2 // dtype.itemsize)
    product, result = torch.empty_like(a), torch.empty_like(source)
    sides = {
        "product": lambda: torch.mm(a, b, out=product),
        "copy": lambda: result.copy_(source),
        "matvec": lambda: torch.nn.functional.linear(vector, weights),
    }

    def roofs(repeats: int) -> Roof:
        best = {name: min(one.seconds) for name, one in in_turns(sides, repeats, device=device).items()}
        return Roof(
            str(dtype).removeprefix("torch."),
            2 * side**3 / best["product"],
            2 * source.nbytes / best["copy"],
            weights.nbytes / best["matvec"],
        )

    return roofs
