"""Pairs that share a row do not see each other, nor do pages where they are isolated, and padding is in no document.

Several pairs are packed into a row, each with its own positions and its own attention. Held here in float64: packed
rows have the loss and the gradients of the same pairs one a row, and of each pair all alone, without a batch or
padding; changing one document leaves the hidden states of its neighbours the same to the bit; and neither the padded
length nor the id that fills it changes a loss. Where documents share a row, the same test shows that attention which
is not kept apart would fail it.

For rows of pages there is more: a changed page leaves every bit of its neighbours' gradients the same, in float32 and
bfloat16. All of it holds for the plain modules and for those that a run installs on a CPU, and what is exact in float64
is so for both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minift.config import FINETUNE
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.kernels import choose, with_kernels
from minift.model import Llama
from minift.pack import IGNORE, PADDING, Batch, Example, collate
from minift.tokenizer.base import Tokenizer
from minift.train import Objective
from tests.helpers import small_model, write_jsonl

FIELDS = ("tokens", "targets", "positions", "document_ids")
LENGTHS = [(1, 1), (5, 3), (2, 9), (7, 1), (3, 4), (1, 12), (4, 2)]  # of prompts and answers
Names = tuple[str, ...]
CPU = {
    dtype: choose(FINETUNE.replace(dtype=dtype, compile=False), torch.device("cpu"))
    for dtype in ("float32", "bfloat16")
}
exact = pytest.mark.parametrize("names", [(), CPU["float32"]], ids=["plain", "kernels"])
every = pytest.mark.parametrize("names", [(), *CPU.values()], ids=["plain", "kernels", "kernels of bfloat16"])


def make_examples(lengths: Sequence[tuple[int, int]] = LENGTHS, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    return [Example([1, *ids(prompt - 1)], [*ids(answer - 1), 2]) for prompt, answer in lengths]


def loss_and_gradients(model: Llama, batch: Batch, names: Names = ()) -> tuple[Tensor, list[Tensor]]:
    nll_sum = with_kernels(Objective(model, 5), names)(batch)
    assert batch.n_targets == int((batch.targets != IGNORE).sum())
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


@exact
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [13, 16, 24, 64])
def test_packed_pairs_equal_one_a_row_and_each_alone(length: int, kv_heads: int, names: Names) -> None:
    model = small_model(dtype=torch.float64, num_key_value_heads=kv_heads)
    examples = make_examples()
    packed = collate(examples, pad_id=2, length=length)
    rows = collate(examples, pad_id=2, length=length, pack=False)
    assert packed.isolated
    assert not rows.isolated
    assert len(packed.tokens) < len(rows.tokens) == len(examples)

    expected = alone(with_kernels(model, names), examples)
    assert difference(loss_and_gradients(model, packed, names), expected) < 1e-10
    assert difference(loss_and_gradients(model, rows, names), expected) < 1e-10
    leaking = dataclasses.replace(packed, isolated=False)  # plain causal attention in the same rows
    assert difference(loss_and_gradients(model, leaking, names), expected) > 1e-3


@exact
def test_a_row_of_one_pair_may_say_so_or_not(names: Names) -> None:
    """Where no row is shared, attention inside documents and plain causal attention are the same computation."""
    model = small_model(dtype=torch.float64)
    rows = collate(make_examples(), pad_id=2, pack=False)
    said = dataclasses.replace(rows, isolated=True)
    assert difference(loss_and_gradients(model, said, names), loss_and_gradients(model, rows, names)) < 1e-12


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_a_changed_document_changes_no_other(dtype: torch.dtype, kv_heads: int, names: Names) -> None:
    model = with_kernels(small_model(dtype=dtype, num_key_value_heads=kv_heads), names)
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
            after_it = row == changed_row and columns.start > changed.start
            leaked += after_it and not torch.equal(
                without[row, columns], model.hidden(batch.tokens, batch.positions)[row, columns]
            )
    assert leaked > 0  # without document ids, what comes after the changed document does change


@exact
@torch.no_grad()
def test_where_a_document_is_changes_nothing(names: Names) -> None:
    """The same pair first in its row, last, or alone has the same hidden states: its positions count from 0."""
    model = with_kernels(small_model(dtype=torch.float64), names)
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


@exact
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("length", [None, 12, 13, 29, 64])
@pytest.mark.parametrize("pad_id", [0, 2, 96])
def test_padding_changes_no_loss(pad_id: int, length: int | None, pack: bool, names: Names) -> None:
    """Nor a gradient; not even where the padding is EOS, which is a target elsewhere in the batch."""
    model = small_model(dtype=torch.float64)
    examples = make_examples()
    batch = collate(examples, pad_id, length, pack)
    padding = batch.document_ids == PADDING
    assert bool((batch.tokens[padding] == pad_id).all())
    assert bool((batch.targets[padding] == IGNORE).all())
    assert int((~padding).sum()) == sum(len(example) for example in examples)
    assert difference(loss_and_gradients(model, batch, names), alone(with_kernels(model, names), examples)) < 1e-10


@every
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
def test_the_padding_id_changes_no_bit(pack: bool, names: Names) -> None:
    model = small_model()
    results = [loss_and_gradients(model, collate(make_examples(), pad_id, 40, pack), names) for pad_id in (0, 2, 96)]
    for nll_sum, gradients in results[1:]:
        assert torch.equal(nll_sum, results[0][0])
        assert all(torch.equal(ours, first) for ours, first in zip(gradients, results[0][1], strict=True))


# Rows of pages --------------------------------------------------------------------------------------------------------


PAGE_LENGTHS = [9, 3, 30, 2, 14, 1, 6, 41, 5, 8, 12, 1, 1, 20, 7]  # ids of documents, without their BOS and EOS


class Letters(Tokenizer):
    """Each letter is an id."""

    vocab_size, bos_id, eos_id = 97, 1, 2
    files: Mapping[str, bytes] = {"tokenizer.model": b"letters"}

    def _piece(self, id: int) -> str:
        return chr(id + 500)

    def _ids(self, text: str, special: bool) -> list[int]:
        return [ord(letter) - 500 for letter in text]

    def _text(self, ids: list[int]) -> str:
        return "".join(self.pieces(ids))


def page_batches(
    folder: Path, length: int = 16, batch_size: int = 3, isolate: bool = True
) -> tuple[list[Batch], list[list[int]]]:
    """Rows of documents of random ids, and those documents, each with its BOS and EOS."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in PAGE_LENGTHS]
    file = write_jsonl(folder / "pages.jsonl", [{"text": "".join(chr(id + 500) for id in page)} for page in ids])
    stream = DocumentStream([file], epochs=1)
    return list(PageBatches(stream, Letters(), batch_size, length, isolate)), [[1, *page, 2] for page in ids]


