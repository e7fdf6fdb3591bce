"""What a model costs, on paper: parameters, floating-point operations, and a ledger of memory.

Legend: B batch, T sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width, V
vocabulary, L layers.

*Operations.* A product of [m, k] and [k, n] is 2·m·k·n operations: a multiplication and an addition each. Counted are
the matrix products, which are nearly all: 2 per weight and token, and in attention 4·H·C for each pair of tokens of
which one may see the other (q·kᵀ and the weighted sum of v). Causal attention makes (T + 1) / 2 such pairs a token, and
only those are counted. The backward pass is twice the forward pass; operations that are repeated to save memory do not
count. (The "model FLOPs" of Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B, without the half that causality
masks.)

*MFU*, the model FLOPs utilization, is these operations, for every token that was read, over what the device's data
sheet promises in the time. Each row counts as one document.

*Memory.* The ledger has a line for everything that is there at once when a training step is at its fullest, between the
forward and the backward pass, or when the last token of a full context is generated. It counts bytes of tensors, for
rows that hold one document each (a mask between documents takes more); the allocator's rounding and the workspaces of
kernels come on top.

    minift info --model bundled

Read next: `costs/communication.py`, for what several processes send each other.
"""

from dataclasses import dataclass

import torch

from minift.config import LONGEST_WRITTEN_OUT, LOSS_CHUNK, WIDE_HEAD, LlamaConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Dense products of bfloat16 or float16 matrices a second, by a part of the GPU's name: NVIDIA's data sheets, in which
# twice as much is "with sparsity".
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Parameters:
    """How many weights: all, those of the embedding and (where it is a matrix of its own) the head, and the rest."""

    total: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        """Weights of the layers and norms: what scaling laws call N."""
        return self.total - self.embedding


def count_parameters(config: LlamaConfig) -> Parameters:
    """The number of weights of a shape. A tied matrix counts once."""
    D, F, C, V = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    H, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    attention = D * H * C + 2 * D * K * C + H * C * D
    layer = attention + 3 * D * F + 2 * D  # three matrices of the feed-forward network, two norms
    embedding = V * D * (1 if config.tie_word_embeddings else 2)
    return Parameters(L * layer + D + embedding, embedding)


