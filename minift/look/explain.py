"""Look at what the loss sees at every position of a text, number by number: the next-token X-ray.

Legend: B rows, T tokens of a row, N positions with a target, n of them at a time, D model width, V vocabulary.

A training step asks a model, at each position, how likely the token is that comes next. The mean of the answers is one
number, the loss. Here they are side by side, computed by the functions that train. For each position: the token that is
read, the token that follows, its probability, its rank among all ids, its *nll* (the negative logarithm of that
probability: the surprise, in nats), and whether it is learned. Of a question and its answer, only the answer is
learned: the model is surprised by the question, too, but that surprise has weight 0.

Next to them is the gradient at the logits: softmax − one-hot. Its entry for the right token is the token's probability
less 1, so the step pushes that logit up; the less the token was expected, the more. Each other entry is that token's
probability, and the step pushes that logit down by as much. All entries sum to zero. (A step's gradient is this,
divided by the number of targets.)

    minift explain "The capital of France is Paris." --model bundled
    minift explain "What is the capital of Mexico?" --answer "Mexico City" --model bundled --html xray.html

Source of the closed form: Goodfellow et al., "Deep Learning" (2016), section 6.2.2.3.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minift import kernels
from minift.config import TrainConfig
from minift.errors import InputError
from minift.kernels.cross_entropy import FusedNextTokenLoss
from minift.kernels.targets import TargetsObjective
from minift.loss import NextTokenLoss, nll_and_gradient
from minift.model import Llama
from minift.pack import IGNORE, PADDING, Batch, Example, collate
from minift.runs.machine import choose_dtype
from minift.tokenizer.base import Tokenizer
from minift.train import Objective

LARGEST = 5  # entries shown of a distribution, and of a gradient


@dataclass(frozen=True)
class Entry:
    """One id of the vocabulary, and its value: a probability, or a gradient."""

    id: int
    value: float


@dataclass(frozen=True)
class Position:
    """One position of a batch.

    Attributes:
        row, place: the row of the batch, and the place in that row.
        document: the document of the row, from 0; positions and attention begin again with each.
        position: place in its document, for RoPE.
        token: the id that is read.
        next: the id that follows it in its document.
        learned: whether `next` is a target. If so, the position's weight in the loss is 1, else 0.
        nll: −log p(next), in nats.
        rank: 1 if no id is likelier than `next`.
        likeliest: the ids with the highest probabilities, the highest first.
        gradient: the largest entries of softmax − one-hot by absolute value; empty where nothing is learned.
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
        """Return the probability of `next`."""
        return math.exp(-self.nll)


@dataclass(frozen=True)
class XRay:
    """All positions of a batch, without padding.

    Attributes:
        positions: in reading order.
        loss: the mean nll of the targets, in nats: what `train.train_step` reports for this batch, to the bit on a CPU.
        n_targets: the number of positions that are learned.
        dtype: of the arithmetic.
        texts: the text of every id in `positions`; of an id without a text of its own, its name.
    """

    positions: list[Position]
    loss: float
    n_targets: int
    dtype: str
    texts: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "texts": {str(id): text for id, text in self.texts.items()}}


def explain(
    model: Llama,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    config: TrainConfig,
    pack: bool = True,
    plain: bool = False,
) -> XRay:
    """Return the X-ray of one micro-batch of all `examples`, computed as a training step computes it.

    Args:
        examples: pairs or texts as ids (`pack.encode_pair`).
        config: only its `dtype` and `loss_chunk` are read.
        pack: whether several short examples share a row, as in `minift finetune`.
        plain: whether to compute what a training step with `--plain` computes.

    Raises:
        InputError: when an id or a row does not fit the model.
    """
    longest, limit = max(map(len, examples)), model.config.max_position_embeddings
    if longest > limit:
        raise InputError(f"{longest} tokens are more than the model's {limit} positions")
    pad_id, device = model.config.eos_token_ids[0], model.device
    batch = collate(examples, pad_id, pack=pack).to(device)
    # The same rows, but every token is a target except the first: what would be asked if nothing were masked.
    texts = [example.prompt + example.answer for example in examples]
    unmasked = collate([Example(ids[:1], ids[1:]) for ids in texts], pad_id, pack=pack).to(device)
    given_targets = torch.where(batch.targets == IGNORE, unmasked.targets, IGNORE)  # the prompts', of weight 0

    dtype = choose_dtype(config, device)
    names = () if plain else kernels.choose(config.replace(dtype=dtype), device)
    objective = kernels.with_kernels(Objective(model, config.loss_chunk), names)
    with torch.no_grad(), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        hidden = objective.model.hidden(batch.tokens, batch.positions, batch.documents)
        states = objective.states(batch) if isinstance(objective, TargetsObjective) else (hidden, batch.targets)
        learned = _measure(objective.loss, *states, model.head_weight)
        given = _measure(objective.loss, hidden, given_targets, model.head_weight)
    positions = list(_positions(batch, unmasked.targets, learned, given))
    nll_sum = learned.nll.sum()  # the step's own sum: in its dtype, of the same numbers in the same order
    return XRay(
        positions,
        float(nll_sum) / batch.n_targets,
        batch.n_targets,
        dtype,
        _texts(tokenizer, positions),
    )


