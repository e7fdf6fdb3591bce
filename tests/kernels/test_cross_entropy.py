"""The promise of the loss, plain (`loss.py`) and fused (`kernels/cross_entropy.py`): its formula, and its gradients.

Each test here holds the plain loss, and the fused one in each of its ways: a few rows at a time as on a CPU or all at
once as on a GPU, with the head as it is or transposed. The twin is `reference.cross_entropy`, which has all logits at
once; PyTorch's own cross-entropy and finite differences hold both once more.
"""

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minift import reference
from minift.errors import InputError
from minift.kernels import cross_entropy
from minift.kernels.cross_entropy import FusedNextTokenLoss
from minift.loss import NextTokenLoss, next_token_loss, nll_and_gradient
from minift.pack import IGNORE
from tests.helpers import small_model
from tests.twins import TOLERANCE, apart, check_twins, difference, random

N_TARGETS = 17
Maker: TypeAlias = Callable[..., NextTokenLoss]
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
FUSED = ["CPU", "CPU, wide head", "GPU", "GPU, wide head"]


@pytest.fixture(params=["plain", *FUSED])
def make_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Make a loss of a chunk's size, which goes one of the ways. Everything taken in pieces is in pieces here, too."""
    if request.param == "plain":
        return NextTokenLoss
    if request.param.startswith("GPU"):
        monkeypatch.setattr(cross_entropy, "nll_and_gradient_", cross_entropy._all_rows_at_once_)
    monkeypatch.setattr(cross_entropy, "CACHED", 4 * 31)  # 4 rows of 17
    monkeypatch.setattr(cross_entropy, "COLUMNS", 10)  # of 31
    monkeypatch.setattr(cross_entropy, "WIDE_HEAD", 0 if request.param.endswith("wide head") else 2**14)
    return FusedNextTokenLoss


fused_ways = pytest.mark.parametrize("make_loss", FUSED, indirect=True)


def loss_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [4, 8, 12], weight [31, 12] and targets with 17 positions to learn, a row without any among them."""
    targets = torch.randint(0, 31, (3, 8), generator=torch.Generator().manual_seed(5))
    targets[0, :4] = targets[0, -1] = targets[2, :2] = IGNORE
    targets = torch.cat((targets, torch.full((1, 8), IGNORE)))
    assert int((targets != IGNORE).sum()) == N_TARGETS
    return random(4, 8, 12, dtype=dtype), random(31, 12, seed=1, dtype=dtype), targets


def test_the_module_is_the_function() -> None:
    hidden, weight, targets = loss_inputs(torch.float64)
    assert torch.equal(NextTokenLoss(5)(hidden, weight, targets), next_token_loss(hidden, weight, targets, 5))
    assert torch.equal(NextTokenLoss()(hidden, weight, targets), next_token_loss(hidden, weight, targets))


@both_dtypes
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 17, 18, 2_048])
def test_loss(make_loss: Maker, dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, targets = loss_inputs(dtype)
    loss = make_loss(chunk)
    nll_sum = loss(hidden, weight, targets)
    assert nll_sum.dtype == dtype
    assert nll_sum.shape == ()
    slow_sum, slow_count = reference.cross_entropy(hidden, weight, targets)
    assert slow_count == N_TARGETS
    check_twins(
        lambda: loss(hidden, weight, targets),
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        TOLERANCE[dtype],
    )
    # The same by PyTorch's own, which knows nothing of our twin.
    theirs = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert nll_sum.item() == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])
    assert slow_sum.item() == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])


@both_dtypes
def test_loss_where_every_position_has_a_target(make_loss: Maker, dtype: torch.dtype) -> None:
    hidden, weight, targets = loss_inputs(dtype)
    targets = targets.clamp(min=0)
    check_twins(
        lambda: make_loss(5)(hidden, weight, targets),
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("chunk", [4, 2_048])
def test_loss_passes_gradcheck(make_loss: Maker, chunk: int) -> None:
    hidden, weight, targets = loss_inputs(torch.float64)
    loss = make_loss(chunk)
    assert torch.autograd.gradcheck(lambda h, w: loss(h, w, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: loss(h, weight.detach(), targets), (hidden,))
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w, targets), (weight,))


@both_dtypes
def test_loss_of_a_vocabulary_whose_rows_are_whole_pages(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 numbers of 4 or 8 bytes: the gradient's rows are made longer, and the result is not."""
    monkeypatch.setattr(cross_entropy, "WIDE_HEAD", 1_024)
    hidden, _, targets = loss_inputs(dtype)
    weight = random(1_024, 12, seed=1, dtype=dtype)
    check_twins(
        lambda: FusedNextTokenLoss()(hidden, weight, targets),
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        TOLERANCE[dtype],
    )


