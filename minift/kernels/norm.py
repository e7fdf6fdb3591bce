"""RMSNorm and RoPE with their backward passes written out.

Plain twins: `model.RMSNorm` and `model.RoPE`. Taken wherever nothing is compiled; a compiler is given the plain
formulas, and writes both passes better. Autograd takes a formula one operation at a time and keeps what each has read;
here a norm keeps two tensors. On a GPU both passes of a norm begin with PyTorch's own fused kernel, where it is there.
A layer's norms give the dtype of the matrix products that read them, so that autocast need not cast again for each
product.

    python -m benchmarks ladder          # the rung "norm"
    python -m benchmarks ops --only norm rope

Legend: B batch, T tokens, D model width, C head width.
"""

from typing import Any

import torch
from torch import Tensor

from minift.model import RMSNorm, RoPE


class FusedRMSNorm(RMSNorm):
    """`RMSNorm` for eager training."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D]."""
        return self.normalised(x, torch.promote_types(x.dtype, self.weight.dtype))

    def normalised(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the result in the given dtype."""
        if torch.is_grad_enabled():
            result: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)
            return result
        return (self.weight * normalise(x, self.eps)[0]).to(dtype)


class FusedInputNorm(FusedRMSNorm):
    """A norm whose result only matrix products read: autocast would cast it once for each of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D], in autocast's dtype if that is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return self.normalised(x, torch.get_autocast_dtype(device))
        return super().forward(x)


class FusedRoPE(RoPE):
    """`RoPE` in half the time, bit for bit."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, heads, T, C] → the same shape and dtype. cos, sin: float32 [B, 1, T, C]."""
        if torch.is_grad_enabled():
            rotated: Tensor = _RoPE.apply(x, cos, sin)
            return rotated
        return super().forward(x, cos, sin)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x · scale, in x's dtype, and scale = 1 / sqrt(mean(x²) + eps), float32 […, 1]."""
    if x.device.type == "cuda" and x.dtype != torch.float64 and hasattr(torch.ops.aten, "_fused_rms_norm"):
        fused: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
        return fused  # one kernel in place of six; not public
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMSNorm, whose backward pass reads n and scale.

    For n = x · scale (see `normalise`) and the gradient g at n · weight:

        ∂weight = Σ g ∘ n        ∂x = scale · (g ∘ weight − n · mean(g ∘ weight ∘ n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        n, scale = normalise(x, eps)
        ctx.save_for_backward(n, scale, weight)
        return (weight * n).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        n, scale, weight = ctx.saved_tensors
        grad = grad.to(torch.promote_types(n.dtype, weight.dtype))
        grad_weight = (grad * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = (grad * weight).to(scale.dtype)
        mean = (grad * n).mean(-1, keepdim=True)
        grad = torch.addcmul(grad, n, mean, value=-1).mul_(scale)
        return grad.to(n.dtype), grad_weight, None, None


class _RoPE(torch.autograd.Function):
    """RoPE, whose backward pass rotates the gradient by the same angles in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `RoPE`'s result, to the bit: products and sums are rounded separately, as in its formula.

    (Fused by `addcmul_` it would take a fifth less, and have other last digits.)
    """
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    rotated = wide * cos
    a, b = wide.chunk(2, dim=-1)
    rotated_a, rotated_b = rotated.chunk(2, dim=-1)
    sin = sin[..., : a.shape[-1]]
    rotated_a.sub_(b * sin)
    rotated_b.add_(a * sin)
    return rotated.to(x.dtype)
