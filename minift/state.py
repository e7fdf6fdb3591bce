"""What changes during a run, in one object: the loop takes it, a checkpoint is made of it. Read next: `train.py`."""

from dataclasses import dataclass, field

import torch
from torch import nn

from minift.distributed.world import Objective, World
from minift.model import Llama
from minift.optim import AdamW
from minift.pack import PageBatches, PairBatches


@dataclass
class TrainState:
    """Everything that changes during a run. What is saved, and what a resumed run gets back (`checkpoint.py`).

    Attributes:
        step: optimizer steps taken.
        world: the processes that train it together.
        objective: the model and its loss, as `world` takes them.
    """

    model: Llama
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    batches: PairBatches | PageBatches
    step: int = 0
    world: World = field(default_factory=World)
    objective: nn.Module = None  # type: ignore[assignment]  # made of the model, if it is not given

    def __post_init__(self) -> None:
        if self.objective is None:
            self.objective = Objective(self.model)
