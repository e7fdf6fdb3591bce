"""Which memory a step holds, and what for: every tensor's storage, from the operation that made it to its end.

PyTorch shows each operation to a `TorchDispatchMode`, those of the backward pass and of custom functions, too. So the
result of each is noted with its size, and a weak reference to its storage tells when the memory is given back. What it
was for is often known only later (a gradient is what ends up in `parameter.grad`), so a history is kept, and the
fullest moment is looked for when all is over. The same code counts on a CPU and on a GPU.

It counts the bytes of storages. What it does not see: memory that a kernel takes and gives back within one operation,
and what the allocator keeps beyond that (rounding, blocks between those in use). Those are the difference from resident
memory or from `torch.cuda.max_memory_allocated`. Compiled code is not shown to it operation by operation.

Read next: `memory.py`.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.job import Job, take_step


@dataclass(eq=False)
class Memory:
    """The memory of a storage.

    Attributes:
        nbytes: of it.
        part: of the step, in which it was taken.
        shape, dtype: of the tensor that it was taken for.
        made_by: the operation that took it, by PyTorch's name.
        label: what it was known to be for ("weights"), or "".
        copy_of: the label of what it was copied from, by a cast or into another order.
        saved: whether autograd kept it for the backward pass.
    """

    nbytes: int
    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str = ""
    label: str = ""
    copy_of: str = ""
    saved: bool = False


@dataclass
class Peak:
    """The fullest moment: the part of the step in which it came, and the bytes by what they are for."""

    part: str
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.nbytes.values())


CAST, FILLED = "aten::_to_copy", "aten::copy_"  # into a tensor of another dtype; into one that was there


class Alive(TorchDispatchMode):
    """A history of the storages that there are while it is entered.

        with Alive({"weights": list(model.parameters())}) as alive:
            take_step(job, alive.part)
        alive.peak(lambda memory: memory.label or "other")

    Args:
        known: tensors that are there before, by what they are for.
    """

    def __init__(self, known: dict[str, Iterable[Tensor]]):
        super().__init__()
        self._part = ""
        self._now: dict[int, Memory] = {}  # by the address of the storage, while it is there
        self._references: dict[int, Any] = {}  # … and what tells of its end
        self._history: list[tuple[str, Memory, int]] = []  # part, memory, how many bytes came or (negative) went
        for label, tensors in known.items():
            for tensor in tensors:
                self._note(tensor, label=label)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step: the memory taken inside, and what autograd keeps of it, belong to it."""
        before, self._part = self._part, name
        with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            yield
        self._part = before

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors were for that have been made meanwhile."""
        for tensor in tensors:
            self._note(tensor).label = name

    def peak(self, purpose: Callable[[Memory], str]) -> Peak:
        """The moment with the most bytes, and them by their purpose."""
        total = most = moment = 0
        for index, (_, _, change) in enumerate(self._history):
            total += change
            if total > most:
                most, moment = total, index
        nbytes: dict[str, int] = defaultdict(int)
        for _, memory, change in self._history[: moment + 1]:
            nbytes[purpose(memory)] += change
        return Peak(self._history[moment][0], {name: count for name, count in nbytes.items() if count})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation has made."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                memory = self._note(tensor, made_by=name)
                if name in (CAST, FILLED):
                    source = self._note(args[0] if name == CAST else args[1])
                    memory.copy_of = source.label or source.copy_of
        return result

    def _note(self, tensor: Tensor, label: str = "", made_by: str = "") -> Memory:
        storage = tensor.untyped_storage()
        address = storage._cdata
        memory = self._now.get(address)
        if memory is None:
            memory = Memory(storage.nbytes(), self._part, tuple(tensor.shape), tensor.dtype, made_by, label)
            self._now[address] = memory
            self._references[address] = weakref.ref(storage, lambda reference: self._end(address))
            self._history.append((self._part, memory, memory.nbytes))
        return memory

    def _end(self, address: int) -> None:
        memory = self._now.pop(address)
        del self._references[address]
        self._history.append((self._part, memory, -memory.nbytes))

    def _saved(self, tensor: Tensor) -> Tensor:
        self._note(tensor).saved = True
        return tensor.detach()  # the tensor itself would keep the graph alive that keeps it


def watch_step(job: Job) -> Alive:
    """The memory of a step. It must not be the first one, which makes the optimizer's moments."""
    model, optimizer = job.state.model, job.state.optimizer
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    with Alive({"weights": model.parameters(), "AdamW's two moments": moments}) as alive:
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: alive.label("gradients", [parameter.grad] if parameter.grad is not None else [])
            )
            for parameter in model.parameters()
        ]
        take_step(job, alive.part)
    for hook in hooks:
        hook.remove()
    return alive
