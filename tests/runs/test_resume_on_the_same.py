"""The promise that a run is resumed on what it was made from: anything else in its place is refused, by name.

Each input of a run that was killed is changed on the disk, one at a time: the weights of the base (all of them are
trained), its shape, its tokenizer, the template, the pairs, those held out. What leaves the contents as they were (a
time, an order of what is held out, another format) is no change. And folders inside the run's own that are damaged, or
those of another run, are named.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.formats.convert import convert
from minift.runs import machine
from minift.runs.contents import sum_of_bits
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.values import read_json
from tests.helpers import SMALL, write_jsonl

COMMON = "--device cpu --dtype float32 --steps 4 --save-every 2 --keep 0 --batch-size 2 --warmup 1"
PAIRS = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
PAGES = [{"text": f"Page {i} of some words."} for i in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, tokenizer: Tokenizer) -> Path:
    """Return a folder of inputs, and of both runs."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(small_checkpoint, folder / "base")
    write_jsonl(folder / "pairs.jsonl", PAIRS[:9])
    write_jsonl(folder / "test.jsonl", PAIRS[9:])
    (folder / "mine.txt").write_text("Q: {question}\nA: {answer}")
    write_jsonl(folder / "pages.jsonl", PAGES)
    write_jsonl(folder / "later.jsonl", PAGES[:20])
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    paths = {name: str(folder / name) for name in os.listdir(folder)}
    inputs = {
        "finetune": f"--model {paths['base']} --data {paths['pairs.jsonl']} --test {paths['test.jsonl']} "
        f"--template {paths['mine.txt']} --max-length 64 --patience 3 --eval-every 1",
        "pretrain": f"--config {paths['shape.json']} --data {paths['pages.jsonl']} --tokenizer {paths['base']} "
        f"--validation {paths['later.jsonl']} --max-length 16",
    }
    for job, words in inputs.items():
        assert main([job, *words.split(), *COMMON.split(), "--out", str(folder / job)]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, where each run is as if it had been killed after step 2."""
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    for job in ("finetune", "pretrain"):
        config = folder / job / "config.json"
        config.write_text(config.read_text().replace(str(made), str(folder)))
        shutil.rmtree(folder / job / "final")
        shutil.rmtree(folder / job / "step_000004")
    return folder


def weights_changed(folder: Path) -> None:
    model = load_model(folder / "base")
    with torch.no_grad():
        model.embed_tokens.weight[5, 5] += 1e-3
    save_model(folder / "base", model, load_tokenizer(folder / "base"))


def shape_changed(folder: Path, file: str = "base/config.json") -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, "rope_theta": 5_000.0}))
    (folder / "base" / "SHA256SUMS").unlink()


def tokenizer_changed(folder: Path) -> None:
    (folder / "base" / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')


def held_out_changed(folder: Path) -> None:
    other = [{**PAIRS[9], "answer": "Another answer."}, *PAIRS[10:]]
    write_jsonl(folder / "test.jsonl", other)


CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": (
        "finetune",
        weights_changed,
        r"base: the model that the run began with has changed since: its checksum",
    ),
    "shape": ("finetune", shape_changed, r"base: rope_theta was 10000.0 when the run began, and is 5000.0"),
    "tokenizer": ("finetune", tokenizer_changed, r"base: the tokenizer's special_tokens_map.json is not what it was"),
    "template": (
        "finetune",
        lambda folder: (folder / "mine.txt").write_text("Ask: {question}\nA: {answer}"),
        r"mine.txt: the template has changed since the run began",
    ),
    "pairs": (
        "finetune",
        lambda folder: write_jsonl(folder / "pairs.jsonl", PAIRS[:8]),
        r"pairs.jsonl: the data has changed since the run was saved: 9 pairs, checksum \w+; now 8 pairs, checksum \w+",
    ),
    "held out": (
        "finetune",
        held_out_changed,
        r"test.jsonl: the held-out data has changed since the run began: 3 texts",
    ),
    "pages": (
        "pretrain",
        lambda folder: write_jsonl(folder / "pages.jsonl", PAGES[:-1]),
        r"pages.jsonl: the data has changed since the run was saved",
    ),
    "held-out pages": (
        "pretrain",
        lambda folder: write_jsonl(folder / "later.jsonl", PAGES[1:21]),
        r"later.jsonl: the held-out data has changed since the run began",
    ),
    "shape of its own": (
        "pretrain",
        lambda folder: shape_changed(folder, "shape.json"),
        r"shape.json: rope_theta was 10000.0 when the run began, and is 5000.0",
    ),
    "tokenizer of pages": ("pretrain", tokenizer_changed, r"base: the tokenizer's special_tokens_map.json is not what"),
}


@pytest.mark.parametrize("state", ["killed", "killed before a save", "finished"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_input_is_refused_by_name(
    made: Path, place: Path, change: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job, change_it, message = CHANGES[change]
    out = place / job
    if state == "finished":
        shutil.copytree(made / job / "final", out / "final")
    elif state == "killed before a save":
        shutil.rmtree(out / "step_000002")
    change_it(place)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert main([job, "--resume", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert line.endswith("; restore it, or start a new run")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def same_end(folder: Path, made: Path, job: str) -> bool:
    ours, theirs = (torch.load(it / job / "final" / "model.pt", weights_only=True) for it in (folder, made))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_changes_no_content_is_no_difference(made: Path, place: Path) -> None:
    """Times, the order of what is held out, white space between a record's values, another format of the base."""
    for file in place.rglob("*.*"):
        os.utime(file, (1e9, 1e9))
    write_jsonl(place / "test.jsonl", PAIRS[:8:-1])
    text = (place / "pairs.jsonl").read_text()
    (place / "pairs.jsonl").write_text(text.replace('": ', '":    '))
    shutil.move(place / "base", place / "native")
    convert(place / "native", place / "base", "meta", tokenizer=place / "native")
    before = read_json(place / "finetune" / "config.json")["contents"]
    assert set(os.listdir(place / "base")) != set(os.listdir(place / "native"))
    for name in before["tokenizer"]:
        shutil.copy(place / "native" / name, place / "base")
    assert main(["finetune", "--resume", "--out", str(place / "finetune")]) == 0
    assert same_end(place, made, "finetune")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_of_weights_does_not_depend_on_where_they_lie(dtype: torch.dtype) -> None:
    """A file that is mapped has them at any place; in a sharded run each rank sums its own rows."""
    for shape in ((6, 8), (6, 7), (9,)):
        tensor = torch.randn(shape).to(dtype)
        shifted = torch.cat((torch.zeros(1, dtype=dtype), tensor.flatten()))[1:].view(shape)
        transposed = tensor.t().contiguous().t()
        parts = sum_of_bits(tensor[:5]) + sum_of_bits(tensor[5:])
        sums = {value % 2**64 for value in (*map(sum_of_bits, (tensor, shifted, transposed)), parts)}
        assert len(sums) == 1
        tensor.flatten()[3] += 0.01
        assert sum_of_bits(tensor) % 2**64 not in sums


def test_pages_that_were_copied_are_the_same(made: Path, place: Path) -> None:
    for file in place.glob("*.jsonl"):
        os.utime(file, (1e9, 1e9))
    assert main(["pretrain", "--resume", "--out", str(place / "pretrain")]) == 0
    assert same_end(place, made, "pretrain")


def test_another_torch_or_device_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that only a later version of minift records is no difference."""
    config = place / "pretrain" / "config.json"
    run = json.loads(config.read_text())
    run["contents"] |= {"torch": "1.13", "device": "cuda"}
    del run["contents"]["shape"]["initializer_range"]
    shutil.rmtree(place / "pretrain" / "step_000002")  # which knows the settings of its run
    config.write_text(json.dumps(run))
    assert main(["pretrain", "--resume", "--out", str(config.parent)]) == 0
    shown = capsys.readouterr().out
    assert f"the run began with torch 1.13, now it is {torch.__version__}" in shown
    assert "the run began with device cuda, now it is cpu" in shown


@pytest.mark.parametrize("change", [{"dtype": "float16", "device": "auto"}, {"device": "cuda"}], ids=str)
def test_a_run_on_a_gpu_is_not_resumed_where_there_is_none(
    place: Path, change: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    config = place / "pretrain" / "config.json"
    run = json.loads(config.read_text())
    run["train"] |= change
    config.write_text(json.dumps(run))
    assert main(["pretrain", "--resume", "--out", str(config.parent)]) == 2
    message = capsys.readouterr().err
    assert "the run was begun on a GPU, and torch finds none" in message
    assert "--d" not in message  # a resumed run takes no other --device or --dtype


@pytest.mark.parametrize("spoiled", [[], "x", {"shape": []}, {"tokenizer": None}, {"colour": "red"}, {"weights": 7}])
def test_spoiled_checksums_are_named(place: Path, spoiled: object, capsys: pytest.CaptureFixture[str]) -> None:
    config = place / "finetune" / "config.json"
    run = json.loads(config.read_text())
    run["contents"] = {**run["contents"], **spoiled} if isinstance(spoiled, dict) else spoiled
    config.write_text(json.dumps(run))
    assert main(["finetune", "--resume", "--out", str(config.parent)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"minift: error: {config}: contents")


# Folders in the run's own ---------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_step_folder_of_another_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another learning rate: its weights and its place in the data would fit."""
    words = json.loads((place / "pretrain" / "config.json").read_text())["inputs"]
    other = place / "other"
    flags = [f"--{name}={words[name]}" for name in ("config", "tokenizer")]
    flags += ["--data", *words["data"], "--validation", *words["validation"], "--max-length", "16"]
    assert main(["pretrain", *flags, *COMMON.split(), "--lr", "0.1", "--out", str(other)]) == 0
    shutil.move(other / "step_000002", other / "step_000003")
    shutil.rmtree(place / "pretrain" / "step_000002")
    shutil.copytree(other / "step_000003", place / "pretrain" / "step_000003")
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--out", str(place / "pretrain")]) == 2
    assert "step_000003: was saved by another run than that of" in capsys.readouterr().err


EDITED = {  # settings that decide no step, or only how many of them a stopped run still takes
    "workers": 1,
    "keep": 5,
    "strict": True,
    "save_every": "7m",
    "max_minutes": 600.0,
    "compare": 1,
    "keep_last": True,
    "eval_every": 2,
    "patience": 9,
    "save_format": "hf",
}


@pytest.mark.parametrize("name", EDITED)
def test_a_setting_that_decides_no_step_may_be_edited(made: Path, place: Path, name: str) -> None:
    """In the config.json of a run, it makes no other run of it: the step folders in it are still its own."""
    if name == "save_format":
        pytest.importorskip("safetensors")
        pytest.importorskip("tokenizers")
    out = place / "finetune"
    edit(out, name, EDITED[name])
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    if name not in ("keep_last", "save_format"):  # those make another final/ of the same steps
        assert same_end(place, made, "finetune")


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 3e-4), ("batch_size", 3), ("seed", 1), ("clip", 0.5), ("weight_decay", 0.1)]
)
def test_a_setting_that_decides_steps_makes_another_run(
    place: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "finetune"
    edit(out, name, value)
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    assert f"step_000002: was saved by another run than that of {out}" in capsys.readouterr().err
    assert not (out / "final").exists()


def edit(out: Path, name: str, value: object) -> None:
    """Change a setting in a run's config.json."""
    run = json.loads((out / "config.json").read_text())
    assert run["train"][name] != value
    run["train"][name] = value
    (out / "config.json").write_text(json.dumps(run))


def test_a_step_folder_under_another_number_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "pretrain"
    shutil.move(out / "step_000002", out / "step_000003")
    assert main(["pretrain", "--resume", "--out", str(out)]) == 2
    assert "step_000003: holds the state after step 2; give it that name, or remove it" in capsys.readouterr().err


def test_a_damaged_best_model_is_named_before_any_step(
    made: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "finetune"
    shutil.copytree(made / "finetune" / "final", out / "best")
    flip(out / "best" / "model.pt")
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "best/model.pt: damaged, or changed" in message
    assert message.endswith(f"or remove {out / 'best'} to go on without the best model so far")
    shutil.rmtree(out / "best")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert (out / "final" / "model.pt").exists()


@pytest.mark.parametrize("job", ["finetune", "pretrain"])
def test_a_damaged_final_model_is_named(made: Path, place: Path, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / job
    shutil.copytree(made / job / "final", out / "final")
    flip(out / "final" / "model.pt")
    assert main([job, "--resume", "--out", str(out)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "final/model.pt: damaged, or changed" in message
    assert message.endswith(f"or remove {out / 'final'} and the step folders, to train again")
    shutil.rmtree(out / "final")
    assert main([job, "--resume", "--out", str(out)]) == 0
    assert same_end(place, made, job)
