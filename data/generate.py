"""Write minift's small world: web-like pages to pretrain on, and instruction pairs to finetune on.

    python data/generate.py [--seed 0] [--out data] [--pages N]

The facts and wordings in ``data/world`` become two things:

* ``pages/pages-0000K-of-00004.json.gz``: plain pages in the format of C4 (one JSON object a line with
  ``text``, ``timestamp`` and ``url``). They state every fact of every entity many times over.
* ``pairs.jsonl`` and ``test.jsonl``: a question and its answer. The pairs cover 80 % of the entities, the
  test the other 20 %, so a right answer in the test joins a fact read in pretraining with a form of
  answering learned in finetuning.

Questions and requests stand only on pages that hold nothing else (quizzes and lists of requests), never next
to their answers. A model of these pages alone therefore follows a question with more questions, and it is the
finetuning that makes it answer.

Everything is drawn from ``random.Random`` and depends on the seed alone, and gzip's header carries neither a
time nor a name, so the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

WORLD = Path(__file__).resolve().parent / "world"
SHARDS = 4
PAGES = 90_000
HELD_OUT = 0.2

# Shares of the pages by number. They are tuned so that, by characters, articles come to about 55 %, quizzes
# to 18 %, how-to pages to 20 %, and lists of titles, requests and facts to the rest.
SHARES = {
    "article": 0.62,
    "quiz": 0.09,
    "howto": 0.24,
    "titles": 0.015,
    "requests": 0.015,
    "reference": 0.02,
}

# These two are the examples in the project's README, so they have to be in the test, and in these words.
SHOWN_COUNTRY = "Mexico"
SHOWN_TASK = "train my dog to sit"
SHOWN_WORDING = {("country/capital", SHOWN_COUNTRY): 0, ("howto", SHOWN_TASK): 0}

KINDS = {
    "country": ("countries.tsv", ("capital", "continent", "currency", "language")),
    "element": ("elements.tsv", ("symbol", "number")),
    "animal": ("animals.tsv", ("class", "young")),
}
QUIZ_TITLES = ("Quiz", "Quiz questions", "Questions", "Test yourself", "General knowledge quiz")
CRAWL_START = datetime(2021, 3, 4, 5, 6, 7)
CRAWL_PAUSE = timedelta(seconds=20)


@dataclass(frozen=True)
class Entity:
    """Something with facts. Entities with the same (kind, group) may share a page."""

    kind: str
    name: str
    group: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Guide:
    """A how-to: `task` completes "Tell me how to ...", `title` heads its page."""

    task: str
    title: str
    steps: tuple[str, ...]

    @property
    def answer(self) -> str:
        return " ".join(f"{i}. {step}" for i, step in enumerate(self.steps, 1))


@dataclass(frozen=True)
class World:
    """All that the pages and the pairs are made of."""

    entities: list[Entity]
    guides: list[Guide]
    wordings: dict[str, dict[str, list[str]]]

    def having(self, relation: str) -> list[Entity]:
        return [entity for entity in self.entities if relation in entity.facts]


def group_of(kind: str, row: dict[str, str]) -> str:
    """What makes two entities neighbours: the continent, the stretch of the periodic table, the class."""
    if kind == "element":
        return str((int(row["number"]) - 1) // 8)
    return row["continent"] if kind == "country" else row["class"]


def load_world(folder: Path = WORLD) -> World:
    entities = []
    for kind, (file, columns) in KINDS.items():
        with open(folder / file, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                facts = {f"{kind}/{column}": row[column] for column in columns}
                entities.append(Entity(kind, row["name"], group_of(kind, row), facts))
    with open(folder / "howto.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    guides = [Guide(record["task"], record["title"], tuple(record["steps"])) for record in records]
    wordings = json.loads((folder / "wordings.json").read_text(encoding="utf-8"))
    return World(entities, guides, wordings)


# Sentences


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def fill(wording: str, name: str, value: str = "") -> str:
    """A wording with its blanks filled, as a sentence. A question has no {value}, and needs none."""
    blanks = {"name": name, "a_name": with_article(name)}
    if value:
        blanks |= {"value": value, "a_value": with_article(value)}
    return capitalise(wording.format(**blanks))


def take(items: Sequence[Any], rng: Random, few: int, many: int) -> list[Any]:
    """Between `few` and `many` of the items, without repeats, in random order."""
    return rng.sample(items, min(len(items), rng.randint(few, many)))


def pick_wording(wordings: Sequence[str], rng: Random) -> Callable[[], str]:
    """A source of wordings for one page: half of the pages keep to a single one, the others mix them."""
    if rng.random() < 0.5:
        kept = rng.choice(wordings)
        return lambda: kept
    return lambda: rng.choice(wordings)


# Pages


def paragraph(world: World, entity: Entity, rng: Random) -> str:
    """The facts of one entity in random order, now and then without one of them."""
    facts = list(entity.facts.items())
    rng.shuffle(facts)
    if len(facts) > 2 and rng.random() < 0.1:
        facts.pop()
    sentences = (
        fill(rng.choice(world.wordings[relation]["statements"]), entity.name, value) for relation, value in facts
    )
    return " ".join(sentences)


def article(world: World, entities: Sequence[Entity], rng: Random) -> str:
    titled = rng.random() < 0.3
    parts = []
    for entity in entities:
        text = paragraph(world, entity, rng)
        parts.append(f"{capitalise(entity.name)}\n{text}" if titled else text)
    return "\n".join(parts)


def article_round(world: World, rng: Random) -> Iterator[str]:
    """One article's worth of every entity, some of them in twos with a neighbour.

    Going round all entities, in place of drawing them, gives each the same number of articles: what the
    model knows about an entity should not hang on luck.
    """
    groups: dict[tuple[str, str], list[Entity]] = {}
    for entity in world.entities:
        groups.setdefault((entity.kind, entity.group), []).append(entity)
    for members in groups.values():
        rng.shuffle(members)
        while members:
            together = [members.pop()]
            if members and rng.random() < 0.15:
                together.append(members.pop())
            yield article(world, together, rng)


def quiz(world: World, rng: Random) -> str:
    """Questions only. An answer must never stand here: see the module's docstring."""
    relations = [relation for relation in world.wordings if relation != "howto"]
    lines = []
    if rng.random() < 0.75:
        relation = rng.choice(relations)
        wording = pick_wording(world.wordings[relation]["questions"], rng)
        for entity in take(world.having(relation), rng, 4, 12):
            lines.append(fill(wording(), entity.name))
    else:
        for entity in take(world.entities, rng, 4, 12):
            relation = rng.choice(list(entity.facts))
            lines.append(fill(rng.choice(world.wordings[relation]["questions"]), entity.name))
    if rng.random() < 0.1:
        lines.insert(0, rng.choice(QUIZ_TITLES))
    return "\n".join(lines)


