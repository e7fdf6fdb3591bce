"""The promise of `pack.py`: only what should be learned is a target, and every target is the id that comes next.

Batches are rebuilt by plain loops from the ids of each example; a prompt's position is shown to have no influence by
its gradient, which is zero to the bit; the loss of a batch is the same for every padding and packing.
"""

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from minift.data.batches import PageBatches, PairBatches
from minift.data.examples import encode_conversations
from minift.data.stream import DocumentStream
from minift.data.templates import TEMPLATES
from minift.errors import InputError
from minift.loss import next_token_loss
from minift.model import Llama
from minift.pack import IGNORE, PADDING, Batch, Example, collate
from minift.prompts import Pair
from minift.tokenizer.base import Tokenizer
from tests.helpers import encode_pair, small_model, texts_of, write_jsonl

PAIRS = [
    Pair("What is the capital of Mexico?", "Mexico City"),
    Pair("What does <s> mean, and what </s>?", "<s> begins a text. </s> ends it."),
    Pair("Name a fruit.", "Apple.", context="It is red."),
    Pair("Q", "A"),
    Pair("A question that is a good deal longer than all of the others, twice over?", "Yes."),
    Pair("Count.", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"),
]
IDS = 97  # the vocabulary of `small_model`


def made_up(seed: int, count: int = 7) -> list[Example]:
    """Return examples of random ids and many lengths, for the small model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    return [
        Example([1, *draw(3, IDS, p)], [*draw(3, IDS, a), 2])
        for p, a in zip(draw(0, 9, count), draw(1, 12, count), strict=True)
    ]


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model(dtype=torch.float64)


@torch.no_grad()
def loss_of(model: Llama, batch: Batch) -> float:
    hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids if batch.isolated else None)
    return float(next_token_loss(hidden, model.head_weight, batch.targets))


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (tokens, targets, positions) of each document of a batch, by its document ids."""
    documents: dict[tuple[int, int], tuple[list[int], list[int], list[int]]] = {}
    for b, row in enumerate(batch.document_ids.tolist()):
        for t, document in enumerate(row):
            if document == PADDING:
                assert batch.targets[b, t] == IGNORE
                continue
            parts = documents.setdefault((b, document), ([], [], []))
            for part, tensor in zip(parts, (batch.tokens, batch.targets, batch.positions), strict=True):
                part.append(int(tensor[b, t]))
    return list(documents.values())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("length", [None, 300])
def test_targets_are_the_tokens_shifted_by_one(
    tokenizer: Tokenizer, template: str, pack: bool, length: int | None
) -> None:
    examples, dropped = encode_conversations(PAIRS, TEMPLATES[template], tokenizer, max_length=200)
    batch = collate(examples, tokenizer.eos_id, length, pack)
    assert dropped == 0
    expected = []
    for pair in PAIRS:
        prompt, answer = texts_of(TEMPLATES[template], pair)
        prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode_continuation(answer, eos=True)
        text = prompt_ids + answer_ids
        tokens, targets = [], []
        for here, following in pairwise(range(len(text))):
            tokens.append(text[here])
            targets.append(text[following] if following >= len(prompt_ids) else IGNORE)
        expected.append((tokens, targets, list(range(len(tokens)))))
    assert sorted(rows_of(batch)) == sorted(expected)
    assert batch.n_targets == int((batch.targets != IGNORE).sum()) > 0
    shapes = {tensor.shape for tensor in (batch.tokens, batch.targets, batch.positions, batch.document_ids)}
    dtypes = {tensor.dtype for tensor in (batch.tokens, batch.targets, batch.positions, batch.document_ids)}
    assert len(shapes) == 1
    assert dtypes == {torch.int64}


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_document_has_one_bos_and_one_eos(tokenizer: Tokenizer, template: str) -> None:
    examples, _ = encode_conversations(PAIRS, TEMPLATES[template], tokenizer, max_length=200)
    batch = collate(examples, pad_id=tokenizer.eos_id)
    documents = rows_of(batch)
    assert len(documents) == len(PAIRS)
    for tokens, targets, positions in documents:
        assert tokens[0] == tokenizer.bos_id
        assert tokens.count(tokenizer.bos_id) == 1
        assert tokenizer.bos_id not in targets
        assert tokenizer.eos_id not in tokens  # the last id is a target only
        assert targets[-1] == tokenizer.eos_id
        assert targets.count(tokenizer.eos_id) == 1
        assert positions[0] == 0


def test_eos_is_a_target_even_where_it_is_also_the_padding(tokenizer: Tokenizer) -> None:
    examples, _ = encode_conversations(PAIRS, TEMPLATES["plain"], tokenizer, max_length=200)
    batch = collate(examples, pad_id=tokenizer.eos_id, pack=False)
    padding = batch.document_ids == PADDING
    assert padding.any()
    assert (batch.tokens[padding] == tokenizer.eos_id).all()
    assert (batch.targets[padding] == IGNORE).all()
    assert int((batch.targets == tokenizer.eos_id).sum()) == len(PAIRS)
    other = collate(examples, pad_id=5, pack=False)
    assert torch.equal(batch.targets, other.targets)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_prompt_target_is_exactly_zero(pack: bool, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    batch = collate(made_up(seed=0), pad_id=2, pack=pack)
    hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids if batch.isolated else None)
    hidden = hidden.detach().requires_grad_()
    next_token_loss(hidden, model.head_weight.detach(), batch.targets).backward()
    assert hidden.grad is not None
    masked = batch.targets == IGNORE
    assert (hidden.grad[masked] == 0).all()
    assert (hidden.grad[~masked].abs().amax(-1) > 0).all()
    # The same through PyTorch's own loss over all logits: no gradient where there is no target.
    logits = (hidden.detach() @ model.head_weight.T.detach()).requires_grad_()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().amax(-1) > 0, hidden.grad.abs().amax(-1) > 0)


