"""The promise that no data, however spoilt, ends in anything but success or one clear line.

Files are made of random values, or are whole and then changed at random. Each is used or refused as `fuzzing.py` says,
and what becomes of the pairs that are used is held against what was put in.

In the suite there are some hundred inputs for each target, the same every time. A long run has others every time, so
many for each target as it is told, in tests of 5,000 inputs, and says how many of them were used:

    MINIFT_FUZZ_EXAMPLES=100000 python -m pytest tests/hostile/test_fuzz_*.py -n 2 --dist load -rP
"""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("zstandard")
import zstandard
from hypothesis import strategies as st

from minift.data.conversations import FIELDS, read_all_conversations
from minift.data.examples import encode_conversations
from minift.data.records import Skipped, read_records, scan
from minift.data.stream import DocumentStream
from minift.data.templates import TEMPLATES, choose_template, template_named
from minift.errors import InputError
from minift.evaluation.choices import read_choices
from minift.pack import IGNORE, PADDING, Example, collate
from minift.prompts import Pair, Template
from minift.tokenizer.base import Tokenizer
from tests.helpers import ROOT, HangError, encode_pair, texts_of
from tests.hostile.fuzzing import (
    ALIKE,
    EDITS,
    KEYS,
    LINES,
    RECORD,
    SOME_EDITS,
    TEXT,
    VALUES,
    Edits,
    check_line,
    damaged,
    fuzz,
    judged_test,  # noqa: F401  # of every test
    little_tokenizer,
    outcome,
    pytest_generate_tests,  # noqa: F401
    varied,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are written, one over the other."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def little() -> Tokenizer:
    return little_tokenizer()


# Data -----------------------------------------------------------------------------------------------------------------


@fuzz(400, content=LINES, edits=SOME_EDITS, name=st.sampled_from(("x.jsonl", "x.json", "x.txt")))
def test_lines_of_text_and_json(folder: Path, content: bytes, edits: Edits, name: str) -> None:
    """Every line that is not blank is a record or a fault, unless the file is an array of objects."""
    file, content = folder / name, damaged(content, edits)
    file.write_bytes(content)
    found = list(scan(file))
    for item in found:
        if isinstance(item, InputError):
            check_line(str(item), f"{file}:")
    if name == "x.jsonl" and not re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", content):
        assert len(found) == sum(not line.isspace() for line in content.split(b"\n") if line)
    read_every_way(file)


def read_every_way(file: Path) -> None:
    """As pages, pairs and questions, some faults borne or none."""
    outcome(lambda: list(read_records(file)), file)
    outcome(lambda: read_all_conversations([file]), file)
    outcome(lambda: read_all_conversations([file], Skipped()), file)
    outcome(lambda: list(DocumentStream([file], epochs=1, shuffle_buffer=3, skipped=Skipped(quiet=True))), file)
    if any(True for _ in scan(file)):
        outcome(lambda: read_choices(read_records(file)), file)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


@fuzz(
    400,
    contents=st.lists(LINES, min_size=1, max_size=3),
    edits=EDITS,
    kind=st.sampled_from(("gz", "zst")),
    name=st.sampled_from(("x.jsonl", "x.csv", "x.json", "x.txt")),
)
def test_packed_files(folder: Path, contents: list[bytes], edits: Edits, kind: str, name: str) -> None:
    """Streams cut off, damaged, or several in one file."""
    file = folder / f"{name}.{kind}"
    file.write_bytes(damaged(b"".join(map(PACK[kind], contents)), edits))
    read_every_way(file)


def table(rows: list[list[str]]) -> bytes:
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


CELLS = st.lists(st.lists(KEYS | TEXT, min_size=2, max_size=3), max_size=5).map(table)
PAIR_CELLS = st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=5)
TABLES = CELLS | PAIR_CELLS.map(lambda rows: table([["question", "answer"], *rows]))
ARRAYS = ALIKE | st.lists(RECORD | VALUES, max_size=4)


@fuzz(400, content=TABLES, edits=SOME_EDITS)
def test_tables(folder: Path, content: bytes, edits: Edits) -> None:
    (folder / "x.csv").write_bytes(damaged(content, edits))
    read_every_way(folder / "x.csv")


@fuzz(400, values=ARRAYS, indent=st.sampled_from((None, 1)), edits=SOME_EDITS)
def test_arrays(folder: Path, values: list[Any], indent: int | None, edits: Edits) -> None:
    (folder / "x.json").write_bytes(damaged(json.dumps(values, indent=indent).encode(), edits))
    read_every_way(folder / "x.json")