@dataclass(frozen=True)
class _Measured:
    """Measurements at N positions: nll [N], and for each the rank, the likeliest ids and the largest gradients."""

    nll: Tensor
    ranks: list[int]
    likeliest: list[tuple[Entry, ...]]
    gradients: list[tuple[Entry, ...]]

    def each(self) -> Iterator[tuple[float, int, tuple[Entry, ...], tuple[Entry, ...]]]:
        """Yield nll, rank, likeliest ids and gradients of each position, in reading order."""
        return zip(self.nll.tolist(), self.ranks, self.likeliest, self.gradients, strict=True)


def _measure(loss: NextTokenLoss, hidden: Tensor, targets: Tensor, weight: Tensor) -> _Measured:
    """Measure the positions that have a target, by the loss's own logits and gradients.

    Args:
        hidden: [B, T, D].
        targets: int64 [B, T], IGNORE where nothing is measured.
        weight: [V, D], the head.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    target_ids = targets[targets != IGNORE]  # [N]
    nll = target_ids.new_empty(len(target_ids), dtype=exact)
    ranks: list[int] = []
    likeliest: list[tuple[Entry, ...]] = []
    gradients: list[tuple[Entry, ...]] = []
    for logits, chunk_nll, gradient in _in_detail(loss, hidden, weight, targets):  # [n, V], [n], [n, V]
        here = slice(len(ranks), len(ranks) + len(chunk_nll))
        logits, nll[here] = logits.to(exact), chunk_nll
        ranks += (1 + (logits > logits.gather(1, target_ids[here, None])).sum(1)).tolist()
        likeliest += _entries(logits.softmax(-1), by_absolute_value=False)
        gradients += _entries(gradient.to(exact), by_absolute_value=True)
    return _Measured(nll, ranks, likeliest, gradients)


def _in_detail(
    loss: NextTokenLoss, hidden: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits [n, V], nll [n] and gradient [n, V] of some positions at a time, as the loss computes them."""
    if isinstance(loss, FusedNextTokenLoss):
        yield from loss.in_detail(hidden, weight, targets)
        return
    states, learned = hidden[targets != IGNORE], targets[targets != IGNORE]
    for start in range(0, len(learned), loss.chunk):
        here = slice(start, start + loss.chunk)
        logits = (states[here] @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        yield logits, *nll_and_gradient(logits, learned[here])


def _entries(values: Tensor, by_absolute_value: bool) -> list[tuple[Entry, ...]]:
    """Return the LARGEST largest values of each row of [n, V], with their ids."""
    size = values.abs() if by_absolute_value else values
    ids = size.topk(min(LARGEST, values.shape[1]), dim=-1).indices
    largest = values.gather(1, ids)
    return [
        tuple(Entry(id, value) for id, value in zip(row_ids, row, strict=True))
        for row_ids, row in zip(ids.tolist(), largest.tolist(), strict=True)
    ]


def _positions(batch: Batch, following: Tensor, learned: _Measured, given: _Measured) -> Iterator[Position]:
    """Yield the positions of a batch in reading order.

    Args:
        following: int64 [B, T], the id that follows each token in its document.
    """
    learned_positions, given_positions = learned.each(), given.each()
    for row, place in (batch.document_ids != PADDING).nonzero().tolist():
        is_learned = int(batch.targets[row, place]) != IGNORE
        nll, rank, likeliest, gradient = next(learned_positions if is_learned else given_positions)
        yield Position(
            row=row,
            place=place,
            document=int(batch.document_ids[row, place]),
            position=int(batch.positions[row, place]),
            token=int(batch.tokens[row, place]),
            next=int(following[row, place]),
            learned=is_learned,
            nll=nll,
            rank=rank,
            likeliest=likeliest,
            gradient=gradient if is_learned else (),
        )


def _texts(tokenizer: Tokenizer, positions: Iterable[Position]) -> dict[int, str]:
    """Return the text of every id that the positions name."""
    ids = {id for at in positions for id in (at.token, at.next, *(e.id for e in (*at.likeliest, *at.gradient)))}
    return {id: _text(tokenizer, id) for id in sorted(ids)}


def _text(tokenizer: Tokenizer, id: int) -> str:
    """Return what an id adds to a text, or its name: of BOS, of a part of a character, of an id without a piece."""
    if id >= tokenizer.vocab_size:
        return f"<{id}>"
    text = tokenizer.decode_continuation([id])
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.pieces([id])[0]
