"""Count a model's weights and floating-point operations, from its config alone.

Legend: B batch, T sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width, V
vocabulary, L layers.

A product of [m, k] and [k, n] is 2·m·k·n operations: a multiplication and an addition each. Counted are the matrix
products, which are nearly all:

* 2 operations for each weight and token;
* in attention, 4·H·C for each pair of tokens of which one may attend to the other (q·kᵀ, and the weighted sum of v).
  Causal attention has (T + 1) / 2 such pairs for each token, and only those are counted.

The backward pass is twice the forward pass. Operations that are repeated to save memory do not count. These are the
"model FLOPs" of Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B, without the half that causality masks.

*MFU*, the model FLOPs utilization, is these operations, for every token that was read, divided by the peak of the
device's data sheet (`peaks.py`), for dense products of the run's dtype, in the same time. Each row counts as one
document.

    minift info --model bundled
"""

from dataclasses import dataclass

import torch

from minift.config import LlamaConfig
from minift.costs.peaks import peak_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: all of them, and those of the embedding and (where it is a matrix of its own) the head."""

    total: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        """Return the number of weights of the layers and norms: what scaling laws call N."""
        return self.total - self.embedding


def count_parameters(config: LlamaConfig) -> Parameters:
    """Return the numbers of weights of a shape. A tied matrix counts once."""
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    layers = config.num_hidden_layers * layer_parameters(config)
    return Parameters(layers + config.hidden_size + embedding, embedding)


def layer_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """Return rows and columns of a layer's parameters, in the model's order. A norm, a vector, has one column."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    return [(H * C, D), (K * C, D), (K * C, D), (D, H * C), (F, D), (F, D), (D, F), (D, 1), (D, 1)]


def layer_parameters(config: LlamaConfig) -> int:
    """Return the number of weights of one layer."""
    return sum(rows * columns for rows, columns in layer_shapes(config))


def root_parameters(config: LlamaConfig) -> int:
    """Return the number of weights outside of the layers: embedding, head and the last norm."""
    return count_parameters(config).embedding + config.hidden_size


def forward_flops_per_token(config: LlamaConfig, length: int) -> float:
    """Return the operations of the forward pass for each token of a text of `length` tokens, the head included."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    weights = L * (2 * D * H * C + 2 * D * K * C + 3 * D * F) + config.vocab_size * D
    pairs = (length + 1) / 2
    return 2 * weights + L * 4 * H * C * pairs


def training_flops_per_token(config: LlamaConfig, length: int) -> float:
    """Return the operations of a training step for each token: the forward pass, and twice as many backward."""
    return 3 * forward_flops_per_token(config, length)


def peak_flops(gpu: str, dtype: str) -> float | None:
    """Return the peak of dense products of a GPU of this name, operations a second, or None where it is not known.

    Args:
        gpu: as `torch.cuda.get_device_name` gives it.
        dtype: of the matrices. Those of "float32" are rounded to TF32 where PyTorch is told so; minift never does that,
            and its runs in float32 are a share of the rate of float32.
    """
    peak = peak_of(gpu)
    if peak is None:
        return None
    tf32 = dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak.flops("tf32" if tf32 and peak.tf32 else dtype)


def data_sheet_flops(device: torch.device, dtype: str) -> float | None:
    """Return the peak of this machine's GPU, operations a second; None on a CPU, or where it is not known."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
