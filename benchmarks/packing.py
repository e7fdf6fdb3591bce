"""Measure what packing short pairs into rows gains: steps over packed rows and over padded ones, in turns.

Both use the same pairs and the same weights, so the loss per target is the same to rounding. They differ in how many
positions are padding: without packing, every pair takes a row as long as the longest of its batch.

    python -m benchmarks packing --pairs lamini_docs.jsonl --tokenizer path/to/tokenizer.model
"""

import argparse
import time
from typing import Any

import torch

from benchmarks import arguments, record
from minift.config import FINETUNE, LlamaConfig
from minift.data.batches import PairBatches
from minift.data.conversations import read_all_conversations
from minift.data.examples import encode_conversations
from minift.data.templates import choose_template, template_named
from minift.model import Llama
from minift.pack import Batch
from minift.runs.machine import choose_device, choose_dtype
from minift.runs.start import start_state
from minift.storage.names import bundled, model_path
from minift.tokenizer.load import check_fit, load_tokenizer
from minift.train import TrainState, train_step

WINDOWS = 4  # different batches, with a step over each in a turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--pairs", metavar="FILE", help="instruction pairs (default: the bundled ones)")
    parser.add_argument("--tokenizer", default="bundled", metavar="DIR|FILE", help="(%(default)s)")
    parser.add_argument("--config", default="bundled", metavar="NAME|FILE", help="the model's shape (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pairs of a batch (%(default)s)")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="(%(default)s)")
    arguments.add_device(parser)
    arguments.add_repeats(parser, 5)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    arguments.check_counts(options, "repeats")
    config = FINETUNE.replace(device=options.device, max_length=options.max_length, batch_size=options.batch_size)
    device = choose_device(config)
    config = config.replace(dtype=choose_dtype(config, device))
    tokenizer = load_tokenizer(model_path(options.tokenizer))
    shape = LlamaConfig.named(options.config)
    check_fit(shape, tokenizer, exact=True)
    pairs = read_all_conversations([options.pairs or bundled("pairs.jsonl")])
    template = template_named(choose_template("auto", pairs))
    examples, _ = encode_conversations(pairs, template, tokenizer, config.max_length)

    batches = {pack: PairBatches(examples, config.batch_size, tokenizer.eos_id, 0, pack) for pack in (True, False)}
    windows = {
        pack: [batch.to(device) for _, batch in zip(range(WINDOWS), it, strict=False)] for pack, it in batches.items()
    }
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    state = start_state(model.to(device), batches[True], config)
    seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    for turn in range(options.repeats + 1):
        for pack in (True, False) if turn % 2 else (False, True):
            at = time.time()
            taken, losses[pack] = _steps(state, windows[pack], config)
            if turn:  # the first turn warms up
                seconds[pack].append({"at": at, "seconds": taken})
    _report(options, config.dtype, windows, seconds, losses)


def _steps(state: TrainState, windows: list[Batch], config: Any) -> tuple[float, list[float]]:
    """Take one step over each batch, at a learning rate of 0: the weights do not change, so losses can be compared."""
    start = time.perf_counter()
    losses = [train_step(state, [batch], 0.0, config).loss for batch in windows]
    return time.perf_counter() - start, losses


def _report(
    options: argparse.Namespace,
    dtype: str,
    windows: dict[bool, list[Batch]],
    seconds: dict[bool, list[dict[str, float]]],
    losses: dict[bool, list[float]],
) -> None:
    targets = sum(batch.n_targets for batch in windows[True])
    positions = {pack: sum(batch.tokens.numel() for batch in batches) for pack, batches in windows.items()}
    speed = {pack: record.spread([targets / one["seconds"] for one in seconds[pack]]) for pack in seconds}
    difference = max(abs(a - b) / b for a, b in zip(losses[True], losses[False], strict=True))
    result = {
        "benchmark": "packing",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": dtype,
        "batch_size": options.batch_size,
        "targets": targets,
        "positions": {"packed": positions[True], "padded": positions[False]},
        "targets_per_second": {"packed": speed[True], "padded": speed[False]},
        "largest_relative_difference_of_loss": difference,
        "rows": [record.row(name, seconds[pack], per="window") for pack, name in ((True, "packed"), (False, "padded"))],
    }
    print(f"{targets:,} targets in {WINDOWS} batches of {options.batch_size} pairs; {options.config}, {dtype}")
    for pack, name in ((True, "packed"), (False, "padded")):
        cells = "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**speed[pack])
        print(f"{name:<8}{positions[pack]:>10,} positions{cells:>28} targets/s")
    print(f"ratio {speed[True]['median'] / speed[False]['median']:.2f}; losses differ by at most {difference:.1e}")
    record.write(options.json, result)
