"""The promise of `formats/carried.py`: what training does not change in a Hugging Face folder is in the one it makes.

`transformers` reads both folders. Held here:

* its configs, tokenizer and settings of `generate` are the same, but for the stop tokens that training added; files in
  which nothing changed have the same bytes, of one process, of two (fsdp), and of a run that was resumed;
* the weights have the dtype that they had, each tensor its own, and give in both programs the same logits; a value
  beyond float16's range is not lost;
* weights, code, folders and what is hidden stay behind, and what a user would look for is named;
* damaged side files end a run before its first step, or never; the bundled model gives a minift checkpoint as before.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import TrainConfig
from minift.errors import InputError
from minift.formats import carried as rule
from minift.formats.convert import convert
from minift.formats.open import carried_from, open_model
from minift.runs import machine
from minift.runs.finetune import finetune, finetune_job
from minift.runs.pretrain import pretrain, pretrain_job
from minift.tokenizer.load import load_tokenizer
from tests.helpers import instruct_model, random_model, write_jsonl
from tests.runs.ranks import by_two
from tests.tokenizer.kinds import trained as trained_pieces

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

CONFIG: dict[str, Any] = {
    "pad_token_id": 0,
    "use_cache": False,
    "transformers_version": "4.47.1",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "a_key_of_somebody": {"depth": [1, 2, {"é": None}]},
    "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"},
}
GENERATION: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "max_new_tokens": 7,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "pad_token_id": 0,
}
KEPT = {
    "README.md": b"---\r\nlicense: apache-2.0\r\n---\r\n# A model\xff",
    "LICENSE": b"Apache",
    "USE_POLICY.md": b"Be good.",
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": b'{"pad_token": "<unk>", "bos_token":"<s>"}',
    "preprocessor_config.json": b"{not JSON",
    "notes.TXT": b"",
}
LEFT = {
    "modeling_own.py": b"raise SystemExit('never run')",
    "pytorch_model.bin": b"\x80\x04",
    "model.Q4.gguf": b"GGUF",
    "model.safetensors.index.json": b"{}",
    "optimizer.pt": b"",
    "trainer_state.json": b"{}",
    "LICENSE.py": b"",
    ".hidden.json": b"{}",
    "picture.png": b"",
}
STOP = 2049  # <|im_end|>
NUMBERS = [*range(1, 60), 900]


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, ensure_ascii=False), encoding="utf-8")


def values(file: Path, *without: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(file.read_text()).items() if key not in without}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an instruct model in bfloat16 as somebody publishes it: with all kinds of files, and settings."""
    folder = instruct_model(tmp_path_factory.mktemp("published") / "base")
    change(folder / "config.json", **CONFIG)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    change(folder / "tokenizer_config.json", pad_token="<unk>", padding_side="left", model_max_length=99, own_key=1)
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    safetensors_torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, content in {**KEPT, **LEFT}.items():
        (folder / name).write_bytes(content)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(12)]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


FLAGS = [
    "--keep-last",
    "--steps",
    4,
    "--save-every",
    2,
    "--keep",
    "0",
    "--warmup",
    0,
    "--batch-size",
    4,
    "--lr",
    0.01,
    "--device",
    "cpu",
]
FLAGS += ["--dtype", "float32", "--template", "chat"]


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the base by default, in its own chat template, which ends turns with a stop token more."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with redirect_stdout(StringIO()) as printed:
        run("finetune", "--model", base, "--data", data, "--out", out, *FLAGS)
    (out.parent / "printed").write_text(printed.getvalue(), encoding="utf-8")
    return out


# A run ----------------------------------------------------------------------------------------------------------------


