"""Pretraining, from files of pages to a finished run folder: the pages of the root, called in order.

open_pages      data/stream.py, data/batches.py   files → rows of token ids, without an end
make_plan       train.py, costs/flops.py          how many steps, and how many operations
random_model    model.py                          a model with random weights
start_state     optim.py, runs/start.py           the state before the first step
complete        train.py, runs/common.py          step after step, then final/

minift pretrain --config bundled --data "data/pages/*.json.gz" --tokenizer data/base --steps 20
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from minift.config import LlamaConfig, TrainConfig
from minift.costs.flops import training_flops_per_token
from minift.data.batches import PageBatches
from minift.data.encode import encode_documents
from minift.data.encodings import check_encoding
from minift.data.records import Skipped, find_files
from minift.data.stream import DocumentStream
from minift.data.unpack import pipe_in_words
from minift.distributed.sharding import fill
from minift.distributed.world import World, join
from minift.errors import InputError
from minift.formats.open import shape_named
from minift.formats.shapes import model_without_weights
from minift.model import Llama
from minift.pack import Batch
from minift.runs.common import Run, check_length, check_out, choose_machine, complete, describe
from minift.runs.folder import PretrainJob, own_folder, write_report
from minift.runs.machine import choose_compile
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import check_fit, load_tokenizer
from minift.train import Plan

VALIDATION_ROWS = 64  # rows of held-out pages on which a pretraining run is evaluated


def pretrain_job(
    config: str,
    data: Sequence[str],
    tokenizer: str,
    validation: Sequence[str] = (),
    text_field: str = "text",
    encoding: str = "utf-8",
) -> PretrainJob:
    """Return a job from the words of the command line, or from a run's `config.json`."""
    return PretrainJob(config, tuple(data), tokenizer, tuple(validation), text_field, check_encoding(encoding))


def pretrain(job: PretrainJob, config: TrainConfig, out: Path, resume: bool = False, plain: bool = False) -> bool:
    """Train a model with random weights on pages.

    Args:
        out: the run's folder. It must not hold a run, unless `resume` continues that one.
        plain: run the pages as they are read: no faster code of `kernels/` is installed.

    Returns:
        True when the run is complete; False when it was interrupted and can be resumed.

    Raises:
        InputError: for wrong input.
        RunError: when training cannot go on.
    """
    device, config = choose_machine(config, resume, plain)
    with join(config.parallel, device) as world:
        resume = check_out(out, resume, world)
        shape, tokenizer = open_shape(job, config)
        batches = open_pages(job, tokenizer, config, world)
        validation = _validation_rows(job, tokenizer, config, world)
        plan = make_plan(job, tokenizer, config)
        tokens = plan.micro_batches * config.batch_size * config.max_length
        flops = tokens * training_flops_per_token(shape, config.max_length)
        config = config.replace(compile=choose_compile(config, world.device, flops))
        model = random_model(shape, config, world)
        print(describe(model, job.config, "from random weights", config, world))
        print(f"{plan.steps:,} steps, {flops:.2g} FLOPs" + (", compiled" if config.compile and not plain else ""))
        state = start_state(model, batches, config, world, plain)
        if world.parallel == "fsdp":  # each rank has room for its part now
            fill(model, world, model.random_weights(torch.Generator().manual_seed(config.seed)))
        with own_folder(out, resume, world):
            done = complete(Run(job, config, plan, tokenizer, validation, out), state, resume)
            _report_skipped(batches)
            if done and world.is_main:
                write_report(out)
        return done


def open_shape(job: PretrainJob, config: TrainConfig) -> tuple[LlamaConfig, Tokenizer]:
    """Return the shape of the model, and the tokenizer.

    Raises:
        InputError: when one of them is missing, or they do not fit together.
    """
    shape, tokenizer = shape_named(job.config), load_tokenizer(job.tokenizer)
    check_fit(shape, tokenizer, exact=True)
    check_length(config, shape)
    return shape, tokenizer


def open_pages(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig, world: World) -> PageBatches:
    """Return the batches of the job's pages, of which this rank has its rows.

    Raises:
        InputError: when a file is missing, or the first page cannot be used: before anything is written.
    """
    find_files([*job.data, *job.validation], say=None)
    find_files(job.data, say=print)
    skipped = Skipped(config.strict, quiet=not world.is_main)
    stream = DocumentStream(job.data, job.text_field, None, config.seed, config.shuffle_buffer, skipped, job.encoding)
    options = (config.batch_size, config.max_length, config.isolate, config.workers, world.rank, world.size)
    batches = PageBatches(stream, tokenizer, *options)
    if stream.pipe is None:
        looked_at = Skipped(config.strict, quiet=True)
        next(iter(DocumentStream(job.data, job.text_field, skipped=looked_at, encoding=job.encoding)))
    elif world.size > 1:
        raise InputError(
            f"{pipe_in_words(stream.pipe)} has one reader, but this run has several processes; write it to a file"
        )
    return batches


def make_plan(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig) -> Plan:
    """Return the length of the run. Where it is given in epochs, all pages are read once, to know how long one is.

    Raises:
        InputError: when the length cannot be known.
    """
    if config.steps:
        return Plan.make(config, 0.0)
    skipped = Skipped(config.strict, quiet=True)
    stream = DocumentStream(job.data, job.text_field, epochs=1, skipped=skipped, encoding=job.encoding)
    if stream.pipe is not None:
        reason = "can be read only once, so the length of an epoch is unknown; give --steps"
        raise InputError(f"{pipe_in_words(stream.pipe)} {reason}")
    ids = sum(len(chunk.ids) for chunk in encode_documents(stream, tokenizer, config.workers))
    return Plan.make(config, ids / (config.batch_size * config.max_length))


def random_model(shape: LlamaConfig, config: TrainConfig, world: World) -> Llama:
    """Return a model with random weights; in a sharded run (fsdp) one on "meta", without memory."""
    if world.parallel == "fsdp":
        return model_without_weights(shape)
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model.to(world.device)


def _validation_rows(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig, world: World) -> list[Batch]:
    """Return the first rows of the held-out pages, each a batch; none where there are no such pages."""
    if not job.validation:
        return []
    skipped = Skipped(config.strict, quiet=not world.is_main)
    stream = DocumentStream(job.validation, job.text_field, epochs=1, skipped=skipped, encoding=job.encoding)
    batches = PageBatches(stream, tokenizer, 1, config.max_length, isolate=config.isolate)
    rows = list(islice(batches, VALIDATION_ROWS))
    if not rows:
        raise InputError(f"{job.validation[0]}: too little text for a row of {config.max_length} tokens")
    return rows


def _report_skipped(batches: PageBatches) -> None:
    """Print what could not be used, up to the last batch that was trained on: the stream has been read further."""
    skipped = Skipped(**batches.state_dict()["stream"]["skipped"])
    if skipped.skipped:
        print(skipped)
