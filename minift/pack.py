"""Documents and pairs → `Batch`: rows of token ids with their targets. The one place where targets are shifted.

Legend: B rows of a batch, T tokens of a row.

The next-token objective asks at every position for the id that comes next. So a text of n ids makes n - 1 training
positions, and the targets are the same ids moved one to the left:

    text      <s>  What  is  …  ?   Mexico  City  </s>
    tokens    <s>  What  is  …  ?   Mexico  City
    targets    ·    ·    ·   ·  Mexico  City  </s>            (· is IGNORE: the prompt is given, not learned)

For a pair only the answer is a target, and its end: a model that is never trained to say EOS never stops. The mask
comes from construction (the prompt's ids and the answer's are encoded apart), never from searching for a marker, and
padding is masked by position, never by its id, because the padding id is usually EOS itself.

Several short pairs share a row, each isolated from the others: its positions start at 0 and its attention stays inside
its own `document_ids`. That computes the same loss as one pair a row, with far less padding. Pages are packed one
behind the other and, as is usual in pretraining, see each other, unless they are to be isolated, too.

Read next: `model.py`.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minift.data.encode import encode_documents
from minift.data.stream import DocumentStream, check_settings
from minift.errors import InputError
from minift.prompts import Pair, Template
from minift.tokenizer.base import Tokenizer

IGNORE = -100  # the target of a position that is not to be learned; the value PyTorch's cross-entropy skips
PADDING = -1  # the document id of a position that belongs to no document


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All tensors are int64 [B, T].

    Attributes:
        tokens: the ids that the model reads.
        targets: `targets[b, t]` is the id that should follow `tokens[b, t]`, or IGNORE. Nothing shifts again.
        positions: place of each token in its document, for RoPE.
        document_ids: which document of the row a token belongs to; PADDING where none.
        isolated: whether attention must be kept inside documents. False when plain causal attention is already
            right: one document a row, padding behind it.
        n_targets: how many targets are not IGNORE.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    document_ids: Tensor
    isolated: bool
    n_targets: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; copies to a GPU run while the CPU goes on."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                # Expanded tensors share memory between rows, which pinning cannot copy.
                return tensor.contiguous().pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return Batch(
            move(self.tokens),
            move(self.targets),
            move(self.positions),
            move(self.document_ids),
            self.isolated,
            self.n_targets,
        )


@dataclass(frozen=True)
class Example:
    """A pair as ids: the prompt with its one BOS, the answer with its EOS (unless that was cut off)."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Positions that the example takes in a row: its last id is a target only."""
        return len(self.prompt) + len(self.answer) - 1


def encode_pair(pair: Pair, template: Template, tokenizer: Tokenizer, max_length: int) -> Example | None:
    """A pair as ids, cut to `max_length` positions. An answer that does not fit keeps as much as fits.

    Returns:
        The example, or None if there is no target: the answer is empty, or the prompt alone fills `max_length`.
    """
    if not pair.answer.strip():
        return None
    prompt_text, answer_text = template.format(pair)
    if not prompt_text:  # nothing is asked: the text is encoded as a page is, from its beginning
        ids = tokenizer.encode(answer_text, bos=True, eos=True, special=False)[: max_length + 1]
        return Example(ids[:1], ids[1:])
    prompt = tokenizer.encode(prompt_text, bos=True)
    answer = tokenizer.encode_continuation(answer_text, eos=True, special=False)[: max(0, max_length + 1 - len(prompt))]
    return Example(prompt, answer) if answer else None


def encode_pairs(
    pairs: Iterable[Pair], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """All pairs as ids, and the number of those dropped because they have no target.

    Raises:
        InputError: when none is left.
    """
    encoded = [encode_pair(pair, template, tokenizer, max_length) for pair in pairs]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise InputError(f"no pair has a target within max_length {max_length}; raise it")
    return examples, len(encoded) - len(examples)


def collate(examples: Sequence[Example], pad_id: int, length: int | None = None, pack: bool = True) -> Batch:
    """One batch of all `examples`.

    Args:
        pad_id: any valid id; what it is changes nothing.
        length: T of the rows; by default that of the longest example, rounded up to a multiple of 8 (fast kernels
            work on aligned rows), or of 64 where rows are filled (what is left over is used, and kernels that are made
            for a shape, which take memory, are made for few). It changes no loss.
        pack: put several short examples in a row (isolated), or one in each.
    """
    multiple = 64 if pack else 8
    T = length or -(-max(map(len, examples), default=1) // multiple) * multiple
    rows = _first_fit(examples, T) if pack else [[example] for example in examples]
    rows = rows or [[]]  # no example at all: a rank's share of a small batch
    B = len(rows)
    # In numpy, which takes a small piece of a row in a quarter of a tensor's time.
    tokens = np.full((B, T), pad_id)
    targets = np.full((B, T), IGNORE)
    positions = np.zeros((B, T), np.int64)
    document_ids = np.full((B, T), PADDING)
    for b, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            ids = np.array(example.prompt + example.answer)
            end = start + len(example)
            tokens[b, start:end] = ids[:-1]
            # The shift: the position that reads the prompt's last id is the first to have a target.
            targets[b, start + len(example.prompt) - 1 : end] = ids[len(example.prompt) :]
            positions[b, start:end] = np.arange(len(example))
            document_ids[b, start:end] = document
            start = end
    isolated = any(len(row) > 1 for row in rows)
    n_targets = sum(len(example.answer) for example in examples)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(document_ids),
        isolated,
        n_targets,
    )


def _first_fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put each example, longest first, into the first row with room for it."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        for index, free in enumerate(room):
            if len(example) <= free:
                rows[index].append(example)
                room[index] -= len(example)
                break
        else:
            rows.append([example])
            room.append(length - len(example))
    return rows


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
