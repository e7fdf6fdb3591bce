"""Finetuning, from files of pairs to a finished run folder: the pages of the root, called in order.

read_data    prompts.py, data/conversations.py        files → pairs to train on, pairs held out, the template of both
open_model    runs/model.py, lora.py           the model, with adapters if they are asked for
encode        pack.py                          pairs → examples: token ids, of which the answer's are learned
choose_defaults  runs/defaults.py              the settings that are not given, from those examples and the model
announce                                       what the run is going to do
start_state   optim.py, runs/start.py          the state before the first step
complete      train.py, runs/common.py         step after step, then final/
compare       evaluation/evaluate.py           both models on the pairs held out

minift finetune --steps 100 --plain
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minift import kernels
from minift.checkpoint import load_model, weights_of
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.data.conversations import Reading, read_all_conversations
from minift.data.encodings import check_encoding
from minift.data.examine import finding_lines
from minift.data.examples import encode_conversations
from minift.data.records import Skipped, find_files
from minift.data.split import held_out_places
from minift.data.templates import choose_template, passes_over_own, template_named
from minift.distributed.world import World, join
from minift.errors import InputError, RunError, is_out_of_memory
from minift.evaluation.evaluate import compare
from minift.formats.carried import Carried
from minift.formats.open import carried_from
from minift.model import Llama
from minift.pack import Batch, Example, collate
from minift.prompts import Chat, Conversation
from minift.runs.common import check_export, check_length, check_out, choose_machine, complete, describe
from minift.runs.defaults import Task, choose_defaults
from minift.runs.final import Run
from minift.runs.folder import FinetuneJob, inputs_of, own_folder, read_run, write_report
from minift.runs.freeze import trained_in_words
from minift.runs.machine import memory_of_rank
from minift.runs.model import fill_shards, open_model
from minift.runs.start import start_state
from minift.runs.stop import ended_by_signals
from minift.storage.atomic import write_file
from minift.storage.names import bundled, model_path
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat import ChatTemplate, has_chat_template, stop_at_turns
from minift.tokenizer.load import load_tokenizer
from minift.train import Plan, TrainState


def finetune_job(
    model: str,
    data: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    encoding: str = "utf-8",
    fields: Sequence[str] = (),
) -> FinetuneJob:
    """Return a job in which what is not given is bundled: the pairs and, with those, the held-out questions."""
    if data is None:
        data = (str(bundled("pairs.jsonl")),)
        test = (str(bundled("test.jsonl")),) if test is None else test
    return FinetuneJob(str(model_path(model)), tuple(data), tuple(test or ()), check_encoding(encoding), tuple(fields))


def finetune(
    job: FinetuneJob,
    config: TrainConfig,
    out: Path,
    resume: bool = False,
    plain: bool = False,
    choose: Collection[str] = (),
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Finetune a model on pairs, then compare it with what it was before.

    Args:
        out: the run's folder. It must not hold a run, unless `resume` continues that one, or `overwrite` removes it,
            when all inputs of this run have been read.
        plain: run the pages as they are read: no faster code of `kernels/` is installed.
        choose: the settings that the run chooses itself (`runs/defaults.py`), whatever they are in `config`.

    Returns:
        The comparison, as it is in `out/compare.json`; an empty one where none is made, and of several processes on all
        but the main one; None when the run was interrupted and can be resumed.

    Raises:
        InputError: for wrong input; nothing is written before all of it has been read.
        RunError: when training cannot go on, or the comparison is interrupted (the trained model is saved then).
    """
    device, config = choose_machine(config, resume, plain, job.model)
    with join(config.parallel, device) as world:
        resume = check_out(out, resume, world, overwrite, inputs_of(job, config))
        if resume and choose:  # torchrun has started the command again: the run has chosen already
            config, choose = read_run(out)[2], ()
        split = read_data(job, config)
        # By default not compiled: no two batches have the same shape, and each new one would be compiled again.
        config = config.replace(template=split.template, compile=bool(config.compile))
        prepared = [_prepare(job, split, config, out, plain, world, choose)]
        with own_folder(out, resume, world, overwrite):
            # Taken out of the list: what the steps need of memory makes room for the two models of the comparison.
            if not complete(*prepared.pop(), resume):
                return None
            if not world.is_main:
                return {}
            result = _compare_with_base(job, split, config, out, plain, world.device) if config.compare else {}
            write_report(out)
            return result


