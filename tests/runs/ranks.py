"""Several ranks for a test, without torchrun: forked processes, which need not import torch again."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from minift.distributed.world import World, join


def run_ranks(size: int, parallel: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(world, *arguments)` returns on each of `size` ranks; it must be plain values or tensors."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, size, port, parallel, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        try:
            results.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(240) else None)
        except EOFError:
            results.append(EOFError(f"rank {rank} gave nothing back"))
        if results[-1] is None:
            process.kill()
            results[-1] = TimeoutError(f"rank {rank} gives no sign of life")
        process.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _rank(
    pipe: Connection, rank: int, size: int, port: int, parallel: str, function: Callable[..., Any], arguments: Any
) -> None:
    as_rank(rank, size, port)
    try:
        with join(parallel, torch.device("cpu")) as world:
            result = function(world, *arguments)
        pipe.send_bytes(pickle.dumps(result))  # by value: shared memory would end with this process
    except BaseException as error:  # the test raises it again
        pipe.send_bytes(pickle.dumps(error))


def as_rank(rank: int, size: int, port: int) -> None:
    """Set the environment of this process as torchrun does."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _as_one_of_two(rank: int, port: int, run: Any, *arguments: Any) -> None:
    as_rank(rank, 2, port)
    run(*arguments)


def by_two(run: Any, *arguments: Any) -> None:
    """Run a job in two processes, as torchrun does."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=_as_one_of_two, args=(rank, port, run, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function(world, *arguments)` returns in this process alone."""
    return function(World(), *arguments)
