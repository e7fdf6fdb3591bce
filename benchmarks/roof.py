"""Measure the roofs of this machine: the highest speed of arithmetic and of memory traffic.

A product of large matrices is the fastest arithmetic; which shape is fastest differs from machine to machine, so the
best of a small grid is searched. Memory has three roofs. A *read* of a large tensor writes next to nothing; the best of
several ways to do it is what no reader of memory can pass, such as decoding. A *copy* reads and writes. A
*matrix-vector product*, which reads each weight once, is most of the work of generating a token, and how PyTorch itself
reads weights. The least time of an operation is the larger of two: its FLOPs over the speed of the product, and its
bytes over that of the copy. Which of them is larger depends on its arithmetic intensity, FLOPs a byte. Data sheets
promise more than programs reach; these roofs are reached by a program, in the same run as what is compared with them.

    python -m benchmarks roofs

Sources: Williams et al., "Roofline" (Communications of the ACM 52, 2009); the searched shapes: Bekman, "Machine
Learning Engineering", maximum achievable matmul FLOPS.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.samples import Samples
from benchmarks.timing import in_turns, seconds_a_call

SIDE = {"cpu": 2_048, "cuda": 8_192}  # of a square matrix, from which the search of shapes starts
SIZES = (0.5, 0.75, 1, 1.5, 2)  # times SIDE: what M, N and K are chosen from
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes read and written: more than a cache holds
ROW = 1_024  # numbers that a sum or a maximum of a reading takes
SEARCH = 2.0  # seconds for the search of shapes
BURST = 0.02  # seconds of products between two looks at the clock
REPEATS = 7
REPEATS_A_TURN = 3
Shape: TypeAlias = tuple[int, int, int]  # M, N, K of a product of [M, K] and [K, N]


@dataclass(frozen=True)
class Roof:
    """The highest speeds of the machine, as measured.

    Attributes:
        dtype: the dtype of the matrices.
        flops: floating-point operations a second of a matrix product.
        bandwidth: bytes a second of a copy, read and written.
        matvec_bandwidth: bytes of weights a second that a matrix-vector product reads.
        read_bandwidth: bytes a second of the fastest way to read, `matvec` among them; 0 in a record that is older.
        shape: M, N, K of the product.
    """

    dtype: str
    flops: float
    bandwidth: float
    matvec_bandwidth: float
    read_bandwidth: float = 0.0
    shape: Shape | None = None

    def seconds(self, flops: float, nbytes: float) -> float:
        """Return the least seconds for this work: the larger of the times for arithmetic and for traffic."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a record."""
        return asdict(self)


def best(roofs: Sequence[Roof]) -> Roof:
    """Return the highest of each value."""
    return replace(
        max(roofs, key=lambda one: one.flops),
        bandwidth=max(one.bandwidth for one in roofs),
        matvec_bandwidth=max(one.matvec_bandwidth for one in roofs),
        read_bandwidth=max(one.read_bandwidth for one in roofs),
    )


def measure(device: str, dtype: torch.dtype) -> Roof:
    """Measure the roofs of a device for matrices of a dtype, once."""
    measured = meter(device, dtype)(REPEATS)
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that are measured next
    return measured


def meter(
    device: str, dtype: torch.dtype, shape: Shape | None = None, nbytes: float = math.inf
) -> Callable[[int], Roof]:
    """Return a function that measures the roofs now: the best of `repeats` runs, because a roof is a maximum.

    It is for a benchmark that takes minutes, while the machine's clock rate may change: what is measured in a turn is
    compared with the roofs of that turn. The arguments are those of `Loads`; the shape is searched by default.
    """
    loads = Loads(device, dtype, shape or search(device, dtype)[0].shape, nbytes)
    return lambda repeats: loads.roof(loads.time(repeats))


