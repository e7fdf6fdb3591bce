"""One loop, many processes: all that differs when `torchrun` starts several of them.

    torchrun --nproc-per-node 2 -m minift finetune --out runs/two
    torchrun --nproc-per-node 8 -m minift finetune --model ./models/Llama-2-7b-hf --parallel fsdp …

Each process (its number is its *rank*) takes its share of every batch, and the loop in `train.py` is the same. A
gradient is a sum over targets, so it does not matter who computes which part, if only the parts are added up once and
divided by the targets of *all* ranks. There are two ways to keep the weights:

* `ddp` (Li et al., "PyTorch Distributed", arXiv 2006.15704): every rank holds all of them. In the backward pass of a
  window's last micro-batch the gradients are added up over the ranks (an *all-reduce*), some megabytes at a time while
  the rest is still being computed. Then all ranks take the same step.
* `fsdp` (Zhao et al., "PyTorch FSDP", arXiv 2304.11277; ZeRO, arXiv 1910.02054): every rank holds 1/N of each matrix,
  of its gradient and of its moments. A layer's weights are put together (an *all-gather*) just before it is computed,
  and freed after it; its gradient is added up and split again (a *reduce-scatter*). So a model may be larger than the
  memory of one GPU: it is built on the meta device, and each rank keeps its own rows of the checkpoint.

What is not PyTorch's own here is how the ranks agree: on the number of targets, on stopping, on which error is printed.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from minift.errors import InputError, RunError, one_line

# Time for all processes to come together. They have read nothing by then, so only a lost one takes longer.
GATHERING = timedelta(minutes=5)
_Result = TypeVar("_Result")


class OtherRankError(RunError):
    """Another rank cannot go on, and says why itself."""


@dataclass(frozen=True)
class World:
    """The processes of a run. By default there is only this one.

    Attributes:
        rank: which of them this is.
        size: how many there are.
        parallel: how they keep the weights, ddp or fsdp; None for a process of its own.
        device: where this rank computes, and what it sends comes from.
    """

    rank: int = 0
    size: int = 1
    parallel: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True for the rank that writes files and shows how far the run is."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Return the sums of some numbers over all ranks; exact for integers below 2⁵³. Call on all ranks."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, this: bool) -> bool:
        """Return whether `this` is true on at least one rank. Call on all ranks."""
        return bool(self.total(this)[0])

    def agree(self, failure: Exception | None) -> None:
        """Go on only if no rank failed. Call on all ranks.

        Raises:
            Exception: this rank's failure; OtherRankError where another rank failed.
        """
        if self.any(failure is not None):
            raise failure or OtherRankError("another process of this run cannot go on")

    def agreed(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function on all ranks, and return what it returns if it failed on none (InputError, RunError).

        Raises:
            InputError, RunError: this rank's failure.
            OtherRankError: where another rank failed.
        """
        failure: Exception | None = None
        result: _Result | None = None
        try:
            result = function(*arguments)
        except (InputError, RunError) as error:
            failure = error
        self.agree(failure)
        return cast(_Result, result)

    def gather(self, value: Any) -> list[Any]:
        """Return a plain value of every rank, in the order of the ranks. Call on all ranks."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def started_by_torchrun() -> bool:
    """Return whether `torchrun` has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def is_main_process() -> bool:
    """Return whether this process is the one that prints: the main rank, or one that is alone."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def restarted() -> bool:
    """Return whether `torchrun --max-restarts` has started the run again."""
    return started_by_torchrun() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Return whether `torchrun --max-restarts` starts the command again, in the same words, when a process dies."""
    return started_by_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def join(parallel: str, device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun has started; without it, give a world of one.

    Only the main rank prints. When some ranks fail, the first of them prints why: an error that all have in common is
    shown once, and that a process was lost is told only where no rank knows more.

    Args:
        parallel: ddp, fsdp, or auto for ddp under torchrun.
        device: the kind of device; a rank on GPUs takes the one that torchrun gives it.

    Raises:
        InputError: for `parallel` without torchrun, or more ranks than GPUs.
        RunError: when the others do not come, or one of them is gone.
        SystemExit: for an error that another rank has printed.
    """
    if not started_by_torchrun():
        if parallel != "auto":
            ways = "torchrun --nproc-per-node N -m minift …, or --parallel auto for this one alone"
            raise InputError(f"--parallel {parallel} is for several processes: {ways}")
        yield World(device=device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"{local + 1} processes, but {torch.cuda.device_count()} GPUs; lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=GATHERING))
    except dist.DistError:
        size = int(os.environ["WORLD_SIZE"])
        waited = f"waited {GATHERING.total_seconds():.0f} seconds for the {size} processes of this run"
        raise RunError(f"{waited}, and not all have come; they need the same MASTER_ADDR and MASTER_PORT") from None
    # torchrun's store may outlive a failed attempt, with the addresses of processes that are gone in it.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    world = World(rank, size, "fsdp" if parallel == "fsdp" else "ddp", device)
    try:
        with nullcontext() if world.is_main else _silent():
            yield world
    except OtherRankError:
        raise SystemExit(1) from None
    except (InputError, RunError) as error:
        if not _first_to_say(store, f"{rank}: {one_line(error)}"):
            raise SystemExit(2 if isinstance(error, InputError) else 1) from None
        raise
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        message = "another process of this run has ended; what was saved can be continued with --resume"
        if not _first_to_say(store, f"{rank}: {message}"):
            raise SystemExit(1) from None
        raise RunError(message) from None
    finally:
        # The group's own end waits for its threads, and holds the interpreter, which they may need to free what they
        # have called: so it is kept until the process ends, and its threads with it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        dist.destroy_process_group()


@contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _lost_contact(error: RuntimeError) -> bool:
    """Return whether an error of NCCL or gloo says that a rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection", "socket"))


def _first_to_say(store: dist.Store, mine: str) -> bool:
    """Write down, where all ranks can read it, why the run ends; return whether this rank was the first to do so."""
    try:
        return store.compare_set("why the run ends", "", mine) == mine.encode()
    except RuntimeError:  # the store went with the rank that kept it: better twice than never
        return True


# Models ---------------------------------------------------------------------------------------------------------------
