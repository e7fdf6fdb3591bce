"""What both jobs do: choose the machine, own the folder, and take the steps that lead to `final/`."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint import load_weights, save_model
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.sharding import copy_into
from minift.distributed.world import World, restarted
from minift.errors import InputError, need
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights, merge
from minift.model import Llama
from minift.pack import Batch
from minift.runs.clock import is_evaluated
from minift.runs.folder import FinetuneJob, Job, check_free, cut_metrics, newest_whole_step, start_folder
from minift.runs.loop import run_steps
from minift.runs.machine import check_compiler, choose_device, choose_dtype
from minift.runs.progress import Best
from minift.runs.space import bytes_of_saves, check_space
from minift.runs.steps import load_step, remove_older, save_best
from minift.storage.atomic import remove_folder, remove_leftovers, write_file, write_folder
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, TrainState, validation_loss


@dataclass(frozen=True)
class Run:
    """All of a run but its state: what was asked for, how long it is, what it is evaluated on, and its folder.

    Attributes:
        first_weights: gives those that the run begins with, by name, each to be used before the next one is made.
    """

    job: Job
    config: TrainConfig
    plan: Plan
    tokenizer: Tokenizer
    validation: Sequence[Batch]
    out: Path
    first_weights: Callable[[], Iterator[tuple[str, Tensor]]]


# Before the first step ------------------------------------------------------------------------------------------------


def choose_machine(config: TrainConfig, resume: bool, plain: bool) -> tuple[torch.device, TrainConfig]:
    """Return the device to train on, and the config with its dtype chosen.

    Raises:
        InputError: for a device, dtype, compiler or package that this machine does not have, and for a new run that is
            to be both plain and compiled. (One that was compiled may be resumed plain.)
    """
    if plain and config.compile and not resume:
        raise InputError("--plain runs the code as it is read, and --compile compiles it; give one of them")
    device = choose_device(config)
    if not plain:
        check_compiler(config, device)
    if config.save_format == "hf":  # checked now: the run would fail at its end
        need("tokenizers", "hf", "--save-format hf")
        need("safetensors", "hf", "--save-format hf")
    return device, config.replace(dtype=choose_dtype(config, device))


def check_out(out: Path, resume: bool, world: World) -> bool:
    """Check that a new run can begin in `out`. Return True if a run is to be resumed there. Call it on all ranks.

    It is also resumed when `torchrun --max-restarts` has started the command again, in the words that began it.

    Raises:
        InputError: when a new run cannot begin there.
    """
    resume = resume or (restarted() and (out / "config.json").is_file())
    if not resume:
        check_free(out)
    world.wait()  # until every rank has looked: then the main one may write
    return resume


def check_length(config: TrainConfig, shape: LlamaConfig) -> None:
    """Raise InputError when the rows are longer than the model's positions."""
    if config.max_length > shape.max_position_embeddings:
        positions = shape.max_position_embeddings
        raise InputError(f"max_length {config.max_length} is more than the model's {positions} positions; lower it")


def describe(model: Llama, source: str, trained: str, config: TrainConfig, world: World) -> str:
    """Return the first line of a run: what is trained, and where.

    Args:
        source: what the model is made from.
        trained: which of its parameters are trained, in words.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    place = world.device.type + (f" ({world.size} processes, {world.parallel})" if world.parallel else "")
    return f"{source}: {count:,} parameters, {trained}, on {place} in {config.dtype}"


# From the first step to the last --------------------------------------------------------------------------------------


def complete(run: Run, state: TrainState, resume: bool) -> bool:
    """Start a run in its folder, or resume it, and take its steps. Return True when `final/` is there at the end.

    Call it on all ranks, inside `own_folder`: all that a run writes, its report included, is written under one lock.

    Raises:
        InputError: when all its step folders are damaged, or --patience has nothing to evaluate.
        RunError: when training cannot go on.
    """
    if run.config.patience and not (run.validation and run.config.eval_every):
        raise InputError("--patience needs held-out data to be evaluated on, and --eval-every above 0")
    if resume and (run.out / "final").is_dir():
        _remove_saves(run, state)
        return True
    if resume:
        _resume(run, state)
        _evaluate_again(run, state)
    elif state.world.is_main:
        start_folder(run.job, run.config, run.out)
    needed = bytes_of_saves(state.model, run.plan, run.config, evaluated=bool(run.validation))
    state.world.agreed(check_space, *((run.out, needed) if state.world.is_main else (None, 0)))
    steps, warmup = run.plan.steps, run.config.warmup
    if state.step == 0 and warmup >= steps:
        print(f"note: the run of {steps} steps ends within its warm-up of {warmup}, below --lr")
    if not run_steps(state, run.plan, run.config, run.tokenizer, run.validation, run.out):
        return False
    _save_final(run, state)
    _remove_saves(run, state)
    return True


def _resume(run: Run, state: TrainState) -> None:
    """Load the newest step folder that is whole, if there is one, and forget what was measured after its step."""
    if state.world.is_main:
        remove_leftovers(run.out)
    folder = newest_whole_step(run.out)
    if folder is not None:
        load_step(folder, state)
    if state.world.is_main:
        cut_metrics(run.out / "metrics.jsonl", state.step)
    print(f"{run.out}: continues after step {state.step} of {run.plan.steps}")


def _evaluate_again(run: Run, state: TrainState) -> None:
    """Make the evaluation that is due after the newest step, where a signal has interrupted it. Call on all ranks."""
    file = run.out / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    record = json.loads(lines[-1]) if lines else {}
    due = state.step and run.validation and is_evaluated(state.step, run.plan, run.config)
    if not state.world.any(bool(due and "validation_loss" not in record)):
        return
    best = Best.of(file)
    record["validation_loss"] = validation_loss(state, run.validation)
    if best.add(record):
        save_best(run.out / "best", state, run.tokenizer)
    if state.world.is_main:
        text = "".join(f"{line}\n" for line in [*lines[:-1], json.dumps(record)])
        write_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    state.world.wait()


def _save_final(run: Run, state: TrainState) -> None:
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
        print(f"final/ is {best.model_in_words()}, where the validation loss was lowest: {best.loss:.4f}")
        _load_best(run, state, best)
    if config.lora_rank:
        _save_adapter(run, state)
        merge(state.model)  # one matrix after another; `save_model` would keep all of them twice
    save_model(run.out / "final", state.model, run.tokenizer, format=config.save_format, world=state.world)


def _load_best(run: Run, state: TrainState, best: Best) -> None:
    """Load the weights of the lowest validation loss."""
    if best.step or run.config.lora_rank:
        load_weights(run.out / "best", state.model)
        return
    parameters = dict(state.model.named_parameters())
    for name, tensor in run.first_weights():
        copy_into(parameters[name], tensor)


def _remove_saves(run: Run, state: TrainState) -> None:
    """Remove what a complete run needs no more: step folders without --keep, and best/ where it is final/."""
    if state.world.is_main:
        if run.config.keep is None:
            remove_older(run.out, run.plan.steps, 0)
        if not run.config.keep_last or not Best.of(run.out / "metrics.jsonl").evaluations_since:
            remove_folder(run.out / "best")
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
