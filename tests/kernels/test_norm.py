"""The promise of `kernels/norm.py`: RMSNorm and RoPE have the values and gradients of `model.RMSNorm` and `model.RoPE`.

In float64 and float32 they are held against the slow twins of `minift/reference.py`, too. Where the arithmetic is the
same, the numbers are the same to the bit: RoPE's, and a norm's forward pass under autocast.
"""

import pytest
import torch
from torch import Tensor

from minift import reference
from minift.kernels import norm as kernels
from minift.kernels.norm import FusedInputNorm, FusedRMSNorm, FusedRoPE
from minift.model import RMSNorm, RoPE, rope_tables
from tests.twins import apart, check_twins, difference, random

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
norms = pytest.mark.parametrize("kind", [FusedRMSNorm, FusedInputNorm])
POSITIONS = torch.stack((torch.arange(9), torch.tensor([0, 1, 2, 0, 1, 40, 41, 0, 7])))


def a_norm(kind: type[RMSNorm], width: int = 24, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> RMSNorm:
    """A norm with random weights, the same for each kind."""
    norm = kind(width, eps)
    norm.weight.data = random(width, seed=1, dtype=dtype).detach()
    return norm


@norms
@both_dtypes
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(kind: type[RMSNorm], dtype: torch.dtype, eps: float, scale: float) -> None:
    """Against the plain module to the bit going forward, and against the formula by index."""
    norm, plain = (a_norm(one, eps=eps, dtype=dtype) for one in (kind, RMSNorm))
    x = (scale * random(3, 7, 24, dtype=dtype)).detach().requires_grad_()
    assert torch.equal(norm(x), plain(x))
    check_twins(lambda: norm(x), lambda: reference.rms_norm(x, norm.weight, eps), [x, norm.weight], 1e-6)
    plain.weight = norm.weight
    check_twins(lambda: norm(x), lambda: plain(x), [x, norm.weight], 1e-6)


@norms
def test_rms_norm_without_a_gradient_for_its_weight(kind: type[RMSNorm]) -> None:
    """As with adapters: the gradient at x is the same."""
    norm, x = a_norm(kind), random(3, 7, 24, dtype=torch.float32)
    weight = norm.weight.detach()
    norm.weight.requires_grad_(False)
    check_twins(lambda: norm(x), lambda: reference.rms_norm(x, weight, 1e-5), [x], 1e-6)
    assert norm.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_under_autocast(dtype: torch.dtype) -> None:
    """A layer's norm gives bfloat16: the bits that autocast makes of the plain one's result. Others give float32."""
    layers, other, plain = (a_norm(kind) for kind in (FusedInputNorm, FusedRMSNorm, RMSNorm))
    x, matrix = random(3, 7, 24, dtype=dtype), random(5, 24, seed=3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, last, expected = layers(x), other(x), plain(x)
        assert torch.equal(found @ matrix.T, expected @ matrix.T)
    assert (found.dtype, last.dtype, expected.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(found, expected.to(torch.bfloat16))
    assert torch.equal(last, expected)
    grad = random(3, 7, 24, seed=2, dtype=torch.float32).bfloat16()
    gradients = torch.autograd.grad(expected, (x, plain.weight), grad.float())
    for norm, value in ((layers, found), (other, last)):
        at_x, at_weight = torch.autograd.grad(value, (x, norm.weight), grad.to(value.dtype))
        assert difference(at_weight, gradients[1]) < 1e-6  # it is a sum in float32, of products in float32
        assert difference(at_x, gradients[0]) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_rms_norm_of_a_model_in_bfloat16() -> None:
    """Weights and x in bfloat16, without autocast: the plain module's bits, and gradients within bfloat16's digits."""
    norm, plain = (a_norm(kind, dtype=torch.bfloat16) for kind in (FusedRMSNorm, RMSNorm))
    x = random(3, 7, 24, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), plain(x))
    grad = random(3, 7, 24, seed=2, dtype=torch.bfloat16).detach()
    wide, weight = x.detach().double().requires_grad_(), plain.weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(reference.rms_norm(wide, weight, 1e-5), (wide, weight), grad.double())
    for one, other in zip(torch.autograd.grad(norm(x), (x, norm.weight), grad), exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert apart(one, other) < 1e-2


@both_dtypes
@pytest.mark.parametrize("width", [2, 6, 64])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope(dtype: torch.dtype, width: int, theta: float) -> None:
    """To the bit what the plain formula gives, and the gradients of it and of the formula by index."""
    x = random(2, 3, 9, width, dtype=dtype)
    cos, sin = rope_tables(POSITIONS, width, theta)
    if dtype == torch.float64:
        frequency = torch.tensor([theta ** (-2 * k / width) for k in range(width // 2)] * 2, dtype=torch.float64)
        angle = POSITIONS[:, None, :, None].double() * frequency
        cos, sin = angle.cos(), angle.sin()
    assert torch.equal(FusedRoPE()(x, cos, sin), RoPE()(x, cos, sin))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    check_twins(lambda: FusedRoPE()(x, cos, sin), lambda: reference.rope(x, POSITIONS, theta), [x], tolerance)
    check_twins(lambda: FusedRoPE()(x, cos, sin), lambda: RoPE()(x, cos, sin), [x], tolerance)


def test_rope_in_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    x = random(2, 3, 9, 6, dtype=torch.bfloat16)
    cos, sin = rope_tables(POSITIONS, 6, 10_000.0)
    found, plain = FusedRoPE()(x, cos, sin), RoPE()(x, cos, sin)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain)
    grad = random(2, 3, 9, 6, seed=1, dtype=torch.bfloat16).detach()
    (gradient,) = torch.autograd.grad(found, x, grad)
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, RoPE()(grad, cos, -sin).detach())


@pytest.mark.parametrize("kind", [RMSNorm, FusedRMSNorm, FusedInputNorm])
@pytest.mark.parametrize("rope", [RoPE(), FusedRoPE()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("autocast", [False, True])
def test_where_nothing_is_trained(kind: type[RMSNorm], rope: RoPE, autocast: bool) -> None:
    """To the bit as in training: a loss is then the same with and without gradients."""
    norm, x = a_norm(kind), random(2, 3, 9, 24, dtype=torch.float32)
    cos, sin = rope_tables(torch.arange(9)[None], 24, 10_000.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = norm(x), rope(x, cos, sin)
        with torch.no_grad():
            for a, b in zip(trained, (norm(x), rope(x, cos, sin)), strict=True):
                assert a.requires_grad
                assert not b.requires_grad
                assert torch.equal(a, b)


def test_the_fused_kernel_of_a_gpu_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: what it gives for x and scale is what the lines below it give."""
    if not hasattr(torch.ops.aten, "_fused_rms_norm"):
        pytest.skip("this PyTorch has no fused norm")
    x = random(5, 24, dtype=torch.float32).detach()
    fused = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, 0.1)
    for found, expected in zip(fused, kernels.normalise(x, 0.1), strict=True):
        assert found.shape == expected.shape
        assert apart(found, expected) < 1e-6


@pytest.mark.cuda
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_on_a_gpu_is_one_kernel_and_the_same(kind: type[RMSNorm], dtype: torch.dtype) -> None:
    """Against the plain formula in float64, and with and without gradients to the bit."""
    norm, x = a_norm(kind, 64).cuda(), random(5, 64, dtype=dtype).cuda().detach().requires_grad_()
    grad = random(5, 64, seed=2, dtype=torch.float32).cuda()
    found = norm(x)
    with torch.no_grad():
        assert torch.equal(norm(x), found)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = reference.rms_norm(wide, weight, 1e-5)
    ours: tuple[Tensor, ...] = found, *torch.autograd.grad(found, (x, norm.weight), grad.to(found.dtype))
    theirs = exact, *torch.autograd.grad(exact, (wide, weight), grad.to(found.dtype).double())
    for one, other in zip(ours, theirs, strict=True):
        assert apart(one, other) < (1e-6 if dtype == torch.float32 else 1e-2)