def forward_flops_per_token(config: LlamaConfig, length: int) -> float:
    """Operations of the forward pass for each token of a text of `length`, the head included."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    weights = L * (2 * D * H * C + 2 * D * K * C + 3 * D * F) + config.vocab_size * D
    pairs = (length + 1) / 2
    return 2 * weights + L * 4 * H * C * pairs


def training_flops_per_token(config: LlamaConfig, length: int) -> float:
    """Operations of a training step for each token: the forward pass, and twice as many backward."""
    return 3 * forward_flops_per_token(config, length)


def peak_flops(gpu: str, dtype: str) -> float | None:
    """What a GPU of this name could do at most, operations a second; None where it is not known."""
    if dtype == "float32":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def training_memory(
    config: LlamaConfig,
    dtype: str,
    batch_size: int,
    length: int,
    loss_chunk: int = LOSS_CHUNK,
    device: str = "cpu",
    trained: int | None = None,
    ranks: int | None = None,
) -> dict[str, int]:
    """Bytes at the fullest moment of a training step in one process, by what they are for.

    Args:
        dtype: of the arithmetic: float32, or bfloat16 or float16 by autocast. The weights are float32 in any case.
        batch_size, length: B rows of T tokens in a micro-batch.
        loss_chunk: targets whose logits exist at the same time.
        device: a CPU copies a wide head by columns, and takes a few rows at a time through the softmax (`loss.py`).
        trained: numbers of adapters that are trained in place of the weights (`lora.py`); None trains the weights. What
            the adapters themselves leave behind for the backward pass is not counted.
        ranks: among how many processes FSDP shards the model; None keeps it whole.
    """
    total = count_parameters(config).total
    head, size = config.vocab_size * config.hidden_size, BYTES[dtype]
    low = dtype != "float32"
    turned = device == "cpu" and config.vocab_size >= WIDE_HEAD
    adapters = trained or 0
    changed = total if trained is None else trained
    ledger = {"weights": 4 * (total + adapters), "gradients": 4 * changed, "AdamW's two moments": 8 * changed}
    if ranks is not None:  # the last shard of a tensor is padded to the size of the others: some bytes, not counted
        ledger = {name: nbytes // ranks for name, nbytes in ledger.items()}
        layer, root = layer_parameters(config), root_parameters(config)
        ledger["two layers, put together"] = 2 * size * layer  # one is computed, the next one is on its way
        ledger["embedding, head and norm, put together"] = 4 * root
        ledger["gradients before they are split"] = 4 * ((root if trained is None else 0) + layer)
    elif low:
        ledger["autocast's copies of matrices"] = 2 * (_matrices(config) + (0 if turned else head))
    tokens = batch_size * length
    plain = device == "cpu" and dtype == "bfloat16" and trained is None and ranks is None
    written_out = length if plain and length <= LONGEST_WRITTEN_OUT else None
    ledger["activations for the backward pass"] = tokens * _activation_bytes(config, dtype, device, written_out)
    own = 4 * head if trained is None else 0
    ledger["the loss's own gradients"] = own + size * tokens * config.hidden_size
    if turned:
        ledger["the head, by columns"] = size * head
    exact = 4 if device == "cuda" and low else 0  # a GPU takes all rows at once through the softmax, in float32
    ledger["logits of a chunk"] = min(loss_chunk, tokens) * config.vocab_size * (size + exact)
    return ledger


def inference_memory(config: LlamaConfig, dtype: str, batch_size: int, length: int) -> dict[str, int]:
    """Bytes while `batch_size` texts are generated up to `length` tokens, by what they are for."""
    size = BYTES[dtype]
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    return {
        "weights": size * count_parameters(config).total,
        "keys and values": batch_size * length * cache,
    }


def layer_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """Rows and columns of a layer's parameters, in the model's order; of a norm, which is a vector, one column."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    return [(H * C, D), (K * C, D), (K * C, D), (D, H * C), (F, D), (F, D), (D, F), (D, 1), (D, 1)]


def layer_parameters(config: LlamaConfig) -> int:
    """Weights of one layer."""
    return sum(rows * width for rows, width in layer_shapes(config))


def root_parameters(config: LlamaConfig) -> int:
    """Weights outside of the layers: embedding, head and the last norm."""
    return count_parameters(config).embedding + config.hidden_size


def _matrices(config: LlamaConfig) -> int:
    """Weights in the matrices of the layers."""
    parameters = count_parameters(config)
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    return parameters.without_embedding - norms


def _activation_bytes(config: LlamaConfig, dtype: str, device: str, written_out: int | None) -> int:
    """Bytes that each token leaves behind for the backward pass: what autograd saves, operation by operation.

    Args:
        written_out: tokens of a row where the layers go by `kernels/layer.py`, which keeps the weights of attention.
    """
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    if device == "cuda" and dtype == "float32":
        K = H  # no kernel lets heads share keys and values then: they are copied (`kernels/attention.py`)
    low = BYTES[dtype]
    norm = 4 * D + 4  # the stream is float32: each norm saves it normalised, and by what it was multiplied
    layer = 2 * norm + 2 * low * D  # what each norm gives, as the matrices read it
    layer += low * (2 * H * C + 2 * K * C)  # q, k, v and the result
    layer += 4 * H if written_out is None else low * H * written_out  # the sum of each softmax, or its weights
    layer += low * 4 * F  # gate, silu(gate), up, and their product
    return config.num_hidden_layers * layer + norm


def data_sheet_flops(device: torch.device, dtype: str) -> float | None:
    """What this machine's GPU could do at most, operations a second; None on a CPU, or where it is not known."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
