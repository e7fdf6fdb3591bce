"""Measure how the wording of pretraining pages decides which facts finetuning can make a model answer.

The same facts are stated the same number of times, in three corpora:

* *many wordings*: each page states an entity's facts in a random order and in random wordings; all pages are shuffled;
* *one wording*: each page states them in one wording and one order, always the same; shuffled as well;
* *in order*: the pages of many wordings, unshuffled: all pages about one entity, then all about the next.

A small model is pretrained on each corpus, from the same random weights, for one epoch, and then finetuned on the same
questions and answers about four fifths of the entities. The test questions are about the last fifth: their facts are on
the pages, and in no pair. Each pretrained model also has to continue the page of one wording up to each fact: that
shows whether it knows the text by heart.

    python -m benchmarks lesson knowledge
    python -m benchmarks lesson knowledge --own first

How much one wording loses depends on its order. By default a page has the values that only this entity has (a capital,
a symbol) after its other facts; with `--own first` they come right after the name, and more of them are answered.

A model can know its pages by heart and still not answer: it predicts a fact from all the words that always came before
it, not from the name alone. Source: Allen-Zhu & Li, "Physics of Language Models: Part 3.1, Knowledge Storage and
Extraction" (arXiv 2309.14316), where 9.7 % of the answers are right after one wording, and 96.6 % after five wordings
in shuffled order.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.lessons import estimate
from benchmarks.lessons.chart import Chart, Point
from benchmarks.lessons.side_by_side import side_by_side
from benchmarks.lessons.training import finetune, right_answers, settings, train_on
from data import generate as pages
from minift.config import FINETUNE, PRETRAIN, LlamaConfig
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.data.templates import template_named
from minift.errors import InputError
from minift.evaluation.evaluate import answer_questions, make_questions
from minift.model import Llama
from minift.prompts import Pair
from minift.storage.names import model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.values import check_number

SETTINGS = ("rounds", "width", "layers", "entities", "batch_size", "lr", "finetune_lr", "epochs", "own", "seed")
CORPORA = ("many wordings", "one wording", "in order")
# The order of the facts in one wording: values that only this entity has come last, or first in reverse.
ORDER = {
    "country": ("country/language", "country/currency", "country/continent", "country/capital"),
    "element": ("element/number", "element/symbol"),
    "animal": ("animal/young", "animal/class"),
}
OWN = ("country/capital", "element/symbol")  # relations whose value only this entity has: it cannot be guessed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this lesson."""
    parser.add_argument("--rounds", type=int, default=80, metavar="N", help="pages about each entity (%(default)s)")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="of the models (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the models (%(default)s)")
    parser.add_argument("--entities", type=int, default=0, metavar="N", help="of each kind; 0: all (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of 128 tokens (%(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, metavar="X", help="of pretraining (%(default)s)")
    parser.add_argument("--finetune-lr", type=float, default=5e-4, metavar="X", help="of finetuning (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="of finetuning (%(default)s)")
    parser.add_argument("--own", default="last", metavar="first|last", help="of one wording: its values of one's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="models trained at the same time (one a core)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and finetune a model for each corpus, and ask it the questions."""
    chosen = {key: value for key, value in vars(options).items() if key in SETTINGS}
    for name in ("rounds", "width", "layers", "batch_size", "epochs"):
        check_number(name, chosen[name], least=1)
    check_number("entities", chosen["entities"], least=0)
    if chosen["own"] not in ("first", "last"):
        raise InputError(f"--own is {chosen['own']!r}; choose from first, last")
    found = side_by_side(_measure, [{**chosen, "corpus": corpus} for corpus in CORPORA], options.processes)
    return {"settings": chosen, "corpora": dict(zip(CORPORA, found, strict=True))}


def table(result: dict[str, Any]) -> str:
    """Return a table of the facts known by heart, and of the answers about entities that are in no pair."""
    corpora = result["corpora"]
    relations = list(corpora[CORPORA[0]]["relations"])
    lines = [f"{'':<28}" + "".join(f"{corpus:>26}" for corpus in corpora)]
    for key, label in (("parameters", "parameters"), ("tokens", "tokens of pages read"), ("targets", "… of pairs")):
        lines.append(f"{label:<28}" + "".join(f"{found[key]:>26,}" for found in corpora.values()))
    lines.append(f"{'loss of the last pages':<28}" + "".join(f"{f['loss']:>26.3f}" for f in corpora.values()))
    lines.append(f"{'facts known by heart':<28}" + "".join(_cell(f["by_heart"]) for f in corpora.values()))
    lines.append(f"{'asked: right to the letter':<28}" + "".join(_cell(f["asked"]) for f in corpora.values()))
    for name in relations:
        label = f"  {name}{' *' if name in OWN else ''}"
        lines.append(f"{label:<28}" + "".join(_cell(f["relations"][name]) for f in corpora.values()))
    lines.append("* the value is the entity's own; others (a continent) are shared by many, and can be guessed")
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> Chart:
    """Return a chart of what is known by heart and what is answered, for each corpus."""
    corpora = result["corpora"]

    def points(key: str) -> list[Point]:
        return [estimate.point(name, found[key]) for name, found in corpora.items()]

    return Chart(
        "What is known, and what can be asked",
        "corpus",
        "share of facts that are right",
        {"by heart": points("by_heart"), "asked, values of one's own *": points("own"), "asked, all": points("asked")},
    )


def conclusion(result: dict[str, Any]) -> str:
    """State what the three corpora show."""
    many, one, ordered = (result["corpora"][name] for name in CORPORA)
    first = (
        f"The model of one wording knows {one['by_heart']['value']:.0%} of its facts by heart. Asked for values that "
        f"are an entity's own, it is right for {one['own']['value']:.0%} of the entities that no pair spoke of, the "
        f"model of many wordings for {many['own']['value']:.0%}"
    )
    if many["own"]["interval"][0] > one["own"]["interval"][1]:
        first += ": finetuning taught both to answer, and could bring out only what was stored after the name."
    else:
        first += ": no clear difference here."
    second = f"Unshuffled, the pages of many wordings leave {ordered['by_heart']['value']:.0%} by heart"
    if ordered["by_heart"]["interval"][1] < many["by_heart"]["interval"][0]:
        second += f", not {many['by_heart']['value']:.0%}: each entity was forgotten over the next."
    else:
        second += ": no clear loss here."
    return f"{first} {second}"


def _cell(found: dict[str, Any]) -> str:
    return f"{estimate.shown(found):>26}"


# One corpus -----------------------------------------------------------------------------------------------------------


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Pretrain and finetune one model, and ask it the questions."""
    tokenizer = load_tokenizer(model_path("bundled"))
    world = _world(asked["entities"])
    width = asked["width"]
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=asked["layers"],
        num_attention_heads=max(2, width // 32),
        num_key_value_heads=max(2, width // 32),
        max_position_embeddings=256,
    )
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(asked["seed"]))
    texts = corpus_texts(world, asked["corpus"], asked["rounds"], asked["own"], asked["seed"])
    loss, tokens = _pretrain(model, tokenizer, texts, asked)
    train, test = _pairs(world, asked["seed"])
    by_heart = _by_heart(model, tokenizer, world, asked["own"])
    config = settings(FINETUNE, asked["seed"], lr=asked["finetune_lr"])
    targets = finetune(model, tokenizer, train, config, asked["epochs"] * -(-len(train) // config.batch_size))
    hits = right_answers(model, tokenizer, test)
    right = [(pair.metric, hit) for pair, hit in zip(test, hits, strict=True)]
    relations = dict.fromkeys(relation for relation, _ in right)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": tokens,
        "targets": targets,
        "loss": loss,
        "by_heart": estimate.mean(by_heart),
        "asked": estimate.mean([hit for _, hit in right]),
        "own": estimate.mean([hit for relation, hit in right if relation in OWN]),
        "relations": {
            name: estimate.mean([hit for relation, hit in right if relation == name]) for name in sorted(relations)
        },
    }


def _world(entities: int) -> pages.World:
    """Return the world without its guides, which have no entity to ask about; with `entities`, a part of it."""
    world = pages.load_world()
    kinds = {kind: [one for one in world.entities if one.kind == kind] for kind in pages.KINDS}
    chosen = [one for kind in kinds.values() for one in kind[: entities or None]]
    return pages.World(chosen, [], world.wordings)


def _pairs(world: pages.World, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return pairs about four fifths of the entities of each kind, and about the rest; `metric` is the relation."""
    rng = Random(f"{seed} pairs")
    train: list[Pair] = []
    test: list[Pair] = []
    for kind in pages.KINDS:
        entities = [entity for entity in world.entities if entity.kind == kind]
        held_out = pages.split([entity.name for entity in entities], None, rng)
        for entity in entities:
            for relation, value in entity.facts.items():
                made = pages.pair(world, relation, entity.name, value, rng)
                pair = Pair(made["question"], made["answer"], metric=relation)
                (test if entity.name in held_out else train).append(pair)
    return train, test


def corpus_texts(world: pages.World, corpus: str, rounds: int, own: str, seed: int) -> list[str]:
    """Return the pages of a corpus in the order of reading: `rounds` about each entity."""
    rng = Random(f"{seed} knowledge")
    if corpus == "one wording":
        texts = [" ".join(sentences(world, entity, own)) for entity in world.entities for _ in range(rounds)]
    else:
        texts = [pages.paragraph(world, entity, rng) for entity in world.entities for _ in range(rounds)]
    if corpus != "in order":
        rng.shuffle(texts)
    return texts


def sentences(world: pages.World, entity: pages.Entity, own: str) -> list[str]:
    """Return an entity's facts in the first wording of each relation, in one order; `own` is "first" or "last"."""
    return [
        pages.fill(world.wordings[relation]["statements"][0], entity.name, entity.facts[relation])
        for relation in _order(entity, own)
    ]


def _order(entity: pages.Entity, own: str) -> tuple[str, ...]:
    order = ORDER[entity.kind]
    return order if own == "last" else order[::-1]


def _pretrain(model: Llama, tokenizer: Tokenizer, texts: Sequence[str], asked: dict[str, Any]) -> tuple[float, int]:
    """Train one epoch of the pages. Return the mean loss of the last tenth of the steps, and the tokens read."""
    config = settings(PRETRAIN, asked["seed"], lr=asked["lr"], batch_size=asked["batch_size"], max_length=128)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pages.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        stream = DocumentStream([file], epochs=1)
        batches = PageBatches(stream, tokenizer, config.batch_size, config.max_length, isolate=True)
        windows = list(batches)
    losses = train_on(model, batches, windows, config)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last), sum(window.tokens.numel() for window in windows)


def _by_heart(model: Llama, tokenizer: Tokenizer, world: pages.World, own: str) -> list[float]:
    """Return for every fact 1 if the model continues the page of one wording with it, or 0."""
    prompts = []
    for entity in world.entities:
        before: list[str] = []
        for relation, sentence in zip(_order(entity, own), sentences(world, entity, own), strict=True):
            value = entity.facts[relation]
            prompts.append(Pair(" ".join([*before, sentence[: sentence.rindex(value)].rstrip()]), value))
            before.append(sentence)
    questions, _ = make_questions(prompts, template_named("plain"), tokenizer, 256)
    said = answer_questions(model, tokenizer, questions)
    return [
        float(answer.text.strip().startswith(f"{question.pair.answer}."))
        for question, answer in zip(questions, said, strict=True)
    ]
