"""Several small trainings at the same time, a core each: matrices this small gain little from a second thread.

Read next: `knowledge.py`.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def side_by_side(
    measure: Callable[[Asked], Found], asked: Sequence[Asked], processes: int | None = None
) -> list[Found]:
    """What `measure` finds for each of `asked`, in their order.

    Args:
        measure: a function of a module, so that another process can find it; so must `asked` be plain values.
        processes: how many work at the same time, with a thread each; by default one for each core. 0 does it all here,
            one after the other.
    """
    cores = len(os.sched_getaffinity(0))
    count = min(cores if processes is None else processes, len(asked))
    if count == 0:
        return [measure(one) for one in asked]
    # Started afresh: a fork would copy the threads' locks of a process that computes.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(measure, asked))
