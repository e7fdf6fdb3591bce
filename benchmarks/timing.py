"""Taking the time: things that are compared take turns, and the clock is read when the work is done.

A machine is not equally fast from one second to the next; what is compared is therefore measured in turns, in an order
that is reversed each time, and by medians. The first calls warm up (caches, allocators, compilers) and do not count. A
GPU works on while Python runs ahead of it, so the clock waits for it on both sides of a measurement.

Read next: `roof.py`.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

SHORTEST = 0.02  # seconds that a measurement should last: what is shorter is called several times in a row


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that a call of each side takes, `repeats` times.

    Args:
        sides: what to call, by name.
        warmup: calls of each that do not count.
        device: the kind of device that the work is done on; "cuda" is waited for.
        clock: seconds, for the tests.
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
    """The names in the order of a turn: reversed in every other one, so that nobody is always the first."""
    return names if turn % 2 == 0 else names[::-1]


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """How many times as fast: the median over the turns, as whatever else the machine did in a turn hit both."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def wait_for(device: str) -> None:
    """Return when all the work that was given to a GPU is done. A CPU's work is done when a call returns."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_call(
    call: Callable[[], object], calls: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of so many in a row, from when the device has nothing else to do until it is done with them."""
    wait_for(device)
    start = clock()
    for _ in range(calls):
        call()
    wait_for(device)
    return (clock() - start) / calls
