"""The one function that opens a model, whatever it is: `open_model`, for every command and for Python.

| what is named                                                | is read by       |
|--------------------------------------------------------------|------------------|
| a folder with `config.json` and `model.pt`                   | `native.py`      |
| one with `config.json` and `*.safetensors` or `pytorch_model*.bin` | `huggingface.py` |
| one with `params.json` and `consolidated.NN.pth`             | `meta.py`        |
| a `.bin` file                                                | `llama2c.py`     |
| a folder with `adapter_config.json`, and the model it names  | `peft.py`        |
| "bundled", or a name on Hugging Face's hub                   | one of these; `storage/names.py` finds the folder |

    minift info --model bundled
"""

import os
from pathlib import Path

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.carried import Carried, read_carried
from minift.formats.huggingface import has_weights, open_huggingface, read_config
from minift.formats.llama2c import open_llama2c
from minift.formats.meta import open_meta
from minift.formats.native import open_native
from minift.formats.opened import Opened
from minift.formats.peft import open_adapter
from minift.storage.checksums import check_model
from minift.storage.links import check_links, check_name
from minift.storage.names import ADAPTER_FILE, base_of, is_adapter, model_path, similar_path
from minift.values import read_json

FORMATS = {"native": open_native, "hf": open_huggingface, "meta": open_meta, "llama2c": open_llama2c}


def open_model(name: str | Path) -> Opened:
    """Open the model of any format that a name or a path leads to. None of its weights is read yet.

    An adapter is opened together with its base, as the one model that they make; the base may be an adapter, too.

    Raises:
        InputError: when there is no model, when there are two, when one is damaged or not a Llama that minift
            implements, or when an adapter is not for its base.
    """
    path = model_path(name)
    check_name(path)
    if not os.path.exists(path):  # unlike Path.exists, it takes a name that is too long
        raise InputError(f"{path}: no such file or folder{similar_path(path)}")
    if path.is_dir():
        check_links(path)
    elif path.suffix in (".model", ".json", ".pt", ".pth", ".safetensors"):
        raise InputError(f"{path}: is one file of a model; give the folder that it is in, {path.absolute().parent}")
    if is_adapter(path):
        return open_adapter(path, open_model(base_of(path)))
    format = recognise(path)
    if format is None:
        raise InputError(f"{path}: {_not_a_model(path)}")
    return FORMATS[format](path)


def huggingface_folder(name: str | Path) -> Path | None:
    """Return the Hugging Face folder that a model is or, of an adapter, its base; None for one of another format.

    Raises:
        InputError: as `open_model`, for what can be told by the names of files, and for an adapter's missing base.
    """
    path = model_path(name)
    while os.path.isdir(path):
        if not is_adapter(path):
            return path if recognise(path) == "hf" else None
        path = base_of(path)
    return None


def carried_from(name: str | Path, own_tokenizer: bool = True) -> Carried | None:
    """Return what the model's Hugging Face folder holds besides its weights; None for a model of another format.

    `own_tokenizer` says whether the new folder gets the tokenizer of this one.

    Raises:
        InputError: as `open_model`, and when that folder's side files are damaged.
    """
    folder = huggingface_folder(name)
    return None if folder is None else read_carried(folder, open_model(name).specs, own_tokenizer)


def check_model_files(name: str | Path) -> None:
    """Compare the files of a model with the checksums in its folder; an adapter's base's, too.

    All bytes of its files are read, once. A folder without checksums passes.

    Raises:
        InputError: for a damaged or missing file, by name.
    """
    path = model_path(name)
    while os.path.exists(path):
        if path.is_dir():
            check_links(path)
        check_model(path)
        if not is_adapter(path):
            return
        path = base_of(path)


def recognise(path: Path) -> str | None:
    """Return the format of the model at a path, by the names of its files; None when there is none, or an adapter.

    Raises:
        InputError: for a folder that holds the weights of two formats.
    """
    if path.is_file():
        return "llama2c"
    found = []
    if (path / "model.pt").is_file() and (path / "config.json").is_file():
        found.append("native")
    if has_weights(path) and (path / "config.json").is_file():
        found.append("hf")
    if any(path.glob("consolidated.*.pth")) and (path / "params.json").is_file():
        found.append("meta")
    if len(found) > 1:
        raise InputError(f"{path}: holds models of several formats ({', '.join(found)}); leave one")
    return found[0] if found else None


def _not_a_model(path: Path) -> str:
    if (path / "final").is_dir():
        return f"is a run's folder; its model is {path / 'final'}"
    if (path / ADAPTER_FILE).is_file():
        return f"no model: config.json has no weights with it; remove it, if {ADAPTER_FILE} is what counts"
    known = "model.pt (minift), model.safetensors or pytorch_model.bin (Hugging Face), consolidated.00.pth (Meta)"
    weights = [path / "model.pt", *path.glob("*.safetensors"), *path.glob("pytorch_model*"), *path.glob("*.pth")]
    if any(file.is_file() for file in weights) and not (path / "config.json").is_file():
        return f"no model: it has weights, but no {'params' if any(path.glob('*.pth')) else 'config'}.json"
    return f"no model: it has none of {known}"


def shape_named(name: str) -> LlamaConfig:
    """Return a preset's shape, or that of a `config.json`, minift's own or Hugging Face's.

    Raises:
        InputError: when it is none of them.
    """
    if not name.endswith(".json") or "architectures" not in (values := read_json(name)):
        return LlamaConfig.named(name)
    ours = set(values) <= set(LlamaConfig().to_dict())
    return LlamaConfig.from_dict(values, name) if ours else read_config(Path(name))[0]