def test_what_did_not_change_has_the_same_bytes(base: Path, trained: Path) -> None:
    before, after = contents(base), contents(trained / "final")
    changed = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(after) == (set(before) - set(LEFT)) | {"SHA256SUMS"}
    assert {*KEPT, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(after)
    for name in set(after) - changed - {"SHA256SUMS"}:
        assert after[name] == before[name], name
    assert not [file for file in (trained / "final").iterdir() if not file.is_file()]


def test_the_configs_change_by_the_stop_token_that_training_added(base: Path, trained: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        before, after = base / name, trained / "final" / name
        assert values(after)["eos_token_id"] == [2, STOP]
        assert values(after, "eos_token_id") == values(before, "eos_token_id", "auto_map")
        assert list(values(after)) == list(values(before, "auto_map"))  # the order, too
    assert set(load_model(trained / "final").config.eos_token_ids) == {2, STOP}


def test_transformers_reads_the_same_from_both(base: Path, trained: Path) -> None:
    final = trained / "final"
    configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (base, final)]
    generations = [transformers.GenerationConfig.from_pretrained(folder).to_dict() for folder in (base, final)]
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (base, final)]
    asked = [model.generation_config.to_dict() for model in models]
    for before, after in (configs, generations, asked):
        assert after.pop("eos_token_id") == [2, STOP]
        for key in ("eos_token_id", "auto_map"):
            before.pop(key, None)
        for found in (before, after):
            found.pop("_name_or_path", None)
        assert after == before
    assert generations[1]["temperature"] == 0.6
    assert configs[1]["pad_token_id"] == generations[1]["pad_token_id"] == 0
    assert configs[1]["a_key_of_somebody"] == CONFIG["a_key_of_somebody"]
    theirs = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (base, final)]
    chat = [{"role": "user", "content": "Hello <s>"}]
    for read in (
        lambda t: t.get_vocab(),
        lambda t: t.special_tokens_map,
        lambda t: t.chat_template,
        lambda t: (t.padding_side, t.model_max_length, t.pad_token_id, t.init_kwargs.get("own_key")),
        lambda t: t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
        lambda t: t(["What is 7?", "a"], padding=True)["input_ids"],
    ):
        assert read(theirs[0]) == read(theirs[1])


def test_the_weights_have_the_dtype_of_the_base_and_give_the_same_logits_everywhere(base: Path, trained: Path) -> None:
    final = trained / "final"
    opened = open_model(final)
    assert {spec.dtype for spec in opened.specs.values()} == {torch.bfloat16}
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(final, dtype="auto", output_loading_info=True)
    assert not any(found.values()), found
    assert theirs.dtype == torch.bfloat16
    tokens = torch.tensor([NUMBERS])
    with torch.no_grad():
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
            before, after = (load_model(folder, dtype=dtype)(tokens) for folder in (base, final))
            logits = theirs.to(dtype).eval()(tokens).logits
            assert logits.dtype == after.dtype == dtype
            assert float((after - logits).abs().max()) < bound < float((after - before).abs().max())


def test_a_resumed_run_writes_the_same_folder(base: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained / "step_000002", out / "step_000002")
    shutil.copy(trained / "config.json", out)
    assert json.loads((out / "config.json").read_text())["train"]["save_format"] == "hf"  # and no longer auto
    lines = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]))
    run("finetune", "--resume", "--out", out)
    assert contents(out / "final") == contents(trained / "final")


