"""The promise that wrong input is never a traceback and never a silent default: exit code 2, and one line.

Each command is given one wrong input. It must return 2, print exactly one line on stderr, name the fault there, and
write nothing to `--out`. The numbers' bounds are written here once more, apart from `config.py`, and a field without an
entry fails.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from minift.checkpoint import save_model
from minift.cli import main
from minift.config import TrainConfig
from minift.tokenizer.base import Tokenizer
from tests.helpers import SMALL, small_model, write_jsonl

GOOD = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(12)]
PAGES = [{"text": f"Page {i} says that the number {i} follows the number {i - 1}."} for i in range(60)]

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Return a function that checks that a command is refused in one line and writes nothing, and returns the line."""

    def run(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 2
        stderr = capfd.readouterr().err
        assert len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith("minift: error: ")
        assert "Traceback" not in stderr
        assert not (tmp_path / "out").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return stderr

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", GOOD)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pages.jsonl", PAGES)


@pytest.fixture
def shape(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Return a config.json for pretraining with the bundled tokenizer."""
    (tmp_path / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    return tmp_path / "shape.json"


@pytest.fixture
def finetune(small_checkpoint: Path, pairs: Path, tmp_path: Path) -> list[str | Path]:
    """Return a command that would work; words that are added override it."""
    common: list[str | Path] = ["--out", tmp_path / "out", "--device", "cpu", "--steps", "1"]
    return ["finetune", "--model", small_checkpoint, "--data", pairs, *common]


@pytest.fixture
def pretrain(shape: Path, pages: Path, tokenizer: Tokenizer, tmp_path: Path) -> list[str | Path]:
    """Return a command that would work; words that are added override it."""
    tokenizer.save(tmp_path)
    common: list[str | Path] = ["--out", tmp_path / "out", "--device", "cpu", "--steps", "1", "--max-length", "32"]
    return ["pretrain", "--config", shape, "--data", pages, "--tokenizer", tmp_path / "tokenizer.model", *common]


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_the_commands_work_before_they_are_spoiled(
    request: pytest.FixtureRequest, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, request.getfixturevalue(command)), "--batch-size", "2"]) == 0
    assert (tmp_path / "out" / "final" / "model.pt").is_file()
    capsys.readouterr()


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--data", "--test"])
def test_a_missing_file_of_pairs(refuse: Refuse, finetune: list[str | Path], tmp_path: Path, flag: str) -> None:
    assert "nowhere.jsonl" in refuse(*finetune, flag, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("flag", ["--data", "--validation", "--tokenizer", "--config"])
def test_a_missing_file_of_pretraining(refuse: Refuse, pretrain: list[str | Path], tmp_path: Path, flag: str) -> None:
    assert "nowhere.json" in refuse(*pretrain, flag, tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "--model", "{}"],
        ["evaluate", "--model", "{}", "--data", "{pairs}"],
        ["evaluate", "--model", "{model}", "--data", "{}.jsonl"],
        ["compare", "{}", "{model}", "--data", "{pairs}"],
        ["compare", "{model}", "{}", "--data", "{pairs}"],
        ["compare", "{model}", "{model}", "--data", "{}.jsonl"],
        ["generate", "--model", "{}", "--prompt", "Hello"],
        ["data", "peek", "{}"],
        ["tokenizer", "show", "text", "--model", "{}"],
        ["tokenizer", "train", "--data", "{}.jsonl", "--vocab-size", "300", "--out", "{out}"],
    ],
    ids=" ".join,
)
def test_a_missing_file_of_any_command(
    refuse: Refuse, small_checkpoint: Path, pairs: Path, tmp_path: Path, words: list[str]
) -> None:
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    if words[0] == "finetune":
        words = [*words, "--data", "{pairs}", "--out", "{out}"]
    assert "nowhere" in refuse(*(w.format(missing, model=small_checkpoint, pairs=pairs, out=out) for w in words))


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        (b'{"question": "cut', "not valid JSON"),
        (b'{"question": "caf\xe9", "answer": "a"}', "not UTF-8"),
        (b'["question", "answer"]', "list"),
        (b'{"q": "What?", "a": "That."}', "question"),
        (b'{"question": "What?"}', "answer"),
        (b'{"question": "", "answer": "That."}', "question"),
        (b'{"question": "What?", "answer": 7}', "answer"),
        (b'{"question": "What?", "answer": "half \\ud83d of a pair"}', "surrogate"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("flag", ["--data", "--test"])
def test_a_bad_record_of_pairs(
    refuse: Refuse, finetune: list[str | Path], tmp_path: Path, line: bytes, culprit: str, number: int, flag: str
) -> None:
    file = write_jsonl(tmp_path / "bad.jsonl", [*GOOD[: number - 1], line])
    message = refuse(*finetune, flag, file)
    assert f"{file}:{number}: " in message
    assert culprit in message


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"content": "other field"}', "'text'"),
        (b'{"text": 7}', "'text'"),
        (b'{"text": "half \\ud83d of a pair"}', "surrogate"),
    ],
)
@pytest.mark.parametrize(
    ("number", "more"), [(1, []), (3, ["--epochs", "1"]), (1, ["--epochs", "1"])], ids=["first", "third", "counted"]
)
def test_a_bad_page(
    refuse: Refuse, pretrain: list[str | Path], tmp_path: Path, line: bytes, culprit: str, number: int, more: list[str]
) -> None:
    """The first page is always read before anything is written; with --epochs, all pages are."""
    file = write_jsonl(tmp_path / "bad.jsonl", [*PAGES[: number - 1], line])
    words = [word for word in pretrain if word not in ("--steps", "1")] if more else pretrain
    message = refuse(*words, "--data", file, *more)
    assert f"{file}:{number}: " in message
    assert culprit in message


def test_a_bad_page_in_the_middle_of_a_strict_run(
    pretrain: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found only when the run reaches it: then, too, the last line names it and the code is 2."""
    file = write_jsonl(tmp_path / "bad.jsonl", [*PAGES, b"{oops"])
    flags = ["--steps", "100", "--batch-size", "2", "--strict", "--shuffle-buffer", "0"]
    assert main([str(word) for word in [*pretrain, "--data", file, *flags]]) == 2
    stderr = capsys.readouterr().err
    assert re.search(rf"^minift: error: {file}:{len(PAGES) + 1}: not valid JSON", stderr.splitlines()[-1])
    assert "Traceback" not in stderr
    taken = (tmp_path / "out" / "metrics.jsonl").read_text().count("\n")
    assert taken > 2
    assert (tmp_path / "out" / f"step_{taken:06d}").is_dir()  # the steps before it are not lost


def test_a_run_goes_on_where_a_bad_page_ended_it(pretrain: list[str | Path], tmp_path: Path) -> None:
    """The micro-batches of the window with the bad page are drawn again, once the page may be skipped."""
    pages = [{"text": f"Page {i} is about {i}."} for i in range(300)]
    flags = ["--steps", "12", "--batch-size", "1", "--grad-accum", "3", "--max-length", "7", "--device", "cpu"]
    flags += ["--shuffle-buffer", "0"]

    def losses(out: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]

    for place in range(11, 17):
        file = write_jsonl(tmp_path / f"bad{place}.jsonl", [*pages[:place], b"{oops", *pages[place:]])
        words = [*pretrain, *flags, "--data", file]
        whole, out = tmp_path / f"whole{place}", tmp_path / f"run{place}"
        assert main([str(word) for word in [*words, "--out", whole]]) == 0
        assert len(losses(whole)) == 12
        assert main([str(word) for word in [*words, "--out", out, "--strict"]]) == 2
        assert 0 < len(losses(out)) < 12
        assert main(["pretrain", "--resume", "--no-strict", "--out", str(out)]) == 0
        assert losses(out) == losses(whole)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_set(
    refuse: Refuse, finetune: list[str | Path], pretrain: list[str | Path], tmp_path: Path, content: bytes
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(content)
    assert "empty.jsonl" in refuse(*finetune, "--data", empty)
    assert "empty.jsonl" in refuse(*finetune, "--test", empty)
    assert "empty.jsonl" in refuse(*pretrain, "--data", empty)
    assert "empty.jsonl" in refuse(*pretrain, "--validation", empty)
    assert "empty.jsonl" in refuse("evaluate", "--model", finetune[2], "--data", empty)
    assert "empty.jsonl" in refuse("compare", finetune[2], finetune[2], "--data", empty)
    assert "empty.jsonl" in refuse("data", "peek", empty)
    train = ["tokenizer", "train", "--data", empty, "--vocab-size", "300", "--out", tmp_path / "out"]
    assert "empty.jsonl" in refuse(*train)


def test_an_empty_folder(refuse: Refuse, finetune: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "nothing in it").mkdir()
    assert "nothing in it" in refuse(*finetune, "--data", tmp_path / "nothing in it")


def test_a_single_pair_cannot_be_split(refuse: Refuse, finetune: list[str | Path], tmp_path: Path) -> None:
    assert "one.jsonl:1" in refuse(*finetune, "--data", write_jsonl(tmp_path / "one.jsonl", GOOD[:1]))


def test_no_pair_that_fits(refuse: Refuse, finetune: list[str | Path]) -> None:
    assert "max_length 2" in refuse(*finetune, "--max-length", "2")


def test_too_little_text_to_validate_on(refuse: Refuse, pretrain: list[str | Path], tmp_path: Path) -> None:
    assert "short.jsonl" in refuse(*pretrain, "--validation", write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}]))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ([], "COMMAND"),
        (["fintune"], "fintune"),
        (["finetune", "--frobnicate"], "--frobnicate"),
        (["finetune", "--step", "3"], "--step"),  # no abbreviations: they would change meaning with new flags
        (["finetune", "--lr"], "--lr"),
        (["finetune", "stray"], "stray"),
        (["pretrain", "--unknown", "3"], "--unknown"),
        (["generate", "--prompt", "x"], "--model"),
        (["generate", "--model", "bundled"], "--prompt"),
        (["evaluate", "--model", "bundled"], "--data"),
        (["compare", "bundled"], "AFTER"),
        (["tokenizer"], "VERB"),
        (["tokenizer", "learn"], "learn"),
        (["tokenizer", "train", "--vocab-size", "300", "--out", "out"], "--data"),
        (["data"], "VERB"),
        (["data", "peak", "x.jsonl"], "peak"),
    ],
)
def test_an_unknown_or_missing_word(refuse: Refuse, words: list[str], culprit: str) -> None:
    assert culprit in refuse(*words)


