"""The promise of `kernels/`: `install` puts faster modules in, and the numbers, the weights and their names stay.

For each name, and for each set that `choose` gives for a device, a dtype, a compiled run, adapters and shards: the loss
and every gradient of a batch with prompts, several documents a row and padding are those of the plain objective. What a
GPU is given is installed here on a CPU. (FlexAttention's blocks, which have no backward pass there, are in
`test_flex.py`.)
"""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minift import kernels, optim
from minift.config import FINETUNE
from minift.kernels import ALL, adamw, choose, install, with_kernels
from minift.kernels.attention import FastScaledDotProduct
from minift.kernels.choice import choose_for_reading
from minift.kernels.cross_entropy import FusedNextTokenLoss
from minift.kernels.flex import FlexPrepare, FlexScaledDotProduct
from minift.kernels.layer import WrittenLayer, WrittenPrepare
from minift.kernels.norm import FusedInputNorm, FusedRMSNorm, FusedRoPE
from minift.kernels.targets import TargetsLayer, TargetsObjective
from minift.lora import add_lora
from minift.loss import NextTokenLoss
from minift.model import DecoderLayer, Prepare, RMSNorm, RoPE, ScaledDotProduct
from minift.pack import Batch, collate
from minift.runs.start import start_state
from minift.train import Objective
from tests.helpers import LORA, ROOT, adapted_model, make_examples, random_model
from tests.twins import apart, difference

PLAIN = {Objective, Prepare, DecoderLayer, RMSNorm, RoPE, ScaledDotProduct, NextTokenLoss}
SWAPPED: dict[str, set[type]] = {  # what each name puts in, in the place of the plain class that it is derived from
    "norm": {FusedRMSNorm, FusedInputNorm, FusedRoPE},
    "attention": {FastScaledDotProduct},
    "flex": {FlexScaledDotProduct, FlexPrepare},
    "cross_entropy": {FusedNextTokenLoss},
    "targets": {TargetsObjective, TargetsLayer},
    "layer": {WrittenLayer, WrittenPrepare},
    "adamw": set(),
    "malloc": set(),
    "compiling": set(),
}
SETTINGS = [
    {"device": device, "dtype": dtype, "compile": compiles, "lora_rank": rank, "parallel": parallel}
    for device, dtype, compiles, rank, parallel in itertools.product(
        ("cpu", "cuda"), ("float32", "bfloat16"), (False, True), (0, 4), ("auto", "fsdp")
    )
]


def chosen(setting: dict[str, Any]) -> tuple[str, ...]:
    return choose(FINETUNE.replace(**setting), torch.device(setting["device"]))


SETS = sorted({*((name,) for name in ALL), *map(chosen, SETTINGS)}, key=lambda names: (len(names), names))
every_set = pytest.mark.parametrize("names", SETS, ids=" ".join)


@pytest.fixture(autouse=True)
def _nothing_is_set_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minift.kernels.swap.keep_freed_memory", lambda: True)
    monkeypatch.setattr("minift.kernels.swap.keep_less_for_the_backward_pass", lambda device: None)


def a_batch() -> Batch:
    """Prompts, several documents in each row, padding; 28 of 48 positions have a target."""
    batch = collate(make_examples((5, 2, 9, 1, 4, 7)), 2, 24)
    assert batch.isolated
    assert (batch.document_ids < 0).any()
    assert 0 < batch.n_targets < 0.9 * batch.targets.numel()
    return batch


def loss_and_gradients(objective: nn.Module, autocast: bool = False) -> list[Tensor]:
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll_sum = objective(a_batch())
    return [nll_sum, *torch.autograd.grad(nll_sum, trained)]


def kinds(module: nn.Module) -> set[type]:
    """The classes of a model's modules that are plain, or that a kernel has swapped."""
    known = PLAIN.union(*SWAPPED.values())
    return {type(part) for part in module.modules()} & known


MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied, a key for each query": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one key, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
}


