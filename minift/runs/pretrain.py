"""Pretraining, from files of pages to a finished run folder: the pages of the root, called in order.

open_pages      data/stream.py, data/batches.py   files → rows of token ids, without an end
make_plan       train.py, costs/flops.py          how many steps, and how many operations
begin_model     runs/model.py                     a model with random weights, or one whose training continues
start_state     optim.py, runs/start.py           the state before the first step
complete        train.py, runs/common.py          step after step, then final/

minift pretrain --config bundled --data "data/pages/*.json.gz" --tokenizer data/base --steps 20
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from minift.checkpoint import weights_of
from minift.config import CONTINUED, LlamaConfig, TrainConfig
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
from minift.formats.open import carried_from, shape_named
from minift.formats.open import open_model as open_files
from minift.model import Llama
from minift.pack import Batch
from minift.runs.common import check_export, check_length, check_out, choose_machine, complete, describe
from minift.runs.final import Run
from minift.runs.folder import PretrainJob, inputs_of, own_folder, write_report
from minift.runs.freeze import trained_in_words
from minift.runs.machine import choose_compile
from minift.runs.model import open_model, random_model
from minift.runs.start import start_state
from minift.storage.names import model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat_files import find_chat_source, has_chat_template
from minift.tokenizer.load import check_fit, load_tokenizer, tokenizer_files
from minift.train import Plan

VALIDATION_ROWS = 64  # rows of held-out pages on which a pretraining run is evaluated


def pretrain_job(
    config: str = "",
    data: Sequence[str] = (),
    tokenizer: str = "",
    validation: Sequence[str] = (),
    text_field: str = "text",
    encoding: str = "utf-8",
    model: str = "",
) -> PretrainJob:
    """Return a job from the words of the command line, or from a run's `config.json`.

    Args:
        config: the shape of a model with random weights.
        tokenizer: by default that of `model`.
        model: continue the training of this one, in place of `config`.

    Raises:
        InputError: for both `config` and `model`, and for what is missing.
    """
    if config and model:
        raise InputError(f"--config {config} is for random weights, and --model {model} has its own; give one of them")
    for flag, given in (("config or --model", config or model), ("data", data), ("tokenizer", tokenizer or model)):
        if not given:
            raise InputError(f"pretrain needs --{flag} (see minift pretrain --help)")
    path = str(model_path(model)) if model else ""
    files = tuple(data), tokenizer or path, tuple(validation)
    return PretrainJob(config, *files, text_field, check_encoding(encoding), path)


def pretrain(
    job: PretrainJob,
    config: TrainConfig,
    out: Path,
    resume: bool = False,
    plain: bool = False,
    overwrite: bool = False,
) -> bool:
    """Train a model with random weights on pages, or continue the training of one.

    Args:
        out: the run's folder. It must not hold a run, unless `resume` continues that one, or `overwrite` removes it,
            when all inputs of this run have been looked at.
        plain: run the pages as they are read: no faster code of `kernels/` is installed.

    Returns:
        True when the run is complete; False when it was interrupted and can be resumed.

    Raises:
        InputError: for wrong input.
        RunError: when training cannot go on.
    """
    device, config = choose_machine(config, resume, plain, job.model or None)
    with join(config.parallel, device) as world:
        resume = check_out(out, resume, world, overwrite, inputs_of(job, config))
        shape, tokenizer = open_shape(job, config)
        batches = open_pages(job, tokenizer, config, world)
        validation = _validation_rows(job, tokenizer, config, world)
        plan = make_plan(job, tokenizer, config)
        tokens = plan.micro_batches * config.batch_size * config.max_length
        flops = tokens * training_flops_per_token(shape, config.max_length)
        config = config.replace(compile=choose_compile(config, world.device, flops))
        model = begin_model(job, shape, tokenizer, config, world)
        share = trained_in_words(model)
        if not job.model:
            share = "from random weights" + f", {share}" * bool(config.freeze)
        print(describe(model, job.model or job.config, share, config, world))
        if job.model and config.lr == CONTINUED.lr:
            print(f"learning rate up to {config.lr:g}, a tenth of that for random weights: it forgets less (--lr)")
        if config.limit:
            print(f"--limit: no more than the first {config.limit:,} documents")
        size = f"{config.batch_size * config.max_length * config.grad_accum:,} tokens"
        compiled = ", compiled (the first step takes a minute or more)" if config.compile and not plain else ""
        passes = f", {config.epochs:g} passes over the pages" if config.epochs else ""
        print(f"{plan.steps:,} steps of {size}{passes}, {flops:.2g} FLOPs{compiled}")
        carried = carried_from(job.model) if job.model and config.save_format == "hf" else None
        if carried is not None and carried.in_words():
            print(carried.in_words())
        state = start_state(model, batches, config, world, plain)

        def first_weights() -> Iterator[tuple[str, torch.Tensor]]:
            random = torch.Generator().manual_seed(config.seed)
            return weights_of(job.model) if job.model else model.random_weights(random)

        if world.parallel == "fsdp":  # each rank has room for its part now
            fill(model, world, first_weights())
        with own_folder(out, resume, world, overwrite):
            run = Run(job, config, plan, tokenizer, validation, out, first_weights, carried)
            done = complete(run, state, resume)
            if done and world.is_main and config.steps and state.step:  # a run that was complete has read nothing
                print(passes_in_words(batches, state.step * config.grad_accum * config.batch_size * config.max_length))
            _report_skipped(batches)
            if done and world.is_main:
                write_report(out)
        return done


def open_shape(job: PretrainJob, config: TrainConfig) -> tuple[LlamaConfig, Tokenizer]:
    """Return the shape of the model, and the tokenizer.

    Raises:
        InputError: when one of them is missing, or they do not fit together.
    """
    shape = open_files(job.model).config if job.model else shape_named(job.config)
    tokenizer = load_tokenizer(job.tokenizer)
    check_fit(shape, tokenizer, exact=not job.model)
    check_length(config, shape)
    check_export(config, shape, tokenizer)
    if job.model and job.tokenizer != job.model:
        _compare_with_own(tokenizer, job)
    return shape, tokenizer


def _compare_with_own(tokenizer: Tokenizer, job: PretrainJob) -> None:
    """Compare a tokenizer of the user's own with the one in the model's folder, and give it that one's chat template.

    Raises:
        InputError: when they have different numbers of pieces.
    """
    files = tokenizer_files(model_path(job.model))
    if not files:
        return
    found, own = tokenizer.vocab_size, load_tokenizer(job.model).vocab_size
    if found != own:
        raise InputError(f"{job.tokenizer}: has {found} pieces, the tokenizer of {job.model} {own}: they do not fit")
    template = find_chat_source(files)
    if template is not None and not has_chat_template(tokenizer):
        tokenizer.files = {**tokenizer.files, "chat_template.jinja": template[0].encode()}


def open_pages(job: PretrainJob, tokenizer: Tokenizer, config: TrainConfig, world: World) -> PageBatches:
    """Return the batches of the job's pages, of which this rank has its rows.

    Raises:
        InputError: when a file is missing, or the first page cannot be used: before anything is written.
    """
    find_files([*job.data, *job.validation], say=None)
    find_files(job.data, say=print)
    skipped = Skipped(config.strict, quiet=not world.is_main)
    order = (None, config.seed, config.shuffle_buffer)
    stream = DocumentStream(job.data, job.text_field, *order, skipped, job.encoding, config.limit)
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
    stream = DocumentStream(job.data, job.text_field, 1, 0, 0, skipped, job.encoding, config.limit)
    if stream.pipe is not None:
        reason = "can be read only once, so the length of an epoch is unknown; give --steps"
        raise InputError(f"{pipe_in_words(stream.pipe)} {reason}")
    ids = sum(len(chunk.ids) for chunk in encode_documents(stream, tokenizer, config.workers))
    return Plan.make(config, ids / (config.batch_size * config.max_length))


def begin_model(job: PretrainJob, shape: LlamaConfig, tokenizer: Tokenizer, config: TrainConfig, world: World) -> Llama:
    """Return the model whose training continues, or else one with random weights.

    Raises:
        InputError: when the model's files are missing or damaged.
    """
    return open_model(job.model, tokenizer, config, world) if job.model else random_model(shape, config, world)


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


def passes_in_words(batches: PageBatches, tokens: int) -> str:
    """Return how often the pages were read for `tokens` positions of training: known from the first pass's end on.

    The stream has been read further, by the ids that are left, and a part of a pass is counted in documents.
    """
    state = batches.state_dict()
    stream, left = state["stream"], len(state["ids"])
    documents, limit = sum(records for records, _ in stream["whole"].values()), stream["settings"]["limit"]
    if limit and len(stream["whole"]) < len(stream["files"]):  # which come after those that it leaves
        documents = limit
    read = stream["epoch"] and stream["epoch"] + stream["given"] / max(1, documents)
    passes = read * tokens / (tokens + left)
    if passes < 1:
        return "the run ended within its first pass over the pages"
    return f"about {passes:.1f} passes over the pages"


def _report_skipped(batches: PageBatches) -> None:
    """Print what could not be used, up to the last batch that was trained on: the stream has been read further."""
    skipped = Skipped(**batches.state_dict()["stream"]["skipped"])
    if skipped.skipped:
        print(skipped)
