"""The shape of a model, before any of its weights: a model without memory, and the shape of each parameter by name.

PyTorch's *meta device* holds tensors that have a shape and a dtype but no elements. A Llama that is built there costs
nothing, whatever its size; the weights of a file become its parameters afterwards.

    python -c "from minift import LlamaConfig; from minift.formats.shapes import parameter_shapes
    print(parameter_shapes(LlamaConfig.preset('llama2-7b')))"
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minift.config import LlamaConfig
from minift.model import Llama

# With what `nn.Linear` and `nn.Embedding` draw their first weights.
_DRAWS = {"kaiming_uniform_", "uniform_", "normal_"}


def model_without_weights(config: LlamaConfig) -> Llama:
    """Return a Llama of this shape on the meta device, whose parameters have no elements yet."""
    with on_meta_device():
        return Llama(config)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Create the tensors and modules in here on the meta device, without drawing first weights for them.

    There is nothing to draw there; but to find that out, PyTorch imports its compiler, which takes longer than loading
    a small model.
    """
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Return a tensor on the meta device as it is, where random numbers would be drawn into it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@cache
def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of minift's parameters, by name, in the model's order."""
    model = model_without_weights(dataclasses.replace(config, num_hidden_layers=1))  # all layers are alike
    shapes: dict[str, tuple[int, ...]] = {}
    layer = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("layers.0.")}
    for name, parameter in model.named_parameters():
        if name not in layer:
            shapes[name] = tuple(parameter.shape)
        elif name == next(iter(layer)):
            for i in range(config.num_hidden_layers):
                shapes |= {name.replace(".0.", f".{i}.", 1): shape for name, shape in layer.items()}
    return shapes
