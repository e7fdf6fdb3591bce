"""A model that has checksums is held against them by whoever opens it: a flipped bit is named, never used or copied on.

The bit is one of a weight that stays an ordinary number: nothing but the checksum tells.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minift import BasicModelRunner, bundled, load_model, save_model
from minift.cli import main
from minift.errors import InputError
from minift.formats.convert import convert
from minift.formats.open import check_model_files
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights
from minift.model import Llama
from minift.storage.checksums import CHECKSUMS, write_checksums
from minift.tokenizer.base import Tokenizer
from tests.helpers import adapted_model, bits, same, small_model

CONFIG = LoRAConfig(4, 8.0, ("q_proj", "down_proj"))


def flip(file: Path, place: int = -5_000) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder, model_for(tokenizer), tokenizer)
    return folder


def model_for(tokenizer: Tokenizer) -> Llama:
    return small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=256, std=0.02)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    flip(folder / "model.pt")
    return folder


def words_of(command: str, model: Path, out: Path) -> list[str]:
    data = ("--data", bundled("test.jsonl"))
    words = {
        "generate": ["--model", model, "--prompt", "Why?", "--max-new-tokens", 2, "--device", "cpu"],
        "chat": ["--model", model, "--device", "cpu"],
        "evaluate": ["--model", model, *data, "--device", "cpu"],
        "compare": ["bundled", model, *data, "--device", "cpu"],
        "explain": ["Why?", "--model", model],
        "convert": [model, out / "converted", "--to", "meta"],
    }
    return [command, *map(str, words[command])]


COMMANDS = ["generate", "chat", "evaluate", "compare", "explain", "convert"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_damaged_file(
    damaged: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of(command, damaged, tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"minift: error: {damaged / 'model.pt'}: damaged, or changed: its checksum")
    assert captured.err.endswith(f"restore it, or remove {CHECKSUMS} if you have changed it\n")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("command", ["generate", "explain", "convert"])
def test_whoever_cannot_wait_uses_it_as_it_is(
    damaged: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words_of(command, damaged, tmp_path), "--no-check"]) == 0
    monkeypatch.setattr("minift.storage.checksums._sha256", None)  # and no byte is summed
    assert main([*words_of(command, damaged, tmp_path / "again"), "--no-check"]) == 0
    assert same(bits(load_model(damaged, check=False)), bits(load_model(damaged, check=False)))


PYTHON: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "runner": BasicModelRunner,
    "convert": lambda path: convert(path, path.parent / "out", "native"),
    "check_model_files": check_model_files,
}


@pytest.mark.parametrize("use", PYTHON.values(), ids=PYTHON)
def test_python_names_it_as_the_commands_do(damaged: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=r"model\.pt: damaged, or changed"):
        use(damaged)
    (damaged / CHECKSUMS).unlink()
    use(damaged)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model"])
def test_a_file_next_to_the_weights_counts(whole: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    text = (folder / file).read_bytes()
    (folder / file).write_bytes(text.replace(b"10000.0", b"10000.5") if file == "config.json" else text + b"\0")
    with pytest.raises(InputError, match=rf"{file}: damaged, or changed"):
        load_model(folder)


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_an_adapter_and_its_base_are_both_compared(
    tmp_path: Path, tokenizer: Tokenizer, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a training, too, where only the folder that was named used to be looked at."""
    pytest.importorskip("safetensors")
    save_model(tmp_path / "base", model_for(tokenizer), tokenizer)
    (tmp_path / "adapter").mkdir()
    weights = adapter_weights(adapted_model(CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    write_peft(tmp_path / "adapter", weights, CONFIG, str(tmp_path / "base"))
    write_checksums(tmp_path / "adapter")
    load_model(tmp_path / "adapter")
    file = tmp_path / part / ("model.pt" if part == "base" else "adapter_model.safetensors")
    flip(file, -100 if part == "adapter" else -5_000)
    with pytest.raises(InputError, match=rf"{part}/{file.name}: damaged, or changed"):
        load_model(tmp_path / "adapter")
    words = ("--data", bundled("pairs.jsonl"), "--out", tmp_path / "run", "--steps", 1, "--device", "cpu")
    assert main(["finetune", "--model", *map(str, (tmp_path / "adapter", *words))]) == 2
    assert f"{file}: damaged, or changed" in capsys.readouterr().err


def test_a_model_by_its_name_is_compared(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the hub's cache; `finetune` used to look for checksums under the name itself."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--a-model"
    shutil.copytree(damaged, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    words = ("--data", bundled("pairs.jsonl"), "--out", tmp_path / "run", "--steps", 1, "--device", "cpu")
    for command in (["finetune", *map(str, words)], ["generate", "--prompt", "Why?"]):
        assert main([*command, "--model", "someone/a-model"]) == 2
        assert f"{repository / 'snapshots' / '0123abcd' / 'model.pt'}: damaged" in capsys.readouterr().err


def test_a_file_of_its_own_is_compared_alone(whole: Path, tmp_path: Path) -> None:
    """A llama2.c file, next to which another model may be damaged."""
    convert(whole, tmp_path / "model.bin", "llama2c")
    other = tmp_path / "other.txt"
    other.write_text("text")
    write_checksums(tmp_path)
    other.write_text("changed")
    load_model(tmp_path / "model.bin")
    flip(tmp_path / "model.bin")
    with pytest.raises(InputError, match=r"model\.bin: damaged, or changed"):
        load_model(tmp_path / "model.bin")
