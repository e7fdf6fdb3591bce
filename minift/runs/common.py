"""What both jobs do: choose the machine, own the folder, and take the steps that lead to `final/`."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from minift.config import LlamaConfig, TrainConfig
from minift.distributed.world import World, may_restart, restarted
from minift.errors import InputError, RunError, need
from minift.formats.huggingface import check_shape
from minift.model import Llama
from minift.runs.clock import is_evaluated
from minift.runs.contents import contents
from minift.runs.events import FOLDER, open_events
from minift.runs.final import Run, remove_saves, save_final
from minift.runs.folder import check_free, check_made_from, newest_whole_step, start_folder
from minift.runs.loop import run_steps
from minift.runs.machine import check_compiler, choose_device, choose_dtype, choose_save_format
from minift.runs.metrics import cut_metrics, read_metrics
from minift.runs.place import check_replaceable, remove_own_leftovers
from minift.runs.progress import Best
from minift.runs.space import bytes_of_saves, check_space
from minift.runs.steps import load_step, save_best
from minift.runs.stop import AFTER_FINAL, StopSignal
from minift.storage.atomic import write_file
from minift.storage.checksums import check_model
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.save import json_file
from minift.train import TrainState, validation_loss

# Before the first step ------------------------------------------------------------------------------------------------


def choose_machine(
    config: TrainConfig, resume: bool, plain: bool, model: str | None = None
) -> tuple[torch.device, TrainConfig]:
    """Return the device to train on, and the config with its dtype and the format of `final/` chosen.

    Args:
        model: what is trained, if it is not from random weights.

    Raises:
        InputError: for a device, dtype, compiler or package that this machine does not have, and for a new run that is
            to be both plain and compiled. (One that was compiled may be resumed plain.)
    """
    if plain and config.compile and not resume:
        raise InputError("--plain runs the code as it is read, and --compile compiles it; give one of them")
    if resume and not torch.cuda.is_available() and (config.device == "cuda" or config.dtype == "float16"):
        raise InputError("the run was begun on a GPU, and torch finds none: resume it where there is one")
    device = choose_device(config)
    if not plain:
        check_compiler(config, device)
    config = config.replace(save_format=choose_save_format(config, model))
    if config.save_format == "hf":  # checked now: the run would fail at its end
        need("tokenizers", "hf", "--save-format hf")
        need("safetensors", "hf", "--save-format hf")
    if config.tensorboard:
        need("tensorboard", "tensorboard", "--tensorboard")
    return device, config.replace(dtype=choose_dtype(config, device))


def check_out(
    out: Path, resume: bool, world: World, overwrite: bool = False, inputs: Sequence[str | Path] = ()
) -> bool:
    """Check that a new run can begin in `out`. Return True if a run is to be resumed there. Call it on all ranks.

    It is also resumed when `torchrun --max-restarts` has started the command again, in the words that began it.

    Args:
        overwrite: let it begin where an earlier run is.
        inputs: what it reads.

    Raises:
        InputError: when a new run cannot begin there.
    """
    if overwrite and (resume or may_restart()):
        other = "--resume" if resume else "torchrun's --max-restarts, which goes on with the run in --out,"
        raise InputError(f"--overwrite begins a new run, and {other} continues one; give one of them")
    resume = resume or (restarted() and (out / "config.json").is_file())
    if overwrite:
        check_replaceable(out, inputs)
    elif not resume:
        check_free(out)
    world.wait()  # until every rank has looked: then the main one may write
    return resume


def check_length(config: TrainConfig, shape: LlamaConfig) -> None:
    """Raise InputError when the rows are longer than the model's positions."""
    if config.max_length > shape.max_position_embeddings:
        positions = shape.max_position_embeddings
        raise InputError(f"max_length {config.max_length} is more than the model's {positions} positions; lower it")


