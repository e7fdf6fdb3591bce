"""A model over several processes: each holds all of it (`replicate`), or a part of each matrix (`shard`).

Everything here also accepts a model in one process, and then does nothing special, so that the loop and the files need
no second version. Legend: a *rank* is one of the processes; a *shard* is the part of a tensor that one rank holds.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minift.distributed.world import World
from minift.model import Llama

METADATA = ".metadata"  # in a folder of shards: where each part is


def replicate(objective: nn.Module, world: World) -> nn.Module:
    """Wrap an objective whose model every rank holds: gradients are *added up* over the ranks.

    (DDP by itself would take their mean, which is right only where all ranks have the same number of targets.)
    """
    device_ids = [world.device] if world.device.type == "cuda" else None
    replicas = DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)
    replicas.register_comm_hook(None, _add_up)
    return replicas


def _add_up(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def shard(objective: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Split an objective's model over the ranks; a layer at a time is put together to be computed.

    The matrices of layers are sent in the dtype of the arithmetic: half the bytes, and the same numbers that autocast
    would make of them. Gradients are added up in float32. Embedding, head and last norm stay complete between the
    forward and the backward pass, in float32: the loss needs them in between.

    Args:
        objective: its model may be on the meta device; `fill` then gives it its weights.
        dtype: of the arithmetic; float32 or float64 sends weights as they are.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    low = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    model = cast(Llama, objective.model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    sharded: tuple[Any, ...] = (objective, *model.layers)
    for module in sharded:  # a sum over the ranks, not a mean
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return objective


@torch.no_grad()
def fill(model: Llama, world: World, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a sharded model on the meta device its weights: of each tensor, this rank's shard.

    Args:
        weights: complete tensors by name; each is freed before the next one is made.
    """
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        copy_into(parameters[name], tensor)


@torch.no_grad()
def copy_into(parameter: Tensor, complete: Tensor) -> None:
    """Copy a complete tensor into a parameter; where that is sharded, this rank's part."""
    parameter.copy_(shard_like(parameter, complete.to(parameter.device, parameter.dtype)))


def shard_like(parameter: Tensor, complete: Tensor) -> Tensor:
    """Return a complete tensor sharded as a parameter is. Nothing is sent: every rank keeps its part of it."""
    if not hasattr(parameter, "full_tensor"):
        return complete
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(complete, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gathered(tensor: Tensor) -> Tensor:
    """Return the complete tensor of one that may be sharded. A collective: call on all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: all of it, where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(folder: Path) -> bool:
    """Return whether a step folder was written by the ranks of a sharded run (`distributed/shards.py`)."""
    return (folder / METADATA).is_file()


def micro_batch(objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context of one forward and backward pass: gradients are sent in the window's last micro-batch only."""
    if isinstance(objective, DistributedDataParallel):
        return nullcontext() if last else objective.no_sync()
    sharded: Any = objective
    if hasattr(sharded, "set_requires_gradient_sync"):
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
    return nullcontext()


def unwrapped(objective: nn.Module) -> nn.Module:
    """Return the objective inside DDP, for a forward pass that no other rank takes part in; any other as it is."""
    inner: nn.Module = objective.module if isinstance(objective, DistributedDataParallel) else objective
    return inner


def release(objective: nn.Module) -> None:
    """Free the complete weights that FSDP has put together, after a forward pass without a backward pass."""
    sharded: Any = objective
    if hasattr(sharded, "reshard"):
        sharded.reshard()


def first_not_finite(model: Llama, world: World) -> str | None:
    """Return the first weight, or else the first gradient, that holds NaN or infinity. Call on all ranks."""
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    found = [not bool(local_shard(parameter.detach()).isfinite().all()) for _, parameter in named]
    found += [p.grad is not None and not bool(local_shard(p.grad).isfinite().all()) for _, p in named]
    totals = world.total(*found)
    names = [f"the weight {name}" for name, _ in named] + [f"the gradient of {name}" for name, _ in named]
    return next((name for name, total in zip(names, totals, strict=True) if total), None)
