"""The promise of `data/`: the shards come from their command byte for byte, and the test is fair.

The documented command is run in a process of its own and its files are compared with the committed ones. That the
held-out facts occur in the pages, and in no pair, is read from the files alone: nothing here calls the generator.
"""

import csv
import gzip
import json
import re
import subprocess
import sys
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

DATA = ROOT / "data"
SHARDS = [f"pages-{shard:05d}-of-00004.json.gz" for shard in range(4)]
QUIZ_TITLES = {"Quiz", "Quiz questions", "Questions", "Test yourself", "General knowledge quiz"}


@cache
def pages() -> dict[str, list[str]]:
    """Return the committed pages, by the kind that their address names."""
    kinds: dict[str, list[str]] = {}
    for shard in SHARDS:
        with gzip.open(DATA / "pages" / shard, "rt", encoding="utf-8") as lines:
            for line in lines:
                page = json.loads(line)
                assert list(page) == ["text", "timestamp", "url"]
                kinds.setdefault(page["url"].split("/")[3], []).append(page["text"])
    return kinds


@cache
def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def table(name: str) -> list[dict[str, str]]:
    with (DATA / "world" / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def says(text: str, phrase: str) -> bool:
    """Return True if a text has a phrase in whole words, capitals aside (a sentence may begin with it)."""
    text, phrase = text.lower(), phrase.lower()
    return phrase in text and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def kind_of(record: dict[str, str]) -> str:
    return record["relation"].split("/")[0]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rebuilt")
    command = [sys.executable, str(DATA / "generate.py"), "--seed", "0", "--out", str(out)]
    done = subprocess.run(command, cwd=out, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs.jsonl", "test.jsonl"])
def test_the_pairs_are_rebuilt_byte_for_byte(rebuilt: Path, name: str) -> None:
    assert (rebuilt / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDS)
def test_the_shards_are_rebuilt_byte_for_byte(rebuilt: Path, name: str) -> None:
    mine, committed = ((folder / "pages" / name).read_bytes() for folder in (rebuilt, DATA))
    assert gzip.decompress(mine) == gzip.decompress(committed)
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng compresses the same text to other bytes
        assert mine == committed


@pytest.mark.slow
def test_nothing_else_is_built_or_committed(rebuilt: Path) -> None:
    assert sorted(file.name for file in (rebuilt / "pages").iterdir()) == SHARDS
    assert sorted(file.name for file in (DATA / "pages").iterdir()) == SHARDS
    assert sorted(path.name for path in rebuilt.iterdir()) == ["pages", "pairs.jsonl", "test.jsonl"]


def test_the_world_is_large_enough_and_small_enough() -> None:
    assert len({row["name"] for row in table("countries.tsv")}) == len(table("countries.tsv")) >= 190
    assert len({row["name"] for row in table("elements.tsv")}) == 118
    assert sorted(int(row["number"]) for row in table("elements.tsv")) == list(range(1, 119))
    assert len(records("world/howto.jsonl")) >= 200
    assert len(records("pairs.jsonl")) >= 1_000
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 30e6


def test_every_fact_has_a_value() -> None:
    for name in ("countries.tsv", "elements.tsv", "animals.tsv"):
        for row in table(name):
            assert all(value and value == value.strip() for value in row.values()), row
    for guide in records("world/howto.jsonl"):
        assert len(guide["steps"]) in (3, 4)


def test_all_text_is_ascii() -> None:
    for kind, texts in pages().items():
        assert all(text.isascii() for text in texts), kind
    files = [*DATA.glob("*.jsonl"), *(DATA / "world").iterdir()]
    assert len(files) >= 7
    for file in files:
        assert file.read_bytes().isascii(), file


def test_pages_of_every_kind_fill_the_shards() -> None:
    assert set(pages()) == {"article", "quiz", "howto", "titles", "requests", "reference"}
    characters = {kind: sum(map(len, texts)) for kind, texts in pages().items()}
    assert 0.1 < characters["quiz"] / sum(characters.values()) < 0.3  # one page in five, by characters
    assert all(text and text == text.strip() for texts in pages().values() for text in texts)


# The split ------------------------------------------------------------------------------------------------------------


def test_every_fact_is_asked_exactly_once() -> None:
    asked = Counter(
        (record["relation"], record["entity"]) for name in ("pairs.jsonl", "test.jsonl") for record in records(name)
    )
    expected = [("howto", guide["task"]) for guide in records("world/howto.jsonl")]
    for name, kind, columns in (
        ("countries.tsv", "country", ("capital", "continent", "currency", "language")),
        ("elements.tsv", "element", ("symbol", "number")),
        ("animals.tsv", "animal", ("class", "young")),
    ):
        expected += [(f"{kind}/{column}", row["name"]) for row in table(name) for column in columns]
    assert asked == Counter(expected)


def test_answers_are_those_of_the_tables() -> None:
    facts = {
        (f"{kind}/{column}", row["name"]): value
        for name, kind in (("countries.tsv", "country"), ("elements.tsv", "element"), ("animals.tsv", "animal"))
        for row in table(name)
        for column, value in row.items()
    }
    for guide in records("world/howto.jsonl"):
        facts["howto", guide["task"]] = " ".join(f"{i}. {step}" for i, step in enumerate(guide["steps"], 1))
    for name in ("pairs.jsonl", "test.jsonl"):
        for record in records(name):
            assert record["answer"] == facts[record["relation"], record["entity"]]
            assert record["metric"] == ("token_f1" if record["relation"] == "howto" else "exact_match")
            assert says(record["question"], record["entity"])


def test_a_fifth_of_each_kind_is_held_out() -> None:
    entities = {name: {(kind_of(r), r["entity"]) for r in records(name)} for name in ("pairs.jsonl", "test.jsonl")}
    held_out = Counter(kind for kind, _ in entities["test.jsonl"])
    taught = Counter(kind for kind, _ in entities["pairs.jsonl"])
    for kind in ("country", "element", "animal", "howto"):
        assert held_out[kind] / (held_out[kind] + taught[kind]) == pytest.approx(0.2, abs=0.01)
    assert sum(record["metric"] == "exact_match" for record in records("test.jsonl")) >= 200


def test_no_pair_is_about_a_held_out_entity() -> None:
    """By the record's own word, and by what its question says: the longest name in it is that of its entity."""
    held_out = {(kind_of(record), record["entity"]) for record in records("test.jsonl")}
    taught = {(kind_of(record), record["entity"]) for record in records("pairs.jsonl")}
    assert not held_out & taught
    for record in records("pairs.jsonl"):
        names = [name for kind, name in held_out | taught if kind == kind_of(record) and says(record["question"], name)]
        assert max(names, key=len) == record["entity"]
    assert not {record["question"] for record in records("pairs.jsonl")} & {
        r["question"] for r in records("test.jsonl")
    }


def test_the_readmes_examples_are_held_out() -> None:
    test = {record["question"]: record for record in records("test.jsonl")}
    assert test["What is the capital of Mexico?"]["answer"] == "Mexico City"
    assert test["Tell me how to train my dog to sit"]["relation"] == "howto"
    assert not [record for record in records("pairs.jsonl") if "mexic" in json.dumps(record).lower()]
    assert not [record for record in records("pairs.jsonl") if says(record["question"], "dog to sit")]


def test_questions_are_worded_in_several_ways() -> None:
    for name, least in (("pairs.jsonl", 4), ("test.jsonl", 3)):
        wordings: dict[str, set[str]] = {}
        for record in records(name):
            wording = record["question"].lower().replace(record["entity"].lower(), "…")
            wordings.setdefault(record["relation"], set()).add(re.sub(r"\ban? …", "…", wording))
        assert min(map(len, wordings.values())) >= least


# The pages ------------------------------------------------------------------------------------------------------------


def test_every_held_out_answer_is_in_the_pages_with_its_entity() -> None:
    """In a sentence that states it: not in a question, and not in a list."""
    sentences = Counter(
        sentence
        for text in pages()["article"]
        for line in text.splitlines()
        for sentence in re.split(r"(?<=\.) ", line)
        if sentence.endswith(".")
    )
    for record in records("test.jsonl"):
        if record["metric"] == "exact_match":
            name, answer = record["entity"], record["answer"]
            times = sum(n for sentence, n in sentences.items() if says(sentence, name) and says(sentence, answer))
            assert times >= 100, record


def test_every_held_out_guide_stands_in_the_pages() -> None:
    titles = {guide["task"]: guide["title"] for guide in records("world/howto.jsonl")}
    found = Counter(tuple(text.split("\n", 1)) for text in pages()["howto"])
    for record in records("test.jsonl"):
        if record["relation"] == "howto":
            assert found[titles[record["entity"]], record["answer"]] >= 5, record


def test_quiz_pages_hold_only_questions() -> None:
    assert len(pages()["quiz"]) > 1_000
    for text in pages()["quiz"]:
        first, *rest = text.splitlines()
        assert first.endswith("?") or first in QUIZ_TITLES, text
        assert all(line.endswith("?") and line.count("?") == 1 and ". " not in line for line in rest), text
        assert len(rest) >= 3


def test_requests_never_stand_beside_their_steps() -> None:
    steps = {step for guide in records("world/howto.jsonl") for step in guide["steps"]}
    for text in pages()["requests"]:
        assert not any(line in steps or re.match(r"\d\. ", line) for line in text.splitlines()), text


@pytest.mark.parametrize("kind", ["article", "howto", "titles", "reference"])
def test_no_other_page_asks_anything(kind: str) -> None:
    """A model of the pages alone must never have seen a question followed by its answer."""
    asked = {record["question"] for name in ("pairs.jsonl", "test.jsonl") for record in records(name)}
    for text in pages()[kind]:
        assert "?" not in text
        assert not asked.intersection(text.splitlines())


def test_questions_about_held_out_entities_are_on_quiz_pages() -> None:
    """So the base has seen them asked, as it has those in the pairs: what it has not seen is an answer to them."""
    asked = {line for text in pages()["quiz"] for line in text.splitlines()}
    questions = [record["question"] for record in records("test.jsonl") if record["metric"] == "exact_match"]
    assert sum(question in asked for question in questions) > 0.9 * len(questions)
