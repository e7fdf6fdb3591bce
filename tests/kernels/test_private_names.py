"""The promise that a run goes on where PyTorch lacks a private or undocumented name: the plain twin is taken.

Each of these names is taken away from `kernels/`, as if this PyTorch did not have it. (From PyTorch itself most of them
cannot be taken, which calls them, too.) Then a model trains as it does without the kernel that needs the name, to the
bit.
"""

import ast
import functools
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.partitioners  # which reads the budget, too: it is to find it

from minift import kernels
from minift.config import FINETUNE, TrainConfig
from minift.kernels import adamw, choice, choose, compiling, decode
from minift.pack import Batch, collate
from minift.runs.machine import choose_dtype
from minift.runs.start import start_state
from minift.train import TrainState, train_step
from tests.helpers import ROOT, completed, make_examples, random_model

# By name: the kernel of a training run on a CPU in whose place its plain twin is then taken.
NAMES: dict[str, str | None] = {
    "torch._softmax_backward_data": "layer",
    "torch.ops.aten.silu_backward": "layer",
    "torch.ops.aten.silu_backward.grad_input": "layer",
    "torch._fused_adamw_": "adamw",
    "torch._foreach_add_": "adamw",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "torch.ops.aten._fused_rms_norm": None,  # a GPU's
    "torch.embedding_bag": None,  # of the decoder
    "torch.cpu._is_avx512_bf16_supported": None,  # see below
    "torch._functorch": None,  # see below
}
CPU = torch.device("cpu")


class Without:
    """A module, or something in it, that does not have one name, given as a path of attributes."""

    def __init__(self, thing: Any, path: str):
        self._thing, self._path = thing, path

    def __getattr__(self, name: str) -> Any:
        first, _, rest = self._path.partition(".")
        if name == first and not rest:
            raise AttributeError(f"taken away by a test: {name}")
        value = getattr(self._thing, name)
        return Without(value, rest) if name == first else value


