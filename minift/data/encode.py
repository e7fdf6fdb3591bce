"""Documents → ids, by several processes, in one order.

Encoding is most of the work of a data pipeline, so it can be given to worker processes. If each of them read a share of
the corpus, the order of the documents would depend on the number of workers, and the position in the corpus would be
hard to save. So this process reads, and the workers only encode: one order, one position, any number of workers.

                               ┌─ thread ⇄ pipe ⇄ worker ─┐
    stream → chunks of texts → ├─ thread ⇄ pipe ⇄ worker ─┤ → their ids, in the order of reading → batches
                               └─ …                       ┘

A worker shares nothing with another process but its own pipe, and a pipe ends when the process at its other end does,
however that ends: a killed worker is noticed by the thread that waits for it, and a killed run by its workers.
(`concurrent.futures.ProcessPoolExecutor` has one queue of results for all workers. One that is killed while it writes a
result leaves the run waiting for ever.)

    for chunk in encode_documents(DocumentStream(["data/pages"], epochs=1), tokenizer, workers=2):
        print(chunk.ids, chunk.lengths)
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from minift.data.stream import DocumentStream
from minift.errors import InputError, RunError
from minift.tokenizer.base import Tokenizer

CHUNK_CHARACTERS = 2**16  # at which a chunk is full: the work of some ten milliseconds
KILLED = 9  # SIGKILL, for which Windows has no name
PREFETCH = 8  # chunks that are read ahead for each worker, so that it never waits for this process

Ids = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]  # what `Tokenizer.encode_documents` returns
Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Some documents as ids.

    Attributes:
        ids: int32 [sum of lengths], each document with its EOS, and BOS where the tokenizer adds it.
        lengths: int64 [documents].
        stream_state: the state of the stream after the last of them.
    """

    ids: "np.ndarray[Any, Any]"
    lengths: "np.ndarray[Any, Any]"
    stream_state: dict[str, Any]


def encode_documents(stream: DocumentStream, tokenizer: Tokenizer, workers: int = 0) -> Iterator[Chunk]:
    """Yield the documents of a stream as ids, in its order, encoded by `workers` processes (0: by this one).

    An error of the stream is raised after all chunks that were read before it.

    Raises:
        InputError: as the stream does.
        RunError: when a worker dies, or cannot be started.
    """
    failure: InputError | None = None

    def chunks() -> Iterator[tuple[list[str], dict[str, Any]]]:
        nonlocal failure
        texts: list[str] = []
        characters = 0
        try:
            for text in stream:
                texts.append(text)
                characters += len(text)
                if characters >= CHUNK_CHARACTERS:
                    yield texts, stream.state_dict()
                    texts, characters = [], 0
        except InputError as error:
            failure = error
        if texts:
            yield texts, stream.state_dict()

    with in_workers(tokenizer.encode_documents, workers) as start:
        started: deque[tuple[Callable[[], Ids], dict[str, Any]]] = deque()
        for texts, state in chunks():
            started.append((start(texts), state))
            if len(started) > PREFETCH * workers:
                yield _finish(*started.popleft())
        while started:
            yield _finish(*started.popleft())
    if failure is not None:
        raise failure


def _finish(wait: Callable[[], Ids], stream_state: dict[str, Any]) -> Chunk:
    ids, lengths = wait()
    return Chunk(ids, lengths, stream_state)


@contextmanager
def in_workers(
    function: Callable[[Argument], Result], workers: int
) -> Iterator[Callable[[Argument], Callable[[], Result]]]:
    """Yield a function that starts a call of `function` in a process, and returns a function that waits for its result.

    Args:
        function: a function of one argument; all three of them can be pickled.
        workers: the number of processes; 0 calls it in this one.

    Raises:
        RunError: from waiting, when a process dies; when one cannot be started.
    """
    if not workers:
        yield lambda argument: partial(function, argument)
        return
    processes: list[_Worker] = []
    threads = ThreadPoolExecutor(workers)  # one for each worker, to wait for it
    try:
        free: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            processes.append(_Worker(function))
            free.put(processes[-1])

        def call(argument: Argument) -> Result:
            worker = free.get()
            try:
                result: Result = worker.call(argument)
                return result
            finally:
                free.put(worker)

        yield lambda argument: threads.submit(call, argument).result
    finally:
        for worker in processes:
            worker.kill()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that calls a function, and the pipe to it."""

    def __init__(self, function: Callable[[Any], Any]):
        try:
            self._pipe, worker_end = multiprocessing.Pipe()
            self._process = multiprocessing.Process(target=_work, args=(worker_end, self._pipe, function), daemon=True)
            self._process.start()
        except OSError as error:
            raise RunError(
                f"a process that encodes text cannot be started: {error.strerror or error}; try fewer --workers"
            ) from None
        worker_end.close()  # only the worker has it now, so that the pipe ends with the worker

    def call(self, argument: Any) -> Any:
        """Call the function, and wait for its result. Raises what the worker raised; RunError when it has died."""
        try:
            self._pipe.send(argument)
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RunError(f"a process that encodes text has died: {_end_of(self._process)}") from None
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self) -> None:
        self._process.kill()  # it holds nothing that would be lost
        self._process.join()


def _end_of(process: multiprocessing.Process) -> str:
    """Return how a process ended, in words."""
    code = process.exitcode or 0
    if code >= 0:
        return f"process {process.pid} ended with exit code {code}"
    hint = "; a system that runs out of memory does that" if code == -KILLED else ""
    return f"process {process.pid} was killed by signal {-code} ({signal.strsignal(-code)}{hint})"


def _work(pipe: Connection, run_end: Connection, function: Callable[[Any], Any]) -> None:
    """Call the function on what comes out of the pipe, until it ends: the body of a worker."""
    run_end.close()  # a forked worker has inherited it, and would wait for itself when the run is killed
    # Ctrl-C, and a SIGTERM for all that belongs to the run, are for the process that trains: it ends its workers. Its
    # own handlers, which a forked worker has inherited, are not for workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    try:
        while True:
            argument = pipe.recv()
            try:
                result: Any = function(argument)
            except Exception as error:  # raised again where the result is taken
                result = error
            pipe.send(result)
    except (EOFError, OSError):  # the run has ended, or was killed
        return
