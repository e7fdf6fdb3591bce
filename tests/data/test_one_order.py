"""The promise of `data/`: one order of the data, whatever the number of workers and ranks.

Batches of all ranks are put together, taken apart into documents at BOS, and counted. What was saved at every document
and at every batch is written to a file, read back, and continued by another number of workers and ranks; it has to go
on as if nothing had happened, or be refused by name. Worker processes are killed, and so is the process above them.
"""

import copy
import errno
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minift.cli import main
from minift.data import encode, lines, stream
from minift.data.batches import PageBatches, PairBatches
from minift.data.records import Skipped
from minift.data.stream import DocumentStream, fingerprint
from minift.errors import InputError, RunError
from minift.pack import Batch, Example
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.sentencepiece import train_tokenizer
from tests.helpers import ROOT, SMALL, write_jsonl

WORKERS, WORLDS = (0, 1, 2, 4), (1, 2, 4)
ROWS, LENGTH = 4, 13  # of a global batch
FIELDS = ("tokens", "targets", "positions", "document_ids")


def sentences(count: int) -> list[str]:
    """Return different texts, of a few characters to some hundred."""
    rng = random.Random(count)
    words = ["river", "Mexico", "two", "of", "the", "lake\n", "  wide", "\u00e9t\u00e9", "."]
    return [f"No. {i}" + "".join(" " + rng.choice(words) for _ in range(rng.randrange(30))) for i in range(count)]


