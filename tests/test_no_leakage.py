"""Pairs that share a row do not see each other, and padding is nobody.

Several pairs are packed into a row, each with its own positions and its own attention. Held here in float64: packed
rows have the loss and the gradients of the same pairs one a row, and of each pair all alone, without a batch or
padding; changing one document leaves the hidden states of its neighbours the same to the bit; and neither the padded
length nor the id that fills it changes a loss. Where documents share a row, the same test shows that attention which
is not kept apart would fail it.
"""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model import Llama
from minift.pack import IGNORE, PADDING, Batch, Example, collate
from minift.train import batch_loss
from tests.conftest import small_model

LENGTHS = [(1, 1), (5, 3), (2, 9), (7, 1), (3, 4), (1, 12), (4, 2)]  # of prompts and answers


def make_examples(lengths: Sequence[tuple[int, int]] = LENGTHS, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    return [Example([1, *ids(prompt - 1)], [*ids(answer - 1), 2]) for prompt, answer in lengths]


def loss_and_gradients(model: Llama, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    nll_sum, n_tokens = batch_loss(model, batch, chunk=5)
    assert int(n_tokens) == batch.n_targets == int((batch.targets != IGNORE).sum())
    return nll_sum.detach(), list(torch.autograd.grad(nll_sum, list(model.parameters())))


def alone(model: Llama, examples: Sequence[Example]) -> tuple[Tensor, list[Tensor]]:
    """Each pair by itself: no row to share, nothing to fill up, PyTorch's own cross-entropy."""
    nll_sum = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logits = model(torch.tensor([example.prompt + example.answer[:-1]]))[0, len(example.prompt) - 1 :]
        nll_sum = nll_sum + F.cross_entropy(logits, torch.tensor(example.answer), reduction="sum")
    return nll_sum.detach(), list(torch.autograd.grad(nll_sum, list(model.parameters())))


def difference(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> float:
    """The largest relative difference, of the loss and of each parameter's gradient by norm."""
    pairs = list(zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True))
    assert all(float(right.norm()) > 0 for _, right in pairs)
    return max(float((our - right).norm() / right.norm()) for our, right in pairs)


def spans(batch: Batch) -> list[tuple[int, slice]]:
    """Where the documents of a batch are: row and columns."""
    found = []
    for b, row in enumerate(batch.document_ids):
        for document in range(int(row.max()) + 1):
            places = (row == document).nonzero()[:, 0].tolist()
            assert places == list(range(places[0], places[-1] + 1))
            found.append((b, slice(places[0], places[-1] + 1)))
    return found


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [13, 16, 24, 64])
def test_packed_pairs_equal_one_a_row_and_each_alone(length: int, kv_heads: int) -> None:
    model = small_model(dtype=torch.float64, num_key_value_heads=kv_heads)
    examples = make_examples()
    packed = collate(examples, pad_id=2, length=length)
    rows = collate(examples, pad_id=2, length=length, pack=False)
    assert packed.isolated
    assert not rows.isolated
    assert len(packed.tokens) < len(rows.tokens) == len(examples)

    expected = alone(model, examples)
    assert difference(loss_and_gradients(model, packed), expected) < 1e-10
    assert difference(loss_and_gradients(model, rows), expected) < 1e-10
    leaking = dataclasses.replace(packed, isolated=False)  # plain causal attention in the same rows
    assert difference(loss_and_gradients(model, leaking), expected) > 1e-3


def test_a_row_of_one_pair_may_say_so_or_not() -> None:
    """Where no row is shared, attention inside documents and plain causal attention are the same computation."""
    model = small_model(dtype=torch.float64)
    rows = collate(make_examples(), pad_id=2, pack=False)
    said = dataclasses.replace(rows, isolated=True)
    assert difference(loss_and_gradients(model, said), loss_and_gradients(model, rows)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_a_changed_document_changes_no_other(dtype: torch.dtype, kv_heads: int) -> None:
    model = small_model(dtype=dtype, num_key_value_heads=kv_heads)
    batch = collate(make_examples(), pad_id=2, length=40)
    documents = spans(batch)
    assert len(batch.tokens) < len(documents) == len(LENGTHS)
    before = model.hidden(batch.tokens, batch.positions, batch.document_ids)
    leaked = 0
    for changed_row, changed in documents:
        tokens = batch.tokens.clone()
        tokens[changed_row, changed] = (tokens[changed_row, changed] + 31) % 97
        after = model.hidden(tokens, batch.positions, batch.document_ids)
        without = model.hidden(tokens, batch.positions)
        for row, columns in documents:
            same = torch.equal(after[row, columns], before[row, columns])
            assert same == ((row, columns) != (changed_row, changed))
            behind = row == changed_row and columns.start > changed.start
            leaked += behind and not torch.equal(
                without[row, columns], model.hidden(batch.tokens, batch.positions)[row, columns]
            )
    assert leaked > 0  # without document ids, what stands behind the changed document does change


@torch.no_grad()
def test_where_a_document_stands_changes_nothing() -> None:
    """The same pair first in its row, last, or alone has the same hidden states: its positions count from 0."""
    model = small_model(dtype=torch.float64)
    text = make_examples([(4, 8)])[0]
    tokens = torch.tensor(text.prompt + text.answer)[:-1]
    n, T = len(tokens), 40
    expected = model.hidden(tokens[None])[0]
    for start in (0, 1, 13, T - n):
        row = torch.randint(0, 97, (1, T), generator=torch.Generator().manual_seed(start))
        row[0, start : start + n] = tokens
        positions, documents = torch.arange(T)[None].clone(), torch.full((1, T), 5)
        positions[0, start : start + n] = torch.arange(n)
        documents[0, start : start + n] = 6
        documents[0, start + n :] = 7
        hidden = model.hidden(row, positions, documents)[0, start : start + n]
        assert float((hidden - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("length", [None, 12, 13, 29, 64])
@pytest.mark.parametrize("pad_id", [0, 2, 96])
def test_padding_changes_no_loss(pad_id: int, length: int | None, pack: bool) -> None:
    """Nor a gradient; not even where the padding is EOS, which is a target elsewhere in the batch."""
    model = small_model(dtype=torch.float64)
    examples = make_examples()
    batch = collate(examples, pad_id, length, pack)
    padding = batch.document_ids == PADDING
    assert bool((batch.tokens[padding] == pad_id).all())
    assert bool((batch.targets[padding] == IGNORE).all())
    assert int((~padding).sum()) == sum(len(example) for example in examples)
    assert difference(loss_and_gradients(model, batch), alone(model, examples)) < 1e-10


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
def test_the_padding_id_changes_no_bit(pack: bool) -> None:
    model = small_model()
    results = [loss_and_gradients(model, collate(make_examples(), pad_id, 40, pack)) for pad_id in (0, 2, 96)]
    for nll_sum, gradients in results[1:]:
        assert torch.equal(nll_sum, results[0][0])
        assert all(torch.equal(ours, first) for ours, first in zip(gradients, results[0][1], strict=True))
