"""Compute the operations as a textbook has them: each in a few plain tensor operations, with nothing fused.

`python -m benchmarks ops` compares what trains with these. (The functions of `minift/reference.py` are for correctness:
they loop over indices, and a step of them would take hours.) They return the same values, gradients and dtypes as the
functions that train; `tests/benchmarks/test_ops.py` checks this. Two need no function: the embedding is
`weight[tokens]`, and a projection `x @ weight.T`.

Legend: B batch, T tokens of a row, N = B·T, D model width, H query heads, K key/value heads, C head width, V
vocabulary.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.config import TrainConfig
from minift.model import DecoderLayer, Llama
from minift.optim import parameter_groups
from minift.pack import IGNORE


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm, one operation at a time; see `reference.rms_norm`. x: […, D]."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels as complex numbers; see `reference.rope`. x: [B, H, T, C]; cos, sin: [B, 1, T, C]."""
    (a, b), half = x.float().chunk(2, dim=-1), x.shape[-1] // 2
    rotated = torch.complex(a, b) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat((rotated.real, rotated.imag), dim=-1).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with all T² scores; see `reference.attention`. query: [B, H, T, C]; key, value: [B, K, T, C]."""
    (_, H, T, C), K = query.shape, key.shape[1]
    key, value = key.repeat_interleave(H // K, 1), value.repeat_interleave(H // K, 1)
    future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(-2, -1) / math.sqrt(C)).masked_fill(future, -math.inf)  # [B, H, T, T]
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Apply SwiGLU, with silu by its formula; see `reference.swiglu`. x: […, D]."""
    z = x @ gate.T
    return (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T


def layer(weights: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a decoder layer with its residual additions. x: [B, T, D]; cos, sin: [B, 1, T, C]."""
    one, two, (B, T, _) = weights.self_attn, weights.mlp, x.shape
    first, second = weights.input_layernorm, weights.post_attention_layernorm
    read = norm(x, first.weight, first.eps)
    query, key, value = (
        (read @ matrix.T).view(B, T, -1, cos.shape[-1]).transpose(1, 2)
        for matrix in (one.q_proj.weight, one.k_proj.weight, one.v_proj.weight)
    )
    mixed = attention(rope(query, cos, sin), rope(key, cos, sin), value).transpose(1, 2).reshape(B, T, -1)
    x = x + mixed @ one.o_proj.weight.T
    read = norm(x, second.weight, second.eps)
    return x + swiglu(read, two.gate_proj.weight, two.up_proj.weight, two.down_proj.weight)


def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the loss of all N·V logits, float32; see `reference.cross_entropy`. hidden: [B, T, D]; weight: [V, D]."""
    logits = (hidden @ weight.T).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def clip(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Clip to a global norm in place, one gradient after the other; see `reference.clip`."""
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    for gradient in gradients:
        gradient *= min(1.0, max_norm / norm)


def adamw(model: Llama, config: TrainConfig) -> torch.optim.AdamW:
    """Return PyTorch's AdamW as a loop: one parameter after the other, one small operation at a time."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, foreach=False
    )
