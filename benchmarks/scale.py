"""Measure how a training step scales: one process with all cores, compared with several that share them.

The same global batch is trained by one process with all threads, and by N processes that share the threads (two of one
thread each, on two cores), under DDP and under FSDP. Communication takes time, and so do the parts of a step that each
process repeats: the optimizer's step under DDP, the transpose of the head, Python.

The processes of a side start together, and the sides take turns, a few steps each.

    python -m benchmarks scale
    python -m benchmarks scale --config smollm2-135m --batch-size 4 --length 512 --processes 2
"""

import argparse
import socket
import sys
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch

from benchmarks import arguments, process, record, side
from benchmarks.timing import in_turn_order, paired_ratio
from minift.config import LlamaConfig, TrainConfig
from minift.distributed.sharding import fill
from minift.distributed.world import World, join
from minift.errors import InputError
from minift.model import Llama
from minift.runs.start import start_state
from minift.train import train_step

WARM_UP = 2  # steps that do not count
LEARNING_RATE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser, rows="rows of all together")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that share the cores (%(default)s)")
    arguments.add_machine(parser)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of each side in a turn (%(default)s)")
    arguments.add_repeats(parser, 8)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    config = arguments.train_config(options, weight_decay=0.0, lr=LEARNING_RATE)
    shape = LlamaConfig.named(options.config)
    if options.measure:
        _serve(options.measure[0], shape, config, options.steps)
        return
    arguments.check_counts(options, "repeats", "steps", "processes")
    if options.batch_size % options.processes:
        raise InputError(f"--batch-size {options.batch_size} is not a multiple of {options.processes} processes")
    words = [*arguments.words(options, config), f"--steps={options.steps}"]
    threads = torch.get_num_threads()
    sides = {"one process": 1, "ddp": options.processes, "fsdp": options.processes}
    with ExitStack() as stack:
        workers = {}
        for name, size in sides.items():
            port = _free_port()
            workers[name] = [
                stack.enter_context(
                    process.Worker("scale", name, *words, env=_environment(rank, size, port, threads), wait=False)
                )
                for rank in range(size)
            ]
            print(f"{name}: ready, {[worker.ready['threads'] for worker in workers[name]]} threads")
        answers: dict[str, list[Any]] = {name: [] for name in sides}
        for turn in range(options.repeats):
            for name in in_turn_order(list(sides), turn):
                for worker in workers[name]:
                    worker.tell("steps")
                ranks = [worker.answer() for worker in workers[name]]
                answers[name].append({**ranks[0], "peak_bytes": [rank["peak_bytes"] for rank in ranks]})
    result = _result(options, config, sides, threads, answers)
    print(_table(result))
    record.write(options.json, result)


def _environment(rank: int, size: int, port: int, threads: int) -> dict[str, str]:
    """Return the environment variables that torchrun would set."""
    each = {"OMP_NUM_THREADS": str(max(1, threads // size))}
    if size > 1:
        each |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        each |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return each


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# In a process of its own ----------------------------------------------------------------------------------------------


def _serve(name: str, shape: LlamaConfig, config: TrainConfig, steps: int) -> None:
    """Join the world and take two steps; then take `steps` of them for each line on standard input."""
    with join("auto" if name == "one process" else name, torch.device(config.device)) as world:
        _serve_rank(world, shape, config, steps, sys.__stdout__)


def _serve_rank(world: World, shape: LlamaConfig, config: TrainConfig, steps: int, out: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Llama(shape)
    weights = model.random_weights(generator)
    if world.parallel == "fsdp":
        model = model.to("meta")
        state = start_state(model, None, config, world)  # type: ignore[arg-type]  # has no batches
        fill(model, world, weights)
    else:
        model.init_weights(generator)
        state = start_state(model.to(world.device), None, config, world)  # type: ignore[arg-type]
    ids = torch.randint(shape.vocab_size, (side.BATCHES, config.batch_size, config.max_length), generator=generator)
    batches = cycle(side.whole_rows(ids[:, world.rank :: world.size].to(world.device)))

    def step() -> float:
        return train_step(state, [next(batches)], LEARNING_RATE, config).loss

    for _ in range(WARM_UP):
        step()
    side.serve({"threads": torch.get_num_threads()}, step, config.device, steps, out, together=world.wait)


# The result -----------------------------------------------------------------------------------------------------------


def _result(
    options: argparse.Namespace,
    config: TrainConfig,
    sides: dict[str, int],
    threads: int,
    answers: dict[str, list[Any]],
) -> dict[str, Any]:
    tokens = config.batch_size * config.max_length
    seconds = {name: [answer["seconds"] for answer in given] for name, given in answers.items()}
    losses = {name: [loss for answer in given for loss in answer["losses"]] for name, given in answers.items()}
    return {
        "benchmark": "scale",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": config.dtype,
        "device": config.device,
        "batch_size": config.batch_size,
        "length": config.max_length,
        "threads": threads,
        "processes": sides,
        "tokens_per_second": {name: record.spread([tokens / s for s in times]) for name, times in seconds.items()},
        "of_one_process": {name: paired_ratio(seconds["one process"], times) for name, times in seconds.items()},
        "peak_bytes": {name: given[-1]["peak_bytes"] for name, given in answers.items()},
        "losses_apart_at_most": side.losses_apart(losses),
        "rows": [record.row(f"{name}/step", given, per="step") for name, given in answers.items()],
    }


def _table(result: dict[str, Any]) -> str:
    shape = f"{arguments.shape_name(result['config'])}, {result['batch_size']} x {result['length']} tokens"
    lines = [f"{shape}, {result['dtype']} on {result['device']}, {result['threads']} threads in all"]
    lines += [f"{'':<24}{'tokens/s':>26}{'of one process':>18}{'peak of each':>18}"]
    for name, speed in result["tokens_per_second"].items():
        size = result["processes"][name]
        cell = "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**speed)
        peak = f"{max(result['peak_bytes'][name]) / 1e6:,.0f} MB"
        label = name if size == 1 else f"{size} processes, {name}"
        lines.append(f"{label:<24}{cell:>26}{result['of_one_process'][name]:>18.2f}{peak:>18}")
    lines.append(f"losses at most {result['losses_apart_at_most']:.2%} apart")
    return "\n".join(lines)
