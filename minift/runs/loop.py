"""The loop of a run: `train.train`, with saving, patience, signals and memory that is full around it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from minift.config import TrainConfig
from minift.distributed.sharding import first_not_finite
from minift.errors import InputError, RunError, is_out_of_memory, out_of_memory
from minift.lora import has_adapter
from minift.pack import Batch
from minift.runs.clock import Clock, is_evaluated
from minift.runs.events import open_events
from minift.runs.progress import BEFORE, Best, metrics_file, progress_bar, record_of, say_what, show
from minift.runs.steps import load_random_state, random_state, save_best, save_step
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
    stop: StopSignal | None = None,
) -> bool:
    """Take the steps that are left of `plan`, writing `metrics.jsonl` and checkpoints into `out`.

    The validation loss is measured before the first step, some times on the way, and after the last step. The weights
    of the lowest one are kept in `out/best`; not those of before the first step, which the run began with, but its
    adapters are. With `config.patience` the run ends when so many evaluations have not found a lower one (Prechelt,
    "Early Stopping – But When?", 1998), and with `config.max_minutes` when they are over.

    Args:
        stop: the signals that end the run early; by default none do.

    Returns:
        True when the run is done; False when a signal ended it before its last step, or in the evaluation after that
        (the state is then saved).

    Raises:
        RunError: when a gradient or weight is not finite any more, memory is full, or one of several processes was
            interrupted within a step.
        InputError: for a bad record in the data. In both cases the steps before it are saved, unless memory is full
            while other ranks go on: they would not take part in the saving.
    """
    world, clock, best = state.world, Clock(config), Best.of(out / "metrics.jsonl")
    saved, last, stop = state.step, dict[str, Any](), stop or StopSignal(quiet=True)
    world.wait()  # all have read the same
    if config.patience and best.evaluations_since >= config.patience:
        return True
    try:
        events = open_events(config, out, state)
        with metrics_file(out, world) as metrics, closing(events):
            for record in _records(state, plan, config, validation, stop, clock):
                last = record
                if best.add(record) and _must_be_kept(state, plan):
                    save_best(out / "best", state, tokenizer, best)
                if state.step == 0:
                    continue
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                events.add(record)
                if "validation_loss" in record and best.rose and best.evaluations_since == 1 and world.is_main:
                    tqdm.write(f"step {state.step}: {best.in_words()}")
                if config.patience and best.evaluations_since >= config.patience:
                    return True
                if clock.save_is_due(state):
                    if world.is_main:
                        flush(metrics.fileno())  # or a step might be saved whose line is lost
                    _check_weights(state)
                    save_step(out, state, tokenizer, config.keep)
                    saved = state.step
        _check_weights(state)
    except KeyboardInterrupt:  # on one of several ranks: the others cannot finish the step
        since = f"--resume continues after step {saved}, which was saved last" if saved else "nothing is saved yet"
        raise RunError(f"interrupted within step {state.step + 1}; {since}") from None
    except Exception as error:
        _end_after(error, state, config, tokenizer, out, saved)
    evaluated = "validation_loss" in last or not (last and validation and is_evaluated(state.step, plan, config))
    done = (state.step >= plan.steps and evaluated) or not world.any(stop.requested)  # or a resumed run evaluates it
    if not done and saved != state.step:
        save_step(out, state, tokenizer, config.keep)
    return done


def _end_after(
    error: Exception, state: TrainState, config: TrainConfig, tokenizer: Tokenizer, out: Path, saved: int
) -> NoReturn:
    """Save the steps before an error, where they are good and have not been saved; then raise it, or what it means.

    Args:
        saved: the step that was saved last.
    """
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


def _must_be_kept(state: TrainState, plan: Plan) -> bool:
    """Return whether the weights have to be written down: not those of the last step, nor those of the base."""
    return state.step < plan.steps and (state.step > 0 or has_adapter(state.model))


def _records(
    state: TrainState,
    plan: Plan,
    config: TrainConfig,
    validation: Sequence[Batch],
    stop: StopSignal,
    clock: Clock,
) -> Iterator[dict[str, Any]]:
    """Take the steps that are left, one at a time; yield what each has to report.

    Before the first step a record of only its validation loss is yielded; the first step's record has it, too.
    """
    steps, place, before, is_over = train(state, plan, config), None, None, False
    state.optimizer.register_step_pre_hook(stop.hold)
    with progress_bar(plan.steps, state) as bar:
        if validation and state.step == 0:
            before = _evaluate(state, validation, bar, stop)
            bar.unpause()  # the time of a step does not include it
            yield {"step": 0, **before}
        while state.step < plan.steps and not state.world.any(stop.requested) and not is_over:
            place = place or state.batches.state_dict()
            random = random_state()
            try:
                with stop.interruptible():
                    step = next(steps)
                _check_skipped(state, step)
            except (Exception, KeyboardInterrupt) as error:  # no step was made: a resumed run draws this window again
                state.batches.load_state_dict(place)
                if not isinstance(error, KeyboardInterrupt) or state.world.size > 1:
                    raise
                state.optimizer.zero_grad(set_to_none=True)
                load_random_state(random)
                break
            if not step.result.stepped:
                bar.write(f"step {state.step + 1}: float16 overflowed; again, at scale {state.scaler.get_scale():g}")
                continue
            record, place = record_of(state, step), None
            if state.step == 1 and before:
                record[BEFORE] = before["validation_loss"]
            is_over = clock.is_over(state)
            if validation and (is_over or is_evaluated(state.step, plan, config)):
                record |= _evaluate(state, validation, bar, stop)
            show(bar, record)
            yield record
        if place is not None:  # the last window that was drawn overflowed
            state.batches.load_state_dict(place)


def _evaluate(state: TrainState, validation: Sequence[Batch], bar: "tqdm[Any]", stop: StopSignal) -> dict[str, float]:
    """Return the validation loss as part of a record; nothing where a second signal has interrupted it."""
    say_what(bar, "evaluating")
    try:
        with stop.interruptible():
            return {"validation_loss": validation_loss(state, validation)}
    except KeyboardInterrupt:
        if state.world.size > 1:
            raise
        state.model.train()
        return {}
    finally:
        say_what(bar, "training")


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
