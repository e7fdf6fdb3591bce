"""The promise to a terminal: what data, models and names say is shown, and never obeyed.

Every command is run on data, names and a model's words that are full of what a terminal would obey: ESC, BEL, the
control characters above 127, and marks that turn the direction of a line. The bytes of standard output and standard
error are read. Only `generate` and `chat` write such bytes, a model's own words, and only where no terminal is.
"""

import json
import os
import pty
import re
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minift.checkpoint import save_model
from minift.cli.commands import make_parser
from minift.errors import printable
from minift.tokenizer.base import Tokenizer
from tests.helpers import IMPORTED_BY_RUNS, ROOT, small_model, write_jsonl

EVIL = "\x1b[31m\x07\x9b\u202e"  # each of its bytes once: a model can say it by the last byte alone
MORE = f"{EVIL}\x1b]0;title\x07\x9d0;t\x9c\r\x08\x7f\u2066\u2069\u200e\u200f\u202a\u202b\u202c\u202d\u2067\u2068"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
BAR = re.compile("\r(?=[^\r\n]*(\r|\n|$))")  # a progress bar is drawn again

# What says no such text: numbers alone, names of bytes, and a model's own words in a pipe.
WITHOUT = ("evaluate pages", "evaluate choices", "tokenizer show", "generate", "chat")

# Run each command in a child of one process, which has imported what they need.
DRIVER = f"""
import importlib, json, os, sys
for name in {IMPORTED_BY_RUNS[2:4]!r}:
    importlib.import_module(name)
from minift.cli import main
commands, folder = json.load(open(sys.argv[1])), sys.argv[2]
for name, words in commands.items():
    if (child := os.fork()) == 0:
        os.dup2(os.open(sys.argv[3], os.O_RDONLY), 0)
        for number, title in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{folder}}/{{name}}.{{title}}", os.O_WRONLY | os.O_CREAT), number)
        code = 1
        try:
            code = main(words)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def model_that_says(text: str, folder: Path, tokenizer: Tokenizer) -> Path:
    """Save a model that says a text again and again. No piece of the text may be in it twice."""
    ids = tokenizer.encode_continuation(text)
    assert len(set(ids)) == len(ids)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, std=0.02, **shape)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(ids) + 1, 64, generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # so that a position's logits depend on its own token alone
        model.embed_tokens.weight[:] = vectors[-1]
        model.lm_head.weight.zero_()
        for place, id in enumerate(ids):
            model.embed_tokens.weight[id] = vectors[place]
            model.lm_head.weight[id] += vectors[(place or len(ids)) - 1]  # the first one comes after the last
        model.lm_head.weight[ids[0]] += vectors[-1]
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Make a folder with models, data and templates under names full of what is obeyed."""
    folder = tmp_path_factory.mktemp("terminal") / f"a{EVIL}b"
    folder.mkdir()
    for name in ("one", "two"):
        model_that_says(EVIL, folder / f"{name}{EVIL}", tokenizer)
    pairs = [{"question": f"Who{MORE} is {i}?", "answer": f"{i}{MORE}", f"note{MORE}": MORE} for i in range(24)]
    write_jsonl(folder / f"pairs{EVIL}.jsonl", [*pairs, {"question": "Q", f"key{MORE}": 1}])
    write_jsonl(folder / "good.jsonl", pairs)
    roles = [{"role": "user", "content": MORE}, {"role": "assistant", "content": MORE}]
    write_jsonl(folder / "chats.jsonl", [{"messages": [{"role": "system", "content": MORE}, *roles, *roles]}] * 12)
    write_jsonl(folder / f"pages{EVIL}.jsonl", [{"text": f"{i} {MORE} " * 9, MORE: i} for i in range(60)])
    choices = [{"question": MORE, "choices": [f"a{MORE}", f"b{MORE}"], "answer": 0}] * 3
    write_jsonl(folder / f"choices{EVIL}.jsonl", choices)
    (folder / f"t{EVIL}.txt").write_text(f"{{system}}{MORE}{{question}}{MORE}\n{{answer}}", encoding="utf-8")
    (folder / f"t{EVIL}.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}\x1b{% endfor %}", encoding="utf-8"
    )
    return folder


