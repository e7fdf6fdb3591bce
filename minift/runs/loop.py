"""The loop of a run: `train.train`, with saving, patience, signals and memory that is full around it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minift.config import TrainConfig
from minift.distributed.sharding import first_not_finite
from minift.errors import InputError, RunError, is_out_of_memory, out_of_memory
from minift.pack import Batch
from minift.runs.progress import Best, metrics_file, progress_bar, record_of, show
from minift.runs.steps import save_best, save_step
from minift.runs.stop import StopSignal
from minift.storage.system import flush
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, Step, TrainState, train, validation_loss


def run_steps(
    state: TrainState,
    plan: Plan,
    config: TrainConfig,
    tokenizer: Tokenizer,
    validation: Sequence[Batch],
    out: Path,
) -> bool:
    """Take the steps that are left of `plan`, writing `metrics.jsonl` and checkpoints into `out`.

    With `config.patience`, the model of the lowest validation loss is kept in `out/best`, and the run ends when so many
    evaluations have not found a lower one (Prechelt, "Early Stopping – But When?", 1998).

    Returns:
        True when the run is done; False when Ctrl-C or SIGTERM ended it early (the state is then saved).

    Raises:
        RunError: when a gradient or weight is not finite any more, or memory is full.
        InputError: for a bad record in the data. In both cases the steps before it are saved, unless memory is full
            while other ranks go on: they would not take part in the saving.
    """
    saved, best = state.step, Best.of(out / "metrics.jsonl")
    state.world.wait()  # all have read the same
    if config.patience and best.evaluations_since >= config.patience:
        return True
    try:
        with StopSignal() as stop, metrics_file(out, state.world) as metrics:
            for record in _records(state, plan, config, validation, stop):
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                if best.add(record) and config.patience:
                    save_best(out / "best", state, tokenizer)
                if best.rose and best.evaluations_since == 1 and state.world.is_main:
                    tqdm.write(f"step {state.step}: {best.in_words()}")
                if config.patience and best.evaluations_since >= config.patience:
                    return True
                if _due(state.step, config.save_every, None):
                    if state.world.is_main:
                        flush(metrics.fileno())  # or a step might be saved whose line is lost
                    _check_weights(state)
                    save_step(out, state, tokenizer, config.keep)
                    saved = state.step
        _check_weights(state)
    except Exception as error:
        full = is_out_of_memory(error)
        if not full and not isinstance(error, InputError | RunError):
            raise
        unsaved = saved != state.step and not (full and state.world.size > 1)
        if unsaved and first_not_finite(state.model, state.world) is None:  # the steps before it are good
            save_step(out, state, tokenizer, config.keep)
        if full:
            remedy = "lower --batch-size and raise --grad-accum, or --checkpoint-activations"
            raise RunError(f"step {state.step + 1}: {out_of_memory(error)}; {remedy}") from None
        raise
    done = state.step >= plan.steps
    if not done and saved != state.step:
        save_step(out, state, tokenizer, config.keep)
    return done


def _records(
    state: TrainState, plan: Plan, config: TrainConfig, validation: Sequence[Batch], stop: StopSignal
) -> Iterator[dict[str, Any]]:
    """Take the steps that are left, one at a time; yield what each has to report."""
    steps = train(state, plan, config)
    with progress_bar(plan.steps, state) as bar:
        while state.step < plan.steps and not state.world.any(stop.requested):
            place = state.batches.state_dict()
            try:
                step = next(steps)
                _check_skipped(state, step)
            except Exception:  # no step was made of this window: a resumed run draws it again
                state.batches.load_state_dict(place)
                raise
            if not step.result.stepped:
                bar.write(f"step {state.step + 1}: float16 overflowed; again, at scale {state.scaler.get_scale():g}")
                continue
            record = record_of(state, step)
            if validation and _due(state.step, config.eval_every, plan.steps):
                record["validation_loss"] = validation_loss(state, validation)
            show(bar, record)
            yield record


def _due(step: int, every: int, last: int | None) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_weights(state: TrainState) -> None:
    """Raise RunError when a step has made weights that are not finite: only the next step's loss would show it."""
    culprit = first_not_finite(state.model, state.world)
    if culprit is not None:
        raise RunError(f"step {state.step} has made {culprit} infinite or NaN; lower --lr")


def _check_skipped(state: TrainState, step: Step) -> None:
    """Raise RunError for a skipped step, but where float16 still lowers its scale: anything else ends the run."""
    result, scaler = step.result, state.scaler
    if result.stepped or (scaler.is_enabled() and scaler.get_scale() >= 1.0):
        return
    found = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}, first in {result.culprit}"
    raise RunError(f"step {state.step + 1} is not finite ({found}); lower --lr, or try another --dtype")
