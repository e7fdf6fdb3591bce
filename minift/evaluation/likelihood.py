"""Score texts by how probable a model finds them: perplexity, bits per byte, next-token accuracy.

Legend: B rows, T tokens of a row, N targets, n of them at a time, D model width, V vocabulary.

*Perplexity* is the exponential of the mean loss per target. *Bits per byte* divides the same loss by the bytes of the
text, so it can also be compared between tokenizers. *Next-token accuracy* is the share of targets that are the model's
top 1. Each is a sum over all texts divided by a sum over all texts, never a mean of means.

    minift evaluate --model bundled --data "data/pages/*.json.gz"
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minift.config import LOSS_CHUNK
from minift.data.stream import DocumentStream
from minift.evaluation.intervals import Score, exponential
from minift.model import Llama
from minift.pack import IGNORE, Example, collate
from minift.tokenizer.base import Tokenizer

WINDOWS = 16  # of documents that share a batch
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of some targets.

    Attributes:
        nll: their summed loss, in nats.
        n_targets: their number.
        n_top1: how many of them are the model's top 1: no other id was likelier.
        n_bytes: the UTF-8 bytes of their text.
    """

    nll: float
    n_targets: int
    n_top1: int
    n_bytes: int = 0

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(
            self.nll + other.nll,
            self.n_targets + other.n_targets,
            self.n_top1 + other.n_top1,
            self.n_bytes + other.n_bytes,
        )


def likelihood_scores(likelihoods: Sequence[Likelihood]) -> dict[str, Score]:
    """Return `perplexity` (per target token), `bits_per_byte` and `next_token_accuracy` of some texts."""
    nll, n_targets = [each.nll for each in likelihoods], [each.n_targets for each in likelihoods]
    return {
        "perplexity": Score(nll, n_targets, exponential),
        "bits_per_byte": Score([x / math.log(2) for x in nll], [each.n_bytes for each in likelihoods]),
        "next_token_accuracy": Score([each.n_top1 for each in likelihoods], n_targets, is_share=True),
    }


@torch.no_grad()
def target_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOSS_CHUNK) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each target, and which of them are the model's top 1.

    Args:
        hidden: [B, T, D], the model's final hidden states.
        weight: [V, D], the head.
        targets: int64 [B, T]; IGNORE where nothing is scored.
        chunk: positions whose logits exist at the same time.

    Returns:
        nll: [N], float32 (float64 for float64 input), in nats, in reading order.
        top1: bool [N].
    """
    scored = targets != IGNORE
    hidden, targets = hidden[scored], targets[scored, None]  # [N, D], [N, 1]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    nll = hidden.new_empty(len(targets), dtype=dtype)
    top1 = torch.empty_like(targets[:, 0], dtype=torch.bool)
    for start in range(0, len(targets), chunk):
        here = slice(start, start + chunk)
        logits = (hidden[here] @ weight.T).to(dtype)  # [n, V]
        target_logits = logits.gather(1, targets[here])[:, 0]  # [n]
        nll[here] = logits.logsumexp(-1) - target_logits
        top1[here] = target_logits >= logits.amax(-1)
    return nll, top1


@torch.no_grad()
def example_likelihoods(model: Llama, examples: Sequence[Example], batch_size: int = 64) -> list[Likelihood]:
    """Return the likelihood of each example's answer after its prompt, without the bytes.

    Examples of similar length share a batch, in rows of their own.
    """
    pad_id = model.config.eos_token_ids[0]
    found: dict[int, Likelihood] = {}
    for group in in_groups(sorted(range(len(examples)), key=lambda i: len(examples[i])), batch_size):
        batch = collate([examples[i] for i in group], pad_id, pack=False).to(model.device)
        hidden = model.hidden(batch.tokens, batch.positions)
        nll, top1 = target_scores(hidden, model.head_weight, batch.targets)
        n_targets = (batch.targets != IGNORE).sum(1).tolist()  # of each row
        for i, row_nll, row_top1 in zip(group, nll.split(n_targets), top1.split(n_targets), strict=True):
            found[i] = Likelihood(float(row_nll.double().sum()), len(row_nll), int(row_top1.sum()))
    return [found[i] for i in range(len(examples))]


def page_likelihoods(
    model: Llama, stream: DocumentStream, tokenizer: Tokenizer, max_length: int
) -> Iterator[Likelihood]:
    """Yield the likelihood of each document of a stream.

    A document longer than `max_length` is cut into windows, and no window sees another one.

    Raises:
        InputError: when the stream holds no text.
    """
    document: Likelihood | None = None
    for group in in_groups(_windows(stream, tokenizer, max_length), WINDOWS):
        likelihoods = example_likelihoods(model, [example for example, _, _ in group])
        for window, (_, n_bytes, is_first) in zip(likelihoods, group, strict=True):
            if is_first and document is not None:
                yield document
                document = None
            window += Likelihood(0.0, 0, 0, n_bytes)
            document = window if document is None else document + window
    if document is not None:
        yield document


def _windows(stream: DocumentStream, tokenizer: Tokenizer, max_length: int) -> Iterator[tuple[Example, int, bool]]:
    """Yield the windows of all documents: ids, bytes, and whether it is the first window of a document.

    The first window has all bytes of the document. Two windows share an id, a target in the first and only read in the
    second: so every id but the first (BOS, where the tokenizer adds it) is a target once.
    """
    for text in stream:
        ids = tokenizer.encode(text, bos=True, eos=True, special=False)
        for start in range(0, len(ids) - 1, max_length):
            window = ids[start : start + max_length + 1]
            is_first = start == 0
            yield Example(window[:1], window[1:]), len(text.encode()) if is_first else 0, is_first


def in_groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield the items in lists of `size`; the last list may be shorter."""
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
