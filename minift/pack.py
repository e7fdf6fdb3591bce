"""Conversations → `Batch`: rows of token ids with their targets. Where targets are shifted and prompts masked.

Legend: B rows of a batch, T tokens of a row.

The next-token objective asks at every position for the id that comes next. So a text of n ids makes n - 1 training
positions, and the targets are the same ids moved one to the left:

    text      <s>  What  is  …  ?   Mexico  City  </s>
    tokens    <s>  What  is  …  ?   Mexico  City
    targets    ·    ·    ·   ·  Mexico  City  </s>            (· is IGNORE: the prompt is given, not learned)

Only answers are targets, and their ends: a model that is never trained to say EOS never stops. The mask comes from
construction (what is given and what is learned are encoded apart), never from searching for a marker. Padding is masked
by its position, never by its id, because the padding id is usually EOS itself.

Several short texts share a row, each isolated from the others: its positions start at 0, and its attention stays inside
its own `document_ids`. The loss is the same as with one pair a row, with far less padding. Pages are packed in
`data/batches.py`: one after the other, and, as is usual in pretraining, each sees those before it in its row.

Read next: `model.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minift.prompts import Conversation, Span, Template, has_answer
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

        tokens, targets, positions, ids = map(move, (self.tokens, self.targets, self.positions, self.document_ids))
        return Batch(tokens, targets, positions, ids, self.isolated, self.n_targets)


def places_with_target(targets: Tensor, n_targets: int | None = None) -> Tensor:
    """Return where a flattened batch has targets, int64 [N]. To count them on a GPU would be to wait for it."""
    learned = targets.flatten() != IGNORE
    return torch.nonzero_static(learned, size=int(learned.sum()) if n_targets is None else n_targets)[:, 0]


@dataclass(frozen=True)
class Example:
    """A conversation as ids, up to the last one that is learned.

    Attributes:
        prompt: all ids before the first that is learned, BOS among them if any.
        answer: the first id that is learned, and all after it.
        given: the parts of `answer` that are not learned (later questions), as pairs of places: from, up to.
        cut: whether ids that should be learned did not fit. (Then the answer has no end.)
    """

    prompt: list[int]
    answer: list[int]
    given: tuple[tuple[int, int], ...] = ()
    cut: bool = False

    def __len__(self) -> int:
        """Return the positions that the example takes in a row: all ids but the last, which is a target only."""
        return len(self.prompt) + len(self.answer) - 1

    @property
    def n_targets(self) -> int:
        """The number of ids that are learned."""
        return len(self.answer) - sum(end - start for start, end in self.given)


def encode_spans(spans: Sequence[Span], tokenizer: Tokenizer, max_length: int) -> Example | None:
    """Encode the spans of a text, each apart, and cut them to `max_length` positions, which have one id more.

    Return None for a text without a target: nothing is learned, or what is given alone fills `max_length`.
    """
    encoded = encode_each(spans, tokenizer)
    ids = [id for part in encoded for id in part]
    learned = [span.learned for span, part in zip(spans, encoded, strict=True) for _ in part]
    cut = any(learned[max_length + 1 :])
    learned = [False, *learned[1 : max_length + 1]]  # nothing comes before the first id, which could predict it
    if True not in learned:
        return None
    first, end = learned.index(True), len(learned) - learned[::-1].index(True)
    edges = [place for place in range(first + 1, end) if learned[place] != learned[place - 1]]
    given = tuple((start - first, stop - first) for start, stop in zip(edges[::2], edges[1::2], strict=True))
    return Example(ids[:first], ids[first:end], given, cut)


def encode_each(spans: Sequence[Span], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of each span, encoded apart. What a model is given in use is encoded as it was in training."""
    ids, after = list[list[int]](), ""  # what the template wrote last
    for place, span in enumerate(spans):
        if place == 0 or span.bos:
            ids.append(tokenizer.encode(span.parts, span.bos, span.eos))
        else:
            ids.append(tokenizer.encode_continuation(span.parts, span.eos, after=after))
        after = span.parts[-1] if len(span.parts) % 2 else ""
    return ids


def encode_prompt(spans: Sequence[Span], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of what a model is given (`Template.prompt`)."""
    return [id for ids in encode_each(spans, tokenizer) for id in ids]


def encode_conversation(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, max_length: int, learn: str = "all"
) -> list[Example | None]:
    """Return the examples of a conversation, of all its answers or only the "last"; None for each without a target."""
    if not has_answer(conversation):
        return [None]
    return [encode_spans(spans, tokenizer, max_length) for spans in template.examples(conversation, learn)]


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
            for first, last in example.given:
                targets[b, first_target + first : first_target + last] = IGNORE
            positions[b, start:end] = np.arange(len(example))
            document_ids[b, start:end] = document
            start = end
    isolated, n_targets = any(len(row) > 1 for row in rows), sum(example.n_targets for example in examples)
    tensor = torch.from_numpy
    return Batch(tensor(tokens), tensor(targets), tensor(positions), tensor(document_ids), isolated, n_targets)


def _first_fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put each example, longest first, into the first row of `length` positions that has room for it."""
    rows, room = list[list[Example]](), list[int]()  # room: the free positions of each row
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
