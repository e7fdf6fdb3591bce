"""The plain formulas compute what their slow, obvious twins in `minift/reference.py` compute, in value and in gradient.

Held here in float64, where two ways to the same number must agree to ten digits or more, and in float32:
RMSNorm, RoPE, attention (every head layout, with and without documents), the SwiGLU network, clipping, AdamW, the
learning-rate schedule at its edges, and the probabilities with which `sample` chooses. The loss, plain and fused, is
in `kernels/test_cross_entropy.py`; `reference.greedy` is in `way/test_cache_equals_full.py`. What is faster than the
plain formulas is held against them in `kernels/`.

RMSNorm and RoPE's tables are float32 by contract, whatever the model's dtype; against a float64 formula they are
therefore held to float32's digits, and `RoPE` is given float64 tables.
"""

import math
import sys

import pytest
import torch
from torch import Tensor

from minift import reference
from minift.config import LlamaConfig, RopeScaling, TrainConfig
from minift.generate import Sampling, sample
from minift.model import MLP, Attention, Prepare, RMSNorm, RoPE, Shared, rope_frequencies, rope_tables
from minift.optim import learning_rate, make_optimizer
from tests.helpers import completed, small_model
from tests.twins import TOLERANCE, check_twins, difference, random

both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


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
    """As with adapters: the gradient at x is the same."""
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
    check_twins(lambda: RoPE()(x, cos, sin), lambda: reference.rope(x, positions, theta), [x], TOLERANCE[dtype])


def test_what_a_compiler_makes_of_rms_norm_and_rope() -> None:
    """A compiled run keeps them plain. (Compiled as by default, but without the last stage, the C++ compiler.)"""
    norm, x = RMSNorm(24, 1e-5), random(2, 3, 9, 24, dtype=torch.float32)
    norm.weight.data = random(24, seed=1, dtype=torch.float32).detach()
    positions = torch.arange(9)[None]
    cos, sin = rope_tables(positions, 24, 10_000.0)
    rms_norm, rope = (torch.compile(module, backend="aot_eager") for module in (norm, RoPE()))
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
        "import torch; from minift.model import rope_tables; places = torch.arange(64).repeat(11, 1)\n"
        "first, second = (torch.stack(rope_tables(places, 32, 1e4)) for _ in range(2))\n"
        "assert torch.equal(first, second), (first - second).abs().max()"
    )
    for _ in range(3):
        completed([sys.executable, "-c", code], check=True)


def test_rope_knows_distances_only_and_keeps_lengths() -> None:
    query, key = random(1, 1, 1, 16).detach(), random(1, 1, 1, 16, seed=1).detach()

    def rotated(x: Tensor, position: int) -> Tensor:
        return RoPE()(x, *exact_tables(torch.tensor([[position]]), 16, 10_000.0))

    near, far = rotated(query, 7) * rotated(key, 3), rotated(query, 1_007) * rotated(key, 1_003)
    assert float(near.sum()) == pytest.approx(float(far.sum()), rel=1e-9)
    assert float(near.sum()) != pytest.approx(float((rotated(query, 7) * rotated(key, 4)).sum()), rel=1e-3)
    assert float(rotated(query, 1_007).norm()) == pytest.approx(float(query.norm()), rel=1e-12)


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
    shared = Shared(cos, sin, Prepare(config).mask(x[..., 0], 0, documents, None), None)

    def slow() -> Tensor:
        def split(projection: torch.nn.Linear) -> Tensor:
            return (x @ projection.weight.T).view(B, T, -1, width).transpose(1, 2)

        query = reference.rope(split(attention.q_proj), positions, config.rope_theta)
        key = reference.rope(split(attention.k_proj), positions, config.rope_theta)
        mixed = reference.attention(query, key, split(attention.v_proj), documents)  # [B, H, T, C]
        joined = torch.cat([mixed[:, h] for h in range(heads)], dim=-1)  # [B, T, H * C]
        return joined @ attention.o_proj.weight.T

    leaves = [x, *attention.parameters()]
    check_twins(lambda: attention(x, shared), slow, leaves, TOLERANCE[dtype])


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
    for parameter, gradient, right in zip(parameters, gradients, expected, strict=True):
        assert parameter.grad is not None
        assert difference(parameter.grad, right) < tol
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
        moved, expected = parameter.detach() - start[name].detach(), slow[name][0] - start[name].detach()
        assert difference(moved, expected) < 20 * TOLERANCE[dtype], name


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
    assert learning_rate(warmup, total, config) == pytest.approx(0.02)  # the peak, right after the warm-up
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
def test_schedule_after_the_warmup_is_that_of_transformers(schedule: str, warmup: int, min_lr: float) -> None:
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
