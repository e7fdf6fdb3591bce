"""Serve one side of a comparison of training steps from a child process: its batches, its turns and its answers.

`process.Worker` is the other end.
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

BATCHES = 4  # different batches, which all sides repeat in the same order
AGREE = 0.01  # the largest difference between the losses of a step, as a share of the smallest


def whole_rows(ids: Tensor) -> list[Batch]:
    """Return batches of rows that are one document each; a row's last token has no target.

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
    """Print that this side is ready, and take steps for each line on standard input.

    Each answer has the seconds of a step, the losses, and the peak memory of the process.

    Args:
        ready: the first answer.
        step: takes one step and returns its loss.
        device: "cpu" or "cuda".
        steps: the number of steps of a turn.
        out: where the answers go; by default standard output.
        together: waits for the other processes of the same side.
        clock: returns seconds; tests replace it.
    """
    losses: list[float] = []
    print(json.dumps(ready), file=out, flush=True)
    for _ in sys.stdin:
        together()
        at, seconds = time.time(), seconds_a_call(lambda: losses.append(step()), steps, device, clock)
        answer = {
            "at": at,
            "calls": steps,
            "seconds": seconds,
            "losses": losses[-steps:],
            "peak_bytes": process.peak_of(device),
        }
        print(json.dumps(answer), file=out, flush=True)


def losses_apart(losses: Mapping[str, Sequence[float]]) -> float:
    """Return the largest difference between the sides' losses of a step, as a share of the smallest.

    Raises:
        InputError: when that is more than AGREE: then their times cannot be compared.
    """
    apart = max(max(step) / min(step) - 1 for step in zip(*losses.values(), strict=True))
    if apart > AGREE:
        raise InputError(f"the sides' losses are up to {apart:.1%} apart: they do not train the same")
    return apart
