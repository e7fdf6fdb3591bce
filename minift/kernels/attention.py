"""Attention of a CPU in bfloat16, and of a single new token.

Plain twin: `model.ScaledDotProduct`. Taken on a CPU; it falls back to its twin where that is as fast. Of one new token,
the query heads that share a key are taken as its queries, so that each key is read once. In training in bfloat16 on a
CPU, PyTorch's backward kernel is slow for short rows; there its float32 kernel is called (up to 7 times as fast), or,
if a compiler makes the code, matrix products (1.2 times, rows of 640 tokens).

    python -m benchmarks attention       # every kernel against the formula
    python -m benchmarks ladder          # the rung "attention"

Legend: B batch, T tokens of the input, S tokens that can be attended to, H query heads, K key/value heads, R = H / K,
C head width.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model import ScaledDotProduct

# Training in bfloat16 on a CPU, on two cores of an Intel Xeon (`python -m benchmarks attention`).
UPCAST_ROW = (
    2**14
)  # T · C: in longer rows the backward pass is faster in bfloat16 (C = 64: 0.9 x at T = 512, 0.7 at 1,024)
COMPILED_ROW = (
    640  # T: up to here compiled products beat a kernel (0.8 of its time at 640, 1.2 to 1.6 times it at 1,024)
)
ROWS = 128  # queries whose weights a compiled model computes at the same time


class FastScaledDotProduct(ScaledDotProduct):
    """`ScaledDotProduct`, with other ways for one new token, and for training in bfloat16 on a CPU."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, T, C] and twice [B, K, S, C] → [B, H, T, C], in value's dtype. mask: as for the twin."""
        T, C = query.shape[2:]
        if T == 1:
            return of_one_token(query, key, value, mask)
        if value.dtype == torch.bfloat16 and value.device.type == "cpu" and torch.is_grad_enabled():
            if torch.compiler.is_compiling() and mask is None and T <= COMPILED_ROW:
                return cast(Tensor, _Products.apply(query, key, value))
            if T * C <= UPCAST_ROW and has_cpu_kernels():
                return cast(Tensor, _Upcast.apply(query, key, value, mask))
        return super().forward(query, key, value, mask)


def of_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of one token, [B, H, 1, C]: each key is read once, not once for each head that shares it."""
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # [B, K, R, C]
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).reshape(query.shape)


def has_cpu_kernels() -> bool:
    """Return whether this version of PyTorch has the two kernels that `_Upcast` calls; they are not public."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return hasattr(torch.ops.aten, name) and hasattr(torch.ops.aten, f"{name}_backward")


