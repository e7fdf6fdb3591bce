"""What tests of twins share: two ways to the same numbers are compared in value and in gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minift.config import RopeScaling

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES: dict[str, dict[str, object]] = {  # what models can differ in, for `small_model`
    "shared heads": {"num_key_value_heads": 2},
    "wide heads, tied": {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Llama 3's RoPE": {
        "rope_scaling": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        )
    },
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers, the same in every dtype up to rounding: a leaf that gets a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the expected one's. Both must have one shape and dtype."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float(expected.norm()) > 0
    return float((found - expected).norm() / expected.norm())


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the same of tensors of any dtypes, computed in float64."""
    return difference(found.detach().double(), expected.detach().double())


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