@every_set
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_and_gradients_stay(dtype: torch.dtype, shape: str, names: tuple[str, ...]) -> None:
    """In float64 but for the norms, which reduce in float32 whatever the model's dtype."""
    model = random_model(dtype, **MODELS[shape])
    plain = loss_and_gradients(Objective(model, 5))
    objective = install(Objective(model, 5), names)
    found = loss_and_gradients(objective)
    tolerance = 1e-6 if dtype == torch.float64 and "norm" in names else {torch.float64: 1e-12}.get(dtype, 3e-6)
    for one, other in zip(found, plain, strict=True):
        assert difference(one, other) < tolerance


@every_set
@pytest.mark.parametrize("shape", MODELS)
def test_under_autocast_it_is_no_further_from_the_truth(shape: str, names: tuple[str, ...]) -> None:
    """The loss and all gradients together: within 1.5 times as far from float32's as the plain objective is."""
    model = random_model(**MODELS[shape])
    plain = Objective(model, 5)
    truth, theirs = loss_and_gradients(plain), loss_and_gradients(plain, autocast=True)
    ours = loss_and_gradients(with_kernels(plain, names), autocast=True)
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert apart(one, exact) < 0.05
    assert apart(ours[0], truth[0]) < 1e-3
    far = [sum(apart(one, exact) for one, exact in zip(ways, truth, strict=True)) for ways in (ours, theirs)]
    assert 0 < far[0] < 1.5 * far[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_that_are_compiled_compute_the_same(device: str, dtype: str) -> None:
    """With what a compiled run installs. (Compiled as by default, but without the last stage, the C++ compiler.)"""
    names = chosen({"device": device, "dtype": dtype, "compile": True})
    torch.compiler.reset()
    plain = Objective(random_model(), 5)
    truth = loss_and_gradients(plain)
    theirs = loss_and_gradients(plain, autocast=dtype == "bfloat16")
    objective = install(Objective(random_model(), 5), names)
    for layer in objective.model.layers:
        layer.compile(backend="aot_eager")
    ours = loss_and_gradients(objective, autocast=dtype == "bfloat16")
    far = [[apart(one, exact) for one, exact in zip(ways, truth, strict=True)] for ways in (ours, theirs)]
    assert sum(far[0]) < (1.5 * sum(far[1]) if dtype == "bfloat16" else 3e-6 * len(truth))


def test_one_layer_is_compiled_for_all() -> None:
    """All are of one class, whose code the compiler makes once: with another at the end, starting would take longer."""
    torch.compiler.reset()
    made = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    objective = install(Objective(random_model()), chosen({"device": "cpu", "compile": True}))
    assert len(objective.model.layers) == 2
    for layer in objective.model.layers:
        layer.compile(backend=backend)
    objective.model(torch.zeros(2, 8, dtype=torch.int64))
    assert len(made) == 1


@every_set
def test_activations_computed_again_change_nothing(names: tuple[str, ...]) -> None:
    model = random_model(torch.float64)
    objective = install(Objective(model, 5), names)
    kept = loss_and_gradients(objective)
    model.checkpoint_activations = True
    for one, other in zip(loss_and_gradients(objective), kept, strict=True):
        assert torch.equal(one, other)


@every_set
def test_weights_and_their_names_stay(names: tuple[str, ...]) -> None:
    model = random_model(tie_word_embeddings=False)
    before = dict(Objective(model).named_parameters())
    objective = install(Objective(model), names)
    after = dict(objective.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is weight for name, weight in before.items())
    assert list(model.state_dict()) == [name.removeprefix("model.") for name in before]
    assert objective.model is model
    assert model.head_weight is model.lm_head.weight


@every_set
def test_what_is_installed(names: tuple[str, ...]) -> None:
    """Each plain class is gone where it has a kernel in its place, everywhere; and `print(model)` shows which."""
    objective = install(Objective(random_model()), names)
    added = kinds(objective) - PLAIN
    expected = set().union(*(SWAPPED[name] for name in names))
    if "layer" in names:  # the last of which can leave positions out, too
        expected -= {TargetsLayer}
    assert added == expected
    gone = {base for kind in expected for base in kind.__mro__[1:]} & PLAIN
    assert kinds(objective) & PLAIN == PLAIN - gone
    printed = str(objective)
    assert all(f"{kind.__name__}(" in printed for kind in kinds(objective))


def test_norms_that_feed_matrix_products_give_their_dtype() -> None:
    """A layer's two; not the last one, whose result the loss reads."""
    model = install(random_model(), ["norm"])
    for layer in model.layers:
        assert type(layer.input_layernorm) is type(layer.post_attention_layernorm) is FusedInputNorm
    assert type(model.norm) is FusedRMSNorm


@every_set
def test_a_copy_with_kernels_leaves_the_model_as_it_is(names: tuple[str, ...]) -> None:
    model = random_model()
    plain = Objective(model, 5)
    before = kinds(plain)
    expected = loss_and_gradients(plain)
    other = with_kernels(plain, names)
    assert kinds(plain) == before == PLAIN
    assert model.layers[-1] is plain.model.layers[-1] is not other.model.layers[-1]
    for one, weight in zip(other.parameters(), plain.parameters(), strict=True):
        assert one is weight
    loss_and_gradients(other)
    for one, right in zip(loss_and_gradients(plain), expected, strict=True):
        assert torch.equal(one, right)
    model.checkpoint_activations = True
    assert not other.model.checkpoint_activations


def test_a_copy_sees_the_weights_that_change_and_their_gradients() -> None:
    model = random_model()
    other = with_kernels(model, ["norm", "attention"])
    tokens = torch.tensor([[1, 5, 9]])
    before = other(tokens)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert float((other(tokens) - 2 * before).detach().abs().max()) < 1e-5
    other(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("first", "second"), [(one, two) for one in SETS for two in SETS if len(one) > 1 < len(two)], ids=str
)
def test_a_second_call_installs_its_own_names_alone(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """As when a model is trained again, elsewhere or otherwise; and nothing, where it is to be plain."""
    model = random_model()
    install(Objective(model), first)
    again = install(Objective(model), second)
    assert kinds(again) == kinds(install(Objective(random_model()), second))
    assert kinds(with_kernels(again, ())) == PLAIN
    assert kinds(with_kernels(again, first)) == kinds(install(Objective(random_model()), first))


@every_set
def test_adapters_and_frozen_weights_keep_what_cannot_be_written_out(names: tuple[str, ...]) -> None:
    """And the gradients of what is trained stay."""
    for model in (adapted_model(dtype=torch.float32), random_model()):
        if not any(".lora_" in name for name, _ in model.named_parameters()):
            model.requires_grad_(False)
            model.layers[0].requires_grad_(True)
        plain = loss_and_gradients(Objective(model, 5))
        objective = install(Objective(model, 5), names)
        assert not kinds(objective) & SWAPPED["layer"]
        found = loss_and_gradients(objective)
        assert len(found) == 1 + sum(parameter.requires_grad for parameter in model.parameters()) < 30
        for one, other in zip(found, plain, strict=True):
            assert difference(one, other) < 3e-6


@every_set
def test_a_model_that_is_not_trained_is_the_same(names: tuple[str, ...]) -> None:
    model = random_model(torch.float64)
    batch = a_batch()
    with torch.no_grad():
        plain = model.hidden(batch.tokens, batch.positions, batch.documents)
        found = install(model, names).hidden(batch.tokens, batch.positions, batch.documents)
    assert float((found - plain).abs().max()) < 1e-12
    assert not kinds(model) & {TargetsLayer, TargetsObjective, Objective}  # that is for an objective


def test_unknown_names_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="unknown kernel 'flash'; known: norm, attention, flex, cross_entropy"):
        install(model, ["norm", "flash"])
    assert kinds(model) <= PLAIN


@pytest.mark.parametrize("put_in", [install, with_kernels])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("norm", r"give \['norm'\]"),
        (["norm", "nonsense"], "unknown kernel 'nonsense'"),
        (ALL, "install one of them"),
        (["attention", "flex"], "'flex' attends on a GPU, and 'attention' on a CPU"),
        (["layer", "flex"], "'flex' attends on a GPU, and 'layer' on a CPU"),
    ],
)
def test_names_that_cannot_be_installed_are_refused(put_in: Any, names: Any, message: str) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=message):
        put_in(model, names)
    assert kinds(model) <= PLAIN


