"""Documents → ids, by several processes, in one order.

Encoding is most of the work of a data pipeline, so it can be given to worker processes. But a corpus that is dealt out
to workers who each read their share has an order that depends on how many they are, and a place in it that is hard to
save. Here one process reads, and workers only encode what they are handed: one order, one place, any number of workers.

    for chunk in encode_documents(DocumentStream(["data/pages"], epochs=1), tokenizer, workers=2):
        print(chunk.ids, chunk.lengths)

Read next: `pack.py`.
"""

import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from minift.errors import InputError, RunError
from minift.stream import DocumentStream
from minift.tokenizer import Tokenizer

CHUNK_CHARACTERS = 2**16  # that are encoded in one go: a worker's task of some milliseconds


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
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # nothing is drawn from it but numbers that nobody uses
    )
    results = iter(loader)
    while True:
        try:
            ids, lengths = next(results)
        except StopIteration:
            break
        except RuntimeError as error:
            raise RunError(f"a process that encodes text has died: {str(error).splitlines()[0]}") from None
        yield Chunk(ids, lengths, places.popleft())
    if failure:
        raise failure[0]


class _Encoder:
    """What a worker does: texts to ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __getitem__(self, texts: list[str]) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
        documents = self.tokenizer.encode_documents(texts)
        lengths = np.array([len(ids) for ids in documents])
        return np.concatenate([np.array(ids, np.int32) for ids in documents]), lengths


def _as_it_is(result: Any) -> Any:
    return result


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains; it ends its workers
