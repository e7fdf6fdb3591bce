"""The state of a run before its first step."""

import torch
from torch import nn

from minift.config import TrainConfig
from minift.data.batches import PageBatches, PairBatches
from minift.distributed.sharding import Objective, replicate, shard
from minift.distributed.world import World
from minift.kernels.malloc import keep_freed_memory
from minift.model import Llama
from minift.optim import make_optimizer
from minift.runs.machine import choose_dtype, choose_written_out
from minift.train import TrainState


def start_state(
    model: Llama, batches: PairBatches | PageBatches, config: TrainConfig, world: World | None = None
) -> TrainState:
    """The state of a run before its first step.

    torch's own random numbers start from the config's seed, too, on each rank from another. On a CPU, what this process
    frees from now on stays with it (`kernels/malloc.py`).

    Args:
        model: where it will be trained, with its weights; for `fsdp` on "meta", without any (see `distributed.fill`).
        world: the processes that train it together; by default this one alone.
    """
    world = world or World(device=model.device)
    torch.manual_seed(config.seed + world.rank)
    if model.device.type == "cpu":
        keep_freed_memory()
    model.checkpoint_activations = config.checkpoint_activations
    model.written_out = world.parallel != "fsdp" and choose_written_out(model, config, world.device)
    model.train()  # which only the dropout of adapters knows about
    device = model.device.type
    if config.compile:
        _keep_less_for_the_backward_pass(device)
        for layer in model.layers:  # all layers are alike: one is compiled, the others reuse its code
            layer.compile()
    scaler = torch.amp.GradScaler(device, enabled=config.dtype == "float16")
    objective: nn.Module = Objective(model)
    if world.parallel == "ddp":
        objective = replicate(model, world)
    elif world.parallel == "fsdp":
        objective = shard(model, world, getattr(torch, choose_dtype(config, world.device)))
    return TrainState(model, make_optimizer(model, config), scaler, batches, world=world, objective=objective)


def _keep_less_for_the_backward_pass(device: str) -> None:
    """Let the compiler compute again what costs it nothing: silu(gate) · up, and normalised inputs.

    They are operands of matrix products, so by default it keeps them; but the loops of the backward pass read what they
    are made of anyway. That is a quarter of a layer's activations, for no more time. The budget is a share of what it
    would keep by default; at 0.85 a GPU would have to compute products again.
    """
    from torch._functorch import config as partitioner  # imports the compiler

    if hasattr(partitioner, "activation_memory_budget"):  # not public
        partitioner.activation_memory_budget = 0.85 if device == "cpu" else 0.95
