"""The promise of `kernels/attention.py`: attention of a CPU has the values and gradients of `model.ScaledDotProduct`.

Held against the slow loop of `minift/reference.py` in float64, and against the plain module. Which way is taken where
is held, too: each of them only buys time.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minift import reference
from minift.kernels import attention as kernels
from minift.kernels.attention import FastScaledDotProduct
from minift.model import ScaledDotProduct
from tests.twins import apart, check_twins, difference, random

masks = pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4])


def mask_of(documents: Tensor) -> Tensor:
    return (documents[:, :, None] == documents[:, None, :])[:, None].tril()


@pytest.mark.parametrize("way", ["its kernels", "without them", "a long row", "compiled", "a long row, compiled"])
@masks
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_bfloat16_on_a_cpu(way: str, masked: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels, the backward one in float32; PyTorch's choice; products: each compared with the loop in float64."""
    assert kernels.has_cpu_kernels()  # in the versions that this is tested with
    if way == "without them":
        monkeypatch.setattr(kernels, "has_cpu_kernels", lambda: False)
    monkeypatch.setattr(kernels, "ROWS", 10)  # of 24, the last 4 together
    if way.startswith("a long row"):
        monkeypatch.setattr(kernels, "UPCAST_ROW", 24 * 16 - 1)
        monkeypatch.setattr(kernels, "COMPILED_ROW", 23)
    # Compiled as by default, but without the last stage, the C++ compiler. (It compiles a function 8 times, no more.)
    torch.compiler.reset()
    attend: Callable[..., Tensor] = FastScaledDotProduct()
    if way.endswith("compiled"):
        attend = torch.compile(attend, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 24, 16) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    documents = DOCUMENTS if masked else None
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mixed = attend(*inputs, None if documents is None else mask_of(documents))
    expected = reference.attention(*exact, documents)
    grad = torch.randn(expected.shape, generator=generator)
    mixed.backward(grad.bfloat16())
    expected.backward(grad.bfloat16().double())
    assert mixed.dtype == torch.bfloat16
    for found, right in [(mixed, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert found is not None
        assert right is not None
        assert apart(found, right) < 0.01


@pytest.mark.parametrize("rows", [3, 10, 24, 128])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_products_are_the_formula_to_float32s_digits(kv_heads: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler is given, in float32: both passes, in blocks of any size."""
    monkeypatch.setattr(kernels, "ROWS", rows)
    inputs = [random(2, heads, 24, 6, seed=heads, dtype=torch.float32) for heads in (4, kv_heads, kv_heads)]
    inputs[2] = random(2, kv_heads, 24, 6, seed=9, dtype=torch.float32)
    check_twins(lambda: kernels._Products.apply(*inputs), lambda: reference.attention(*inputs), inputs, 1e-5)


@masks
@pytest.mark.parametrize("long", [False, True])
def test_a_compiler_is_given_products(long: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both passes, of a short row in which nothing is masked; and in neither where nothing is compiled."""
    monkeypatch.setattr(kernels, "_attention", lambda query, key, value: (3 * query, key[..., 0]))
    monkeypatch.setattr(kernels, "_attention_gradients", lambda grad, *tensors: tuple(2 * x for x in tensors[:3]))
    monkeypatch.setattr(kernels, "COMPILED_ROW", 7 if long else 8)
    torch.compiler.reset()
    inputs = [torch.randn(1, 2, 8, 16).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() if masked else None
    eager = FastScaledDotProduct()
    for attend, compiled in ((eager, False), (torch.compile(eager, backend="aot_eager"), True)):
        used = compiled and not long and not masked
        mixed = attend(*inputs, mask)
        assert torch.equal(mixed, 3 * inputs[0]) == used
        gradients = torch.autograd.grad(mixed, inputs, torch.ones_like(mixed))
        assert [torch.equal(a, 2 * b) for a, b in zip(gradients, inputs, strict=True)] == [used] * 3


@masks
def test_attention_to_a_short_row_is_upcast(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, for a backward pass, and where there are kernels for it."""
    T, C = 8, 16
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if masked else None

    def upcast(dtype: torch.dtype = torch.bfloat16) -> bool:
        inputs = [torch.randn(1, 2, T, C).to(dtype).requires_grad_() for _ in range(3)]
        mixed = FastScaledDotProduct()(*inputs, mask)
        return mixed.grad_fn is not None and "_Upcast" in mixed.grad_fn.name()

    monkeypatch.setattr(kernels, "UPCAST_ROW", T * C)
    assert upcast()
    assert not upcast(torch.float32)
    with torch.no_grad():
        assert not upcast()
    monkeypatch.setattr(kernels, "UPCAST_ROW", T * C - 1)
    assert not upcast()
    monkeypatch.setattr(kernels, "UPCAST_ROW", T * C)
    monkeypatch.setattr(kernels, "has_cpu_kernels", lambda: False)
    assert not upcast()


@masks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_in_other_dtypes_it_is_its_twin_to_the_bit(kv_heads: int, dtype: torch.dtype, masked: bool) -> None:
    inputs = [random(2, heads, 24, 6, seed=i, dtype=dtype) for i, heads in enumerate((4, kv_heads, kv_heads))]
    mask = mask_of(DOCUMENTS) if masked else None
    values = [attend(*inputs, mask) for attend in (FastScaledDotProduct(), ScaledDotProduct())]
    assert torch.equal(*values)
    grads = [torch.autograd.grad(value, inputs, torch.ones_like(value)) for value in values]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@masks
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_of_one_new_token(kv_heads: int, dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    """The heads that share a key are its queries; what they may see is masked, or everything there is."""
    query = random(2, 4, 1, 6, dtype=dtype).detach()
    key, value = (random(2, kv_heads, 24, 6, seed=i, dtype=dtype).detach() for i in (1, 2))
    mask = mask_of(DOCUMENTS)[:, :, -1:] if masked else None
    found = FastScaledDotProduct()(query, key, value, mask)
    # In the loop, the token's query is the last of 24.
    exact = [torch.cat((query.expand(-1, -1, 23, -1), query), 2).double(), key.double(), value.double()]
    expected = reference.attention(*exact, DOCUMENTS if masked else None)[:, :, -1:]
    assert found.dtype == dtype
    assert apart(found, expected) < tolerance
    assert difference(found.double(), ScaledDotProduct()(query, key, value, mask).double()) < tolerance
    if masked:
        assert apart(found, FastScaledDotProduct()(query, key, value, None)) > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_new_token_has_gradients_too(dtype: torch.dtype) -> None:
    inputs = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 4, 1, 6), (2, 2, 9, 6), (2, 2, 9, 6)])]
    check_twins(lambda: FastScaledDotProduct()(*inputs, None), lambda: ScaledDotProduct()(*inputs, None), inputs, 1e-5)