def parts_of(pages: list[list[int]], length: int, rows: int) -> list[list[tuple[list[int], list[int]]]]:
    """What each row holds: the parts of documents, as (tokens, targets). A part has no target beyond its page."""
    found: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(rows)]
    place = 0
    for page in pages:
        for i in range(len(page)):
            row = (place + i) // length
            if row >= rows:
                return found
            if i == 0 or (place + i) % length == 0:
                found[row].append(([], []))
            found[row][-1][0].append(page[i])
            found[row][-1][1].append(page[i + 1] if i + 1 < len(page) else IGNORE)
        place += len(page)
    return found


@exact
@pytest.mark.parametrize("length", [7, 16, 33])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_isolated_pages_have_the_loss_and_gradients_of_each_part_alone(
    tmp_path: Path, length: int, kv_heads: int, names: Names
) -> None:
    model = small_model(dtype=torch.float64, num_key_value_heads=kv_heads)
    by_itself = with_kernels(model, names)
    batches, pages = page_batches(tmp_path, length, batch_size=2)
    parts = parts_of(pages, length, 2 * len(batches))
    assert len(batches) >= 2
    for k, batch in enumerate(batches):
        nll_sum = torch.zeros((), dtype=torch.float64)
        for tokens, targets in chain(*parts[2 * k : 2 * k + 2]):
            logits = by_itself(torch.tensor([tokens]))[0]
            nll_sum = nll_sum + F.cross_entropy(logits, torch.tensor(targets), reduction="sum", ignore_index=IGNORE)
        expected = nll_sum.detach(), list(torch.autograd.grad(nll_sum, list(model.parameters())))
        assert difference(loss_and_gradients(model, batch, names), expected) < 1e-10
        if batch.isolated:
            leaking = dataclasses.replace(batch, isolated=False)
            assert difference(loss_and_gradients(model, leaking, names), expected) > 1e-3
    assert any(batch.isolated for batch in batches)


