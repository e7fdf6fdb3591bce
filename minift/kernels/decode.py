"""One text, one more token, on a CPU: the model's forward pass with nothing in it but arithmetic.

Plain twin: `Llama.hidden` with one token and a cache. Taken for one text on a CPU. A new token has to read every weight
once, and does next to nothing with it: the matrix-vector products of a layer take as long as memory takes to deliver
the matrices, and `_Products` comes near that. What is between them is small, but in `model.py` it is fifty operations a
layer, each with a new tensor for its result, and modules that call modules; for a small model that takes longer than
the products. Here the same arithmetic, rounded in the same places, is half as many operations, and its results go into
memory that is there already.

    decoder = Decoder(model, cache, tokens=64)  # the cache already holds the prompt
    logits = decoder.logits(token)              # int -> [V]

    python -m benchmarks generate                    # smollm2-135m: 3.0 x `transformers` on two Xeon cores
    python -m benchmarks generate --dtype float32    # 1.8 x as fast as without the copies, on a core of an EPYC
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.cache import KVCache
from minift.errors import InputError
from minift.lora import effective_matrix
from minift.model import DecoderLayer, Llama, rope_tables

NARROW = 2_048  # columns: for fewer, PyTorch's product of a matrix and a vector is far from memory's speed
STREAMS = 4  # places at which a product reads a table at once; from memory, up to 1.6 x as fast as one place
BLOCK = 32  # rows of a float32 matrix that a thread multiplies at a time, where it is not transposed
SUMS_IN_REGISTERS = {"AVX2": 96}  # 12 of 16 registers of 8 numbers: 1.1 x as fast as 384; elsewhere 24 of 32 of 16
TRANSPOSING_PAYS = {  # tokens: a copy takes as long as what it saves on 3 to 12 of them; in float32 on about 20
    torch.bfloat16: 12,
    torch.float32: 32,
}


class _Products:
    """y = W x with the W of each layer in turn: matrices [M_i, N] below each other, of the same shapes in all layers.

    A CPU's memory delivers a matrix of few columns faster than `torch.mv` asks for it: that adds up each row on its
    own, and a row is too short for the CPU to fetch ahead; in float32 it is also the work of one thread. But W x is
    also the sum of W's columns, each times a number of x; and a weighted sum of a table's rows is what `embedding_bag`
    is made for. Its table is W transposed, a copy, in P parts one after the other, each [N, M / P] with M the sum of
    M_i: the threads share them. A thread reads its part at a few places in turn: the CPU fetches ahead at each of them,
    but only a little way. So W's first column is a part's first row, and its second column is a quarter of the part
    further on.

    Where a float32 W is not transposed, blocks of its rows go through `torch.bmm`: it gives them to all threads.

    Attributes:
        x: [P, N], each row the vector. The caller writes it there.
        shape: of y, (P, M / P).
        transposed: whether W is. If it is not, P is 1.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], transpose: bool):
        first, sizes = layers[0][0], [len(matrix) for matrix in layers[0]]
        M, N, dtype = sum(sizes), first.shape[1], first.dtype
        width = _width(sizes) if transpose and _pays_to_transpose(first) else None
        self.transposed = width is not None
        P = M // width if width else 1
        self.shape = (P, M // P)
        self.x = torch.empty(P, N, dtype=dtype)
        if width:
            self.tables = [_transposed(matrices, width) for matrices in layers]
            # The same ids for all layers, of 32 bits: of 64, and each layer's own, they are 1 % of all that is read.
            rows = torch.arange(P * N, dtype=torch.int32)
            self.starts, self.weights = rows[::N].contiguous(), self.x.view(-1)
            self.ids = rows.view(P, _streams(N), -1).transpose(1, 2).flatten()
            return
        self.y = torch.empty(1, M, dtype=dtype)
        parts = self.y[0].split(sizes)
        self.multiply = torch.bmm if dtype == torch.float32 else torch.mv
        operands = _by_blocks if dtype == torch.float32 else _whole
        self.products = [[operands(*one, self.x) for one in zip(matrices, parts, strict=True)] for matrices in layers]

    def __call__(self, i: int) -> Tensor:
        """Return layer i's y, in its shape. The next call may overwrite it."""
        if self.transposed:
            weights, table = self.weights, self.tables[i]
            return torch.embedding_bag(table, self.ids, self.starts, mode=0, per_sample_weights=weights)[0]
        for a, b, part in self.products[i]:
            self.multiply(a, b, out=part)
        return self.y


def _pays_to_transpose(matrix: Tensor) -> bool:
    """Return whether a transposed copy of a matrix is read faster: of few columns, in bfloat16, and float32 on x86."""
    if matrix.shape[1] >= NARROW or not hasattr(torch, "embedding_bag"):  # undocumented
        return False
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return matrix.dtype == torch.bfloat16 or (matrix.dtype == torch.float32 and x86)


def _whole(matrix: Tensor, part: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.mv` multiplies, and where it writes: [M, N], [N] and [M]."""
    return matrix, x[0], part


def _by_blocks(matrix: Tensor, part: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.bmm` multiplies, and where it writes: [blocks, 1, N], [blocks, N, rows], [blocks, 1, rows]."""
    (M, N), rows = matrix.shape, math.gcd(len(matrix), BLOCK)
    return x.expand(M // rows, 1, N), matrix.view(-1, rows, N).mT, part.view(-1, 1, rows)


def _width(sizes: Sequence[int]) -> int | None:
    """Return the numbers of y in a part: a divisor of all sizes, so that a part is of one matrix; None if it is tiny.

    The thread with the most parts decides how long a product takes; of the widths with which that is shortest, it is
    the widest one whose sums stay in registers.
    """
    common, threads = math.gcd(*sizes), torch.get_num_threads()
    most = SUMS_IN_REGISTERS.get(torch.backends.cpu.get_cpu_capability(), 384)
    few = [width for width in range(32, min(common, most) + 1) if common % width == 0]
    if not few:
        return next((width for width in range(most + 1, common + 1) if common % width == 0), None)
    return min(few, key=lambda width: (math.ceil(sum(sizes) / width / threads) * width, -width))


def _transposed(matrices: Sequence[Tensor], width: int) -> Tensor:
    """Matrices [M_i, N] → [P N, width]: the columns of the first `width` rows, stream by stream, then of the next."""
    sizes, N = [len(matrix) for matrix in matrices], matrices[0].shape[1]
    S = _streams(N)
    table = torch.empty(sum(sizes) // width, S, N // S, width, dtype=matrices[0].dtype)
    for parts, matrix in zip(table.split([size // width for size in sizes]), matrices, strict=True):
        parts.copy_(matrix.view(-1, width, N // S, S).permute(0, 3, 2, 1))
    return table.view(-1, width)


def _streams(N: int) -> int:
    """Return at how many places a part of N rows is read in turn: they must be equally far apart."""
    return math.gcd(N, STREAMS)


class Decoder:
    """The logits after one more token of one text, whose earlier ones are in the cache.

    The legend is `model.py`'s. All memory for what is between two products is allocated once, here, and so are its
    views: a product reads more than the CPU's caches hold, so after it every operation, new tensor or view takes
    several times as long as when it is repeated on its own. `tokens` is how many will be asked for at most: for more
    than a few, narrow weights are copied into a faster layout: as many bytes again, while the decoder lives. They must
    not change meanwhile. Models of NARROW channels or more have no narrow weights, so a copy is of a small model.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, cache: KVCache, tokens: int):
        config = model.config
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.cache, self.eps, self.embedding = cache, config.rms_norm_eps, model.embed_tokens.weight
        dtype = self.embedding.dtype
        transpose = tokens >= TRANSPOSING_PAYS.get(dtype, math.inf)
        positions = torch.arange(cache.max_length)[None]
        cos, sin = rope_tables(positions, C, config.rope_theta, config.rope_scaling)
        self.rotations = torch.complex(cos, sin).view(-1, 2, C // 2)[:, 0]  # [S_max, C / 2]; the other half is alike

        layers = [cast(DecoderLayer, layer) for layer in model.layers]
        inwards = [(one.q_proj, one.k_proj, one.v_proj) for one in (layer.self_attn for layer in layers)]
        self.query_key_value = _Products([[effective_matrix(part) for part in parts] for parts in inwards], transpose)
        self.output = _Products([[effective_matrix(layer.self_attn.o_proj)] for layer in layers], transpose)
        mlps = [layer.mlp for layer in layers]
        self.gate_up = _Products(
            [[effective_matrix(mlp.gate_proj), effective_matrix(mlp.up_proj)] for mlp in mlps], transpose
        )
        self.down = _Products([[effective_matrix(mlp.down_proj)] for mlp in mlps], transpose)
        self.head = _Products([[model.head_weight]], transpose)
        # A norm's weight, as many times as the next product needs the vector.
        self.attention_norms = [layer.input_layernorm.weight.expand_as(self.query_key_value.x) for layer in layers]
        self.mlp_norms = [layer.post_attention_layernorm.weight.expand_as(self.gate_up.x) for layer in layers]
        self.norm = model.norm.weight.expand_as(self.head.x)

        # What is between the products: the stream, and it in float32; query, key and value; gate and up.
        self.x, self.normed = torch.empty(2, D, dtype=dtype)
        self.wide = torch.empty(D)
        self.x_output, self.x_down = self.x.view(self.output.shape), self.x.view(self.down.shape)
        self.projected = torch.empty(self.query_key_value.shape, dtype=dtype)
        query, key_value = self.projected.view(-1, C).split([H, 2 * K])
        self.query, self.key_value = query.view(1, K, H // K, C), key_value.view(2, 1, K, C)
        self.mixed = self.output.x.view(-1, K, H // K, C)
        # RoPE rotates query and key together, in float32: the halves a and b of each head's channels, as a + b i.
        self.halves = self.projected.view(-1, 2, C // 2)[: H + K].transpose(1, 2)  # [H + K, C / 2, 2]
        self.unrotated, self.rotated = torch.empty(2, H + K, C // 2, 2)
        self.complex = torch.view_as_complex(self.unrotated)
        self.rotated_complex = torch.view_as_complex(self.rotated)
        self.hidden = torch.empty(self.gate_up.shape, dtype=dtype)
        self.gate, self.up = self.hidden.view(-1).chunk(2)
        self.activated = self.gate.expand_as(self.down.x)

    @torch.inference_mode()
    def logits(self, token: int) -> Tensor:
        """Return the logits of the token after this one, [V]. The cache takes this one in.

        Raises:
            InputError: when the cache is full.
        """
        position = self.cache.length
        if position == self.cache.max_length:
            raise InputError(f"{position + 1} tokens do not fit a cache of {position}")
        rotation = self.rotations[position]
        self.x.copy_(self.embedding[token])
        for i, (room, keys, values) in enumerate(_one_more(self.cache)):
            self._attention(i, rotation, room, keys, values)
            self._mlp(i)
        self.cache.length += 1
        self._normalise(self.norm, self.head.x)
        return self.head(0).flatten().clone()

    def _attention(self, i: int, rotation: Tensor, room: Tensor, keys: Tensor, values: Tensor) -> None:
        """x ← x + self_attn(input_layernorm(x))."""
        self._normalise(self.attention_norms[i], self.query_key_value.x)
        self.projected.copy_(self.query_key_value(i))
        self.unrotated.copy_(self.halves)
        torch.mul(self.complex, rotation, out=self.rotated_complex)
        self.halves.copy_(self.rotated)
        room.copy_(self.key_value)
        # The query heads that share a key head go as its queries, so that it is read once, not once for each.
        self.mixed.copy_(F.scaled_dot_product_attention(self.query, keys, values))  # [1, K, H / K, C]
        self.x_output.add_(self.output(i))

    def _mlp(self, i: int) -> None:
        """x ← x + mlp(post_attention_layernorm(x))."""
        self._normalise(self.mlp_norms[i], self.gate_up.x)
        self.hidden.copy_(self.gate_up(i))
        F.silu(self.gate, inplace=True)
        torch.mul(self.activated, self.up, out=self.down.x)
        self.x_down.add_(self.down(i))

    def _normalise(self, weight: Tensor, out: Tensor) -> None:
        """Write x, normalised, into each row of `out`, [P, D]."""
        wide = self.wide.copy_(self.x)
        scale = 1 / math.sqrt(torch.dot(wide, wide).item() / len(wide) + self.eps)
        torch.mul(torch.mul(self.x, scale, out=self.normed), weight, out=out)


def _one_more(cache: KVCache) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each layer where a new token's key and value belong, [2, B, K, C], and the keys and the values of all S
    tokens, it included, [B, K, S, C] each: `KVCache.append` for a caller who stores them itself."""
    rooms, (keys, values) = cache.stored[..., cache.length, :], cache.stored[..., : cache.length + 1, :].unbind(1)
    return zip(rooms.unbind(), keys.unbind(), values.unbind(), strict=True)