def test_an_unknown_flag_of_training(refuse: Refuse, finetune: list[str | Path], pretrain: list[str | Path]) -> None:
    assert "--learning-rate" in refuse(*finetune, "--learning-rate", "0.1")
    assert "--learning-rate" in refuse(*pretrain, "--learning-rate", "0.1")


def test_an_unknown_preset(refuse: Refuse, pretrain: list[str | Path]) -> None:
    message = refuse(*pretrain, "--config", "stories15b")
    assert "unknown preset 'stories15b'" in message
    assert "stories15m" in message


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ('{"n_layers": 2}', "unknown key 'n_layers'"),
        ('{"hidden_size": "wide"}', "hidden_size is 'wide'"),
        ('{"hidden_size": 24}', "key 'intermediate_size' is missing"),
        ('{"hidden_size": -24}', "hidden_size is -24"),
        ("[]", "holds list"),
        ('{\n"hidden_size": }', "shape.json:2: not valid JSON"),
    ],
)
def test_a_bad_shape(refuse: Refuse, pretrain: list[str | Path], shape: Path, content: str, culprit: str) -> None:
    shape.write_text(content)
    message = refuse(*pretrain)
    assert "shape.json" in message
    assert culprit in message


@pytest.mark.parametrize("command", ["finetune", "compare", "evaluate", "generate"])
def test_an_unknown_template(refuse: Refuse, finetune: list[str | Path], pairs: Path, command: str) -> None:
    words: dict[str, list[str | Path]] = {
        "finetune": finetune,
        "compare": ["compare", finetune[2], finetune[2], "--data", pairs],
        "evaluate": ["evaluate", "--model", finetune[2], "--data", pairs],
        "generate": ["generate", "--model", finetune[2], "--prompt", "Hello"],
    }
    message = refuse(*words[command], "--template", "vicuna")
    assert "unknown template 'vicuna'" in message
    assert "alpaca" in message


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
@pytest.mark.parametrize("flag", ["--dtype", "--device", "--schedule"])
def test_an_unknown_choice(request: pytest.FixtureRequest, refuse: Refuse, command: str, flag: str) -> None:
    message = refuse(*request.getfixturevalue(command), flag, "quantum")
    assert flag.removeprefix("--") in message
    assert "'quantum'" in message