def take_away(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let `kernels/` see a torch without a name."""
    for path in (ROOT / "minift" / "kernels").glob("*.py"):
        module = importlib.import_module(f"minift.kernels.{path.stem}")
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", Without(torch, name.removeprefix("torch.")))


def a_window() -> list[Batch]:
    return [collate(make_examples(lengths, seed), 2, 24) for seed, lengths in enumerate([(5, 2, 9, 1), (4, 7, 3)])]


def trained(names: tuple[str, ...], dtype: str, steps: int = 3) -> tuple[list[float], TrainState]:
    """The losses of some steps with these kernels, and the state after them."""
    config = FINETUNE.replace(dtype=dtype, device="cpu", compile=False)
    state = start_state(random_model(), None, config, names=names)  # type: ignore[arg-type]  # no place in the data
    losses = [train_step(state, a_window(), 1e-2, config).loss for _ in range(steps)]
    return losses, state


trained_before = functools.cache(trained)  # of runs that several tests compare with


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("written", [True, False], ids=["all kernels", "without the layer"])
@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_without_a_name(name: str, written: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss of a run without the kernel that needs it, to the bit; and nearly that of a plain one."""
    names = tuple(one for one in choose(FINETUNE.replace(dtype=dtype), CPU) if written or one != "layer")
    monkeypatch.setattr("minift.kernels.swap.keep_freed_memory", lambda: True)
    plain, _ = trained_before((), dtype)
    expected, without = trained_before(tuple(one for one in names if one != NAMES[name]), dtype)
    take_away(monkeypatch, name)
    found, state = trained(names, dtype)
    assert found == expected
    assert found == pytest.approx(plain, rel=1e-5 if dtype == "float32" else 1e-2)
    assert type(state.optimizer) is type(without.optimizer)
    assert [type(layer) for layer in state.model.layers] == [type(layer) for layer in without.model.layers]
    for one, other in zip(state.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_has_another_class_without_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparison above would hold for nothing."""
    names = choose(FINETUNE.replace(dtype="bfloat16"), CPU)
    assert {"layer", "attention", "adamw"} <= set(names)
    expected = kernels.install(random_model(), names)
    take_away(monkeypatch, "torch._softmax_backward_data")
    found = kernels.install(random_model(), names)
    assert type(found.layers[0]) is not type(expected.layers[0])


def test_pytorchs_own_name_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that nothing else in PyTorch reads can be deleted there."""
    monkeypatch.delattr(torch, "_softmax_backward_data")
    losses, state = trained(choose(FINETUNE.replace(dtype="bfloat16"), CPU), "bfloat16")
    assert losses[-1] < losses[0]
    assert "WrittenLayer" not in str(state.model)


@pytest.mark.parametrize("name", ["torch._fused_adamw_", "torch._foreach_add_"])
def test_the_optimizer_is_pytorchs_without_its_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(adamw.make_optimizer(random_model(), TrainConfig())) is adamw.AdamW
    take_away(monkeypatch, name)
    assert type(adamw.make_optimizer(random_model(), TrainConfig())) is torch.optim.AdamW


# A run with PyTorch's optimizer as it would be if its methods were not wrapped, or wrapped without a trace.
UNWRAPPED = """
import torch

def without_a_trace(method):
    return lambda *args, **named: method(*args, **named)

for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    method = getattr(torch.optim.Optimizer, name)
    assert hasattr(method, "__wrapped__")
    setattr(torch.optim.Optimizer, name, CHANGE)
    assert not hasattr(getattr(torch.optim.Optimizer, name), "__wrapped__")

from tests.kernels.test_private_names import choose, CPU, FINETUNE, trained
losses, state = trained(choose(FINETUNE.replace(dtype="float32"), CPU), "float32")
state.optimizer.load_state_dict(state.optimizer.state_dict())
print(type(state.optimizer).__module__, *losses)
"""


@pytest.mark.parametrize("change", ["method.__wrapped__", "without_a_trace(method)"])
def test_training_goes_on_where_the_optimizers_methods_are_not_wrapped(change: str) -> None:
    done = completed([sys.executable, "-c", UNWRAPPED.replace("CHANGE", change)], cwd=ROOT, check=True)
    module, *losses = done.stdout.split()
    assert module == "minift.kernels.adamw"
    assert list(map(float, losses)) == trained(choose(FINETUNE.replace(dtype="float32"), CPU), "float32")[0]


def test_without_a_sign_of_the_hardware_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FINETUNE.replace(dtype="auto", device="cpu", compile=False)
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert choice.bfloat16_in_hardware(CPU) == answer
        assert choose_dtype(config, CPU) == ("bfloat16" if answer else "float32")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not choice.bfloat16_in_hardware(CPU)
    assert choose_dtype(config, CPU) == "float32"
    state = start_state(random_model(), None, config)  # type: ignore[arg-type]  # no place in the data
    assert train_step(state, a_window(), 1e-2, config).loss > 0


@pytest.mark.parametrize("gone", ["nothing", "the setting", "the module"])
@pytest.mark.parametrize(("device", "budget"), [("cpu", 0.85), ("cuda", 0.95)])
def test_the_compilers_budget_is_set_where_there_is_one(
    device: str, budget: float, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hasattr(torch._functorch.config, "activation_memory_budget")  # in the versions that this is tested with
    settings = SimpleNamespace() if gone == "the setting" else SimpleNamespace(activation_memory_budget=1.0)
    monkeypatch.setattr(torch._functorch, "config", settings)
    if gone == "the module":
        monkeypatch.setitem(sys.modules, "torch._functorch", None)
    compiling.keep_less_for_the_backward_pass(torch.device(device))
    assert vars(settings) == {
        "nothing": {"activation_memory_budget": budget},
        "the setting": {},
        "the module": {"activation_memory_budget": 1.0},
    }.get(gone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_training_goes_on_without_a_budget(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as by default, but without the last stage, the C++ compiler."""
    config = FINETUNE.replace(dtype=dtype, device="cpu", compile=True)
    torch.compiler.reset()
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend="aot_eager"))
    monkeypatch.setattr("minift.kernels.swap.keep_freed_memory", lambda: True)
    assert "compiling" in choose(config, CPU)
    with monkeypatch.context() as without:
        without.setattr(torch._functorch, "config", Without(torch._functorch.config, "activation_memory_budget"))
        state = start_state(random_model(), None, config)  # type: ignore[arg-type]  # no place in the data
    found = [train_step(state, a_window(), 1e-2, config).loss for _ in range(3)]
    assert found == pytest.approx(trained_before((), dtype)[0], rel=1e-5 if dtype == "float32" else 1e-2)


def test_decoding_goes_on_without_sums_of_a_tables_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert decode._Products([[matrix]], transpose=True).transposed
    take_away(monkeypatch, "torch.embedding_bag")
    products = decode._Products([[matrix]], transpose=True)
    assert not products.transposed
    products.x.copy_(matrix[0])
    assert torch.equal(products(0).flatten(), torch.mv(matrix, matrix[0]))


def private_names_of_kernels() -> set[str]:
    """The names of torch in `kernels/` that begin with an underscore, or are operators of aten."""
    found = set()
    for path in (ROOT / "minift" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.ImportFrom):
                name = str(node.module)
            parts = name.split(".")
            if parts[0] == "torch" and (parts[1:2] == ["ops"] or any(part.startswith("_") for part in parts)):
                found.add(name)
    return found


def test_each_private_name_of_kernels_is_taken_away_here() -> None:
    used = private_names_of_kernels() - {"torch.ops", "torch.ops.aten"}
    assert {name for name in used if name not in NAMES} == set()
