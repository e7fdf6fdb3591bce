"""Documents → ids, by several processes, in one order.

Encoding is most of the work of a data pipeline, so it can be given to worker processes. But a corpus that is dealt out
to workers who each read their share has an order that depends on how many they are, and a place in it that is hard to
save. Here one process reads, and workers only encode what they are handed: one order, one place, any number of workers.

    for chunk in encode_documents(DocumentStream(["data/pages"], epochs=1), tokenizer, workers=2):
        print(chunk.ids, chunk.lengths)

Read next: `pack.py`.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from minift.data.stream import DocumentStream
from minift.errors import InputError, RunError
from minift.tokenizer.base import Tokenizer

CHUNK_CHARACTERS = 2**16  # that are encoded in one go: a task of some ten milliseconds
PREFETCH = 8  # chunks that each worker is given ahead, so that it never waits for this process


@dataclass(frozen=True)
class Chunk:
    """Some documents as ids.

    Attributes:
        ids: int32 [sum of lengths], each document with its BOS and EOS.
        lengths: int64 [documents].
        place: the state of the stream behind the last of them.
    """

    ids: "np.ndarray[Any, Any]"
    lengths: "np.ndarray[Any, Any]"
    place: dict[str, Any]


def encode_documents(stream: DocumentStream, tokenizer: Tokenizer, workers: int = 0) -> Iterator[Chunk]:
    """The documents of a stream as ids, in its order, encoded by `workers` processes (0: by this one).

    This process reads the files: that is a small part of the work, and so there is one order and one place in it.
    Chunks of texts are handed to the workers of a `DataLoader` in turns, as the "indices" that it fetches, and it gives
    back the results in the same order. It asks for some chunks ahead; an error of the stream is kept until all chunks
    before it have been given out.

    Raises:
        RunError: when a worker dies.
    """
    places: deque[dict[str, Any]] = deque()
    failure: list[InputError] = []

    def chunks() -> Iterator[list[str]]:
        texts: list[str] = []
        characters = 0
        try:
            for text in stream:
                texts.append(text)
                characters += len(text)
                if characters >= CHUNK_CHARACTERS:
                    places.append(stream.state_dict())
                    yield texts
                    texts, characters = [], 0
        except InputError as error:
            failure.append(error)
        if texts:
            places.append(stream.state_dict())
            yield texts

    loader: DataLoader[Any] = DataLoader(
        _Encoder(tokenizer),  # type: ignore[arg-type]
        batch_size=None,
        sampler=chunks(),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # nothing is drawn from it but numbers that nobody uses
    )
    with _Results(loader) as results:
        while (result := results.next()) is not None:
            ids, lengths = result
            yield Chunk(ids, lengths, places.popleft())
    if failure:
        raise failure[0]


class _Results:
    """What the workers give back, and a patient way to hear of their death.

    torch raises an error the moment a worker dies, wherever the program is just then: in the middle of an optimizer's
    step, or of a save. Here it is heard only when results are asked for.
    """

    def __init__(self, loader: "DataLoader[Any]"):
        self._results: Iterator[Any] | None = iter(loader)
        self._raises: Any = None
        self._asking = False
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            self._raises = signal.getsignal(signal.SIGCHLD)  # torch's handler
            signal.signal(signal.SIGCHLD, self._heard)

    def __enter__(self) -> "_Results":
        return self

    def __exit__(self, *error: object) -> None:
        self._results = None  # ends the workers
        if self._raises is not None:
            signal.signal(signal.SIGCHLD, self._raises)

    def next(self) -> Any:
        """The next result; None when there is no more. Raises RunError when a worker has died."""
        assert self._results is not None
        self._asking = True
        try:
            self._heard(signal.SIGCHLD, None)  # what was not heard meanwhile
            return next(self._results, None)
        except RuntimeError as error:
            raise RunError(f"a process that encodes text has died: {str(error).splitlines()[0]}") from None
        finally:
            self._asking = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._asking and callable(self._raises):
            self._raises(number, frame)


class _Encoder:
    """What a worker does: texts to ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __getitem__(self, texts: list[str]) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
        return self.tokenizer.encode_documents(texts)


def _as_it_is(result: Any) -> Any:
    return result


def _start_worker(parent: int, worker: int) -> None:
    # Ctrl-C, and a SIGTERM for all that belongs to the run, are for the process that trains: it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed, be it before this was called: nobody would take its results."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
