"""Run several small trainings in parallel, one core each: small matrices gain little from a second thread."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from minift.storage.system import usable_cores

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def side_by_side(
    measure: Callable[[Asked], Found], asked: Sequence[Asked], processes: int | None = None
) -> list[Found]:
    """Return the result of `measure` for each of `asked`, in their order.

    Args:
        measure: a function at the top level of a module, so that another process can import it.
        asked: plain values, which can be pickled.
        processes: how many run at the same time, with one thread each; by default one for each core. 0 runs all in this
            process, one after the other.
    """
    cores = usable_cores()
    count = min(cores if processes is None else processes, len(asked))
    if count == 0:
        return [measure(one) for one in asked]
    # "spawn" starts new processes: a fork would copy locks that threads of this process hold.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(measure, asked))
