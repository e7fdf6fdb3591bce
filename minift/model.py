"""The Llama, whole, in plain formulas: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Legend: B batch, T tokens of the input, S tokens that can be attended to (S = T without a cache), D model width,
H query heads, K key/value heads, C head width, F feed-forward width, V vocabulary.

    tokens ─ embed_tokens ─▶ x ─▶ layers ─▶ norm ─▶ hidden ─ lm_head ─▶ logits
    each layer:  x ← x + self_attn(input_layernorm(x));  x ← x + mlp(post_attention_layernorm(x))

    logits = model(tokens)          # [B, T] -> [B, T, V]
    hidden = model.hidden(tokens)   # [B, T] -> [B, T, D]: what the loss takes; all the logits need not exist

Parameters have Hugging Face's names (without `model.`) and its RoPE layout. A run swaps modules for faster ones with
the same weights (`kernels/`), as `print(model)` shows. Each formula by index, attention too: `reference.py`.

Sources: Touvron et al., "Llama 2" (arXiv 2307.09288); "The Llama 3 Herd of Models" (arXiv 2407.21783).
Read next: `cache.py`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.cache import KVCache
from minift.config import LlamaConfig, RopeScaling
from minift.errors import InputError
from minift.values import check_ids


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight. Source: Zhang & Sennrich (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D]. The mean is taken in float32; the cast back to x's dtype comes before the weight."""
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


# A CPU's math library (MKL) sets itself up at its first cosine. If two threads do that at once, half of the cosines are
# off by 1e-4. This first one is computed by one thread alone.
torch.zeros(1, device="cpu").cos()


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """Return how far each pair of channels rotates from one position to the next: radians, float32 [C/2].

    Pair i rotates by theta^(-2i/C): the first fast, the last slowly (Su et al., "RoFormer", arXiv 2104.09864, 3.2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else scaling.apply(frequencies)


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all angles, float32 [B, 1, T, C]; both halves of C are alike. positions: int64 [B, T]."""
    frequencies = rope_frequencies(head_dim, theta, scaling, positions.device)  # [C/2]
    angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)  # [B, 1 (for the heads), T, C]
    return angles.cos(), angles.sin()


class RoPE(nn.Module):
    """Rotate channels i and i + C/2 together, by their position's angle: (a, b) → (a cos − b sin, b cos + a sin).

    The dot product of two rotated vectors depends on their distance only. (Meta's own files pair 2i with 2i + 1.)
    """

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, heads, T, C] → the same shape and dtype. cos, sin: float32 [B, 1, T, C]."""
        a, b = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Shared(NamedTuple):
    """All that the layers of one forward pass read in common."""

    cos: Tensor  # [B, 1, T, C]
    sin: Tensor  # [B, 1, T, C]
    mask: Tensor | None  # bool [B, 1, T, S], True where attention may look; None: at itself and all before
    cache: KVCache | None


class ScaledDotProduct(nn.Module):
    """softmax(q·kᵀ / √C) v, by PyTorch's fused kernel, which never holds all [T, S] weights."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, T, C] and twice [B, K, S, C] → [B, H, T, C]. H / K query heads share one key/value head."""
        causal = mask is None and query.shape[2] > 1  # a single new token may look at everything there is
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Source: Ainslie et al., "GQA" (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, K * C, bias=False)
        self.v_proj = nn.Linear(D, K * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)
        self.rope, self.attend = RoPE(), ScaledDotProduct()

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        B, T, _ = x.shape
        query = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, C]
        key = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, C]
        value = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, C]
        query, key = self.rope(query, shared.cos, shared.sin), self.rope(key, shared.cos, shared.sin)
        if shared.cache is not None:
            key, value = shared.cache.append(self.layer, key, value)  # [B, K, S, C]
        mixed = self.attend(query, key, value, shared.mask)  # [B, H, T, C]
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). Source: Shazeer (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One block: attention, then the feed-forward network, each reading a normalised x and added to x."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class Prepare(nn.Module):
    """Compute what the layers read in common: RoPE's tables, and the mask of attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config

    def forward(
        self, tokens: Tensor, positions: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
    ) -> Shared:
        """Return what the layers read for these tokens. The arguments are those of `Llama.hidden`."""
        config = self.config
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]  # [1, T]
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        return Shared(cos, sin, self.mask(tokens, past, document_ids, cache), cache)

    def mask(self, tokens: Tensor, past: int, document_ids: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """Return bool [B, 1, T, S], True where a query may look; None where that is at itself and all before it."""
        if document_ids is None and (past == 0 or tokens.shape[1] == 1):
            return None
        queries = torch.arange(past, past + tokens.shape[1], device=tokens.device)[:, None]  # [T, 1]
        causal = torch.arange(past + tokens.shape[1], device=tokens.device) <= queries  # [T, S]
        if document_ids is None:
            return causal[None, None]
        keys = document_ids if cache is None else cache.append_documents(document_ids)  # [B, S]
        return (causal & (document_ids[:, :, None] == keys[:, None, :]))[:, None]  # [B, 1, T, S]


class Llama(nn.Module):
    """A Llama with its head.

    With `checkpoint_activations`, the backward pass computes each layer's activations a second time instead of keeping
    them (Chen et al., arXiv 1604.06174): the memory of one layer for the time of one more forward pass.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prepare = Prepare(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the matrix that makes logits of hidden states. When tied, it *is* the embedding: one tensor."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed_tokens.weight.device

    def forward(self, tokens: Tensor, *context: Any, **named: Any) -> Tensor:
        """Return the logits, [B, T, V]. The arguments are those of `hidden`."""
        return F.linear(self.hidden(tokens, *context, **named), self.head_weight)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final hidden states, [B, T, D].

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T], each token's place for RoPE; by default it counts on from the cache.
            document_ids: int64 [B, T]; attention stays among tokens of the same id. None: itself and all before.
            cache: keys and values of the tokens before; it takes the new ones in.
        """
        check_input(tokens, positions, cache, self.config)
        shared = self.prepare(tokens, positions, document_ids, cache)
        x = self.embed_tokens(tokens)  # [B, T, D]
        for layer in self.layers:
            x = self.through(layer, x, shared)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def through(self, layer: nn.Module, *inputs: Any) -> Any:
        """Return a layer's output; keep its activations for the backward pass, or only its inputs."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Copy the `random_weights` of a generator into this model."""
        for name, weight in self.random_weights(generator):
            self.get_parameter(name).copy_(weight)

    def random_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield first weights by name: normal, smaller in the two matrices that write to x (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():
            weight = torch.ones(parameter.shape, device=generator.device)
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.num_hidden_layers) if writes else 1.0
                weight.normal_(0.0, self.config.initializer_range * scale, generator=generator)
            yield name, weight


def check_input(tokens: Tensor, positions: Tensor | None, cache: KVCache | None, config: LlamaConfig) -> None:
    """Raise InputError for tokens that do not fit the cache, the model's positions or its vocabulary."""
    end = tokens.shape[1] + (0 if cache is None else cache.length)
    if cache is not None and end > cache.max_length:
        raise InputError(f"{end} tokens do not fit a cache of {cache.max_length}")
    if positions is None and end > config.max_position_embeddings:
        raise InputError(f"{end} tokens are more than the model's {config.max_position_embeddings} positions")
    check_ids(tokens, config.vocab_size)
