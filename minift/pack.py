"""Pairs → `Batch`: rows of token ids with their targets. Where targets are shifted and prompts masked.

Legend: B rows of a batch, T tokens of a row.

The next-token objective asks at every position for the id that comes next. So a text of n ids makes n - 1 training
positions, and the targets are the same ids moved one to the left:

    text      <s>  What  is  …  ?   Mexico  City  </s>
    tokens    <s>  What  is  …  ?   Mexico  City
    targets    ·    ·    ·   ·  Mexico  City  </s>            (· is IGNORE: the prompt is given, not learned)

Of a pair only the answer is a target, and its end: a model that is never trained to say EOS never stops. The mask comes
from construction (the ids of the prompt and of the answer are encoded apart), never from searching for a marker.
Padding is masked by its position, never by its id, because the padding id is usually EOS itself.

Several short pairs share a row, each isolated from the others: its positions start at 0, and its attention stays inside
its own `document_ids`. The loss is the same as with one pair a row, with far less padding. Pages are packed in
`data/batches.py`: one after the other, and, as is usual in pretraining, each sees those before it in its row.

Read next: `model.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
            right: one document a row, padding after it.
        n_targets: how many targets are not IGNORE.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    document_ids: Tensor
    isolated: bool
    n_targets: int

    @property
    def documents(self) -> Tensor | None:
        """The document ids, where attention needs them; None where plain causal attention is right."""
        return self.document_ids if self.isolated else None

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
    """A pair as ids: the prompt, BOS in front of it if any, and the answer up to its EOS (unless that was cut off)."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Return the positions that the example takes in a row: all ids but the last, which is a target only."""
        return len(self.prompt) + len(self.answer) - 1


def encode_pair(pair: Pair, template: Template, tokenizer: Tokenizer, max_length: int) -> Example | None:
    """Encode a pair and cut it to `max_length` positions. An answer that does not fit keeps as much as fits.

    Returns:
        The example, or None if it has no target: the answer is empty, or the prompt alone fills `max_length`.
    """
    if not pair.answer.strip():
        return None
    prompt_parts, answer_parts = template.parts(pair)
    if not any(prompt_parts):  # nothing is asked: the text is encoded as a page is, and only its first id is no target
        ids = tokenizer.encode(answer_parts, bos=True, eos=True)[: max_length + 1]
        return Example(ids[:1], ids[1:])
    prompt = tokenizer.encode(prompt_parts, bos=True)
    answer = tokenizer.encode_continuation(answer_parts, eos=True)
    answer = answer[: max(0, max_length + 1 - len(prompt))]  # n positions have n + 1 ids
    return Example(prompt, answer) if answer else None


def encode_pairs(
    pairs: Iterable[Pair], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Encode all pairs. Return the examples, and how many pairs were dropped because they have no target.

    Raises:
        InputError: when no example is left.
    """
    encoded = [encode_pair(pair, template, tokenizer, max_length) for pair in pairs]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise InputError(f"no pair has a target within max_length {max_length}; raise it")
    return examples, len(encoded) - len(examples)


def collate(examples: Sequence[Example], pad_id: int, length: int | None = None, pack: bool = True) -> Batch:
    """Make one batch of all examples.

    Args:
        pad_id: any valid id; it changes no loss.
        length: T; by default that of the longest example, rounded up: to a multiple of 8, because fast kernels want
            aligned rows, and when packing of 64, so that few shapes occur, for each of which kernels are compiled. It
            changes no loss.
        pack: put several short examples into a row (isolated), or one into each.
    """
    multiple = 64 if pack else 8
    T = length or -(-max(map(len, examples), default=1) // multiple) * multiple
    rows = _first_fit(examples, T) if pack else [[example] for example in examples]
    rows = rows or [[]]  # no example at all: the share of a rank in a small batch
    B = len(rows)
    # Filled in numpy, where a slice costs a quarter of what it costs in torch.
    tokens = np.full((B, T), pad_id)
    targets = np.full((B, T), IGNORE)
    positions = np.zeros((B, T), np.int64)
    document_ids = np.full((B, T), PADDING)
    for b, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            ids = np.array(example.prompt + example.answer)
            first_target = start + len(example.prompt) - 1  # the mask: positions before it keep IGNORE
            end = start + len(example)
            tokens[b, start:end] = ids[:-1]
            targets[b, first_target:end] = example.answer  # the shift: the prompt's last id predicts the answer's first
            positions[b, start:end] = np.arange(len(example))
            document_ids[b, start:end] = document
            start = end
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(document_ids),
        isolated=any(len(row) > 1 for row in rows),
        n_targets=sum(len(example.answer) for example in examples),
    )


def _first_fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put each example, longest first, into the first row of `length` positions that has room for it."""
    rows: list[list[Example]] = []
    room: list[int] = []  # free positions of each row
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