def test_a_wide_head_is_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "WIDE_HEAD", 31)
    assert cross_entropy._pays_to_transpose(torch.zeros(31, 2))
    assert not cross_entropy._pays_to_transpose(torch.zeros(30, 2))
    assert not cross_entropy._pays_to_transpose(torch.zeros(31, 2, device="meta"))


@pytest.mark.parametrize(("rows", "columns"), [(2_500, 3), (3, 2_500), (1_000, 1_000)])
def test_a_matrix_is_transposed_in_pieces(rows: int, columns: int) -> None:
    matrix = random(rows, columns).detach()
    transposed = cross_entropy._transpose(matrix, torch.float32)
    assert transposed.is_contiguous()
    assert torch.equal(transposed, matrix.float().T)


@both_dtypes
def test_loss_from_the_targets_probability_or_from_the_largest_is_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = loss_inputs(dtype)
    usual = FusedNextTokenLoss()(hidden, weight, targets)
    monkeypatch.setattr(cross_entropy, "SMALLEST", 2.0)  # no probability is larger: each is taken for too small
    careful = FusedNextTokenLoss()(hidden, weight, targets)
    assert careful.item() == pytest.approx(usual.item(), rel=TOLERANCE[dtype])


def test_loss_of_huge_logits_is_exact(make_loss: Maker) -> None:
    """Logits of thousands: without subtracting the largest, the exponentials would overflow."""
    hidden, weight, targets = loss_inputs(torch.float32)
    hidden = (1e4 * hidden).detach().requires_grad_()
    check_twins(
        lambda: make_loss(3)(hidden, weight, targets),
        lambda: reference.cross_entropy(hidden, weight, targets)[0],
        [hidden, weight],
        1e-5,
    )


@pytest.mark.parametrize("nll", [60.0, 80.0, 95.0, 100.0, 110.0])
def test_loss_of_a_target_whose_probability_float32_hardly_holds(make_loss: Maker, nll: float) -> None:
    """e^-80 has all its digits, e^-95 has a few, e^-110 is 0: the loss has all its digits in each case."""
    hidden, targets = torch.eye(2)[None], torch.tensor([[0, 1]])
    weight = torch.tensor([[0.0, 0.0], [nll, 0.0], [0.0, 0.0]])  # logits [0, nll, 0] and [0, 0, 0]
    found = make_loss()(hidden, weight, targets)
    exact = reference.cross_entropy(hidden.double(), weight.double(), targets)[0]
    assert found.item() == pytest.approx(exact.item(), rel=1e-7)


def test_loss_without_targets_is_zero_and_moves_nothing(make_loss: Maker) -> None:
    hidden, weight, targets = loss_inputs(torch.float64)
    nll_sum = make_loss()(hidden, weight, torch.full_like(targets, IGNORE))
    nll_sum.backward()
    assert nll_sum.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_loss_of_ignored_positions_has_no_gradient_at_all(make_loss: Maker) -> None:
    hidden, weight, targets = loss_inputs(torch.float64)
    make_loss(4)(hidden, weight, targets).backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(-1) == 0, targets == IGNORE)


@pytest.mark.parametrize("target", [-1, 31])
def test_a_target_outside_the_vocabulary_is_refused(make_loss: Maker, target: int) -> None:
    hidden, weight, targets = loss_inputs(torch.float32)
    targets[1, 3] = target
    with pytest.raises(InputError, match=f"token id {target} is outside the model's vocabulary of 31"):
        make_loss()(hidden, weight, targets)


@pytest.mark.parametrize("chunk", [5, 2_048])
def test_loss_with_a_tied_weight_collects_both_uses(make_loss: Maker, chunk: int) -> None:
    """The embedding's gradient is the sum of what comes through the head and what comes through the stream."""
    model = small_model(dtype=torch.float64, tie_word_embeddings=True)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    targets = tokens.roll(-1, 1)
    weight = model.embed_tokens.weight

    def gradient(hidden: Tensor, head: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(make_loss(chunk)(hidden, head, targets), weight)
        return gradient

    both = gradient(model.hidden(tokens), model.head_weight)
    as_input = gradient(model.hidden(tokens), weight.detach())
    as_head = gradient(model.hidden(tokens).detach(), weight)
    assert float(as_input.norm()) > 0.01 * float(both.norm())
    assert float(as_head.norm()) > 0.01 * float(both.norm())
    assert difference(both, as_input + as_head) < 1e-12
    logits = model(tokens)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), weight)
    assert difference(both, plain) < 1e-12


