"""The promise of `formats/huggingface.py`: `transformers` and minift read each other's folders, and compute the same.

`transformers` is used as it comes, with random weights, random norms and an `rms_norm_eps` that matters. Held here:

* what it saved gives its own logits within 1e-5 in float32 and 1e-10 in float64: multi-head, grouped-query and
  multi-query attention, tied and untied, plain and llama3 RoPE past the original positions, heads of any width; in one
  file and in shards, safetensors and `.bin`; with the config of version 5 and those of version 4;
* what older versions left out or left in is read as `transformers` reads it;
* another model is refused, by the name of the key; Mistral is read where its window does not bind;
* what minift writes, `transformers` loads without a missing, unexpected or mismatched key, and gives the same logits
  and the same ids: after `minift convert`, and as the result of a run.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.errors import InputError
from minift.formats.generation import GENERATION_KEYS
from minift.formats.huggingface import CONFIG_KEYS, write_huggingface
from minift.formats.open import open_model
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import TEXTS, noise, random_model, write_jsonl

safetensors = pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

V, B, T = 97, 2, 128
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T,
    "rms_norm_eps": 0.01,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
# Over 32 positions a pair of channels is left alone above 4 turns (all of these widths have such a pair), slowed down
# below 0.25 turns (the same), and blended between.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
HEADS = {"multi-head": 4, "grouped-query": 2, "multi-query": 1}
ROPES = {"theta 10000": {**PLAIN, "rope_theta": 10_000.0}, "theta 500": PLAIN, "llama3": LLAMA3}
WIDTHS = (None, 6, 10, 14)  # None: hidden_size / num_attention_heads
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
kinds = pytest.mark.parametrize("kind", KINDS)


def theirs_of(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A random model of `transformers`; its weights are large, so that logits are far from uniform."""
    make_config, make_model = KINDS[kind]
    values = {**SHAPE, "rope_parameters": dict(PLAIN), **({"sliding_window": None} if kind == "mistral" else {})}
    model = make_model(make_config(**{**values, **shape})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return converted(model, dtype)


def converted(model: Any, dtype: torch.dtype, ndim: tuple[int, ...] = (1, 2)) -> Any:
    """Their model in another dtype: the parameters only, as when it is loaded, where `to` would round RoPE's table."""
    for parameter in model.parameters():
        if parameter.ndim in ndim:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def tokens_of(vocab_size: int = V) -> Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


def logits(model: Any, vocab_size: int = V) -> Tensor:
    """Of our model or theirs, for the same tokens: [B, T, V]."""
    with torch.no_grad():
        out = model(tokens_of(vocab_size))
    return out if isinstance(out, Tensor) else out.logits


def assert_same_logits(ours: Any, theirs: Any, tolerance: float, spread: float = 0.9) -> None:
    size = theirs.config.vocab_size
    a, b = logits(ours, size), logits(theirs, size)
    assert a.shape == b.shape == (B, T, size)
    assert a.dtype == b.dtype
    assert float(b.std()) > spread  # near zero, any two models would agree
    assert float((a - b).abs().max()) < tolerance


def load_theirs(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """What `transformers` makes of a folder, with nothing left over on either side."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found.values()), found  # missing, unexpected, mismatched keys; error messages
    return model.eval()


def change_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}))


def change_end(folder: Path, ends: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))


# Folders in every form ------------------------------------------------------------------------------------------------


def version_4(folder: Path, names: tuple[str, ...], plain: Any = None) -> None:
    """Rewrite a `config.json` as version 4 had it; `names` are those of the key that names the kind of scaling."""
    values = json.loads((folder / "config.json").read_text())
    rope = values["rope_parameters"]
    kind = rope.pop("rope_type")
    scaling = plain if kind == "default" else {**dict.fromkeys(names, kind), **rope}
    scaling = scaling and {key: value for key, value in scaling.items() if key != "rope_theta"}
    changes = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": values["dtype"]}
    change_config(folder, ("rope_parameters", "dtype"), **changes, transformers_version="4.46.0")


FORMS: dict[str, Callable[[Path], None]] = {
    "version 5": lambda folder: None,
    "version 4": lambda folder: version_4(folder, ("rope_type",)),
    "version 4, older": lambda folder: version_4(folder, ("type",)),
    "version 4, both names": lambda folder: version_4(folder, ("type", "rope_type"), {"rope_type": "default"}),
}


def write_bins(folder: Path, weights: dict[str, Tensor], shards: int = 1, **options: Any) -> None:
    """Put the weights into `pytorch_model*.bin`, as `transformers` 4 did by `torch.save`, in place of safetensors."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return
    index = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name].clone() for name in list(weights)[i::shards]}
        torch.save(part, folder / file, **options)
        index |= dict.fromkeys(part, file)
    values = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(values))


