"""Measure what the measurement itself takes: the clock, a call that does nothing, and an operation on one number.

A time of that size is a time of the instrument. So nothing below three times their cost gets a number.

With cold caches they take longer: the code that launches an operation has to be read from memory too.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import cold, timers
from benchmarks.timers import Timer, Wall, nothing

TIMES = 3  # then two thirds of a time, or more, are what was to be measured
READINGS = 5  # of each; their median counts
CALLS = 100


@dataclass(frozen=True)
class Floor:
    """The seconds of: reading a clock before and after nothing; an empty call; an operation on one number."""

    clock: float
    call: float
    kernel: float

    def seconds(self, calls: int) -> float:
        """Return the least time of a call that gets a number, in samples of so many calls."""
        return TIMES * max(self.clock / calls, self.call, self.kernel)

    def sentence(self) -> str:
        """Return the costs in words."""
        costs = (self.clock, self.call, self.kernel)
        clock, call, kernel = (f"{cost * 1e6:.2f} µs" for cost in costs)
        return f"the clock takes {clock}, an empty call {call}, an operation on one number {kernel}"


@functools.cache
def measure(name: str, device: str, mode: str, clock: Callable[[], float] = time.perf_counter) -> Floor:
    """Return the costs with a timer (`timers.NAMES`) on a device, with caches of a mode (`cold.MODES`)."""
    number = torch.zeros(1, device=device)
    kernel, calls = functools.partial(number.add_, 1), 1 if mode == "cold" else CALLS
    before = cold.before(mode, device)

    def cost(call: Callable[[], object], timer: Timer, calls: int) -> float:
        return statistics.median(timer.seconds(call, calls, before) for _ in range(READINGS))

    timer = timers.choose(name, device, kernel, clock)[0]
    plain: Timer = timers.Events() if device == "cuda" and name != "wall" else Wall(device, clock)
    once = cost(nothing, plain, 1)
    return Floor(once, 0.0 if mode == "cold" else cost(nothing, plain, CALLS), cost(kernel, timer, calls))
