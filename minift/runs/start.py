"""The state of a run before its first step: kernels are installed, layers compiled, the model split over the ranks."""

from collections.abc import Collection

import torch
from torch import nn

from minift import kernels, optim
from minift.config import TrainConfig
from minift.data.batches import PageBatches, PairBatches
from minift.distributed.sharding import replicate, shard
from minift.distributed.world import World
from minift.kernels import adamw
from minift.model import Llama
from minift.runs.machine import choose_dtype
from minift.train import Objective, TrainState


def start_state(
    model: Llama,
    batches: PairBatches | PageBatches,
    config: TrainConfig,
    world: World | None = None,
    plain: bool = False,
    names: Collection[str] | None = None,
) -> TrainState:
    """Return the state of a run before its first step.

    torch's own random numbers start from the config's seed, too, on each rank from another one.

    Args:
        model: on the device on which it is trained, with its weights; for `fsdp` on the meta device, without them (see
            `distributed.sharding.fill`). Kernels are installed in it.
        world: the processes that train it together; by default this one alone.
        plain: install no kernel, and compile nothing: the modules run as they are read.
        names: the kernels to install; by default those that `kernels.choose` names.
    """
    world = world or World(device=model.device)
    device, dtype = world.device, choose_dtype(config, world.device)
    if names is None:
        config = config.replace(dtype=dtype, parallel=world.parallel or "auto")
        names = () if plain else kernels.choose(config, device)
    torch.manual_seed(config.seed + world.rank)
    model.checkpoint_activations = config.checkpoint_activations
    model.train()  # only the dropout of adapters makes a difference
    objective: nn.Module = kernels.install(Objective(model, config.loss_chunk), names)
    if config.compile and not plain:
        for layer in model.layers:  # all layers are alike: one is compiled, the others reuse its code
            layer.compile()
    if world.parallel == "ddp":
        objective = replicate(objective, world)
    elif world.parallel == "fsdp":
        objective = shard(objective, world, getattr(torch, dtype))
    make_optimizer = adamw.make_optimizer if "adamw" in names else optim.make_optimizer
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    return TrainState(model, make_optimizer(model, config), scaler, batches, objective, dtype, world=world)
