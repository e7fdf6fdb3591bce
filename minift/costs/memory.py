"""Count the bytes of a training step or of a generated text: a ledger, with a line for each use of memory.

Legend: B batch, T sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width, V
vocabulary.

The ledger is of the moment when the most memory is used: in training, between the forward and the backward pass; in
inference, when the last token of a full context is generated. It counts the bytes of tensors, for rows that hold one
document each (a mask between documents takes more). The allocator's rounding and the workspaces of kernels come on top.

`python -m benchmarks memory` measures a real step next to it.

    minift info --model bundled --batch-size 16 --max-length 256
"""

from minift.config import LOSS_CHUNK, LlamaConfig
from minift.costs.flops import BYTES, count_parameters, layer_parameters, root_parameters
from minift.kernels.cross_entropy import WIDE_HEAD
from minift.kernels.layer import LONGEST


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
    """Return the bytes of a training step in one process, by what they are for.

    Args:
        dtype: of the arithmetic: float32, or bfloat16 or float16 by autocast. The weights are float32 in any case.
        batch_size, length: B rows of T tokens in a micro-batch.
        loss_chunk: targets whose logits exist at the same time.
        device: cpu or cuda; their losses hold different tensors (`kernels/`).
        trained: how many numbers of adapters are trained in place of the weights (`lora.py`); None: the weights are
            trained. What the adapters themselves save for the backward pass is not counted.
        ranks: how many processes FSDP shards the model among; None: the model is not sharded.
    """
    low = dtype != "float32"
    transposed_head = device == "cpu" and config.vocab_size >= WIDE_HEAD
    ledger = _state_bytes(config, trained)
    if ranks is not None:
        ledger = {name: nbytes // ranks for name, nbytes in ledger.items()}  # padding to equal shards is not counted
        ledger |= _gathered_bytes(config, dtype, trained)
    elif low:
        matrices = count_parameters(config).without_embedding - config.hidden_size * (2 * config.num_hidden_layers + 1)
        head = 0 if transposed_head else config.vocab_size * config.hidden_size
        ledger["autocast's copies of matrices"] = BYTES[dtype] * (matrices + head)
    written_out = device == "cpu" and dtype == "bfloat16" and trained is None and ranks is None
    kept_attention = length if written_out and length <= LONGEST else None
    tokens = batch_size * length
    activations = _activation_bytes(config, dtype, device, kept_attention)
    ledger["activations for the backward pass"] = tokens * activations
    return ledger | _loss_bytes(config, dtype, tokens, loss_chunk, device, trained, transposed_head)


def _state_bytes(config: LlamaConfig, trained: int | None) -> dict[str, int]:
    """Return the bytes of weights, gradients and moments, all in float32."""
    total = count_parameters(config).total
    changed = total if trained is None else trained
    return {"weights": 4 * (total + (trained or 0)), "gradients": 4 * changed, "AdamW's two moments": 8 * changed}


def _gathered_bytes(config: LlamaConfig, dtype: str, trained: int | None) -> dict[str, int]:
    """Return the bytes that FSDP holds on each rank in addition to its shards."""
    layer, root = layer_parameters(config), root_parameters(config)
    return {
        "two layers, gathered": 2 * BYTES[dtype] * layer,  # one is computed while the next one is received
        "embedding, head and norm, gathered": 4 * root,
        "gradients before they are split": 4 * ((root if trained is None else 0) + layer),
    }


def _activation_bytes(config: LlamaConfig, dtype: str, device: str, kept_attention: int | None) -> int:
    """Return the bytes that autograd saves for each token in all layers, operation by operation.

    Args:
        kept_attention: tokens of a row where the layers are those of `kernels/layer.py`, which keep the weights of
            attention; None: they keep the sum of each softmax.
    """
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    if device == "cuda" and dtype == "float32":
        K = H  # no fused kernel shares keys and values between heads then: they are copied (`kernels/attention.py`)
    low = BYTES[dtype]
    norm = 4 * D + 4  # the normalised stream in float32, and the number by which it was multiplied
    layer = 2 * norm + 2 * low * D  # the two norms, and their results as the matrices read them
    layer += low * (2 * H * C + 2 * K * C)  # q, k, v and the result
    layer += 4 * H if kept_attention is None else low * H * kept_attention
    layer += low * 4 * F  # gate, silu(gate), up, and their product
    return config.num_hidden_layers * layer + norm


def _loss_bytes(
    config: LlamaConfig,
    dtype: str,
    tokens: int,
    loss_chunk: int,
    device: str,
    trained: int | None,
    transposed_head: bool,
) -> dict[str, int]:
    """Return the bytes of the loss: its gradients, which the forward pass computes, and the logits of one chunk."""
    V, D, low = config.vocab_size, config.hidden_size, BYTES[dtype]
    ledger = {"the loss's own gradients": (4 * V * D if trained is None else 0) + low * tokens * D}
    if transposed_head:
        ledger["the head, by columns"] = low * V * D
    in_float32 = 4 if device == "cuda" and dtype != "float32" else 0  # a GPU's softmax holds a float32 copy
    ledger["logits of a chunk"] = min(loss_chunk, tokens) * V * (low + in_float32)
    return ledger


def inference_memory(config: LlamaConfig, dtype: str, batch_size: int, length: int) -> dict[str, int]:
    """Return the bytes while `batch_size` texts are generated up to `length` tokens, by what they are for."""
    size = BYTES[dtype]
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    return {
        "weights": size * count_parameters(config).total,
        "keys and values": batch_size * length * cache,
    }
