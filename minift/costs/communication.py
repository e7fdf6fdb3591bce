"""What several cards send each other, and what they make of a model: on paper.

*What is sent* in a step is exact: `communication` has the calls and bytes of DDP and of FSDP, and a test counts them
in a running step. *How long it takes*, and so what a thousand cards make of a model, is a plan: bytes over a data
sheet's bandwidth, operations over a share of the peak, the two overlapped as well as can be. Latency, stragglers and a
shared network are not in it.

    minift info --config llama2-7b --world 64

Read next: `look/report.py`.
"""

from dataclasses import dataclass

from minift.config import LlamaConfig
from minift.costs.flops import (
    BYTES,
    count_parameters,
    layer_shapes,
    training_flops_per_token,
    training_memory,
)

# What a plan for many cards rests on: NVIDIA's data sheets of the H200 and of a node of eight with one 400 Gb/s network
# card for each, one direction of each link.
CARD_BYTES = 141e9
CARD_FLOPS = 989e12
NODE = 8
NODE_BANDWIDTH = 450e9  # bytes a second from card to card inside a node
NETWORK_BANDWIDTH = 50e9  # … and between nodes
# Not from a data sheet, nor measured here: what a card alone makes of its peak, and what collectives make of a link.
ALONE = 0.5
LINK = 0.8
BUCKETS = (2**20, 25 * 2**20)  # DDP sends its first bytes of gradients early, and then 25 MiB at a time


@dataclass(frozen=True)
class Collective:
    """A kind of exchange between the ranks in one step.

    Attributes:
        calls: how often.
        nbytes: of all its tensors, each counted whole (what is gathered, or what is to be split).
    """

    calls: int
    nbytes: int

    def sent(self, kind: str, ranks: int) -> float:
        """Bytes that each rank sends in a ring (Thakur et al., 2005); an all-reduce goes round twice."""
        return self.nbytes * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)


def communication(
    config: LlamaConfig, parallel: str, ranks: int, dtype: str, micro_batches: int = 1
) -> dict[str, Collective]:
    """What the ranks exchange in a step in which all weights are trained, by kind; the few numbers by which they agree
    (targets, losses, whether to stop) are left out.

    Args:
        parallel: ddp or fsdp.
        dtype: of the arithmetic; under fsdp also of the layers' weights on their way.
        micro_batches: of a step. DDP's gradients are sent once; FSDP puts the weights together for each.
    """
    total = count_parameters(config).total
    if parallel == "ddp":
        return {"all-reduce": Collective(_buckets(config), 4 * total)}
    L = config.num_hidden_layers
    padded_layer = sum(-(-rows // ranks) * ranks * width for rows, width in layer_shapes(config))
    padded_root = -(-config.vocab_size // ranks) * ranks * config.hidden_size
    padded_root = padded_root * (1 if config.tie_word_embeddings else 2) + -(-config.hidden_size // ranks) * ranks
    gathered = micro_batches * (2 * L * BYTES[dtype] * padded_layer + 4 * padded_root)
    return {
        "all-gather": Collective(micro_batches * (2 * L + 1), gathered),  # a layer once in each direction
        "reduce-scatter": Collective(L + 1, 4 * (L * padded_layer + padded_root)),
        "all-reduce": Collective(1, 4 * (9 * L + (2 if config.tie_word_embeddings else 3))),  # norms of gradients
    }


@dataclass(frozen=True)
class ScalePlan:
    """A training step of one sequence a card on `cards` H200s, on paper.

    Attributes:
        parallel: alone for one card; ddp where a card holds everything; fsdp over all cards; or, where the network
            would be too slow for that, fsdp inside each node and gradients added up between nodes ("fsdp x ddp", which
            minift does not have).
        card_bytes: memory of each card, with activation checkpointing.
        sent_bytes: bytes that each card sends in a step, inside a node and between nodes.
        compute_seconds, communication_seconds: of a step; the two overlap.
        mfu: expected.
    """

    parallel: str
    cards: int
    card_bytes: int
    sent_bytes: tuple[float, float]
    compute_seconds: float
    communication_seconds: float
    mfu: float


def plan(config: LlamaConfig, cards: int, length: int, batch_size: int = 1) -> ScalePlan | None:
    """The fastest way, on paper, in which a model fits that many cards; None where it fits in none.

    A step has one micro-batch of `batch_size` rows of `length` tokens on each card. What is sent takes its bytes over
    the bandwidth, what is computed takes as long as on one card (ALONE of its peak, recomputed activations aside), and
    the longer of the two decides.
    """
    ways = ("ddp", "fsdp", "fsdp x ddp") if cards > 1 else ("alone",)
    fitting = [made for way in ways if (made := _plan(config, cards, length, batch_size, way))]
    return max(fitting, key=lambda made: made.mfu, default=None)


def _plan(config: LlamaConfig, cards: int, length: int, batch_size: int, way: str) -> ScalePlan | None:
    if way == "fsdp x ddp" and cards <= NODE:
        return None
    shards = {"fsdp": cards, "fsdp x ddp": NODE}.get(way)
    ledger = training_memory(config, "bfloat16", batch_size, length, device="cuda", ranks=shards)
    tokens = batch_size * length
    kept = "activations for the backward pass"  # only each layer's input, and one layer's at a time
    ledger[kept] = ledger[kept] // config.num_hidden_layers + 4 * tokens * config.hidden_size * config.num_hidden_layers
    if sum(ledger.values()) > 0.95 * CARD_BYTES:
        return None
    inside = between = 0.0
    if way == "ddp":
        sent = sum(each.sent(kind, cards) for kind, each in communication(config, "ddp", cards, "bfloat16").items())
        inside, between = (sent, 0.0) if cards <= NODE else (0.0, sent)
    elif shards is not None:
        kinds = communication(config, "fsdp", shards, "bfloat16").items()
        sent = sum(each.sent(kind, shards) for kind, each in kinds)
        inside, between = (sent, 0.0) if shards <= NODE else (0.0, sent)
        if way == "fsdp x ddp":
            between = 2 * 4 * count_parameters(config).total / NODE * (1 - NODE / cards)
    flops = tokens * training_flops_per_token(config, length)
    compute = flops / (ALONE * CARD_FLOPS)
    talk = inside / (LINK * NODE_BANDWIDTH) + between / (LINK * NETWORK_BANDWIDTH)
    mfu = ALONE * compute / max(compute, talk)
    return ScalePlan(way, cards, sum(ledger.values()), (inside, between), compute, talk, mfu)


def _buckets(config: LlamaConfig) -> int:
    """Into how many pieces DDP cuts the gradients: from the last parameter on, each as soon as it is large enough."""
    head = [] if config.tie_word_embeddings else [(config.vocab_size, config.hidden_size)]
    norm, embedding = (config.hidden_size, 1), (config.vocab_size, config.hidden_size)
    shapes = [embedding, *layer_shapes(config) * config.num_hidden_layers, norm, *head]
    pieces, filled = 0, 0
    for rows, width in reversed(shapes):
        filled += 4 * rows * width
        if filled >= BUCKETS[pieces > 0]:
            pieces, filled = pieces + 1, 0
    return pieces + (filled > 0)
