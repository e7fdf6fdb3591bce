"""Formulas by index: the second, slow form of every operation, written as it is in the papers.

Nothing here is used in training. Each function computes the same as its twin in the most direct way there is, with
loops where the formula has an index, so that a reader can check it by eye, and a test can hold its twin against it, in
value and in gradient (`tests/way/test_slow_twins.py`).

    here                     its twin
    rms_norm                 model.RMSNorm
    rope                     model.RoPE, model.rope_tables
    scaled_frequency         config.RopeScaling.apply
    attention                model.ScaledDotProduct
    swiglu                   model.MLP
    cross_entropy            loss.next_token_loss
    adamw_step               optim.make_optimizer, that is torch.optim.AdamW
    clip                     torch.nn.utils.get_total_norm, clip_grads_with_norm_
    greedy                   generate.generate with its cache
    token_log_probability    generate.sample (temperature, top-k, top-p)

Legend: B batch, T tokens, D model width, H query heads, K key/value heads, C head width, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minift.config import RopeScaling
from minift.model import Llama
from minift.pack import IGNORE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x_i · w_i / sqrt(mean_j x_j² + eps). x: […, D]. Source: arXiv 1910.07467, equation 4."""
    mean_square = torch.stack([x[..., j] ** 2 for j in range(x.shape[-1])]).sum(0) / x.shape[-1]
    return x / torch.sqrt(mean_square + eps).unsqueeze(-1) * weight


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Multiply each pair of channels, as a complex number a + bi, by e^(i · position · theta^(−2k/C)).

    Args:
        x: [B, H, T, C]; channel k is paired with channel k + C/2.
        positions: int64 [B, T].

    Source: arXiv 2104.09864, equation 14, in the half-split layout.
    """
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    rotated = []
    for k in range(half):
        angle = positions.to(x.dtype) * theta ** (-k / half)  # [B, T]
        rotated.append(pairs[..., k] * torch.polar(torch.ones_like(angle), angle)[:, None])
    result = torch.stack(rotated, dim=-1)
    return torch.cat((result.real, result.imag), dim=-1)


def scaled_frequency(frequency: float, scaling: RopeScaling) -> float:
    """Return the rotation of a pair of channels from one position to the next, with Llama 3.1's scaling.

    Source: `apply_scaling` in meta-llama/llama-models, whose constants are the fields of `scaling`.
    """
    wavelength = 2 * math.pi / frequency  # positions until the pair is back where it began
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    if wavelength < shortest:
        return frequency
    if wavelength > longest:
        return frequency / scaling.factor
    turns = scaling.original_max_position_embeddings / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def attention(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """softmax(q·k / √C) v, one query at a time, over the positions that it may see.

    Args:
        query: [B, H, T, C]; key, value: [B, K, T, C]. Query head h reads key/value head h // (H / K).
        document_ids: int64 [B, T]; a query sees only its own document. None: all of the past.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), equation 1.
    """
    B, H, T, C = query.shape
    group = H // key.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(t + 1) if document_ids is None or document_ids[b, s] == document_ids[b, t]]
                keys, values = key[b, h // group, seen], value[b, h // group, seen]  # [n, C]
                weights = torch.softmax(keys @ query[b, h, t] / math.sqrt(C), dim=0)  # [n]
                rows.append(weights @ values)
    return torch.stack(rows).view(B, H, T, C)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down (silu(gate x) ∘ up x), silu(z) = z / (1 + e^−z). Source: arXiv 2002.05202, equation 6."""
    z = x @ gate.T
    return (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """The summed −log softmax(hidden weightᵀ)[target] with all logits at once, and the number of targets.

    hidden: [B, T, D]; weight: [V, D]; targets: int64 [B, T] or IGNORE.
    """
    log_probabilities = torch.log_softmax(hidden @ weight.T, dim=-1)  # [B, T, V]
    terms = [
        -log_probabilities[b, t, targets[b, t]]
        for b in range(targets.shape[0])
        for t in range(targets.shape[1])
        if targets[b, t] != IGNORE
    ]
    return torch.stack(terms).sum(), len(terms)


def adamw_step(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW; `step` counts from 1. Returns the new (weight, mean, square).

    Source: arXiv 1711.05101, algorithm 2 (the decay scaled by the learning rate, as in PyTorch).
    """
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    unbiased_mean = mean / (1 - beta1**step)
    unbiased_square = square / (1 - beta2**step)
    weight = weight - lr * weight_decay * weight
    return weight - lr * unbiased_mean / (torch.sqrt(unbiased_square) + eps), mean, square


def clip(gradients: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """All gradients scaled by one factor so that their joint 2-norm is at most `max_norm`; and the norm before.

    Source: Pascanu et al. (arXiv 1211.5063), algorithm 1.
    """
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return [gradient * factor for gradient in gradients], norm


@torch.no_grad()
def greedy(model: Llama, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The likeliest continuation of one prompt, the whole text read anew for each token. Ends before EOS."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[0, -1]
        best = int(logits.argmax())
        if best in model.config.eos_token_ids:
            break
        ids.append(best)
    return ids[len(prompt) :]


def token_log_probability(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The log-probability with which `sample` chooses each id. logits: [V] → [V], −inf for those never chosen.

    Source of top-p: Holtzman et al. (arXiv 1904.09751), equation 2: the smallest set of likeliest ids that holds
    probability `top_p`.
    """
    probability = torch.softmax(logits.double() / temperature, dim=0)
    order = sorted(range(len(logits)), key=lambda i: -float(probability[i]))
    allowed = order[:top_k] if top_k else order
    total = sum(float(probability[i]) for i in allowed)
    kept, mass = [], 0.0
    for i in allowed:
        if mass >= top_p:
            break
        kept.append(i)
        mass += float(probability[i]) / total
    result = torch.full_like(probability, -math.inf)
    for i in kept:
        result[i] = math.log(float(probability[i]) / sum(float(probability[j]) for j in kept))
    return result
