"""One more token of each text, on a GPU: the forward pass recorded once, and played again for every token.

Plain twin: `Llama.hidden` with one token and a cache. Taken on a GPU. The operations of one token are so small that a
GPU has finished each of them before Python asks for the next: it idles most of the time. A CUDA graph is a recording of
them all, which the GPU executes on its own.

A recording always does the same to the same memory, so nothing in it may be a Python number. What changes from token
to token is in tensors: the ids, their positions, and the place in the cache, which each playing moves on. And since no
shape may change either, attention reads the whole cache, with a mask over the places that are still empty.

    decoder = GraphDecoder(model, cache, positions, document_ids)  # the cache already holds the prompts
    logits = decoder.logits(tokens)                                # [B, 1] -> [B, V]

    python -m benchmarks generate --device cuda        # smollm2-135m on an H200: 59 -> 452 tokens/s

Legend: B texts, S places of the cache, K key/value heads, C head width, V vocabulary. Source: "Accelerating PyTorch
with CUDA Graphs" (PyTorch's blog, 2021).
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minift.cache import KVCache
from minift.errors import InputError
from minift.kernels.swap import with_kernels
from minift.model import Llama, Shared, rope_tables


@dataclass(frozen=True)
class RecordedCache:
    """A cache whose next place is a tensor, int64 [1], as a recording needs it."""

    cache: KVCache
    place: Tensor

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token's key and value, [B, K, 1, C] each; return those of all places, [B, K, S, C]."""
        keys, values = self.cache.stored[layer]
        return keys.index_copy_(2, self.place, key), values.index_copy_(2, self.place, value)


class GraphDecoder:
    """The logits after one more token of each text, whose earlier ones are in the cache.

    The first token is computed directly, which loads the kernels; with the second one the recording is made. On a CPU,
    which has no recordings, every token is computed directly.

    Args:
        cache: holds the prompts. From now on only `logits` adds to it.
        positions: int64 [B, 1], each text's next.
        document_ids: int64 [B, 1], those of each text's tokens in the cache, if that keeps any: others are not seen.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, cache: KVCache, positions: Tensor, document_ids: Tensor):
        self.model, self.cache = with_kernels(model, ("norm", "flex")), cache
        device, dtype, past = positions.device, cache.stored.dtype, cache.length
        self.tokens, self.positions = torch.zeros_like(positions), positions.clone()
        self.recorded = RecordedCache(cache, torch.full((1,), past, device=device))
        # What is added to the scores: 0, or −inf where attention may not look. (0 times a NaN is a NaN, so the empty
        # places are set to zero.)
        self.mask = torch.full((len(positions), 1, 1, cache.max_length), -math.inf, dtype=dtype, device=device)
        cache.stored[..., past:, :] = 0
        if cache.document_ids is None:
            self.mask[..., :past] = 0
        else:
            self.mask[:, 0, 0, :past].masked_fill_(cache.document_ids[:, :past] == document_ids, 0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of what follows these tokens, [B, V], valid until the next call. The cache takes them in.

        Args:
            tokens: int64 [B, 1].

        Raises:
            InputError: when the cache is full.
        """
        if self.cache.length == self.cache.max_length:
            raise InputError(f"{self.cache.length + 1} tokens do not fit a cache of {self.cache.length}")
        self.tokens.copy_(tokens)
        self.cache.length += 1
        if self.result is None or tokens.device.type != "cuda":
            self.result = self._step()
            return self.result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records; nothing is computed yet
                self.result = self._step()
        self.graph.replay()
        return self.result

    def _step(self) -> Tensor:
        """Compute what is recorded: `Llama.hidden` and the head, for one token of each text."""
        model, config = self.model, self.model.config
        self.mask.index_fill_(-1, self.recorded.place, 0)
        cos, sin = rope_tables(self.positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = model.embed_tokens(self.tokens)  # [B, 1, D]
        shared = Shared(cos, sin, self.mask, cast(KVCache, self.recorded))
        for layer in model.layers:
            x = layer(x, shared)
        self.recorded.place.add_(1)
        self.positions.add_(1)
        return cast(Tensor, model.norm(x)[:, 0] @ model.head_weight.T)
