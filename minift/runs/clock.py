"""When something is due in a run: an evaluation, a save, and its end."""

import time

from minift.config import TrainConfig
from minift.train import Plan, TrainState

EVALUATIONS = 10  # of a run, by default, after the one before the first step


def is_evaluated(step: int, plan: Plan, config: TrainConfig) -> bool:
    """Return whether the held-out split is evaluated after step `step`."""
    every = -(-plan.steps // EVALUATIONS) if config.eval_every is None else config.eval_every
    return step == plan.steps or (every > 0 and step % every == 0)


class Clock:
    """The minutes of a run since it began or was resumed. Of several processes, the main one's clock counts for all."""

    def __init__(self, config: TrainConfig):
        self._config = config
        self._began = self._saved = time.monotonic()

    def is_over(self, state: TrainState) -> bool:
        """Return whether `max_minutes` are over. Call on all ranks."""
        return self._config.max_minutes is not None and self._after(self._config.max_minutes, self._began, state)

    def save_is_due(self, state: TrainState) -> bool:
        """Return whether a checkpoint is due after the step that `state` has just taken. Call on all ranks."""
        every = self._config.save_every
        if isinstance(every, int):
            return every > 0 and state.step % every == 0
        due = self._after(self._config.save_minutes, self._saved, state)
        if due:
            self._saved = time.monotonic()
        return due

    def _after(self, minutes: float, since: float, state: TrainState) -> bool:
        passed = time.monotonic() - since >= 60 * minutes
        return state.world.any(state.world.is_main and passed)
