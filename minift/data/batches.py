"""Batches for ever, and where the next one comes from."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minift.data.encode import encode_documents
from minift.data.stream import DocumentStream, check_settings
from minift.errors import InputError
from minift.pack import IGNORE, Batch, Example, collate
from minift.tokenizer.base import Tokenizer


class PairBatches:
    """Micro-batches of pairs, for ever: every epoch has each example once, in an order drawn from the seed.

    The order of an epoch is a function of (seed, epoch) alone, so the whole state is two integers. The last batch of
    an epoch may be smaller; `len()` is the number of batches in an epoch.

    Args:
        batch_size: examples in a batch of all ranks together, `world` times that of one.
        rank, world: which of how many processes this is: it gets every `world`-th example of each batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_id: int,
        seed: int,
        pack: bool = True,
        rank: int = 0,
        world: int = 1,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.pack = pack
        self.rank, self.world = rank, world
        self.epoch = 0
        self.position = 0  # batches of this epoch that have been given out

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            order = self._order()
            while self.position < len(self):
                chosen = order[self.position * self.batch_size :][: self.batch_size]
                self.position += 1
                mine = chosen[self.rank :: self.world]
                yield collate([self.examples[i] for i in mine], self.pad_id, pack=self.pack)
            self.epoch, self.position = self.epoch + 1, 0

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.examples), generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, and of what."""
        return {"epoch": self.epoch, "position": self.position, "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when `state` was taken.

        Raises:
            InputError: when the pairs or a setting are others now; it says which.
        """
        check_settings(state["settings"], self._settings)
        self.epoch, self.position = state["epoch"], state["position"]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        ids = hashlib.sha256()
        for example in self.examples:
            ids.update(array("q", [len(example.prompt), *example.prompt, *example.answer]).tobytes())
        return {
            "data": f"{len(self.examples)} pairs, checksum {ids.hexdigest()[:16]}",
            "seed": self.seed,
            "pack": self.pack,
            "batch_size": self.batch_size,
        }


class PageBatches:
    """Micro-batches of pages: the documents one behind the other, each as BOS … EOS, cut into full rows.

    Rows follow each other without a gap: a row's last target is the next row's first token, so that every id of the
    corpus is a target once (but the very first). What does not fill a batch at the end of the stream is left over.

    Isolated, each document has its own positions and attention, as if it stood alone, and the first token of a document
    is nobody's target. The part of a document behind a row's end then starts anew.

    The rows are a function of the stream alone. `workers` processes encode texts, and what they give back is put into
    the order in which it was handed out. All ranks encode all documents and each takes its rows of every batch: where
    a row begins depends on how long all documents before it are, and text is encoded much faster than it is learned.

    Args:
        batch_size: rows in a batch of all ranks together, `world` times that of one.
        length: tokens of a row.
        isolate: keep the documents of a row apart.
        workers: processes that encode; 0 does it in this one.
        rank, world: which of how many processes this is.

    Raises:
        InputError: when `world` does not divide `batch_size`, or a batch is larger than any memory; from iterating,
            what the stream raises.
        RunError: from iterating, when a worker dies.
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: Tokenizer,
        batch_size: int,
        length: int,
        isolate: bool = False,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size % world:
            raise InputError(f"batch_size {batch_size} is not a multiple of the {world} processes that share it")
        if batch_size * length >= 2**31:  # or a stream without an end would be read until memory is full
            raise InputError(f"batch_size {batch_size} by max_length {length} is a batch larger than any memory")
        self.stream = stream
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.length = length
        self.isolate = isolate
        self.workers = workers
        self.rank, self.world = rank, world
        self._ids = np.empty(0, np.int32)  # ids that wait for their row …
        self._firsts = np.empty(0, np.bool_)  # … and which of them are the first of a document
        self._place = stream.state_dict()  # behind the last document of those
        self._settings = {
            "batch_size": batch_size,
            "max_length": length,
            "isolate": isolate,
            "tokenizer": hashlib.sha256(b"".join(dict(tokenizer.files).values())).hexdigest()[:16],
        }

    def __iter__(self) -> Iterator[Batch]:
        self.stream.load_state_dict(self._place)  # it may have been read on, for workers that had nothing to do
        size = self.batch_size * self.length
        chunks = encode_documents(self.stream, self.tokenizer, self.workers)
        while True:
            while len(self._ids) > size:
                batch = self._batch(self._rows(self._ids), self._rows(self._firsts))
                self._ids, self._firsts = self._ids[size:], self._firsts[size:]
                yield batch
            chunk = next(chunks, None)
            if chunk is None:
                return
            firsts = np.zeros(len(chunk.ids), np.bool_)
            firsts[np.cumsum(chunk.lengths) - chunk.lengths] = True
            self._ids = np.concatenate((self._ids, chunk.ids))
            self._firsts = np.concatenate((self._firsts, firsts))
            self._place = chunk.place

    def _rows(self, values: "np.ndarray[Any, Any]") -> Tensor:
        """[B, T + 1]: this rank's rows of the next batch, each with the first token of the row behind it."""
        B, T = self.batch_size // self.world, self.length
        mine = torch.from_numpy(values[self.rank * B * T : (self.rank + 1) * B * T + 1])
        return mine.unfold(0, T + 1, T)

    def _batch(self, ids: Tensor, firsts: Tensor) -> Batch:
        tokens, targets = ids[:, :-1].long(), ids[:, 1:].long()
        places = torch.arange(self.length).expand(tokens.shape)
        if not self.isolate:
            return Batch(tokens, targets, places, torch.zeros_like(tokens), isolated=False, n_targets=targets.numel())
        starts = firsts[:, :-1].clone()
        starts[:, 0] = True  # what began in the row before begins here for a second time
        document_ids = starts.cumsum(1) - 1
        positions = places - torch.where(starts, places, 0).cummax(1).values
        targets[firsts[:, 1:]] = IGNORE
        n_targets = int((targets != IGNORE).sum())
        return Batch(tokens, targets, positions, document_ids, bool(document_ids.any()), n_targets)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from: the stream's place, and the ids of the half-filled rows."""
        return {
            "settings": self._settings,
            "stream": self._place,
            "ids": torch.from_numpy(self._ids.copy()),
            "firsts": torch.from_numpy(self._firsts.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when `state` was taken, whatever the number of workers and ranks.

        Raises:
            InputError: when the files, the tokenizer or a setting are others now; it says which.
        """
        check_settings(state["settings"], self._settings)
        self.stream.load_state_dict(state["stream"])
        self._place = state["stream"]
        self._ids, self._firsts = state["ids"].numpy(), state["firsts"].numpy()
