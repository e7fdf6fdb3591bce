"""The promise of `cli/`: thin commands that do what their help says, on bundled and on real input.

Output is compared with what the library returns for the same arguments. That every field of `TrainConfig` is a flag is
shown by giving all of them and reading the run's settings.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import __version__, generate
from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.cli.commands import make_parser
from minift.config import CHOSEN, FINETUNE, PRETRAIN, TrainConfig
from minift.model import Llama
from minift.reference import greedy
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT, SMALL, completed, small_model, write_jsonl

COMMANDS = [
    *(
        "finetune",
        "pretrain",
        "generate",
        "chat",
        "compare",
        "evaluate",
        "explain",
        "convert",
        "info",
        "tokenizer",
        "data",
    )
]

# Each field's value here is neither its default nor that of a job, but a run of one step goes through with it.
EVERY_FLAG: dict[str, Any] = {
    "parallel": "auto",  # another value needs torchrun (test_communication.py)
    "steps": 1,
    "epochs": None,  # excludes steps; it has a test of its own
    "batch_size": 3,
    "grad_accum": 2,
    "lr": 0.003,
    "min_lr": 0.25,
    "warmup": 7,
    "warmup_ratio": None,  # excludes warmup; it has a test of its own (runs/test_defaults.py)
    "schedule": "constant",
    "max_length": 40,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.9,
    "clip": 0.5,
    "dtype": "float32",
    "device": "cpu",
    "compile": False,  # `--no-compile`; compiling takes longer than all of this file
    "checkpoint_activations": True,
    "loss_chunk": 16,
    "seed": 11,
    "pack": False,
    "isolate": True,
    "shuffle_buffer": 7,
    "workers": 1,
    "strict": True,
    "limit": 19,
    "eval_every": 5,
    "patience": 5,
    "keep_last": True,
    "max_minutes": 60.0,
    "compare": 3,
    "tensorboard": True,
    "freeze": ["*norm*"],  # excludes adapters
    "lora_rank": 2,
    "lora_alpha": 3.0,
    "lora_targets": "q_proj,down_proj",
    "lora_dropout": 0.25,
    "save_every": 9,
    "keep": 2,
    "save_format": "hf",
    "learn": "last",
    "rendered": True,
    "template": "qa",
}

LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")
NOT_OF = {
    "finetune": ("isolate", "shuffle_buffer", "workers"),
    "pretrain": ("template", "learn", "rendered", "pack", "compare", *LORA),
}


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def as_flags(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def model(small_checkpoint: Path) -> Llama:
    return load_model(small_checkpoint)


# Help -----------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from minift.cli import main\ntry: main(['--help'])\nexcept SystemExit as end: status = end.code\n"
    )
    code += "print('heavy:', sorted({'torch', 'numpy', 'sentencepiece', 'tqdm'} & set(sys.modules))); sys.exit(status)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\S", done.stdout, re.MULTILINE), command


USES = [
    ["generate", "--model", "bundled", "--prompt", "What", "--max-new-tokens", "1"],
    ["finetune", "--steps", "1", "--out", "run"],
]


@pytest.mark.parametrize("words", USES, ids=lambda words: words[0])
def test_what_one_process_does_imports_neither_the_compiler_nor_what_many_need(
    words: list[str], tmp_path: Path
) -> None:
    """Each of these takes as long to import as torch does."""
    code = f"import sys; from minift.cli import main\nstatus = main({words!r})\n"
    code += "heavy = ['torch._dynamo', 'torch._inductor', 'torch.distributed.checkpoint', 'torch.distributed.tensor']\n"
    code += "heavy += ['jinja2', 'pyarrow', 'tokenizers', 'tensorboard', 'minift.tokenizer.jinja']\n"  # of extras
    code += "print('heavy:', [name for name in heavy if name in sys.modules], 'torch' in sys.modules); sys.exit(status)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: [] True"


@pytest.mark.parametrize(
    "words", [*([command] for command in COMMANDS), ["tokenizer", "train"], ["tokenizer", "show"], ["data", "peek"]]
)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert f"usage: minift {' '.join(words)}" in capsys.readouterr().out


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of all commands that do something: not those of groups of verbs."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for inner in group.choices.values():
            yield from parsers(inner)


@pytest.mark.parametrize("parser", [*parsers(make_parser())], ids=lambda parser: parser.prog)
def test_every_option_says_what_it_does_and_every_command_has_an_example(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        assert action.help, action.dest
        assert "…" not in action.help, action.help
        assert not action.help.endswith("."), action.help
    assert parser.description
    first, _, more = parser.description.partition("\n\n")
    assert re.fullmatch(r"[A-Z].*\.", first)
    examples = [line.strip() for line in more.splitlines() if line.startswith("  ")]
    assert examples
    for example in examples:
        assert example.startswith(f"{parser.prog} ")
        make_parser().parse_args(shlex.split(example)[1:])  # each flag exists, and its value is of the right type
    assert max(map(len, parser.description.splitlines())) <= 105


@pytest.mark.parametrize(("command", "defaults"), [("finetune", FINETUNE), ("pretrain", PRETRAIN)])
def test_every_field_is_in_the_help_with_its_default(
    command: str, defaults: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(TrainConfig):
        if item.name in NOT_OF[command]:
            assert f"--{item.name.replace('_', '-')} " not in text
            continue
        assert f"--{item.name.replace('_', '-')} " in text or f"--{item.name.replace('_', '-')}," in text
        assert item.metadata["help"] in text
        default = getattr(defaults, item.name)
        if command == "finetune" and item.name in CHOSEN:
            default = "chosen from the pairs and the model"
        assert default in (None, ()) or f"{item.metadata['help']} (default: {default})" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"minift {__version__}\n"


# Training's flags -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """Return for each job the words that name its inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    pairs = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(20)]
    pages = [{"text": f"The number {i} comes after the number {i - 1}."} for i in range(50)]
    data, corpus = write_jsonl(folder / "pairs.jsonl", pairs), write_jsonl(folder / "pages.json.gz", pages)
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    return {
        "finetune": ["finetune", "--model", str(small_checkpoint), "--data", str(data)],
        "pretrain": [
            *("pretrain", "--config", str(folder / "shape.json"), "--data", str(corpus)),
            *("--tokenizer", str(small_checkpoint)),
        ],
    }


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_every_field_is_a_flag(words: dict[str, list[str]], tmp_path: Path, command: str) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    assert set(EVERY_FLAG) == {item.name for item in dataclasses.fields(TrainConfig)}
    defaults = FINETUNE if command == "finetune" else PRETRAIN
    pytest.importorskip("tensorboard")
    without = (*NOT_OF[command], "patience" if command == "pretrain" else "freeze")  # it has no held-out pages
    given = {name: value for name, value in EVERY_FLAG.items() if name not in without}
    for name, value in given.items():
        assert name in ("compile", "epochs", "parallel", "warmup_ratio") or value != getattr(defaults, name)
    assert run(*words[command], "--out", tmp_path / "out", *as_flags(given)) == 0
    train = json.loads((tmp_path / "out" / "config.json").read_text())["train"]
    assert {name: train[name] for name in given} == given
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert line["lr"] == pytest.approx(0.003 / 8)  # the first of seven steps of warm-up


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_epochs_set_the_number_of_steps(words: dict[str, list[str]], tmp_path: Path, command: str) -> None:
    flags = ["--epochs", "1.5", "--batch-size", "4", "--grad-accum", "2", "--device", "cpu", "--max-length", "32"]
    assert run(*words[command], "--out", tmp_path / "out", *flags) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["train"]
    assert (config["epochs"], config["steps"]) == (1.5, None)
    if command == "finetune":  # 18 of the 20 pairs, 5 batches an epoch, 8 batches in twos
        assert len(lines) == 4
    else:
        tokenizer = load_tokenizer(words[command][words[command].index("--tokenizer") + 1])
        texts = [f"The number {i} comes after the number {i - 1}." for i in range(50)]
        ids = sum(len(tokenizer.encode(text, eos=True)) for text in texts)
        assert len(lines) == -(-round(1.5 * ids / (4 * 32)) // 2)


# Looking --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["What is the capital of Mexico?", "Hello", "\u00e9"])
def test_generate_prints_only_the_continuation(
    small_checkpoint: Path, model: Llama, tokenizer: Tokenizer, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "--model", small_checkpoint, "--prompt", prompt, "--max-new-tokens", 20) == 0
    text = tokenizer.decode_continuation(greedy(model, tokenizer.encode(prompt), 20))
    assert capsys.readouterr().out == text.strip() + "\n"


@pytest.mark.parametrize(
    ("template", "prompt"), [("plain", ""), ("auto", ""), ("qa", "### Question:\n\n\n### Answer:")]
)
def test_generate_from_nothing(
    small_checkpoint: Path,
    model: Llama,
    tokenizer: Tokenizer,
    template: str,
    prompt: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An empty prompt gives a text that begins at BOS."""
    flags = ["--template", template, "--max-new-tokens", "8"]
    assert run("generate", "--model", small_checkpoint, "--prompt", "", *flags) == 0
    text = tokenizer.decode_continuation(greedy(model, tokenizer.encode(prompt), 8))
    assert capsys.readouterr().out == text.strip() + "\n"


@pytest.mark.parametrize(
    ("template", "prompt"), [("plain", "Name a fruit."), ("qa", "### Question:\nName a fruit.\n\n### Answer:")]
)
def test_generate_puts_the_prompt_into_a_template(
    small_checkpoint: Path,
    model: Llama,
    tokenizer: Tokenizer,
    template: str,
    prompt: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--template", template, "--max-new-tokens", "8"]
    assert run("generate", "--model", small_checkpoint, "--prompt", "Name a fruit.", *flags) == 0
    text = tokenizer.decode_continuation(greedy(model, tokenizer.encode(prompt), 8))
    assert capsys.readouterr().out == text.strip() + "\n"


def test_the_same_seed_gives_the_same_text(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*flags: str) -> str:
        words = ["generate", "--model", str(small_checkpoint), "--prompt", "Hello", "--max-new-tokens", "30"]
        assert main([*words, *flags]) == 0
        return capsys.readouterr().out

    sampled = [text("--temperature", "1", "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) == 3
    assert text("--temperature", "1", "--seed", "2", "--top-k", "1") == text()  # among the likeliest alone: greedy
    assert text("--temperature", "1", "--seed", "3", "--top-p", "1e-6") == text()


@pytest.mark.parametrize("limit", [3, 1_000])
def test_a_text_that_was_cut_is_said_to_be_on_a_terminal(
    small_checkpoint: Path, limit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nowhere else: what reads a pipe gets the text alone."""
    words = ["generate", "--model", str(small_checkpoint), "--prompt", "Hello", "--max-new-tokens", str(limit)]
    assert main(words) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == piped.out
    why = "--max-new-tokens 3" if limit == 3 else "the model's last position, 512"
    assert shown.err == f"note: stopped at {why}; the model had not ended its text\n"
    monkeypatch.setattr(generate, "sample", lambda logits, *_: torch.full(logits.shape[:1], 2))
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_a_tokenizer_is_trained_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(
        tmp_path / "pages.json.gz", [{"body": f"The capital of Mexico is Mexico City. Page {i}"} for i in range(9)]
    )
    out = tmp_path / "new" / "tokenizer.model"
    train = ["tokenizer", "train", "--data", tmp_path / "*.json.gz", "--vocab-size", 290, "--text-field", "body"]
    assert run(*train, "--out", out) == 0
    assert f"{out} (290 pieces)" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert run("tokenizer", "show", "Mexico City!", "--model", out) == 0
    *rows, summary = capsys.readouterr().out.splitlines()
    assert [int(row.split()[0]) for row in rows] == tokenizer.encode("Mexico City!")
    assert summary == f"{len(rows)} ids, 12 characters, vocabulary of 290"


@pytest.mark.parametrize("count", [1, 3, 9])
def test_peek_shows_the_first_records(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a1\nline", "n": 1}, {"text": "a2", "deep": {"k": ["\u00e9"]}}])
    write_jsonl(tmp_path / "b.json.gz", [{"text": "x" * 1000}, {"text": "b2"}])
    assert run("data", "peek", tmp_path, "-n", count) == 0
    lines = capsys.readouterr().out.splitlines()
    where = [line for line in lines if not line.startswith(" ")]
    assert where == [f"{tmp_path / name}:{i}" for name in ("a.jsonl", "b.json.gz") for i in (1, 2)][:count]
    assert lines[1:3] == ["  text: a1 / line", "  n: 1"]
    if count > 1:
        assert lines[4:6] == ["  text: a2", '  deep: {"k": ["\u00e9"]}']
        long = next(line for line in lines if "xxx" in line)
        assert len(long) < 400
        assert "more" in long or "+700" in long


def test_peek_shows_whole_texts_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "b.json.gz", [{"text": "x" * 1000}])
    assert run("data", "peek", file, "--full") == 0
    assert "x" * 1000 in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`minift data peek … | head -1` ends quietly."""
    command = f"{sys.executable} -m minift data peek data/pages -n 3000 --full | head -n 1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = completed(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=env)
    assert done.returncode == 0
    assert done.stdout.startswith("data/pages/")
    assert done.stderr == ""


# Real input -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finetune_on_lamini_docs(
    real_data: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=96, std=0.02)
    save_model(tmp_path / "model", model, tokenizer)
    flags = as_flags({"steps": 45, "batch_size": 16, "eval_every": 15, "lr": 5e-3, "max_length": 96, "device": "cpu"})
    data = real_data / "lamini_docs.jsonl"
    assert run("finetune", "--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out", *flags) == 0
    shown = capsys.readouterr().out
    assert "template carried" in shown
    patterns = (r"([\d,]+) pairs to train on", r"(\d+) dropped", r"(\d+) pairs held out")
    trained, dropped, held_out = (
        int(found[1].replace(",", "")) for pattern in patterns if (found := re.search(pattern, shown))
    )
    assert trained + dropped + held_out == 1_400
    assert held_out == 140

    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    questions = [json.loads(line)["question"].rstrip() for line in data.read_text(encoding="utf-8").splitlines()]
    assert len(result["samples"]) + result["skipped"] == 140
    assert {sample["question"] for sample in result["samples"]} <= set(questions)
    assert all(sample["question"].endswith("### Answer:") for sample in result["samples"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(validation) == 3
    assert validation == sorted(validation, reverse=True)
    assert validation[-1] < lines[0]["loss"] - 1
    assert result["after"]["perplexity"] < result["before"]["perplexity"] / 2


@pytest.mark.slow
def test_pretrain_stories15m_with_llamas_tokenizer(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", 3, "--batch-size", 2, "--max-length", 64, "--device", "cpu", "--out", tmp_path / "out"]
    inputs = ["--tokenizer", real_data / "tokenizer.model", "--data", ROOT / "data" / "pages" / "*.json.gz"]
    assert run("pretrain", "--config", "stories15m", *inputs, *flags) == 0
    # 32,000 × 288 (tied) + 6 layers of 4 × 288² + 3 × 288 × 768 + 2 × 288, + 288
    assert "15,191,712 parameters" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(
        torch.tensor(32_000.0).log().item(), abs=0.3
    )  # the loss of a uniform distribution
    assert lines[0]["tokens"] == 2 * 64
    model = load_model(tmp_path / "out" / "final")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (288, 6, 6)
    assert (config.intermediate_size, config.vocab_size) == (768, 32_000)
    assert (
        load_tokenizer(tmp_path / "out" / "final").files["tokenizer.model"]
        == (real_data / "tokenizer.model").read_bytes()
    )
