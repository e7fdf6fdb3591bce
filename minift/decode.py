"""One text, one more token, on a CPU: the model's forward pass with nothing in it but arithmetic.

A new token has to read every weight once, and does next to nothing with it: seven matrix-vector products a layer take
as long as memory takes to deliver the matrices. What lies between them is small, but in `model.py` it is fifty
operations a layer, each with a new tensor for its result, and modules that call modules; for a small model that takes
longer than the products. Here the same arithmetic, rounded in the same places, goes into memory that is there already.

    decoder = Decoder(model, cache)          # the cache already holds the prompt
    logits = decoder.logits(token)           # int -> [V]

The slow twin is `Llama.hidden` with one token and a cache. Read next: `evaluate.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from minift.errors import InputError
from minift.model import DecoderLayer, KVCache, Llama, attend, rope_tables


class _Weights(NamedTuple):
    """A layer's, as they are in the model: looking them up in its modules takes as long as an operation."""

    attention_norm: Tensor  # [D]
    query: Tensor  # [H * C, D]
    key: Tensor  # [K * C, D]
    value: Tensor  # [K * C, D]
    output: Tensor  # [D, H * C]
    mlp_norm: Tensor  # [D]
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]

    @classmethod
    def of(cls, layer: DecoderLayer) -> "_Weights":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm=layer.input_layernorm.weight,
            query=attention.q_proj.weight,
            key=attention.k_proj.weight,
            value=attention.v_proj.weight,
            output=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=mlp.gate_proj.weight,
            up=mlp.up_proj.weight,
            down=mlp.down_proj.weight,
        )


class Decoder:
    """The logits after one more token of one text, whose earlier ones are in the cache.

    The legend is `model.py`'s. All memory for what is between two products is taken once, here.
    """

    def __init__(self, model: Llama, cache: KVCache):
        config = model.config
        D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.model, self.cache, self.eps = model, cache, config.rms_norm_eps
        self.dtype = model.embed_tokens.weight.dtype
        self.layers = [_Weights.of(layer) for layer in model.layers]  # type: ignore[arg-type]  # a list of modules
        positions = torch.arange(cache.max_length)[None]
        cos, sin = rope_tables(positions, C, config.rope_theta, config.rope_scaling)
        self.cos, self.sin = cos.view(-1, 2, C // 2), sin.view(-1, 2, C // 2)[:, 0]  # both halves of sin are the same

        def vector(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.x, self.written, self.normed, self.wide = vector(D), vector(D), vector(D), vector(D, dtype=torch.float32)
        self.gate, self.up = vector(F), vector(F)
        projected = vector((H + 2 * K) * C)
        self.query, self.key, self.value = projected.split((H * C, K * C, K * C))
        self.new_value = self.value.view(1, K, 1, C)
        # RoPE turns query and key together, in float32: halves a and b of each head's channels.
        self.unturned = projected[: (H + K) * C].view(H + K, 2, C // 2)
        self.halves, self.turned = vector(H + K, 2, C // 2, dtype=torch.float32), vector(H + K, 2, C // 2)
        self.turned_wide = torch.empty_like(self.halves)
        turned = self.turned.view(1, H + K, 1, C)
        self.new_query, self.new_key = turned[:, :H], turned[:, H:]

    @torch.inference_mode()
    def logits(self, token: int) -> Tensor:
        """The logits of the token after this one, [V]. The cache takes this one in.

        Raises:
            InputError: when the cache is full.
        """
        position = self.cache.length
        if position == self.cache.max_length:
            raise InputError(f"{position + 1} tokens do not fit a cache of {position}")
        cos, sin = self.cos[position], self.sin[position]  # [2, C/2], [C/2]
        self.x.copy_(self.model.embed_tokens.weight[token])
        with _fast_products(self.dtype):
            for layer, weights in enumerate(self.layers):
                self._attention(layer, weights, cos, sin, -sin)
                self._mlp(weights)
            self.cache.length += 1
            return torch.mv(self.model.head_weight, self._norm(self.model.norm.weight))

    def _attention(self, layer: int, weights: _Weights, cos: Tensor, sin: Tensor, minus_sin: Tensor) -> None:
        """x ← x + self_attn(input_layernorm(x))."""
        normed = self._norm(weights.attention_norm)
        torch.mv(weights.query, normed, out=self.query)
        torch.mv(weights.key, normed, out=self.key)
        torch.mv(weights.value, normed, out=self.value)
        halves, turned = self.halves.copy_(self.unturned), self.turned_wide
        torch.mul(halves, cos, out=turned)  # (a cos, b cos)
        turned[:, 0].addcmul_(halves[:, 1], minus_sin)  # a cos − b sin
        turned[:, 1].addcmul_(halves[:, 0], sin)  # b cos + a sin
        self.turned.copy_(turned)
        keys, values = self.cache.append(layer, self.new_key, self.new_value)  # [1, K, S, C]
        mixed = attend(self.new_query, keys, values, None)  # [1, H, 1, C]
        self.x.add_(torch.mv(weights.output, mixed.view(-1), out=self.written))

    def _mlp(self, weights: _Weights) -> None:
        """x ← x + mlp(post_attention_layernorm(x))."""
        normed = self._norm(weights.mlp_norm)
        gate, up = torch.mv(weights.gate, normed, out=self.gate), torch.mv(weights.up, normed, out=self.up)
        torch.ops.aten.silu_(gate).mul_(up)
        self.x.add_(torch.mv(weights.down, gate, out=self.written))

    def _norm(self, weight: Tensor) -> Tensor:
        """x, normalised: [D]."""
        wide = self.wide.copy_(self.x)
        scale = 1 / math.sqrt(torch.dot(wide, wide).item() / len(wide) + self.eps)
        return torch.mul(wide, scale, out=self.normed).mul_(weight)


@contextmanager
def _fast_products(dtype: torch.dtype) -> Iterator[None]:
    """In bfloat16, leave products with one vector to PyTorch's own kernel.

    By default oneDNN does them, which is the better one for many tokens; but it rearranges each weight before it uses
    it, and for one token that takes longer than the product, up to twice as long for small matrices. Both add in
    float32.
    """
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of the module
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