def commands(place: Path) -> dict[str, list[str]]:
    """Return the words of the commands, by a name that begins with theirs."""
    one, two = (str(place / f"{name}{EVIL}") for name in ("one", "two"))
    pairs, pages, choices = (str(place / f"{name}{EVIL}.jsonl") for name in ("pairs", "pages", "choices"))
    good, chats, template, jinja = (
        str(place / name) for name in ("good.jsonl", "chats.jsonl", f"t{EVIL}.txt", f"t{EVIL}.jinja")
    )
    run = ["--steps", "1", "--lr", "1e-9", "--device", "cpu", "--dtype", "float32"]
    held_out = ["--model", one, "--data", good]
    return {
        "finetune": ["finetune", *held_out, "--test", good, *run, "--out", str(place / f"run{EVIL}")],
        "refused finetune": ["finetune", "--model", one, "--data", *[pairs] * 2, *run, "--out", str(place / "no")],
        "pretrain": [
            *("pretrain", "--config", f"{one}/config.json", "--tokenizer", one, "--data", pages),
            *(*run, "--max-length", "64", "--out", str(place / f"pretrained{EVIL}")),
        ],
        "generate": ["generate", "--model", one, "--prompt", f"{MORE}?", "--max-new-tokens", "40"],
        "chat": ["chat", "--model", one, "--max-new-tokens", "40"],
        "compare": ["compare", one, two, "--data", good, "--html", str(place / f"page{EVIL}.html")],
        "compare chats": ["compare", one, two, "--data", chats, "--template", template],
        "evaluate": ["evaluate", *held_out, "--mistakes", "3"],
        "evaluate pages": ["evaluate", "--model", one, "--data", pages],
        "evaluate choices": ["evaluate", "--model", one, "--data", choices],
        "explain": ["explain", MORE, "--model", one],
        "explain two": ["explain", MORE, "--answer", MORE, "--model", one, "--against", two],
        "explain data": ["explain", "--model", one, "--data", good],
        "convert": ["convert", one, str(place / f"converted{EVIL}"), "--to", "meta"],
        "info": ["info", "--model", one],
        "tokenizer train": [
            *("tokenizer", "train", "--data", pages, "--vocab-size", "300"),
            *("--out", str(place / f"new{EVIL}.model")),
        ],
        "tokenizer show": ["tokenizer", "show", MORE, "--model", one],
        "tokenizer templates": ["tokenizer", "templates", jinja],
        "data peek": ["data", "peek", good],
        "data peek full": ["data", "peek", pages, "--full"],
        "data stats": ["data", "stats", pairs],
        "data format": ["data", "format", good, "-n", "2"],
        "data format out": ["data", "format", good, "--out", str(place / f"formatted{EVIL}.jsonl")],
        "data audit": ["data", "audit", good, "--model", one],
        # Refusals, which end with exit code 2.
        "refused name": ["info", "--model", str(place / f"none{EVIL}")],
        "refused record": ["explain", "--model", one, "--data", pairs, "-n", "25"],
        "refused flag": ["generate", f"--{MORE}"],
        "refused command": [MORE],
        "refused template": ["data", "format", good, "--template", MORE],
    }


@pytest.fixture(scope="module")
def printed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Run all commands. Return the exit code, the standard output and the standard error of each."""
    folder = tmp_path_factory.mktemp("printed")
    words, asked = folder / "words.json", folder / "asked.txt"
    words.write_text(json.dumps(commands(place)))
    asked.write_bytes(f"{MORE.replace(chr(13), '')}?\n/evil\n/exit\n".encode())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    driver = [sys.executable, "-c", DRIVER, str(words), str(folder), str(asked)]
    done = subprocess.run(driver, env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    codes = {name: int(code) for name, code in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}
    assert codes.keys() == commands(place).keys(), done.stderr
    return {
        name: (code, *((folder / f"{name}.{title}").read_bytes().decode() for title in ("out", "err")))
        for name, code in codes.items()
    }


@pytest.mark.parametrize("name", commands(Path("/")))
def test_nothing_that_is_printed_is_obeyed(printed: dict[str, tuple[int, str, str]], name: str) -> None:
    code, out, err = printed[name]
    assert code == (2 if name.startswith("refused") else 0), err
    if name not in ("generate", "chat"):
        assert OBEYED.findall(out) == []
    assert OBEYED.findall(BAR.sub("", err)) == []
    if name not in WITHOUT:
        assert "\\x1b" in out + err


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_pipe_gets_the_models_words_as_they_are(printed: dict[str, tuple[int, str, str]], name: str) -> None:
    assert EVIL * 3 in printed[name][1]


def test_a_colour_is_all_that_a_table_says_to_a_terminal(place: Path, minift: object) -> None:
    words = commands(place)["explain two"]
    done = minift(*words, "--colour", "always")  # type: ignore[operator]
    assert done.returncode == 0
    coloured = re.sub("\x1b\\[(2|31|32|33|0)m", "", done.stdout)
    assert coloured != done.stdout
    assert OBEYED.findall(coloured) == []


def test_a_terminal_gets_the_models_words_spelled_out(place: Path) -> None:
    ours, terminal = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minift", *commands(place)["generate"]]
    process = subprocess.Popen(command, env=env, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the process has closed the terminal
        pass
    assert process.wait(60) == 0
    text = shown.decode().replace("\r\n", "\n")
    assert OBEYED.findall(text) == []
    assert printable(EVIL) * 3 in text


def test_every_command_is_run() -> None:
    def verbs(parser: ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[str]:
        groups = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
        for group in groups:
            for name, command in group.choices.items():
                yield from verbs(command, (*path, name))
        if not groups:
            yield " ".join(path)

    assert set(verbs(make_parser())) <= commands(Path("/")).keys()


def test_what_joins_letters_stays() -> None:
    """The parts of an emoji, of a Persian word, tabs, lines, and letters that this Python may not know yet."""
    kept = "👩\u200d👩\u200d👧 \u0645\u06cc\u200c\u062e \t\n é 日本 \ufe0f \ue000 \U0001fae9 ­"
    assert printable(kept) == kept
    assert printable("a\x00\r\x1b\x9b\u202e\u2066\u200f") == "a\\x00\\r\\x1b\\x9b\\u202e\\u2066\\u200f"
    for code in range(0x110000):  # no control character, mark of direction or separator of lines is left
        if OBEYED.match(chr(code)):
            assert printable(chr(code)) != chr(code)
