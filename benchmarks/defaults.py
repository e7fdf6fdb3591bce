"""Sweep the learning rate around the one that `minift finetune` chooses: three sizes of model by three sizes of data.

The bundled pairs (as many as `--pairs` says, drawn by a seed) are finetuned on a smaller model, the bundled one and a
larger one. The two others have the bundled tokenizer, are pretrained on the bundled pages first, and are kept in
`--folder`. All is as `minift/runs/defaults.py` chooses; only the rate is multiplied by each of `--factors`.

A run is evaluated on held-out questions before its first step and ten times after. *Best* is the lowest of these
losses, whose weights a run keeps, and *end* the last. *Right* is the share of facts asked that the best weights answer
to the letter. A rule is good where no factor is much better than 1, in loss and in answers.

    python -m benchmarks defaults --folder runs/sizes
    python -m benchmarks defaults --sizes bundled --pairs 10 30 100
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import arguments, record
from benchmarks.lessons.training import right_answers
from minift.checkpoint import load_model
from minift.config import CHOSEN, FINETUNE, PRESETS, PRETRAIN, LlamaConfig, TrainConfig
from minift.data.batches import PairBatches
from minift.distributed.world import World
from minift.errors import InputError
from minift.pack import collate
from minift.runs import finetune as jobs
from minift.runs.machine import choose_device, choose_dtype
from minift.runs.pretrain import pretrain, pretrain_job
from minift.runs.start import start_state
from minift.storage.atomic import write_file
from minift.storage.names import bundled, model_path
from minift.train import Plan, train, validation_loss
from minift.values import check_number

SIZES: dict[str, dict[str, Any] | None] = {  # what differs from the bundled shape; None: the bundled model itself
    "small": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 160},
    "bundled": None,
    "large": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 896},
}
PRETRAINING: dict[str, dict[str, Any]] = {
    "small": {"steps": 1_000, "batch_size": 16},
    "large": {"steps": 500, "batch_size": 8, "lr": 1.5e-3},
}
EVALUATIONS = 10
HEAD = f"{'factor':>8}{'lr':>10}{'base':>9}{'best':>9}{'end':>9}{'right':>8}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="of model (all)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[30, 100, 1_000], metavar="N", help="(30 100 1000)")
    factors = [1 / 9, 1 / 3, 1.0, 3.0, 9.0]
    parser.add_argument("--factors", type=float, nargs="+", default=factors, metavar="X", help="(1/9 1/3 1 3 9)")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that draws the pairs (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", default="runs/sizes", help="of the pretrained models (%(default)s)")
    parser.add_argument("--pretrain-steps", type=int, metavar="N", help="(1000 of the small one, 500 of the large)")
    arguments.add_device(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Sweep on each model and number of pairs, print a table and write the JSON."""
    for number in [*options.pairs, options.questions]:
        check_number("--pairs and --questions", number, least=1)
    rows = list[dict[str, Any]]()
    for size in options.sizes:
        model = _model(size, Path(options.folder), options.pretrain_steps)
        for n in options.pairs:
            rows.append({"size": size, **_sweep(model, n, options)})
            print(("" if len(rows) > 1 else HEAD + "\n") + _lines(rows[-1]), flush=True)
    print(conclusion(rows))
    record.write(options.json, {"benchmark": "defaults", **record.environment(), "sweeps": rows})


