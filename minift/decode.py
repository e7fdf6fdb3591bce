"""One text, one more token, on a CPU: the model's forward pass with nothing in it but arithmetic.

A new token has to read every weight once, and does next to nothing with it: the matrix-vector products of a layer take
as long as memory takes to deliver the matrices, and `_Product` comes near that. What lies between them is small, but in
`model.py` it is fifty operations a layer, each with a new tensor for its result, and modules that call modules; for a
small model that takes longer than the products. Here the same arithmetic, rounded in the same places, goes into memory
that is there already.

    decoder = Decoder(model, cache, tokens=64)  # the cache already holds the prompt
    logits = decoder.logits(token)              # int -> [V]

The slow twin is `Llama.hidden` with one token and a cache. Read next: `evaluate.py`.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.errors import InputError
from minift.model import DecoderLayer, KVCache, Llama, rope_tables

NARROW = 2_048  # columns: for fewer, PyTorch's product of a bfloat16 matrix and a vector is far from what memory gives
TRANSPOSING_PAYS = 32  # tokens: copying the weights takes as long as what it saves on about twenty


class _Product:
    """y = W x for matrices W below each other, each [M_i, N], into y [M], which is there already: M is their sum.

    A CPU's memory delivers a bfloat16 matrix of few columns faster than `torch.mv` asks for it: that adds up each row
    on its own, and a row is over before it gets into its stride. But W x is also the sum of W's columns, each times a
    number of x; and a weighted sum of a table's rows is what `embedding_bag` is made for. Its table is W transposed, a
    copy, in parts that stand one behind the other, each [N, some of M]: the threads share them, and read each in one
    go.
    """

    def __init__(self, y: Tensor, matrices: Sequence[Tensor], transpose: bool):
        self.y, self.matrices = y, matrices
        sizes, N = [len(matrix) for matrix in matrices], matrices[0].shape[1]
        self.parts = y.split(sizes)
        width = _width(sizes) if transpose and y.dtype == torch.bfloat16 and N < NARROW else None
        self.transposed = width is not None
        if width is not None:
            P = len(y) // width
            table = torch.empty(P, N, width, dtype=y.dtype)
            for parts, matrix in zip(table.split([size // width for size in sizes]), matrices, strict=True):
                parts.copy_(matrix.view(-1, width, N).transpose(1, 2))
            self.table, self.ids, self.starts = table.view(P * N, width), torch.arange(P * N), torch.arange(P) * N
            self.weights = torch.empty(P, N, dtype=y.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """y [M] for x [N]. The next call writes over it."""
        if self.transposed:
            weights = self.weights.copy_(x).view(-1)
            sums = torch.embedding_bag(self.table, self.ids, self.starts, mode=0, per_sample_weights=weights)[0]
            return self.y.copy_(sums.view(-1))
        for matrix, part in zip(self.matrices, self.parts, strict=True):
            torch.mv(matrix, x, out=part)
        return self.y


def _width(sizes: Sequence[int]) -> int | None:
    """Numbers of y in a part: a divisor of all sizes, so that no part is of two matrices; None if it must be tiny."""
    whole = math.gcd(*sizes)
    most = min(384, sum(sizes) // torch.get_num_threads())  # a part's sums stay in registers, and no thread has none
    below, above = range(min(most, whole), 31, -1), range(max(most + 1, 32), whole + 1)
    return next((width for width in chain(below, above) if whole % width == 0), None)


class _Layer(NamedTuple):
    """A decoder layer's, as it is in the model: looking it up in modules takes as long as an operation."""

    attention_norm: Tensor  # [D]
    query_key_value: _Product  # [(H + 2 K) C, D]
    output: _Product  # [D, H C]
    mlp_norm: Tensor  # [D]
    gate_up: _Product  # [2 F, D]
    down: _Product  # [D, F]


