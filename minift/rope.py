"""Rotary positions: a token's query and key are turned by an angle that grows with its place.

What a query has in common with a key then depends on how far they are apart, not on where they are: turned by a and b
radians, two vectors have the dot product of one of them turned by a − b. Channels are turned in pairs, each pair at a
speed of its own, so that near and far can be told apart.

Legend: B batch, T tokens, H heads, C head width. Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.2. The
slow twin, by complex numbers, is `reference.rope`. Read next: `cache.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from minift.config import RopeScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """By how many radians each pair of channels turns from one position to the next, float32 [C/2].

    Pair i turns by theta^(-2i/C): fast for the first pairs, slow for the last. Source: Su et al., "RoFormer" (arXiv
    2104.09864), section 3.2.

    With `scaling`, as Llama 3.1 has it: a pair that makes more than `high_freq_factor` turns within the original
    positions is left alone, one that makes fewer than `low_freq_factor` is slowed down by `factor`, and between the two
    the share that is left alone rises from 0 to 1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which RoPE turns each pair of channels, in float32.

    Args:
        positions: int64 [B, T] or [1, T].

    Returns:
        cos, sin: float32 [B, 1, T, C], the 1 for the heads. Both halves of C hold the same angles.
    """
    frequencies = rope_frequencies(head_dim, theta, scaling, positions.device)  # [C/2]
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, C/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, C]
    if angles.device.type == "cpu":
        # MKL sets itself up at its first cosine. Where two threads meet there, as they do over a large tensor, half of
        # the cosines are off by 1e-4, in 4 of 55 processes on an Intel Xeon. A single number is one thread's.
        angles.new_zeros(1).cos()
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle. The half-split layout: channel i is paired with i + C/2.

        (a, b) → (a cos − b sin, b cos + a sin)      for a = x[…, :C/2], b = x[…, C/2:]

    (Meta's own files pair neighbours, 2i with 2i + 1; `convert` permutes the weights between the two.)

    Args:
        x: [B, H, T, C]; cos, sin: [B, 1, T, C].
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RoPE.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class _RoPE(torch.autograd.Function):
    """RoPE with its backward pass written out: the gradient is turned by the same angles the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` of many tokens in half the time, to the bit what its formula gives.

    Products and sums are rounded apart, as there. Fused (`addcmul_`), it takes a fifth less and has other last digits.
    """
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    turned = wide * cos
    a, b = wide.chunk(2, dim=-1)
    turned_a, turned_b = turned.chunk(2, dim=-1)
    sin = sin[..., : a.shape[-1]]
    turned_a.sub_(b * sin)
    turned_b.add_(a * sin)
    return turned.to(x.dtype)
