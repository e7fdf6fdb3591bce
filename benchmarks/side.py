"""A side of a comparison that trains, in a process of its own: the batches that all sides take, and how it takes turns.

`process.Worker` is the other end. Read next: `peers.py`.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks import process
from benchmarks.timing import seconds_a_call
from minift.errors import InputError
from minift.pack import IGNORE, Batch

BATCHES = 4  # different ones, which all sides go through again and again
AGREE = 0.01  # how far the losses of a step may be apart, as a share of the smallest


def whole_rows(ids: Tensor) -> list[Batch]:
    """Batches of rows that are one document each and end with it, so that a row's last token has no target.

    Args:
        ids: int64 [batches, B, T].
    """
    _, B, T = ids.shape
    targets = torch.cat((ids[:, :, 1:], torch.full_like(ids[:, :, :1], IGNORE)), dim=-1)
    places, rows = torch.arange(T, device=ids.device).expand(B, T), torch.zeros_like(ids[0])
    return [Batch(*pair, places, rows, False, B * (T - 1)) for pair in zip(ids, targets, strict=True)]


def serve(
    ready: dict[str, Any],
    step: Callable[[], float],
    device: str,
    steps: int = 1,
    out: TextIO | None = None,
    together: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Say that this side is ready, and take steps whenever a line comes in.

    It answers with the seconds of a step, the losses, and the most memory that it ever had.

    Args:
        ready: what to say first.
        step: takes one, and returns its loss.
        steps: of a turn.
        out: where the answers go, if not to standard output.
        together: waits for the others of a side of several processes.
        clock: seconds, for the tests.
    """
    losses: list[float] = []
    print(json.dumps(ready), file=out, flush=True)
    for _ in sys.stdin:
        together()
        seconds = seconds_a_call(lambda: losses.append(step()), steps, device, clock)
        answer = {"seconds": seconds, "losses": losses[-steps:], "peak_bytes": process.peak_of(device)}
        print(json.dumps(answer), file=out, flush=True)


def losses_apart(losses: Mapping[str, Sequence[float]]) -> float:
    """How far the sides' losses of a step are apart at most, as a share of the smallest.

    Raises:
        InputError: when that is more than AGREE: then their times compare nothing.
    """
    apart = max(max(step) / min(step) - 1 for step in zip(*losses.values(), strict=True))
    if apart > AGREE:
        raise InputError(f"the sides' losses are up to {apart:.1%} apart: they do not train the same")
    return apart
