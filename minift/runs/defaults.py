"""Choose the settings of a finetuning that are not given, from the number of its pairs and the size of its model.

    batch         a tenth of the pairs, from 4 to 32: an epoch has some ten steps
    length        10 epochs of a model below 30 million weights (fewer from 2,000 pairs on), 3 of a larger one; and at
                  least 100 steps
    lr            1e-4 up to the width of the bundled model, above it less, with the root of the width; up to twice as
                  much in a run of fewer steps than 350. Of adapters, 5e-3, falling with the width itself
    warm-up       3 % of the steps
    row           the longest pair, up to the positions of the model
    micro-batch   halved, and summed over twice as many, until a step fits into 80 % of the free memory; if one pair
                  does not fit, rows are shortened

Why: the models measured need about 100 steps to learn how to answer, and from few pairs they learn more in small
batches. A model that was pretrained on much needs fewer passes: 3 is what published recipes take (Alpaca, Vicuna).
Small models have their best loss at nearly the same rate, and large ones at a lower rate: the root gives 2.2e-5 at the
width 4,096, where Alpaca takes 2e-5. (Vaswani et al., arXiv 1706.03762, section 5.3, divide by the same root.) Adapters
need a higher rate: Dettmers et al., "QLoRA" (arXiv 2305.14314), take 2e-4 at the width 4,096. A run that is too long
costs time only, where the weights of the lowest held-out loss are kept.

    python -m benchmarks defaults     # three sizes of model by three sizes of data: the rule, and a sweep around it
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from minift.config import CHOSEN, LlamaConfig, TrainConfig
from minift.costs.flops import count_parameters
from minift.costs.memory import training_memory
from minift.train import Plan
from minift.values import size

BATCH = (4, 32)  # pairs of a step, at least and at most
FEWEST_STEPS = 100
LARGE = 30_000_000  # weights of a model that was pretrained on much
FEWEST_EPOCHS, MOST_EPOCHS, MOST_SEEN = 3, 10, 20_000  # a small model sees so many pairs, repeated ones included
HIGHEST_LR, WIDTH, STEPS = 1e-4, 192, 350  # the learning rate of the bundled job, its width and its steps
HIGHEST_LORA_LR = 5e-3  # of the bundled job's adapters
WARMUP = 0.03
MULTIPLE = 64  # tokens to which rows are rounded up, as in `pack.collate`
ROOM = 0.8  # share of the free memory: the ledger has no workspaces of kernels, and no rounding


@dataclass(frozen=True)
class Task:
    """A task, for which settings are chosen.

    Attributes:
        shape: of the model.
        adapters: the number of weights of its adapters; None: the model's own weights are trained.
        lengths, held_out: the positions of each example to train on, and of each held out.
        cut: whether one of them has more than the model's positions.
        kind: what the examples are called, in the plural.
        device: where the step is computed, cpu or cuda.
        ranks: how many processes share a batch.
        memory: free bytes for this process; None: not known.
    """

    shape: LlamaConfig
    adapters: int | None
    lengths: Sequence[int]
    held_out: Sequence[int]
    cut: bool = False
    kind: str = "pairs"
    device: str = "cpu"
    ranks: int = 1
    memory: int | None = None


def choose_defaults(config: TrainConfig, choose: Collection[str], task: Task) -> tuple[TrainConfig, list[str]]:
    """Return the config with the settings named in `choose`, and lines that say what was chosen and why."""
    n, why = len(task.lengths), dict[str, str]()
    if "batch_size" in choose:
        config = config.replace(batch_size=batch_size_of(n), grad_accum=1)
        why["batch_size"] = f"steps of {min(config.batch_size, n)} {task.kind}"
    if "max_length" in choose:
        longest, positions = max(*task.lengths, *task.held_out), task.shape.max_position_embeddings
        config = config.replace(max_length=max(2, min(_rounded(longest), positions)))
        reason = f"the longest {task.kind[:-1]} has {longest:,}"
        if task.cut:
            reason = f"all positions that the model has; longer {task.kind} are cut"
        why["max_length"] = f"rows of {config.max_length:,} tokens ({reason})"
    config, note = _fit_memory(config, choose, task, why)
    total = count_parameters(task.shape).total
    batches = -(-n // config.batch_size)  # of an epoch
    if "epochs" in choose:
        config = config.replace(epochs=max(_epochs(total, n), -(-FEWEST_STEPS * config.grad_accum // batches)))
        each = -(-batches // config.grad_accum)
        why["epochs"] = f"{config.epochs:,} epochs of {each:,} step{'s' * (each > 1)} ({n:,} {task.kind})"
    steps = Plan.make(config, batches).steps
    if "lr" in choose:
        config = config.replace(lr=_rate(task.shape.hidden_size, steps, task.adapters is not None))
        trained = "all trained" if task.adapters is None else f"adapters of {task.adapters / 1e6:,.1f} M trained"
        rate = f"{config.lr:.1e}".replace("e-0", "e-")
        why["lr"] = f"lr {rate} ({total / 1e6:,.1f} M parameters, {trained}; {steps:,} steps)"
    if "warmup" in choose:
        config = config.replace(warmup=int(WARMUP * steps))
        why["warmup"] = f"warm-up {100 * WARMUP:.0f} % ({config.warmup} steps)"
    said = [why[name] for name in CHOSEN if name in why]
    return config, ([f"chosen: {', '.join(said)}"] if said else []) + note


# The rule -------------------------------------------------------------------------------------------------------------


def batch_size_of(n: int) -> int:
    """Return the number of pairs of a step: the power of two below a tenth of all, within `BATCH`."""
    least, most = BATCH
    return int(min(most, 2 ** int(math.log2(max(least, n / 10)))))


def _epochs(parameters: int, n: int) -> int:
    """Return the number of epochs of a model with so many parameters on `n` pairs."""
    return FEWEST_EPOCHS if parameters >= LARGE else max(FEWEST_EPOCHS, min(MOST_EPOCHS, MOST_SEEN // n))


def _rate(width: int, steps: int, adapters: bool) -> float:
    """Return the highest learning rate of a run, to two digits: it is recorded as it is printed."""
    rate = HIGHEST_LORA_LR * min(1.0, WIDTH / width)
    if not adapters:
        rate = HIGHEST_LR * min(1.0, math.sqrt(WIDTH / width)) * min(2.0, max(1.0, math.sqrt(STEPS / steps)))
    return float(f"{rate:.1e}")


# Memory ---------------------------------------------------------------------------------------------------------------


def _fit_memory(
    config: TrainConfig, choose: Collection[str], task: Task, why: dict[str, str]
) -> tuple[TrainConfig, list[str]]:
    """Return the config with micro-batches, and if need be rows, that memory can hold; and a note where none can be."""
    if task.memory is None or step_bytes(config, task) <= ROOM * task.memory:
        return config, []
    free, asked = f"{size(task.memory)} are free, of which a fifth is kept", size(step_bytes(config, task))
    while "batch_size" in choose and config.batch_size > 1 and step_bytes(config, task) > ROOM * task.memory:
        config = config.replace(batch_size=config.batch_size // 2, grad_accum=config.grad_accum * 2)
    if config.grad_accum > 1 and "batch_size" in choose:
        why["batch_size"] += f", {config.batch_size} at a time (together they would take {asked}, and {free})"
    shorter = config
    while "max_length" in choose and config.batch_size == 1 and step_bytes(shorter, task) > ROOM * task.memory:
        if shorter.max_length <= MULTIPLE:
            break
        shorter = shorter.replace(max_length=_rounded(shorter.max_length) - MULTIPLE)
    needed = step_bytes(shorter, task)
    if needed > ROOM * task.memory:  # the weights alone are too many: shorter rows would not help
        remedy = "train adapters (--lora-rank 8)" if task.adapters is None else "take a smaller model"
        if config.batch_size > 1:
            remedy = "lower --batch-size, and raise --grad-accum by as much"
        return config, [f"note: a step takes about {size(step_bytes(config, task))} of memory, and {free}; {remedy}"]
    if shorter.max_length < config.max_length:
        longest = f"one of {config.max_length:,} does not fit the memory, of which {free}"
        why["max_length"] = f"rows of {shorter.max_length:,} tokens ({longest})"
    return shorter, []


def step_bytes(config: TrainConfig, task: Task) -> int:
    """Return the bytes of a step on the longest examples that a micro-batch can have, in one process."""
    count = -(-config.batch_size // task.ranks)
    longest = sorted((min(length, config.max_length) for length in task.lengths), reverse=True)[:count]
    width = min(_rounded(longest[0]), config.max_length)
    rows = min(len(longest), -(-sum(longest) // width) + 1) if config.pack else len(longest)
    sharded = task.ranks if config.parallel == "fsdp" else None
    ledger = training_memory(
        task.shape, config.dtype, rows, width, config.loss_chunk, task.device, task.adapters, sharded
    )
    saved = "activations for the backward pass"
    if config.checkpoint_activations:  # then they are those of one layer, and the inputs of all
        layers = task.shape.num_hidden_layers
        ledger[saved] = ledger[saved] // layers + rows * width * layers * 4 * task.shape.hidden_size
    return sum(ledger.values())


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
