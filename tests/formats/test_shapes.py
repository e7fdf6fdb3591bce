"""A model without weights has the model's names and shapes, and takes no memory and no compiler to build."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from minift import Llama, LlamaConfig
from minift.config import PRESETS
from minift.formats.shapes import model_without_weights, on_meta_device
from tests.helpers import ROOT, small_model

HEAVY = ["torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"]


def modules_after(code: str) -> set[str]:
    """Which of the heavy modules a process has imported once it has run some code."""
    code += f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "from torch import nn\nfrom minift.formats.shapes import on_meta_device\nwith on_meta_device():\n"
        "    nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 5), nn.RMSNorm(5))",
        "from minift import LlamaConfig\nfrom minift.formats.shapes import model_without_weights\n"
        "model_without_weights(LlamaConfig.preset('llama2-7b'))",
        "import minift\nminift.load_model(minift.bundled('base'))",
    ],
    ids=["plain modules", "a model", "loading"],
)
def test_building_on_the_meta_device_imports_no_compiler(code: str) -> None:
    assert modules_after(code) == set()


def test_plain_modules_get_their_shapes_and_draw_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with on_meta_device():
        modules = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert [tuple(p.shape) for p in modules.parameters()] == [(5, 4), (3, 4), (3,), (2, 3)]
    assert all(parameter.is_meta and parameter.requires_grad for parameter in modules.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_that_have_elements_are_drawn_as_ever() -> None:
    """In there, too, and after."""
    with on_meta_device():
        inside = torch.empty(100, device="cpu").normal_()
    assert 0.5 < float(inside.std()) < 1.5
    assert float(nn.Linear(4, 3).weight.detach().abs().sum()) > 0
    assert not nn.Embedding(5, 4).weight.is_meta


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_without_weights_has_every_parameter(name: str) -> None:
    model = model_without_weights(LlamaConfig.preset(name))
    assert isinstance(model, Llama)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert ("lm_head.weight" in model.state_dict()) != model.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_weights_can_be_assigned_to_it(tied: bool) -> None:
    source = small_model(tie_word_embeddings=tied)
    model = model_without_weights(source.config)
    model.load_state_dict(source.state_dict(), assign=True)
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(tokens), source(tokens))