class Decoder:
    """The logits after one more token of one text, whose earlier ones are in the cache.

    The legend is `model.py`'s. All memory for what is between two products is taken once, here. `tokens` is how many
    will be asked for at most: for more than a few, narrow bfloat16 weights are copied into a faster layout, so they
    must not change on the way.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, cache: KVCache, tokens: int):
        config = model.config
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.cache, self.eps = cache, config.rms_norm_eps
        self.embedding, self.norm = model.embed_tokens.weight, model.norm.weight
        dtype, transpose = self.embedding.dtype, tokens >= TRANSPOSING_PAYS
        positions = torch.arange(cache.max_length)[None]
        cos, sin = rope_tables(positions, C, config.rope_theta, config.rope_scaling)
        self.cos, self.sin = cos.view(-1, 2, C // 2), sin.view(-1, 2, C // 2)[:, 0]  # both halves of sin are the same

        def vector(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.x, written, self.normed, self.wide = vector(D), vector(D), vector(D), vector(D, dtype=torch.float32)
        hidden = vector(2 * config.intermediate_size)
        self.gate, self.up = hidden.chunk(2)
        projected = vector((H + 2 * K) * C)
        self.new_value = projected[(H + K) * C :].view(1, K, 1, C)
        # RoPE turns query and key together, in float32: halves a and b of each head's channels.
        self.unturned = projected[: (H + K) * C].view(H + K, 2, C // 2)
        self.halves, self.turned = vector(H + K, 2, C // 2, dtype=torch.float32), vector(H + K, 2, C // 2)
        self.turned_wide = torch.empty_like(self.halves)
        turned = self.turned.view(H + K, C)
        self.new_query, self.new_key = turned[:H].view(1, K, H // K, C), turned[H:].view(1, K, 1, C)
        self.layers = []
        for module in model.layers:
            layer = cast(DecoderLayer, module)
            attention, mlp = layer.self_attn, layer.mlp
            inwards = (attention.q_proj, attention.k_proj, attention.v_proj)
            self.layers.append(
                _Layer(
                    layer.input_layernorm.weight,
                    _Product(projected, [part.matrix for part in inwards], transpose),
                    _Product(written, [attention.o_proj.matrix], transpose),
                    layer.post_attention_layernorm.weight,
                    _Product(hidden, [mlp.gate_proj.matrix, mlp.up_proj.matrix], transpose),
                    _Product(written, [mlp.down_proj.matrix], transpose),
                )
            )
        self.head = _Product(vector(config.vocab_size), [model.head_weight], transpose)

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
        self.x.copy_(self.embedding[token])
        for i, layer in enumerate(self.layers):
            self._attention(i, layer, cos, sin, -sin)
            self._mlp(layer)
        self.cache.length += 1
        return self.head(self._norm(self.norm)).clone()

    def _attention(self, i: int, layer: _Layer, cos: Tensor, sin: Tensor, minus_sin: Tensor) -> None:
        """x ← x + self_attn(input_layernorm(x))."""
        layer.query_key_value(self._norm(layer.attention_norm))
        halves, turned = self.halves.copy_(self.unturned), self.turned_wide
        torch.mul(halves, cos, out=turned)  # (a cos, b cos)
        turned[:, 0].addcmul_(halves[:, 1], minus_sin)  # a cos − b sin
        turned[:, 1].addcmul_(halves[:, 0], sin)  # b cos + a sin
        self.turned.copy_(turned)
        keys, values = self.cache.append(i, self.new_key, self.new_value)  # [1, K, S, C]
        # The query heads that share a key head go as its queries, so that it is read once, not once for each.
        mixed = F.scaled_dot_product_attention(self.new_query, keys, values)  # [1, K, H / K, C]
        self.x.add_(layer.output(mixed.reshape(-1)))

    def _mlp(self, layer: _Layer) -> None:
        """x ← x + mlp(post_attention_layernorm(x))."""
        layer.gate_up(self._norm(layer.mlp_norm))
        self.x.add_(layer.down(torch.ops.aten.silu_(self.gate).mul_(self.up)))

    def _norm(self, weight: Tensor) -> Tensor:
        """x, normalised: [D]."""
        wide = self.wide.copy_(self.x)
        scale = 1 / math.sqrt(torch.dot(wide, wide).item() / len(wide) + self.eps)
        return torch.mul(wide, scale, out=self.normed).mul_(weight)
