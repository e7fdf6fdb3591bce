"""The keys and values of the tokens so far: what attention needs of a text that has been read, to read one token more.

Legend: L layers, B texts, T new tokens, S tokens so far with the new ones, K key/value heads, C head width. Read next:
`kernels/attention.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.config import LlamaConfig


class KVCache:
    """The keys and values of all tokens so far, so that generating a token reads one token, not the whole text.

    Attributes:
        length: tokens in the cache.
        stored: [L, 2, B, K, S_max, C], keys and values.
        keys, values: a tensor [B, K, S_max, C] for each layer, parts of `stored`.
        document_ids: [B, S_max], or None where every token may be attended to.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.stored = torch.empty(config.num_hidden_layers, 2, *shape, device=device, dtype=dtype)
        self.keys, self.values = list(self.stored[:, 0]), list(self.stored[:, 1])
        self.document_ids: Tensor | None = None
        self.length = 0
        self.max_length = max_length

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, [B, K, T, C] each; return those of all S tokens so far."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def one_more(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each layer, where one new token's key and value belong, [2, B, K, C], and the keys and values of all S
        tokens, it included, [B, K, S, C] each: `append` for a caller who stores by itself."""
        rooms, (keys, values) = self.stored[..., self.length, :], self.stored[..., : self.length + 1, :].unbind(1)
        return zip(rooms.unbind(), keys.unbind(), values.unbind(), strict=True)

    def append_documents(self, document_ids: Tensor) -> Tensor:
        """Store the new tokens' document ids, [B, T]; return those of all S tokens so far."""
        if self.document_ids is None:
            self.document_ids = document_ids.new_zeros(document_ids.shape[0], self.max_length)
        end = self.length + document_ids.shape[1]
        self.document_ids[:, self.length : end] = document_ids
        return self.document_ids[:, :end]


@dataclass(frozen=True)
class RecordedCache:
    """A cache whose next place is a tensor, int64 [1]: for an attention that is recorded, as `kernels/graph.py` does it."""

    cache: KVCache
    place: Tensor

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token's key and value, [B, K, 1, C] each; return those of all places, [B, K, S, C]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return keys.index_copy_(2, self.place, key), values.index_copy_(2, self.place, value)
