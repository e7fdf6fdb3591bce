"""The promise of `checkpoint.py`: what is saved comes back bit for bit, whole or not at all, and never runs code.

Files are read with plain `torch.load` and JSON. Damaged and hostile ones are made by hand. A save is made to fail at
each of its steps, and the older checkpoint must still be there.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import LlamaConfig
from minift.errors import InputError, RunError
from minift.formats import files, native
from minift.runs.steps import load_step, save_step, step_folders
from minift.storage import atomic
from minift.storage.checksums import CHECKSUMS, check_model, write_checksums
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import bits, new_state, same, small_model, take_steps

FILES = [CHECKSUMS, "config.json", "model.pt", "tokenizer.model"]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Return a whole checkpoint, to be damaged."""
    save_model(tmp_path / "model", small_model(), tokenizer)
    return tmp_path / "model"


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = torch.load(folder / "model.pt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "model.pt")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# What is saved comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_come_back_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer, tied: bool, dtype: torch.dtype) -> None:
    model = small_model(seed=3, dtype=dtype, tie_word_embeddings=tied, rope_theta=12_345.0)
    save_model(tmp_path / "a", model, tokenizer)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == FILES
    again = load_model(tmp_path / "a", dtype=None)
    assert same(bits(model), bits(again))
    assert again.config == model.config
    assert load_tokenizer(tmp_path / "a").files["tokenizer.model"] == tokenizer.files["tokenizer.model"]
    stored = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    assert ("lm_head.weight" in stored) == (not tied)
    assert stored.keys() == model.state_dict().keys()
    assert (again.head_weight is again.embed_tokens.weight) == tied
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), again(tokens))


