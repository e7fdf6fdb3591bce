"""Record the memory that a step holds and what it is for: every tensor's storage, from allocation to release.

PyTorch passes each operation to a `TorchDispatchMode`, including those of the backward pass and of custom functions.
The result of each is recorded with its size, and a weak reference to its storage tells when the memory is released.
The purpose is often known only later (a gradient is what ends up in `parameter.grad`). So a history is kept, and the
peak is searched for at the end. The same code counts on a CPU and on a GPU.

It counts the bytes of storages. It does not see memory that a kernel allocates and releases within one operation, nor
what the allocator keeps in addition (rounding, free blocks between those in use). These are the difference from
resident memory or from `torch.cuda.max_memory_allocated`. It does not see the single operations of compiled code.
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
        nbytes: its size in bytes.
        part: the part of the step in which it was allocated.
        shape, dtype: of the tensor that it was allocated for.
        made_by: the operation that allocated it, by PyTorch's name.
        label: its purpose where known ("weights"), or "".
        copy_of: the label of the tensor that it was copied from, by a cast or into another layout.
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
    """The moment with the most memory: the part of the step in which it came, and the bytes by purpose."""

    part: str
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the bytes in total."""
        return sum(self.nbytes.values())


CAST, FILLED = "aten::_to_copy", "aten::copy_"  # into a tensor of another dtype; into an existing one


class Alive(TorchDispatchMode):
    """A history of the storages that exist while it is entered.

        with Alive({"weights": list(model.parameters())}) as alive:
            take_step(job, alive.part)
        alive.peak(lambda memory: memory.label or "other")

    Args:
        known: tensors that exist before, by purpose.
    """

    def __init__(self, known: dict[str, Iterable[Tensor]]):
        super().__init__()
        self._part = ""
        self._now: dict[int, Memory] = {}  # by the address of the storage, while it exists
        self._references: dict[int, Any] = {}  # … and the weak reference that reports its release
        self._history: list[tuple[str, Memory, int]] = []  # part, memory, bytes allocated or (negative) released
        for label, tensors in known.items():
            for tensor in tensors:
                self._note(tensor, label=label)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute to a part of the step the memory that is allocated inside, and mark what autograd saves there."""
        before, self._part = self._part, name
        with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            yield
        self._part = before

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Label tensors that were made since the recording began with their purpose."""
        for tensor in tensors:
            self._note(tensor).label = name

    def peak(self, purpose: Callable[[Memory], str]) -> Peak:
        """Return the moment with the most bytes, and these bytes by purpose."""
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
        """Run an operation and record the storages of its results."""
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
        return tensor.detach()  # the tensor itself would form a cycle with its graph, and never be released


def watch_step(job: Job) -> Alive:
    """Take a step and return its memory. It must not be the first step, which makes the optimizer's moments."""
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