def test_loss_under_autocast_multiplies_in_bfloat16_and_sums_in_float32(make_loss: Maker) -> None:
    hidden, weight, targets = loss_inputs(torch.float32)
    exact = reference.cross_entropy(hidden, weight, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll_sum = make_loss(5)(hidden, weight, targets)
    rounded = reference.cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), targets)[0]
    assert nll_sum.dtype == torch.float32
    assert abs(nll_sum.item() / exact.item() - 1) > 1e-5  # bfloat16 was used …
    assert nll_sum.item() == pytest.approx(rounded.item(), rel=5e-3)
    ours = torch.autograd.grad(nll_sum, [hidden, weight])
    for our, slow in zip(ours, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        assert our.dtype == torch.float32
        assert 1e-4 < difference(our, slow) < 2e-2  # … and costs what bfloat16's 8 bits cost, not more


def test_loss_of_a_model_in_bfloat16(make_loss: Maker) -> None:
    """Without autocast: products in bfloat16, the sum in float32, gradients in the dtypes of their inputs."""
    hidden, weight, targets = loss_inputs(torch.bfloat16)
    nll_sum = make_loss(5)(hidden, weight, targets)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = reference.cross_entropy(*wide, targets)[0]
    assert nll_sum.dtype == torch.float32
    assert apart(nll_sum, exact) < 5e-3
    ours = torch.autograd.grad(nll_sum, [hidden, weight])
    for our, slow in zip(ours, torch.autograd.grad(exact, wide), strict=True):
        assert our.dtype == torch.bfloat16
        assert apart(our, slow) < 2e-2


def test_loss_is_the_same_to_the_bit_where_nothing_is_trained(make_loss: Maker) -> None:
    hidden, weight, targets = loss_inputs(torch.float32)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            trained = make_loss(5)(hidden, weight, targets)
            with torch.no_grad():
                seen = make_loss(5)(hidden, weight, targets)
        assert torch.equal(seen, trained)


@pytest.mark.parametrize("autocast", [False, True])
@fused_ways
def test_the_detail_is_that_of_the_loss_to_the_bit(make_loss: Maker, autocast: bool) -> None:
    """Logits, losses and gradients of each position, in reading order, as `loss.nll_and_gradient` has them."""
    hidden, weight, targets = loss_inputs(torch.float32)
    loss = make_loss(5)
    assert isinstance(loss, FusedNextTokenLoss)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chunks = [tuple(map(torch.clone, chunk)) for chunk in loss.in_detail(hidden, weight, targets)]
        nll_sum = loss(hidden, weight, targets)
    assert [len(nll) for _, nll, _ in chunks] == [5, 5, 5, 2]
    logits, nll, gradient = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert logits.shape == gradient.shape == (N_TARGETS, 31)
    assert logits.dtype == gradient.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(nll.sum(), nll_sum.detach())
    learned = targets != IGNORE
    exact_nll, exact_gradient = nll_and_gradient(logits.double(), targets[learned])
    assert apart(nll, exact_nll) < 1e-6
    assert apart(gradient, exact_gradient) < (5e-3 if autocast else 1e-6)
    assert apart(logits, hidden[learned] @ weight.T) < (1e-2 if autocast else 1e-6)


class _Products(TorchDispatchMode):
    """Keep the shapes of the matrix products that are really made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needed", "expected"), [("both", 3), ("hidden", 2), ("weight", 2), ("nothing", 1)])
def test_loss_multiplies_only_what_is_needed(needed: str, expected: int) -> None:
    """One product for the logits, one for each gradient that is asked for; an evaluation asks for none."""
    hidden, weight, targets = loss_inputs(torch.float32)
    hidden.requires_grad_(needed in ("both", "hidden"))
    with torch.set_grad_enabled(needed != "nothing"), _Products() as made:
        FusedNextTokenLoss()(hidden, weight if needed != "hidden" else weight.detach(), targets)
    assert len(made.shapes) == expected


@pytest.mark.parametrize("chunk", [48, 1_024])
def test_in_bfloat16_a_cpu_takes_positions_in_multiples(chunk: int) -> None:
    """17 positions are computed as 64; in float32 as they are. Zeros change no gradient and no sum."""
    hidden, weight, targets = loss_inputs(torch.float32)
    expected = {48: [(48, 12, 31), (16, 12, 31)], 1_024: [(64, 12, 31)]}[chunk]
    with torch.no_grad(), _Products() as made, torch.autocast("cpu", torch.bfloat16):
        FusedNextTokenLoss(chunk)(hidden, weight, targets)
    assert made.shapes == expected
    with torch.no_grad(), _Products() as made:
        FusedNextTokenLoss(chunk)(hidden, weight, targets)
    assert made.shapes == [(17, 12, 31)]
    with torch.autocast("cpu", torch.bfloat16):
        found = FusedNextTokenLoss(chunk)(hidden, weight, targets)
        plain = NextTokenLoss(chunk)(hidden, weight, targets)
    assert difference(found, plain) < 1e-5
    for one, other in zip(*(torch.autograd.grad(value, [hidden, weight]) for value in (found, plain)), strict=True):
        assert difference(one, other) < 1e-2