def test_an_adapter_put_into_a_layer_that_is_written_out_is_not_passed_over() -> None:
    model = install(random_model(), ["layer"])
    add_lora(model, LORA, torch.Generator())
    with pytest.raises(RuntimeError, match="install them again"):
        model(torch.zeros(1, 8, dtype=torch.int64))
    install(model, ["layer"])
    model(torch.zeros(1, 8, dtype=torch.int64))


def test_kernels_taken_out_below_an_objective() -> None:
    objective = install(Objective(random_model(torch.float64)), ["targets"])
    expected = objective(a_batch())
    install(objective.model, [])
    assert torch.allclose(objective(a_batch()), expected, rtol=1e-12)


def test_what_sets_something_for_the_process_is_set_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr("minift.kernels.swap.keep_freed_memory", lambda: done.append("malloc"))
    monkeypatch.setattr("minift.kernels.swap.keep_less_for_the_backward_pass", done.append)
    for other in ("flex", "attention"):  # which exclude each other
        names = [name for name in ALL if name not in ("flex", "attention", "layer")] + [other]
        install(random_model(), [name for name in names if name not in ("malloc", "compiling")])
        with_kernels(random_model(), names)
    assert done == []
    install(random_model(), ["malloc", "compiling"])
    install(random_model().to("meta"), ["compiling"])
    install(nn.Identity(), ["compiling"])
    assert done == ["malloc", *map(torch.device, ("cpu", "meta", "cpu"))]


