"""Compare implementations of the same computation: the error of one, and why another is unavailable on this machine."""

import math

from torch import Tensor

from minift.errors import one_line

# What an implementation raises where this PyTorch, this device or this dtype does not support it.
REFUSALS = (RuntimeError, NotImplementedError, ImportError, ValueError, AssertionError)


def reason(refusal: Exception) -> str:
    """Return in one line why an implementation is unavailable."""
    return one_line(str(refusal).split(". ")[0])


def off(found: Tensor | None, right: Tensor) -> float:
    """Return the relative error |found - right| / |right|; infinite without a result. `right` is float64."""
    return math.inf if found is None else float((found.detach().double() - right).norm() / right.norm())
