"""Count what several processes (ranks) send each other in a training step: collectives, and their bytes.

* DDP: every rank holds all weights. One *all-reduce* adds up the gradients, in buckets.
* FSDP: every rank holds a shard of each tensor. An *all-gather* completes the weights of a layer before it is computed,
  and a *reduce-scatter* adds up its gradients and leaves each rank its shard. So FSDP sends more, and holds less.

The numbers are formulas. `tests/runs/test_distributed.py` counts the collectives and bytes of a running step, and they
are equal. How long the messages take depends on the machine: `python -m benchmarks scale` measures it.

    minift info --config llama2-7b --world 8

Sources: Li et al., "PyTorch Distributed" (arXiv 2006.15704), for DDP's buckets; Rajbhandari et al., "ZeRO" (arXiv
1910.02054), section 7, for the bytes of sharding.
"""

from dataclasses import dataclass

from minift.config import LlamaConfig
from minift.costs.flops import BYTES, count_parameters, layer_shapes

BUCKETS = (2**20, 25 * 2**20)  # bytes: DDP's first bucket is small, so that sending begins early; then 25 MiB each


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        calls: their number.
        nbytes: the bytes of all their tensors, each counted complete (gathered, or before it is split).
    """

    calls: int
    nbytes: int

    def sent(self, kind: str, ranks: int) -> float:
        """Return the bytes that each rank sends in a ring (Thakur et al., 2005). An all-reduce goes round twice."""
        return self.nbytes * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)


def communication(
    config: LlamaConfig, parallel: str, ranks: int, dtype: str, micro_batches: int = 1
) -> dict[str, Collective]:
    """Return the collectives of a step in which all weights are trained, by kind.

    The few numbers on which the ranks agree (targets, losses, whether to stop) are left out.

    Args:
        parallel: ddp or fsdp.
        dtype: of the arithmetic; with fsdp also of the layers' weights as they are sent.
        micro_batches: of a step. DDP sends the gradients once; FSDP gathers the weights for each micro-batch.
    """
    if parallel == "ddp":
        return {"all-reduce": Collective(_buckets(config), 4 * count_parameters(config).total)}
    L, tied = config.num_hidden_layers, config.tie_word_embeddings
    layer = sum(_padded(rows, ranks) * columns for rows, columns in layer_shapes(config))
    embedding = _padded(config.vocab_size, ranks) * config.hidden_size
    root = embedding * (1 if tied else 2) + _padded(config.hidden_size, ranks)  # embedding, head and the last norm
    gathered = micro_batches * (2 * L * BYTES[dtype] * layer + 4 * root)
    return {
        "all-gather": Collective(micro_batches * (2 * L + 1), gathered),  # each layer in the forward and backward pass
        "reduce-scatter": Collective(L + 1, 4 * (L * layer + root)),
        "all-reduce": Collective(1, 4 * (9 * L + (2 if tied else 3))),  # the norm of each gradient
    }


def _padded(rows: int, ranks: int) -> int:
    """Return the rows of a tensor of which every rank holds equally many."""
    return -(-rows // ranks) * ranks


def _buckets(config: LlamaConfig) -> int:
    """Return the number of DDP's buckets: it fills them from the last parameter on, and sends each when it is full."""
    head = [] if config.tie_word_embeddings else [(config.vocab_size, config.hidden_size)]
    norm, embedding = (config.hidden_size, 1), (config.vocab_size, config.hidden_size)
    shapes = [embedding, *layer_shapes(config) * config.num_hidden_layers, norm, *head]
    buckets, filled = 0, 0
    for rows, columns in reversed(shapes):
        filled += 4 * rows * columns
        if filled >= BUCKETS[min(buckets, 1)]:
            buckets, filled = buckets + 1, 0
    return buckets + (filled > 0)
