"""A decoder layer with both its passes written out, for training short rows in bfloat16 on a CPU.

Plain twin: `model.DecoderLayer` (and `model.Prepare`). Taken in bfloat16 on a CPU, for rows of up to LONGEST tokens,
where all weights are trained and nothing is compiled. Autograd takes a layer one operation at a time, keeps what each
has read, and makes a new tensor for every result. A finetuning step of a small model is then thousands of operations of
some 30 µs, a quarter of which are matrix products. Written out, there are half as many:

* q, k and v are one product, and so are gate and up: two products each in the backward pass, in place of six and four.
* Channels that RoPE rotates together, i and i + C/2, are put next to each other, by the order of the weight's rows. So
  a pair is one complex number, and its rotation one product. Attention sums over the channels in any order.
* √C divides q·kᵀ: its root, in RoPE's table, divides q and k.
* Rows are short, so the weights of attention, [T, T], are kept: three operations forward, six backward.
* What is not read again is overwritten.

The numbers are its twin's, to rounding.

    python -m benchmarks ladder                      # the rung "layer": 1.2 x on two Xeon cores
    python -m pytest tests/kernels/test_layer.py

Legend: b rows of a batch, T tokens of a row, N = b · T, D model width, H query heads, K key/value heads, R = H / K, C
head width, F feed-forward width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.cache import KVCache
from minift.config import LlamaConfig
from minift.kernels.targets import TargetsLayer
from minift.model import Prepare, Shared

LONGEST = 256  # tokens of a row: in longer ones, the weights of attention would be most of the memory


class WrittenShared(NamedTuple):
    """All that the layers of one forward pass read in common."""

    table: Tensor  # complex [b or 1, T, 1, C/2]: RoPE's factor for each pair, over the fourth root of C
    mask: Tensor  # [b · K or 1, R · T, T], added to the scores: −inf where attention may not look
    dtype: torch.dtype  # of the products
    eps: float  # of the norms


class WrittenPrepare(Prepare):
    """`Prepare`, which gives `WrittenLayer` what it needs for short rows without a cache."""

    def forward(
        self, tokens: Tensor, positions: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
    ) -> Any:
        """Return a WrittenShared, or else what the twin returns."""
        shared = super().forward(tokens, positions, document_ids, cache)
        short = cache is None and tokens.shape[1] <= LONGEST
        return prepare_written(self.config, shared.cos, shared.sin, shared.mask) if short else shared


def prepare_written(config: LlamaConfig, cos: Tensor, sin: Tensor, mask: Tensor | None) -> WrittenShared:
    """Return what the layers of a forward pass read, under its autocast.

    Args:
        cos, sin: [b or 1, 1, T, C], of `model.rope_tables`.
        mask: bool [b, 1, T, T], True where attention may look; None: plain causal.
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
    return WrittenShared(table, added, dtype, config.rms_norm_eps)


class WrittenLayer(TargetsLayer):
    """`DecoderLayer` in fewer operations, wherever `WrittenPrepare` has prepared them."""

    def forward(self, x: Tensor, shared: Shared | WrittenShared, places: Tensor | None = None) -> Tensor:
        """[b, T, D] → [b, T, D], or [n, D] of the places (int64 [n], in the flattened batch) that are asked for."""
        if isinstance(shared, Shared):
            return super().forward(x, shared, places)
        attention, mlp = self.self_attn, self.mlp
        matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if any(type(matrix) is not nn.Linear for matrix in matrices):
            raise RuntimeError("a matrix got an adapter after kernels were installed: install them again")
        weights = [matrix.weight for matrix in matrices]
        with torch.autocast("cpu", enabled=False):
            # Two functions, so that what the MLP keeps is freed before the gradients of attention are computed.
            stream: Tensor = _Attention.apply(x, shared, self.input_layernorm.weight, *weights[:4])
            if places is not None:
                stream = stream.flatten(0, 1).index_select(0, places)
            out: Tensor = _MLP.apply(stream, shared, self.post_attention_layernorm.weight, *weights[4:])
        return out


def is_available() -> bool:
    """Return whether this version of PyTorch has the two backward kernels that are called here; they are not public."""
    silu = getattr(torch.ops.aten, "silu_backward", None)
    return hasattr(torch, "_softmax_backward_data") and hasattr(silu, "grad_input")


