"""The next-token X-ray: what the loss sees at every position of a text, number by number.

A training step asks a model, at each position, how likely the token is that comes next. Averaged, the answers are one
number, the loss; here they stand side by side, made by the functions that train: for each position the token that is
read, the one that follows, its probability, its rank among all ids, its *nll* (the negative logarithm of that
probability: the surprise, in nats), and whether it is learned at all. Of a question and its answer, only the answer is:
the model is surprised by the question, too, but that surprise weighs nothing.

Beside it stands what the step pulls on, the gradient at the logits: softmax − one-hot. Its entry for the right token is
its probability less 1, so its logit is pushed up, the more the less it was expected; each other entry is that token's
probability, and is pushed down by as much. They sum to zero. (The step's gradient is this over the number of targets.)

    minift explain "The capital of France is Paris." --model bundled
    minift explain "What is the capital of Mexico?" --answer "Mexico City" --model bundled --html xray.html

Source of the closed form: Goodfellow et al., "Deep Learning" (2016), section 6.2.2.3. Read next: `look/report.py`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minift.config import TrainConfig
from minift.errors import InputError
from minift.loss import batch_hidden, batch_states, loss_in_detail
from minift.model import Llama
from minift.pack import IGNORE, PADDING, Batch, Example, collate
from minift.runs.machine import autocast, choose_dtype, choose_written_out
from minift.tokenizer.base import Tokenizer

LARGEST = 5  # entries that are listed of a distribution, and of a gradient


@dataclass(frozen=True)
class Entry:
    """One id of the vocabulary, and its value: a probability, or a gradient."""

    id: int
    value: float


@dataclass(frozen=True)
class Position:
    """One position of a batch.

    Attributes:
        row, place: where it stands: row of the batch, and place in that row.
        document: which document of the row; positions and attention start anew with each.
        position: place in its document, for RoPE.
        token: the id that is read.
        next: the id that follows it in its document.
        learned: whether `next` is a target. The loss weight of the position is 1, or else 0.
        nll: −log p(next), in nats.
        rank: 1 if no id is likelier than `next`.
        likeliest: the ids with the highest probabilities, in falling order.
        gradient: the largest entries of softmax − one-hot by size; empty where nothing is learned.
    """

    row: int
    place: int
    document: int
    position: int
    token: int
    next: int
    learned: bool
    nll: float
    rank: int
    likeliest: tuple[Entry, ...]
    gradient: tuple[Entry, ...]

    @property
    def probability(self) -> float:
        """Of `next`."""
        return math.exp(-self.nll)


@dataclass(frozen=True)
class XRay:
    """All positions of a batch, without padding.

    Attributes:
        positions: in reading order.
        loss: mean nll of the targets, in nats: what `train.train_step` reports for this batch, to the bit on a CPU.
        n_targets: how many positions are learned.
        dtype: of the arithmetic.
        texts: of every id that occurs in `positions`; of one that stands for no text of its own, its name.
    """

    positions: list[Position]
    loss: float
    n_targets: int
    dtype: str
    texts: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "texts": {str(id): text for id, text in self.texts.items()}}


def explain(
    model: Llama, tokenizer: Tokenizer, examples: Sequence[Example], config: TrainConfig, pack: bool = True
) -> XRay:
    """Look at one micro-batch of all `examples` as a training step does.

    Args:
        examples: pairs or texts as ids (`pack.encode_pair`).
        config: its `dtype` and `loss_chunk` count.
        pack: put several short examples in a row, as `minift finetune` does.

    Raises:
        InputError: when an id or a row does not fit the model.
    """
    pad_id, device = model.config.eos_token_ids[0], model.device
    batch = collate(examples, pad_id, pack=pack).to(device)
    # The same rows, with every token a target but the first: what would be asked if nothing were masked.
    texts = [example.prompt + example.answer for example in examples]
    everything = collate([Example(ids[:1], ids[1:]) for ids in texts], pad_id, pack=pack).to(device)
    longest, room = max(map(len, examples)), model.config.max_position_embeddings
    if longest > room:
        raise InputError(f"{longest} tokens are more than the model's {room} positions")
    asked = torch.where(batch.targets == IGNORE, everything.targets, IGNORE)  # the prompts: of weight 0

    with torch.no_grad(), autocast(model, config), _as_trained(model, config):
        learned = _look(*batch_states(model, batch), model.head_weight, config.loss_chunk, gradients=True)
        given = _look(batch_hidden(model, batch), asked, model.head_weight, config.loss_chunk, gradients=False)
    positions = list(_positions(batch, everything.targets, learned, given))
    nll_sum = learned.nll.sum()  # the step's own sum: in its dtype, of the same numbers in the same order
    return XRay(
        positions,
        float(nll_sum) / batch.n_targets,
        batch.n_targets,
        choose_dtype(config, device),
        _texts(tokenizer, positions),
    )


@dataclass(frozen=True)
class _Found:
    """Of some positions: their nll [n], the ranks of their targets, the likeliest ids, the largest gradient entries."""

    nll: Tensor
    ranks: list[int]
    likeliest: list[tuple[Entry, ...]]
    gradients: list[tuple[Entry, ...]]


@contextmanager
def _as_trained(model: Llama, config: TrainConfig) -> Iterator[None]:
    """The layers as a run of this config goes through them: other operations would have other last digits."""
    before, model.written_out = model.written_out, choose_written_out(model, config, model.device)
    try:
        yield
    finally:
        model.written_out = before


def _look(hidden: Tensor, targets: Tensor, weight: Tensor, chunk: int, gradients: bool) -> _Found:
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    wanted = targets[targets != IGNORE]
    nll = wanted.new_empty(len(wanted), dtype=exact)
    ranks: list[int] = []
    likeliest: list[tuple[Entry, ...]] = []
    largest: list[tuple[Entry, ...]] = []
    for logits, here, gradient in loss_in_detail(hidden, weight, targets, chunk):
        start, stop = len(ranks), len(ranks) + len(here)
        nll[start:stop], logits = here, logits.to(exact)
        ranks += (1 + (logits > logits.gather(1, wanted[start:stop, None])).sum(1)).tolist()
        likeliest += _entries(logits.softmax(-1), LARGEST, by_size=False)
        largest += _entries(gradient.to(exact), LARGEST, by_size=True) if gradients else [()] * len(here)
    return _Found(nll, ranks, likeliest, largest)


def _entries(values: Tensor, count: int, by_size: bool) -> list[tuple[Entry, ...]]:
    """Of each row of [n, V], the `count` largest values and their ids."""
    ids = (values.abs() if by_size else values).topk(min(count, values.shape[1]), dim=-1).indices
    found = values.gather(1, ids)
    return [
        tuple(Entry(id, value) for id, value in zip(row, of_row, strict=True))
        for row, of_row in zip(ids.tolist(), found.tolist(), strict=True)
    ]


def _positions(batch: Batch, following: Tensor, learned: _Found, given: _Found) -> Iterator[Position]:
    """The positions of a batch in reading order, with what was found of each."""
    found = {True: _in_order(learned), False: _in_order(given)}
    for row, place in (batch.document_ids != PADDING).nonzero().tolist():
        is_learned = int(batch.targets[row, place]) != IGNORE
        nll, rank, likeliest, gradient = next(found[is_learned])
        yield Position(
            row,
            place,
            int(batch.document_ids[row, place]),
            int(batch.positions[row, place]),
            int(batch.tokens[row, place]),
            int(following[row, place]),
            is_learned,
            nll,
            rank,
            likeliest,
            gradient,
        )


def _in_order(found: _Found) -> Iterator[tuple[float, int, tuple[Entry, ...], tuple[Entry, ...]]]:
    return zip(found.nll.tolist(), found.ranks, found.likeliest, found.gradients, strict=True)


def _texts(tokenizer: Tokenizer, positions: Iterable[Position]) -> dict[int, str]:
    ids = {id for at in positions for id in (at.token, at.next, *(e.id for e in (*at.likeliest, *at.gradient)))}
    return {id: _text(tokenizer, id) for id in sorted(ids)}


def _text(tokenizer: Tokenizer, id: int) -> str:
    """What an id adds to a text, or its name: of BOS, of a part of a character, of an id without a piece."""
    if id >= tokenizer.vocab_size:
        return f"<{id}>"
    text = tokenizer.decode_continuation([id])
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.pieces([id])[0]
