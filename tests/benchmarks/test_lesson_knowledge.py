"""The promise of `lesson knowledge`: its corpora state the same facts as often, and differ in what it says alone."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lessons import knowledge
from data import generate as pages
from minift.errors import InputError
from tests.helpers import run_here


def facts_in(world: pages.World, texts: list[str]) -> Counter[tuple[str, str]]:
    """How often each (entity, relation) is stated, by looking for every filled wording."""
    stated = {
        pages.fill(wording, entity.name, value): (entity.name, relation)
        for entity in world.entities
        for relation, value in entity.facts.items()
        for wording in world.wordings[relation]["statements"]
    }
    return Counter(fact for text in texts for statement, fact in stated.items() if statement in text)


def test_the_corpora_state_the_same_facts() -> None:
    world = knowledge._world(4)
    texts = {corpus: knowledge.corpus_texts(world, corpus, 30, "last", seed=1) for corpus in knowledge.CORPORA}
    many, one, ordered = texts.values()
    assert sorted(many) == sorted(ordered)  # the same pages …
    assert many != ordered  # … in another order
    names = [entity.name for entity in world.entities]
    assert len(set(one)) == len(names)  # one page of each entity
    assert Counter(one).most_common()[-1][1] == 30
    counts = {corpus: facts_in(world, pages_of) for corpus, pages_of in texts.items()}
    assert set(counts["one wording"].values()) == {30}
    assert set(counts["many wordings"]) == set(counts["one wording"])
    # A page of many wordings leaves out one of more than two facts now and then (data/generate.py).
    assert min(counts["many wordings"].values()) >= 22
    assert len(set(many)) > 15 * len(names)
    first = [next(name for name in names if name.lower() in text.lower()) for text in ordered]
    assert len([i for i in range(1, len(first)) if first[i] != first[i - 1]]) < 2 * len(names)  # entity by entity


def test_the_order_of_one_wording() -> None:
    world = knowledge._world(1)
    (country,) = (entity for entity in world.entities if entity.kind == "country")
    last, first = (knowledge.sentences(world, country, own) for own in ("last", "first"))
    assert last == first[::-1]
    assert "capital" in last[-1]


def test_the_questions_asked_are_about_nothing_that_a_pair_speaks_of() -> None:
    world = knowledge._world(10)
    train, test = knowledge._pairs(world, seed=0)
    kinds = {entity.name: entity.kind for entity in world.entities}

    def spoken_of(questions: list[Any]) -> set[str]:
        return {name for name in kinds for pair in questions if f" {name}" in pair.question}

    facts = sum(len(entity.facts) for entity in world.entities)
    assert len(train) + len(test) == facts
    assert {pair.metric for pair in train} == {pair.metric for pair in test}  # each relation on both sides
    assert len(test) == pytest.approx(0.2 * facts, abs=1)
    by_answer = {(pair.metric, pair.question) for pair in train}
    assert not by_answer & {(pair.metric, pair.question) for pair in test}
    assert len(spoken_of(test)) == 6  # a fifth of 10 of each of three kinds


@pytest.mark.slow
def test_known_by_heart_and_not_to_be_asked() -> None:
    """The claim, with fewer pages and a smaller model: both know the facts, and one of them can be asked for more."""
    size = {"entities": 0, "rounds": 50, "width": 128, "layers": 3, "batch_size": 4, "lr": 4e-3}
    asked = {**size, "finetune_lr": 5e-4, "epochs": 6, "own": "last", "seed": 0}
    many, one = (knowledge._measure({**asked, "corpus": corpus}) for corpus in knowledge.CORPORA[:2])
    assert min(many["by_heart"]["value"], one["by_heart"]["value"]) > 0.9
    assert one["own"]["value"] + 0.15 < many["own"]["value"]
    assert one["asked"]["value"] + 0.05 < many["asked"]["value"]
    assert one["targets"] == many["targets"]
    assert one["tokens"] == pytest.approx(many["tokens"], rel=0.1)


@pytest.mark.slow
def test_unshuffled_pages_are_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--entities", 20, "--rounds", 100, "--width", 96, "--layers", 2, "--batch-size", 4, "--epochs", 1]
    result = run_here("lesson", tmp_path, "knowledge", *words, "--processes", 0)
    many, one, ordered = result["corpora"].values()
    assert min(many["by_heart"]["value"], one["by_heart"]["value"]) > 0.85
    assert ordered["by_heart"]["value"] + 0.5 < many["by_heart"]["value"]
    assert ordered["tokens"] == many["tokens"]
    assert "forgotten over the next" in result["conclusion"]
    assert "country/capital *" in capsys.readouterr().out


def estimate_of(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.05, value + 0.05]}


def test_the_conclusion_is_the_numbers() -> None:
    def corpus(by_heart: float, own: float) -> dict[str, Any]:
        return {"by_heart": estimate_of(by_heart), "own": estimate_of(own)}

    shown = {
        "corpora": dict(zip(knowledge.CORPORA, (corpus(1.0, 0.9), corpus(1.0, 0.1), corpus(0.2, 0.0)), strict=True))
    }
    assert "could bring out only what was stored after the name" in knowledge.conclusion(shown)
    assert "forgotten over the next" in knowledge.conclusion(shown)
    other = copy.deepcopy(shown)
    other["corpora"]["one wording"], other["corpora"]["in order"] = corpus(1.0, 0.95), corpus(1.0, 0.9)
    assert "no clear difference here" in knowledge.conclusion(other)
    assert "no clear loss here" in knowledge.conclusion(other)


WRONG = [["--rounds", 0], ["--width", 0], ["--entities", -1], ["--epochs", 0], ["--own", "middle"]]


@pytest.mark.parametrize("words", WRONG, ids=str)
def test_wrong_options(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_here("lesson", tmp_path, "knowledge", *words)