@pytest.mark.parametrize("length", [2, 7, 16, 33])
def test_isolated_rows_are_built_of_the_parts(tmp_path: Path, length: int) -> None:
    """Positions count from 0 in each part, and the first token of a document is no target."""
    batches, pages = page_batches(tmp_path, length)
    rows = [row for batch in batches for row in zip(*(getattr(batch, name) for name in FIELDS), strict=True)]
    parts = parts_of(pages, length, len(rows))
    for (tokens, targets, positions, document_ids), row in zip(rows, parts, strict=True):
        assert tokens.tolist() == [id for part, _ in row for id in part]
        assert targets.tolist() == [id for _, part in row for id in part]
        assert positions.tolist() == [i for part, _ in row for i in range(len(part))]
        assert document_ids.tolist() == [n for n, (part, _) in enumerate(row) for _ in part]
        assert 1 not in targets
        assert (targets[:-1][tokens[1:] == 1] == IGNORE).all()
        assert (targets[tokens == 2] == IGNORE).all()
    for batch in batches:
        assert batch.isolated == any(int(row.max()) > 0 for row in batch.document_ids)
        assert batch.n_targets == int((batch.targets != IGNORE).sum())


def test_rows_that_are_not_isolated_do_leak(tmp_path: Path) -> None:
    """And every id but the first is a target: what comes before it is its context, whatever document that is of."""
    model = small_model(dtype=torch.float64)
    batches, pages = page_batches(tmp_path, isolate=False)
    assert not any(batch.isolated for batch in batches)
    ids = [*chain(*pages)]
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == ids[1:][: 3 * 16 * len(batches)]
    tokens = batches[0].tokens.clone()
    tokens[0, 1] += 1
    before, after = (model.hidden(rows, batches[0].positions) for rows in (batches[0].tokens, tokens))
    assert not torch.equal(before[0, 12:], after[0, 12:])  # another document
    assert torch.equal(before[1:], after[1:])


@every
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_changed_document_changes_no_bit_of_its_neighbour(
    tmp_path: Path, precision: str, kv_heads: int, names: Names
) -> None:
    """B's logits, and the gradients of B's loss: of every weight, of its embeddings, and of A's, which are zero."""
    model = small_model(num_key_value_heads=kv_heads)
    if precision == "bfloat16":
        model = model.bfloat16()
    objective = with_kernels(Objective(model), names)
    model = objective.model
    batch = page_batches(tmp_path, length=60, batch_size=2)[0][0]
    ids = batch.document_ids[0].tolist()
    assert len(set(ids)) >= 4
    captured: list[Tensor] = []

    def capture(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())  # cut off from the table, which has a gradient of its own
        return captured[-1] + 0 * output

    def run(tokens: Tensor, document: int, document_ids: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        mine = torch.tensor([number == document for number in ids])
        targets = torch.where(mine, batch.targets[0], IGNORE)[None]
        captured.clear()
        handle = model.embed_tokens.register_forward_hook(capture)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            hidden = model.hidden(tokens, batch.positions[:1], document_ids)
            logits = F.linear(hidden, model.head_weight)[0, mine]
            nll_sum = objective.loss(hidden, model.head_weight, targets)
        handle.remove()
        parameters = list(model.parameters())
        *gradients, embedded = torch.autograd.grad(nll_sum, [*parameters, captured[0]])
        return logits.detach(), gradients, embedded[0]

    leaked = 0
    for document in sorted(set(ids)):
        if not (batch.targets[0, torch.tensor(ids) == document] != IGNORE).any():
            continue
        columns = torch.tensor(ids) == document
        before = run(batch.tokens[:1], document, batch.document_ids[:1])
        assert float(before[2][columns].abs().sum()) > 0
        assert (before[2][~columns] == 0).all()
        for other in sorted(set(ids) - {document}):
            tokens = batch.tokens[:1].clone()
            changed = torch.tensor(ids) == other
            tokens[0, changed] = (tokens[0, changed] + 31) % 97
            after = run(tokens, document, batch.document_ids[:1])
            assert torch.equal(after[0], before[0])
            assert all(torch.equal(ours, first) for ours, first in zip(after[1], before[1], strict=True))
            assert torch.equal(after[2], before[2])
            if other < document:
                open_rows = [run(rows, document, None) for rows in (batch.tokens[:1], tokens)]
                leaked += not torch.equal(open_rows[0][0], open_rows[1][0]) and (open_rows[0][2][changed] != 0).any()
    assert leaked >= 3
