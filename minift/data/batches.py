"""Examples, or the ids of pages → batches, without end; and the position of the next one, for a checkpoint.

Legend: B rows of a batch, T tokens of a row.

Both kinds are functions of the seed and the data alone: whatever the number of workers and ranks, and wherever a run
was interrupted, the same batches come in the same order.
"""

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
    """Micro-batches of pairs, without end: every epoch has each example once, in an order drawn from the seed.

    The order of an epoch is a function of (seed, epoch) alone, so the whole state is two integers. The last batch of
    an epoch may be smaller. `len()` is the number of batches in an epoch.

    Args:
        examples: the pairs as ids.
        batch_size: examples in a batch of all ranks together, `world` times that of one.
        pad_id: any valid id; it changes no loss.
        seed: of the order.
        pack: put several short examples into a row, or one into each.
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
        self.position = 0  # batches of this epoch that have been yielded

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
        """Return the position of the next batch, and what it depends on."""
        return {"epoch": self.epoch, "position": self.position, "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when `state` was taken.

        Raises:
            InputError: when the pairs or a setting have changed; it names what differs.
        """
        check_settings(state["settings"], self._settings)
        self.epoch, self.position = state["epoch"], state["position"]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        ids = hashlib.sha256()
        for example in self.examples:
            given = [place for span in example.given for place in span]
            ids.update(array("q", [len(example.prompt), *example.prompt, *example.answer, *given]).tobytes())
        return {
            "data": f"{len(self.examples)} pairs, checksum {ids.hexdigest()[:16]}",
            "seed": self.seed,
            "pack": self.pack,
            "batch_size": self.batch_size,
        }


class PageBatches:
    """Micro-batches of pages: the documents one after the other, each from BOS (if added) to EOS, cut into full rows.

    Rows follow each other without a gap: a row's last target is the next row's first token, so every id of the corpus
    but the very first is a target once. The rest at the end of the stream, which does not fill a batch, is left over.

        documents    <s> a b </s> <s> c d e </s> …
        row 1        <s> a b </s>                 targets   a b </s> <s>
        row 2        <s> c d e                    targets   c d e </s>

    With `isolate`, each document has its own positions and attention, as if it were alone in the row, and its first
    token is not a target (nothing before it could predict it). Where a row ends inside a document, the next row begins
    with the rest of it as a document of its own.

    The rows depend on the stream alone. All ranks encode all documents, and each takes its rows of every batch: a row
    begins where the documents before it end, so their lengths must be known, and encoding is much faster than training.

    Args:
        stream: the documents.
        tokenizer: encodes them.
        batch_size: rows in a batch of all ranks together, `world` times that of one.
        length: tokens of a row.
        isolate: keep the documents of a row apart.
        workers: processes that encode; 0 does it in this one.
        rank, world: which of how many processes this is.

    Raises:
        InputError: when `world` does not divide `batch_size`, or a batch is larger than any memory; from iterating, as
            the stream does.
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
        self._ids = np.empty(0, np.int32)  # ids that have not been yielded yet …
        self._firsts = np.empty(0, np.bool_)  # … and True for those that begin a document
        self._stream_state = stream.state_dict()  # after the last document of those
        self._settings = {
            "batch_size": batch_size,
            "max_length": length,
            "isolate": isolate,
            "tokenizer": hashlib.sha256(b"".join(dict(tokenizer.files).values())).hexdigest()[:16],
        }

    def __iter__(self) -> Iterator[Batch]:
        self.stream.load_state_dict(self._stream_state)  # an earlier iterator may have read ahead for its workers
        size = self.batch_size * self.length
        chunks = encode_documents(self.stream, self.tokenizer, self.workers)
        while True:
            while len(self._ids) > size:  # the last target is the id after the batch
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
            self._stream_state = chunk.stream_state

    def _rows(self, values: "np.ndarray[Any, Any]") -> Tensor:
        """Return this rank's rows of the next batch, each with the first value of the row after it: [B, T + 1]."""
        B, T = self.batch_size // self.world, self.length
        mine = torch.from_numpy(values[self.rank * B * T : (self.rank + 1) * B * T + 1])
        return mine.unfold(0, T + 1, T)

    def _batch(self, ids: Tensor, firsts: Tensor) -> Batch:
        tokens, targets = ids[:, :-1].long(), ids[:, 1:].long()  # the shift: [B, T] each
        columns = torch.arange(self.length).expand(tokens.shape)
        if not self.isolate:
            return Batch(tokens, targets, columns, torch.zeros_like(tokens), isolated=False, n_targets=targets.numel())
        starts = firsts[:, :-1].clone()
        starts[:, 0] = True  # the rest of a document that began in the row before is a document of its own
        document_ids = starts.cumsum(1) - 1
        positions = columns - torch.where(starts, columns, 0).cummax(1).values  # since the document's start
        targets[firsts[:, 1:]] = IGNORE
        n_targets = int((targets != IGNORE).sum())
        return Batch(tokens, targets, positions, document_ids, bool(document_ids.any()), n_targets)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch: that of the stream, and the ids that have not been yielded yet."""
        return {
            "settings": self._settings,
            "stream": self._stream_state,
            "ids": torch.from_numpy(self._ids.copy()),
            "firsts": torch.from_numpy(self._firsts.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when `state` was taken, whatever the number of workers and ranks.

        Raises:
            InputError: when the files, the tokenizer or a setting have changed; it names what differs.
        """
        check_settings(state["settings"], self._settings)
        self.stream.load_state_dict(state["stream"])
        self._stream_state = state["stream"]
        self._ids, self._firsts = state["ids"].numpy(), state["firsts"].numpy()
