"""What both jobs do: choose the machine, own the folder, and take the steps that lead to `final/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minift.checkpoint import load_weights, save_model
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.world import World, restarted
from minift.errors import InputError, need
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights, merge
from minift.model import Llama
from minift.pack import Batch
from minift.runs.folder import FinetuneJob, Job, check_free, cut_metrics, newest_whole_step, start_folder
from minift.runs.loop import run_steps
from minift.runs.machine import check_compiler, choose_device, choose_dtype
from minift.runs.progress import Best
from minift.runs.steps import load_step
from minift.storage.atomic import remove_leftovers, write_folder
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, TrainState

PATIENCE = 3  # evaluations, where one is advised


@dataclass(frozen=True)
class Run:
    """All of a run but its state: what was asked for, how long it is, what it is evaluated on, and its folder."""

    job: Job
    config: TrainConfig
    plan: Plan
    tokenizer: Tokenizer
    validation: Sequence[Batch]
    out: Path


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
        return True
    if resume:
        _resume(run, state)
    elif state.world.is_main:
        start_folder(run.job, run.config, run.out)
    state.world.wait()  # until the main rank has prepared the folder
    steps, warmup = run.plan.steps, run.config.warmup_steps(run.plan.steps)
    if state.step == 0 and warmup >= steps:
        print(f"note: the run of {steps} steps ends within its warm-up of {warmup}, below --lr")
    if not run_steps(state, run.plan, run.config, run.tokenizer, run.validation, run.out):
        return False
    _save_final(run, state)
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


def _save_final(run: Run, state: TrainState) -> None:
    """Write the model of the last step or, with --patience, of the best one; of a LoRA run, the adapters, too."""
    best = Best.of(run.out / "metrics.jsonl")
    if not run.config.patience and best.rose:
        print(f"note: {best.in_words()}: train for fewer steps, lower --lr, or let --patience {PATIENCE} keep the best")
    if run.config.patience and best.step:
        if state.step < run.plan.steps:
            waited = f"{run.config.patience} evaluations without a lower loss"
            print(f"stopped after step {state.step} of {run.plan.steps}: {waited}")
        print(f"final/ is the model of step {best.step}, whose validation loss was the lowest: {best.loss:.4f}")
        load_weights(run.out / "best", state.model)
    if run.config.lora_rank:
        _save_adapter(run, state)
        merge(state.model)  # one matrix after another; `save_model` would keep all of them twice
    save_model(run.out / "final", state.model, run.tokenizer, format=run.config.save_format, world=state.world)


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
