"""The Llama, whole: RMSNorm, rotary positions (`rope.py`), grouped-query attention, SwiGLU; with a cache, or without.

Legend: B batch, T tokens of the input, S tokens that can be attended to (S = T without a cache), D model width,
H query heads, K key/value heads, C head width, F feed-forward width, V vocabulary.

    tokens ─ embed_tokens ─▶ x ─▶ layers ─▶ norm ─▶ hidden ─ lm_head ─▶ logits
    each layer:  x ← x + self_attn(input_layernorm(x));  x ← x + mlp(post_attention_layernorm(x))

Parameters have Hugging Face's names (without its `model.` prefix) and its RoPE layout, so what you know from elsewhere
is called the same here. There are no buffers: RoPE's tables are computed where they are used, in float32, and a model
moved to another device or dtype needs no care.

    logits = model(tokens)          # [B, T] -> [B, T, V]
    hidden = model.hidden(tokens)   # [B, T] -> [B, T, D]: what the loss takes (loss.py), so that logits need not exist

Sources: Touvron et al., "Llama 2" (arXiv 2307.09288); "The Llama 3 Herd of Models" (arXiv 2407.21783).
Every operation has a slow, obvious twin in `reference.py`. Read next: `rope.py`, or at once `loss.py`.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.cache import KVCache, RecordedCache
from minift.config import LONGEST_WRITTEN_OUT, LlamaConfig
from minift.errors import InputError
from minift.kernels.attention import Mask, attend, block_mask
from minift.kernels.layer import Shared, Weights, share, written_layer
from minift.rope import apply_rope, rope_tables

_HAS_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # what F.rms_norm calls; not public
FLEX_LENGTH = 512  # tokens of a row from which FlexAttention pays on a GPU: it has to be compiled first


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, with the reduction in float32.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D], in x's dtype."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return self.weight * _normalised(x, self.eps)[0]


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x · scale, in x's dtype, and scale = 1 / sqrt(mean(x²) + eps), float32 […, 1]."""
    if x.device.type == "cuda" and x.dtype != torch.float64 and _HAS_FUSED_NORM and not torch.compiler.is_compiling():
        fused: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
        return fused  # one kernel in place of six
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its backward pass written out: autograd's takes one operation at a time and keeps all they read.

    A compiler is given the plain formula instead, and writes both passes better than either.

    For n = x · scale (see `_normalised`) and the gradient g at n · weight:

        ∂weight = Σ g ∘ n        ∂x = scale · (g ∘ weight − n · mean(g ∘ weight ∘ n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, scale = _normalised(x, eps)
        ctx.save_for_backward(normalised, scale, weight)
        return weight * normalised

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normalised, scale, weight = ctx.saved_tensors
        grad_weight = (grad * normalised).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = (grad * weight).to(scale.dtype)
        mean = (grad * normalised).mean(-1, keepdim=True)
        grad = torch.addcmul(grad, normalised, mean, value=-1).mul_(scale)
        return grad.to(normalised.dtype), grad_weight, None


class Linear(nn.Linear):
    """nn.Linear without a bias, which draws no numbers when there is no memory for them (a model on "meta").

    There a model is only a plan, whose weights come from a file; and PyTorch would import its compiler, which takes
    longer than loading, to draw numbers that nobody sees.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    @property
    def matrix(self) -> Tensor:
        """[M, N]: what it multiplies by. With an adapter beside it (`lora.py`) that is more than the weight."""
        return self.weight

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, which draws no numbers when there is no memory for them. See `Linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def narrowed(x: Tensor) -> Tensor:
    """x in the dtype of the matrix products: autocast would make a copy for each matrix that reads it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Attention(nn.Module):
    """Causal self-attention in which H / K query heads share one key/value head.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245). With K = H it is ordinary multi-head attention.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(D, H * C)
        self.k_proj = Linear(D, K * C)
        self.v_proj = Linear(D, K * C)
        self.o_proj = Linear(H * C, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | RecordedCache | None) -> Tensor:
        """[B, T, D] → [B, T, D]. `mask` is bool [B, 1, T, S], True where attention may go; None: plain causal."""
        B, T, _ = x.shape
        x = narrowed(x)
        query = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, C]
        key = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, C]
        value = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, C]
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)  # [B, K, S, C]
        mixed = attend(query, key, value, mask)  # [B, H, T, C]
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, hidden)
        self.up_proj = Linear(D, hidden)
        self.down_proj = Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x = narrowed(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One block: attention, then the feed-forward network, each on a normalised copy and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        cache: KVCache | RecordedCache | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D], or [N, D] of the places that are wanted: in the MLP nobody reads others."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))

    def written_out(self, x: Tensor, shared: Shared, wanted: Tensor | None = None) -> Tensor:
        """`forward` without a cache in fewer operations, for plain matrices on a CPU (`kernels/layer.py`)."""
        attention, mlp = self.self_attn, self.mlp
        weights = Weights(
            self.input_layernorm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
            self.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )
        return written_layer(x, shared, wanted, weights)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise InputError for an id that is not in the vocabulary."""
    if ids.numel():
        for id in torch.aminmax(ids):
            if not 0 <= id < vocab_size:
                raise InputError(f"token id {int(id)} is outside the model's vocabulary of {vocab_size}")


def flex_pays(device: str, length: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlexAttention has kernels for this (on a GPU, no narrow heads), and rows are long enough for it."""
    return device == "cuda" and head_dim >= 16 and dtype != torch.float64 and length >= FLEX_LENGTH


class Llama(nn.Module):
    """A Llama with its head.

    Attributes:
        config: its shape.
        checkpoint_activations: recompute each layer's activations in the backward pass instead of keeping them
            (Chen et al., arXiv 1604.06174): memory of one layer instead of all, for one more forward pass.
        written_out: go through short rows by `kernels/layer.py`, where there is no cache: the same in fewer operations.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.written_out = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the matrix that turns hidden states into logits. When tied, it *is* the embedding: one tensor."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Put the `random_weights` of a generator into this model."""
        parameters = dict(self.named_parameters())
        for name, tensor in self.random_weights(generator):
            parameters[name].copy_(tensor)

    def random_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """First weights, by name: normal, the two matrices that write to the stream scaled down with depth.

        They are made one at a time, in float32 and where the generator is, wherever the model may be.

        Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                yield name, torch.ones(parameter.shape, device=generator.device)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.num_hidden_layers) if writes else 1.0
                made = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
                yield name, made.normal_(0.0, std * scale, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, [B, T, V]. The arguments are those of `hidden`."""
        return F.linear(self.hidden(tokens, positions, document_ids, cache), self.head_weight)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The final, normalised hidden states, [B, T, D], or [N, D] of the places that are wanted.

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T], each token's place for RoPE; by default it counts on from the cache.
            document_ids: int64 [B, T]; attention stays among tokens of the same id. None: every earlier token.
            cache: keys and values of the tokens before; it takes the new ones in. With `document_ids`, they must
                have been given from the first call on.
            wanted: int64 [N], places in the flattened batch, b · T + t. What the last layer computes for it alone is
                not computed for the others.

        Raises:
            InputError: when cache and tokens together are longer than the cache, or than the model's positions; on a
                CPU, for an id that is not in the vocabulary. (To look at ids on a GPU would be to wait for it.)
        """
        past = cache.length if cache is not None else 0
        if cache is not None and past + tokens.shape[1] > cache.max_length:
            raise InputError(f"{past + tokens.shape[1]} tokens do not fit a cache of {cache.max_length}")
        if tokens.device.type == "cpu":
            check_ids(tokens, self.config.vocab_size)
        if positions is None:
            if past + tokens.shape[1] > self.config.max_position_embeddings:
                limit = self.config.max_position_embeddings
                raise InputError(f"{past + tokens.shape[1]} tokens are more than the model's {limit} positions")
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        mask: Mask
        if document_ids is not None and cache is None and self._flex_pays(tokens):
            mask = block_mask(document_ids)
        else:
            mask = self._mask(tokens.shape[1], past, document_ids, cache, tokens.device)
        x = self.embed_tokens(tokens)  # [B, T, D]
        written_out = self.written_out and cache is None and tokens.shape[1] <= LONGEST_WRITTEN_OUT
        shared = share(self.config, cos, sin, cast(Tensor | None, mask)) if written_out else None

        def run(layer: DecoderLayer, x: Tensor, places: Tensor | None) -> Tensor:
            if shared is not None:
                return layer.written_out(x, shared, places)
            return cast(Tensor, layer(x, cos, sin, mask, cache, places))

        for layer in self.layers:
            layer, places = cast(DecoderLayer, layer), wanted if layer is self.layers[-1] else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(run, layer, x, places, use_reentrant=False)
            else:
                x = run(layer, x, places)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    @staticmethod
    def _mask(
        T: int, past: int, document_ids: Tensor | None, cache: KVCache | None, device: torch.device
    ) -> Tensor | None:
        """Bool [B, 1, T, S], True where a query may look; None where plain causal attention is right (and faster)."""
        if document_ids is None and (past == 0 or T == 1):
            return None
        queries = torch.arange(past, past + T, device=device)[:, None]
        causal = torch.arange(past + T, device=device)[None, :] <= queries  # [T, S]
        if document_ids is None:
            return causal[None, None]
        keys = document_ids if cache is None else cache.append_documents(document_ids)  # [B, S]
        return (causal & (document_ids[:, :, None] == keys[:, None, :]))[:, None]  # [B, 1, T, S]

    def _flex_pays(self, tokens: Tensor) -> bool:
        return flex_pays(tokens.device.type, tokens.shape[1], self.config.head_dim, self.norm.weight.dtype)
