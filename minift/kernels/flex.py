"""Attention on a GPU: documents in long rows by blocks, and heads that share keys.

Plain twins: `model.Prepare` and `model.ScaledDotProduct`. Taken on a GPU. A mask of T² booleans costs the whole square;
FlexAttention never computes the blocks of it in which nothing may look, so a row of many short documents costs little
more than the documents do. And no fused CUDA kernel takes shared heads together with a mask, or in float32: there each
query head gets a key head of its own.

    python -m benchmarks attention --config llama2-7b --batch-size 2 --length 4096 --device cuda

Legend: B batch, T tokens of the input, S tokens that can be attended to, H query heads, K key/value heads, C head
width. Source: Dong et al., "Flex Attention" (arXiv 2412.05496).
"""

import functools
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from minift.kernels.attention import of_one_token
from minift.model import Prepare, ScaledDotProduct

Mask: TypeAlias = Tensor | BlockMask | None
FLEX_LENGTH = 512  # tokens of a row from which FlexAttention is faster: it has to be compiled first
NARROWEST = 16  # channels of a head: it has no kernels for narrower ones


class FlexPrepare(Prepare):
    """`Prepare`, with blocks in place of a mask for long rows of several documents."""

    def mask(self, tokens: Tensor, past: int, document_ids: Tensor | None, cache: Any) -> Tensor | None:
        """Return a BlockMask where that is faster, or else what the twin returns."""
        if document_ids is not None and cache is None and self.by_blocks(tokens.shape[1]):
            return cast(Tensor, block_mask(document_ids))  # which only `FlexScaledDotProduct` reads
        return super().mask(tokens, past, document_ids, cache)

    def by_blocks(self, length: int) -> bool:
        """Return whether FlexAttention has kernels for these heads, and rows are long enough for it."""
        return self.config.head_dim >= NARROWEST and length >= FLEX_LENGTH


class FlexScaledDotProduct(ScaledDotProduct):
    """`ScaledDotProduct`, also with a mask of blocks."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """[B, H, T, C] and twice [B, K, S, C] → [B, H, T, C], in value's dtype."""
        group = query.shape[1] // key.shape[1]
        if isinstance(mask, BlockMask):
            attend = _flex_attention(query.device.type)
            return cast(Tensor, attend(query, key, value, block_mask=mask, enable_gqa=group > 1))
        if query.shape[2] == 1 and group > 1:
            return of_one_token(query, key, value, mask)
        if group > 1 and (mask is not None or value.dtype == torch.float32):
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return super().forward(query, key, value, mask)


def block_mask(document_ids: Tensor) -> BlockMask:
    """Return causal attention inside documents, as blocks. document_ids: int64 [B, T]."""

    def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_ids[b, query] == document_ids[b, key])

    B, T = document_ids.shape
    return create_block_mask(visible, B, None, T, T, device=document_ids.device)


@functools.cache
def _flex_attention(device: str) -> Any:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention  # on a CPU: only its plain definition
