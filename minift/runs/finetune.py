"""The two main jobs, from files to a finished run folder: `finetune` and `pretrain`.

Nothing new happens here: the functions of the other modules are called in the order in which data flows, and the run's
folder (`runs/folder.py`) is kept. Read next: `cli/__init__.py`, or back to `train.py`.
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.checkpoint import load_model, load_step, load_weights, model_without_memory, save_model, weights_of
from minift.config import LlamaConfig, TrainConfig, bundled, model_path
from minift.costs.flops import training_flops_per_token
from minift.data.encode import encode_documents
from minift.data.records import STDIN, Skipped, find_files
from minift.data.stream import DocumentStream
from minift.distributed.world import World, fill, join, restarted
from minift.errors import InputError, RunError, is_out_of_memory
from minift.evaluation.evaluate import compare
from minift.extras import need
from minift.formats import shape_named
from minift.lora import LoRAConfig, adapter_weights, add_lora, init_adapters, merge, write_peft
from minift.model import Llama
from minift.pack import Batch, PageBatches, PairBatches, collate, encode_pairs
from minift.prompts import Pair, choose_template, read_all_pairs, template_named
from minift.runs.folder import (
    FinetuneJob,
    PretrainJob,
    check_free,
    cut_metrics,
    newest_whole_step,
    own_folder,
    start_folder,
    write_report,
)
from minift.runs.machine import check_compiler, choose_compile, choose_device, choose_dtype
from minift.runs.progress import Best
from minift.state import TrainState
from minift.storage.atomic import remove_leftovers, write_folder
from minift.storage.checksums import check_model
from minift.tokenizer.base import Tokenizer, check_fit, load_tokenizer
from minift.train import Plan, start_state, train

VALIDATION_ROWS = 64  # rows of held-out pages on which a pretraining run is evaluated
HELD_OUT_SHARE = 0.1  # of the pairs, where no file of held-out pairs is given


def finetune_job(model: str, data: Sequence[str] | None = None, test: Sequence[str] | None = None) -> FinetuneJob:
    """A job in which what is not given is bundled: the base, its pairs and, with those, the held-out questions."""
    if data is None:
        data = (str(bundled("pairs.jsonl")),)
        test = (str(bundled("test.jsonl")),) if test is None else test
    return FinetuneJob(str(model_path(model)), tuple(data), tuple(test or ()))


def pretrain_job(
    config: str,
    data: Sequence[str],
    tokenizer: str,
    validation: Sequence[str] = (),
    text_field: str = "text",
) -> PretrainJob:
    """A job from the command line's words, or from a run's `config.json`."""
    return PretrainJob(config, tuple(data), tokenizer, tuple(validation), text_field)


def finetune(job: FinetuneJob, config: TrainConfig, out: Path, resume: bool = False) -> dict[str, Any] | None:
    """Finetune all the weights of a model on instruction pairs, then compare it with what it was.

    Args:
        out: the run's folder. It must not hold a run, unless `resume` continues that one.

    Returns:
        The comparison that is also in `out/compare.json` (of several processes, the main one has it, and the others
        nothing); None when the run was interrupted (and can be resumed).

    Raises:
        InputError: for wrong input; nothing is written before all of it has been read.
        RunError: when training cannot go on.
    """
    device, config = _machine(config)
    with join(config.parallel, device) as world:
        return _finetune(job, config, out, resume or _restarts(out), world)


def _finetune(job: FinetuneJob, config: TrainConfig, out: Path, resume: bool, world: World) -> dict[str, Any] | None:
    device = world.device
    if not resume:
        check_free(out)
    world.wait()  # all have looked, before somebody writes
    find_files([*job.data, *job.test])
    skipped = Skipped(config.strict, quiet=True)  # they are all read at once, and reported together
    pairs, held_out = _split(read_all_pairs(job.data, skipped), job.test, config.seed)
    template_name = choose_template(config.template, [*pairs, *held_out])
    template = template_named(template_name)
    config = config.replace(template=template_name)
    _check_model(job.model, world)
    tokenizer = load_tokenizer(job.model)
    sharded = world.parallel == "fsdp"
    model = model_without_memory(job.model) if sharded else load_model(job.model, device=device)
    check_fit(model.config, tokenizer)
    _check_length(config, model.config)
    lora = LoRAConfig.of(config) if config.lora_rank else None
    if lora is not None:
        add_lora(model, lora, torch.Generator().manual_seed(config.seed))
    examples, dropped = encode_pairs(pairs, template, tokenizer, config.max_length)
    unseen, unseen_dropped = encode_pairs(held_out, template, tokenizer, config.max_length)
    cut = sum(example.answer[-1] != tokenizer.eos_id for example in examples)

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "all of them trained" if lora is None else f"{trained:,} of them adapters, which are trained"
    print(f"{job.model}: {_count(model):,} parameters, {share}, on {_place(world)} in {config.dtype}")
    print(f"{len(examples):,} pairs to train on ({cut} cut to {config.max_length} tokens, {dropped} dropped)")
    print(f"{len(held_out):,} pairs held out ({unseen_dropped} without a target); template {template_name}")
    if skipped.skipped:
        print(skipped)
    ranks = (world.rank, world.size)
    batches = PairBatches(examples, config.batch_size, tokenizer.eos_id, config.seed, config.pack, *ranks)
    plan = Plan.make(config, len(batches))
    config = config.replace(compile=bool(config.compile))  # no two batches are of the same shape
    state = start_state(model, batches, config, world)
    if sharded:
        fill(model, world, weights_of(job.model))
        if lora is not None:
            init_adapters(model, torch.Generator().manual_seed(config.seed))
    groups = [unseen[i : i + config.batch_size] for i in range(0, len(unseen), config.batch_size)]
    validation = [collate(group, tokenizer.eos_id, pack=config.pack) for group in groups]
    if not _run("finetune", job, config, plan, state, tokenizer, validation, out, resume):
        return None

    del model, state, batches  # the weights' gradients and moments make room for the two models
    if not world.is_main:
        return {}
    try:
        before = load_model(job.model, device=device)
        after = load_model(out / "final", device=device)
        scores = compare((before, tokenizer), (after, tokenizer), held_out, template)
    except (MemoryError, RuntimeError) as error:  # of a model that was sharded, perhaps
        if not is_out_of_memory(error):
            raise
        remedy = f"minift compare {job.model} {out / 'final'} --data FILE --device cpu"
        raise RunError(f"{out / 'final'} is saved, but {device.type} cannot hold both models: {remedy}") from None
    result = {"template": template_name, **scores}
    _write_json(out / "compare.json", result)
    write_report(out)
    return result


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
        with torch.device("meta"):
            model = Llama(shape)
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


def _run(
    name: str,
    job: FinetuneJob | PretrainJob,
    config: TrainConfig,
    plan: Plan,
    state: TrainState,
    tokenizer: Tokenizer,
    validation: Sequence[Batch],
    out: Path,
    resume: bool,
) -> bool:
    """Start or continue a run in its folder. True when `final/` is there at the end."""
    if config.patience and not (validation and config.eval_every):
        raise InputError("--patience needs held-out data to be evaluated on, and --eval-every")
    with own_folder(out, resume, state.world):
        if resume:
            if (out / "final").is_dir():
                return True
            if state.world.is_main:
                remove_leftovers(out)
            folder = newest_whole_step(out)
            if folder is not None:
                load_step(folder, state)
            if state.world.is_main:
                cut_metrics(out / "metrics.jsonl", state.step)
            print(f"{out}: continues behind step {state.step} of {plan.steps}")
        elif state.world.is_main:
            start_folder(name, job, config, out)
        state.world.wait()  # the folder is as the run needs it
        if state.step == 0 and config.warmup >= plan.steps:
            print(f"note: the run of {plan.steps} steps ends inside its warm-up of {config.warmup}, below --lr")
        if not train(state, plan, config, tokenizer, validation, out):
            return False
        _save_final(job, config, plan, state, tokenizer, out)
        return True


def _save_final(
    job: FinetuneJob | PretrainJob,
    config: TrainConfig,
    plan: Plan,
    state: TrainState,
    tokenizer: Tokenizer,
    out: Path,
) -> None:
    """Write the model of the last step or, with --patience, of the best one; a LoRA run's adapters, too."""
    best = Best.of(out / "metrics.jsonl")
    if config.patience and best.step:
        if state.step < plan.steps:
            print(
                f"stopped after step {state.step} of {plan.steps}: {config.patience} evaluations without a lower loss"
            )
        print(f"final/ is the model of step {best.step}, whose validation loss was the lowest: {best.loss:.4f}")
        load_weights(out / "best", state.model)
    if config.lora_rank:
        assert isinstance(job, FinetuneJob)
        adapter = adapter_weights(state.model)
        if state.world.is_main:
            write_folder(out / "adapter", partial(_write_peft, adapter, LoRAConfig.of(config), job.model, tokenizer))
        merge(state.model)
    save_model(out / "final", state.model, tokenizer, format=config.save_format, world=state.world)