def _prepare(
    job: FinetuneJob,
    split: "Split",
    config: TrainConfig,
    out: Path,
    plain: bool,
    world: World,
    choose: Collection[str] = (),
) -> tuple[Run, TrainState]:
    """Return a run and its state before the first step. Nothing is written."""
    memory = memory_of_rank(world) if choose else None  # before the model takes its part of it
    tokenizer, model = split.tokenizer, open_model(job.model, split.tokenizer, config, world)
    config, encoded, chosen = encode_and_choose(model, split, config, choose, world, memory)
    fit_to_template(model, split)
    announce(job, model, split, encoded, config, world)
    for line in chosen:
        print(line)
    carried = carried_over(job, model, split, config)
    if world.is_main:
        print_findings(split, encoded, config)
    ranks = (world.rank, world.size)
    batches = PairBatches(encoded.examples, config.batch_size, tokenizer.eos_id, config.seed, config.pack, *ranks)
    plan = Plan.make(config, len(batches))
    state = start_state(model, batches, config, world, plain)
    if world.parallel == "fsdp":  # each rank has room for its part now
        fill_shards(job.model, model, config, world)
    validation = _validation_batches(encoded.held_out, tokenizer, config)
    first_weights = lambda: weights_of(job.model)  # noqa: E731
    return Run(job, config, plan, tokenizer, validation, out, first_weights, carried), state


