"""Attention by PyTorch's fused kernels, and where they are slow, a better way: the one operation that is not a line.

Its plain definition is `reference.attention`; the two are held together by

    python -m pytest tests/way/test_slow_twins.py tests/way/test_no_leakage.py -k attention

Legend: B batch, T tokens of the input, S tokens that can be attended to, H query heads, K key/value heads, C head
width. `model.Attention` calls it. Read next: `kernels/layer.py`.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask: TypeAlias = Tensor | BlockMask | None  # where attention may go; None: to every earlier token
# Training in bfloat16 on a CPU. `python -m benchmarks attention` measures it; these are two cores of an Intel Xeon.
NARROW_ROW = 2**14  # T · C: beyond, the backward pass is faster in bfloat16 (C = 64: 0.9 x at T = 512, 0.7 x at 1,024)
COMPILED_ROW = 640  # T: up to here a compiler needs no kernel (0.8 of its time at 640, 1.2 to 1.6 times it at 1,024)
ROWS = 128  # queries whose weights a compiled model computes at the same time
_HAS_CPU_KERNELS = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax(q·kᵀ / √C) v by PyTorch's fused kernels, which never hold the [T, S] weights.

    Args:
        query: [B, H, T, C]; key, value: [B, K, S, C].
        mask: bool [B, 1, T, S]; or, where nothing is trained, what is added to the scores; or the same as blocks (see
            `block_mask`); or None for plain causal attention.

    Returns:
        [B, H, T, C], in value's dtype.
    """
    shared = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockMask):
        return _flex_attention(query.device.type)(query, key, value, block_mask=mask, enable_gqa=shared > 1)
    if query.shape[2] == 1 and shared > 1:
        # Of one new token, the heads that share a key go as its queries: it is read once, not once for each.
        grouped = query.reshape(query.shape[0], key.shape[1], shared, -1)  # [B, K, H / K, C]
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).reshape(query.shape)
    if query.device.type == "cuda" and shared > 1 and (mask is not None or value.dtype == torch.float32):
        # No fused CUDA kernel takes shared heads together with a mask, or in float32: give each query head its own.
        key, value, shared = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), 1
    if value.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled():
        T, C = query.shape[2:]
        if torch.compiler.is_compiling() and mask is None and T <= COMPILED_ROW:
            return _WrittenOut.apply(query, key, value)
        if T * C <= NARROW_ROW and _HAS_CPU_KERNELS:
            return _Widened.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,  # a single new token may see everything there is
        enable_gqa=shared > 1,
    )


class _Widened(torch.autograd.Function):
    """Attention to short rows in bfloat16 on a CPU: by its kernels, the one of the backward pass in float32.

    The bfloat16 one takes up to 7 times as long (rows of 64 tokens), that of the forward pass half as long as its twin.
    So what is kept between the two is bfloat16, and widened when it is needed. The kernels are those that
    `scaled_dot_product_attention` calls. They are not public: where a version of PyTorch lacks them, that is used.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:  # to what is added to q·kᵀ
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


class _WrittenOut(torch.autograd.Function):
    """Causal attention without a kernel: of matrix products a compiler makes what is faster, one loop between them."""

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
    """Causal attention, ROWS queries at a time: softmax(s) v, and the logarithm of the softmax's denominator.

    Args:
        query: [B, H, T, C]; key, value: [B, K, T, C].

    Returns:
        mixed: [B, H, T, C], in their dtype, laid out as [B, T, H, C], as the product behind it reads it.
        log_total: float32 [B, H, T], of each query's sum of exponentials.
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
    """The gradients of causal attention: matrix products, and between them what a compiler makes one loop of.

    With the scores s = q·kᵀ / √C and the weights p = exp(s − log_total):

        ∂p = ∂mixed · vᵀ        ∂s = p ∘ (∂p − Σ ∂mixed ∘ mixed)        ∂v = pᵀ · ∂mixed
        ∂q = ∂s · k / √C        ∂k = ∂sᵀ · q / √C

    ROWS queries at a time, so that weights of all T² pairs never exist. Source: Dao et al., "FlashAttention"
    (arXiv 2205.14135), appendix B.

    Args:
        grad: [B, H, T, C], at `mixed`; the others as `_attention` takes and returns them.

    Returns:
        Those at query, key and value, in their dtype.
    """
    (B, H, T, C), K, dtype = query.shape, key.shape[1], query.dtype
    R = H // K  # query heads that share a key/value head: their queries are taken together, [B, K, R * n, C]
    expected = (grad.float() * mixed.float()).sum(-1).view(B, K, R, T, 1)  # of ∂p under p
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
    """ROWS queries at a time. They see no key behind the last of them."""
    for start in range(0, T, ROWS):
        yield slice(start, min(start + ROWS, T))


def _scores(query: Tensor, key: Tensor, here: slice) -> Tensor:
    """q·kᵀ / √C, float32, −inf where attention may not go.

    Args:
        query: [B, K, R, n, C], those at the places `here`.
        key: [B, K, S, C], the first S.

    Returns:
        [B, K, R, n, S].
    """
    (B, K, R, n, C), S = query.shape, key.shape[2]
    scores = (query.reshape(B, K, R * n, C) @ key.mT).float().view(B, K, R, n, S) / math.sqrt(C)
    visible = torch.arange(S) <= torch.arange(here.start, here.stop)[:, None]
    return scores.masked_fill(~visible, -math.inf)


def block_mask(document_ids: Tensor) -> BlockMask:
    """Causal attention inside documents, for FlexAttention: blocks of the mask that are all False are never computed.

    A row of many short documents then costs little more than the documents do, where a mask of T² booleans costs the
    whole square. Source: Dong et al., "Flex Attention" (arXiv 2412.05496).

    Args:
        document_ids: int64 [B, T].
    """

    def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_ids[b, query] == document_ids[b, key])

    B, T = document_ids.shape
    return create_block_mask(visible, B, None, T, T, device=document_ids.device)


@functools.cache
def _flex_attention(device: str) -> Any:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention  # on a CPU: only its plain definition