# Which are chosen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: " ".join(map(str, setting.values())))
def test_which_kernels_a_run_takes(setting: dict[str, Any]) -> None:
    names = chosen(setting)
    cpu, compiles = setting["device"] == "cpu", setting["compile"]
    written = cpu and not compiles and setting["dtype"] == "bfloat16"
    expected = {
        "norm": not compiles,
        "attention": cpu,
        "flex": not cpu,
        "cross_entropy": True,
        "targets": True,
        "layer": written and not setting["lora_rank"] and setting["parallel"] != "fsdp",
        "adamw": True,
        "malloc": cpu,
        "compiling": compiles,
    }
    assert list(expected) == list(ALL)
    assert names == tuple(name for name in ALL if expected[name])


def test_which_kernels_a_model_takes_that_is_not_trained() -> None:
    assert choose_for_reading(torch.device("cpu")) == ("norm", "attention")
    assert choose_for_reading(torch.device("cuda")) == ("norm", "flex")


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_starts_with_what_is_chosen_or_plain(plain: bool) -> None:
    config = FINETUNE.replace(device="cpu", dtype="float32", compile=False)
    state = start_state(random_model(), None, config, plain=plain)  # type: ignore[arg-type]  # no place in the data
    expected = (
        Objective(random_model()) if plain else install(Objective(random_model()), choose(config, torch.device("cpu")))
    )
    assert kinds(state.objective) == kinds(expected)
    assert type(state.optimizer) is (torch.optim.AdamW if plain else adamw.AdamW)
    named = start_state(random_model(), None, config, names=["norm"])  # type: ignore[arg-type]
    assert kinds(named.objective) == kinds(install(Objective(random_model()), ["norm"]))
    assert type(named.optimizer) is type(optim.make_optimizer(random_model(), config))


def test_the_table_of_kernels_names_every_file() -> None:
    """The first thing that the folder says: which file stands in for what."""
    files = {path.name for path in (ROOT / "minift" / "kernels").glob("*.py")} - {"__init__.py", "decoding.py"}
    assert all(f"    {file} " in str(kernels.__doc__) for file in files)
    assert {f"{name}.py" for name in ALL} <= files
    for file in sorted(files - {"choice.py", "swap.py"}):
        text = importlib.import_module(f"minift.kernels.{file.removesuffix('.py')}").__doc__
        assert "Plain twin" in str(text), file
        assert "python -m benchmarks" in str(text), file