def _write_peft(adapter: dict[str, Tensor], lora: LoRAConfig, base: str, tokenizer: Tokenizer, folder: Path) -> None:
    write_peft(folder, adapter, lora, str(Path(base).resolve()))
    tokenizer.save(folder)


def _check_model(model: str, world: World) -> None:
    """Hold the model's files against their checksums, before hours of training: one rank for all."""
    failure = None
    if world.is_main:
        try:
            check_model(model)
        except InputError as error:
            failure = error
    world.agree(failure)


def _restarts(out: Path) -> bool:
    """Whether torchrun has started the run again, which then goes on: with the words that it was begun with."""
    return restarted() and (out / "config.json").is_file()


def _place(world: World) -> str:
    """Where a run computes, for its first lines."""
    return world.device.type + (f" ({world.size} processes, {world.parallel})" if world.parallel else "")


def _machine(config: TrainConfig) -> tuple[torch.device, TrainConfig]:
    """The device to train on, and the config with its dtype chosen. Raises InputError for what cannot be had."""
    device = choose_device(config)
    check_compiler(config, device)
    if config.save_format == "hf":  # or a run would find out at its end
        need("tokenizers", "hf", "--save-format hf")
        need("safetensors", "hf", "--save-format hf")
    return device, config.replace(dtype=choose_dtype(config, device))


def _split(pairs: list[Pair], test: Sequence[str], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: those of the test files, or a tenth drawn by the seed."""
    if test:
        return pairs, read_all_pairs(test)
    if len(pairs) < 2:
        raise InputError(f"{pairs[0].where}: a single pair cannot be split; give at least 2, or --test")
    held_out = set(random.Random(seed).sample(range(len(pairs)), max(1, round(len(pairs) * HELD_OUT_SHARE))))
    return (
        [pair for i, pair in enumerate(pairs) if i not in held_out],
        [pairs[i] for i in sorted(held_out)],
    )


def _check_length(config: TrainConfig, shape: LlamaConfig) -> None:
    if config.max_length > shape.max_position_embeddings:
        raise InputError(
            f"max_length {config.max_length} is more than the model's {shape.max_position_embeddings} positions"
        )


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


def _count(model: Llama) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from None