def test_pretraining_needs_its_inputs(refuse: Refuse, pretrain: list[str | Path]) -> None:
    for flag in ("--config", "--data", "--tokenizer"):
        at = pretrain.index(flag)
        assert flag in refuse(*pretrain[:at], *pretrain[at + 2 :])


# Numbers --------------------------------------------------------------------------------------------------------------

HUGE = "9" * 30
BAD = {
    "steps": ["0", "-1"],
    "epochs": ["0", "-0.5"],
    "batch_size": ["0", "-1"],
    "grad_accum": ["0", "-1"],
    "lr": ["0", "-0.1"],
    "min_lr": ["-0.1", "1.5"],
    "warmup": ["-1"],
    "warmup_ratio": ["-0.1", "1.5"],
    "max_length": ["1", "0", "-1"],
    "weight_decay": ["-0.1"],
    "beta1": ["-0.1", "1"],
    "beta2": ["-0.1", "1"],
    "clip": ["-1"],
    "loss_chunk": ["0", "-1"],
    "seed": ["-1", HUGE],
    "limit": ["0", "-1"],
    "eval_every": ["-1"],
    "save_every": ["-1"],
    "keep": ["-1"],
    "compare": ["-1"],
    "max_minutes": ["0", "-1"],
    "patience": ["-1"],
    "lora_rank": ["-1"],
    "lora_alpha": ["0", "-1"],
    "lora_dropout": ["-0.1"],
    "shuffle_buffer": ["-1"],
    "workers": ["-1"],
}