# Pairs ----------------------------------------------------------------------------------------------------------------

FORMS = ("jsonl", "json", "csv", "jsonl.gz")
NAMES = ("auto", "plain", "qa", "llama2", "llama3", "alpaca")
TRIPLES = st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=6)


@fuzz(
    250,
    texts=TRIPLES,
    fields=st.sampled_from(FIELDS),
    form=varied(st.sampled_from(FORMS), lambda rng: rng.choice(FORMS)),
    template=varied(st.sampled_from(NAMES), lambda rng: rng.choice(NAMES)),
    max_length=varied(st.integers(2, 40) | st.just(512), lambda rng: rng.choice((rng.randint(2, 60), 512))),
    pack=st.booleans(),
)
def test_pairs_become_rows_in_which_nothing_is_lost(
    folder: Path,
    tokenizer: Tokenizer,
    texts: list[tuple[str, str, str, str]],
    fields: tuple[str, str],
    form: str,
    template: str,
    max_length: int,
    pack: bool,
) -> None:
    """From a file's records to a batch: every pair that has a target is there, with its text, up to the last id."""
    records = [{fields[0]: f"{q}?", fields[1]: a, "system": s} for q, a, _, s in texts]
    if fields[0] == "instruction":
        records = [{**record, "input": context} for record, (*_, context, _) in zip(records, texts, strict=True)]
    file = folder / f"pairs.{form}"
    if form == "csv":
        file.write_bytes(table([list(records[0]), *(list(record.values()) for record in records)]))
    else:
        lines = json.dumps(records) if form == "json" else "\n".join(map(json.dumps, records))
        file.write_bytes(gzip.compress(lines.encode()) if form == "jsonl.gz" else lines.encode())
    pairs = outcome(lambda: read_all_conversations([file]), file)
    if pairs is None:
        assert form == "csv"  # which has no place for NUL
        return
    assert len(pairs) == len(records)
    for pair, record in zip(pairs, records, strict=True):
        assert pair.question == record[fields[0]]
        assert pair.answer == record[fields[1]]
    name = outcome(lambda: choose_template(template, pairs), file)
    if name is None:
        return
    chosen = template_named(name)
    encoded = outcome(lambda: encode_conversations(pairs, chosen, tokenizer, max_length), f"max_length {max_length}")
    wanted = [pair for pair in pairs if pair.answer.strip() and len(prompt_ids(pair, chosen, tokenizer)) <= max_length]
    assert bool(wanted) == (encoded is not None)
    if encoded is None:
        return
    examples, dropped = encoded
    assert (len(examples), dropped) == (len(wanted), len(pairs) - len(wanted))
    for ours, pair in zip(examples, wanted, strict=True):
        check_example(ours, pair, chosen, tokenizer, max_length)
    check_batch(collate(examples, tokenizer.eos_id, pack=pack), examples, pack)


