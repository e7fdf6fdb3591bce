"""Every fast path computes what its slow, obvious twin in `minift/reference.py` computes, in value and in gradient.

Held here in float64, where two ways to the same number must agree to ten digits or more, and in float32:
RMSNorm, RoPE, attention (every head layout, with and without documents), the SwiGLU network, the chunked loss (also by
`gradcheck`, and with one tensor as embedding and head), clipping, AdamW, the learning-rate schedule at its edges, and
the probabilities with which `sample` chooses. (`reference.greedy` is in `way/test_cache_equals_full.py`.)

RMSNorm and RoPE's tables are float32 by contract, whatever the model's dtype; against a float64 formula they are
therefore held to float32's digits, and `apply_rope` is given float64 tables.
"""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minift import reference
from minift.config import LlamaConfig, RopeScaling, TrainConfig
from minift.generate import Sampling, sample
from minift.kernels import attention as fused
from minift.loss import _a_few_rows_at_a_time_, _all_rows_at_once_, next_token_loss
from minift.model import MLP, Attention, Llama, RMSNorm
from minift.optim import learning_rate, make_optimizer, parameter_groups
from minift.pack import IGNORE
from minift.rope import apply_rope, rope_frequencies, rope_tables
from tests.helpers import small_model

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same in every dtype up to rounding; a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def difference(fast: Tensor, slow: Tensor) -> float:
    """The norm of the difference, relative to the slow one's. Both must have the same shape and dtype."""
    fast, slow = fast.detach(), slow.detach()
    assert fast.shape == slow.shape
    assert fast.dtype == slow.dtype
    assert float(slow.norm()) > 0
    return float((fast - slow).norm() / slow.norm())


def check_twins(fast: Callable[[], Tensor], slow: Callable[[], Tensor], leaves: Sequence[Tensor], tol: float) -> None:
    """Compare the two values, and the gradients of the same random projection of them with respect to `leaves`."""
    gradients = []
    values = [fast(), slow()]
    assert difference(*values) < tol
    for value in values:
        projection = random(*value.shape, seed=99, dtype=value.dtype).detach()
        gradients.append(torch.autograd.grad((value * projection).sum(), leaves))
    for i, (ours, twins) in enumerate(zip(*gradients, strict=True)):
        assert difference(ours, twins) < tol, f"gradient of leaf {i}"


# --- RMSNorm, RoPE, attention, MLP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(dtype: torch.dtype, tol: float, eps: float, scale: float) -> None:
    norm = RMSNorm(24, eps)
    norm.weight.data = random(24, seed=1, dtype=dtype).detach()
    x = (scale * random(3, 7, 24, dtype=dtype)).detach().requires_grad_()
    check_twins(lambda: norm(x), lambda: reference.rms_norm(x, norm.weight, eps), [x, norm.weight], tol)


def test_rms_norm_without_a_gradient_for_its_weight() -> None:
    """As beside adapters: the gradient at x is the same."""
    norm, x = RMSNorm(24, 1e-5), random(3, 7, 24, dtype=torch.float32)
    weight = norm.weight.data = random(24, seed=1, dtype=torch.float32).detach()
    norm.weight.requires_grad_(False)
    check_twins(lambda: norm(x), lambda: reference.rms_norm(x, weight, 1e-5), [x], 1e-6)