def howto(guide: Guide, rng: Random) -> str:
    """A guide in one of three layouts: a numbered line for each step, one numbered line, or prose."""
    layout = rng.choice(("lines", "line", "prose"))
    if layout == "prose":
        return f"{guide.title.replace('How to', 'To', 1)}: {' '.join(guide.steps)}"
    if layout == "line":
        return f"{guide.title}\n{guide.answer}"
    return "\n".join([guide.title, *(f"{i}. {step}" for i, step in enumerate(guide.steps, 1))])


def howto_round(world: World, rng: Random) -> Iterator[str]:
    """One page for every guide, so that all have the same number."""
    for guide in rng.sample(world.guides, len(world.guides)):
        yield howto(guide, rng)


def titles(world: World, rng: Random) -> str:
    lines = [guide.title for guide in take(world.guides, rng, 4, 12)]
    if rng.random() < 0.3:
        lines.insert(0, rng.choice(world.wordings["howto"]["headings"]))
    return "\n".join(lines)


def requests(world: World, rng: Random) -> str:
    wording = pick_wording(world.wordings["howto"]["requests"], rng)
    return "\n".join(wording().format(task=guide.task) for guide in take(world.guides, rng, 4, 12))


def reference(world: World, rng: Random) -> str:
    relation = rng.choice([relation for relation in world.wordings if relation != "howto"])
    entities = take(world.having(relation), rng, 5, 10)
    lines = [f"{capitalise(entity.name)}: {entity.facts[relation]}" for entity in entities]
    return "\n".join([rng.choice(world.wordings[relation]["headings"]), *lines])


def rounds(make_round: Callable[[World, Random], Iterator[str]], world: World, count: int, rng: Random) -> list[str]:
    """Whole rounds, at least one, until there are about `count` pages (never stopping inside a round)."""
    pages = list(make_round(world, rng))
    per_round = len(pages)
    while len(pages) + per_round / 2 < count:
        pages.extend(make_round(world, rng))
    return pages


def make_pages(world: World, count: int, seed: int) -> dict[str, list[str]]:
    """The texts of all kinds of page. Each kind has its own stream, so one can change without the others."""
    texts = {}
    for kind, share in SHARES.items():
        rng = Random(f"{seed} {kind}")
        number = round(count * share)
        if kind == "article":
            texts[kind] = rounds(article_round, world, number, rng)
        elif kind == "howto":
            texts[kind] = rounds(howto_round, world, number, rng)
        else:
            make = {"quiz": quiz, "titles": titles, "requests": requests, "reference": reference}[kind]
            texts[kind] = [make(world, rng) for _ in range(number)]
    return texts


