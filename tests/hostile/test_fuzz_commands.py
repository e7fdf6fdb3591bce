"""The promise that no command, whatever its words, ends in anything but success or one clear line, with nothing left.

Every flag of every command is given values that are too large, too small, of another kind, empty, or no text at all;
and commands that would work are given damaged models and data. What a refused command leaves in its folder is compared
with what was there before. See `hostile/test_fuzz_data.py` for a long run.
"""

import argparse
import json
import random
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from hypothesis import strategies as st

from minift.checkpoint import load_model, save_model
from minift.cli.commands import make_parser
from minift.errors import InputError
from tests.helpers import small_model, soon_done
from tests.hostile import fuzzing
from tests.hostile.fuzzing import (
    EDITS,
    LINES,
    SOME_EDITS,
    Edits,
    command,
    damaged,
    fuzz,
    judged_test,  # noqa: F401  # of every test
    little_tokenizer,
    pytest_generate_tests,  # noqa: F401
    varied,
    whole_models,
)

PAIRS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)]
PAGES = [{"text": f"Page {i} says that {i} follows {i - 1}, as the capital of Mexico does not."} for i in range(40)]
# Each would work, and in a moment; {x} is a path. The last check of a training run is that --patience has --eval-every:
# with it, everything is read and made, but no step is taken.
COMMANDS = {
    "finetune": "--model {model} --data {pairs} --test {pairs} --out {out} --device cpu --steps 1 --batch-size 2"
    " --eval-every 0 --patience 1",
    "pretrain": "--config {shape} --data {pages} --tokenizer {model} --out {out} --device cpu --steps 1 --max-length 8"
    " --batch-size 2 --patience 1",
    "generate": "--model {model} --prompt Hello --max-new-tokens 1 --device cpu",
    "compare": "{model} {model} --data {pairs} --device cpu",
    "evaluate": "--model {model} --data {pairs} --device cpu",
    "explain": "Hello --model {model} --device cpu",
    "convert": "{model} {out} --to native",
    "info": "--config {shape} --device cpu",
    "tokenizer train": "--data {pages} --vocab-size 320 --out {out}",
    "tokenizer show": "Hello --model {model}",
    "data peek": "{pages}",
    "data stats": "{pages} --tokenizer {model}",
    "data format": "{pairs}",
    "data audit": "{pairs} --model {model}",
}
NOTHING_BUT_ODD = ("--workers", "--compile")  # a good value would start processes, or a compiler


@cache
def flags() -> list[tuple[str, str]]:
    """(command, flag) of all flags that there are; "" for a word without one."""
    found = []

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    walk(inner, f"{name} {word}".strip())
            elif name:
                found.extend((name, flag) for flag in action.option_strings or [""])

    walk(make_parser(), "")
    return sorted({(name, flag) for name, flag in found if name in COMMANDS and flag not in NOTHING_BUT_ODD})


# What a shell can pass on: no NUL, and bytes that are no text as halves of pairs. No "/", to stay in one folder.
WORD = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=8)
ODD_NUMBERS = (
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "3",
    "00",
    "1_0",
    "0x10",
    "٣",
    "1e3",
    "1.5",
    "-0.1",
    "0.1",
    ".5",
    "1e-320",
    "1e308",
)
ODD_NUMBERS += ("nan", "-nan", "inf", "-inf", "1e999", "2147483647", "2147483648", "-2147483649", "9" * 30, "9" * 5_000)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\t",
    "\udcff",
    "a\udc80b",
    "é",
    "\U0001f642",
    "\x1b[2J",
    "-",
    "--",
    "--help",
    "-h",
    "~",
    "*",
    "[",
    "**",
)
ODD_TEXTS += (
    ".",
    "..",
    "nowhere",
    "no/where",
    "a" * 300,
    "b" * 5_000,
    "%s",
    "{question}",
    "bundled",
    "auto",
    "true",
    "None",
)
ODD_TEXTS += (
    "/dev/null",
    "/dev/full",
    "cpu",
    "cuda",
    "float16",
    "bfloat16",
    "native",
    "hf",
    "meta",
    "llama2c",
    "llama2",
    "own.txt",
)
VALUES = st.sampled_from(ODD_NUMBERS) | st.sampled_from(ODD_NUMBERS) | st.sampled_from(ODD_TEXTS) | WORD


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that are good: a model with its tokenizer, pairs, pages, a shape."""
    place = tmp_path_factory.mktemp("commands")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = small_model(vocab_size=290, **sizes, num_key_value_heads=1, max_position_embeddings=256)
    save_model(place / "model", model, little_tokenizer())
    shutil.copy(place / "model" / "config.json", place / "shape.json")
    for name, records in (("pairs", PAIRS), ("pages", PAGES)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fill_room(place)
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models of every format."""
    return whole_models(tmp_path_factory.mktemp("models"))