def test_a_tied_head_is_one_tensor_and_learns_from_both_its_uses(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(tmp_path / "a", small_model(), tokenizer)
    model = load_model(tmp_path / "a")
    assert [name for name, _ in model.named_parameters() if "embed" in name or "head" in name] == [
        "embed_tokens.weight"
    ]
    logits = model(torch.tensor([[1, 2]]))
    logits[0, -1, 50].backward()  # id 50 is not read: its row can have a gradient through the head alone
    gradient = model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[50].any()
    assert gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_saved_and_loaded_in_another_dtype(
    tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    model = small_model()
    save_model(tmp_path / "a", model, tokenizer, dtype=dtype)
    stored = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    assert same(stored, {name: tensor.to(dtype) for name, tensor in bits(model).items()})
    assert same(
        bits(load_model(tmp_path / "a")), {name: tensor.to(dtype).float() for name, tensor in bits(model).items()}
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # the model itself stays


def test_the_config_file_has_llamas_names(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 6)
    assert LlamaConfig.from_file(folder / "config.json") == small_model().config


def test_a_loaded_model_may_be_trained_without_changing_the_file(folder: Path) -> None:
    before = (folder / "model.pt").read_bytes()
    model = load_model(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.pt").read_bytes() == before


def test_saving_replaces_an_older_checkpoint(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "stale").write_text("of the older one")
    model = small_model(seed=9, tie_word_embeddings=False)
    save_model(folder, model, tokenizer)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert same(bits(load_model(folder)), bits(model))
    assert list(folder.parent.iterdir()) == [folder]


def test_a_step_folder_is_a_checkpoint_and_the_whole_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole, first, second = new_state(), new_state(), new_state(seed=5)
    take_steps(whole, 9)
    take_steps(first, 4)
    folder = save_step(tmp_path, first, tokenizer)
    assert folder == tmp_path / "step_000004"
    assert same(bits(load_model(folder)), bits(first.model))
    load_step(folder, second)
    assert second.step == 4
    take_steps(second, 5)
    assert same(bits(second.model), bits(whole.model))
    assert not same(bits(first.model), bits(whole.model))


def test_step_folders_come_the_newest_first_by_their_numbers(tmp_path: Path) -> None:
    assert step_folders(tmp_path) == []
    for name in ("step_000009", "step_000100", "step_000020", "step_1000000", "step_999999", ".step_2000000.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_3000000").write_text("a file")
    numbers = ["1000000", "999999", "000100", "000020", "000009"]
    assert step_folders(tmp_path) == [tmp_path / f"step_{number}" for number in numbers]


# Never runs code ------------------------------------------------------------------------------------------------------


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["torch", "torch, among tensors", "legacy torch", "bare pickle"])
@pytest.mark.parametrize("name", ["model.pt", "training.pt"])
def test_a_file_that_calls_a_function_is_refused_and_not_called(
    tmp_path: Path, tokenizer: Tokenizer, form: str, name: str
) -> None:
    target = tmp_path / "made by the attack"
    folder = save_step(tmp_path, new_state(), tokenizer)

    def write(file: Path, attack: Attack) -> None:
        if form == "bare pickle":
            file.write_bytes(pickle.dumps(attack))
        elif form == "legacy torch":
            torch.save(attack, file, _use_new_zipfile_serialization=False)
        else:
            weights = torch.load(folder / "model.pt", weights_only=True)
            torch.save({**weights, "norm.weight": attack} if "among" in form else attack, file)

    control = tmp_path / "control"
    write(tmp_path / "control.pt", Attack(control))
    if form == "bare pickle":
        pickle.loads((tmp_path / "control.pt").read_bytes())
    else:
        torch.load(tmp_path / "control.pt", weights_only=False)
    assert control.is_dir()  # so the attack works on a reader that trusts its input

    write(folder / name, Attack(target))
    with pytest.raises(InputError, match=name):
        load_step(folder, new_state())
    if name == "model.pt":
        with pytest.raises(InputError, match=name):
            load_model(folder)
    assert not target.exists()


# Damage is named ------------------------------------------------------------------------------------------------------


def without_norm(weights: dict[str, Any]) -> None:
    del weights["layers.1.input_layernorm.weight"]


def with_extra(weights: dict[str, Any]) -> None:
    weights["layers.2.mlp.up_proj.weight"] = torch.zeros(40, 24)


def with_head(weights: dict[str, Any]) -> None:
    weights["lm_head.weight"] = weights["embed_tokens.weight"] + 1  # the model has one matrix for both


def transposed(weights: dict[str, Any]) -> None:
    weights["layers.0.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"].T.contiguous()


def no_tensor(weights: dict[str, Any]) -> None:
    weights["norm.weight"] = [1.0] * 24


def integers(weights: dict[str, Any]) -> None:
    weights["norm.weight"] = torch.ones(24, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (without_norm, r"layers\.1\.input_layernorm\.weight is missing"),
        (with_extra, r"layers\.2\.mlp\.up_proj\.weight is not part"),
        (with_head, r"lm_head\.weight is not the embedding"),
        (transposed, r"layers\.0\.mlp\.up_proj\.weight is \[24, 40\].*\[40, 24\]"),
        (no_tensor, r"norm\.weight is list"),
        (integers, r"norm\.weight"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, change: Callable[[dict[str, Any]], None], culprit: str) -> None:
    change_weights(folder, change)
    with pytest.raises(InputError, match=rf"model\.pt: .*{culprit}"):
        load_model(folder)


def test_a_missing_head_is_named(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"tensor lm_head\.weight is missing"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 1, 10, 1_000, "half", "all but one"])
def test_a_truncated_file_is_named(folder: Path, keep: int | str) -> None:
    data = (folder / "model.pt").read_bytes()
    size = {"half": len(data) // 2, "all but one": len(data) - 1}.get(str(keep), keep)
    (folder / "model.pt").write_bytes(data[: int(size)])
    with pytest.raises(InputError, match=r"model\.pt: damaged") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"plain text", b"{}", b"PK\x03\x04 no archive", b"\x80\x02}q\x00.", b"\x00" * 4096]
)
def test_a_file_of_something_else_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt"):
        load_model(folder)


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], "text"])
def test_a_file_without_names_is_named(folder: Path, value: Any) -> None:
    torch.save(value, folder / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: holds (Tensor|list|str)"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.pt"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{folder}: .*{name}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"attention_dropout": 0.1}, "unknown key 'attention_dropout'"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures is .*MistralForCausalLM"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 0}, "num_attention_heads 5"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"eos_token_id": 97}, "eos_token_id 97"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_a_bad_config_key_is_named(folder: Path, changes: dict[str, Any], culprit: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*{culprit}"):
        load_model(folder)


def test_a_config_that_is_not_json_is_named_with_its_line(folder: Path) -> None:
    (folder / "config.json").write_text('{\n  "vocab_size": 97,\n  oops\n}')
    with pytest.raises(InputError, match=r"config\.json:3: not valid JSON"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["optimizer", "batches", "step"])
def test_an_incomplete_training_state_is_named(tmp_path: Path, tokenizer: Tokenizer, missing: str) -> None:
    folder = save_step(tmp_path, new_state(), tokenizer)
    training = torch.load(folder / "training.pt", weights_only=True)
    del training[missing]
    torch.save(training, folder / "training.pt")
    with pytest.raises(InputError, match=rf"training\.pt: .*{missing}"):
        load_step(folder, new_state())


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return a model with its tokenizer, to be damaged and repaired."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    check_model(folder)
    return folder


