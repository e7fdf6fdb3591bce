"""The promise of `kernels/flex.py`: blocks in place of a boolean mask, and heads that share keys, change no number.

On a CPU FlexAttention is its own plain definition, so here it is held in float64 against `model.Prepare`'s mask,
`model.ScaledDotProduct` and the loop of `minift/reference.py`. (It has no backward pass there.) On a GPU they are
held in value and in gradient.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minift import reference
from minift.cache import KVCache
from minift.config import FINETUNE
from minift.kernels import choose, flex, install, with_kernels
from minift.kernels.flex import FLEX_LENGTH, FlexPrepare, FlexScaledDotProduct, block_mask
from minift.kernels.swap import swap
from minift.model import Llama, Prepare, ScaledDotProduct
from minift.pack import PADDING
from tests.helpers import small_model
from tests.twins import apart, difference

eagerly = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def ragged(batch: int, length: int, seed: int) -> Tensor:
    """Document ids of rows whose documents have all sorts of lengths; one row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < torch.tensor([0.02, 0.3, 0.1])[:batch, None]
    document_ids = starts.cumsum(1)
    document_ids[-1, length - length // 5 :] = PADDING
    return document_ids


def attention_inputs(
    batch: int, length: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Query, key, value, and a gradient of what comes out, the same for each dtype and device."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, n, length, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def boolean_mask(document_ids: Tensor) -> Tensor:
    mask = Prepare(small_model().config).mask(document_ids, 0, document_ids, None)
    assert mask is not None
    return mask


def with_flex(model: Llama) -> Llama:
    """A model with the modules of a GPU, whatever its dtype."""
    swap(model, {ScaledDotProduct: FlexScaledDotProduct, Prepare: FlexPrepare})
    return model


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes for which block masks are made from now on."""
    made: list[tuple[int, ...]] = []

    def count(document_ids: Tensor) -> BlockMask:
        made.append(tuple(document_ids.shape))
        return block_mask(document_ids)

    monkeypatch.setattr(flex, "block_mask", count)
    return made


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 17, 200])
@eagerly
@torch.no_grad()
def test_block_masks_are_the_boolean_masks(length: int, kv_heads: int) -> None:
    """In float64, to see that no query looks anywhere else."""
    document_ids, attend, plain = ragged(3, length, seed=length), FlexScaledDotProduct(), ScaledDotProduct()
    query, key, value, _ = attention_inputs(3, length, 4, kv_heads, 8, torch.float64)
    blocks = attend(query, key, value, block_mask(document_ids))
    assert float((blocks - plain(query, key, value, boolean_mask(document_ids))).abs().max()) < 1e-12
    if length < 100:
        assert float((blocks - reference.attention(query, key, value, document_ids)).abs().max()) < 1e-12
    causal = plain(query, key, value, None)
    assert length == 1 or float((blocks - causal).abs().max()) > 0.1
    one = torch.zeros_like(document_ids)
    assert float((attend(query, key, value, block_mask(one)) - causal).abs().max()) < 1e-12


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [17, 1])
def test_without_blocks_it_is_its_twin(queries: int, kv_heads: int, dtype: torch.dtype, masked: bool) -> None:
    """With a boolean mask or none: heads that share keys get keys of their own, or one token's heads share theirs."""
    document_ids = ragged(3, 17, seed=1)
    query, key, value, grad = attention_inputs(3, 17, 4, kv_heads, 8, dtype)
    inputs = [tensor.requires_grad_() for tensor in (query[:, :, -queries:].clone(), key, value)]
    mask = boolean_mask(document_ids)[:, :, -queries:] if masked else None
    found, expected = (attend(*inputs, mask) for attend in (FlexScaledDotProduct(), ScaledDotProduct()))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert difference(found, expected) < tolerance
    grad = grad[:, :, -queries:]
    gradients = (torch.autograd.grad(value, inputs, grad) for value in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert difference(one, other) < tolerance


@pytest.mark.parametrize("length", [140])
@eagerly
@torch.no_grad()
def test_a_model_with_block_masks_has_the_same_hidden_states(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(dtype=torch.float64, max_position_embeddings=256)
    document_ids = ragged(2, length, seed=3)
    tokens = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
    expected = model.hidden(tokens, None, document_ids)
    made = count_blocks(monkeypatch)
    monkeypatch.setattr(FlexPrepare, "by_blocks", lambda self, length: True)
    with_flex(model)
    blocks = model.hidden(tokens, None, document_ids)
    assert made == [(2, length)]  # one for all layers
    assert float((blocks - expected).abs().max()) < 1e-10
    model.hidden(tokens)
    assert len(made) == 1  # without documents none is made
    cache = KVCache(model.config, 2, length, model.device, torch.float64)
    cached = model.hidden(tokens, None, document_ids, cache)
    assert len(made) == 1  # nor for a cache
    assert float((cached - expected).abs().max()) < 1e-10


def test_blocks_are_for_long_rows_and_wide_heads() -> None:
    def by_blocks(length: int, model: Llama) -> bool:
        assert isinstance(model.prepare, FlexPrepare)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        mask = model.prepare.mask(tokens, 0, tokens, None)
        assert isinstance(mask, BlockMask) == model.prepare.by_blocks(length)
        return model.prepare.by_blocks(length)

    wide = with_flex(small_model(hidden_size=64))  # heads of 16
    narrow = with_flex(small_model(hidden_size=56))  # … of 14
    assert by_blocks(FLEX_LENGTH, wide)
    assert by_blocks(4 * FLEX_LENGTH, wide)
    assert not by_blocks(FLEX_LENGTH - 1, wide)
    assert not by_blocks(FLEX_LENGTH, narrow)


def test_flex_attention_is_for_a_gpu_and_not_for_float64() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        for compiles in (False, True):
            config = FINETUNE.replace(dtype=dtype, compile=compiles)
            assert "flex" in choose(config, torch.device("cuda"))
            assert "flex" not in choose(config, torch.device("cpu"))
    for dtype, installed in [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)]:
        model = install(small_model(dtype=dtype), ["flex"])
        assert isinstance(model.prepare, FlexPrepare) == installed
        assert any(isinstance(module, FlexScaledDotProduct) for module in model.modules()) == installed


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [FLEX_LENGTH, 3 * FLEX_LENGTH // 2 + 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)], ids=str)
def test_flex_attention_on_a_gpu_has_the_values_and_gradients_of_the_boolean_mask(
    dtype: torch.dtype, tolerance: float, length: int, kv_heads: int
) -> None:
    """By norm, against float64; float32 products may run in TF32 there."""
    document_ids = ragged(3, length, seed=1).cuda()
    *inputs, grad = attention_inputs(3, length, 4, kv_heads, 32, dtype, "cuda")

    def run(inputs: list[Tensor], grad: Tensor, mask: Tensor | BlockMask) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        mixed = FlexScaledDotProduct()(*leaves, mask)
        return [mixed.detach(), *torch.autograd.grad(mixed, leaves, grad)]

    blocks = run(inputs, grad, block_mask(document_ids))
    wide = [tensor.double() for tensor in inputs]
    expected = run(wide, grad.double(), boolean_mask(document_ids))
    boolean = run(inputs, grad, boolean_mask(document_ids))
    for ours, theirs, right in zip(blocks, boolean, expected, strict=True):
        assert ours.dtype == dtype
        assert apart(ours, right) < tolerance
        assert float((ours.double() - theirs.double()).norm() / right.norm()) < 2 * tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)], ids=str)
def test_shared_heads_on_a_gpu(dtype: torch.dtype, tolerance: float, masked: bool, kv_heads: int) -> None:
    """Short rows, and one new token: against the loop in float64."""
    document_ids = ragged(3, 40, seed=1)
    *inputs, grad = attention_inputs(3, 40, 4, kv_heads, 32, dtype, "cuda")
    mask = boolean_mask(document_ids).cuda() if masked else None
    leaves = [tensor.requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    found, expected = (
        FlexScaledDotProduct()(*leaves, mask),
        reference.attention(*wide, document_ids if masked else None),
    )
    assert apart(found.cpu(), expected) < tolerance
    gradients = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, wide, grad.double().cpu())
    for one, other in zip(*gradients, strict=True):
        assert apart(one.cpu(), other) < tolerance
    with torch.no_grad():
        last = FlexScaledDotProduct()(leaves[0][:, :, -1:], *leaves[1:], None if mask is None else mask[:, :, -1:])
    assert apart(last.cpu(), expected[:, :, -1:]) < tolerance


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_a_model_on_a_gpu_takes_flex_attention_from_flex_length_on(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(hidden_size=64, max_position_embeddings=2 * FLEX_LENGTH).cuda()
    model = with_kernels(model, choose(FINETUNE.replace(compile=False), torch.device("cuda")))
    exact = small_model(hidden_size=64, max_position_embeddings=2 * FLEX_LENGTH, dtype=torch.float64)
    made = count_blocks(monkeypatch)
    for length, blocks in [(FLEX_LENGTH - 8, 0), (FLEX_LENGTH, 1), (FLEX_LENGTH + 72, 2)]:
        tokens = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
        document_ids = ragged(2, length, seed=2)
        tokens[:, 5] = tokens[:, 6]
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            hidden = model.hidden(tokens.cuda(), None, document_ids.cuda())
        assert len(made) == blocks
        loss = hidden.double().square()[:, :, :7].sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        right = exact.hidden(tokens, None, document_ids)
        expected = torch.autograd.grad(right.square()[:, :, :7].sum(), list(exact.parameters()))
        tolerance = 0.1 if precision == "autocast" else 2e-2
        assert apart(hidden.cpu(), right) < tolerance
        for ours, gradient in zip(gradients, expected, strict=True):
            assert apart(ours.cpu(), gradient) < 2 * tolerance
    model.hidden(tokens.cuda())
    assert len(made) == 2