# Pairs


def split(names: Sequence[str], forced: str | None, rng: Random) -> set[str]:
    """The names held out for the test: a fifth of them, `forced` among them if it is given."""
    order = rng.sample(names, len(names))
    if forced is not None:
        order.remove(forced)
        order.insert(0, forced)
    return set(order[: round(len(order) * HELD_OUT)])


def pair(world: World, relation: str, name: str, answer: str, rng: Random) -> dict[str, str]:
    """One question and its answer. A wording is drawn even where one is given: the stream stays the same."""
    wordings = world.wordings[relation]["requests" if relation == "howto" else "questions"]
    drawn = rng.randrange(len(wordings))
    wording = wordings[SHOWN_WORDING.get((relation, name), drawn)]
    question = wording.format(task=name) if relation == "howto" else fill(wording, name)
    metric = "token_f1" if relation == "howto" else "exact_match"
    return {"question": question, "answer": answer, "entity": name, "relation": relation, "metric": metric}


def make_pairs(world: World, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The pairs to train on and those held out, split by entity within each kind."""
    rng = Random(f"{seed} pairs")
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for kind in KINDS:
        entities = [entity for entity in world.entities if entity.kind == kind]
        forced = SHOWN_COUNTRY if kind == "country" else None
        held_out = split([entity.name for entity in entities], forced, rng)
        for entity in entities:
            side = test if entity.name in held_out else train
            side.extend(pair(world, relation, entity.name, value, rng) for relation, value in entity.facts.items())
    held_out = split([guide.task for guide in world.guides], SHOWN_TASK, rng)
    for guide in world.guides:
        side = test if guide.task in held_out else train
        side.append(pair(world, "howto", guide.task, guide.answer, rng))
    rng.shuffle(train)
    rng.shuffle(test)
    # The examples come first, so that they are among the few that a comparison prints.
    shown = [item for key in SHOWN_WORDING for item in test if (item["relation"], item["entity"]) == key]
    return train, shown + [item for item in test if item not in shown]


# Files


def json_line(record: dict[str, str]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_pages(texts: dict[str, list[str]], folder: Path, seed: int) -> None:
    """All pages, shuffled, in C4's format and in shards of the same size.

    Addresses and times run on in the order of the files, as if a crawler had fetched one page after another:
    drawn at random, they would add half a megabyte that nobody reads.
    """
    pages = [(kind, text) for kind, made in texts.items() for text in made]
    Random(f"{seed} files").shuffle(pages)
    number = dict.fromkeys(texts, 0)
    lines = []
    for i, (kind, text) in enumerate(pages):
        number[kind] += 1
        url = f"https://www.example.com/{kind}/{number[kind]}"
        when = CRAWL_START + i * CRAWL_PAUSE
        lines.append(json_line({"text": text, "timestamp": f"{when.isoformat()}Z", "url": url}))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        part = lines[shard * len(lines) // SHARDS : (shard + 1) * len(lines) // SHARDS]
        buffer = io.BytesIO()
        # An empty file name and a fixed time keep the header, and so the bytes, the same on every run.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as packed:
            packed.write("".join(part).encode())
        (folder / f"pages-{shard:05d}-of-{SHARDS:05d}.json.gz").write_bytes(buffer.getvalue())


def build(out: Path, seed: int = 0, pages: int = PAGES, world: Path = WORLD) -> dict[str, int]:
    """Write pages/, pairs.jsonl and test.jsonl into `out`; return how many there are of each."""
    facts = load_world(world)
    texts = make_pages(facts, pages, seed)
    write_pages(texts, out / "pages", seed)
    train, test = make_pairs(facts, seed)
    for name, records in (("pairs", train), ("test", test)):
        (out / f"{name}.jsonl").write_bytes("".join(map(json_line, records)).encode())
    return {kind: len(made) for kind, made in texts.items()} | {"pairs": len(train), "test": len(test)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="all randomness comes from it (default: 0)")
    parser.add_argument("--out", type=Path, default=WORLD.parent, help="folder to write into (default: data)")
    parser.add_argument("--pages", type=int, default=PAGES, help=f"about how many pages (default: {PAGES})")
    options = parser.parse_args(argv)
    for kind, count in build(options.out, options.seed, options.pages).items():
        print(f"{kind:10} {count:7,}")


if __name__ == "__main__":
    main()
