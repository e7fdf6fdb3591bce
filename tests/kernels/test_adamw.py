"""The promise of `kernels/adamw.py`: the weights and state of PyTorch's AdamW to the bit, without importing a compiler.

`optim.make_optimizer`, the twin, is held against the formula in `way/test_slow_twins.py`.
"""

import copy
import sys

import pytest
import torch

from minift import optim, reference
from minift.config import TrainConfig
from minift.kernels import adamw
from tests.helpers import ROOT, completed, small_model
from tests.twins import TOLERANCE, difference, random

both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CONFIG = TrainConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.97)


@both_dtypes
def test_adamw_is_that_of_pytorch_to_the_bit(dtype: torch.dtype) -> None:
    """Weights and state over six steps of other learning rates, in which one parameter has a gradient from the second
    on; then each reads the other's state."""
    ours, theirs = small_model(dtype=dtype), small_model(dtype=dtype)
    optimizer, twin = adamw.make_optimizer(ours, CONFIG), optim.make_optimizer(theirs, CONFIG)
    assert type(optimizer) is adamw.AdamW
    assert type(twin) is torch.optim.AdamW
    for step in range(6):
        for seed, (mine, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            if step or seed != 3:
                mine.grad = random(*mine.shape, seed=100 * step + seed).to(dtype).detach()
                other.grad = mine.grad.clone()
        for one in (optimizer, twin):
            for group in one.param_groups:
                group["lr"] = CONFIG.lr / (1 + step)
            one.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        one_state, two_state = optimizer.state_dict(), twin.state_dict()
        assert one_state["param_groups"] == two_state["param_groups"]
        assert one_state["state"].keys() == two_state["state"].keys()
        for place, moments in one_state["state"].items():
            assert all(torch.equal(moment, two_state["state"][place][key]) for key, moment in moments.items())
            assert moments.keys() == two_state["state"][place].keys() == {"step", "exp_avg", "exp_avg_sq"}
        if step == 4:
            twin.load_state_dict(copy.deepcopy(one_state))
            optimizer.load_state_dict(copy.deepcopy(two_state))


@both_dtypes
def test_adamw_is_the_formula(dtype: torch.dtype) -> None:
    """Three steps, with the decay on matrices only."""
    model = small_model(dtype=dtype, tie_word_embeddings=False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    slow = {name: (weight, torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in start.items()}
    optimizer = adamw.make_optimizer(model, CONFIG)
    for step in (1, 2, 3):
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            parameter.grad = random(*parameter.shape, seed=100 * step + seed).to(dtype).detach()
            decay = CONFIG.weight_decay if parameter.ndim == 2 else 0.0
            slow[name] = reference.adamw_step(
                slow[name][0], parameter.grad, *slow[name][1:], step, CONFIG.lr, 0.8, 0.97, 1e-8, decay
            )
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved, expected = parameter.detach() - start[name], slow[name][0] - start[name]
        assert difference(moved, expected) < 20 * TOLERANCE[dtype], name


def test_gradients_go_as_with_pytorchs() -> None:
    """`zero_grad` and `add_param_group` do what they do there."""
    model = small_model()
    optimizer = adamw.make_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()  # without gradients nothing moves, and nothing is kept
    assert not optimizer.state
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[-1]["betas"] == (0.8, 0.97)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_optimizer_holds_every_parameter_once(tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    held = [id(p) for group in adamw.make_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_a_scaler_asks_for_no_step_that_overflowed() -> None:
    """The step of PyTorch's fused AdamW looks for overflows itself; this one leaves that to the scaler."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = adamw.AdamW([{"params": [parameter], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.tensor([1.0, float("inf")])
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [1.0, 1.0]
    assert scaler.get_scale() == 2.0
    parameter.grad = torch.tensor([2.0, -8.0])
    scaler.step(optimizer)
    assert parameter.tolist() == pytest.approx([0.9, 1.1])


# The whole life of an optimizer; what is printed is whether PyTorch's compiler was imported for it.
LIFE = """
import sys, torch
from minift.config import LlamaConfig, TrainConfig
from minift.kernels.adamw import make_optimizer
from minift.model import Llama
model = Llama(LlamaConfig(vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2))
optimizer = make_optimizer(model, TrainConfig())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_no_compiler_is_imported_for_it() -> None:
    done = completed([sys.executable, "-c", LIFE], cwd=ROOT, check=True)
    assert done.stdout == "False\n"
