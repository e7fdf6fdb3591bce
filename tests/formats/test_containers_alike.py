"""The same tensors are accepted or refused alike in any container: one file or shards, safetensors or PyTorch's.

What can be computed (RoPE's frequencies, the head of a model that ties it to its embedding) may be there, may be
missing from an index, and may be in an index though it is gone. Names may leave `model.` out. A wrapper's prefix is
named as what it is.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minift.checkpoint import load_model
from minift.errors import InputError
from minift.formats.huggingface import config_json
from minift.formats.native import write_native
from minift.formats.open import open_model
from minift.model import Llama
from tests.helpers import bits, same, small_model

safetensors = pytest.importorskip("safetensors.torch")

Weights = dict[str, Tensor]
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def save_tensors(file: Path, weights: Weights) -> None:
    weights = {name: weight.clone() for name, weight in weights.items()}
    if file.suffix == ".safetensors":
        safetensors.save_file(weights, file, {"format": "pt"})
    else:
        torch.save(weights, file)


def in_one_file(kind: str) -> Callable[[Path, Weights], None]:
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "pt": "model.pt"}[kind]
    return lambda folder, weights: save_tensors(folder / name, weights)


def in_shards(kind: str, indexed: bool = True) -> Callable[[Path, Weights], None]:
    """In two shards; what can be computed is in the index, or is not."""

    def save(folder: Path, weights: Weights) -> None:
        names = {"safetensors": "model-0000{}-of-00002.safetensors", "bin": "pytorch_model-0000{}-of-00002.bin"}
        places = {name: names[kind].format(1 + i % 2) for i, name in enumerate(weights)}
        for file in set(places.values()):
            save_tensors(folder / file, {name: weights[name] for name in weights if places[name] == file})
        if not indexed:
            places = {name: file for name, file in places.items() if "inv_freq" not in name and "lm_head" not in name}
        (folder / INDEX[kind]).write_text(json.dumps({"weight_map": places}))

    return save


CONTAINERS = {
    "safetensors": in_one_file("safetensors"),
    "bin": in_one_file("bin"),
    "model.pt": in_one_file("pt"),
    "safetensors shards": in_shards("safetensors"),
    "bin shards": in_shards("bin"),
    "safetensors shards, not in the index": in_shards("safetensors", indexed=False),
    "bin shards, not in the index": in_shards("bin", indexed=False),
}
containers = pytest.mark.parametrize("save", CONTAINERS.values(), ids=CONTAINERS.keys())


def folder_of(tmp_path: Path, model: Llama, weights: Weights, save: Callable[[Path, Weights], None]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder, weights)
    native = (folder / "model.pt").is_file()
    text = model.config.to_json() if native else config_json(model.config, torch.float32)
    (folder / "config.json").write_text(text)
    return folder


def named(model: Llama, prefix: str = "model.") -> Weights:
    return {name if name.startswith("lm_head") else prefix + name: w for name, w in model.state_dict().items()}


def frequencies(prefix: str) -> Weights:
    places = ["rotary_emb.inv_freq", *(f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2))]
    return {prefix + place: torch.rand(4) for place in places}


@pytest.mark.parametrize("prefix", ["model.", ""])
@containers
def test_what_can_be_computed_may_be_there(tmp_path: Path, save: Callable[[Path, Weights], None], prefix: str) -> None:
    model = small_model(tie_word_embeddings=True)
    weights = {**named(model, prefix), **frequencies(prefix), "lm_head.weight": model.embed_tokens.weight.detach()}
    assert same(bits(load_model(folder_of(tmp_path, model, weights, save))), bits(model))


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("container", list(CONTAINERS)[:5])
def test_a_head_of_its_own_has_one_name(tmp_path: Path, container: str, prefix: str) -> None:
    model = small_model(tie_word_embeddings=False)
    weights = {**named(model, prefix), **frequencies(prefix)}
    assert same(bits(load_model(folder_of(tmp_path, model, weights, CONTAINERS[container]))), bits(model))


@containers
def test_another_head_of_a_tied_model_is_refused(tmp_path: Path, save: Callable[[Path, Weights], None]) -> None:
    model = small_model(tie_word_embeddings=True)
    weights = {**named(model), "lm_head.weight": model.embed_tokens.weight.detach() + 1}
    with pytest.raises(InputError, match=r"tensor lm_head\.weight is not the embedding, but config\.json ties them"):
        open_model(folder_of(tmp_path, model, weights, save))


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_proj.bias", "extra"]
)
@containers
def test_what_is_not_of_the_model_is_refused(tmp_path: Path, save: Callable[[Path, Weights], None], name: str) -> None:
    """Zeros, too: a bias that does nothing says that the config is not that of the weights."""
    model = small_model()
    with pytest.raises(InputError, match=f"tensor {name} is not (part of this model|where the index says)"):
        open_model(folder_of(tmp_path, model, {**named(model), name: torch.zeros(24)}, save))


@pytest.mark.parametrize(
    ("wrapper", "program"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel or DeepSpeed"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["in front", "inside"])
@containers
def test_a_wrapper_is_named_as_what_it_is(
    tmp_path: Path, save: Callable[[Path, Weights], None], wrapper: str, program: str, inside: bool
) -> None:
    model = small_model()
    before, after = ("model.", wrapper) if inside else (wrapper, "model.")
    weights = {before + after + name: weight for name, weight in model.state_dict().items()}
    with pytest.raises(InputError, match=f"saved from inside a wrapper: '{wrapper}' in its name is of {program}"):
        open_model(folder_of(tmp_path, model, weights, save))


@pytest.mark.parametrize("kind", INDEX)
def test_an_index_may_name_what_is_gone_if_it_can_be_computed(tmp_path: Path, kind: str) -> None:
    """Indexes of older versions of `transformers` do; of any other tensor it is damage."""
    model = small_model(tie_word_embeddings=True)
    folder = folder_of(tmp_path, model, named(model), in_shards(kind))
    index = json.loads((folder / INDEX[kind]).read_text())["weight_map"]
    shard = next(iter(index.values()))
    stale = dict.fromkeys(["lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"], shard)
    (folder / INDEX[kind]).write_text(json.dumps({"weight_map": {**index, **stale}}))
    assert same(bits(load_model(folder)), bits(model))
    (folder / INDEX[kind]).write_text(json.dumps({"weight_map": {**index, "model.layers.7.mlp.up_proj.weight": shard}}))
    with pytest.raises(InputError, match=r"tensor model\.layers\.7\.mlp\.up_proj\.weight is missing; the index says"):
        open_model(folder)


def test_minifts_own_file_is_written_as_before(tmp_path: Path) -> None:
    model = small_model()
    (tmp_path / "model").mkdir()
    opened = open_model(folder_of(tmp_path / "model", model, named(model), CONTAINERS["safetensors"]))
    (tmp_path / "native").mkdir()
    write_native(tmp_path / "native", model.config, opened.specs, opened.read)
    assert set(torch.load(tmp_path / "native" / "model.pt", weights_only=True)) == set(model.state_dict())
