"""What this machine can do at most, measured: the two roofs under which every operation has to live.

A product of large square matrices is the fastest arithmetic there is, a copy of a large tensor the fastest traffic, and
a product of a matrix with a vector, which reads each weight once, is what generating a token comes to. What an
operation takes at least is the larger of its FLOPs over the first and its bytes over the second; which of the two it is
depends on its arithmetic intensity, FLOPs a byte. Data sheets promise more than any program gets; these are numbers
that a program got, in the same run as what is held against them.

Source: Williams et al., "Roofline" (Communications of the ACM 52, 2009). Read next: `ops.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.timing import in_turns

SIDE = {"cpu": 2_048, "cuda": 8_192}  # of the square matrices
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: more than any cache holds
REPEATS = 7
REPEATS_A_TURN = 3


@dataclass(frozen=True)
class Roof:
    """The machine's best, as measured.

    Attributes:
        dtype: of the matrices.
        flops: floating-point operations a second of a matrix product.
        bandwidth: bytes a second of a copy, those read and those written.
        matvec_bandwidth: bytes of weights a second that a matrix-vector product reads.
    """

    dtype: str
    flops: float
    bandwidth: float
    matvec_bandwidth: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so many operations and so much traffic."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def to_dict(self) -> dict[str, str | float]:
        """For the record."""
        return asdict(self)


def best(roofs: Sequence[Roof]) -> Roof:
    """The highest of several."""
    keys = ("flops", "bandwidth", "matvec_bandwidth")
    return Roof(roofs[0].dtype, *(max(getattr(one, key) for one in roofs) for key in keys))


def measure(device: str, dtype: torch.dtype) -> Roof:
    """Measure the roofs of a device for matrices of a dtype, once."""
    return meter(device, dtype)(REPEATS)


def meter(device: str, dtype: torch.dtype) -> Callable[[int], Roof]:
    """A function that measures the roofs as they are at the moment; the best of so many runs counts: it is a roof.

    For a benchmark that takes minutes, on a machine whose clock changes meanwhile: what is measured in a turn is held
    against the roofs of that turn.
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
        best = {name: min(seconds) for name, seconds in in_turns(sides, repeats, device=device).items()}
        return Roof(
            str(dtype).removeprefix("torch."),
            2 * side**3 / best["product"],
            2 * source.nbytes / best["copy"],
            weights.nbytes / best["matvec"],
        )

    return roofs