def exact_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """What `rope_tables` makes, in float64 and by the formula."""
    frequency = torch.tensor([theta ** (-2 * k / width) for k in range(width // 2)] * 2, dtype=torch.float64)
    angle = positions[:, None, :, None].double() * frequency
    return angle.cos(), angle.sin()


@both_dtypes
@pytest.mark.parametrize("width", [2, 6, 64])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope(dtype: torch.dtype, width: int, theta: float) -> None:
    x = random(2, 3, 9, width, dtype=dtype)
    positions = torch.stack((torch.arange(9), torch.tensor([0, 1, 2, 0, 1, 40, 41, 0, 7])))
    make = exact_tables if dtype == torch.float64 else rope_tables
    cos, sin = make(positions, width, theta)
    check_twins(lambda: apply_rope(x, cos, sin), lambda: reference.rope(x, positions, theta), [x], TOLERANCE[dtype])


def test_rms_norm_and_rope_where_nothing_is_trained() -> None:
    """To the bit as they are in training: a loss is then the same with and without gradients."""
    norm, x = RMSNorm(24, 1e-5), random(2, 3, 9, 24, dtype=torch.float32)
    cos, sin = rope_tables(torch.arange(9)[None], 24, 10_000.0)
    trained = norm(x), apply_rope(x, cos, sin)
    with torch.no_grad():
        for a, b in zip(trained, (norm(x), apply_rope(x, cos, sin)), strict=True):
            assert a.requires_grad
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_on_a_gpu_is_one_kernel_and_the_same(dtype: torch.dtype) -> None:
    """Against the plain formula in float64, and with and without gradients to the bit."""
    norm, x = RMSNorm(64, 1e-5).cuda(), random(5, 64, dtype=dtype).cuda().detach().requires_grad_()
    norm.weight.data = random(64, seed=1, dtype=torch.float32).cuda().detach()
    grad = random(5, 64, seed=2, dtype=torch.float32).cuda()
    found = norm(x)
    with torch.no_grad():
        assert torch.equal(norm(x), found)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = reference.rms_norm(wide, weight, 1e-5)
    ours = found, *torch.autograd.grad(found, (x, norm.weight), grad.to(found.dtype))
    theirs = exact, *torch.autograd.grad(exact, (wide, weight), grad.to(found.dtype).double())
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_what_a_compiler_makes_of_rms_norm_and_rope() -> None:
    """It is given the plain formulas. (Compiled as by default, but without the last stage, the C++ compiler.)"""
    norm, x = RMSNorm(24, 1e-5), random(2, 3, 9, 24, dtype=torch.float32)
    norm.weight.data = random(24, seed=1, dtype=torch.float32).detach()
    positions = torch.arange(9)[None]
    cos, sin = rope_tables(positions, 24, 10_000.0)
    rms_norm, rope = (torch.compile(function, backend="aot_eager") for function in (norm, apply_rope))
    leaves = [x, norm.weight]
    check_twins(lambda: rms_norm(x), lambda: reference.rms_norm(x, norm.weight, 1e-5), leaves, 1e-6)
    check_twins(lambda: rope(x, cos, sin), lambda: reference.rope(x, positions, 10_000.0), [x], 1e-5)


@pytest.mark.parametrize("width", [2, 6, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_tables_are_the_formula_to_float32s_digits(width: int, theta: float) -> None:
    positions = torch.tensor([[0, 1, 2, 63, 511, 4095]])
    # An angle of p radians is known to p · 2^-24, and its frequency and product are rounded as well.
    allowed = 4 * positions[:, None, :, None] * 2**-24 + 1e-7
    for ours, exact in zip(rope_tables(positions, width, theta), exact_tables(positions, width, theta), strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == (1, 1, 6, width)
        assert bool(((ours.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("width", [2, 6, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    "scaling", [RopeScaling(8.0, 1.0, 4.0, 8_192), RopeScaling(32.0, 1.0, 4.0, 8_192), RopeScaling(2.0, 0.5, 2.0, 64)]
)
def test_scaled_rope_frequencies(width: int, theta: float, scaling: RopeScaling) -> None:
    ours = rope_frequencies(width, theta, scaling)
    exact = [reference.scaled_frequency(theta ** (-2 * k / width), scaling) for k in range(width // 2)]
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(exact, rel=1e-5)
    if width >= 64:  # pairs of all three kinds are there
        plain = rope_frequencies(width, theta)
        assert bool((ours == plain).any())
        assert bool((ours == plain / scaling.factor).any())
        assert bool(((ours < plain) & (ours > plain / scaling.factor)).any())


@pytest.mark.slow
def test_the_first_rope_tables_of_a_process_are_those_of_all_later_ones() -> None:
    """In some fresh processes: what a library sets up at its first call must not show in the numbers."""
    code = (
        "import torch; from minift.rope import rope_tables; places = torch.arange(64).repeat(11, 1)\n"
        "first, second = (torch.stack(rope_tables(places, 32, 1e4)) for _ in range(2))\n"
        "assert torch.equal(first, second), (first - second).abs().max()"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_rope_knows_distances_only_and_keeps_lengths() -> None:
    query, key = random(1, 1, 1, 16).detach(), random(1, 1, 1, 16, seed=1).detach()

    def turned(x: Tensor, position: int) -> Tensor:
        return apply_rope(x, *exact_tables(torch.tensor([[position]]), 16, 10_000.0))

    near, far = turned(query, 7) * turned(key, 3), turned(query, 1_007) * turned(key, 1_003)
    assert float(near.sum()) == pytest.approx(float(far.sum()), rel=1e-9)
    assert float(near.sum()) != pytest.approx(float((turned(query, 7) * turned(key, 4)).sum()), rel=1e-3)
    assert float(turned(query, 1_007).norm()) == pytest.approx(float(query.norm()), rel=1e-12)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1, -1], [-1, -1, 0, 0, 0, 0, 0, 0, 0, 0]])


@both_dtypes
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 6), (4, 2, 6), (4, 1, 6), (6, 3, 10)])
def test_attention(dtype: torch.dtype, documents: Tensor | None, heads: int, kv_heads: int, width: int) -> None:
    B, T, D = 2, 10, 24
    config = LlamaConfig(
        hidden_size=D, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, rope_theta=100.0
    )
    attention = Attention(config, layer=0).to(dtype)
    for seed, parameter in enumerate(attention.parameters()):
        parameter.data = 0.4 * random(*parameter.shape, seed=seed + 1, dtype=dtype).detach()
    x = random(B, T, D, dtype=dtype)
    positions = torch.arange(T).expand(B, T) if documents is None else torch.stack([counted(r) for r in documents])
    make = exact_tables if dtype == torch.float64 else rope_tables
    cos, sin = make(positions, width, config.rope_theta)
    mask = Llama._mask(T, 0, documents, None, x.device)

    def slow() -> Tensor:
        def split(projection: torch.nn.Linear) -> Tensor:
            return (x @ projection.weight.T).view(B, T, -1, width).transpose(1, 2)

        query = reference.rope(split(attention.q_proj), positions, config.rope_theta)
        key = reference.rope(split(attention.k_proj), positions, config.rope_theta)
        mixed = reference.attention(query, key, split(attention.v_proj), documents)  # [B, H, T, C]
        joined = torch.cat([mixed[:, h] for h in range(heads)], dim=-1)  # [B, T, H * C]
        return joined @ attention.o_proj.weight.T

    leaves = [x, *attention.parameters()]
    check_twins(lambda: attention(x, cos, sin, mask, None), slow, leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["its kernels", "without them", "a long row", "compiled", "a long row, compiled"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_bfloat16_on_a_cpu(way: str, masked: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels, the backward one in float32; PyTorch's choice; written out: each beside the loop in float64."""
    assert fused._HAS_CPU_KERNELS  # in the versions that this is tested with
    monkeypatch.setattr(fused, "_HAS_CPU_KERNELS", way != "without them")
    monkeypatch.setattr(fused, "ROWS", 10)  # of 24, the last 4 together
    if way.startswith("a long row"):
        monkeypatch.setattr(fused, "NARROW_ROW", 24 * 16 - 1)
        monkeypatch.setattr(fused, "COMPILED_ROW", 23)
    # Compiled as by default, but without the last stage, the C++ compiler. (It compiles a function 8 times, no more.)
    torch.compiler.reset()
    attend = torch.compile(fused.attend, backend="aot_eager") if way.endswith("compiled") else fused.attend
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 24, 16) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4]) if masked else None
    mask = None if documents is None else (documents[:, :, None] == documents[:, None, :])[:, None].tril()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mixed, wanted = attend(*inputs, mask), reference.attention(*exact, documents)
    grad = torch.randn(wanted.shape, generator=generator)
    mixed.backward(grad.bfloat16())
    wanted.backward(grad.bfloat16().double())
    assert mixed.dtype == torch.bfloat16
    for found, right in [(mixed, wanted), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert found is not None
        assert right is not None
        assert (found.double() - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_attention_is_written_out_for_a_compiler(long: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, of a short row in which nothing is masked; and neither where nothing is compiled."""
    monkeypatch.setattr(fused, "_attention", lambda query, key, value: (3 * query, key[..., 0]))
    monkeypatch.setattr(fused, "_attention_gradients", lambda grad, *tensors: tuple(2 * x for x in tensors[:3]))
    monkeypatch.setattr(fused, "COMPILED_ROW", 7 if long else 8)
    torch.compiler.reset()
    inputs = [torch.randn(1, 2, 8, 16).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() if masked else None
    for attend, compiled in ((fused.attend, False), (torch.compile(fused.attend, backend="aot_eager"), True)):
        used = compiled and not long and not masked
        mixed = attend(*inputs, mask)
        assert torch.equal(mixed, 3 * inputs[0]) == used
        gradients = torch.autograd.grad(mixed, inputs, torch.ones_like(mixed))
        assert [torch.equal(a, 2 * b) for a, b in zip(gradients, inputs, strict=True)] == [used] * 3


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_a_short_row_is_widened(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, for a backward pass, and where there are kernels for it."""
    T, C = 8, 16
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if masked else None

    def widened(dtype: torch.dtype = torch.bfloat16) -> bool:
        inputs = [torch.randn(1, 2, T, C).to(dtype).requires_grad_() for _ in range(3)]
        mixed = fused.attend(*inputs, mask)
        return mixed.grad_fn is not None and "_Widened" in mixed.grad_fn.name()

    monkeypatch.setattr(fused, "NARROW_ROW", T * C)
    assert widened()
    assert not widened(torch.float32)
    with torch.no_grad():
        assert not widened()
    monkeypatch.setattr(fused, "NARROW_ROW", T * C - 1)
    assert not widened()
    monkeypatch.setattr(fused, "NARROW_ROW", T * C)
    monkeypatch.setattr(fused, "_HAS_CPU_KERNELS", False)
    assert not widened()


def counted(documents: Tensor) -> Tensor:
    """Positions that start at 0 wherever the document changes."""
    places: list[int] = []
    for i, document in enumerate(documents.tolist()):
        places.append(places[-1] + 1 if i and documents[i - 1] == document else 0)
    return torch.tensor(places)


@both_dtypes
def test_mlp(dtype: torch.dtype) -> None:
    mlp = MLP(LlamaConfig(hidden_size=24, intermediate_size=40)).to(dtype)
    for seed, parameter in enumerate(mlp.parameters()):
        parameter.data = random(*parameter.shape, seed=seed + 1, dtype=dtype).detach()
    x = random(3, 5, 24, dtype=dtype)
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    check_twins(lambda: mlp(x), lambda: reference.swiglu(x, *weights), [x, *weights], TOLERANCE[dtype])


# --- the loss ---------------------------------------------------------------------------------------------------------

N_TARGETS = 17


def loss_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [3, 8, 12], weight [31, 12] and targets with 17 positions to learn, a row without any among them."""
    targets = torch.randint(0, 31, (3, 8), generator=torch.Generator().manual_seed(5))
    targets[0, :4] = targets[0, -1] = targets[2, :2] = IGNORE
    targets = torch.cat((targets, torch.full((1, 8), IGNORE)))
    assert int((targets != IGNORE).sum()) == N_TARGETS
    return random(4, 8, 12, dtype=dtype), random(31, 12, seed=1, dtype=dtype), targets


both_layouts = pytest.mark.parametrize("wide", [0, 2**14], ids=["a wide head", "a narrow head"])


both_ways = pytest.mark.parametrize("way", [_a_few_rows_at_a_time_, _all_rows_at_once_], ids=["CPU's way", "GPU's way"])


@both_dtypes
@both_layouts
@both_ways
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 17, 18, 2_048])
def test_loss(dtype: torch.dtype, chunk: int, way: object, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minift.loss._nll_and_gradient_", way)
    monkeypatch.setattr("minift.loss.COLUMNS", 10)  # of 31
    monkeypatch.setattr("minift.loss.WIDE_HEAD", wide)
    hidden, weight, targets = loss_inputs(dtype)
    nll_sum, n_tokens = next_token_loss(hidden, weight, targets, chunk)
    assert nll_sum.dtype == dtype
    assert nll_sum.shape == ()
    slow_sum, slow_count = reference.cross_entropy(hidden, weight, targets)
    assert int(n_tokens) == slow_count == N_TARGETS
    check_twins(
        lambda: next_token_loss(hidden, weight, targets, chunk)[0],
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        TOLERANCE[dtype],
    )
    # The same by PyTorch's own, which knows nothing of our twin.
    theirs = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert nll_sum.item() == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])
    assert slow_sum.item() == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])


@both_layouts
@pytest.mark.parametrize("chunk", [4, 2_048])
def test_loss_passes_gradcheck(chunk: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minift.loss.WIDE_HEAD", wide)
    hidden, weight, targets = loss_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, targets, chunk)[0], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: next_token_loss(h, weight.detach(), targets, chunk)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda w: next_token_loss(hidden.detach(), w, targets, chunk)[0], (weight,))


@both_dtypes
def test_loss_of_a_vocabulary_whose_rows_are_whole_pages(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 numbers of 4 or 8 bytes: the gradient's rows are made longer, and what comes out is not."""
    monkeypatch.setattr("minift.loss.WIDE_HEAD", 1_024)
    hidden, _, targets = loss_inputs(dtype)
    weight = random(1_024, 12, seed=1, dtype=dtype)
    check_twins(
        lambda: next_token_loss(hidden, weight, targets)[0],
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        TOLERANCE[dtype],
    )


@both_dtypes
def test_loss_from_the_targets_probability_or_from_the_largest_is_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = loss_inputs(dtype)
    usual, _ = next_token_loss(hidden, weight, targets)
    monkeypatch.setattr("minift.loss.SMALLEST", 2.0)  # no probability is larger: each is taken for too small
    careful, _ = next_token_loss(hidden, weight, targets)
    assert careful.item() == pytest.approx(usual.item(), rel=TOLERANCE[dtype])


@both_ways
def test_loss_of_huge_logits_is_exact(way: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of thousands: without subtracting the largest, the exponentials would overflow."""
    monkeypatch.setattr("minift.loss._nll_and_gradient_", way)
    hidden, weight, targets = loss_inputs(torch.float32)
    hidden = (1e4 * hidden).detach().requires_grad_()
    check_twins(
        lambda: next_token_loss(hidden, weight, targets, 3)[0],
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        1e-5,
    )


@both_layouts
def test_loss_without_targets_is_zero_and_moves_nothing(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minift.loss.WIDE_HEAD", wide)
    hidden, weight, targets = loss_inputs(torch.float64)
    nll_sum, n_tokens = next_token_loss(hidden, weight, torch.full_like(targets, IGNORE))
    nll_sum.backward()
    assert nll_sum.item() == n_tokens.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_loss_of_ignored_positions_has_no_gradient_at_all() -> None:
    hidden, weight, targets = loss_inputs(torch.float64)
    next_token_loss(hidden, weight, targets, 4)[0].backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(-1) == 0, targets == IGNORE)


@pytest.mark.parametrize("chunk", [5, 2_048])
def test_loss_with_a_tied_weight_collects_both_uses(chunk: int) -> None:
    """The embedding's gradient is the sum of what comes through the head and what comes through the stream."""
    model = small_model(dtype=torch.float64, tie_word_embeddings=True)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    targets = tokens.roll(-1, 1)
    weight = model.embed_tokens.weight

    def gradient(hidden: Tensor, head: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(next_token_loss(hidden, head, targets, chunk)[0], weight)
        return gradient

    whole = gradient(model.hidden(tokens), model.head_weight)
    as_input = gradient(model.hidden(tokens), weight.detach())
    as_head = gradient(model.hidden(tokens).detach(), weight)
    assert float(as_input.norm()) > 0.01 * float(whole.norm())
    assert float(as_head.norm()) > 0.01 * float(whole.norm())
    assert difference(whole, as_input + as_head) < 1e-12
    logits = model(tokens)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), weight)
    assert difference(whole, plain) < 1e-12


def test_loss_under_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, targets = loss_inputs(torch.float32)
    exact = reference.cross_entropy(hidden, weight, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll_sum, _ = next_token_loss(hidden, weight, targets, 5)
    rounded = reference.cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), targets)[0]
    assert nll_sum.dtype == torch.float32
    assert abs(nll_sum.item() / exact.item() - 1) > 1e-5  # bfloat16 was used …
    assert nll_sum.item() == pytest.approx(rounded.item(), rel=5e-3)
    ours = torch.autograd.grad(nll_sum, [hidden, weight])
    for our, slow in zip(ours, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        assert our.dtype == torch.float32
        assert 1e-4 < difference(our, slow) < 2e-2  # … and costs what bfloat16's 8 bits cost, not more


class _Multiplications(TorchDispatchMode):
    """Counts the matrix products that are really made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wanted", "expected"), [("both", 3), ("hidden", 2), ("weight", 2), ("nothing", 1)])
def test_loss_multiplies_only_what_is_wanted(wanted: str, expected: int) -> None:
    """One product for the logits, one for each gradient that is asked for; an evaluation asks for none."""
    hidden, weight, targets = loss_inputs(torch.float32)
    hidden.requires_grad_(wanted in ("both", "hidden"))
    with torch.set_grad_enabled(wanted != "nothing"), _Multiplications() as made:
        next_token_loss(hidden, weight if wanted != "hidden" else weight.detach(), targets)
    assert made.count == expected


# --- clipping and AdamW -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.5])
def test_clip(dtype: torch.dtype, tol: float, share: float) -> None:
    # Gradients of norm 10^5, so that the 1e-6 that PyTorch adds to the norm is beyond the digits compared.
    gradients = [1e4 * random(*shape, seed=i, dtype=dtype).detach() for i, shape in enumerate([(5, 7), (11,), (3, 4)])]
    expected, norm = reference.clip(gradients, share * float(sum((g.double() ** 2).sum() for g in gradients)) ** 0.5)
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    assert float(torch.nn.utils.clip_grad_norm_(parameters, share * norm)) == pytest.approx(norm, rel=tol)
    for parameter, gradient, wanted in zip(parameters, gradients, expected, strict=True):
        assert parameter.grad is not None
        assert difference(parameter.grad, wanted) < tol
        assert torch.equal(parameter.grad, gradient) == (share > 1)  # a small gradient is left as it is


@both_dtypes
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(dtype: torch.dtype, weight_decay: float) -> None:
    """Five steps with another learning rate each: every weight, and the decay on matrices only."""
    model = small_model(dtype=dtype, tie_word_embeddings=False)
    config = TrainConfig(lr=1e-2, weight_decay=weight_decay, beta1=0.8, beta2=0.97)
    optimizer = make_optimizer(model, config)
    slow = {
        name: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step in range(1, 6):
        lr = config.lr / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            parameter.grad = (
                10.0 ** (seed % 5 - 3) * random(*parameter.shape, seed=100 * step + seed).to(dtype).detach()
            )
            decay = weight_decay if parameter.ndim == 2 else 0.0
            slow[name] = reference.adamw_step(
                slow[name][0], parameter.grad, slow[name][1], slow[name][2], step, lr, 0.8, 0.97, 1e-8, decay
            )
        optimizer.step()
    start = dict(small_model(dtype=dtype, tie_word_embeddings=False).named_parameters())
    for name, parameter in model.named_parameters():
        moved, wanted = parameter.detach() - start[name].detach(), slow[name][0] - start[name].detach()
        assert difference(moved, wanted) < 20 * TOLERANCE[dtype], name


@both_dtypes
def test_adamw_is_that_of_pytorch_to_the_bit(dtype: torch.dtype) -> None:
    """Weights and state over five steps, in which one parameter has a gradient from the second on; then each reads the
    other's state."""
    config = TrainConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.97)
    ours, theirs = small_model(dtype=dtype), small_model(dtype=dtype)
    optimizer = make_optimizer(ours, config)
    settings: dict[str, Any] = {"lr": config.lr, "betas": (0.8, 0.97), "eps": 1e-8, "fused": True}
    twin = torch.optim.AdamW(parameter_groups(theirs, config), **settings)
    for step in range(6):
        for seed, (mine, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            if step or seed != 3:
                mine.grad = random(*mine.shape, seed=100 * step + seed).to(dtype).detach()
                other.grad = mine.grad.clone()
        optimizer.step()
        twin.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        one, two = optimizer.state_dict(), twin.state_dict()
        assert one["param_groups"] == two["param_groups"]
        assert one["state"].keys() == two["state"].keys()
        for place, moments in one["state"].items():
            assert all(torch.equal(moment, two["state"][place][key]) for key, moment in moments.items())
            assert moments.keys() == two["state"][place].keys() == {"step", "exp_avg", "exp_avg_sq"}
        if step == 4:
            twin.load_state_dict(copy.deepcopy(one))
            optimizer.load_state_dict(copy.deepcopy(two))


def test_decay_alone_shrinks_matrices_and_leaves_norms() -> None:
    model = small_model(dtype=torch.float64, tie_word_embeddings=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(lr=0.01, weight_decay=0.5))
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 5  # two a layer, and the last
    for name, parameter in model.named_parameters():
        factor = 1.0 if name in norms else (1 - 0.01 * 0.5) ** 5
        assert torch.allclose(parameter, factor * before[name], rtol=1e-14, atol=0), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_optimizer_holds_every_parameter_once(tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    held = [id(p) for group in make_optimizer(model, TrainConfig()).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 50])
@pytest.mark.parametrize("min_lr", [0.0, 0.1, 1.0])
def test_schedule_at_its_edges(schedule: str, warmup: int, min_lr: float) -> None:
    config, total = TrainConfig(lr=0.02, warmup=warmup, schedule=schedule, min_lr=min_lr), 50
    rates = [learning_rate(step, total, config) for step in range(total)]
    for step in range(min(warmup, total)):  # never 0: the first step already learns
        assert rates[step] == pytest.approx(0.02 * (step + 1) / (warmup + 1))
    assert learning_rate(warmup, total, config) == pytest.approx(0.02)  # the peak, right behind the warm-up
    assert max(rates) <= 0.02 * (1 + 1e-12)
    end = 0.02 * (1.0 if schedule == "constant" or warmup == total else min_lr)
    assert learning_rate(total, total, config) == pytest.approx(end, abs=1e-15)  # where a further step would be
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    if schedule == "constant":
        assert set(falling) <= {0.02}


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_behind_the_warmup_is_that_of_transformers(schedule: str, warmup: int, min_lr: float) -> None:
    config, total = TrainConfig(lr=0.02, warmup=warmup, schedule=schedule, min_lr=min_lr), 40
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    share = make(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, total).lr_lambdas[0]
    for step in range(warmup, total):
        expected = 0.02 * (min_lr + (1 - min_lr) * share(step))
        assert learning_rate(step, total, config) == pytest.approx(expected, rel=1e-12)


# --- sampling ---------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.3, -0.4, 2.1, 0.2, -2.0, 0.9, 1.7, -1.1])
DRAWS = 20_000


def chi_squared(drawn: Tensor, log_probability: Tensor) -> tuple[float, float]:
    """Pearson's statistic of the draws, and what it stays below with probability 1 - 10⁻⁶ if they are right.

    The bound is Wilson and Hilferty's: a chi-squared variable over its degrees of freedom n, to the power 1/3, is
    nearly normal with mean 1 - 2/9n and variance 2/9n.
    """
    possible = log_probability > -math.inf
    counts = torch.bincount(drawn, minlength=len(log_probability)).double()
    if counts[~possible].any():
        return math.inf, 0.0
    expected = len(drawn) * log_probability[possible].exp()
    n = max(1, int(possible.sum()) - 1)
    bound = n * (1 - 2 / (9 * n) + 4.753 * math.sqrt(2 / (9 * n))) ** 3
    return float(((counts[possible] - expected) ** 2 / expected).sum()), bound


def draw(temperature: float, top_k: int, top_p: float, seed: int = 0) -> Tensor:
    rows = LOGITS.expand(DRAWS, -1)
    return sample(rows, Sampling(temperature, top_k, top_p), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 2, 5, 8, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.45])
def test_sample_chooses_with_the_twins_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    twin = reference.token_log_probability(LOGITS, temperature, top_k, top_p)
    assert float(twin.exp().sum()) == pytest.approx(1.0, rel=1e-12)
    statistic, bound = chi_squared(draw(temperature, top_k, top_p), twin)
    assert statistic < bound


@pytest.mark.parametrize(
    ("drawn_with", "expected"),
    [
        ((1.0, 0, 1.0), (1.15, 0, 1.0)),
        ((1.0, 5, 1.0), (1.0, 4, 1.0)),
        ((1.0, 4, 1.0), (1.0, 5, 1.0)),
        ((1.0, 0, 0.8), (1.0, 0, 0.6)),
        ((1.0, 0, 0.6), (1.0, 0, 0.8)),
    ],
)
def test_the_comparison_of_probabilities_can_fail(
    drawn_with: tuple[float, int, float], expected: tuple[float, int, float]
) -> None:
    statistic, bound = chi_squared(draw(*drawn_with), reference.token_log_probability(LOGITS, *expected))
    assert statistic > bound


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.0, 0, 1.0),
        (0.0, 5, 0.5),
        (1.0, 1, 1.0),
        (5.0, 1, 0.1),
        (1.0, 0, 1e-9),
        (5.0, 0, 1e-6),
        (1e-4, 0, 1.0),
        (1e-39, 0, 1.0),
    ],
)
def test_sample_at_its_edges_takes_the_likeliest(temperature: float, top_k: int, top_p: float) -> None:
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(8))
    chosen = sample(rows, Sampling(temperature, top_k, top_p), torch.Generator().manual_seed(9))
    assert torch.equal(chosen, rows.argmax(-1))


def test_sample_leaves_its_logits_alone_and_rows_apart() -> None:
    rows = torch.stack((LOGITS, LOGITS.flip(0)))
    kept = rows.clone()
    generator = torch.Generator().manual_seed(4)
    drawn = torch.stack([sample(rows, Sampling(1.0, 5, 0.9), generator) for _ in range(4_000)])
    assert torch.equal(rows, kept)
    for row in range(2):
        statistic, bound = chi_squared(drawn[:, row], reference.token_log_probability(rows[row], 1.0, 5, 0.9))
        assert statistic < bound