class _Upcast(torch.autograd.Function):
    """Attention of short rows in bfloat16 on a CPU, with the backward pass in float32.

    PyTorch's backward kernel takes up to 7 times as long in bfloat16 as in float32 (rows of 64 tokens), its forward
    kernel half as long. So what is kept between the two is bfloat16, and upcast when it is needed. The kernels are
    those that `scaled_dot_product_attention` calls; they are not public.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:  # as numbers that are added to q·kᵀ
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        mixed, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask
        )
        ctx.save_for_backward(query, key, value, mixed, log_total, mask)
        return cast(Tensor, mixed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *tensors, log_total, mask = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_mixed.float(), *(x.float() for x in tensors), log_total, 0.0, mask is None, attn_mask=mask
        )
        query, key, value = (grad.to(grad_mixed.dtype) for grad in grads)
        return query, key, value, None


class _Products(torch.autograd.Function):
    """Causal attention as matrix products, between which a compiler makes one loop: faster for short rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed, log_total = _attention(query, key, value)
        ctx.save_for_backward(query, key, value, mixed, log_total)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _attention_gradients(grad_mixed, *ctx.saved_tensors)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention, ROWS queries at a time, and the logarithm of the softmax's denominator.

    Args:
        query: [B, H, T, C]; key, value: [B, K, T, C].

    Returns:
        mixed: [B, H, T, C], in their dtype, laid out as [B, T, H, C], as the next product reads it.
        log_total: float32 [B, H, T], the logarithm of each query's sum of exponentials.
    """
    (B, H, T, C), K = query.shape, key.shape[1]
    query = query.view(B, K, H // K, T, C)
    mixed, log_total = [], []
    for here in _blocks(T):
        scores = _scores(query[:, :, :, here], key[:, :, : here.stop], here)  # [B, K, R, n, S]
        largest = scores.amax(-1, keepdim=True)
        exponentials = (scores - largest).exp()
        total = exponentials.sum(-1, keepdim=True)
        p = (exponentials / total).to(value.dtype)
        part = p.flatten(2, 3) @ value[:, :, : here.stop]  # [B, K, R * n, C]
        mixed.append(part.view(B, K, H // K, -1, C).permute(0, 3, 1, 2, 4))  # [B, n, K, R, C]
        log_total.append((largest + total.log())[..., 0])
    return torch.cat(mixed, 1).view(B, T, H, C).transpose(1, 2), torch.cat(log_total, 3).view(B, H, T)


def _attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of causal attention: matrix products, and between them what a compiler makes one loop of.

    With the scores s = q·kᵀ / √C and the weights p = exp(s − log_total):

        ∂p = ∂mixed · vᵀ        ∂s = p ∘ (∂p − Σ ∂mixed ∘ mixed)        ∂v = pᵀ · ∂mixed
        ∂q = ∂s · k / √C        ∂k = ∂sᵀ · q / √C

    It takes ROWS queries at a time, so that the weights of all T² pairs never exist. Source: Dao et al.,
    "FlashAttention" (arXiv 2205.14135), appendix B.

    Args:
        grad: [B, H, T, C], at `mixed`; the others as `_attention` takes and returns them.

    Returns:
        The gradients at query, key and value, in their dtype.
    """
    (B, H, T, C), K, dtype = query.shape, key.shape[1], query.dtype
    R = H // K  # query heads that share a key/value head: their queries are taken together, [B, K, R * n, C]
    expected = (grad.float() * mixed.float()).sum(-1).view(B, K, R, T, 1)  # the mean of ∂p under p
    log_total = log_total.view(B, K, R, T, 1)
    query, grad = query.view(B, K, R, T, C), grad.view(B, K, R, T, C)
    grad_query = []
    grad_key = torch.zeros(B, K, T, C)
    grad_value = torch.zeros(B, K, T, C)
    for here in _blocks(T):
        seen = slice(here.stop)
        q, g = (x[:, :, :, here].reshape(B, K, -1, C) for x in (query, grad))
        k, v = key[:, :, seen], value[:, :, seen]
        p = (_scores(query[:, :, :, here], k, here) - log_total[:, :, :, here]).exp()
        grad_p = (g @ v.mT).float().view(p.shape)
        grad_scores = p * (grad_p - expected[:, :, :, here]) / math.sqrt(C)
        p, grad_scores = (x.to(dtype).flatten(2, 3) for x in (p, grad_scores))
        grad_query.append((grad_scores @ k).view(B, K, R, -1, C))
        grad_key[:, :, seen] += grad_scores.mT @ q
        grad_value[:, :, seen] += p.mT @ g
    return torch.cat(grad_query, 3).view(B, H, T, C), grad_key.to(dtype), grad_value.to(dtype)


def _blocks(T: int) -> Iterator[slice]:
    """Yield ROWS queries at a time. They look at no key after the last of them."""
    for start in range(0, T, ROWS):
        yield slice(start, min(start + ROWS, T))


def _scores(query: Tensor, key: Tensor, here: slice) -> Tensor:
    """Return q·kᵀ / √C, float32, −inf where attention may not look.

    Args:
        query: [B, K, R, n, C], the queries at the places `here`.
        key: [B, K, S, C], the first S keys.

    Returns:
        [B, K, R, n, S].
    """
    (B, K, R, n, C), S = query.shape, key.shape[2]
    scores = (query.reshape(B, K, R * n, C) @ key.mT).float().view(B, K, R, n, S) / math.sqrt(C)
    visible = torch.arange(S) <= torch.arange(here.start, here.stop)[:, None]
    return scores.masked_fill(~visible, -math.inf)