def run(place: Path, words: list[str], may_fail: tuple[str, ...] = ()) -> int:
    """The exit code of a command in an empty room, which is emptied again."""
    paths = {name: str(place / f"{name}.jsonl") for name in ("pairs", "pages")}
    paths |= {"model": str(place / "model"), "shape": str(place / "shape.json"), "out": "out"}
    try:
        words = [paths.get(word[1:-1], word) if word[:1] == "{" else word for word in words]
        return command(words, place / "room", may_fail)
    finally:
        if [path.name for path in (place / "room").iterdir()] != ["own.txt"]:
            fill_room(place)


def fill_room(place: Path) -> None:
    """Where commands run: a folder with nothing but a template in it."""
    shutil.rmtree(place / "room", ignore_errors=True)
    (place / "room").mkdir()
    (place / "room" / "own.txt").write_text("Q: {question}\nA: {answer}")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_work_before_they_are_spoilt(place: Path, name: str) -> None:
    words = [*name.split(), *COMMANDS[name].split()]
    if "--patience" in words:
        words = words[: words.index("--patience")]
    assert run(place, words) == 0


@pytest.mark.parametrize("name", ["compare", "explain"])
def test_of_two_results_none_is_left_when_one_cannot_be_written(place: Path, name: str) -> None:
    assert run(place, [name, *COMMANDS[name].split(), "--html", "x.html", "--json", "no/where"]) == 2


def test_pages_in_a_file_that_is_not_utf8_are_trained_on(place: Path) -> None:
    name = shutil.copy(place / "pages.jsonl", place / "p\udcff.jsonl")
    words = COMMANDS["pretrain"].replace("{pages}", str(name)).replace(" --patience 1", "").split()
    assert run(place, ["pretrain", *words, "--out", "r\udcff"]) == 2
    assert run(place, ["pretrain", *words]) == 0


@pytest.mark.parametrize("words", ["info --config", "data stats {pairs} --tokenizer {model} --template"])
def test_a_path_that_is_not_utf8_is_read_back_from_a_result(place: Path, words: str) -> None:
    source = place / "room" / "own.txt" if "data" in words else place / "shape.json"
    name = shutil.copy(source, place / f"a\udcff{source.suffix}")
    result = place / "x.json"
    assert run(place, [*words.split(), str(name), "--json", str(result)]) == 0
    assert str(name) in json.dumps(json.loads(result.read_text()), ensure_ascii=False)


@pytest.mark.parametrize("words", ["info --model {0}", "generate --prompt Hi --model {0}", "convert {0} out --to hf"])
def test_a_model_in_a_folder_that_is_not_utf8_is_refused_as_that(place: Path, words: str) -> None:
    """Python can open its files, but the libraries that map them cannot."""
    folder = shutil.copytree(place / "model", place / "m\udcff", dirs_exist_ok=True)
    with pytest.raises(InputError, match="not UTF-8"):
        load_model(folder)
    assert run(place, [str(folder) if word == "{0}" else word for word in words.split()]) == 2
    assert run(place, ["convert", "{model}", "o\udcff", "--to", "native"]) == 2


def test_a_million_processes_are_not_started(place: Path) -> None:
    words = ["pretrain", *COMMANDS["pretrain"].split(), "--epochs", "1"]
    words.remove("--steps")
    words.remove("1")
    assert run(place, [*words, "--workers", "1000000"]) == 2


def test_pages_are_not_read_for_ever_to_fill_one_batch(place: Path) -> None:
    words = COMMANDS["pretrain"].replace(" --patience 1", "").split()
    assert run(place, ["pretrain", *words, "--batch-size", str(2**31 - 1)]) == 2


def test_a_vocabulary_larger_than_any_is_refused_at_once(place: Path) -> None:
    words = COMMANDS["tokenizer train"].replace("320", str(2**31 - 1)).split()
    with soon_done(3):
        assert run(place, ["tokenizer", "train", *words]) == 2


def test_every_command_has_flags_to_be_tried() -> None:
    assert {name for name, _ in flags()} == set(COMMANDS)
    assert len(flags()) > 130


# With which a run of one step takes no longer, whatever the value.
HARMLESS = {
    f"--{name}" for name in ("lr", "min-lr", "weight-decay", "beta1", "beta2", "clip", "seed", "schedule", "warmup")
}
HARMLESS |= {
    f"--{name}" for name in ("dtype", "loss-chunk", "pack", "no-pack", "isolate", "template", "lora-alpha", "keep")
}
# What no check of the input can know, so that the code is 1: what a machine has, and what becomes of a step.
NOT_THE_INPUT = ("out of memory", "is not finite", "infinite or NaN")


