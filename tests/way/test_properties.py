"""What holds for all data and all settings, tried on random ones.

Every target of the corpus is trained exactly once an epoch; text survives its ids; a model survives its formats; a run
survives its interruptions. The other tests show the same on chosen cases; here `hypothesis` chooses.
"""

import json
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.checkpoint import load_model, save_model
from minift.config import TrainConfig
from minift.data.batches import PageBatches, PairBatches
from minift.data.examples import encode_conversations
from minift.data.stream import DocumentStream
from minift.data.templates import TEMPLATES, template_named
from minift.errors import InputError
from minift.formats.convert import convert
from minift.pack import IGNORE, Batch, Example
from minift.prompts import Pair
from minift.runs.start import start_state
from minift.runs.steps import load_step, save_step
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.train import TrainState, train_step
from tests.helpers import bits, same, small_model, texts_of

pytestmark = pytest.mark.slow
TOKENIZER = load_tokenizer(bundled("base"))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.lists(st.sampled_from(["red", "blue", " ", "\n", "é", "日本", "🙂", "a" * 30, "1,234"]), max_size=20)
TEXT = ANY_TEXT | WORDS.map(" ".join)
DOCUMENT = TEXT.filter(lambda text: bool(text) and not text.isspace())


def random(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


def targets_of(batch: Batch) -> list[int]:
    return batch.targets[batch.targets != IGNORE].tolist()


# Targets --------------------------------------------------------------------------------------------------------------


@random(60)
@given(
    documents=st.lists(DOCUMENT, min_size=1, max_size=25),
    shards=st.integers(1, 4),
    buffer=st.sampled_from([0, 1, 3, 100]),
    rows=st.sampled_from([1, 2, 3]),
    world=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 40),
    isolate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_id_of_the_pages_is_a_target_once_an_epoch(
    documents: list[str], shards: int, buffer: int, rows: int, world: int, length: int, isolate: bool, seed: int
) -> None:
    """But the very first, the tail that fills no batch and, isolated, the first of each document."""
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            lines = [json.dumps({"text": text}) + "\n" for text in documents[shard::shards]]
            (Path(folder) / f"{shard}.jsonl").write_text("".join(lines), encoding="utf-8")

        def stream() -> DocumentStream:
            return DocumentStream([folder], epochs=2, seed=seed, shuffle_buffer=buffer)

        order = list(stream())
        ranks = [PageBatches(stream(), TOKENIZER, rows * world, length, isolate, 0, r, world) for r in range(world)]
        found = [id for parts in zip(*ranks, strict=True) for part in parts for id in targets_of(part)]
    assert Counter(order[: len(documents)]) == Counter(order[len(documents) :]) == Counter(documents)
    ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(text, bos=False, special=False), TOKENIZER.eos_id] for text in order]
    corpus = [(id, i == 0) for document in ids for i, id in enumerate(document)][1:]
    size = rows * world * length
    trained = corpus[: len(corpus) // size * size]
    assert found == [id for id, first in trained if not (isolate and first)]


@random(60)
@given(
    pairs=st.lists(st.tuples(DOCUMENT, TEXT), min_size=1, max_size=20),
    template=st.sampled_from(sorted(TEMPLATES)),
    batch_size=st.integers(1, 8),
    world=st.integers(1, 4),
    max_length=st.integers(1, 80),
    pack=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_id_of_the_answers_is_a_target_once_an_epoch(
    pairs: list[tuple[str, str]], template: str, batch_size: int, world: int, max_length: int, pack: bool, seed: int
) -> None:
    asked = [Pair(question, answer=answer) for question, answer in pairs]
    try:
        examples, dropped = encode_conversations(asked, template_named(template), TOKENIZER, max_length)
    except InputError:  # none of them has a target within so few tokens
        prompts = [texts_of(template_named(template), pair)[0] for pair in asked]
        assert all(len(TOKENIZER.encode(prompt, special=False)) > max_length for prompt in prompts)
        return
    assert len(examples) + dropped == len(pairs)
    assert all(len(example) <= max_length for example in examples)
    ranks = [PairBatches(examples, batch_size, TOKENIZER.eos_id, seed, pack, r, world) for r in range(world)]
    found: list[list[int]] = []
    for _ in range(2):
        epoch = [batch for rank in ranks for batch in islice(rank, len(rank))]
        assert sum(batch.n_targets for batch in epoch) == sum(len(example.answer) for example in examples)
        found.append([id for batch in epoch for id in targets_of(batch)])
    wanted = Counter(id for example in examples for id in example.answer)
    assert Counter(found[0]) == Counter(found[1]) == wanted


# Text -----------------------------------------------------------------------------------------------------------------


@random(400)
@given(text=ANY_TEXT | TEXT, rest=TEXT)
def test_text_survives_its_ids(text: str, rest: str) -> None:
    tokenizer: Tokenizer = TOKENIZER
    assert tokenizer.decode(tokenizer.encode(text, eos=True, special=False)) == text
    assert tokenizer.decode_continuation(tokenizer.encode_continuation(text, special=False)) == text
    both = tokenizer.encode(text, special=False) + tokenizer.encode_continuation(rest, special=False)
    if text:
        assert tokenizer.decode(both) == text + rest


@random(100)
@given(texts=st.lists(TEXT, min_size=1, max_size=12))
def test_many_texts_have_the_ids_of_each(texts: list[str]) -> None:
    ids, lengths = TOKENIZER.encode_documents(texts)
    ends = lengths.cumsum()
    found = [ids[end - n : end].tolist() for end, n in zip(ends, lengths, strict=True)]
    assert found == [TOKENIZER.encode(text, eos=True, special=False) for text in texts]


# Formats --------------------------------------------------------------------------------------------------------------


@random(15)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4), (4, 2), (6, 3)]),
    half_width=st.integers(1, 5),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 40),
    vocabulary=st.integers(4, 60),
    tied=st.booleans(),
    path=st.permutations(["hf", "meta", "llama2c", "native"]),
    seed=st.integers(0, 99),
)
def test_a_model_survives_its_formats(
    heads: tuple[int, int],
    half_width: int,
    layers: int,
    hidden: int,
    vocabulary: int,
    tied: bool,
    path: list[str],
    seed: int,
) -> None:
    shape: dict[str, Any] = {
        "hidden_size": heads[0] * 2 * half_width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    model = small_model(seed, **shape)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "first"
        save_model(place, model)
        for number, format in enumerate(path):
            target = Path(scratch) / f"{number}{'.bin' if format == 'llama2c' else ''}"
            convert(place, target, format)
            place = target
            assert same(bits(load_model(place)), bits(model)), path[: number + 1]


# Runs -----------------------------------------------------------------------------------------------------------------


@random(12)
@given(
    count=st.integers(2, 9),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    pack=st.booleans(),
    cuts=st.lists(st.integers(1, 6), max_size=4),
    seed=st.integers(0, 99),
    checkpointed=st.booleans(),
)
def test_a_run_survives_its_interruptions(
    count: int, batch_size: int, accumulate: int, pack: bool, cuts: list[int], seed: int, checkpointed: bool
) -> None:
    """Saved and loaded at any steps, even twice at the same, it ends with the weights of one that was not."""
    config = TrainConfig(steps=7, dtype="float32", seed=seed, checkpoint_activations=checkpointed)
    examples = [Example([1, 5 + i], [20 + i] * (1 + i % 4) + [2]) for i in range(count)]

    def new() -> TrainState:
        batches = PairBatches(examples, batch_size, pad_id=2, seed=seed, pack=pack)
        return start_state(small_model(seed), batches, config)

    def advance(state: TrainState, until: int) -> None:
        batches = iter(state.batches)
        while state.step < until:
            train_step(state, list(islice(batches, accumulate)), 1e-2, config)
            state.step += 1

    whole, state = new(), new()
    advance(whole, 7)
    with tempfile.TemporaryDirectory() as folder:
        for step in sorted(cuts):
            advance(state, step)
            place = save_step(Path(folder), state, None)
            state = new()
            load_step(place, state)
    advance(state, 7)
    assert same(bits(state.model), bits(whole.model))
    assert state.batches.state_dict() == whole.batches.state_dict()