def test_a_prompt_is_context_but_not_target(model: Llama) -> None:
    """Other prompt ids change the loss through attention alone: without attention they change nothing."""
    examples = [Example([1, 10, 20, 30, 40], [50, 2])]
    others = [Example([1, 11, 21, 31, 40], [50, 2])]
    assert loss_of(model, collate(examples, 2)) != loss_of(model, collate(others, 2))
    blind = small_model(dtype=torch.float64)
    for layer in blind.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert loss_of(blind, collate(examples, 2)) == pytest.approx(loss_of(blind, collate(others, 2)), 1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_the_padded_length_and_the_packing_change_no_loss(model: Llama, seed: int) -> None:
    examples = made_up(seed)
    alone = sum(loss_of(model, collate([example], pad_id=2, length=len(example))) for example in examples)
    layouts = [collate(examples, 2), collate(examples, 2, pack=False), collate(examples[::-1], 2)]
    layouts += [
        collate(examples, pad_id, length, pack) for pad_id in (2, 77) for length in (24, 64) for pack in (True, False)
    ]
    assert len({batch.tokens.shape for batch in layouts}) >= 4
    assert any(batch.isolated for batch in layouts)
    for batch in layouts:
        assert loss_of(model, batch) == pytest.approx(alone, rel=1e-12)
        assert batch.n_targets == sum(len(example.answer) for example in examples)


def test_what_stands_in_the_padding_changes_no_loss(model: Llama) -> None:
    batch = collate(made_up(seed=1), pad_id=2, length=64)
    before = loss_of(model, batch)
    padding = batch.document_ids == PADDING
    batch.tokens[padding] = torch.randint(0, IDS, (int(padding.sum()),))
    assert loss_of(model, batch) == pytest.approx(before, rel=1e-13)


def test_packing_puts_examples_together_and_never_past_the_row() -> None:
    examples = made_up(seed=2, count=20)
    batch = collate(examples, pad_id=2)
    assert batch.isolated
    assert batch.tokens.shape[0] < len(examples)
    assert batch.tokens.shape[1] % 8 == 0
    assert len(rows_of(batch)) == len(examples)


def of_length(length: int) -> Example:
    """Return an example that takes so many positions."""
    return Example([1, *range(3, length + 1)], [5, 2])


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([20, 40, 24, 30, 34], [[40, 24], [34, 30], [20]]),  # the longest first, and a row may be filled exactly
        ([33, 32, 32], [[33], [32, 32]]),
        ([10, 50, 4, 45, 9, 10], [[50, 10, 4], [45, 10, 9]]),
    ],
)
def test_each_example_is_put_into_the_first_row_with_room(lengths: list[int], rows: list[list[int]]) -> None:
    batch = collate([of_length(length) for length in lengths], pad_id=2, length=64)
    found = [[int((row == document).sum()) for document in range(int(row.max()) + 1)] for row in batch.document_ids]
    assert found == rows
    assert batch.isolated == any(len(row) > 1 for row in rows)


