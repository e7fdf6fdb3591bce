"""One function opens a model, whatever it is: for Python, for the tokenizer, and for every command.

The bundled base is put down once in each form, adapters of adapters among them. Each is the same model, to the bit,
with the same tokenizer, to whoever asks.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minift import BasicModelRunner, bundled, load_model, load_tokenizer
from minift.checkpoint import model_without_memory, weights_of
from minift.cli import main
from minift.errors import InputError
from minift.formats.convert import convert
from minift.formats.open import open_model
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig
from minift.model import Llama
from minift.runs.finetune import finetune_job
from minift.storage.names import model_path
from tests.helpers import bits, same

FORMS = {
    "bundled": "native",
    "native": "native",
    "hf": "hf",
    "meta": "meta",
    "model.bin": "llama2c",
    "someone/a-model": "hf",
    "adapter": "peft",
    "adapter-of-adapter": "peft",
    "adapter-of-bundled": "peft",
    "adapter-of-hub": "peft",
    "adapter-of-bin": "peft",
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base in each form; adapters add zeros, so that they are the same model."""
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("forms")
    for name in ("native", "hf", "meta", "model.bin"):
        convert("bundled", folder / ("bin" if name == "model.bin" else "") / name, FORMS[name])
    snapshot = folder / "cache" / "models--someone--a-model" / "snapshots" / "0123abcd"
    shutil.copytree(folder / "hf", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abcd")
    model = load_model(bundled("base"))
    bases = {
        "adapter": str(folder / "native"),
        "adapter-of-adapter": str(folder / "adapter"),
        "adapter-of-bundled": "bundled",
        "adapter-of-hub": "someone/a-model",
        "adapter-of-bin": str(folder / "bin" / "model.bin"),
    }
    for name, base in bases.items():
        (folder / name).mkdir()
        write_peft(folder / name, zero_adapter(model), LoRAConfig(2, 2.0, ("v_proj",)), base)
    return folder


def zero_adapter(model: Llama) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith("v_proj.weight"):
            rows, columns = parameter.shape
            weights[name.replace("weight", "lora_A")] = torch.ones(2, columns)
            weights[name.replace("weight", "lora_B")] = torch.zeros(rows, 2)
    return weights


@pytest.fixture
def named(forms: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What to call each form."""
    monkeypatch.setenv("HF_HUB_CACHE", str(forms / "cache"))

    def name(form: str) -> str:
        if form in ("bundled", "someone/a-model"):
            return form
        return str(forms / "bin" / form if form == "model.bin" else forms / form)

    return name


@every_form
def test_every_form_is_the_same_model_in_python(named: Callable[[str], str], form: str) -> None:
    wanted = load_model(bundled("base"))
    model = load_model(named(form))
    assert same(bits(model), bits(wanted))
    assert model.config == wanted.config
    assert open_model(named(form)).format == FORMS[form]
    assert same(dict(weights_of(named(form))), bits(wanted))
    assert model_without_memory(named(form)).config == wanted.config
    text = "What is the capital of Mexico?"
    assert load_tokenizer(named(form)).encode(text) == load_tokenizer(bundled("base")).encode(text)


@every_form
def test_every_form_is_opened_by_every_command(
    named: Callable[[str], str], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = named(form)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"question": "What is the capital of Mexico?", "answer": "Mexico City"}\n' * 4)
    assert main(["info", "--model", name, "--json", str(tmp_path / "info.json")]) == 0
    said = json.loads((tmp_path / "info.json").read_text())
    assert said["format"] == FORMS[form]
    assert said["tokenizer"].endswith("2,048 ids")
    assert main(["generate", "--model", name, "--prompt", "What", "--max-new-tokens", "2"]) == 0
    assert main(["evaluate", "--model", name, "--data", str(data)]) == 0
    assert main(["compare", name, "bundled", "--data", str(data)]) == 0
    assert main(["explain", "What", "--model", name]) == 0
    assert main(["tokenizer", "show", "What", "--model", name]) == 0
    assert main(["data", "stats", str(data), "--tokenizer", name]) == 0
    out = tmp_path / "run"
    words = ["--steps", "1", "--data", str(data), "--out", str(out), "--max-length", "32", "--device", "cpu"]
    assert main(["finetune", "--model", name, *words]) == 0
    assert main(["convert", name, str(tmp_path / "converted"), "--to", "native"]) == 0
    assert same(bits(load_model(tmp_path / "converted")), bits(load_model("bundled")))
    capsys.readouterr()


@every_form
def test_every_form_is_taken_by_the_runner(named: Callable[[str], str], form: str) -> None:
    assert same(bits(BasicModelRunner(named(form), device="cpu").model), bits(load_model("bundled")))


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_called_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bundled` is the base; `./bundled`, or a Path, is the folder."""
    monkeypatch.chdir(tmp_path)
    assert model_path("bundled") == bundled("base")
    assert model_path(Path("bundled")) == Path("bundled")
    for place in ("./bundled", "bundled/", Path("bundled")):
        with pytest.raises(InputError, match=r"bundled: no such file or folder$"):
            load_model(place)
    convert("bundled", "bundled", "meta")
    for place in ("./bundled", "bundled/", Path("bundled"), finetune_job("./bundled", ["x.jsonl"]).model):
        assert open_model(place).format == "meta"
    assert open_model("bundled").format == "native"


@pytest.mark.parametrize("name", ["nowhere", "someone/a-model", "a/b/c", "", "x" * 300, "y/" + "x" * 300])
def test_a_name_of_nothing_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        load_tokenizer(name)
    for words in (["info", "--model", name], ["convert", name, "there", "--to", "hf"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said == f"minift: error: {caught.value}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_the_place_of_its_model(named: Callable[[str], str]) -> None:
    """And not the name, which may lead elsewhere when the run is resumed."""
    assert finetune_job("bundled").model == str(bundled("base"))
    assert finetune_job(named("someone/a-model"), ["x.jsonl"]).model.endswith("snapshots/0123abcd")