def _lines(row: Mapping[str, Any]) -> str:
    """Return the lines of a model and a number of pairs: one for each factor."""
    lines = [f"{row['size']}, {row['pairs']:,} pairs; {row['chosen'][0]}"]
    for one in row["runs"]:
        lines.append(
            f"{one['factor']:>8.2f}{one['lr']:>10.1e}{one['losses'][0]:>9.3f}{one['best']:>9.3f}{one['end']:>9.3f}"
            f"{one['right']:>8.0%}" + ("   the rule" if one["factor"] == 1 else "")
        )
    return "\n".join(lines)


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """State how far the rule is from the best of each sweep, in loss and in right answers."""
    gaps, points, worse = list[float](), list[float](), 0
    for row in rows:
        (rule,) = (one for one in row["runs"] if one["factor"] == 1)
        gaps.append(rule["best"] - min(one["best"] for one in row["runs"]))
        points.append(max(one["right"] for one in row["runs"]) - rule["right"])
        worse += rule["best"] > rule["losses"][0]
    mean = sum(gaps) / len(gaps)
    return (
        f"The rule's best loss is at most {max(gaps):.3f} nats above that of the best rate ({mean:.3f} on average); "
        f"its right answers are at most {100 * max(points):.0f} points fewer than the most; in {worse} of {len(rows)} "
        "cases it is worse than the base."
    )


def _model(size: str, folder: Path, steps: int | None) -> str:
    """Return the folder of a model of one of `SIZES`; pretrain it if it is not there."""
    changes = SIZES[size]
    if changes is None:
        return str(model_path("bundled"))
    final = folder / size / "final"
    if not final.is_dir():
        shape = LlamaConfig(**(PRESETS["bundled"] | changes))
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{size}.json", lambda partial: partial.write_text(shape.to_json(), encoding="utf-8"))
        config = PRETRAIN.replace(**PRETRAINING[size])
        config = config if steps is None else config.replace(steps=steps, warmup=steps // 10)
        pages = str(bundled("pages") / "*.json.gz")
        if not pretrain(
            pretrain_job(str(folder / f"{size}.json"), [pages], str(bundled("base"))), config, final.parent
        ):
            raise KeyboardInterrupt
    return str(final)


def _sweep(model: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """Finetune a model on `n` pairs at each factor of the rate that the rule chooses."""
    job = jobs.finetune_job(model)
    config = FINETUNE.replace(device=options.device, compile=False, seed=options.seed)
    config = config.replace(dtype=choose_dtype(config, choose_device(config)))
    split = jobs.read_data(job, config)
    if n > len(split.training):
        raise InputError(f"--pairs {n}: there are {len(split.training)}")
    questions = split.held_out[:: max(1, len(split.held_out) // options.questions)][: options.questions]
    split = replace(split, training=Random(options.seed).sample(split.training, n), held_out=questions)
    config, encoded, chosen = jobs.encode_and_choose(load_model(model), split, config, tuple(CHOSEN), World(), None)
    runs = [_finetune(model, split, encoded, config, factor) for factor in sorted({1.0, *options.factors})]
    return {"pairs": n, "chosen": chosen, "steps": runs[0].pop("steps"), "runs": runs}


def _finetune(
    model: str, split: jobs.Split, encoded: jobs.Encoded, config: TrainConfig, factor: float
) -> dict[str, Any]:
    """Finetune at `factor` times the rate; return the losses, and the share of facts that the best weights know."""
    config = config.replace(lr=factor * config.lr)
    tokenizer, llama = split.tokenizer, load_model(model, device=choose_device(config))
    batches = PairBatches(encoded.examples, config.batch_size, tokenizer.eos_id, config.seed, config.pack)
    held_out = [collate(encoded.held_out, tokenizer.eos_id, pack=config.pack)]
    state, plan = start_state(llama, batches, config), Plan.make(config, len(batches))
    losses = [validation_loss(state, held_out)]
    best = copy.deepcopy(llama.state_dict())
    every = max(1, plan.steps // EVALUATIONS)
    for _ in train(state, plan, config):
        if state.step % every == 0 or state.step == plan.steps:
            losses.append(validation_loss(state, held_out))
            if losses[-1] == min(losses):
                best = copy.deepcopy(llama.state_dict())
    llama.load_state_dict(best)
    llama.eval()
    facts = [pair for pair in split.held_out if pair.metric == "exact_match"]
    right = right_answers(llama, tokenizer, facts)
    return {
        "factor": factor,
        "lr": config.lr,
        "steps": plan.steps,
        "losses": losses,
        "best": min(losses),
        "end": losses[-1],
        "right": sum(right) / len(right),
    }