@pytest.mark.parametrize(
    ("longest", "alone", "packed"), [(2, 8, 64), (8, 8, 64), (9, 16, 64), (64, 64, 64), (65, 72, 128), (200, 200, 256)]
)
def test_rows_are_as_long_as_the_longest_example_rounded_up(longest: int, alone: int, packed: int) -> None:
    examples = [of_length(2), of_length(longest)]
    assert collate(examples, pad_id=2, pack=False).tokens.shape == (2, alone)
    assert collate(examples, pad_id=2).tokens.shape[1] == packed


@pytest.mark.parametrize("pack", [True, False])
def test_no_example_is_a_row_of_padding(pack: bool) -> None:
    """The share of a rank in a batch with fewer examples than ranks."""
    batch = collate([], pad_id=2, pack=pack)
    assert batch.tokens.shape == (1, 64 if pack else 8)
    assert (batch.tokens == 2).all()
    assert (batch.targets == IGNORE).all()
    assert (batch.document_ids == PADDING).all()
    assert (batch.n_targets, batch.isolated) == (0, False)


@pytest.mark.parametrize("max_length", range(6, 24))
def test_a_pair_too_long_keeps_what_fits(tokenizer: Tokenizer, max_length: int) -> None:
    pair, template = PAIRS[5], TEMPLATES["plain"]
    prompt = tokenizer.encode("Count.")
    answer = tokenizer.encode_continuation(" 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", eos=True)
    assert len(prompt) <= 6
    assert len(prompt) + len(answer) > 24
    example = encode_pair(pair, template, tokenizer, max_length)
    assert example is not None
    # `max_length` positions predict `max_length + 1 - len(prompt)` ids of the answer.
    assert example.prompt == prompt
    assert example.answer == answer[: max_length + 1 - len(prompt)]
    assert len(example) == max_length
    batch = collate([example], pad_id=2, length=max_length)
    assert batch.tokens[0].tolist() == (prompt + answer)[:max_length]
    assert batch.targets[0].tolist()[len(prompt) - 1 :] == answer[: max_length + 1 - len(prompt)]


def test_a_pair_that_just_fits_keeps_its_eos(tokenizer: Tokenizer) -> None:
    whole = encode_pair(PAIRS[0], TEMPLATES["plain"], tokenizer, 200)
    assert whole is not None
    assert encode_pair(PAIRS[0], TEMPLATES["plain"], tokenizer, len(whole)) == whole
    cut = encode_pair(PAIRS[0], TEMPLATES["plain"], tokenizer, len(whole) - 1)
    assert cut is not None
    assert (whole.answer[-1], cut.answer) == (tokenizer.eos_id, whole.answer[:-1])


def test_a_pair_without_a_target_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(pair.question)) for pair in PAIRS[:2] + PAIRS[3:]]
    pairs = PAIRS[:2] + PAIRS[3:]
    for limit in sorted(lengths):
        if limit == min(lengths):
            continue
        examples, dropped = encode_conversations(pairs, TEMPLATES["plain"], tokenizer, max_length=limit - 1)
        assert dropped == sum(length > limit - 1 for length in lengths) > 0
        assert len(examples) == len(pairs) - dropped
        assert all(example.answer for example in examples)


def test_no_pair_left_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="max_length 2"):
        encode_conversations(PAIRS[:1], TEMPLATES["plain"], tokenizer, max_length=2)


# Pages ----------------------------------------------------------------------------------------------------------------

