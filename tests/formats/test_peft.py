"""`peft` and minift read each other's adapters; an adapter and its base are opened as the one model that they make.

Held here: folders that `peft` writes, and that it reads; the merged matrices against the formula, in every dtype; that
they are rounded once; chains of adapters; what is not read; one line for an adapter that does not fit.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minift import bundled, load_model, load_tokenizer, save_model
from minift.checkpoint import model_without_memory, weights_of
from minift.cli import main
from minift.config import LORA_TARGETS
from minift.errors import InputError
from minift.formats.convert import convert
from minift.formats.files import TensorFile
from minift.formats.open import open_model
from minift.formats.opened import open_tensors
from minift.formats.peft import ADAPTER_KEYS, read_adapter, write_adapter, write_peft
from minift.lora import LoRAConfig, adapter_weights, has_adapter
from minift.model import Llama
from tests.helpers import LORA, adapted_model, bits, same, small_model, to_transformers

TOKENS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(4))


def write_pair(folder: Path, base: Llama | None = None, config: LoRAConfig = LORA, dtype: Any = torch.float32) -> Path:
    """A base and an adapter for it; the adapter's folder."""
    pytest.importorskip("safetensors")
    save_model(folder / "base", base or small_model())
    (folder / "adapter").mkdir()
    weights = {name: tensor.to(dtype) for name, tensor in adapter_weights(adapted_model(config)).items()}
    write_peft(folder / "adapter", weights, config, str(folder / "base"))
    return folder / "adapter"


def change_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def check_merged(found: dict[str, Tensor], base: dict[str, Tensor], adapter: Path, times: int = 1) -> None:
    """Each matrix is the nearest number to W + scale · B A (as often), but for what float32 loses on the way."""
    file = open_tensors(adapter / "adapter_model.safetensors")
    scale, adapted = LORA.alpha / LORA.rank, 0
    for name, tensor in found.items():
        theirs = f"base_model.model.model.{name.replace('.weight', '.lora_A.weight')}"
        if theirs not in file.specs:
            assert torch.equal(tensor, base[name].to(tensor.dtype)), name
            continue
        lora_A, lora_B = (file.read(each).double() for each in (theirs, theirs.replace("lora_A", "lora_B")))
        exact = base[name].double() + times * scale * (lora_B @ lora_A)
        finest = torch.finfo(torch.promote_types(base[name].dtype, torch.float32)).eps
        rounding = 0.501 * torch.finfo(tensor.dtype).eps * exact.abs() + 1e-8
        on_the_way = 8 * finest * (base[name].double().abs() + times * scale * (lora_B.abs() @ lora_A.abs()))
        assert bool(((tensor.double() - exact).abs() <= rounding + on_the_way).all()), name
        assert not torch.equal(tensor, base[name].to(tensor.dtype))
        adapted += 1
    assert adapted == 6


# What `peft` writes and reads -----------------------------------------------------------------------------------------


