"""What both jobs do."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.checkpoint import load_weights, save_model
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.world import World, restarted
from minift.errors import InputError, RunError, need
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights, merge
from minift.model import Llama
from minift.pack import Batch
from minift.runs.folder import FinetuneJob, PretrainJob, cut_metrics, newest_whole_step, own_folder, start_folder
from minift.runs.loop import train
from minift.runs.machine import check_compiler, choose_device, choose_dtype
from minift.runs.progress import Best
from minift.runs.steps import load_step
from minift.storage.atomic import remove_leftovers, write_folder
from minift.storage.checksums import check_model
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, TrainState


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


def _check_length(config: TrainConfig, shape: LlamaConfig) -> None:
    if config.max_length > shape.max_position_embeddings:
        raise InputError(
            f"max_length {config.max_length} is more than the model's {shape.max_position_embeddings} positions"
        )


def _count(model: Llama) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from None
