"""Whether ways to compute the same thing do: how far one is off, and why another is not to be had on this machine.

Read next: `kernels/attention.py`.
"""

import math

from torch import Tensor

from minift.errors import one_line

# What a way raises where this PyTorch, this device or this dtype has it not.
REFUSALS = (RuntimeError, NotImplementedError, ImportError, ValueError, AssertionError)


def reason(refusal: Exception) -> str:
    """Why a way is not to be had, in a line."""
    return one_line(str(refusal).split(". ")[0])


def off(found: Tensor | None, right: Tensor) -> float:
    """How far a result is off: the norm of the difference, as a share of that of the right one, which is float64."""
    return math.inf if found is None else float((found.detach().double() - right).norm() / right.norm())