class Loads:
    """The loads that reach the roofs, with their tensors.

    Args:
        device: "cpu" or "cuda".
        dtype: of the matrices.
        shape: M, N, K of the product.
        nbytes: how much a reading reads, at most `COPIED`. What a cache holds is read from there the second time, so a
            reading is a roof of something that reads as much.
    """

    def __init__(self, device: str, dtype: torch.dtype, shape: Shape, nbytes: float = math.inf):
        generator, side = torch.Generator(device).manual_seed(0), SIDE[device]
        buffer = torch.rand(COPIED[device] // 4, generator=generator, device=device)
        source, target = buffer.chunk(2)
        read = buffer[: max(1, int(min(nbytes, buffer.nbytes)) // (8 * ROW)) * 2 * ROW]  # whole rows of int64
        vector = torch.rand(1, side, generator=generator, device=device).to(dtype)
        weights = torch.rand(COPIED[device] // 2 // dtype.itemsize // side, side, generator=generator, device=device)
        weights = weights.to(dtype)
        self.device, self.dtype, self.shape = device, str(dtype).removeprefix("torch."), shape
        self.sides: dict[str, Callable[[], object]] = {
            "product": products(device, dtype, _largest(shape))(shape),
            "copy": lambda: target.copy_(source),
            "matvec": lambda: torch.nn.functional.linear(vector, weights),
            **readings(read),
        }
        amounts = {"product": 2 * math.prod(shape), "copy": 2 * source.nbytes, "matvec": weights.nbytes}
        self.amounts = {name: amounts.get(name, read.nbytes) for name in self.sides}  # FLOPs or bytes of a call

    def time(self, repeats: int) -> dict[str, Samples]:
        """Return the samples of each load, measured `repeats` times in turns."""
        return in_turns(self.sides, repeats, device=self.device)

    def roof(self, samples: Mapping[str, Samples]) -> Roof:
        """Return the roofs: the least seconds of each load count, and of the readings the fastest.

        A roof is a maximum, so turns in which the machine was disturbed count too. A matrix-vector product reads as
        well, so its rate is a rate of reading, if not of the same number of bytes.
        """
        speeds = {
            name: self.amounts[name] / min(one.seconds for one in timed.samples) for name, timed in samples.items()
        }
        reading = max(speed for name, speed in speeds.items() if name == "matvec" or name.startswith("read/"))
        return Roof(self.dtype, speeds["product"], speeds["copy"], speeds["matvec"], reading, self.shape)


def readings(tensor: Tensor) -> dict[str, Callable[[], object]]:
    """Return ways to read a float32 tensor of one dimension whole and to write next to nothing, by name.

    None is the fastest everywhere. Integers are added in any order, and eight bytes at once.
    """
    wide, narrow = (tensor.view(dtype).view(-1, min(ROW, len(tensor) // 2)) for dtype in (torch.int64, torch.int32))
    return {
        "read/sum of int64": lambda: wide.sum(1),
        "read/maximum of int32": lambda: narrow.amax(1),
        "read/sum of float32": lambda: tensor.sum(),
    }


# Products -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """A shape of a product, and the seconds of its fastest call."""

    shape: Shape
    seconds: float

    @property
    def flops(self) -> float:
        """Return the operations a second."""
        return 2 * math.prod(self.shape) / self.seconds


def products(device: str, dtype: torch.dtype, most: int) -> Callable[[Shape], Callable[[], Tensor]]:
    """Return a function that makes, for a shape, a call that multiplies random matrices of up to `most` numbers."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(most, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty(most, dtype=dtype, device=device)

    def make(shape: Shape) -> Callable[[], Tensor]:
        M, N, K = shape
        left, right, out = a[: M * K].view(M, K), b[: K * N].view(K, N), product[: M * N].view(M, N)
        return lambda: torch.mm(left, right, out=out)

    return make


def _largest(shape: Shape) -> int:
    """Return the numbers of the largest of the three matrices."""
    return math.prod(sorted(shape)[1:])


def grid(side: int) -> list[Shape]:
    """Return the shapes of the search: those nearest to a square of `side` first, for a short budget."""
    sizes = sorted({max(1, round(side * factor)) for factor in SIZES})
    shapes = itertools.product(sizes, sizes, sizes)
    return sorted(shapes, key=lambda shape: sum(abs(math.log(n / side)) for n in shape))


def search(
    device: str,
    dtype: torch.dtype,
    budget: float = SEARCH,
    clock: Callable[[], float] = time.perf_counter,
    make: Callable[[Shape], Callable[[], object]] | None = None,
) -> list[Tried]:
    """Return the products that were tried, the fastest first; the square is always among them.

    Args:
        device, dtype: of the matrices.
        budget: seconds after which no other shape is tried.
        clock, make: replaced by tests.
    """
    shapes, tried = grid(SIDE[device]), list[Tried]()
    make = make or products(device, dtype, max(map(_largest, shapes)))
    begin = clock()
    for shape in shapes:
        if tried and clock() - begin >= budget:
            break
        call = make(shape)
        call()
        tried.append(Tried(shape, min(seconds_a_call(call, 1, device, clock) for _ in range(3))))
    return sorted(tried, key=lambda one: one.flops, reverse=True)


def rates(
    call: Callable[[], object],
    work: float,
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the rate in each second of an uninterrupted load: `work` a call, over the time.

    A processor that is cold runs at its boost clock. After some seconds it is warm, and its power limit rules.
    """
    found: list[float] = []
    calls = max(1, round(BURST / max(seconds_a_call(call, 1, device, clock), 1e-9)))
    end = clock() + seconds
    while not found or clock() < end:
        start, done = clock(), 0
        while done == 0 or clock() - start < min(1, seconds):
            seconds_a_call(call, calls, device, clock)
            done += calls
        found.append(work * done / (clock() - start))
    return found


def boost_and_sustained(found: Sequence[float]) -> Mapping[str, float]:
    """Return the highest rate of a second, and the median of the seconds of the last half."""
    return {"boost": max(found), "sustained": statistics.median(found[len(found) // 2 :])}