@pytest.mark.parametrize("changes", [{"parallel": "fsdp"}, {"lora_rank": 2}], ids=["fsdp", "lora"])
def test_other_ways_to_train_write_the_same_files(
    base: Path, data: Path, trained: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = TrainConfig(steps=2, batch_size=4, dtype="float32", device="cpu", template="chat", **changes)
    start = by_two if "parallel" in changes else lambda job, *arguments: job(*arguments)
    start(finetune, finetune_job(str(base), [str(data)]), config, tmp_path / "run")
    before, after = contents(trained / "final"), contents(tmp_path / "run" / "final")
    assert set(before) == set(after)
    for name in set(before) - {"model.safetensors", "SHA256SUMS"}:
        assert after[name] == before[name], name
    assert {spec.dtype for spec in open_model(tmp_path / "run" / "final").specs.values()} == {torch.bfloat16}
    if "lora_rank" in changes:  # an adapter's base counts
        adapter = tmp_path / "run" / "adapter"
        run("finetune", "--model", adapter, "--data", data, "--out", tmp_path / "again", *FLAGS)
        again = contents(tmp_path / "again" / "final")
        assert {name: again.get(name) for name in KEPT} == KEPT
        assert values(tmp_path / "again" / "final" / "generation_config.json")["temperature"] == 0.6


def test_every_command_takes_it(trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = trained / "final"
    run("info", "--model", final)
    run("generate", "--model", final, "--prompt", "What is 7?", "--max-new-tokens", 2)
    run("evaluate", "--model", final, "--data", data)
    run("compare", final, final, "--data", data)
    run("convert", final, tmp_path / "native", "--to", "native")
    capsys.readouterr()
    assert open_model(tmp_path / "native").config.eos_token_ids == (2, STOP)


def test_what_it_will_be_is_said(trained: Path) -> None:
    left = "LICENSE.py, modeling_own.py, onnx, picture.png, auto_map in config.json"
    line = f"final/ will be a Hugging Face folder as the base is, with the weights in bfloat16; not copied: {left}"
    assert (trained.parent / "printed").read_text(encoding="utf-8").splitlines().count(line) == 1


# Which format ---------------------------------------------------------------------------------------------------------


def test_other_models_give_a_minift_checkpoint(small_checkpoint: Path, base: Path, data: Path, tmp_path: Path) -> None:
    run("finetune", "--model", small_checkpoint, "--data", data, "--out", tmp_path / "small", *FLAGS[:-2])
    run("finetune", "--model", base, "--data", data, "--out", tmp_path / "asked", *FLAGS, "--save-format", "native")
    for name in ("small", "asked"):
        final = tmp_path / name / "final"
        assert open_model(final).format == "native"
        assert {spec.dtype for spec in open_model(final).specs.values()} == {torch.float32}
        assert json.loads((tmp_path / name / "config.json").read_text())["train"]["save_format"] == "native"
    expected = {"config.json", "model.pt", "tokenizer.model", "SHA256SUMS"}
    assert set(contents(tmp_path / "small" / "final")) == expected


def test_a_run_of_an_earlier_version_keeps_the_format_that_it_wrote_down(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained / "step_000004", out / "step_000004")
    shutil.copy(trained / "metrics.jsonl", out)
    settings = json.loads((trained / "config.json").read_text())
    settings["train"]["save_format"] = "native"  # was the default
    (out / "config.json").write_text(json.dumps(settings))
    run("finetune", "--resume", "--out", out)
    assert open_model(out / "final").format == "native"


def test_without_the_extra_the_result_is_native_with_a_note(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of `pytorch_model.bin` and `tokenizer.model` can be read without it."""

    def need(package: str, extra: str, what: str) -> None:
        raise InputError(f"{what} needs {package} ({extra})")

    assert machine.choose_save_format(TrainConfig(), str(base)) == "hf"
    monkeypatch.setattr(machine, "need", need)
    assert machine.choose_save_format(TrainConfig(), str(base)) == "native"
    line = "note: final/ will be a minift checkpoint: a Hugging Face folder needs tokenizers (hf)\n"
    assert capsys.readouterr().out == line


ODD = {"hidden_size": 36, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}


@pytest.mark.parametrize(
    ("shape", "changes", "named"),
    [
        (ODD, {}, "`transformers` refuses hidden_size 36"),
        ({}, {"user_defined_symbols": ["Mexico"]}, "cannot be written as a tokenizer.json"),
    ],
)
def test_what_no_folder_of_theirs_can_hold_is_refused_before_the_run(
    data: Path, tmp_path: Path, shape: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained_pieces(**changes))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    model = random_model(max_position_embeddings=512, **{"vocab_size": tokenizer.vocab_size, **shape})
    save_model(tmp_path / "model", model, tokenizer)
    config = TrainConfig(steps=1, device="cpu", save_format="hf", max_length=32)
    with pytest.raises(InputError, match=named):
        finetune(finetune_job(str(tmp_path / "model"), [str(data)]), config, tmp_path / "run")
    shape_file, tokenizer_folder = str(tmp_path / "model" / "config.json"), str(tmp_path / "model")
    pages = pretrain_job(shape_file, [str(data)], tokenizer_folder, text_field="answer")
    with pytest.raises(InputError, match=named):
        pretrain(pages, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mistral_stays_one(random_folder: Path, tmp_path: Path) -> None:
    kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    change(random_folder / "config.json", **kind)
    model = load_model(random_folder)
    save_model(tmp_path / "new", model, format="hf", carried=carried_from(random_folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert type(theirs) is transformers.MistralForCausalLM
    tokens = torch.tensor([NUMBERS[:-1]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)


# Dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def random_folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "random", random_model(), format="hf")
    (tmp_path / "random" / "SHA256SUMS").unlink()
    return tmp_path / "random"


def store(folder: Path, matrices: torch.dtype, norms: torch.dtype) -> None:
    """Give the weights of a folder other dtypes."""
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    weights = {name: weight.to(norms if weight.ndim == 1 else matrices) for name, weight in weights.items()}
    safetensors_torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_each_tensor_keeps_its_dtype(random_folder: Path, tmp_path: Path) -> None:
    store(random_folder, torch.float16, torch.float64)
    save_model(tmp_path / "new", load_model(random_folder), format="hf", carried=carried_from(random_folder))
    assert open_model(tmp_path / "new").specs == open_model(random_folder).specs
    assert (tmp_path / "new" / "config.json").read_bytes() == (random_folder / "config.json").read_bytes()


def test_a_value_beyond_the_range_of_float16_is_kept(random_folder: Path, tmp_path: Path) -> None:
    """Or a run would end with a model that nothing can load."""
    store(random_folder, torch.float16, torch.float16)
    change(random_folder / "config.json", torch_dtype="float16")
    model = load_model(random_folder)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 2] = 70_000.0
    save_model(tmp_path / "new", model, format="hf", carried=carried_from(random_folder))
    specs = open_model(tmp_path / "new").specs
    assert {name for name in specs if specs[name].dtype != torch.float16} == {"layers.0.mlp.up_proj.weight"}
    assert load_model(tmp_path / "new").layers[0].mlp.up_proj.weight[3, 2].item() == 70_000.0
    assert values(tmp_path / "new" / "config.json")["torch_dtype"] == "float32"


# Stop tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "ends", "new_config", "new_generation"),
    [
        (2, [2, 7], (2, 7), 2, [2, 7]),  # all are known: nothing changes
        (2, [2, 7], (2, 7, 9), [2, 9], [2, 7, 9]),
        ([2, 5], 2, (2, 5, 9), [2, 5, 9], [2, 9]),
        (None, None, (9,), 9, 9),
        (None, "none", (9, 4), [9, 4], [9, 4]),
        ("none", 7, (2, 7), "none", 7),  # without the key it is 2
        ("none", "none", (2, 9), [2, 9], [2, 9]),  # of `generate`'s settings none at all would stop
    ],
)
def test_stop_tokens_are_added_to_those_that_a_file_names(
    random_folder: Path, tmp_path: Path, config: Any, generation: Any, ends: Any, new_config: Any, new_generation: Any
) -> None:
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        file = random_folder / name
        found = values(file, "eos_token_id") | ({} if value == "none" else {"eos_token_id": value})
        file.write_text(json.dumps(found))
    model = load_model(random_folder)
    model.config = replace(model.config, eos_token_id=ends)
    save_model(tmp_path / "new", model, format="hf", carried=carried_from(random_folder))
    for name, value in (("config.json", new_config), ("generation_config.json", new_generation)):
        assert values(tmp_path / "new" / name).get("eos_token_id", "none") == value
    assert set(ends) <= set(load_model(tmp_path / "new").config.eos_token_ids)


def test_a_folder_without_settings_of_generate_gets_none(random_folder: Path, tmp_path: Path) -> None:
    """`transformers` then takes them from config.json, `pad_token_id` among them; a new file would hide those."""
    (random_folder / "generation_config.json").unlink()
    change(random_folder / "config.json", pad_token_id=3)
    save_model(tmp_path / "new", load_model(random_folder), format="hf", carried=carried_from(random_folder))
    assert not (tmp_path / "new" / "generation_config.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").generation_config.pad_token_id == 3


# Hostile folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-5], lambda text: text[:-1] + ', "more": ' + "[" * 200 + "]" * 200 + "}"]
)
def test_a_damaged_config_is_refused_before_the_run(
    base: Path, data: Path, tmp_path: Path, name: str, spoil: Any
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / name).write_text(spoil((folder / name).read_text()))
    config = TrainConfig(steps=1, device="cpu")
    with pytest.raises(InputError, match=name):
        finetune(finetune_job(str(folder), [str(data)]), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_with_strange_names_sizes_and_kinds_stay_behind(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of checksums cannot hold a name with a line break: the new folder would count as damaged."""
    monkeypatch.setattr(rule, "LARGEST", 10)
    monkeypatch.setattr(rule, "LARGEST_SUM", 25)
    (random_folder / "a\nb.txt").write_text("x")
    (random_folder / "b.txt").write_text("x" * 11)
    for name in ("c.txt", "d.txt", "e.txt", "inner.txt"):
        (random_folder / name).write_text("x" * 9)
    (random_folder / "adapter_config.json").write_text("{}")  # `transformers` would look for an adapter
    (random_folder / "f.json").mkdir()
    (random_folder / "g.txt").symlink_to(random_folder / "gone.txt")
    (random_folder / "h.txt").symlink_to("c.txt")
    carried = carried_from(random_folder)
    assert carried is not None
    assert set(carried.files) == {"c.txt", "d.txt"}
    assert set(carried.left_out) == {"a\nb.txt", "b.txt", "e.txt", "f.json", "g.txt", "h.txt", "inner.txt"}
    save_model(tmp_path / "new", load_model(random_folder), format="hf", carried=carried)
    load_model(tmp_path / "new", check=True)
    (random_folder / "i.txt").symlink_to(tmp_path / "new" / "config.json")
    with pytest.raises(InputError, match="leads out of its folder"):
        carried_from(random_folder)


def test_a_model_in_the_hubs_cache_gives_files_and_no_links(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "hub" / "models--some--model", "abc123"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(random_folder, repository / "blobs")
    (repository / "blobs" / "NOTICE").write_text("by somebody")
    (repository / "snapshots" / commit).mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (repository / "snapshots" / commit / blob.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert machine.choose_save_format(TrainConfig(), "some/model") == "hf"
    save_model(tmp_path / "new", load_model("some/model"), format="hf", carried=carried_from("some/model"))
    assert (tmp_path / "new" / "NOTICE").read_text() == "by somebody"
    assert not any(file.is_symlink() for file in (tmp_path / "new").iterdir())


# minift convert -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capsys.readouterr()


def test_a_converted_folder_keeps_all_of_it(base: Path, tmp_path: Path, quiet: None) -> None:
    result = convert(base, tmp_path / "copy", "hf")
    assert "not copied: LICENSE.py, modeling_own.py, onnx, picture.png, auto_map in config.json" in result.notes
    before, after = contents(base), contents(tmp_path / "copy")
    assert set(after) == set(before) - set(LEFT)
    for name in set(after) - {"config.json", "model.safetensors"}:
        assert after[name] == before[name], name
    assert values(tmp_path / "copy" / "config.json") == values(base / "config.json", "auto_map")
    again = convert(tmp_path / "copy", tmp_path / "again", "hf")
    assert contents(tmp_path / "again") == after
    assert not any(note.startswith("not copied") for note in again.notes)
    assert again.specs == result.specs


def test_a_conversion_to_another_dtype_says_so_in_the_config(base: Path, tmp_path: Path, quiet: None) -> None:
    convert(base, tmp_path / "copy", "hf", dtype=torch.float32)
    assert values(tmp_path / "copy" / "config.json") == {
        **values(base / "config.json", "auto_map"),
        "torch_dtype": "float32",
    }
    convert(base, tmp_path / "copy", "hf", force=True)  # over what is the same and what is not
    assert values(tmp_path / "copy" / "config.json")["torch_dtype"] == "bfloat16"
    (tmp_path / "copy" / "NOTICE").write_text("of my own")
    with pytest.raises(InputError, match="NOTICE: is no part of a checkpoint and would be lost"):
        convert(base, tmp_path / "copy", "hf", force=True)


def test_with_another_tokenizer_nothing_of_the_old_one_is_left(tmp_path: Path, quiet: None) -> None:
    convert("bundled", tmp_path / "hf", "hf")
    for name, content in KEPT.items():
        (tmp_path / "hf" / name).write_bytes(content)
    convert(tmp_path / "hf", tmp_path / "copy", "hf", tokenizer="bundled")
    names = set(contents(tmp_path / "copy"))
    assert {"README.md", "LICENSE", "tokenizer.model", "tokenizer.json"} <= names
    assert not names & {"merges.txt", "special_tokens_map.json"}