def numbers() -> dict[str, type]:
    """Return the numeric fields of TrainConfig and their types."""
    hints = get_type_hints(TrainConfig)
    kinds = {
        item.name: (get_args(hints[item.name]) or (hints[item.name],))[0] for item in dataclasses.fields(TrainConfig)
    }
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}


def bad_values() -> list[tuple[str, str]]:
    common = {
        int: ["text", "", "nan", "inf", "1.5", "1e3", "9" * 400],
        float: ["text", "", "nan", "inf", "-inf", "1e999"],
    }
    return [(name, value) for name, kind in numbers().items() for value in [*BAD.get(name, []), *common[kind]]]


def test_every_number_of_training_is_tried() -> None:
    assert set(BAD) == set(numbers())


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        (command, *bad)
        for command in ("finetune", "pretrain")
        for bad in bad_values()
        if (command, bad[0]) not in [("finetune", "shuffle_buffer"), ("finetune", "workers")]  # those are for pages
        and not (command == "pretrain" and bad[0].startswith(("lora_", "compare")))  # those are for pairs
    ],
)
def test_a_bad_number_of_training(
    request: pytest.FixtureRequest, refuse: Refuse, command: str, name: str, value: str
) -> None:
    words = list(request.getfixturevalue(command))
    at = words.index("--steps")
    message = refuse(*words[:at], *words[at + 2 :], f"--{name.replace('_', '-')}={value}")
    assert re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", message)
    if value:
        try:
            shown = str(numbers()[name](value))
        except ValueError:
            shown = value
        assert shown in message


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    [
        (["generate", "--model", "{model}", "--prompt", "Hello"], "--max-new-tokens", ["0", "-1", "text", "nan"]),
        (["generate", "--model", "{model}", "--prompt", "Hello"], "--temperature", ["-1", "nan", "inf", "text"]),
        (["generate", "--model", "{model}", "--prompt", "Hello"], "--top-k", ["-1", "text", "1.5"]),
        (["generate", "--model", "{model}", "--prompt", "Hello"], "--top-p", ["0", "-1", "1.5", "nan", "text"]),
        (["generate", "--model", "{model}", "--prompt", "Hello"], "--seed", ["-1", "text", HUGE]),
        (["evaluate", "--model", "{model}", "--data", "{pages}"], "--max-length", ["0", "-1", "text", "nan"]),
        (["compare", "{model}", "{model}", "--data", "{pairs}"], "--show", ["-1", "text"]),
        (["data", "peek", "{pages}"], "-n", ["0", "-1", "text", "1.5"]),
        (
            ["tokenizer", "train", "--data", "{pages}", "--out", "{out}"],
            "--vocab-size",
            ["0", "-1", "100", "99999", "text", HUGE],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_number_of_the_other_commands(
    refuse: Refuse,
    small_checkpoint: Path,
    pairs: Path,
    pages: Path,
    tmp_path: Path,
    words: list[str],
    flag: str,
    values: list[str],
) -> None:
    paths = {"model": small_checkpoint, "pairs": pairs, "pages": pages, "out": tmp_path / "out"}
    for value in values:
        message = refuse(*(word.format(**paths) for word in words), flag, value)
        assert re.search(rf"{flag}\b|\b{flag.strip('-').replace('-', '_')}\b|pieces", message), message
        assert value in message or str(float(value)) in message


def test_steps_and_epochs_exclude_each_other(refuse: Refuse, finetune: list[str | Path]) -> None:
    message = refuse(*finetune, "--epochs", "2")
    assert "--steps" in message
    assert "--epochs" in message


def test_rows_longer_than_the_model_has_positions(refuse: Refuse, pretrain: list[str | Path]) -> None:
    assert "max_length 65" in refuse(*pretrain, "--max-length", "65")


def test_a_prompt_longer_than_the_model_has_positions(refuse: Refuse, small_checkpoint: Path) -> None:
    message = refuse("generate", "--model", small_checkpoint, "--prompt", "word " * 600)
    assert "512 positions" in message


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_float16_on_a_cpu_is_refused_with_a_reason(
    request: pytest.FixtureRequest, refuse: Refuse, command: str
) -> None:
    message = refuse(*request.getfixturevalue(command), "--dtype", "float16")
    assert "float16" in message
    assert "bfloat16" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["finetune", "pretrain", "generate"])
def test_a_gpu_that_is_not_there(
    request: pytest.FixtureRequest, refuse: Refuse, small_checkpoint: Path, command: str
) -> None:
    words = ["generate", "--model", small_checkpoint, "--prompt", "Hello"]
    words = words if command == "generate" else request.getfixturevalue(command)
    assert "cuda" in refuse(*words, "--device", "cuda")


# Models and tokenizers ------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit_the_vocabulary(
    refuse: Refuse, finetune: list[str | Path], pairs: Path, pages: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    save_model(tmp_path / "unfit", small_model(), tokenizer)
    unfit, fit = tmp_path / "unfit", finetune[2]
    for words in (
        [*finetune, "--model", unfit],
        ["generate", "--model", unfit, "--prompt", "Hello"],
        ["evaluate", "--model", unfit, "--data", pairs],
        ["evaluate", "--model", unfit, "--data", pages],
        ["compare", unfit, fit, "--data", pairs],
        ["compare", fit, unfit, "--data", pairs],
    ):
        message = refuse(*words)
        assert str(tokenizer.vocab_size) in message, words
        assert str(SMALL["vocab_size"]) in message, words


def test_a_preset_that_does_not_fit_the_tokenizer(
    refuse: Refuse, pretrain: list[str | Path], tokenizer: Tokenizer
) -> None:
    message = refuse(*pretrain, "--config", "stories15m")
    assert str(tokenizer.vocab_size) in message
    assert "32000" in message


def test_control_ids_that_do_not_fit(refuse: Refuse, pretrain: list[str | Path], shape: Path) -> None:
    shape.write_text(json.dumps({**json.loads(shape.read_text()), "eos_token_id": 3}))
    assert "eos_token_id is 3" in refuse(*pretrain)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.pt", b"junk"), ("tokenizer.model", b"junk"), ("config.json", b"{"), ("config.json", b"{}")],
)
def test_a_damaged_model_folder(
    refuse: Refuse, finetune: list[str | Path], pairs: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(finetune[2], damaged)
    (damaged / name).write_bytes(content)
    assert name in refuse(*finetune, "--model", damaged)
    assert name in refuse("generate", "--model", damaged, "--prompt", "Hello")
    assert name in refuse("evaluate", "--model", damaged, "--data", pairs)


# Folders and resuming -------------------------------------------------------------------------------------------------


def run_of(words: list[str | Path], capfd: pytest.CaptureFixture[str], out: Path) -> dict[str, bytes]:
    """Make a run in `out`; return its files."""
    assert main([str(word) for word in [*words, "--out", out, "--batch-size", "2"]]) == 0
    capfd.readouterr()
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_folder_that_holds_a_run(
    request: pytest.FixtureRequest, refuse: Refuse, capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    words, taken = request.getfixturevalue(command), tmp_path / "taken"
    files = run_of(words, capfd, taken)
    message = refuse(*words, "--out", taken)
    assert "taken" in message
    assert "--resume" in message
    assert {str(file.relative_to(taken)): file.read_bytes() for file in taken.rglob("*") if file.is_file()} == files


def test_a_folder_that_holds_something_else(refuse: Refuse, finetune: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("the only copy")
    assert "taken" in refuse(*finetune, "--out", tmp_path / "taken")
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_an_out_that_is_a_file(request: pytest.FixtureRequest, refuse: Refuse, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("the only copy")
    words = request.getfixturevalue(command)
    assert "file" in refuse(*words, "--out", tmp_path / "file")
    assert "file" in refuse(*words, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "the only copy"


def test_a_tokenizer_is_not_overwritten(refuse: Refuse, pages: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("the only copy")
    train = ["tokenizer", "train", "--data", pages, "--vocab-size", "300", "--out", tmp_path / "taken"]
    assert "taken" in refuse(*train)
    assert (tmp_path / "taken").read_text() == "the only copy"


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
@pytest.mark.parametrize("there", [True, False])
def test_resuming_where_no_run_is(refuse: Refuse, tmp_path: Path, command: str, there: bool) -> None:
    if there:
        (tmp_path / "empty").mkdir()
    message = refuse(command, "--resume", "--out", tmp_path / "empty")
    assert "empty" in message
    assert "no run" in message
    assert (tmp_path / "empty").exists() == there


@pytest.mark.parametrize(
    ("command", "flags", "culprit"),
    [
        ("finetune", ["--lr", "0.5"], "--lr is 0.5"),
        ("finetune", ["--steps", "7"], "--steps is 7"),
        ("finetune", ["--epochs", "7"], "--epochs is 7"),
        ("finetune", ["--seed", "3"], "--seed is 3"),
        ("finetune", ["--compile"], "--compile is True"),
        ("finetune", ["--template", "qa"], "--template is qa"),
        ("finetune", ["--model", "bundled"], "--model is "),
        ("finetune", ["--data", "other.jsonl"], "--data is "),
        ("finetune", ["--test", "other.jsonl"], "--test is "),
        ("pretrain", ["--grad-accum", "2"], "--grad-accum is 2"),
        ("pretrain", ["--config", "stories15m"], "--config is stories15m"),
        ("pretrain", ["--tokenizer", "other.model"], "--tokenizer is other.model"),
        ("pretrain", ["--validation", "other.jsonl"], "--validation is "),
        ("pretrain", ["--text-field", "content"], "--text-field is content"),
    ],
)
def test_resuming_with_a_flag_that_says_otherwise(
    request: pytest.FixtureRequest,
    refuse: Refuse,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    flags: list[str],
    culprit: str,
) -> None:
    run = tmp_path / "run"
    files = run_of(request.getfixturevalue(command), capfd, run)
    message = refuse(command, "--resume", "--out", run, *flags)
    assert culprit in message
    assert "run" in message
    assert {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()} == files


def test_resuming_a_run_of_the_other_kind(
    refuse: Refuse, capfd: pytest.CaptureFixture[str], finetune: list[str | Path], tmp_path: Path
) -> None:
    run_of(finetune, capfd, tmp_path / "run")
    message = refuse("pretrain", "--resume", "--out", tmp_path / "run")
    assert "minift finetune --resume" in message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: {},
        lambda run: {key: value for key, value in run.items() if key != "inputs"},
        lambda run: {**run, "train": {**run["train"], "learning_rate": 1}},
        lambda run: {**run, "train": {**run["train"], "lr": "fast"}},
        lambda run: {**run, "train": None},
        lambda run: {**run, "inputs": None},
        lambda run: {**run, "inputs": {**run["inputs"], "modell": "x"}},
    ],
    ids=["empty", "no inputs", "unknown key", "text", "train null", "inputs null", "unknown input"],
)
def test_resuming_a_run_whose_settings_are_spoiled(
    refuse: Refuse,
    capfd: pytest.CaptureFixture[str],
    finetune: list[str | Path],
    tmp_path: Path,
    spoil: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    run = tmp_path / "run"
    run_of(finetune, capfd, run)
    config = run / "config.json"
    config.write_text(json.dumps(spoil(json.loads(config.read_text()))))
    assert str(config) in refuse("finetune", "--resume", "--out", run)


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_a_json_file_that_cannot_be_written(
    refuse: Refuse, small_checkpoint: Path, pairs: Path, tmp_path: Path, command: str
) -> None:
    words = (
        [command, small_checkpoint, small_checkpoint]
        if command == "compare"
        else [command, "--model", small_checkpoint]
    )
    assert "nowhere" in refuse(*words, "--data", pairs, "--json", tmp_path / "nowhere" / "x.json")


def test_resuming_on_other_data(finetune: list[str | Path], pairs: Path, tmp_path: Path) -> None:
    """A run that was saved in the middle of an epoch would otherwise continue with other pairs, in silence."""
    words = [*finetune, "--steps", "4", "--batch-size", "2", "--save-every", "3", "--keep", "0"]
    assert main([str(word) for word in words]) == 0
    shutil.rmtree(tmp_path / "out" / "final")
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-2]))
    assert main(["finetune", "--resume", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out" / "final").exists()


def test_a_text_that_is_not_unicode(refuse: Refuse, finetune: list[str | Path]) -> None:
    """A shell passes an argument that is not UTF-8 as half surrogates."""
    assert "not Unicode" in refuse("generate", "--model", finetune[2], "--prompt", "caf\udce9")


def test_compiling_without_a_compiler(
    refuse: Refuse, finetune: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in refuse(*finetune, "--compile", "--device", "cpu")
