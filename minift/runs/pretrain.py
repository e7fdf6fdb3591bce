"""Pretraining, from files to a finished run folder."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from minift.config import TrainConfig
from minift.costs.flops import training_flops_per_token
from minift.data.batches import PageBatches
from minift.data.encode import encode_documents
from minift.data.records import Skipped, find_files
from minift.data.stream import DocumentStream
from minift.data.unpack import STDIN
from minift.distributed.sharding import fill
from minift.distributed.world import World, join
from minift.errors import InputError
from minift.formats import shape_named
from minift.formats.shapes import model_without_weights
from minift.model import Llama
from minift.pack import Batch
from minift.runs.common import _check_length, _count, _machine, _place, _restarts, _run
from minift.runs.folder import PretrainJob, check_free, write_report
from minift.runs.machine import choose_compile
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer, check_fit
from minift.tokenizer.load import load_tokenizer
from minift.train import Plan

VALIDATION_ROWS = 64  # rows of held-out pages on which a pretraining run is evaluated


def pretrain_job(
    config: str,
    data: Sequence[str],
    tokenizer: str,
    validation: Sequence[str] = (),
    text_field: str = "text",
) -> PretrainJob:
    """A job from the command line's words, or from a run's `config.json`."""
    return PretrainJob(config, tuple(data), tokenizer, tuple(validation), text_field)


def pretrain(job: PretrainJob, config: TrainConfig, out: Path, resume: bool = False) -> bool:
    """Train a model with random weights on pages.

    Returns:
        True when the run is complete; False when it was interrupted (and can be resumed).

    Raises:
        InputError: for wrong input.
        RunError: when training cannot go on.
    """
    device, config = _machine(config)
    with join(config.parallel, device) as world:
        return _pretrain(job, config, out, resume or _restarts(out), world)


def _pretrain(job: PretrainJob, config: TrainConfig, out: Path, resume: bool, world: World) -> bool:
    device = world.device
    if not resume:
        check_free(out)
    world.wait()  # all have looked, before somebody writes
    shape = shape_named(job.config)
    tokenizer = load_tokenizer(job.tokenizer)
    check_fit(shape, tokenizer, exact=True)
    _check_length(config, shape)
    find_files([*job.data, *job.validation])
    skipped = Skipped(config.strict, quiet=not world.is_main)
    stream = DocumentStream(job.data, job.text_field, None, config.seed, config.shuffle_buffer, skipped)
    batches = PageBatches(
        stream,
        tokenizer,
        config.batch_size,
        config.max_length,
        config.isolate,
        config.workers,
        world.rank,
        world.size,
    )
    if STDIN in stream.files and world.size > 1:
        raise InputError("-: standard input has one reader, and here are several processes; write it to a file first")
    if STDIN not in stream.files:  # an empty or unreadable corpus fails before anything is written
        next(iter(DocumentStream(job.data, job.text_field, skipped=Skipped(config.strict, quiet=True))))
    validation = _page_validation(job, tokenizer, config, quiet=not world.is_main)
    per_epoch = 0.0 if config.steps else _count_micro_batches(job, tokenizer, config)
    plan = Plan.make(config, per_epoch)
    tokens = plan.micro_batches * config.batch_size * config.max_length
    flops = tokens * training_flops_per_token(shape, config.max_length)
    config = config.replace(compile=choose_compile(config, device, flops))

    random_numbers = torch.Generator().manual_seed(config.seed)
    if world.parallel == "fsdp":
        model = model_without_weights(shape)
    else:
        model = Llama(shape)
        model.init_weights(random_numbers)
        model.to(device)
    print(f"{job.config}: {_count(model):,} parameters, from random weights, on {_place(world)} in {config.dtype}")
    print(f"{plan.steps:,} steps, {flops:.2g} FLOPs" + (", compiled" if config.compile else ""))
    state = start_state(model, batches, config, world)
    if world.parallel == "fsdp":
        fill(model, world, model.random_weights(random_numbers))
    done = _run("pretrain", job, config, plan, state, tokenizer, validation, out, resume)
    counted = Skipped(**batches.state_dict()["stream"]["skipped"])  # up to the last batch: more has been read ahead
    if counted.skipped:
        print(counted)
    if done and world.is_main:
        write_report(out)
    return done


def _page_validation(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig, quiet: bool) -> list[Batch]:
    if not job.validation:
        return []
    stream = DocumentStream(job.validation, job.text_field, epochs=1, skipped=Skipped(config.strict, quiet))
    batches = PageBatches(stream, tokenizer, 1, config.max_length, isolate=config.isolate)
    rows = list(islice(batches, VALIDATION_ROWS))
    if not rows:
        raise InputError(f"{job.validation[0]}: too little text for a row of {config.max_length} tokens")
    return rows


def _count_micro_batches(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig) -> float:
    """How many micro-batches one pass over the pages makes: they are read once to know how long an epoch is."""
    stream = DocumentStream(job.data, job.text_field, epochs=1, skipped=Skipped(config.strict, quiet=True))
    if STDIN in stream.files:
        raise InputError("how long an epoch of standard input is cannot be known before; give --steps")
    ids = sum(len(chunk.ids) for chunk in encode_documents(stream, tokenizer, config.workers))
    return ids / (config.batch_size * config.max_length)
