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

    python -m pytest tests/test_written_layer.py

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
    """A layer's parameters, or their gradients, in the model's order."""

    input_norm: Tensor  # [D]
    query: Tensor  # [H · C, D]
    key: Tensor  # [K · C, D]
    value: Tensor  # [K · C, D]
    output: Tensor  # [D, H · C]
    post_norm: Tensor  # [D]
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class Matrices(NamedTuple):
    """The matrices as they are multiplied by, or their gradients."""

    qkv: Tensor  # [(H + 2K) · C, D], the rows of queries and keys in pairs (see `_pairs`)
    output: Tensor  # [D, H · C]
    gate_up: Tensor  # [2F, D]
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
        cos, sin: [b or 1, 1, T, C], of `model.rope_tables`.
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
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _WrittenLayer.apply(x, shared, wanted, *weights)
    return out


class _WrittenLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: Shared,
        wanted: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        weights = Weights(*parameters)
        matrices = _matrices(weights, 2 * shared.table.shape[-1], shared.dtype)
        stream, of_attention = _attention(x, shared, weights.input_norm, matrices)
        if wanted is not None:
            stream = stream.index_select(0, wanted)
        out, of_mlp = _mlp(stream, weights.post_norm, matrices, shared.eps)
        ctx.shape = x.shape
        ctx.save_for_backward(
            shared.table, wanted, weights.input_norm, weights.post_norm, *matrices, *of_attention, *of_mlp
        )
        return out.view(x.shape) if wanted is None else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, wanted, input_norm, post_norm, *rest = ctx.saved_tensors
        matrices, of_attention, of_mlp = Matrices(*rest[:4]), rest[4:12], rest[12:]
        grad, of_post_norm, of_gate_up, of_down = _mlp_gradients(grad, post_norm, matrices, *of_mlp)
        b, T, D = ctx.shape
        if wanted is not None:
            grad = grad.new_zeros(b * T, D).index_add_(0, wanted, grad)
        of_input_norm, of_qkv, of_output = _attention_gradients(
            grad.view(b, T, D), table, input_norm, matrices, *of_attention
        )
        gradients = Matrices(of_qkv, of_output, of_gate_up, of_down)
        weights = _gradients(gradients, of_input_norm, of_post_norm, 2 * table.shape[-1])
        return grad.view(b, T, D), None, None, *weights


# ----------------------------------------------------------------------------------------------------------------------


def _attention(x: Tensor, shared: Shared, norm: Tensor, matrices: Matrices) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x + o(attention(norm(x))), [N, D], and what its gradients are computed from."""
    (b, T, D), C = x.shape, 2 * shared.table.shape[-1]
    H = matrices.output.shape[1] // C
    K = (len(matrices.qkv) // C - H) // 2
    x = x.reshape(b * T, D)
    normalised, scale, read = _norm(x, norm, shared.eps, shared.dtype)
    qkv = (read @ matrices.qkv.T).view(b, T, H + 2 * K, C)
    turned = _turned(qkv[:, :, : H + K].to(x.dtype), shared.table)
    query = _heads_first(turned[:, :, :H], K, qkv.dtype)  # [b · K, R · T, C]
    key = _heads_first(turned[:, :, H:], K, qkv.dtype)  # [b · K, T, C]
    value = _heads_first(qkv[:, :, H + K :], K, qkv.dtype)  # [b · K, T, C]
    p = torch.softmax(torch.baddbmm(shared.mask, query, key.mT), -1)  # [b · K, R · T, T]
    mixed = (p @ value).view(b, H, T, C).transpose(1, 2).reshape(b * T, H * C)
    out = (mixed @ matrices.output.T).add(x)
    return out, (normalised, scale, read, query, key, value, p, mixed)


def _attention_gradients(
    grad: Tensor,
    table: Tensor,
    norm: Tensor,
    matrices: Matrices,
    normalised: Tensor,
    scale: Tensor,
    read: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: Tensor,
    mixed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at norm, qkv and output from `grad`, [b, T, D], to which what comes of them is added for x."""
    (b, T, D), C = grad.shape, query.shape[-1]
    grad, K = grad.view(b * T, D), len(key) // b
    narrow = grad.to(read.dtype)
    of_output = narrow.T @ mixed
    of_mixed = (narrow @ matrices.output).view(b, T, -1, C)  # [b, T, H, C]
    H = of_mixed.shape[2]
    of_mixed = _heads_first(of_mixed, K, read.dtype)  # [b · K, R · T, C]
    of_value = p.mT @ of_mixed
    of_scores = torch._softmax_backward_data(of_mixed @ value.mT, p, -1, p.dtype)
    turned = grad.new_empty(b, T, H + K, C)
    turned[:, :, :H] = (of_scores @ key).view(b, H, T, C).transpose(1, 2)
    turned[:, :, H:] = (of_scores.mT @ query).view(b, K, T, C).transpose(1, 2)
    of_qkv = read.new_empty(b, T, H + 2 * K, C)
    of_qkv[:, :, : H + K] = _turned(turned, table.conj())  # the other way round
    of_qkv[:, :, H + K :] = of_value.view(b, K, T, C).transpose(1, 2)
    of_qkv = of_qkv.view(b * T, -1)
    of_norm = _add_norm_gradient(grad, of_qkv @ matrices.qkv, normalised, scale, norm, out=grad)
    return of_norm, of_qkv.T @ read, of_output