def check_export(config: TrainConfig, shape: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raise InputError where `final/` is to be a Hugging Face folder, and that cannot hold this model or tokenizer."""
    if config.save_format == "hf":
        check_shape(shape)
        json_file(tokenizer)


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
        RunError: when training cannot go on, or a signal came while `final/` was saved.
    """
    if run.config.patience and (run.config.eval_every == 0 or not run.validation):
        raise InputError("--patience needs held-out data to be evaluated on, and --eval-every above 0")
    made_from = contents(vars(run.job), run.config, run.tokenizer, run.validation, state)
    if resume:
        check_made_from(made_from, run.job, run.config, run.out)
    if resume and (run.out / "final").is_dir():
        state.world.agreed(_check_files, run.out / "final", state, "and the step folders, to train again")
        state.world.agreed(_mend_metrics, run, state, None)
        remove_saves(run, state)
        print(f"{run.out}: is complete; no step is left to take")
        return True
    needed = bytes_of_saves(state.model, run.plan, run.config, evaluated=bool(run.validation))
    state.world.agreed(check_space, run.out if state.world.is_main else None, needed)
    if resume:
        _resume(run, state)
        _evaluate_again(run, state)
    elif state.world.is_main:
        start_folder(run.job, run.config, run.out, made_from)
    state.world.wait()  # until the main rank has prepared the folder
    steps, warmup = run.plan.steps, run.config.warmup_steps(run.plan.steps)
    if state.step == 0 and warmup >= steps:
        print(f"note: the run of {steps} steps ends within its warm-up of {warmup}, below --lr")
    with StopSignal(quiet=not state.world.is_main) as stop:
        if not run_steps(state, run.plan, run.config, run.tokenizer, run.validation, run.out, stop):
            return False
        stop.first = AFTER_FINAL
        save_final(run, state)
        remove_saves(run, state)
    if state.world.any(stop.requested):
        raise RunError(f"interrupted; {run.out / 'final'} is saved, and --resume does the rest")
    return True


def _resume(run: Run, state: TrainState) -> None:
    """Load the newest step folder that is whole, if there is one, and forget what was measured after its step."""
    if state.world.is_main:
        remove_own_leftovers(run.out)
    folder = newest_whole_step(run.out)
    if folder is not None:
        load_step(folder, state)
    state.world.agreed(_mend_metrics, run, state, -1 if folder is None else state.step)
    if (run.out / "best").exists():  # now, not after the last step
        state.world.agreed(_check_files, run.out / "best", state, "to go on without the best model so far")
    print(f"{run.out}: continues after step {state.step} of {run.plan.steps}")


def _evaluate_again(run: Run, state: TrainState) -> None:
    """Make the evaluation that is due after the newest step, where a signal has interrupted it. Call on all ranks."""
    file = run.out / "metrics.jsonl"
    records = read_metrics(file)
    due = run.validation and is_evaluated(state.step, run.plan, run.config)
    lacking = due and records and records[-1]["step"] == state.step and "validation_loss" not in records[-1]
    if not state.world.any(bool(lacking)):
        return
    best = Best.of_records(records)
    records[-1]["validation_loss"] = validation_loss(state, run.validation)
    if best.add(records[-1]):
        save_best(run.out / "best", state, run.tokenizer, best)
    if state.world.is_main:
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        write_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    if (run.out / FOLDER).is_dir():
        with closing(open_events(run.config, run.out, state)) as events:
            events.add({"step": state.step, "validation_loss": records[-1]["validation_loss"]})
    state.world.wait()


def _mend_metrics(run: Run, state: TrainState, step: int | None) -> None:
    """Cut a run's metrics after step `step`, and say what was lost of them. Only the main rank does it."""
    if state.world.is_main and (loss := cut_metrics(run.out / "metrics.jsonl", step)):
        print(loss)


def _check_files(folder: Path, state: TrainState, purpose: str) -> None:
    """Raise InputError when a folder of this run is damaged. Only the main rank looks."""
    try:
        if state.world.is_main:
            check_model(folder)
    except InputError as error:
        raise InputError(f"{error}; or remove {folder} {purpose}") from None