class _Attention(torch.autograd.Function):
    """x + o(attention(norm(x)))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shared: WrittenShared, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor
    ) -> Tensor:
        (b, T, D), C, dtype = x.shape, 2 * shared.table.shape[-1], shared.dtype
        H, K = len(q) // C, len(k) // C
        matrix, output = _qkv(q, k, v, C, dtype), o.to(dtype)
        x = x.reshape(b * T, D)
        n, scale, normed = _norm(x, norm, shared.eps, dtype)
        qkv = (normed @ matrix.T).view(b, T, H + 2 * K, C)
        rotated = _rotate_(qkv[:, :, : H + K].to(x.dtype), shared.table)
        query = _heads_first(rotated[:, :, :H], K, dtype)  # [b · K, R · T, C]
        key = _heads_first(rotated[:, :, H:], K, dtype)  # [b · K, T, C]
        value = _heads_first(qkv[:, :, H + K :], K, dtype)  # [b · K, T, C]
        p = torch.softmax(torch.baddbmm(shared.mask, query, key.mT), -1)  # [b · K, R · T, T]
        mixed = (p @ value).view(b, H, T, C).transpose(1, 2).reshape(b * T, H * C)
        kept = n, scale, normed, query, key, value, p, mixed
        ctx.save_for_backward(shared.table, norm, matrix, output, *kept)
        return (mixed @ output.T).add(x).view(b, T, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, norm, matrix, output, n, scale, normed, query, key, value, p, mixed = ctx.saved_tensors
        (b, T, D), C = grad.shape, query.shape[-1]
        H, K, dtype = output.shape[1] // C, len(key) // b, normed.dtype
        grad = grad.reshape(b * T, D)  # may be another node's input, so it is not written to
        low = grad.to(dtype)
        grad_output = low.T @ mixed
        grad_mixed = _heads_first((low @ output).view(b, T, H, C), K, dtype)  # [b · K, R · T, C]
        grad_value = p.mT @ grad_mixed
        grad_scores = torch._softmax_backward_data(grad_mixed @ value.mT, p, -1, dtype)
        rotated = grad.new_empty(b, T, H + K, C)
        rotated[:, :, :H] = (grad_scores @ key).view(b, H, T, C).transpose(1, 2)
        rotated[:, :, H:] = (grad_scores.mT @ query).view(b, K, T, C).transpose(1, 2)
        del grad_scores  # the largest tensor there is
        grad_qkv = normed.new_empty(b, T, H + 2 * K, C)
        grad_qkv[:, :, : H + K] = _rotate_(rotated, table.conj())  # in the other direction
        grad_qkv[:, :, H + K :] = grad_value.view(b, K, T, C).transpose(1, 2)
        grad_qkv = grad_qkv.view(b * T, -1)
        grad_x, grad_norm = _norm_gradients(grad, grad_qkv @ matrix, n, scale, norm)
        grad_weights = _qkv_gradients(grad_qkv.T @ normed, H * C, C, norm.dtype)
        return grad_x.view(b, T, D), None, grad_norm, *grad_weights, grad_output.to(norm.dtype)


class _MLP(torch.autograd.Function):
    """x + down(silu(gate) · up) of norm(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shared: WrittenShared, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        rows, (ff, D) = x.reshape(-1, x.shape[-1]), gate.shape
        matrix, down = gate.new_empty(2 * ff, D, dtype=shared.dtype), down.to(shared.dtype)
        matrix[:ff], matrix[ff:] = gate, up
        n, scale, normed = _norm(rows, norm, shared.eps, shared.dtype)
        both = normed @ matrix.T  # [N, 2F]
        activated = F.silu(both[:, :ff])
        product = activated * both[:, ff:]
        ctx.save_for_backward(norm, matrix, down, n, scale, normed, both, activated, product)
        return (product @ down.T).add(rows).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm, matrix, down, n, scale, normed, both, activated, product = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # may be another node's input, so it is not written to
        low = rows.to(normed.dtype)
        grad_down = low.T @ product
        grad_product, grad_both = low @ down, torch.empty_like(both)
        (gate, up), (grad_gate, grad_up) = both.chunk(2, -1), grad_both.chunk(2, -1)
        torch.mul(grad_product, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
        del low, grad_product  # before the next ones are made
        grad_x, grad_norm = _norm_gradients(rows, grad_both @ matrix, n, scale, norm)
        grad_weights = (grad_both.T @ normed).to(norm.dtype).chunk(2)
        return grad_x.view(grad.shape), None, grad_norm, *grad_weights, grad_down.to(norm.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return n = x · scale, scale = 1 / sqrt(mean(x²) + eps), and n · weight in the dtype of the matrix products."""
    n = x.square()
    scale = n.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(x, scale, out=n)
    return n, scale, (weight * n).to(dtype)


def _norm_gradients(total: Tensor, grad: Tensor, n: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `total` plus the gradient at x, from `grad` at n · weight, and the gradient at the weight.

    With g = grad:  ∂weight = Σ g ∘ n        ∂x = scale · (g ∘ weight − n · (g ∘ n)·weight / D)
    """
    grad = grad.to(n.dtype)  # a tensor of its own, so it may be overwritten
    product = grad * n
    mean = torch.mv(product, weight).div_(-len(weight))[:, None]
    return torch.addcmul(total, grad.mul_(weight).addcmul_(n, mean), scale), product.sum(0)


def _rotate_(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels in place: (a + ib) (cos + i sin). x: [b, T, heads, C]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(table)).flatten(-2)


def _heads_first(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[b, T, heads, C] → [b · K, heads / K · T, C]: the query heads that share a key/value head are one matrix."""
    b, T, heads, C = x.shape
    return torch.empty(b, heads, T, C, dtype=dtype).copy_(x.transpose(1, 2)).view(b * K, -1, C)


def _pairs(matrix: Tensor, C: int) -> Tensor:
    """Return a view, [heads, C/2, 2, D], in which rows i and i + C/2 of each head are next to each other."""
    return matrix.view(-1, 2, C // 2, matrix.shape[1]).transpose(1, 2)


def _qkv(query: Tensor, key: Tensor, value: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Return the three matrices as one, [(H + 2K) · C, D], in a dtype; the rows of queries and keys in pairs."""
    (q, D), k = query.shape, len(key)
    matrix = query.new_empty(q + 2 * k, D, dtype=dtype)
    matrix[:q].view(-1, C // 2, 2, D).copy_(_pairs(query, C))
    matrix[q : q + k].view(-1, C // 2, 2, D).copy_(_pairs(key, C))
    matrix[q + k :] = value
    return matrix


def _qkv_gradients(matrix: Tensor, q: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Split the gradient at `_qkv`'s matrix into those at the three that it is made of; the first has q rows."""
    D, k = matrix.shape[1], (len(matrix) - q) // 2
    query, key = matrix.new_empty(q, D, dtype=dtype), matrix.new_empty(k, D, dtype=dtype)
    _pairs(query, C).copy_(matrix[:q].view(-1, C // 2, 2, D))
    _pairs(key, C).copy_(matrix[q : q + k].view(-1, C // 2, 2, D))
    return query, key, matrix[q + k :].to(dtype)