def old_weights(model: Any) -> dict[str, Tensor]:
    """A state dict as versions before 4.33 had it: with the head of a tied model, and RoPE's frequencies per layer."""
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    return {**model.state_dict(), **buffers}


def in_one_file(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=16_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()


def in_bin(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    write_bins(folder, model.state_dict())


def in_bin_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    write_bins(folder, model.state_dict(), shards=3)


def in_legacy_bin(model: Any, folder: Path) -> None:
    """The container that PyTorch wrote before 1.6."""
    model.save_pretrained(folder)
    write_bins(folder, model.state_dict(), _use_new_zipfile_serialization=False)


CONTAINERS = [in_one_file, in_shards, in_bin, in_bin_shards, in_legacy_bin]
containers = pytest.mark.parametrize("save", CONTAINERS, ids=lambda save: save.__name__)


@heads
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("kv_heads", HEADS.values(), ids=HEADS.keys())
def test_what_transformers_saved_gives_its_logits(
    tmp_path: Path, kv_heads: int, rope: dict[str, Any], width: int | None, tied: bool
) -> None:
    """The whole product of shapes; containers and forms of the config come in turn, so that every two things meet."""
    theirs = theirs_of(num_key_value_heads=kv_heads, head_dim=width, rope_parameters=rope, tie_word_embeddings=tied)
    save, form = TURNS[(kv_heads, str(rope), width, tied)]
    save(theirs, tmp_path)
    form(tmp_path)
    config = open_model(tmp_path).config
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (kv_heads, width or 8, tied)
    for dtype, tolerance in TOLERANCES.items():
        assert_same_logits(load_model(tmp_path, dtype=dtype), converted(theirs, dtype), tolerance)


TURNS = {
    (kv_heads, str(rope), width, tied): (CONTAINERS[i % 5], list(FORMS.values())[i // 5 % 4])
    for i, (kv_heads, rope, width, tied) in enumerate(product(HEADS.values(), ROPES.values(), WIDTHS, (True, False)))
}


@pytest.mark.parametrize(("rope", "tied"), [(PLAIN, True), (LLAMA3, False)], ids=["plain-tied", "llama3-untied"])
@pytest.mark.parametrize("form", FORMS)
@containers
def test_a_folder_in_any_form_gives_the_logits_that_transformers_reads_from_it(
    tmp_path: Path, save: Callable[..., None], form: str, rope: dict[str, Any], tied: bool
) -> None:
    saved = theirs_of(head_dim=10, rope_parameters=rope, tie_word_embeddings=tied)
    save(saved, tmp_path)
    FORMS[form](tmp_path)
    assert open_model(tmp_path).notes == ()
    assert_same_logits(load_model(tmp_path), saved, 1e-5)
    double = load_model(tmp_path, dtype=torch.float64)  # from the float32 of the file, as theirs is
    assert_same_logits(double, load_theirs(tmp_path, torch.float64), 1e-10)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_grid_tells_its_ropes_apart(width: int | None) -> None:
    """So that equal logits are evidence: theirs differ for each RoPE, also past the original positions."""
    plain, slow, scaled = (
        logits(theirs_of(head_dim=width, rope_parameters=rope)) for rope in (PLAIN, ROPES["theta 10000"], LLAMA3)
    )
    assert float((plain - slow).abs().max()) > 0.1
    assert float((plain - scaled)[:, 32:].abs().max()) > 0.1


# Dtypes and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@containers
def test_the_dtype_of_the_file_is_kept_on_request(
    tmp_path: Path, save: Callable[..., None], dtype: torch.dtype
) -> None:
    theirs = theirs_of(dtype=dtype)
    save(theirs, tmp_path)
    ours = load_model(tmp_path, dtype=None)
    weights = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        same = weights[name if name.startswith("lm_head") else f"model.{name}"]
        assert parameter.dtype == same.dtype == dtype
        assert torch.equal(parameter, same), name
    assert load_model(tmp_path).embed_tokens.weight.dtype == torch.float32
    assert_same_logits(load_model(tmp_path, dtype=torch.float64), converted(theirs, torch.float64), 1e-10)


@pytest.mark.parametrize(
    ("matrices", "norms", "widest"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other's numbers
    ],
    ids=str,
)
@pytest.mark.parametrize("save", [in_one_file, in_bin_shards], ids=lambda save: save.__name__)
def test_of_several_dtypes_the_widest_is_taken(
    tmp_path: Path, save: Callable[..., None], matrices: torch.dtype, norms: torch.dtype, widest: torch.dtype
) -> None:
    theirs = converted(theirs_of(dtype=matrices), norms, ndim=(1,))
    save(theirs, tmp_path)
    ours = load_model(tmp_path, dtype=None)
    assert {parameter.dtype for parameter in ours.parameters()} == {widest}
    assert_same_logits(ours, converted(theirs, widest), TOLERANCES[widest])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("save", [in_one_file, in_shards], ids=lambda save: save.__name__)
def test_safetensors_count_before_bin(tmp_path: Path, save: Callable[..., None], shards: int) -> None:
    theirs = theirs_of(seed=1)
    in_one_file(theirs_of(seed=2), tmp_path)
    write_bins(tmp_path, theirs_of(seed=2).state_dict(), shards)
    save(theirs, tmp_path)
    assert list(tmp_path.glob("pytorch_model*.bin"))
    assert_same_logits(load_model(tmp_path), theirs, 1e-5)
    assert_same_logits(load_theirs(tmp_path), theirs, 1e-5)


# What older versions wrote --------------------------------------------------------------------------------------------


@heads
@pytest.mark.parametrize("shards", [1, 3])
def test_frequencies_and_a_tied_head_in_an_old_bin_are_passed_over(tmp_path: Path, shards: int, tied: bool) -> None:
    theirs = theirs_of(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    write_bins(tmp_path, old_weights(theirs), shards)
    FORMS["version 4"](tmp_path)
    assert_same_logits(load_model(tmp_path), theirs, 1e-5)


@pytest.mark.parametrize("shards", [1, 3])
def test_another_head_in_a_tied_model_is_refused(tmp_path: Path, shards: int) -> None:
    theirs = theirs_of(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    weights = old_weights(theirs)
    head = weights["lm_head.weight"].clone()
    head[-1, -1] += 1e-3
    write_bins(tmp_path, {**weights, "lm_head.weight": head}, shards)
    with pytest.raises(InputError, match=r"pytorch_model.*\.bin: tensor lm_head\.weight .*tie"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_proj.bias", "extra"]
)
def test_a_tensor_too_many_is_refused(tmp_path: Path, name: str) -> None:
    """There is no third layer, and no bias: the config is not that of the weights."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    write_bins(tmp_path, {**theirs.state_dict(), name: torch.zeros(32)})
    with pytest.raises(InputError, match=f"pytorch_model.bin: tensor {name} "):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    """An untied head too, which `transformers` would fill with random numbers."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    write_bins(tmp_path, {key: value for key, value in theirs.state_dict().items() if key != name})
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        load_model(tmp_path)


LEFT_OUT = [
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "head_dim",
    "rope_theta",
    "rope_scaling",
]


@kinds
@pytest.mark.parametrize("key", [*LEFT_OUT, "all of them"])
def test_a_key_that_is_left_out_means_what_transformers_takes(tmp_path: Path, kind: str, key: str) -> None:
    shape = {"bos_token_id": 5, "eos_token_id": 6, "initializer_range": 0.5, "num_key_value_heads": 4}
    theirs_of(kind, **shape).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    FORMS["version 4"](tmp_path)
    remove = tuple(LEFT_OUT) if key == "all of them" else (key,)
    change_config(tmp_path, remove)
    assert not set(remove) & set(json.loads((tmp_path / "config.json").read_text()))
    ours, theirs = load_model(tmp_path), load_theirs(tmp_path)
    assert_same_logits(ours, theirs, 1e-5)
    for name in ("rms_norm_eps", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert ours.config.rope_theta == (500 if key not in ("rope_theta", "all of them") else 10_000)


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
@pytest.mark.parametrize("keys", [("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim")])
def test_without_heads_of_their_own_keys_have_as_many_as_queries(
    tmp_path: Path, keys: tuple[str, ...], absent: bool
) -> None:
    """As in the first Llama's config, where each query head had its keys and a head was D / H wide."""
    saved = theirs_of(num_key_value_heads=4)
    saved.save_pretrained(tmp_path)
    change_config(tmp_path, keys if absent else (), **({} if absent else dict.fromkeys(keys)))
    ours, theirs = load_model(tmp_path), load_theirs(tmp_path)
    assert (ours.config.num_key_value_heads, ours.config.head_dim) == (4, 8)
    assert_same_logits(ours, saved, 1e-5)
    assert_same_logits(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("config", "generation", "merged"),
    [
        (2, 2, (2,)),
        ([2, 7], [2, 7], (2, 7)),
        ([7, 2], None, (7, 2)),
        (2, [2, 7, 9], (2, 7, 9)),
        (2, 9, (2, 9)),
        ([2, 7], [9, 7], (2, 7, 9)),
    ],
    ids=str,
)
def test_every_end_of_config_and_generation_config_counts(
    tmp_path: Path, config: Any, generation: Any, merged: tuple[int, ...]
) -> None:
    theirs_of().save_pretrained(tmp_path)
    change_config(tmp_path, eos_token_id=config)
    change_end(tmp_path, generation)
    ours = load_model(tmp_path)
    assert ours.config.eos_token_ids == merged
    stops = load_theirs(tmp_path).generation_config.eos_token_id
    assert set(stops if isinstance(stops, list) else [stops]) - {None} <= set(merged)
    (tmp_path / "generation_config.json").unlink()
    assert load_model(tmp_path).config.eos_token_ids == (tuple(config) if isinstance(config, list) else (config,))


# Mistral --------------------------------------------------------------------------------------------------------------


@dtypes
@heads
@pytest.mark.parametrize("window", [None, T, T + 1, 4096])
@pytest.mark.parametrize("rope", [PLAIN, LLAMA3], ids=["plain", "llama3"])
def test_mistral_is_read_where_its_window_does_not_bind(
    tmp_path: Path, rope: dict[str, Any], window: int | None, tied: bool, dtype: torch.dtype
) -> None:
    """Held on texts as long as the positions go."""
    theirs = theirs_of("mistral", dtype=dtype, sliding_window=window, rope_parameters=rope, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    assert open_model(tmp_path).notes == ()
    assert_same_logits(load_model(tmp_path, dtype=dtype), theirs, TOLERANCES[dtype])


@pytest.mark.parametrize("window", [T - 1, 16, 1])
def test_mistral_is_refused_where_its_window_binds(tmp_path: Path, window: int) -> None:
    theirs = theirs_of("mistral", sliding_window=window)
    free = theirs_of("mistral")
    assert float((logits(theirs) - logits(free))[:, -1].abs().max()) > 1e-3  # it does bind
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"config\.json: sliding_window {window} binds .*{T}"):
        load_model(tmp_path)


def test_mistral_has_a_window_where_its_config_names_none(tmp_path: Path) -> None:
    """Leaving the key out means 4096 (null means none), whatever the positions are by default."""
    theirs_of("mistral").save_pretrained(tmp_path)
    change_config(tmp_path, ("sliding_window",), max_position_embeddings=4096)
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    load_model(tmp_path)
    change_config(tmp_path, max_position_embeddings=4097)
    with pytest.raises(InputError, match="sliding_window 4096 binds"):
        load_model(tmp_path)
    change_config(tmp_path, ("max_position_embeddings",))
    assert transformers.AutoConfig.from_pretrained(tmp_path).max_position_embeddings > 4096
    with pytest.raises(InputError, match="sliding_window 4096 binds"):
        load_model(tmp_path)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of `transformers`, to be copied and spoiled: one for each kind and form of the config."""
    root = tmp_path_factory.mktemp("saved")
    for kind, (number, form) in product(KINDS, enumerate(FORMS.values())):
        theirs_of(kind).save_pretrained(root / f"{kind}{number}")
        form(root / f"{kind}{number}")
    return root


def spoiled(saved: Path, tmp_path: Path, kind: str, form: int, *remove: str, **changes: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(saved / f"{kind}{form}", folder)
    open_model(folder)  # works before it is spoiled
    change_config(folder, remove, **changes)
    return folder


@pytest.mark.parametrize(("kind", "form"), [("llama", 0), ("mistral", 1)], ids=["llama-5", "mistral-4"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("hidden_act", "relu"),
        ("attention_dropout", 0.1),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("per_layer_config", {"1": {"skip": ["mlp"]}}),
        ("pruned_heads", {"0": [1]}),
        ("model_type", "gpt2"),
        ("model_type", "qwen2"),
        ("model_type", None),
        ("architectures", ["Qwen2ForCausalLM"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", ["LlamaForCausalLM", "LlamaModel"]),
        ("eos_token_id", 97),
        ("bos_token_id", -1),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", 7),
        ("hidden_size", "32"),
        ("rms_norm_eps", 0),
        ("sliding_window", 64),
    ],
    ids=str,
)
def test_another_model_is_refused_by_the_key(
    saved: Path, tmp_path: Path, kind: str, form: int, key: str, value: Any
) -> None:
    folder = spoiled(saved, tmp_path, kind, form, **{key: value})
    with pytest.raises(InputError, match=rf"config\.json: .*{key}"):
        open_model(folder)


@kinds
@pytest.mark.parametrize("form", ["version 5", "version 4", "version 4, older"])
@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "mrope"])
def test_another_rope_is_refused_by_its_type(saved: Path, tmp_path: Path, kind: str, form: str, rope_type: str) -> None:
    key = "type" if form == "version 4, older" else "rope_type"
    scaling = {**LLAMA3, key: rope_type}
    theta = scaling.pop("rope_theta")
    if key == "type":
        del scaling["rope_type"]
    changes = (
        {"rope_parameters": {**scaling, "rope_theta": theta}} if form == "version 5" else {"rope_scaling": scaling}
    )
    folder = spoiled(saved, tmp_path, kind, list(FORMS).index(form), **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*rope_type is '{rope_type}'"):
        open_model(folder)
    scaling[key] = "llama3"
    change_config(folder, **({"rope_parameters": {**scaling, "rope_theta": theta}} if form == "version 5" else {}))
    change_config(folder, **({} if form == "version 5" else {"rope_scaling": scaling}))
    assert open_model(folder).config.rope_scaling is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {**PLAIN, "factor": 2.0}}, "factor"),
        ({"rope_parameters": {**LLAMA3, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor"),
        ({"rope_parameters": [500.0]}, "rope_parameters"),
        ({"rope_parameters": PLAIN, "rope_theta": 10_000.0}, "rope_theta"),
        # `transformers` lets this one, outside the object, count before the one inside.
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, "original_max_position_embeddings"),
        ({"rope_parameters": PLAIN, "rope_scaling": {**LLAMA3, "rope_theta": 500.0}}, "rope_scaling"),
        ({"rope_scaling": "llama3", "rope_parameters": None}, "rope_scaling"),
    ],
    ids=str,
)
def test_a_rope_that_is_not_llamas_is_refused_by_the_key(
    saved: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = spoiled(saved, tmp_path, "llama", 0, **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*{named}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "model_type", ["llama"]),
        ("llama", "architectures", 5),
        ("llama", "num_key_value_heads", "2"),
        ("llama", "rope_theta", "500"),
        ("llama", "eos_token_id", 2.5),
        ("llama", "eos_token_id", [[2]]),
        ("mistral", "sliding_window", 16.0),
        ("mistral", "sliding_window", "16"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_by_the_key(
    saved: Path, tmp_path: Path, kind: str, key: str, value: Any
) -> None:
    folder = spoiled(saved, tmp_path, kind, 1, **{key: value})
    with pytest.raises(InputError, match=rf"config\.json: .*{key}"):
        open_model(folder)


@pytest.mark.parametrize("ends", [2.5, [[2]], "2", [2, V], True, {"a": 2}], ids=str)
def test_ends_in_generation_config_that_are_no_ids_are_refused(saved: Path, tmp_path: Path, ends: Any) -> None:
    folder = spoiled(saved, tmp_path, "llama", 0)
    change_end(folder, ends)
    with pytest.raises(InputError, match=r"generation_config\.json: .*eos_token_id"):
        open_model(folder)


@pytest.mark.parametrize("form", [0, 1], ids=["version 5", "version 4"])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("num_key_value_heads", "num_key_value_head"),
        ("num_key_value_heads", "num_kv_value_heads"),
        ("tie_word_embeddings", "tie_word_embedding"),
        ("rms_norm_eps", "rms_norm_epsilon"),
        ("rms_norm_eps", "rmsnorm_eps"),
        ("rope_theta", "rope_thetas"),
        ("max_position_embeddings", "max_position_embedding"),
        ("head_dim", "head_dims"),
        ("attention_bias", "attention_biases"),
    ],
)
def test_a_misspelled_key_is_refused(saved: Path, tmp_path: Path, form: int, right: str, wrong: str) -> None:
    folder = spoiled(saved, tmp_path, "llama", form, right, **{wrong: 4})
    with pytest.raises(InputError, match=rf"config\.json: unknown key '{wrong}'; did you mean '{right}'"):
        open_model(folder)


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type"]


@pytest.mark.parametrize(("kind", "key"), [*product(KINDS, SIZES), ("mistral", "num_key_value_heads")])
def test_a_size_is_never_guessed(saved: Path, tmp_path: Path, kind: str, key: str) -> None:
    """`transformers` has defaults for them: the sizes of one published model."""
    folder = spoiled(saved, tmp_path, kind, 1, key)
    with pytest.raises(InputError, match=rf"config\.json: .*{key}"):
        open_model(folder)


@kinds
@pytest.mark.parametrize("form", range(len(FORMS)), ids=list(FORMS))
def test_an_unknown_key_that_is_no_misspelling_is_noted(saved: Path, tmp_path: Path, kind: str, form: int) -> None:
    changes = {"auto_map": {"AutoConfig": "x.py"}, "tokenizer_class": "LlamaTokenizer", "_flash_attn": True}
    folder = spoiled(saved, tmp_path, kind, form, **changes)
    (note,) = open_model(folder).notes
    assert all(key in note for key in changes)
    assert not any(key in note for key in SHAPE)
    assert_same_logits(load_model(folder), load_theirs(folder), 1e-5)


# Every key of theirs --------------------------------------------------------------------------------------------------


@kinds
def test_every_key_of_their_config_is_known(kind: str) -> None:
    """A key that a new version adds fails here, until it is used, found to be harmless, or refused."""
    theirs = KINDS[kind][0](sliding_window=None) if kind == "mistral" else KINDS[kind][0]()
    keys = {field.name for field in dataclasses.fields(theirs)} | set(theirs.to_dict())
    assert keys - CONFIG_KEYS == set()


def test_every_key_of_their_generation_config_is_known() -> None:
    assert set(vars(transformers.GenerationConfig())) - GENERATION_KEYS == set()


def test_layers_of_several_kinds_are_refused_where_transformers_makes_them(tmp_path: Path) -> None:
    """Its `per_layer_config` would leave a layer's MLP out; all tensors are there, and the shapes are right."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, per_layer_config={"1": {"skip": ["mlp"]}})
    with pytest.raises(InputError, match=r"config\.json: per_layer_config is .*; minift implements None only"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "do_sample, temperature, top_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"suppress_tokens": [5], "num_beams": 4}, "num_beams, suppress_tokens"),
        ({"do_sample": False, "temperature": 0.6}, None),
        ({"repetition_penalty": 1.0, "num_beams": 1, "max_length": 20, "cache_implementation": "static"}, None),
    ],
    ids=str,
)
def test_what_generation_config_asks_for_is_noted(tmp_path: Path, values: dict[str, Any], named: str | None) -> None:
    theirs_of().save_pretrained(tmp_path)
    assert open_model(tmp_path).notes == ()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    asked = (
        f"generation_config.json asks for {named}: minift does not follow it, but its own flags (greedy without them)"
    )
    assert open_model(tmp_path).notes == ((asked,) if named else ())


def test_an_unknown_key_of_generation_config_is_noted(tmp_path: Path) -> None:
    theirs_of().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "a_key_of_tomorrow": 3, "another": None}))
    assert open_model(tmp_path).notes == (
        "generation_config.json has keys that minift does not use: a_key_of_tomorrow",
    )


# What minift writes ---------------------------------------------------------------------------------------------------

RESULTS: dict[str, dict[str, Any]] = {
    "tied": {"num_key_value_heads": 4},
    "untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "grouped-query": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 10},
    "rope_theta": {"rope_theta": 500.0, "rms_norm_eps": 0.01},
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3, untied": {"rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": False, "head_dim": 14},
    "several ends": {"eos_token_id": (2, 7, 9), "bos_token_id": 5},
    "one end": {"eos_token_id": (9,), "bos_token_id": 0},
}


def save_native(folder: Path, shape: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A minift checkpoint without a tokenizer; `rope_scaling` is put into its config as its file has it."""
    shape = dict(shape)
    scaling = shape.pop("rope_scaling", None)
    save_model(folder, random_model(dtype, **{"max_position_embeddings": T, **shape}))
    if scaling:
        (folder / "SHA256SUMS").unlink()
        change_config(folder, rope_scaling={key: value for key, value in scaling.items() if key != "rope_theta"})
        assert load_model(folder).config.rope_scaling is not None
    return folder


def convert(*words: str | Path) -> None:
    assert main(["convert", *map(str, words), "--to", "hf"]) == 0


def assert_ids_agree(folder: Path, tokenizer: Tokenizer) -> None:
    """`AutoTokenizer` gives the ids of ours, BOS in front, and the texts back."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*TEXTS, *noise(100)]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        # Theirs takes "<s>" in a text for the token unless told otherwise.
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, ascii(text)
        if "<s>" not in text:
            assert theirs(text)["input_ids"] == ids, ascii(text)
        assert theirs.decode(ids, skip_special_tokens=True) == text, ascii(text)


@pytest.mark.parametrize("shape", RESULTS.values(), ids=RESULTS.keys())
def test_a_converted_model_loads_in_transformers(
    tmp_path: Path, shape: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_native(tmp_path / "native", shape)
    convert(source, tmp_path / "hf")
    capsys.readouterr()
    theirs = load_theirs(tmp_path / "hf")
    ours = load_model(source)
    assert type(theirs) is transformers.LlamaForCausalLM
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == ours.config.tie_word_embeddings
    assert_same_logits(ours, theirs, 1e-5)
    assert_same_logits(load_model(source, dtype=torch.float64), load_theirs(tmp_path / "hf", torch.float64), 1e-10)

    ends = shape.get("eos_token_id", (2,))
    for config in (theirs.config, theirs.generation_config):
        assert config.eos_token_id == (list(ends) if len(ends) > 1 else ends[0])
        assert config.bos_token_id == shape.get("bos_token_id", 1)
    for name in ("max_position_embeddings", "rms_norm_eps", "head_dim", "num_key_value_heads", "initializer_range"):
        assert getattr(theirs.config, name) == getattr(ours.config, name)
    again = load_model(tmp_path / "hf")  # and comes back to minift
    assert again.config.eos_token_ids == tuple(ends)
    assert dataclasses.replace(again.config, eos_token_id=ends) == dataclasses.replace(ours.config, eos_token_id=ends)
    assert open_model(tmp_path / "hf").notes == ()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_the_config_has_the_keys_that_version_4_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(save_native(tmp_path / "native", RESULTS["llama3, untied"]), tmp_path / "hf")
    capsys.readouterr()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "rope_parameters" not in config
    assert config["rope_theta"] == LLAMA3["rope_theta"]
    assert {**config["rope_scaling"], "rope_theta": 500.0} == LLAMA3
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["torch_dtype"], config["hidden_act"]) == ("float32", "silu")
    with safetensors.safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # or version 4 refuses it


@pytest.mark.parametrize("shard_bytes", [1, 9_000, 10**9])
@pytest.mark.parametrize("name", ["tied", "multi-query", "llama3, untied", "several ends"])
def test_a_converted_model_in_shards_loads_in_transformers(tmp_path: Path, name: str, shard_bytes: int) -> None:
    source = open_model(save_native(tmp_path / "native", RESULTS[name]))
    folder = tmp_path / "hf"
    folder.mkdir()
    write_huggingface(folder, source.config, source.specs, source.read, shard_bytes=shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    held: dict[str, str] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes
        held |= dict.fromkeys(tensors, file.name)
    assert len(held) == len(source.specs)
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (folder / "model.safetensors.index.json").exists()
    else:
        assert len(files) == len(held) if shard_bytes == 1 else 1 < len(files) < len(held)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in source.specs.values())
    theirs = load_theirs(folder)
    assert_same_logits(load_model(tmp_path / "native"), theirs, 1e-5)
    assert_same_logits(load_model(folder), theirs, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_converted_model_has_the_dtype_that_was_asked_for(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_native(tmp_path / "native", RESULTS["untied"])
    convert(source, tmp_path / "hf", "--dtype", dtype)
    convert(tmp_path / "hf", tmp_path / "kept")
    capsys.readouterr()
    wanted = dict(load_model(source, dtype=getattr(torch, dtype)).named_parameters())
    for folder in (tmp_path / "hf", tmp_path / "kept"):
        theirs = load_theirs(folder, "auto")
        assert theirs.dtype == getattr(torch, dtype)
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, wanted[name.removeprefix("model.")]), name


def test_the_converted_base_and_its_tokenizer_load_in_transformers(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(bundled("base"), tmp_path / "hf")
    capsys.readouterr()
    theirs = load_theirs(tmp_path / "hf")
    assert_same_logits(load_model(bundled("base")), theirs, 1e-4, spread=2)  # logits up to 30
    double = load_model(bundled("base"), dtype=torch.float64)
    assert_same_logits(double, load_theirs(tmp_path / "hf", torch.float64), 1e-10, spread=2)
    assert_ids_agree(tmp_path / "hf", tokenizer)
    again = load_tokenizer(tmp_path / "hf")  # now from tokenizer.json
    assert [again.encode(text, special=False) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("save_format", ["hf", "native"])
def test_a_finetuned_model_loads_in_transformers(
    tmp_path: Path,
    small_checkpoint: Path,
    tokenizer: Tokenizer,
    save_format: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(12)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["finetune", "--model", small_checkpoint, "--data", data, "--out", tmp_path / "run", "--device", "cpu"]
    flags = ["--steps", 2, "--warmup", 0, "--batch-size", 4, "--lr", 0.05, "--save-format", save_format]
    assert main([str(word) for word in [*words, *flags]]) == 0
    final = tmp_path / "run" / "final"
    assert open_model(final).format == save_format
    folder = final
    if save_format == "native":
        folder = tmp_path / "hf"
        convert(final, folder)
    capsys.readouterr()
    theirs = load_theirs(folder)
    assert_same_logits(load_model(final), theirs, 1e-5, spread=0.1)
    before = load_model(small_checkpoint)
    size = tokenizer.vocab_size
    assert float((logits(before, size) - logits(theirs, size)).abs().max()) > 0.1  # it has learnt something
    assert_ids_agree(folder, tokenizer)
