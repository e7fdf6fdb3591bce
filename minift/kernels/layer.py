"""A decoder layer with both its passes written out: what trains on a CPU in bfloat16, where small operations are dear.

Autograd takes a layer one operation at a time, keeps what each has read, and makes a new tensor for all of them. A
finetuning step of a small model is then thousands of operations of some 30 µs, of which the matrix products take a
quarter. Written out there are half as many:

* q, k and v are one product, and gate and up are another: backward two products each, in place of six and four.
* Channels that RoPE turns together, i and i + C/2, are put side by side, by the order of the weight's rows. So a pair
  is one complex number, and turning it is one product. Attention adds up over the channels in whatever order.
* √C divides q·kᵀ: its root, in RoPE's table, divides q and k.
* Rows are short, so the weights of attention, [T, T], are kept: three operations forward, six backward.
* What nobody reads again is overwritten.

The numbers are those of `model.DecoderLayer`, its twin, to rounding. They are held together by

    python -m pytest tests/kernels/test_written_layer.py

Legend: b rows of a batch, T tokens of a row, N = b · T, D model width, H query heads, K key/value heads, R = H / K, C
head width, F feed-forward width. Read next: `loss.py`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.config import LlamaConfig


class Weights(NamedTuple):
    """A layer's parameters, in the model's order."""

    input_norm: Tensor  # [D]
    query: Tensor  # [H · C, D]
    key: Tensor  # [K · C, D]
    value: Tensor  # [K · C, D]
    output: Tensor  # [D, H · C]
    post_norm: Tensor  # [D]
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class Shared(NamedTuple):
    """What all layers of a forward pass read."""

    table: Tensor  # complex [b or 1, T, 1, C/2]: by what RoPE multiplies a pair, over the fourth root of C
    mask: Tensor  # [b · K or 1, R · T, T], added to the scores: −inf where nobody may look
    dtype: torch.dtype  # of the products
    eps: float  # of the norms


def share(config: LlamaConfig, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Shared:
    """What the layers of a forward pass read, under its autocast.

    Args:
        cos, sin: [b or 1, 1, T, C], of `rope.rope_tables`.
        mask: bool [b, 1, T, T], True where attention may go; None: plain causal.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else cos.dtype
    K, R, T = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, cos.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril_()
        K = 1  # the same one for all
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)  # [b or 1, 1, T, T]
    added = added[:, :, None].expand(-1, K, R, -1, -1).reshape(-1, R * T, T)
    half = slice(config.head_dim // 2)  # the two halves of cos and sin hold the same angles
    table = torch.complex(cos[..., half], sin[..., half]).transpose(1, 2) * config.head_dim**-0.25
    return Shared(table, added, dtype, config.rms_norm_eps)


def written_layer(x: Tensor, shared: Shared, wanted: Tensor | None, weights: Weights) -> Tensor:
    """What `model.DecoderLayer` computes.

    Args:
        x: [b, T, D].
        wanted: int64 [n], places in the flattened batch; None: all.

    Returns:
        [b, T, D], or [n, D] of the wanted places.
    """
    w = weights
    with torch.autocast("cpu", enabled=False):
        # Two functions, so that what the MLP has kept is gone when the gradients of attention are computed.
        stream: Tensor = _Attention.apply(x, shared, w.input_norm, w.query, w.key, w.value, w.output)
        if wanted is not None:
            stream = stream.flatten(0, 1).index_select(0, wanted)
        out: Tensor = _MLP.apply(stream, shared, w.post_norm, w.gate, w.up, w.down)
    return out


class _Attention(torch.autograd.Function):
    """x + o(attention(norm(x)))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shared: Shared, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor
    ) -> Tensor:
        (b, T, D), C, dtype = x.shape, 2 * shared.table.shape[-1], shared.dtype
        H, K = len(q) // C, len(k) // C
        matrix, output = _qkv(q, k, v, C, dtype), o.to(dtype)
        x = x.reshape(b * T, D)
        normalised, scale, read = _norm(x, norm, shared.eps, dtype)
        qkv = (read @ matrix.T).view(b, T, H + 2 * K, C)
        turned = _turned(qkv[:, :, : H + K].to(x.dtype), shared.table)
        query = _heads_first(turned[:, :, :H], K, dtype)  # [b · K, R · T, C]
        key = _heads_first(turned[:, :, H:], K, dtype)  # [b · K, T, C]
        value = _heads_first(qkv[:, :, H + K :], K, dtype)  # [b · K, T, C]
        p = torch.softmax(torch.baddbmm(shared.mask, query, key.mT), -1)  # [b · K, R · T, T]
        mixed = (p @ value).view(b, H, T, C).transpose(1, 2).reshape(b * T, H * C)
        kept = normalised, scale, read, query, key, value, p, mixed
        ctx.save_for_backward(shared.table, norm, matrix, output, *kept)
        return (mixed @ output.T).add(x).view(b, T, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, norm, matrix, output, normalised, scale, read, query, key, value, p, mixed = ctx.saved_tensors
        (b, T, D), C = grad.shape, query.shape[-1]
        H, K, dtype = output.shape[1] // C, len(key) // b, read.dtype
        grad = grad.reshape(b * T, D)  # which others may read
        narrow = grad.to(dtype)
        of_output = narrow.T @ mixed
        of_mixed = _heads_first((narrow @ output).view(b, T, H, C), K, dtype)  # [b · K, R · T, C]
        of_value = p.mT @ of_mixed
        of_scores = torch._softmax_backward_data(of_mixed @ value.mT, p, -1, dtype)
        turned = grad.new_empty(b, T, H + K, C)
        turned[:, :, :H] = (of_scores @ key).view(b, H, T, C).transpose(1, 2)
        turned[:, :, H:] = (of_scores.mT @ query).view(b, K, T, C).transpose(1, 2)
        del of_scores  # the largest there is
        of_qkv = read.new_empty(b, T, H + 2 * K, C)
        of_qkv[:, :, : H + K] = _turned(turned, table.conj())  # the other way round
        of_qkv[:, :, H + K :] = of_value.view(b, K, T, C).transpose(1, 2)
        of_qkv = of_qkv.view(b * T, -1)
        of_x, of_norm = _norm_gradients(grad, of_qkv @ matrix, normalised, scale, norm)
        of_weights = _qkv_gradients(of_qkv.T @ read, H * C, C, norm.dtype)
        return of_x.view(b, T, D), None, of_norm, *of_weights, of_output.to(norm.dtype)


class _MLP(torch.autograd.Function):
    """x + down(silu(gate) · up) of norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: Shared, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        wide, (ff, D) = x.reshape(-1, x.shape[-1]), gate.shape
        matrix, down = gate.new_empty(2 * ff, D, dtype=shared.dtype), down.to(shared.dtype)
        matrix[:ff], matrix[ff:] = gate, up
        normalised, scale, read = _norm(wide, norm, shared.eps, shared.dtype)
        both = read @ matrix.T  # [N, 2F]
        activated = F.silu(both[:, :ff])
        product = activated * both[:, ff:]
        ctx.save_for_backward(norm, matrix, down, normalised, scale, read, both, activated, product)
        return (product @ down.T).add(wide).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm, matrix, down, normalised, scale, read, both, activated, product = ctx.saved_tensors
        wide = grad.reshape(-1, grad.shape[-1])  # which others may read
        narrow = wide.to(read.dtype)
        of_down = narrow.T @ product
        of_product, of_both = narrow @ down, torch.empty_like(both)
        (gate, up), (of_gate, of_up) = both.chunk(2, -1), of_both.chunk(2, -1)
        torch.mul(of_product, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate)
        del narrow, of_product  # before the next ones come
        of_x, of_norm = _norm_gradients(wide, of_both @ matrix, normalised, scale, norm)
        of_weights = (of_both.T @ read).to(norm.dtype).chunk(2)
        return of_x.view(grad.shape), None, of_norm, *of_weights, of_down.to(norm.dtype)


# ----------------------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """n = x · scale, scale = 1 / sqrt(mean(x²) + eps), and n · weight in the dtype of the matrices. See `RMSNorm`."""
    normalised = x.square()
    scale = normalised.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(x, scale, out=normalised)
    return normalised, scale, (weight * normalised).to(dtype)


def _norm_gradients(
    total: Tensor, grad: Tensor, normalised: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`total` and the gradient at x, from `grad` at n · weight; and the gradient at the weight.

    With g = grad, n = normalised:  ∂weight = Σ g ∘ n        ∂x = scale · (g ∘ weight − n · (g ∘ n)·weight / D)
    """
    grad = grad.to(normalised.dtype)  # of nobody else
    product = grad * normalised
    mean = torch.mv(product, weight).div_(-len(weight))[:, None]
    return torch.addcmul(total, grad.mul_(weight).addcmul_(normalised, mean), scale), product.sum(0)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    """RoPE over channels in pairs, in place: (a + ib) (cos + i sin). x: [b, T, heads, C], of nobody else."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(table)).flatten(-2)


def _heads_first(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[b, T, heads, C] → [b · K, heads / K · T, C]: the query heads that share a key/value head are one matrix."""
    b, T, heads, C = x.shape
    return torch.empty(b, heads, T, C, dtype=dtype).copy_(x.transpose(1, 2)).view(b * K, -1, C)


def _pairs(matrix: Tensor, C: int) -> Tensor:
    """A view, [heads, C/2, 2, D], in which rows i and i + C/2 of each head stand side by side."""
    return matrix.view(-1, 2, C // 2, matrix.shape[1]).transpose(1, 2)


def _qkv(query: Tensor, key: Tensor, value: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """The three matrices as one, [(H + 2K) · C, D], in the dtype of the products; queries' and keys' rows in pairs."""
    (q, D), k = query.shape, len(key)
    matrix = query.new_empty(q + 2 * k, D, dtype=dtype)
    matrix[:q].view(-1, C // 2, 2, D).copy_(_pairs(query, C))
    matrix[q : q + k].view(-1, C // 2, 2, D).copy_(_pairs(key, C))
    matrix[q + k :] = value
    return matrix


def _qkv_gradients(matrix: Tensor, q: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient at `_qkv`'s matrix as those at the three that it is made of, of which the first has q rows."""
    D, k = matrix.shape[1], (len(matrix) - q) // 2
    query, key = matrix.new_empty(q, D, dtype=dtype), matrix.new_empty(k, D, dtype=dtype)
    _pairs(query, C).copy_(matrix[:q].view(-1, C // 2, 2, D))
    _pairs(key, C).copy_(matrix[q : q + k].view(-1, C // 2, 2, D))
    return query, key, matrix[q + k :].to(dtype)