def peft_model(model: Llama, config: LoRAConfig, **more: Any) -> Any:
    """The same base in `transformers`, with `peft`'s own adapters."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), task_type="CAUSAL_LM", **more
    )
    return peft.get_peft_model(to_transformers(model), options)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_proj", "v_proj")], ids=["all", "two"])
@torch.no_grad()
def test_peft_reads_what_minift_writes(tmp_path: Path, targets: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    config = LoRAConfig(4, 12.0, targets)
    model = adapted_model(config, torch.float32)
    write_peft(tmp_path, adapter_weights(model), config, base="somewhere")
    theirs = peft.PeftModel.from_pretrained(to_transformers(small_model()), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)
    assert float((model(TOKENS) - small_model()(TOKENS)).abs().max()) > 0.1


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_minift_reads_what_peft_writes(tmp_path: Path, safe: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """And knows every key of its config: nothing is noted as unused."""
    theirs = peft_model(small_model(), LORA)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(5))
    theirs.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    wanted = theirs(TOKENS).logits
    save_model(tmp_path / "base", small_model())
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    loaded = load_model(tmp_path / "adapter")
    assert not has_adapter(loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert open_model(tmp_path / "adapter").notes == (
        f"an adapter of rank 3 for q_proj, v_proj, down_proj, merged into {tmp_path / 'base'}",
    )


EVEN = LoRAConfig(4, 12.0, LORA.targets)


@pytest.mark.parametrize(
    ("init", "keeps_the_base"),
    [
        (True, True),
        (False, True),
        ("gaussian", True),
        ("orthogonal", True),
        ("mica", True),
        ("pissa", False),
        ("pissa_niter_2", False),
        ("olora", False),
    ],
)
@torch.no_grad()
def test_an_adapter_is_read_only_if_its_training_began_with_the_base(
    tmp_path: Path, init: bool | str, keeps_the_base: bool
) -> None:
    """PiSSA and OLoRA take their first B A out of the base, which no file of the adapter says but this key."""
    theirs = peft_model(small_model(), EVEN, init_lora_weights=init)
    started = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    save_model(tmp_path / "base", small_model())
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    assert float((theirs(TOKENS).logits - started).abs().max()) > 0.1
    if keeps_the_base:
        torch.testing.assert_close(
            load_model(tmp_path / "adapter")(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4
        )
        return
    said = refusal(tmp_path / "adapter")
    assert f"{tmp_path / 'adapter' / 'adapter_config.json'}: init_lora_weights is {init!r}, which changes" in said
    assert "path_initial_model_for_weight_conversion" in said


@pytest.mark.parametrize("init", ["pissa", "olora"])
@torch.no_grad()
def test_what_a_refusal_advises_gives_an_adapter_that_is_read(tmp_path: Path, init: str) -> None:
    """`peft` makes of such an adapter one of twice the rank for the unchanged base."""
    theirs = peft_model(small_model(), EVEN, init_lora_weights=init)
    config = theirs.peft_config["default"]
    config.init_lora_weights = True  # as its documentation has it, for the start that is subtracted
    theirs.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.2)
    expected = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    save_model(tmp_path / "base", small_model())
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    torch.testing.assert_close(load_model(tmp_path / "adapter")(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_every_key_of_pefts_own_config_is_known() -> None:
    """A key that a new version adds fails here, until it is used, found to be harmless, or refused."""
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - ADAPTER_KEYS == set()


# The model that the two make ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, None], ids=str)
def test_merged_matrices_are_rounded_once(tmp_path: Path, base_dtype: torch.dtype, dtype: torch.dtype | None) -> None:
    """Whatever the dtypes of base and adapter, the sum is float32's at least, and then cast to what was asked for."""
    adapter = write_pair(tmp_path, small_model(dtype=base_dtype))
    base, loaded = load_model(tmp_path / "base", dtype=None), load_model(adapter, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype or base_dtype}
    check_merged(loaded.state_dict(), base.state_dict(), adapter)


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_converted_and_streamed_are_the_same_bits(tmp_path: Path, tied: bool) -> None:
    """`load_model`, `weights_of` (which fills a sharded model), and `convert` followed by `load_model`."""
    adapter = write_pair(tmp_path, small_model(tie_word_embeddings=tied))
    loaded = load_model(adapter)
    assert same(bits(loaded), {name: tensor.clone() for name, tensor in weights_of(adapter)})
    convert(adapter, tmp_path / "native", "native")
    convert(adapter, tmp_path / "hf", "hf")
    for folder in ("native", "hf"):
        assert same(bits(load_model(tmp_path / folder)), bits(loaded))
    empty = model_without_memory(adapter)
    assert empty.config == loaded.config
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert len(list(loaded.parameters())) == len(list(empty.parameters()))
    assert (loaded.head_weight is loaded.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sharded_run_is_given_what_one_process_is(tmp_path: Path, dtype: torch.dtype) -> None:
    """float32 weights to train, also of a base that has fewer bits."""
    adapter = write_pair(tmp_path, small_model(dtype=dtype))
    assert same(dict(weights_of(adapter)), bits(load_model(adapter)))
    assert {tensor.dtype for _, tensor in weights_of(adapter)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_an_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both are merged, and the sum of all three is rounded once."""
    one = write_pair(tmp_path, small_model(dtype=dtype))
    shutil.copytree(one, tmp_path / "two")
    change_config(tmp_path / "two", base_model_name_or_path=str(one))
    base, loaded = load_model(tmp_path / "base", dtype=None), load_model(tmp_path / "two", dtype=None)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    check_merged(loaded.state_dict(), base.state_dict(), one, times=2)
    opened = open_model(tmp_path / "two")
    assert opened.path == tmp_path / "two"
    assert len(opened.files) == 3
    assert [note.partition(", merged into ")[2] for note in opened.notes] == [str(one), str(tmp_path / "base")]
    assert {opened.read(name).dtype for name in opened.specs} == {dtype}  # as the specs say, not as it was added up


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_pair(tmp_path)
    monkeypatch.delattr(TensorFile, "read")
    opened = open_model(adapter)
    assert opened.format == "peft"
    assert opened.specs == open_model(tmp_path / "base").specs
    assert main(["info", "--model", str(adapter)]) == 0


def test_what_info_says_of_an_adapter(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_pair(tmp_path, load_model(small_checkpoint))
    change_config(adapter, base_model_name_or_path=str(small_checkpoint), a_key_of_tomorrow=3, another=None)
    assert main(["info", "--model", str(small_checkpoint)]) == 0
    base = capsys.readouterr().out.splitlines()
    assert main(["info", "--model", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert f"{adapter} (peft)" in shown
    assert "2 files" in shown
    assert f"an adapter of rank 3 for q_proj, v_proj, down_proj, merged into {small_checkpoint}" in shown
    assert "adapter_config.json has keys that minift does not use: a_key_of_tomorrow\n" in shown
    assert {line for line in base if line.startswith(("tokenizer", "parameters", "layers"))} <= set(shown.splitlines())


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
def test_the_bases_tokenizer_goes_with_a_converted_adapter(
    small_checkpoint: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the adapter has one of its own."""
    adapter = write_pair(tmp_path, load_model(small_checkpoint))
    change_config(adapter, base_model_name_or_path=str(small_checkpoint))
    place = tmp_path / ("out/model.bin" if to == "llama2c" else "out")
    assert main(["convert", str(adapter), str(place), "--to", to]) == 0
    captured = capsys.readouterr()
    assert f"({to}, from peft; " in captured.out
    assert "note: an adapter of rank 3" in captured.err
    assert load_tokenizer(place).vocab_size == load_tokenizer(small_checkpoint).vocab_size
    found, expected = load_model(place).state_dict(), load_model(adapter).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    text = "A text that both know."
    assert load_tokenizer(adapter).encode(text) == load_tokenizer(place).encode(text)


@pytest.mark.parametrize("base", ["bundled", "someone/a-model"])
def test_a_base_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """ "bundled", or a name on the hub that is in the cache; as for any model."""
    pytest.importorskip("safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--someone--a-model" / "snapshots" / "0123abcd"
    shutil.copytree(bundled("base"), snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abcd")
    model = load_model("bundled")
    widths = {"hidden_size": model.config.hidden_size, "intermediate_size": model.config.intermediate_size}
    heads = {key: getattr(model.config, key) for key in ("num_attention_heads", "num_key_value_heads")}
    layers = {"num_hidden_layers": model.config.num_hidden_layers}
    (tmp_path / "adapter").mkdir()
    weights = adapter_weights(adapted_model(dtype=torch.float32, **widths, **heads, **layers))
    write_peft(tmp_path / "adapter", weights, LORA, base)
    loaded = load_model(tmp_path / "adapter").state_dict()
    changed = {
        name.split(".")[-2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[name])
    }
    assert changed == set(LORA.targets)
    text = "What is the capital of Mexico?"
    assert load_tokenizer(tmp_path / "adapter").encode(text) == load_tokenizer("bundled").encode(text)


def test_the_bases_revision_is_the_one_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch or a commit in the cache, as `peft` opens it; a folder has none, which is noted."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = write_pair(tmp_path)
    repository = tmp_path / "cache" / "models--someone--a-model"
    (repository / "refs" / "pr").mkdir(parents=True)
    for seed, (commit, ref) in enumerate({"0123abcd": "main", "4567cdef": "v2.0", "89abcdef": "pr/1"}.items()):
        save_model(repository / "snapshots" / commit, small_model(seed=seed))
        (repository / "refs" / ref).write_text(commit)
    for revision, commit in {"v2.0": "4567cdef", "pr/1": "89abcdef", "4567cdef": "4567cdef", None: "0123abcd"}.items():
        change_config(adapter, base_model_name_or_path="someone/a-model", revision=revision)
        assert {file.path.parent.name for file in open_model(adapter).files} == {commit, "adapter"}
        assert len(open_model(adapter).notes) == 1
    for revision in ("v3", "../../x", "..", "/etc"):
        change_config(adapter, revision=revision)
        assert str(adapter / "adapter_config.json") in refusal(adapter)
    change_config(adapter, base_model_name_or_path=str(tmp_path / "base"), revision="v2.0")
    assert open_model(adapter).notes[1] == (
        "adapter_config.json asks for the base's revision 'v2.0'; a folder's is not checked"
    )


# One line for what is wrong -------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """What is said of an adapter that cannot be opened: the same to Python and to every command, in one line."""
    with pytest.raises(InputError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True; minift implements False"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; minift implements 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']; minift implements None"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"r": "eight"}, "r is 'eight'"),
        ({"r": 0}, "lora_rank is 0"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'; it must be a list of names"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules has 'embed_tokens'; known: q_proj"),
        (
            {"target_modules": ["q_proj"]},
            "has adapters of down_proj, but target_modules in adapter_config.json does not name it",
        ),
        (
            {"target_modules": [*LORA.targets, "up_proj"]},
            "has no adapter of up_proj, but target_modules in adapter_config.json names it",
        ),
        ({"r": 5}, "lora_A is [3, 40], of rank 3, but r in adapter_config.json is 5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights, too"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the base's weights, too"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changes the base's weights, too"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changes the base's weights, too"),
        ({"init_lora_weights": "a way of tomorrow"}, "init_lora_weights is 'a way of tomorrow'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is ['pissa']"),
        ({"revision": 5}, "revision is 5; it must be the base's branch, tag or commit, or null"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]; minift implements None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]; minift implements None"),
    ],
)
def test_an_adapter_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    adapter = write_pair(tmp_path)
    change_config(adapter, **changes)
    said = refusal(adapter)
    assert message in said
    assert str(adapter) in said


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 32}, "is for another model"),
        ({"num_hidden_layers": 3}, "has no adapter layers.2.mlp.down_proj.lora_A; it is for another model"),
        ({"num_hidden_layers": 1}, "has an adapter layers.1.mlp.down_proj.lora_A; it is for another model"),
    ],
)
def test_an_adapter_for_another_model(tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    assert message in refusal(write_pair(tmp_path, small_model(**shape)))


@torch.no_grad()
def test_an_adapter_that_leaves_out_matrices_is_for_its_model(tmp_path: Path) -> None:
    """`exclude_modules`: the tensors that are there tell which; without that key, one is missing."""
    theirs = peft_model(small_model(), LORA, exclude_modules=["model.layers.0.mlp.down_proj"])
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(5))
    theirs.save_pretrained(tmp_path / "adapter")
    save_model(tmp_path / "base", small_model())
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    ours = load_model(tmp_path / "adapter")
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    change_config(tmp_path / "adapter", exclude_modules=None)
    assert "has no adapter layers.0.mlp.down_proj.lora_A" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize("place", ["/etc/passwd", "{tmp}/notes.txt", "{tmp}/model.safetensors", "/dev/zero"])