def write_shards(folder: Path, texts: Sequence[str], shards: int) -> list[Path]:
    """Write the texts to files of different lengths, every second one gzipped."""
    folder.mkdir(exist_ok=True)
    parts = [[text for i, text in enumerate(texts) if (i * i + i // 3) % shards == shard] for shard in range(shards)]
    names = [f"{shard:02d}" + (".json.gz" if shard % 2 else ".jsonl") for shard in range(shards)]
    return [
        write_jsonl(folder / name, [{"text": text} for text in part]) for name, part in zip(names, parts, strict=True)
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of two or three documents, so that some tens of documents make many chunks."""
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 150)


def whole(parts: Sequence[Batch]) -> dict[str, Any]:
    """Return the ranks' parts of a batch as one batch."""
    result: dict[str, Any] = {field: torch.cat([getattr(part, field) for part in parts]) for field in FIELDS}
    result["n_targets"] = sum(part.n_targets for part in parts)
    result["isolated"] = any(part.isolated for part in parts)
    return result


def same(ours: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> bool:
    """Return True if batches are equal, bitwise."""
    return len(ours) == len(expected) and all(
        our.keys() == right.keys()
        and all(torch.equal(our[field], right[field]) for field in FIELDS)
        and (our["n_targets"], our["isolated"]) == (right["n_targets"], right["isolated"])
        for our, right in zip(ours, expected, strict=True)
    )


def documents_of(batches: Sequence[dict[str, Any]], bos: int) -> list[tuple[int, ...]]:
    """Return the rows one after the other, cut before each BOS; the last document may be cut off."""
    ids = [id for batch in batches for id in batch["tokens"].flatten().tolist()]
    assert ids[0] == bos
    starts = [i for i, id in enumerate(ids) if id == bos]
    return [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


# Every document once --------------------------------------------------------------------------------------------------


TEXTS = sentences(30)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that reads the global batches of a little more than two epochs of TEXTS."""
    folder = tmp_path_factory.mktemp("read")
    ids = sum(len(tokenizer.encode(text, eos=True)) for text in TEXTS)
    count = 2 * ids // (ROWS * LENGTH) + 2

    @cache
    def read(shards: int, workers: int, world: int, seed: int = 0, isolate: bool = False) -> list[dict[str, Any]]:
        files = write_shards(folder / str(shards), TEXTS, shards)
        ranks = [
            PageBatches(
                DocumentStream(files, seed=seed, shuffle_buffer=7),
                tokenizer,
                ROWS,
                LENGTH,
                isolate,
                workers,
                rank,
                world,
            )
            for rank in range(world)
        ]
        return [whole(parts) for parts in zip(*(list(islice(rank, count)) for rank in ranks), strict=True)]

    return read


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.usefixtures("small_chunks")
def test_each_document_is_there_once_an_epoch(
    read: Callable[..., list[dict[str, Any]]], tokenizer: Tokenizer, shards: int, workers: int, world: int
) -> None:
    batches = read(shards, workers, world)
    assert all(batch["tokens"].shape == (ROWS, LENGTH) for batch in batches)
    documents = documents_of(batches, tokenizer.bos_id)
    expected = Counter(tuple(tokenizer.encode(text, eos=True)) for text in TEXTS)
    first, second = documents[: len(TEXTS)], documents[len(TEXTS) : 2 * len(TEXTS)]
    assert Counter(first) == Counter(second) == expected
    assert first != second
    assert same(batches, read(shards, 0, 1))  # batch k is batch k


@pytest.mark.parametrize(("workers", "world"), [(0, 2), (0, 4), (2, 1), (1, 2)])
@pytest.mark.usefixtures("small_chunks")
def test_isolated_batches_are_the_same_for_all_workers_and_ranks(
    read: Callable[..., list[dict[str, Any]]], workers: int, world: int
) -> None:
    assert same(read(3, workers, world, isolate=True), read(3, 0, 1, isolate=True))


@pytest.mark.usefixtures("small_chunks")
def test_the_order_follows_from_the_seed(read: Callable[..., list[dict[str, Any]]], tokenizer: Tokenizer) -> None:
    orders = [documents_of(read(3, 0, 1, seed), tokenizer.bos_id) for seed in range(4)]
    assert len({tuple(order[: len(TEXTS)]) for order in orders}) == 4
    read.cache_clear()  # type: ignore[attr-defined]
    assert documents_of(read(3, 0, 1, 2), tokenizer.bos_id) == orders[2]
    assert documents_of(read(3, 2, 1, 3), tokenizer.bos_id) == orders[3]


@pytest.mark.parametrize("characters", [1, 40, 10**6])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_size_of_the_chunks_changes_no_row(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, characters: int, workers: int
) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 3)

    def read(size: int, workers: int) -> list[dict[str, Any]]:
        monkeypatch.setattr(encode, "CHUNK_CHARACTERS", size)
        documents = DocumentStream(files, epochs=2, shuffle_buffer=5)
        return [whole([batch]) for batch in PageBatches(documents, tokenizer, ROWS, LENGTH, workers=workers)]

    assert same(read(characters, workers), read(150, 0))


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 1)
    with pytest.raises(InputError, match="batch_size 4 is not a multiple of the 3 processes"):
        PageBatches(DocumentStream(files), tokenizer, 4, LENGTH, world=3)


# The shuffle buffer ---------------------------------------------------------------------------------------------------


def numbered(folder: Path, shards: Sequence[int], name: str = "n") -> list[Path]:
    """Write shards of that many documents: the numbers from 0 on, in the order of the files."""
    folder.mkdir(exist_ok=True)
    files, start = [], 0
    for shard, count in enumerate(shards):
        texts = [{"text": str(i)} for i in range(start, start + count)]
        files.append(write_jsonl(folder / f"{name}{shard:03d}.jsonl", texts))
        start += count
    return files


def order_of(files: list[Path], seed: int, buffer: int, epochs: int = 1) -> list[int]:
    return [int(text) for text in DocumentStream(files, epochs=epochs, seed=seed, shuffle_buffer=buffer)]


def correlation(order: Sequence[int]) -> float:
    return float(np.corrcoef(order, np.arange(len(order)))[0, 1])


def test_without_a_buffer_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    files = numbered(tmp_path, [7, 1, 0, 20, 3])
    for seed in range(3):
        assert order_of(files, seed, 0, epochs=2) == [*range(31)] * 2


@pytest.mark.parametrize("shards", [[600], [200, 300, 100], [30] * 20], ids=["1", "3", "20"])
@pytest.mark.parametrize("buffer", [600, 5_000])
def test_a_buffer_for_all_mixes_all(tmp_path: Path, shards: list[int], buffer: int) -> None:
    files = numbered(tmp_path, shards)
    for seed in range(4):
        order = order_of(files, seed, buffer, epochs=2)
        for part in (order[:600], order[600:]):
            assert sorted(part) == [*range(600)]
            assert abs(correlation(part)) < 0.15  # 0 ± 0.04, were all orders alike
            gaps = np.abs(np.diff(part))
            assert 170 < gaps.mean() < 230  # neighbours are a third of the corpus apart
        assert abs(float(np.corrcoef(order[:600], order[600:])[0, 1])) < 0.15


@pytest.mark.parametrize("buffer", [1, 2, 10, 50])
def test_a_line_comes_back_by_no_more_than_the_buffer(tmp_path: Path, buffer: int) -> None:
    """What is read as number n is yielded as number n - buffer + 1 or later; most of it within some buffers."""
    files = numbered(tmp_path, [1_000])
    moves = []
    for seed in range(3):
        order = order_of(files, seed, buffer)
        assert sorted(order) == [*range(1_000)]
        moves += [place - number for place, number in enumerate(order)]
    assert min(moves) == -(buffer - 1)  # and that far some do
    assert np.mean(np.abs(moves)) <= buffer
    assert np.quantile(moves, 0.99) <= 5 * buffer
    if buffer > 1:
        assert np.mean(np.abs(moves)) > buffer / 3


@pytest.mark.parametrize("buffer", [1, 10])
def test_shards_are_read_at_the_same_time_but_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int
) -> None:
    monkeypatch.setattr(stream, "OPEN_SHARDS", 3)
    files = numbered(tmp_path, [40] * 7)
    documents = DocumentStream(files, epochs=1, shuffle_buffer=buffer)
    order, seen = [], set[int]()
    for text in documents:
        order.append(int(text) // 40)
        shards = [shard for shard, *_ in documents.state_dict()["shards"]]
        assert len(shards) <= 3
        seen.update(shards)
    assert seen == set(range(7))
    assert len(set(order[:40])) == 3
    assert max(len(set(order[i : i + 15])) for i in range(len(order))) >= 3
    firsts = {tuple(dict.fromkeys(n // 40 for n in order_of(files, seed, buffer)[:40])) for seed in range(9)}
    assert len(firsts) > 4  # which shards come first is drawn, too


@pytest.mark.parametrize("by", ["seeds", "epochs"])
def test_all_orders_are_equally_likely(tmp_path: Path, by: str) -> None:
    files = numbered(tmp_path, [1, 3])
    draws = 2_400
    if by == "seeds":
        orders = [tuple(order_of(files, seed, 4)) for seed in range(draws)]
    else:
        numbers = order_of(files, 0, 4, epochs=draws)
        orders = [tuple(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
    counts = Counter(orders)
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 60  # chi², 23 degrees of freedom: p < 1e-4
    places = Counter((place, number) for order in orders for place, number in enumerate(order))
    assert len(places) == 16
    assert all(500 < count < 700 for count in places.values())  # 600 ± 21


def test_the_buffer_holds_no_more_characters_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_CHARACTERS", 1_000)
    rng = random.Random(0)
    lengths = [rng.choice([5, 90, 200, 300]) for _ in range(150)] + [5_000] + [20] * 90
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * length} for length in lengths])
    documents = DocumentStream([file], epochs=2, shuffle_buffer=10_000)
    most, given = 0, []
    for text in documents:
        given.append(len(text))
        held = sum(lengths[line - 1] for _, line, _ in documents.state_dict()["buffer"])
        most = max(most, held)
        if len(text) < 5_000 and held < 5_000:
            assert held + len(text) < 1_000 + 300  # full, and the one that made it so
    assert most > 900
    assert sorted(given[: len(lengths)]) == sorted(given[len(lengths) :]) == sorted(lengths)


def test_the_memory_of_the_buffer_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_CHARACTERS", 10**6)
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": f"{i:04d}" * 25_000} for i in range(150)])
    tracemalloc.start()
    try:
        assert sum(1 for _ in DocumentStream([file], epochs=1, shuffle_buffer=10_000)) == 150
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 10**6


# Resumed at every document --------------------------------------------------------------------------------------------


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of every kind, with blank lines, no last line break, nothing in them, texts in parts, the same text twice,
    more than are open at a time."""
    monkeypatch.setattr(stream, "OPEN_SHARDS", 3)
    monkeypatch.setattr(lines, "TEXT_PART", 30)
    folder = tmp_path / "mixed"
    folder.mkdir()
    a, *_ = write_shards(folder, sentences(8), 2)
    a.write_bytes(b"\n\n" + a.read_bytes().replace(b"}\n", b"}\n \n\n", 2).rstrip(b"\n"))
    write_jsonl(folder / "05.jsonl", [])
    write_jsonl(folder / "06.json.gz", [{"text": "same"}, {"text": "same"}, {"text": "other"}])
    (folder / "07.txt").write_text("\n\nA first part of this text.\nIt goes on here.\n\nAnd on.\nThe end.\n\n")
    packed = "Another text, so long that\nit is cut into parts\n\n\n\nwhich are documents,\nthe last of them this"
    write_jsonl(folder / "08.txt.gz", [packed.encode()])
    (folder / "09.txt").write_text("One part only.")
    return [*sorted(folder.iterdir()), folder / "06.json.gz"]  # one file twice


def plain(state: Any) -> str:
    """Return a state as it is written to a file, so that two can be compared."""
    return json.dumps(state, sort_keys=True)


@pytest.mark.parametrize("buffer", [0, 1, 2, 5, 1_000])
def test_a_stream_goes_on_at_every_document(mixed: list[Path], buffer: int) -> None:
    def fresh() -> DocumentStream:
        return DocumentStream(mixed, epochs=3, seed=5, shuffle_buffer=buffer)

    never_stopped = fresh()
    states, texts = [never_stopped.state_dict()], []
    for text in never_stopped:
        texts.append(text)
        states.append(never_stopped.state_dict())
    shown = [plain(state) for state in states]
    per_epoch = len(texts) // 3
    assert per_epoch > 15
    assert Counter(texts[:per_epoch]) == Counter(texts[per_epoch : 2 * per_epoch]) == Counter(texts[2 * per_epoch :])
    for taken, through in zip(range(len(states)), cycle([through_json, through_torch]), strict=False):
        saved = through(states[taken])
        before = copy.deepcopy(saved)
        resumed = fresh()
        resumed.load_state_dict(saved)
        assert plain(resumed.state_dict()) == shown[taken]
        assert resumed.epoch == max(0, taken - 1) // per_epoch
        ahead = []
        for steps, text in enumerate(islice(resumed, 4), 1):  # it leads through the same states …
            ahead.append(text)
            assert plain(resumed.state_dict()) == shown[taken + steps]
        again = fresh()
        again.load_state_dict(resumed.state_dict())  # … and may be stopped again
        assert ahead + list(again) == texts[taken:]
        assert saved == before  # what was saved is not changed by those who go on from it


def test_a_stream_of_many_shards_goes_on_at_every_document(tmp_path: Path) -> None:
    files = numbered(tmp_path, [3, 2, 4, 1, 0, 2, 3, 1, 2, 2, 3, 1])
    assert len(files) > stream.OPEN_SHARDS
    never_stopped = DocumentStream(files, epochs=2, shuffle_buffer=4)
    states, texts = [never_stopped.state_dict()], []
    for text in never_stopped:
        texts.append(text)
        states.append(through_json(never_stopped.state_dict()))
    for taken, state in enumerate(states):
        resumed = DocumentStream(files, epochs=2, shuffle_buffer=4)
        resumed.load_state_dict(state)
        assert list(resumed) == texts[taken:]


@pytest.mark.parametrize("buffer", [0, 3, 1_000])
def test_skipped_records_are_counted_once_whatever_is_resumed(tmp_path: Path, buffer: int) -> None:
    bad = {17: b"{bad", 101: b'{"text": ""}', 230: b"\xff"}
    lines: list[Any] = [bad.get(i, {"text": f"good {i}"}) for i in range(301)]
    file = write_jsonl(tmp_path / "x.jsonl", lines)

    def fresh() -> DocumentStream:
        return DocumentStream([file], epochs=2, shuffle_buffer=buffer, skipped=Skipped(quiet=True))

    never_stopped = fresh()
    states = [copy.deepcopy(never_stopped.state_dict())]
    texts = []
    for text in never_stopped:
        texts.append(text)
        states.append(copy.deepcopy(never_stopped.state_dict()))
    assert (never_stopped.skipped.records, never_stopped.skipped.skipped) == (602, 6)
    for taken in (0, 1, 16, 17, 18, 100, 250, 298, 299, 400, 596):
        for _ in range(2):  # the same state, twice
            resumed = fresh()
            resumed.load_state_dict(states[taken])
            assert list(resumed) == texts[taken:]
            assert vars(resumed.skipped) == vars(never_stopped.skipped)


# Resumed at every batch -----------------------------------------------------------------------------------------------


def same_state(ours: dict[str, Any], expected: dict[str, Any]) -> bool:
    tensors = all(torch.equal(ours[name], expected[name]) for name in ("ids", "firsts"))
    return tensors and all(plain(ours[name]) == plain(expected[name]) for name in ("settings", "stream"))


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("buffer", [0, 5, 1_000])
@pytest.mark.usefixtures("small_chunks")
def test_pages_go_on_at_every_batch(mixed: list[Path], tokenizer: Tokenizer, buffer: int, isolate: bool) -> None:
    count = 22

    def fresh(workers: int = 0, rank: int = 0, world: int = 1) -> PageBatches:
        documents = DocumentStream(mixed, seed=3, shuffle_buffer=buffer)
        return PageBatches(documents, tokenizer, ROWS, LENGTH, isolate, workers, rank, world)

    def run(workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        batches = fresh(workers)
        states, found = [through_torch(batches.state_dict())], []
        for batch in islice(batches, count):
            found.append(whole([batch]))
            states.append(through_torch(batches.state_dict()))
            if workers and len(found) == 3:
                assert plain(batches.stream.state_dict()) != plain(states[-1]["stream"])  # it was read ahead
        return found, states

    expected, states = run(0)
    epochs = [state["stream"]["epoch"] for state in states]
    assert epochs[-1] >= 2
    again, with_workers = run(2)
    assert same(again, expected)
    assert all(same_state(ours, right) for ours, right in zip(with_workers, states, strict=True))

    others = cycle([(0, 1), (0, 2), (2, 1), (0, 1), (0, 4), (0, 1), (1, 2), (0, 1)])
    for taken, (state, (workers, world)) in enumerate(zip(with_workers, others, strict=False)):
        ranks = []
        for rank in range(world):
            batches = fresh(workers, rank, world)
            batches.load_state_dict(state)
            assert same_state(batches.state_dict(), state)
            ranks.append(list(islice(batches, min(6, count - taken))))
        assert same([whole(parts) for parts in zip(*ranks, strict=True)], expected[taken:][:6])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_chunks")
def test_iterating_again_goes_on(mixed: list[Path], tokenizer: Tokenizer, workers: int) -> None:
    """A new iterator continues after the last batch that was yielded, though workers had read ahead."""

    def fresh(workers: int) -> PageBatches:
        return PageBatches(DocumentStream(mixed, shuffle_buffer=6), tokenizer, ROWS, LENGTH, workers=workers)

    expected = [whole([batch]) for batch in islice(fresh(0), 9)]
    batches = fresh(workers)
    found = [whole([batch]) for _ in range(3) for batch in islice(batches, 3)]
    assert same(found, expected)


# Refused by name ------------------------------------------------------------------------------------------------------


def refusal(load: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message
    return message


def rewrite(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """Write three plain files of some 400 kB, so that their ends are not all of them."""
    folder = tmp_path / "large"
    folder.mkdir()
    return [
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{name} {i:04d} " + "x" * 990} for i in range(400)])
        for name in "abc"
    ]


def flip(offset: int) -> Callable[[bytearray], None]:
    """Change one letter of a text, and nothing else."""

    def change(content: bytearray) -> None:
        place = content.index(b"xx", offset if offset >= 0 else len(content) + offset)
        content[place] = ord("y")

    return change


def cut(content: bytearray) -> None:
    del content[-1_020:]


def add(content: bytearray) -> None:
    content += b'{"text": "one more"}\n'


def test_other_files_are_refused_by_name(large: list[Path], tmp_path: Path) -> None:
    a, b, c = large
    documents = DocumentStream(large, shuffle_buffer=10)
    list(islice(documents, 500))
    state = through_json(documents.state_dict())
    d = shutil.copy(c, c.with_name("d.jsonl"))
    other = tmp_path / "other"
    other.mkdir()
    other_b = shutil.copy(a, other / "b.jsonl")  # the name of one, the content of another
    for files, named in [
        ([a, b], "c.jsonl"),
        ([b, c], "a.jsonl"),
        ([*large, d], "d.jsonl"),
        ([a, b, d], "c.jsonl"),
        ([b, a, c], "their order"),
        ([a, other_b, c], "b.jsonl"),
    ]:
        message = refusal(lambda files=files: DocumentStream(files, shuffle_buffer=10).load_state_dict(state))
        assert named in message
        assert "since the run was saved" in message or "the run was saved with" in message
    elsewhere = [Path(shutil.copy(file, other)) for file in large]  # but a folder may move
    moved = DocumentStream(elsewhere, shuffle_buffer=10)
    moved.load_state_dict(state)
    assert list(islice(moved, 100)) == list(islice(documents, 100))


@pytest.mark.parametrize("change", [flip(0), flip(-500), cut, add], ids=["start", "end", "truncated", "longer"])
def test_a_file_changed_at_its_ends_is_refused_by_name(large: list[Path], change: Callable[[bytearray], None]) -> None:
    documents = DocumentStream(large, shuffle_buffer=10)
    list(islice(documents, 50))
    state = documents.state_dict()
    rewrite(large[1], change)
    message = refusal(lambda: DocumentStream(large, shuffle_buffer=10).load_state_dict(state))
    assert message == "b.jsonl: the data has changed since the run was saved"


REPLACED = "the file has been changed during the run; its epochs would not be the same"


@pytest.mark.parametrize("taken", [5, 395, 405])
@pytest.mark.parametrize("change", [flip(0), flip(-500), add], ids=["start", "end", "longer"])
def test_a_file_changed_while_it_is_read_is_refused_by_name(
    large: list[Path], change: Callable[[bytearray], None], taken: int
) -> None:
    """At its own end at the latest, and not in the next epoch; and before a shard begins that has been changed."""
    documents = iter(DocumentStream(large, shuffle_buffer=0, epochs=1))
    list(islice(documents, taken))
    changed = large[0] if taken < 400 else large[2]
    rewrite(changed, change)
    assert refusal(lambda: list(documents)) == f"{changed}: {REPLACED}"


@pytest.mark.parametrize("size", [1, 2**16, 2**17 - 1, 300_000])
def test_a_file_is_recognised_by_each_byte_of_its_ends(tmp_path: Path, size: int) -> None:
    """64 KiB at its start and at its end, to the very last byte, and by its size."""
    file, content = tmp_path / "pages.txt", bytearray(b"x" * size)
    file.write_bytes(content)
    known = fingerprint(file)
    for place in {0, min(2**16, size) - 1, max(0, size - 2**16), size - 1}:
        changed = content.copy()
        changed[place] = ord("y")
        file.write_bytes(changed)
        assert fingerprint(file) != known, place
    for other in (content + b"x", content[:-1]):
        file.write_bytes(other)
        assert fingerprint(file) != known
    file.write_bytes(content)
    assert fingerprint(file) == known == {**known, "name": "pages.txt", "bytes": size}


@pytest.mark.parametrize("buffer", [0, 10])
def test_a_file_changed_where_it_was_read_is_refused_by_name(large: list[Path], buffer: int) -> None:
    """In the middle, in a document that was yielded long ago; and the size is the same."""
    documents = DocumentStream(large, shuffle_buffer=buffer)
    list(islice(documents, 390 if buffer == 0 else 900))
    state = documents.state_dict()
    assert 0 in [shard for shard, *_ in state["shards"]]
    rewrite(large[0], flip(150_000))
    resumed = DocumentStream(large, shuffle_buffer=buffer)
    resumed.load_state_dict(state)  # the ends are the same
    assert refusal(lambda: next(iter(resumed))) == f"{large[0]}: the data has changed since the run was saved"


def test_a_changed_document_of_the_buffer_is_refused_by_name(large: list[Path]) -> None:
    """Here the file has been read to its end, and the changed document is in the buffer."""
    documents = DocumentStream(large[:1], shuffle_buffer=1_000)
    given = set(islice(documents, 3))
    state = documents.state_dict()
    lines = large[0].read_bytes().splitlines()
    line = next(i for i in range(200, 400) if json.loads(lines[i])["text"] not in given)
    rewrite(large[0], flip(sum(len(line) + 1 for line in lines[:line])))
    resumed = DocumentStream(large[:1], shuffle_buffer=1_000)
    resumed.load_state_dict(state)
    assert str(large[0]) in refusal(lambda: list(islice(resumed, 397)))


def test_a_file_damaged_after_the_save_is_refused_by_name(tmp_path: Path) -> None:
    """The bytes that tell files apart are those of its ends: a line in the middle is no JSON any more."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i:04d} " + "x" * 990} for i in range(400)])
    documents = DocumentStream([file])
    list(islice(documents, 390))
    state = documents.state_dict()
    rewrite(file, lambda content: content.__setitem__(content.index(b"}\n", 150_000), 0xFF))
    resumed = DocumentStream([file])
    resumed.load_state_dict(state)
    message = refusal(lambda: next(iter(resumed)))
    assert message.startswith(f"{file}")
    assert "the data has changed since the run was saved" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "the run was saved with seed 0, and now it is 1"),
        ({"shuffle_buffer": 4}, "the run was saved with shuffle_buffer 5, and now it is 4"),
        ({"text_field": "body"}, "the run was saved with text_field text, and now it is body"),
    ],
)
def test_another_stream_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 2)
    settings: dict[str, Any] = {"seed": 0, "shuffle_buffer": 5, "text_field": "text"}
    documents = DocumentStream(files, **settings)
    list(islice(documents, 3))
    other = DocumentStream(files, **{**settings, **change})
    assert refusal(lambda: other.load_state_dict(through_json(documents.state_dict()))) == named


def test_other_pages_are_refused_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 2)
    trained = train_tokenizer([*TEXTS, "another text"], 300)

    def fresh(tokenizer: Tokenizer = tokenizer, seed: int = 0, **changes: Any) -> PageBatches:
        settings = {"batch_size": 4, "length": 13, "isolate": False, **changes}
        return PageBatches(DocumentStream(files, seed=seed, shuffle_buffer=5), tokenizer, **settings)

    batches = fresh()
    list(islice(batches, 2))
    state = through_torch(batches.state_dict())
    for other, named in [
        (fresh(batch_size=8), "batch_size 4, and now it is 8"),
        (fresh(length=12), "max_length 13, and now it is 12"),
        (fresh(isolate=True), "isolate False, and now it is True"),
        (fresh(trained), "tokenizer "),
        (fresh(seed=1), "seed 0, and now it is 1"),
    ]:
        assert refusal(lambda other=other: other.load_state_dict(state)).startswith(f"the run was saved with {named}")
    fresh(workers=3, rank=1, world=2).load_state_dict(state)


def examples_of(count: int) -> list[Example]:
    """Return examples of many lengths; example i is the only one whose answer begins with the id 100 + i."""
    return [Example([1, *[5] * (1 + i % 7)], [100 + i, 2]) for i in range(count)]


def test_other_pairs_are_refused_by_name() -> None:
    examples = examples_of(10)
    batches = PairBatches(examples, 4, pad_id=2, seed=0)
    list(islice(batches, 2))
    state = through_torch(batches.state_dict())
    assert through_json(state) == state
    changed = examples.copy()
    changed[6] = Example(examples[6].prompt, [106, 3])
    moved = examples.copy()
    moved[6] = Example([*examples[6].prompt, 106], [2])  # the same ids, but the prompt is longer
    given = examples.copy()
    given[6] = Example(examples[6].prompt, examples[6].answer, given=((1, 2),))  # the same ids, but fewer are learned
    for other, named in [
        (PairBatches(changed, 4, 2, 0), "data 10 pairs"),
        (PairBatches(moved, 4, 2, 0), "data 10 pairs"),
        (PairBatches(given, 4, 2, 0), "data 10 pairs"),
        (PairBatches(examples[:9], 4, 2, 0), "data 10 pairs"),
        (PairBatches(examples[::-1], 4, 2, 0), "data 10 pairs"),
        (PairBatches(examples, 4, 2, 1), "seed 0, and now it is 1"),
        (PairBatches(examples, 5, 2, 0), "batch_size 4, and now it is 5"),
        (PairBatches(examples, 4, 2, 0, pack=False), "pack True, and now it is False"),
    ]:
        assert refusal(lambda other=other: other.load_state_dict(state)).startswith(f"the run was saved with {named}")
    PairBatches(examples, 4, 2, 0, rank=1, world=2).load_state_dict(state)


# Pairs and ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("count", "batch_size"), [(16, 4), (17, 4), (13, 6), (3, 8), (1, 4)])
def test_ranks_share_every_pair_once_an_epoch(count: int, batch_size: int, world: int, pack: bool) -> None:
    def numbers(batch: Batch) -> list[int]:
        found = sorted((batch.targets[batch.targets >= 100] - 100).tolist())
        assert batch.n_targets == int((batch.targets >= 0).sum()) == 2 * len(found)
        return found

    examples = examples_of(count)
    alone = PairBatches(examples, batch_size, 2, seed=3, pack=pack)
    ranks = [PairBatches(examples, batch_size, 2, 3, pack, rank, world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    parts = [[numbers(batch) for batch in islice(batches, 3 * len(alone))] for batches in (alone, *ranks)]
    together = [sorted(chain(*group)) for group in zip(*parts[1:], strict=True)]
    assert together == parts[0]
    for epoch in range(3):
        batches = together[epoch * len(alone) :][: len(alone)]
        assert sorted(chain(*batches)) == [*range(count)]
    for group in zip(*parts[1:], strict=True):  # as evenly as can be
        sizes = [len(part) for part in group]
        assert max(sizes) - min(sizes) <= 1
    if count == 17:
        assert len(together[len(alone) - 1]) == 1  # fewer than ranks


# Errors and signals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Write a file whose 25th line is not JSON."""
    lines: list[Any] = [{"text": text} for text in sentences(40)]
    lines.insert(24, b"{broken")
    return write_jsonl(tmp_path / "broken.jsonl", lines)


def until_error(batches: PageBatches) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """Return the batches before an InputError, its message, and the state before it."""
    found, state = [], batches.state_dict()
    try:
        for batch in batches:
            found.append(whole([batch]))
            state = batches.state_dict()
            assert len(found) < 1_000
    except InputError as error:
        return found, str(error), state
    raise AssertionError("no error")


@pytest.mark.parametrize("characters", [150, 10**6])
@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_after_the_batches_before_it(
    broken: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int, characters: int
) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", characters)
    found, message, _ = until_error(PageBatches(DocumentStream([broken]), tokenizer, ROWS, LENGTH, workers=workers))
    assert message.startswith(f"{broken}:25: not valid JSON")
    ids = [id for text in sentences(40)[:24] for id in tokenizer.encode(text, eos=True)]
    assert len(found) == (len(ids) - 1) // (ROWS * LENGTH) > 3
    assert [id for batch in found for id in batch["tokens"].flatten().tolist()] == ids[: len(found) * ROWS * LENGTH]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_chunks")
def test_a_resumed_run_meets_the_same_error_again(broken: Path, tokenizer: Tokenizer, workers: int) -> None:
    """The record that ended a strict run is not left out because the run was saved after the last good batch."""

    def fresh() -> PageBatches:
        return PageBatches(DocumentStream([broken]), tokenizer, ROWS, LENGTH, workers=workers)

    _, message, state = until_error(fresh())
    resumed = fresh()
    resumed.load_state_dict(through_torch(state))
    assert until_error(resumed)[:2] == ([], message)


def test_a_stream_that_failed_fails_again(tmp_path: Path) -> None:
    """The same for the documents: a state taken after the error has not read past it."""
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}, b"{bad", {"text": "c"}])
    documents = DocumentStream([file], epochs=1)
    with pytest.raises(InputError, match=r"x\.jsonl:3: "):
        list(documents)
    resumed = DocumentStream([file], epochs=1)
    resumed.load_state_dict(documents.state_dict())
    with pytest.raises(InputError, match=r"x\.jsonl:3: "):
        list(resumed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_chunks")
def test_what_ended_a_strict_run_is_skipped_when_it_goes_on_as_another(
    broken: Path, tokenizer: Tokenizer, workers: int
) -> None:
    """`--resume --no-strict`: all but that record, which is counted once."""
    with broken.open("a") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in sentences(110))

    def fresh(strict: bool) -> PageBatches:
        documents = DocumentStream([broken], epochs=2, shuffle_buffer=3, skipped=Skipped(strict, quiet=True))
        return PageBatches(documents, tokenizer, ROWS, LENGTH, workers=workers)

    never_stopped = fresh(strict=False)
    expected = [whole([batch]) for batch in never_stopped]
    found, _, state = until_error(fresh(strict=True))
    resumed = fresh(strict=False)
    resumed.load_state_dict(state)
    assert same([*found, *(whole([batch]) for batch in resumed)], expected)
    counts = [(batches.stream.skipped.records, batches.stream.skipped.skipped) for batches in (resumed, never_stopped)]
    assert counts == [(302, 2), (302, 2)]


@pytest.fixture
def workers_at_work(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Iterator[Batch]]:
    files = write_shards(tmp_path / "data", TEXTS, 2)
    batches = iter(PageBatches(DocumentStream(files), tokenizer, ROWS, LENGTH, workers=2))
    next(batches)
    yield batches
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children(), "a worker is left"


def next_death(batches: Iterator[Batch]) -> str:
    """Return the message of the RunError that ends `batches`; what was ready may come before it."""
    with pytest.raises(RunError) as error:
        list(islice(batches, 1_000))
    return str(error.value)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_worker_is_noticed_when_the_next_batch_is_asked_for(workers_at_work: Iterator[Batch]) -> None:
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    message = next_death(workers_at_work)
    assert message.startswith(f"a process that encodes text has died: process {pid} was killed by signal 9 (")
    assert "\n" not in message


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_worker_does_not_interrupt_what_is_done_meanwhile(workers_at_work: Iterator[Batch]) -> None:
    """A step or a save goes on to its end: the error comes when a batch is asked for."""
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    assert next_death(workers_at_work).startswith("a process that encodes text has died: ")


def half_a_result(pipe: Connection, run_end: Connection, tokenizer: Tokenizer) -> None:
    """Die as a worker that writes: after the length of a result, and only some of its bytes."""
    pipe.recv()
    os.write(pipe.fileno(), (1_000_000).to_bytes(4, "big") + bytes(1_000))
    os._exit(7)


def test_a_worker_that_dies_while_it_writes_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no lock that others wait for, and its pipe ends in the middle of the result."""
    monkeypatch.setattr(encode, "_work", half_a_result)
    files = write_shards(tmp_path / "data", TEXTS, 2)
    message = next_death(iter(PageBatches(DocumentStream(files), tokenizer, ROWS, LENGTH, workers=2)))
    assert re.fullmatch(r"a process that encodes text has died: process \d+ ended with exit code 7", message)
    assert not multiprocessing.active_children()


class Faulty:
    """A tokenizer that raises."""

    def encode_documents(self, texts: Sequence[str]) -> Any:
        raise LookupError(f"no ids for {texts[0]!r}")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_a_worker_raises_is_raised_here(tmp_path: Path, workers: int) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 2)
    chunks = encode.encode_documents(DocumentStream(files), Faulty(), workers)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=re.escape(f"no ids for {TEXTS[0]!r}")):
        next(chunks)
    assert not multiprocessing.active_children()


def test_a_worker_that_cannot_be_started_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a user may have no more processes; those that were started are ended."""
    start, started = multiprocessing.Process.start, []

    def limited(self: multiprocessing.Process) -> None:
        if len(started) == 2:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(self)
        start(self)

    monkeypatch.setattr(multiprocessing.Process, "start", limited)
    chunks = encode.encode_documents(DocumentStream(write_shards(tmp_path, TEXTS, 1)), tokenizer, workers=3)
    with pytest.raises(RunError, match="a process that encodes text cannot be started: Resource temporarily"):
        next(chunks)
    assert len(started) == 2
    assert not multiprocessing.active_children()


# The command line -----------------------------------------------------------------------------------------------------


STEPS = 6


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[str]:
    """Return the words of a pretraining run, without its length."""
    folder = tmp_path_factory.mktemp("pretrain")
    shape = {**SMALL, "vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1}
    (folder / "shape.json").write_text(json.dumps(shape))
    tokenizer.save(folder)
    data = write_shards(folder / "data", sentences(90), 3)
    words = ["pretrain", "--config", folder / "shape.json", "--tokenizer", folder, "--data", *data, "--device", "cpu"]
    words += ["--dtype", "float32", "--batch-size", 4, "--max-length", 32, "--shuffle-buffer", 20, "--isolate"]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def finished(words: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert (
        main([*words, "--out", str(out), "--steps", str(STEPS), "--save-every", "2", "--keep", "0", "--warmup", "1"])
        == 0
    )
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """Copy the same run, as if it had been killed after step 2."""
    out = tmp_path / "stopped"
    out.mkdir()
    shutil.copy(finished / "config.json", out)
    shutil.copy(finished / "metrics.jsonl", out)
    shutil.copytree(finished / "step_000002", out / "step_000002")
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--batch-size", "8"],
        ["--no-isolate"],
        ["--shuffle-buffer", "0"],
        ["--data", "{file}"],
        ["--max-length", "16"],
        ["--text-field", "body"],
    ],
    ids=lambda flags: flags[0],
)
def test_another_run_is_not_resumed(
    stopped: Path, words: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = words[words.index("--data") + 1]
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(["pretrain", "--resume", "--out", str(stopped), *(flag.format(file=file) for flag in flags)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"minift: error: {flags[0].replace('--no-', '--')} is ")
    assert "\n" not in message
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [[], ["--workers", "2"], ["--keep", "1", "--workers", "1"]], ids=" ".join)
def test_workers_and_keep_may_change(stopped: Path, finished: Path, flags: list[str]) -> None:
    assert main(["pretrain", "--resume", "--out", str(stopped), *flags]) == 0
    assert losses(stopped) == losses(finished)
    ours, expected = (torch.load(out / "final" / "model.pt", weights_only=True) for out in (stopped, finished))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    kept = sorted(folder.name for folder in stopped.glob("step_*"))
    assert kept == (["step_000006"] if "--keep" in flags else ["step_000002", "step_000004", "step_000006"])


def test_a_resumed_run_refuses_changed_data(
    finished: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [Path(shutil.copy(word, tmp_path)) for word in words if word.endswith((".jsonl", ".json.gz"))]
    out = tmp_path / "run"
    out.mkdir()
    run = json.loads((finished / "config.json").read_text())
    run["inputs"]["data"] = [str(file) for file in data]
    (out / "config.json").write_text(json.dumps(run))
    shutil.copytree(finished / "step_000002", out / "step_000002")
    with data[2].open("a") as file:
        file.write('{"text": "more"}\n')
    assert main(["pretrain", "--resume", "--out", str(out)]) == 2
    message = capsys.readouterr().err.strip()
    assert "02.jsonl: the data has changed since the run was saved" in message
    assert "\n" not in message


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in text.read_text().split()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def running(words: list[str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """Start a run in a process group of its own. After some steps, yield it, its two workers and its folder."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for processes in /proc")
    out = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minift", *words, "--out", str(out), "--steps", "100000", "--workers", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    workers: list[int] = []
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 5:
            assert process.poll() is None, process.communicate(timeout=60)[1]
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.01)
        workers = children(process.pid)
        assert len(workers) >= 2
        yield process, workers, out
    finally:
        for pid in (process.pid, *workers):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)


def check_that_workers_end(workers: Sequence[int]) -> None:
    deadline = time.monotonic() + 60  # for machines that are busy: the end of a pipe is noticed at once
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "a worker has outlived its run"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_saves_it(
    running: tuple[subprocess.Popen[str], list[int], Path], number: signal.Signals
) -> None:
    """Ctrl-C in a terminal reaches the workers too; so does SIGTERM from `timeout`, or a service that is stopped."""
    process, workers, out = running
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=240)
    assert "Traceback" not in stderr, stderr[-2_000:]
    assert "stopped and saved; continue with: " in stdout
    assert process.returncode == 1
    taken = len(losses(out))
    assert (out / f"step_{taken:06d}").is_dir()
    check_that_workers_end(workers)
    # It goes on with the batch after the last step, not after what the workers had read.
    state = torch.load(out / f"step_{taken:06d}" / "training.pt", weights_only=True)["batches"]
    settings = json.loads((out / "config.json").read_text())["inputs"]
    from minift.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(settings["tokenizer"])
    expected = PageBatches(DocumentStream(settings["data"], shuffle_buffer=20), tokenizer, 4, 32, isolate=True)
    list(islice(expected, taken))
    assert same_state(expected.state_dict(), state)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_worker_ends_a_run_with_one_line_and_a_checkpoint(
    running: tuple[subprocess.Popen[str], list[int], Path],
) -> None:
    process, workers, out = running
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert "Traceback" not in stderr, stderr[-2_000:]
    assert process.returncode == 1
    assert re.search(r"^minift: error: a process that encodes text has died: .+$", stderr, re.MULTILINE)
    assert (out / f"step_{len(losses(out)):06d}").is_dir()
    check_that_workers_end(workers)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_run(running: tuple[subprocess.Popen[str], list[int], Path]) -> None:
    process, workers, _ = running
    process.kill()
    process.wait(timeout=240)
    check_that_workers_end(workers)


# Random numbers of others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_chunks")
def test_no_global_generator_is_read_or_changed(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    files = write_shards(tmp_path / "data", TEXTS, 3)

    def read(seed: int) -> tuple[list[dict[str, Any]], list[Any]]:
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]
        documents = DocumentStream(files, seed=4, shuffle_buffer=6)
        pages = [whole([b]) for b in islice(PageBatches(documents, tokenizer, ROWS, LENGTH, workers=workers), 12)]
        pairs = [whole([b]) for b in islice(PairBatches(examples_of(9), 9, 2, 4), 4)]
        assert [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()] == before
        return pages, pairs

    first, second = read(seed=1), read(seed=2)
    assert same(first[0], second[0])
    assert same(first[1], second[1])
