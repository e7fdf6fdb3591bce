"""The keys and values of the tokens so far: what attention needs of a text to read one more token of it.

Legend: L layers, B texts, T new tokens, S tokens so far with the new ones, K key/value heads, C head width.
Read next: `loss.py`.
"""

import torch
from torch import Tensor

from minift.config import LlamaConfig


class KVCache:
    """The keys and values of all tokens so far, so that generating a token reads one token, not the whole text.

    Attributes:
        length: tokens in the cache.
        max_length: tokens that it has room for, S_max.
        stored: [L, 2, B, K, S_max, C], keys and values.
        document_ids: [B, S_max], or None where every token may be attended to.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.stored = torch.empty(config.num_hidden_layers, 2, *shape, device=device, dtype=dtype)
        self.document_ids: Tensor | None = None
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, [B, K, T, C] each; return those of all S tokens so far."""
        end = self.length + key.shape[2]
        keys, values = self.stored[layer]  # [B, K, S_max, C] each
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def append_documents(self, document_ids: Tensor) -> Tensor:
        """Store the new tokens' document ids, [B, T]; return those of all S tokens so far."""
        if self.document_ids is None:
            self.document_ids = document_ids.new_zeros(document_ids.shape[0], self.max_length)
        end = self.length + document_ids.shape[1]
        self.document_ids[:, self.length : end] = document_ids
        return self.document_ids[:, :end]