DRAWN = st.lists(st.tuples(st.integers(0, 10_000), VALUES, st.booleans()), min_size=1, max_size=2)


def make_chosen(rng: random.Random) -> list[tuple[int, str, bool]]:
    odd = (*ODD_NUMBERS, *ODD_TEXTS, str(rng.uniform(-3, 3)), str(rng.randrange(-9, 3_000)))
    return [(rng.randrange(10_000), rng.choice(odd), rng.random() < 0.5) for _ in range(rng.choice((1, 1, 2)))]


@fuzz(200, chosen=varied(DRAWN, make_chosen))
def test_odd_values_of_flags(place: Path, chosen: list[tuple[int, str, bool]]) -> None:
    """One flag, or two of the same command, behind words that would work without them."""
    number = chosen[0][0]
    name = list(COMMANDS)[number % len(COMMANDS)]
    own = [flag for other, flag in flags() if other == name]
    given = [own[number // len(COMMANDS) % len(own)] for number, *_ in chosen]
    words = [*name.split(), *COMMANDS[name].split()]
    if "--patience" in words and HARMLESS.issuperset(given):
        words = words[: words.index("--patience")]
    for flag, (_, value, joined) in zip(given, chosen, strict=True):
        words += [f"{flag}={value}"] if flag and joined else [flag, value] if flag else [value]
    run(place, words, NOT_THE_INPUT)


DATA_COMMANDS = (
    *(
        "data peek {0}",
        "data peek {0} --full -n 9",
        "data stats {0} --tokenizer {model}",
        "data stats {0} --json x.json",
    ),
    *(
        "data audit {0} --model {model}",
        "data audit {0} --model {model} --test {0} --html x.html --json x.json",
        "data format {0}",
        "data format {0} --template qa --out y.jsonl",
        "data format {0} --template auto --as-text --out y.jsonl",
    ),
    *(
        "explain --data {0} --model {model} --device cpu -n 3",
        "evaluate --model {model} --data {0} --device cpu --json x.json",
    ),
    *(
        "tokenizer train --data {0} --vocab-size 300 --out x.model",
        "compare {model} {model} --data {0} --device cpu --html x.html",
    ),
    "finetune --model {model} --data {0} --out out --device cpu --steps 1 --eval-every 0 --patience 1",
    "pretrain --config {shape} --data {0} --tokenizer {model} --out out --device cpu --steps 1 --patience 1",
)


@fuzz(150, words=st.sampled_from(DATA_COMMANDS), content=LINES, edits=SOME_EDITS)
def test_commands_on_spoilt_data(place: Path, words: str, content: bytes, edits: Edits) -> None:
    (place / "room" / "x.jsonl").write_bytes(damaged(content, edits))
    run(place, words.replace("{0}", "x.jsonl").split())


MODEL_FILES = (
    "native/model.pt",
    "native/config.json",
    "native/tokenizer.model",
    "hf/model.safetensors",
    "hf/config.json",
)
MODEL_FILES += (
    "hf/tokenizer.json",
    "meta/params.json",
    "meta/consolidated.00.pth",
    "adapter/adapter_model.safetensors",
)


@fuzz(
    100,
    name=st.sampled_from(MODEL_FILES),
    to=st.sampled_from(("native", "hf", "meta", "llama2c", "nothing")),
    use=st.sampled_from(("convert", "convert", "info", "generate")),
    edits=EDITS,
)
def test_commands_on_spoilt_models(place: Path, models: Path, name: str, to: str, use: str, edits: Edits) -> None:
    file = models / name
    model, whole = str(file.parent), file.read_bytes()
    words = {"info": ["--model", model], "generate": ["--model", model, "--prompt", "Hello", "--max-new-tokens", "1"]}
    file.write_bytes(damaged(whole, edits))
    try:
        run(place, [use, *words.get(use, [model, "out", "--to", to])])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("code", "said", "left", "found"),
    [
        (2, "minift: error: x\n", True, "left something behind"),
        (2, "minift: error: x\nminift: error: y\n", False, "error: y"),
        (2, "Traceback (most recent call last):\nminift: error: x\n", False, "Traceback"),
        (2, "", False, "^\\[\\]"),
        (1, "minift: error: x\n", False, "1"),
        (0, "minift: error: x\n", False, "error: x"),
        (3, "", False, "3"),
    ],
)
def test_the_judge_sees_a_command_that_ends_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, said: str, left: bool, found: str
) -> None:
    def main(words: list[str]) -> int:
        if left:
            Path(".out.partial").mkdir()
        sys.stderr.write(said)
        return code

    monkeypatch.setattr(fuzzing, "main", main)
    with pytest.raises(AssertionError, match=found):
        command(["convert"], tmp_path)
