"""Compute the space on the disk that a run's saves need, before its first step: a full disk must not end a night of it.

    step_NNNNNN/   the weights that are saved, and two moments of each trained one
    best/          the weights that are saved
    final/         all weights

A new folder is complete before the one that it replaces is removed. Everything is in float32.
"""

import shutil
from pathlib import Path

from minift.config import TrainConfig
from minift.errors import RunError
from minift.lora import has_adapter
from minift.model import Llama
from minift.train import Plan
from minift.values import size

NUMBER = 4  # bytes of a float32


def bytes_of_saves(model: Llama, plan: Plan, config: TrainConfig, evaluated: bool) -> int:
    """Return the bytes that a run's folder holds at most.

    Where all checkpoints are kept, and are written after minutes, their number is not known: one is counted.

    Args:
        evaluated: whether there is held-out data, so that the best weights are kept as well.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = trained if has_adapter(model) else weights
    kept = config.keep or 1
    if config.keep == 0 and isinstance(config.save_every, int) and config.save_every:
        kept = plan.steps // config.save_every
    return NUMBER * ((kept + 1) * (saved + 2 * trained) + evaluated * 2 * saved + weights)


def check_space(out: Path | None, needed: int) -> None:
    """Print the space that saves need in `out`, next to what is free. Of several processes, one gives `out`.

    Raises:
        RunError: where less is free.
    """
    if out is None:
        return
    held = sum(file.stat().st_size for file in out.rglob("*") if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(out).free + held  # a resumed run replaces what it has saved
    words = f"saves need up to {size(needed)} in {out}, where {size(free)} are free"
    if needed > free:
        raise RunError(f"{words}; choose another --out, or keep fewer checkpoints (--keep 1)")
    print(words)