def test_a_base_that_is_no_model_is_not_opened(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter names it, not its user: nothing of a file is read, or printed."""
    for name in ("notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("secret text, longer than any header of a file: " * 20)
    adapter, path = write_pair(tmp_path), place.format(tmp=tmp_path)
    change_config(adapter, base_model_name_or_path=path)
    said = refusal(adapter)
    assert said == (
        f"{adapter / 'adapter_config.json'}: base_model_name_or_path: {path}: is no folder, and no .bin file of a model"
    )
    assert main(["generate", "--model", str(adapter), "--prompt", "Why?"]) == 2
    assert capsys.readouterr().err == f"minift: error: {said}\n"


def test_a_compiled_models_adapter_is_named_as_what_it_is(tmp_path: Path) -> None:
    adapter = write_pair(tmp_path)

    def change(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.replace("base_model.model.", "base_model.model._orig_mod.")] = weights.pop(name)

    rewrite(adapter, change)
    assert "saved from inside a wrapper: '_orig_mod.' in its name is of torch.compile" in refusal(adapter)


def rewrite(adapter: Path, change: Any) -> None:
    """Replace the tensors of an adapter's file."""
    torch_file = pytest.importorskip("safetensors.torch")
    file = adapter / "adapter_model.safetensors"
    weights = torch_file.load_file(file)
    change(weights)
    torch_file.save_file(weights, file)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({A: torch.full_like(w[A], torch.nan)}), f"tensor {A} holds NaN or infinite values"),
        (lambda w: w.update({B: torch.full_like(w[B], torch.inf)}), f"tensor {B} holds NaN or infinite values"),
        (lambda w: w.update({A: w[A].int()}), "q_proj.lora_A holds int32, not floating-point weights"),
        (lambda w: w.update({"lm_head.weight": w[A].clone()}), "tensor lm_head.weight is no adapter"),
        (lambda w: w.update({A[23:-7]: w[A].clone()}), "tensor layers.0.self_attn.q_proj.lora_A is no adapter"),
        (lambda w: w.pop(A), "has no adapter layers.0.self_attn.q_proj.lora_A"),
    ],
    ids=["NaN", "infinity", "integers", "another tensor", "a name twice", "missing"],
)
def test_tensors_that_are_no_adapters(tmp_path: Path, change: Any, message: str) -> None:
    adapter = write_pair(tmp_path)
    rewrite(adapter, change)
    said = refusal(adapter)
    assert message in said
    assert str(adapter / "adapter_model.safetensors") in said


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.lora_A", "layers.1.mlp.down_proj.lora_B"])
def test_an_adapter_of_a_run_that_holds_no_numbers_is_refused(tmp_path: Path, name: str, value: float) -> None:
    """The file from which a run goes on, or whose adapters are its best ones: one bad number is enough."""
    model = adapted_model(dtype=torch.float32)
    weights = {key: tensor.clone() for key, tensor in adapter_weights(model).items()}
    write_adapter(tmp_path, weights)
    read_adapter(tmp_path, model)
    weights[name][-1, -1] = value
    (tmp_path / "adapter.pt").unlink()
    write_adapter(tmp_path, weights)
    with pytest.raises(InputError, match=rf"adapter\.pt: tensor {name} holds NaN or infinite values"):
        read_adapter(tmp_path, model)