def _mlp(x: Tensor, norm: Tensor, matrices: Matrices, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x + down(silu(gate) · up) of norm(x), [N, D], which takes the place of x; and what its gradients come from."""
    normalised, scale, read = _norm(x, norm, eps, matrices.down.dtype)
    gate_up = read @ matrices.gate_up.T  # [N, 2F]
    gate, up = gate_up.chunk(2, -1)
    activated = F.silu(gate)
    product = activated * up
    out = x.add_(product @ matrices.down.T)
    return out, (normalised, scale, read, gate_up, activated, product)


def _mlp_gradients(
    grad: Tensor,
    norm: Tensor,
    matrices: Matrices,
    normalised: Tensor,
    scale: Tensor,
    read: Tensor,
    gate_up: Tensor,
    activated: Tensor,
    product: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients at x, norm, gate_up and down from `grad`, […, D], which is left as it is: others may read it."""
    grad = grad.reshape(-1, grad.shape[-1])
    narrow = grad.to(read.dtype)
    of_down = narrow.T @ product
    of_product = narrow @ matrices.down
    of_gate_up = torch.empty_like(gate_up)
    (gate, up), (of_gate, of_up) = gate_up.chunk(2, -1), of_gate_up.chunk(2, -1)
    torch.mul(of_product, activated, out=of_up)
    torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate)
    of_x = torch.empty_like(grad)
    of_norm = _add_norm_gradient(grad, of_gate_up @ matrices.gate_up, normalised, scale, norm, out=of_x)
    return of_x, of_norm, of_gate_up.T @ read, of_down


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """n = x · scale, scale = 1 / sqrt(mean(x²) + eps), and n · weight in the dtype of the matrices. See `RMSNorm`."""
    normalised = x.square()
    scale = normalised.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(x, scale, out=normalised)
    return normalised, scale, (weight * normalised).to(dtype)


def _add_norm_gradient(
    total: Tensor, grad: Tensor, normalised: Tensor, scale: Tensor, weight: Tensor, out: Tensor
) -> Tensor:
    """`total` and the gradient at x, from `grad` at n · weight, into `out`; returned is the gradient at the weight.

    With g = grad, n = normalised:  ∂weight = Σ g ∘ n        ∂x = scale · (g ∘ weight − n · (g ∘ n)·weight / D)
    """
    grad = grad.to(normalised.dtype)  # of nobody else
    product = grad * normalised
    mean = torch.mv(product, weight).div_(-len(weight))[:, None]
    torch.addcmul(total, grad.mul_(weight).addcmul_(normalised, mean), scale, out=out)
    return product.sum(0)


# ----------------------------------------------------------------------------------------------------------------------


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


def _matrices(weights: Weights, C: int, dtype: torch.dtype) -> Matrices:
    """The matrices in the dtype of the products."""
    (q, D), k, ff = weights.query.shape, len(weights.key), len(weights.gate)
    qkv = weights.query.new_empty(q + 2 * k, D, dtype=dtype)
    qkv[:q].view(-1, C // 2, 2, D).copy_(_pairs(weights.query, C))
    qkv[q : q + k].view(-1, C // 2, 2, D).copy_(_pairs(weights.key, C))
    qkv[q + k :] = weights.value
    gate_up = weights.gate.new_empty(2 * ff, D, dtype=dtype)
    gate_up[:ff], gate_up[ff:] = weights.gate, weights.up
    return Matrices(qkv, weights.output.to(dtype), gate_up, weights.down.to(dtype))


def _gradients(matrices: Matrices, input_norm: Tensor, post_norm: Tensor, C: int) -> Weights:
    """Gradients at the matrices as those at the parameters, in their dtype, that of the norms."""
    exact, (_, D) = input_norm.dtype, matrices.qkv.shape
    q = matrices.output.shape[1]
    k = (len(matrices.qkv) - q) // 2
    query, key = input_norm.new_empty(q, D), input_norm.new_empty(k, D)
    _pairs(query, C).copy_(matrices.qkv[:q].view(-1, C // 2, 2, D))
    _pairs(key, C).copy_(matrices.qkv[q : q + k].view(-1, C // 2, 2, D))
    value = matrices.qkv[q + k :].to(exact)
    gate, up = matrices.gate_up.to(exact).chunk(2)
    output, down = matrices.output.to(exact), matrices.down.to(exact)
    return Weights(input_norm, query, key, value, output, post_norm, gate, up, down)