def evenly_spaced(records: Sequence[Conversation], most: int) -> Sequence[Conversation]:
    """Return at most `most` records, in their order: a file may be sorted, so not the first ones."""
    n = len(records)
    return records if n <= most else [records[i * n // most] for i in range(most)]


# Data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """All pairs of a job.

    Attributes:
        training, held_out: the pairs to train on, and those that both models are asked at the end.
        template: the name of the template that all of them are written in.
        tokenizer: the model's.
        skipped: what could not be used.
    """

    training: list[Conversation]
    held_out: list[Conversation]
    template: str
    tokenizer: Tokenizer
    skipped: Skipped
    tested: bool = False  # whether those held out are from files of their own
    found: int = 0  # those that --limit leaves out are counted, too

    @property
    def refuse_held_out(self) -> Callable[[InputError], object] | None:
        """Return the function that counts held-out records that the template refuses; None: none may be refused."""
        return None if self.tested else self.skipped.add

    @property
    def kind(self) -> str:
        """Return a word for the records."""
        if any(isinstance(one, Chat) for one in self.training):
            return "chats"
        return "texts" if self.template == "text" else "pairs"


@dataclass(frozen=True)
class Encoded:
    """The pairs as token ids.

    Attributes:
        examples, held_out: the pairs to train on, and those held out.
        cut: how many of `examples` were cut, and have no end-of-sequence token.
        dropped, held_out_dropped: how many pairs have no target and were left out.
    """

    examples: list[Example]
    held_out: list[Example]
    cut: int
    dropped: int
    held_out_dropped: int


def read_data(job: FinetuneJob, config: TrainConfig) -> Split:
    """Read all pairs of a job, hold some of them out, and choose their template.

    Raises:
        InputError: for a file that is missing or cannot be used, or a template that does not fit the pairs.
    """
    find_files([*job.data, *job.test], say=None)
    skipped = Skipped(config.strict, quiet=True)  # reported once, after all files are read
    found, test = (
        read_all_conversations(files, faults, Reading(job.encoding, job.fields), print) if files else []
        for files, faults in ((job.data, skipped), (job.test, None))
    )
    count, found = len(found), found[: config.limit]
    training, held_out = (found, test) if job.test else _hold_out(found, config.seed)
    tokenizer = load_tokenizer(job.model)
    template = choose_template(config.template, training, tokenizer, config.rendered)  # chats held out change nothing
    if template != "chat":
        name = template if any(isinstance(one, Chat) for one in held_out) else config.template
        template = choose_template(name, [*training, *held_out], tokenizer, config.rendered)
    return Split(training, held_out, template, tokenizer, skipped, tested=bool(job.test), found=count)


def _hold_out(pairs: list[Conversation], seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Hold some of the pairs out; return the others, and those, in file order."""
    if len(pairs) < 2:
        raise InputError(f"{pairs[0].where}: one record cannot be split; give at least 2 (--limit, too), or --test")
    drawn = held_out_places(len(pairs), seed)
    left = set(range(len(pairs))) - set(drawn)
    return [pairs[i] for i in sorted(left)], [pairs[i] for i in drawn]


def encode(split: Split, config: TrainConfig) -> Encoded:
    """Encode all pairs in their template, cut to `config.max_length` positions.

    Raises:
        InputError: when no pair to train on, or none held out, has a target.
    """
    template = template_named(split.template, split.tokenizer, config.rendered)
    training, held_out = (
        encode_conversations(part, template, split.tokenizer, config.max_length, config.learn, refuse, what)
        for part, refuse, what in (
            (split.training, split.skipped.add, "record to train on"),
            (split.held_out, split.refuse_held_out, "held-out record"),
        )
    )
    split.skipped.check()
    cut = sum(example.cut for example in training[0])
    return Encoded(training[0], held_out[0], cut, training[1], held_out[1])


def encode_and_choose(
    model: Llama, split: Split, config: TrainConfig, choose: Collection[str], world: World, memory: int | None
) -> tuple[TrainConfig, Encoded, list[str]]:
    """Encode all pairs, and choose the settings named in `choose`. Return both, and what was chosen in words.

    Raises:
        InputError: as `encode` does, or because the model's positions are too few for the rows.
    """
    if "max_length" in choose:
        config = config.replace(max_length=model.config.max_position_embeddings)
    check_length(config, model.config)
    skipped = replace(split.skipped)  # a copy, for a second encoding
    encoded = encode(split, config)
    if not choose:
        return config, encoded, []
    lengths, held_out = ([len(example) for example in part] for part in (encoded.examples, encoded.held_out))
    cut = any(example.cut for example in [*encoded.examples, *encoded.held_out])
    adapters = number_trained(model) if config.lora_rank else None
    device, ranks = world.device.type, world.size
    task = Task(model.config, adapters, lengths, held_out, cut, split.kind, device, ranks, memory)
    config, chosen = choose_defaults(config, choose, task)
    if max(lengths + held_out) > config.max_length:
        encoded = encode(replace(split, skipped=skipped), config)
    return config, encoded, chosen


def _validation_batches(held_out: list[Example], tokenizer: Tokenizer, config: TrainConfig) -> list[Batch]:
    """Return the held-out examples in their order, `config.batch_size` in a batch."""
    groups = [held_out[i : i + config.batch_size] for i in range(0, len(held_out), config.batch_size)]
    return [collate(group, tokenizer.eos_id, pack=config.pack) for group in groups]


# Model ----------------------------------------------------------------------------------------------------------------


def fit_to_template(model: Llama, split: Split) -> None:
    """Let the model stop where a chat template ends a turn, and save a template of the user's own with it."""
    tokenizer = split.tokenizer
    template = template_named(split.template, tokenizer)
    stop_at_turns(model, template, tokenizer)
    if isinstance(template, ChatTemplate) and split.template != "chat":  # a program that asks the model needs it
        tokenizer.files = {**tokenizer.files, "chat_template.jinja": Path(split.template).read_bytes()}


def carried_over(job: FinetuneJob, model: Llama, split: Split, config: TrainConfig) -> Carried | None:
    """Return what `final/` will have of the model's folder; None unless both are Hugging Face's. Print what it will be.

    Raises:
        InputError: for a damaged file of that folder; for a model of another format that cannot be one of this format.
    """
    carried = carried_from(job.model) if config.save_format == "hf" else None
    if carried is None:
        check_export(config, model.config, split.tokenizer)
    else:
        print(carried.in_words())
    return carried


def number_trained(model: Llama) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def template_note(split: Split) -> str:
    """Return a note on the choice of a template, or "": which one the model has, or that it has none."""
    if split.kind == "chats" and not has_chat_template(split.tokenizer):
        return " (the model has none of its own; choose one with --template: qa, llama2 …, or a FILE.jinja)"
    if passes_over_own(split.template, split.tokenizer):
        return " (the model has one of its own, which --template chat takes)"
    return ""


def announce(job: FinetuneJob, model: Llama, split: Split, encoded: Encoded, config: TrainConfig, world: World) -> None:
    """Print what the run is going to do: with which model, on which pairs, and what is left out."""
    trained = number_trained(model)
    share = f"{trained:,} of them adapters, which are trained" if config.lora_rank else trained_in_words(model)
    left_out = f"{encoded.cut} cut to {config.max_length} tokens, {encoded.dropped} dropped"
    held_out = f"{len(split.held_out):,} {split.kind} held out ({encoded.held_out_dropped} without a target)"
    print(describe(model, job.model, share, config, world))
    if config.limit:
        print(f"--limit: {limited(config.limit, split.found, split.kind)}")
    print(f"{len(encoded.examples):,} {split.kind} to train on ({left_out})")
    print(f"{held_out}; template {split.template}{template_note(split)}")
    if split.skipped.skipped:
        print(split.skipped)


def limited(limit: int, found: int, kind: str) -> str:
    """Return which records a limit leaves, in words."""
    return f"the first {limit:,} of {found:,} {kind}" if limit < found else f"all {found:,} {kind}"


def print_findings(split: Split, encoded: Encoded, config: TrainConfig) -> None:
    """Print what was found in the pairs that changes what is learned or measured, in a line each."""
    cut, dropped = encoded.cut, encoded.dropped
    template, tokenizer = split.template, split.tokenizer
    for line in finding_lines(split.training, split.held_out, cut, dropped, template, tokenizer, config):
        print(line)


# Result ---------------------------------------------------------------------------------------------------------------


def _compare_with_base(
    job: FinetuneJob, split: Split, config: TrainConfig, out: Path, plain: bool, device: torch.device
) -> dict[str, Any]:
    """Compare the model before and after on the pairs held out, at most `config.compare` of them; write compare.json.

    Raises:
        RunError: when the device cannot hold both models, or a signal interrupts the comparison.
    """
    tokenizer = split.tokenizer
    template = template_named(split.template, tokenizer, config.rendered)
    asked = evenly_spaced(split.held_out, config.compare)
    if len(asked) < len(split.held_out):
        print(f"comparing the answers to {len(asked):,} of {len(split.held_out):,} {split.kind} held out (--compare)")
    try:
        with ended_by_signals():
            before, after = load_model(job.model, device=device), load_model(out / "final", device=device)
            for model in (before, after):
                stop_at_turns(model, template, tokenizer)
                if not plain:
                    kernels.install(model, kernels.choose_for_reading(device))
            scores = compare((before, tokenizer), (after, tokenizer), asked, template, plain)
    except KeyboardInterrupt:
        write_report(out)
        raise RunError(f"the comparison was interrupted; {out / 'final'} is saved, and --resume compares") from None
    except (MemoryError, RuntimeError) as error:  # one model that was sharded had room here, two may have none
        if not is_out_of_memory(error):
            raise
        remedy = f"minift compare {job.model} {out / 'final'} --data FILE --device cpu"
        raise RunError(f"{out / 'final'} is saved, but {device.type} cannot hold both models: {remedy}") from None
    result = {"template": split.template, **scores}
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_file(out / "compare.json", lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")))
    return result