TEXTS = ["One page.", "Another page, somewhat longer than the first.", "x", "Third\npage. \U0001f642", "The last page."]


def pages(folder: Path, tokenizer: Tokenizer, epochs: int | None = 3) -> PageBatches:
    file = folder / "pages.jsonl"
    if not file.exists():
        write_jsonl(file, [{"text": text} for text in TEXTS])
    return PageBatches(DocumentStream([file], epochs=epochs), tokenizer, batch_size=2, length=13)


def test_rows_of_pages_reproduce_the_token_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = []
    for text in TEXTS * 3:
        ids += [tokenizer.bos_id, *tokenizer.encode(text, bos=False), tokenizer.eos_id]
    batches = list(pages(tmp_path, tokenizer))
    tokens = [id for batch in batches for id in batch.tokens.flatten().tolist()]
    targets = [id for batch in batches for id in batch.targets.flatten().tolist()]
    assert tokens == ids[: len(tokens)]
    assert targets == ids[1 : len(tokens) + 1]  # every id but the first is a target, exactly once
    assert 0 <= len(ids) - 1 - len(targets) < 2 * 13
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == batch.positions.shape == batch.document_ids.shape == (2, 13)
        assert batch.n_targets == int((batch.targets != IGNORE).sum()) == 26
        assert batch.positions.tolist() == [list(range(13))] * 2
        assert not batch.isolated
        assert (batch.document_ids != PADDING).all()


def test_pages_resume_at_every_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = [batch.tokens.tolist() for batch in islice(pages(tmp_path, tokenizer, epochs=None), 12)]
    assert len({str(rows) for rows in whole}) > 6
    for taken in range(12):
        first = pages(tmp_path, tokenizer, epochs=None)
        before = [batch.tokens.tolist() for batch in islice(first, taken)]
        resumed = pages(tmp_path, tokenizer, epochs=None)
        resumed.load_state_dict(first.state_dict())
        assert before + [batch.tokens.tolist() for batch in islice(resumed, 12 - taken)] == whole


# Pairs ----------------------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Example]:
    """Return examples; example i is the only one whose answer begins with the id 100 + i."""
    return [Example([1, 5, 6], [100 + i, 2]) for i in range(count)]


def numbers(batch: Batch) -> list[int]:
    return (batch.targets[batch.targets >= 100] - 100).tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (9, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_each_example_once(count: int, batch_size: int, pack: bool) -> None:
    batches = PairBatches(numbered(count), batch_size, pad_id=2, seed=0, pack=pack)
    assert len(batches) == (count + batch_size - 1) // batch_size
    stream = iter(batches)
    for _ in range(3):
        epoch = [numbers(batch) for batch in islice(stream, len(batches))]
        assert Counter(number for group in epoch for number in group) == Counter(range(count))
        assert [len(group) for group in epoch[:-1]] == [batch_size] * (len(batches) - 1)


def epochs_of(seed: int, count: int) -> list[list[int]]:
    stream = iter(PairBatches(numbered(40), 1, pad_id=2, seed=seed))
    return [[numbers(batch)[0] for batch in islice(stream, 40)] for _ in range(count)]


def test_the_order_is_another_one_each_epoch_and_each_seed_and_the_same_for_a_seed() -> None:
    orders = epochs_of(seed=0, count=3) + epochs_of(seed=1, count=3)
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(40)) not in orders
    assert epochs_of(seed=0, count=3) == orders[:3]


def test_the_order_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = epochs_of(seed=0, count=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert epochs_of(seed=0, count=1) == first


@pytest.mark.parametrize("taken", range(13))
def test_pairs_resume_at_every_batch(taken: int) -> None:
    def batches() -> PairBatches:
        return PairBatches(numbered(10), 3, pad_id=2, seed=4)  # 4 batches in an epoch

    whole = [numbers(batch) for batch in islice(batches(), 13)]
    first = batches()
    before = [numbers(batch) for batch in islice(first, taken)]
    resumed = batches()
    resumed.load_state_dict(dict(first.state_dict()))
    assert before + [numbers(batch) for batch in islice(resumed, 13 - taken)] == whole
