"""Time calls: what is compared takes turns, and the clock is read when the work is done.

The speed of a machine changes from one second to the next. So what is compared is measured in turns, in an order that
is reversed each time, and the median counts. The first calls warm up caches, allocators and compilers, and do not
count. A GPU works asynchronously, so the clock waits for it before and after a measurement.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

SHORTEST = 0.02  # seconds that a measurement should last: a shorter call is repeated within it


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of a call of each side, measured `repeats` times.

    Args:
        sides: what to call, by name.
        warmup: calls of each that do not count.
        device: the kind of device that does the work; the clock waits for "cuda".
        clock: returns seconds; tests replace it.
    """
    calls = {}
    for name, call in sides.items():
        for _ in range(warmup):
            call()
        seconds = seconds_a_call(call, 1, device, clock)
        calls[name] = max(1, min(1_000, round(SHORTEST / max(seconds, 1e-9))))
    seconds_of: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in in_turn_order(list(sides), turn):
            seconds_of[name].append(seconds_a_call(sides[name], calls[name], device, clock))
    return seconds_of


def in_turn_order(names: Sequence[str], turn: int) -> Sequence[str]:
    """Return the names in the order of a turn: reversed in every second one, so that none is always the first."""
    return names if turn % 2 == 0 else names[::-1]


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """Return how many times as fast: the median of the ratios by turn, as another load in a turn slowed both sides."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def wait_for(device: str) -> None:
    """Return when all work on a GPU is done. On a CPU it is done when a call returns."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_call(
    call: Callable[[], object], calls: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds of `calls` calls in a row, from an idle device until its work is done."""
    wait_for(device)
    start = clock()
    for _ in range(calls):
        call()
    wait_for(device)
    return (clock() - start) / calls
