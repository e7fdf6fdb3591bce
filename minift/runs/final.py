"""The end of a run: `final/`, of the best weights that it saw, and no more than is needed next to it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minift.checkpoint import save_model
from minift.config import TrainConfig
from minift.distributed.sharding import copy_into
from minift.errors import InputError
from minift.formats.carried import Carried
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights, merge
from minift.pack import Batch
from minift.runs.folder import FinetuneJob, Job
from minift.runs.progress import Best
from minift.runs.steps import load_best, remove_older
from minift.storage.atomic import remove_folder, write_folder
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, TrainState


@dataclass(frozen=True)
class Run:
    """All of a run but its state: what was asked for, how long it is, what it is evaluated on, and its folder.

    Attributes:
        first_weights: gives those that the run begins with, by name, each to be used before the next one is made.
        carried: what `final/` gets besides its weights, where a Hugging Face folder is made of another one.
    """

    job: Job
    config: TrainConfig
    plan: Plan
    tokenizer: Tokenizer
    validation: Sequence[Batch]
    out: Path
    first_weights: Callable[[], Iterator[tuple[str, Tensor]]]
    carried: Carried | None = None


def save_final(run: Run, state: TrainState) -> None:
    """Write the model of the lowest validation loss or, with --keep-last, of the last step; and adapters, if any.

    What was done is said, where it is not simply the last step of the plan.
    """
    best, config = Best.of(run.out / "metrics.jsonl"), run.config
    if state.step < run.plan.steps:
        patient = config.patience and best.evaluations_since >= config.patience
        waited = f"{config.patience} evaluations without a lower loss" if patient else f"{config.max_minutes:g} minutes"
        print(f"stopped after step {state.step} of {run.plan.steps}: {waited}")
    if best.evaluations_since and config.keep_last:
        print(f"note: {best.in_words()}; final/ is the model of the last step, as --keep-last asks")
    elif best.evaluations_since:
        try:
            _load_best(run, state, best)
            print(f"final/ is {best.model_in_words()}, where the validation loss was lowest: {best.loss:.4f}")
        except InputError as error:  # the steps are taken, and must not be lost
            print(f"note: {error}; so final/ is the model of step {state.step}")
    if config.lora_rank:
        _save_adapter(run, state)
        merge(state.model)  # one matrix after another; `save_model` would keep all of them twice
    save_model(run.out / "final", state.model, run.tokenizer, None, config.save_format, state.world, run.carried)


def _load_best(run: Run, state: TrainState, best: Best) -> None:
    """Load the weights of the lowest validation loss. Raises InputError when they are missing or damaged."""
    if best.step or run.config.lora_rank:
        load_best(run.out / "best", state.model, best)
        return
    parameters = dict(state.model.named_parameters())
    for name, tensor in run.first_weights():
        copy_into(parameters[name], tensor)


def remove_saves(run: Run, state: TrainState) -> None:
    """Remove what a complete run needs no more: step folders without --keep, and best/ where it is final/."""
    if state.world.is_main:
        if run.config.keep is None:
            remove_older(run.out, run.plan.steps, 0)
        if not run.config.keep_last or not Best.of(run.out / "metrics.jsonl").evaluations_since:
            remove_folder(run.out / "best")
            (run.out / "best.json").unlink(missing_ok=True)
    state.world.wait()


def _save_adapter(run: Run, state: TrainState) -> None:
    """Write the adapters as the `peft` package stores them: with the tokenizer, and the name of their model."""
    assert isinstance(run.job, FinetuneJob)
    base = str(Path(run.job.model).resolve())
    adapter = adapter_weights(state.model)  # on all ranks: where the model is sharded, each has a part

    def write(partial: Path) -> None:
        write_peft(partial, adapter, LoRAConfig.of(run.config), base)
        run.tokenizer.save(partial)

    if state.world.is_main:
        write_folder(run.out / "adapter", write)
