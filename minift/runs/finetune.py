"""The two main jobs, from files to a finished run folder: `finetune` and `pretrain`.

Nothing new happens here: the functions of the other modules are called in the order in which data flows, and the run's
folder (`runs/folder.py`) is kept. Read next: `cli/__init__.py`, or back to `train.py`.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minift.checkpoint import load_model, model_without_memory, weights_of
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.data.pairs import read_all_pairs
from minift.data.records import Skipped, find_files
from minift.distributed.sharding import fill
from minift.distributed.world import World, join
from minift.errors import InputError, RunError, is_out_of_memory
from minift.evaluation.evaluate import compare
from minift.lora import LoRAConfig, add_lora, init_adapters
from minift.pack import collate, encode_pairs
from minift.prompts import Pair, choose_template, template_named
from minift.runs.common import _check_length, _check_model, _count, _machine, _place, _restarts, _run, _write_json
from minift.runs.folder import (
    FinetuneJob,
    check_free,
    write_report,
)
from minift.runs.start import start_state
from minift.storage.names import bundled, model_path
from minift.tokenizer.base import check_fit
from minift.tokenizer.load import load_tokenizer
from minift.train import Plan

HELD_OUT_SHARE = 0.1  # of the pairs, where no file of held-out pairs is given


def finetune_job(model: str, data: Sequence[str] | None = None, test: Sequence[str] | None = None) -> FinetuneJob:
    """A job in which what is not given is bundled: the base, its pairs and, with those, the held-out questions."""
    if data is None:
        data = (str(bundled("pairs.jsonl")),)
        test = (str(bundled("test.jsonl")),) if test is None else test
    return FinetuneJob(str(model_path(model)), tuple(data), tuple(test or ()))


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
