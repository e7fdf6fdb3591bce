"""The formats that a Llama comes in: recognised, opened and written.

    native     config.json, model.pt                                 native.py
    hf         config.json, *.safetensors or pytorch_model*.bin      huggingface.py
    meta       params.json, consolidated.NN.pth                      meta.py
    llama2c    one .bin file                                         llama2c.py

`open_model` says what a path holds; nothing of the weights is read until they are asked for (`opened.py`).
Read next: `opened.py`.
"""

from pathlib import Path

from minift.config import LlamaConfig
from minift.errors import InputError
from minift.formats.huggingface import has_weights, open_huggingface, read_config
from minift.formats.llama2c import open_llama2c
from minift.formats.meta import open_meta
from minift.formats.native import open_native
from minift.formats.opened import Opened
from minift.storage.links import check_links, check_name
from minift.values import read_json

FORMATS = ("native", "hf", "meta", "llama2c")


def open_model(path: str | Path) -> Opened:
    """The model at a path, of any format.

    Raises:
        InputError: when there is none, when there are two, or when it is damaged or not a Llama that minift implements.
    """
    path = Path(path)
    check_name(path)
    if path.is_dir():
        check_links(path)
    kind = recognise(path)
    if kind is None:
        raise InputError(f"{path}: {_not_a_model(path)}")
    return {"native": open_native, "hf": open_huggingface, "meta": open_meta, "llama2c": open_llama2c}[kind](path)


def shape_named(name: str) -> LlamaConfig:
    """A preset, minift's own `config.json`, or Hugging Face's. Raises InputError when it is none of them."""
    if not name.endswith(".json") or "architectures" not in (values := read_json(name)):
        return LlamaConfig.named(name)
    ours = set(values) <= set(LlamaConfig().to_dict())
    return LlamaConfig.from_dict(values, name) if ours else read_config(Path(name))[0]


def recognise(path: Path) -> str | None:
    """The format of what lies at a path, by the names of its files; None for anything else.

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
    if not path.exists():
        return "no such file or folder"
    if (path / "final").is_dir():
        return f"is a run's folder; its model is {path / 'final'}"
    if (path / "adapter_config.json").is_file():
        return "is an adapter, no whole model; take the one with the adapter in it, the final/ of its run"
    known = "model.pt (minift), model.safetensors or pytorch_model.bin (Hugging Face), consolidated.00.pth (Meta)"
    weights = [path / "model.pt", *path.glob("*.safetensors"), *path.glob("pytorch_model*"), *path.glob("*.pth")]
    if any(file.is_file() for file in weights) and not (path / "config.json").is_file():
        return f"no model: it has weights, but no {'params' if any(path.glob('*.pth')) else 'config'}.json"
    return f"no model: it has none of {known}"