def test_a_flipped_byte_of_a_model_is_found_by_name(saved: Path) -> None:
    draw = random.Random(0)
    files = sorted(saved.iterdir())
    assert [file.name for file in files] == [CHECKSUMS, "config.json", "model.pt", "tokenizer.model"]
    for i in range(200):
        file = files[i % 4]
        content = file.read_bytes()
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :])
        with pytest.raises(InputError, match=rf"^{saved}/.*: (damaged|missing)"):
            check_model(saved)
        file.write_bytes(content)
    check_model(saved)


@pytest.mark.parametrize("place", [0, 2**20, 2**24 - 1, 2**24, -1])
def test_a_checksum_is_that_of_all_bytes_of_a_large_file(tmp_path: Path, place: int) -> None:
    """To the last one, however large the parts are in which it is read."""
    size = 2**24 + 3
    content = bytearray(size)
    (tmp_path / "model.pt").write_bytes(content)
    write_checksums(tmp_path)
    assert (tmp_path / CHECKSUMS).read_text() == f"{hashlib.sha256(content).hexdigest()}  model.pt\n"
    check_model(tmp_path)
    content[place] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt: damaged"):
        check_model(tmp_path)


def test_a_damaged_model_is_refused_before_it_is_finetuned(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(saved, tmp_path / "model"))
    content = bytearray((model / "model.pt").read_bytes())
    content[-5_000] ^= 1  # a bit of a weight, which stays a number
    (model / "model.pt").write_bytes(content)
    load_model(model, check=False)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"question": "{i}?", "answer": "{i}."}}\n' for i in range(8)), encoding="utf-8")
    words = ["finetune", "--model", model, "--data", data, "--steps", 1, "--device", "cpu", "--max-length", 40]
    assert main([str(word) for word in (*words, "--out", tmp_path / "run")]) == 2
    assert capfd.readouterr().err.startswith(f"minift: error: {model / 'model.pt'}: damaged, or changed: its checksum")
    assert not (tmp_path / "run").exists()
    (model / CHECKSUMS).unlink()  # for a user who has changed it on purpose
    assert main([str(word) for word in (*words, "--out", tmp_path / "run")]) == 0


# Whole or not at all --------------------------------------------------------------------------------------------------


def failing_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(tensor: torch.Tensor) -> memoryview:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "tensor_bytes", write)


def failing_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


def failing_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)


def failing_last_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail only when the new folder gets its name; moving the older one aside, and back, works."""
    rename = Path.rename

    def some(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", some)


FAILURES = [failing_save, failing_flush, failing_rename, failing_last_rename]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_save_leaves_the_older_checkpoint(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(RunError, match=f"^{folder}: cannot be written: ") as error:
            save_model(folder, small_model(seed=1), tokenizer)
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert same(bits(load_model(folder)), bits(small_model()))
    save_model(folder, small_model(seed=1), tokenizer)  # and the next one succeeds
    assert same(bits(load_model(folder)), bits(small_model(seed=1)))


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_save_leaves_no_folder_that_looks_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fail(monkeypatch)
    with pytest.raises(RunError):
        save_step(tmp_path, new_state(), tokenizer)
    assert step_folders(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_torchs_own_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of training.pt raises another error than that of the disk, which is the one to report."""

    def save(values: Any, file: IO[bytes]) -> None:
        file.write(b"the first half")
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match=r"cannot be written: No space left on device$"):
        save_step(tmp_path, new_state(), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("killed_in", ["write_pt", "flush_path", "rmtree"])
def test_a_killed_save_leaves_the_older_checkpoint(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    """A killed process cannot remove what it began. A forked child is killed at each point in turn."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = small_model(seed=1)

    def die(*arguments: Any, **options: Any) -> None:
        path = Path(str(arguments[0]))
        if killed_in == "rmtree":  # killed while a folder was being removed
            if not path.exists():
                return
            next(path.iterdir()).unlink()
        os._exit(77)

    child = os.fork()
    if child == 0:
        homes = {"rmtree": shutil, "flush_path": atomic, "write_pt": native}
        monkeypatch.setattr(homes[killed_in], killed_in, die)
        save_model(folder, model, tokenizer)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert after == before or same(bits(load_model(folder)), bits(model))
    save_model(folder, model, tokenizer)  # what the killed process has left does no harm
    assert same(bits(load_model(folder)), bits(model))
    assert list(folder.parent.iterdir()) == [folder]
