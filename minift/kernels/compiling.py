"""Less memory for a compiled step: the backward pass computes again what costs it nothing.

Plain twin: `torch.compile` as it is. Taken where a run is compiled. silu(gate) · up and normalised inputs are operands
of matrix products, so by default the compiler keeps them; but the loops of the backward pass read what they are made of
anyway. That is a quarter of a layer's activations, for no more time.

    python -m benchmarks memory
"""

import torch


def keep_less_for_the_backward_pass(device: torch.device) -> None:
    """Set the compiler's memory budget, for this process. It is not public: where it is not there, nothing is set.

    The budget is a share of what the compiler would keep by default; at 0.85 a GPU would compute products again.
    """
    try:
        from torch._functorch import config  # imports the compiler
    except ImportError:
        return
    if hasattr(config, "activation_memory_budget"):
        config.activation_memory_budget = 0.85 if device.type == "cpu" else 0.95