def test_a_base_with_nan_is_named(tmp_path: Path) -> None:
    """By its own file, and not the adapter's."""
    adapter = write_pair(tmp_path)
    model = load_model(tmp_path / "base")
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[3, 5] = torch.nan
    save_model(tmp_path / "base", model)
    assert f"{tmp_path / 'base' / 'model.pt'}: tensor layers.0.self_attn.q_proj.weight holds NaN" in refusal(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_beyond_the_range_of_the_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_pair(tmp_path, small_model(dtype=dtype))
    change_config(adapter, lora_alpha=3e6)
    assert load_model(adapter).config == small_model().config
    with pytest.raises(InputError, match="has values beyond the range of float16"):
        load_model(adapter, dtype=torch.float16)


@pytest.mark.parametrize("command", ["info", "convert", "generate", "evaluate", "compare", "explain"])
def test_an_adapter_without_its_model(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says the same."""
    adapter = write_pair(tmp_path)
    shutil.rmtree(tmp_path / "base")
    words = {
        "info": ["--model", adapter],
        "convert": [adapter, tmp_path / "x", "--to", "hf"],
        "generate": ["--model", adapter, "--prompt", "Why?"],
        "evaluate": ["--model", adapter, "--data", bundled("test.jsonl")],
        "compare": [adapter, "bundled", "--data", bundled("test.jsonl")],
        "explain": ["Why?", "--model", adapter],
    }[command]
    assert main([command, *map(str, words)]) == 2
    said = capsys.readouterr().err
    file = adapter / "adapter_config.json"
    assert said == f"minift: error: {file}: base_model_name_or_path: {tmp_path / 'base'}: no such file or folder\n"


def test_an_adapter_whose_base_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = write_pair(tmp_path)
    change_config(adapter, base_model_name_or_path="someone/a-model")
    said = refusal(adapter)
    assert said.startswith(f"{adapter / 'adapter_config.json'}: base_model_name_or_path: someone/a-model: ")
    assert said.endswith("hf download someone/a-model")


def test_an_adapter_that_is_not_whole(tmp_path: Path) -> None:
    adapter = write_pair(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    assert "an adapter without its weights" in refusal(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    assert "base_model_name_or_path does not name" in refusal(adapter)


def test_adapters_that_lead_back_to_themselves(tmp_path: Path) -> None:
    adapter = write_pair(tmp_path)
    shutil.copytree(adapter, tmp_path / "two")
    change_config(tmp_path / "two", base_model_name_or_path=str(adapter))
    for base in (tmp_path / "two", adapter):
        change_config(adapter, base_model_name_or_path=str(base))
        assert "base_model_name_or_path leads back to" in refusal(tmp_path / "two")


def test_a_config_json_without_weights_next_to_an_adapter(tmp_path: Path) -> None:
    adapter = write_pair(tmp_path)
    shutil.copy(tmp_path / "base" / "config.json", adapter)
    assert "remove it, if adapter_config.json is what counts" in refusal(adapter)


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_a_base_is_not_replaced_by_what_its_adapter_makes_of_it(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_pair(tmp_path)
    before = bits(load_model(tmp_path / "base"))
    (tmp_path / "base" / "SHA256SUMS").unlink()
    assert main(["convert", str(adapter), str(tmp_path / "base"), "--to", to, "--force"]) == 2
    assert f"{tmp_path / 'base'}: is where the source is" in capsys.readouterr().err
    assert same(bits(load_model(tmp_path / "base")), before)
