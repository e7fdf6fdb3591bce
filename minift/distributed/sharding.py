"""A model over several processes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minift.distributed.world import World
from minift.loss import batch_loss
from minift.model import Llama
from minift.pack import Batch

METADATA = ".metadata"  # in a folder of shards: what lies where


class Objective(nn.Module):
    """A batch to its loss, as a module: to DDP and FSDP a forward pass is one call, which ends where gradients begin.

    Attributes:
        model: the Llama.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, chunk: int) -> tuple[Tensor, Tensor]:
        """(nll_sum, n_tokens) of one micro-batch."""
        return batch_loss(self.model, batch, chunk)


def replicate(model: Llama, world: World) -> nn.Module:
    """The objective of a model that every rank holds: gradients are *added up* over the ranks.

    (DDP by itself would take their mean, which is right only where all ranks have as many targets.)
    """
    where = [world.device] if world.device.type == "cuda" else None
    replicas = DistributedDataParallel(Objective(model), device_ids=where, gradient_as_bucket_view=True)
    replicas.register_comm_hook(None, _add_up)
    return replicas


def _add_up(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def shard(model: Llama, world: World, dtype: torch.dtype) -> nn.Module:
    """The objective of a model of which every rank holds a part: a layer at a time is put together.

    The matrices of layers travel in the dtype of the arithmetic, which halves what is sent and is what autocast would
    make of them; gradients are added up in float32. Embedding, head and last norm stay whole between the forward and
    the backward pass, in float32: the loss needs them between the two.

    Args:
        model: on any device; on "meta" it takes no memory, and `fill` gives it its weights.
        dtype: of the arithmetic; float32 or float64 sends weights as they are.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    low = dtype in (torch.bfloat16, torch.float16)
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    objective = Objective(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=narrow)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    for module in (objective, *model.layers):  # a sum over the ranks, not a mean
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return objective


@torch.no_grad()
def fill(model: Llama, world: World, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a sharded model that has no memory yet its weights: of each tensor, this rank's rows.

    Args:
        weights: whole tensors by name, each of which is let go before the next is made.
    """
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        put(parameters[name], tensor)


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter; where it is sharded, this rank's part of it."""
    parameter.copy_(like(parameter, whole.to(parameter.device, parameter.dtype)))


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter is. Nothing is sent: every rank has it whole, and keeps its part."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(folder: Path) -> bool:
    """Whether a step folder was written by the ranks of a sharded run (`distributed/shards.py`)."""
    return (folder / METADATA).is_file()


def micro_batch(objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch's forward and backward pass. Only in the window's last one gradients are sent."""
    if isinstance(objective, DistributedDataParallel):
        return nullcontext() if last else objective.no_sync()
    sharded: Any = objective
    if hasattr(sharded, "set_requires_gradient_sync"):
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
    return nullcontext()


def release(objective: nn.Module) -> None:
    """Behind a forward pass without a backward one: let go what FSDP has put together for it."""
    sharded: Any = objective
    if hasattr(sharded, "reshard"):
        sharded.reshard()


def first_not_finite(model: Llama, world: World) -> str | None:
    """Which weight, or else whose gradient, is the first that holds NaN or infinity. Every rank must ask."""
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    found = [not bool(own_part(parameter.detach()).isfinite().all()) for _, parameter in named]
    found += [p.grad is not None and not bool(own_part(p.grad).isfinite().all()) for _, p in named]
    totals = world.total(*found)
    names = [f"the weight {name}" for name, _ in named] + [f"the gradient of {name}" for name, _ in named]
    return next((name for name, total in zip(names, totals, strict=True) if total), None)