def prompt_ids(pair: Pair, template: Template, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(texts_of(template, pair)[0])


def check_example(ours: Example, pair: Pair, template: Template, tokenizer: Tokenizer, max_length: int) -> None:
    prompt, answer = texts_of(template, pair)
    assert ours.prompt == prompt_ids(pair, template, tokenizer)
    assert ours.prompt.count(tokenizer.bos_id) == 1
    assert len(ours) <= max_length
    if ours.answer[-1] == tokenizer.eos_id:  # nothing was cut off
        text = (prompt + answer).replace("\u2581", " ")  # SentencePiece's own sign for a space
        assert tokenizer.decode([*ours.prompt, *ours.answer]) == text
    else:
        assert len(ours) == max_length


def check_batch(batch: Any, examples: list[Example], pack: bool) -> None:
    """The documents of a batch are the examples, and their targets the ids of the answers."""
    found = []
    for row in range(len(batch.tokens)):
        documents = batch.document_ids[row]
        assert int(documents.max()) == 0 or pack
        for document in range(int(documents.max()) + 1):
            own = documents == document
            tokens, targets = batch.tokens[row][own].tolist(), batch.targets[row][own].tolist()
            assert batch.positions[row][own].tolist() == list(range(len(tokens)))
            answer = [id for id in targets if id != IGNORE]
            assert targets[len(targets) - len(answer) :] == answer
            prompt = tokens[: len(tokens) + 1 - len(answer)]
            assert tokens[len(prompt) :] == answer[:-1]
            found.append((prompt, answer))
    assert sorted(found) == sorted((one.prompt, one.answer) for one in examples)
    assert bool((batch.targets[batch.document_ids == PADDING] == IGNORE).all())
    assert int((batch.targets != IGNORE).sum()) == batch.n_targets == sum(len(one.answer) for one in examples)


PIECES = st.sampled_from(("{question}", "{answer}", "{context}", "{system}", "{question", "\n", " ")) | TEXT


@fuzz(
    400,
    parts=st.lists(PIECES, max_size=6),
    edits=EDITS,
    texts=st.tuples(TEXT, TEXT, TEXT, TEXT),
    name=st.sampled_from((*TEMPLATES, "own.txt", "own.txt", "own.txt")) | TEXT,
)
def test_templates(
    folder: Path, little: Tokenizer, parts: list[str], edits: Edits, texts: tuple[str, ...], name: str
) -> None:
    """A template of any text, and pairs of any text in it: each of a pair's texts is there, once more than before."""
    (folder / "own.txt").write_bytes(damaged("".join(parts).encode(errors="surrogatepass"), edits))
    name = str(folder / name) if name == "own.txt" else name
    question, answer, context, system = texts
    pair = Pair(question, answer, context, system)
    outcome(lambda: choose_template(name, [pair]), name or "''", ": ")
    template = outcome(lambda: template_named(name), name, repr(name), "unknown template")
    if template is None:
        return
    texts = outcome(lambda: texts_of(template, pair), "a pair: ")
    if texts is not None:
        assert question.rstrip() in texts[0]
        assert context.rstrip() in texts[0]  # a prompt does not end in white space
        assert system.rstrip() in texts[0]
        assert answer in texts[1]
        outcome(lambda: encode_pair(pair, template, little, 64))


# The judge ------------------------------------------------------------------------------------------------------------


def refuse(message: str) -> None:
    raise InputError(message)


def go_on() -> None:
    with suppress(BaseException):
        time.sleep(9)


def compute() -> None:
    end = time.monotonic() + 9
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize(
    ("use", "error", "found"),
    [
        (lambda: {}["x"], KeyError, "x"),
        (lambda: time.sleep(9), HangError, "not done in 0.1 s"),
        (compute, HangError, "not done in 0.1 s"),
        (go_on, AssertionError, "the call went on"),
        (lambda: refuse("something is wrong"), AssertionError, "names none"),
        (lambda: refuse(""), AssertionError, "names none"),
        (lambda: os.write(2, b"panicked"), AssertionError, "panicked"),
        (lambda: print("look", file=sys.stderr), AssertionError, "look"),
        (lambda: warnings.warn("is old", FutureWarning, stacklevel=1), FutureWarning, "is old"),
        (lambda: bytearray(3 * 2**30), MemoryError, None),
        (lambda: torch.empty(3 * 2**30, dtype=torch.uint8), RuntimeError, "allocate memory"),
        (lambda: [bytes(2**20) for _ in range(4_000)], MemoryError, None),
    ],
)
def test_the_judge_sees_what_is_wrong(
    use: Callable[[], Any], error: type[BaseException], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.LEAST", 0)
    with pytest.raises(error, match=found):
        outcome(use, "x.jsonl", limit=0.1 if error is HangError or use is go_on else 20)


KEEPS_WHAT_IT_FREES = """
import resource, sys, torch
from minift.kernels.malloc import keep_freed_memory
from tests.hostile.fuzzing import limited_memory

resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
if not keep_freed_memory():
    sys.exit(77)
large = torch.empty(5 * 2**30, dtype=torch.uint8)  # not written to, so it takes no memory
above = bytearray(99_999)
del large
with limited_memory():
    for size in (3 * 2**30, 2**30):
        try:
            torch.empty(size, dtype=torch.uint8)
            print("taken")
        except RuntimeError:
            print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory a process has in /proc")
def test_the_limit_holds_after_a_test_that_has_freed_memory() -> None:
    """What a run in this process has freed stays with it, and must not be more that may be taken.

    In a process of its own, which is told to keep what it frees as a run tells it (`kernels/malloc.py`).
    """
    command, env = [sys.executable, "-c", KEEPS_WHAT_IT_FREES], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    if done.returncode == 77:
        pytest.skip("the C library is not GNU's")
    assert done.stdout.split() == ["refused", "taken"], done.stderr


def test_the_judge_sees_nothing_else() -> None:
    assert outcome(lambda: len(bytearray(2**30)), "x.jsonl") == 2**30
    assert outcome(lambda: refuse("x.jsonl:3: is\nwrong"), "x.jsonl") is None
