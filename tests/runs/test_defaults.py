"""The promise of a finetuning without flags: its settings fit the pairs, the model and the memory, and are printed.

What is expected is computed here from published recipes, from the data or from the ledger of memory, not by the rule.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model
from minift.cli import main
from minift.config import CHOSEN, FINETUNE, PRETRAIN, LlamaConfig, TrainConfig, not_given
from minift.costs.memory import training_memory
from minift.distributed.world import World
from minift.errors import InputError
from minift.optim import learning_rate
from minift.runs import finetune as jobs
from minift.runs.defaults import Task, choose_defaults
from minift.runs.folder import read_run
from minift.runs.machine import free_memory, memory_of_rank
from minift.storage.names import model_path
from minift.train import Plan
from tests.helpers import write_jsonl

BFLOAT16 = FINETUNE.replace(dtype="bfloat16")


def task(name: str, lengths: list[int], **more: Any) -> Task:
    """Return a task of a preset's shape and examples of these lengths, the first of them held out, too."""
    return Task(LlamaConfig.preset(name), more.pop("adapters", None), lengths, lengths[:1], **more)


def chosen_for(name: str, lengths: list[int], **more: Any) -> tuple[TrainConfig, list[str]]:
    return choose_defaults(BFLOAT16, CHOSEN, task(name, lengths, **more))


def steps_of(config: TrainConfig, pairs: int) -> int:
    return Plan.make(config, -(-pairs // config.batch_size)).steps


# The rule -------------------------------------------------------------------------------------------------------------


def test_the_bundled_job_is_what_it_was() -> None:
    """350 steps of 32 pairs at 1e-4 with 10 of warm-up gave the table on the README's first page."""
    job = jobs.finetune_job("bundled")
    split = jobs.read_data(job, BFLOAT16)
    model = load_model(model_path("bundled"))
    config, encoded, lines = jobs.encode_and_choose(model, split, BFLOAT16, CHOSEN, World(), free_memory(model.device))
    assert (config.lr, config.epochs, config.steps, config.warmup) == (1e-4, 10, None, 10)
    assert (config.batch_size, config.grad_accum) == (32, 1)
    assert (encoded.cut, encoded.dropped, encoded.held_out_dropped) == (0, 0, 0)
    assert steps_of(config, len(encoded.examples)) == 350
    (line,) = lines
    for words in (
        "lr 1.0e-4 (1.8 M parameters, all trained",
        "10 epochs of 35 steps (1,108 pairs)",
        "rows of 128 tokens",
    ):
        assert words in line


@pytest.mark.parametrize("name", ["bundled", "stories15m", "smollm2-135m", "tinyllama-1.1b", "llama2-7b"])
@pytest.mark.parametrize("pairs", [1, 9, 27, 90, 1_000, 10_000, 52_000])
def test_a_run_is_neither_too_short_nor_too_long(name: str, pairs: int) -> None:
    config, _ = chosen_for(name, [60] * pairs)
    steps = steps_of(config, pairs)
    assert steps >= 100
    assert config.epochs is not None
    assert 3 <= config.epochs <= max(10, 110 / (pairs / config.batch_size))
    assert 1 <= config.warmup <= steps / 10
    assert pairs < 40 or config.batch_size <= pairs / 10 or config.batch_size == 4


def test_a_large_model_gets_the_rate_and_length_of_published_recipes() -> None:
    """Alpaca: 52,000 pairs, 3 epochs at 2e-5 of Llama-7B. QLoRA: 2e-4 for its adapters. Each within a third."""
    config, _ = chosen_for("llama2-7b", [120] * 52_000)
    assert (config.epochs, config.lr) == (3, pytest.approx(2e-5, rel=0.35))
    config, _ = chosen_for("llama2-7b", [120] * 52_000, adapters=20_000_000)
    assert config.lr == pytest.approx(2e-4, rel=0.35)


def test_the_rate_falls_with_the_width_and_rises_in_a_short_run() -> None:
    names = ("bundled", "stories15m", "stories42m", "smollm2-135m", "tinyllama-1.1b", "llama2-7b")
    rates = [choose_defaults(BFLOAT16, {"lr"}, task(name, [60] * 1_000))[0].lr for name in names]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(names)
    short, long, longest = (
        choose_defaults(BFLOAT16.replace(steps=steps), {"lr"}, task("bundled", [60] * 1_000))[0].lr
        for steps in (50, 350, 10_000)
    )
    assert short == 2 * long
    assert long == longest


@pytest.mark.parametrize("longest", [1, 63, 64, 65, 500, 633])
def test_rows_hold_the_longest_pair_of_those_held_out_too(longest: int) -> None:
    held_out = Task(LlamaConfig.preset("smollm2-135m"), None, [20, 30], [longest])
    config, (line,) = choose_defaults(BFLOAT16, CHOSEN, held_out)
    assert max(30, longest) <= config.max_length <= max(30, longest) + 63
    assert f"the longest pair has {max(30, longest)}" in line


def test_rows_are_at_most_the_positions_of_the_model() -> None:
    config, (line,) = chosen_for("stories15m", [200, 256], cut=True)
    assert config.max_length == 256
    assert "rows of 256 tokens (all positions that the model has; longer pairs are cut)" in line


# Memory ---------------------------------------------------------------------------------------------------------------

LENGTHS = [633, *[300] * 999]


def needed(config: TrainConfig, name: str = "smollm2-135m") -> int:
    """Return the bytes of a step in which each of a micro-batch's examples has a row of its own."""
    rows, tokens = config.batch_size, min(config.max_length, 640)
    return sum(training_memory(LlamaConfig.preset(name), config.dtype, rows, tokens).values())


@pytest.mark.parametrize("gigabytes", [200, 20, 10, 6, 4.5])
def test_a_step_that_memory_cannot_hold_is_split(gigabytes: float) -> None:
    config, (line,) = chosen_for("smollm2-135m", LENGTHS, memory=int(gigabytes * 1e9))
    assert config.batch_size * config.grad_accum == 32
    assert config.max_length == 640
    assert needed(config) / 2 < gigabytes * 1e9  # two examples of 300 share a row
    if config.grad_accum > 1:
        assert f"steps of 32 pairs, {config.batch_size} at a time (together they would take" in line
        assert f"{gigabytes:g} GB are free" in line
        assert needed(config.replace(batch_size=2 * config.batch_size)) > 0.8 * gigabytes * 1e9
    assert (config.grad_accum > 1) == (gigabytes < 20)


def test_rows_are_shortened_where_one_pair_does_not_fit() -> None:
    lengths = [8_000, *[300] * 99]
    config, lines = chosen_for("smollm2-135m", lengths, memory=int(5e9))
    assert config.batch_size == 1
    assert 300 <= config.max_length < 8_000
    assert config.max_length % 64 == 0
    assert f"rows of {config.max_length:,} tokens (one of 8,000 does not fit the memory, of which 5 GB are" in lines[0]


def test_no_setting_makes_a_model_fit_that_is_too_large() -> None:
    config, lines = chosen_for("llama2-7b", LENGTHS, memory=int(20e9))
    assert config.max_length == 640
    assert len(lines) == 2
    assert lines[1].startswith("note: a step takes about 1")
    assert "20 GB are free, of which a fifth is kept; train adapters (--lora-rank 8)" in lines[1]
    given = choose_defaults(BFLOAT16.replace(batch_size=64), {"lr"}, task("smollm2-135m", LENGTHS, memory=int(8e9)))
    assert given[0].batch_size == 64
    assert "lower --batch-size, and raise --grad-accum" in given[1][-1]


def test_more_ranks_and_fewer_activations_need_less() -> None:
    alone, halved, recomputed = (
        choose_defaults(BFLOAT16.replace(checkpoint_activations=less), CHOSEN, task("smollm2-135m", LENGTHS, **more))[0]
        for less, more in ((False, {}), (False, {"ranks": 4}), (True, {}))
        for more in ({**more, "memory": int(6e9)},)
    )
    assert halved.batch_size > alone.batch_size
    assert recomputed.batch_size > alone.batch_size


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="what is compared with is Linux's")
def test_the_free_memory_is_that_of_the_system() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is not None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found <= total
    assert memory_of_rank(World()) == pytest.approx(found, abs=0.2 * total)


# From the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path, small_checkpoint: Path) -> list[str]:
    """Return a command that finetunes a tiny model on 18 of 20 pairs, without a setting."""
    pairs = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    return ["finetune", "--model", str(small_checkpoint), "--data", str(data), "--out", str(tmp_path / "run")]


GIVEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "lr": (["--lr", "0.003"], {"lr": 0.003}),
    "epochs": (["--epochs", "0.5"], {"epochs": 0.5, "steps": None}),
    "steps": (["--steps", "3"], {"steps": 3, "epochs": None}),
    "batch_size": (["--batch-size", "3"], {"batch_size": 3, "grad_accum": 1}),
    "grad_accum": (["--grad-accum", "2"], {"batch_size": 32, "grad_accum": 2}),
    "warmup": (["--warmup", "2"], {"warmup": 2, "warmup_ratio": None}),
    "warmup_ratio": (["--warmup-ratio", "0.5"], {"warmup": 0, "warmup_ratio": 0.5}),
    "max_length": (["--max-length", "32"], {"max_length": 32}),
}
SAID = {"lr": "lr ", "epochs": "epoch", "batch_size": "steps of", "warmup": "warm-up", "max_length": "rows of"}


@pytest.mark.parametrize("name", GIVEN)
def test_a_flag_that_is_given_overrides_the_choice(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = GIVEN[name]
    short = [] if name in ("epochs", "steps") else ["--steps", "4"]
    assert main([*words, *flags, *short]) == 0
    train = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert {key: train[key] for key in expected} == expected
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chosen: ")]
    left = not_given([name, *(["steps"] if short else [])])
    for one, said in SAID.items():
        assert (said in line.removeprefix("chosen: ").replace("; 4 steps", "")) == (one in left), one


def test_what_was_chosen_is_recorded_and_kept_by_a_resume(words: list[str], tmp_path: Path) -> None:
    """And a run's folder of an earlier version, which knows no share of warm-up, can still be read."""
    assert main([*words, "--steps", "4"]) == 0
    _, _, config = read_run(tmp_path / "run")
    assert (config.lr, config.batch_size, config.warmup) == (2e-4, 4, 0)
    assert config.max_length == 64
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run"), "--lr", "2e-4", "--batch-size", "4"]) == 0
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run"), "--lr", "1e-4"]) == 2
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    del run["train"]["warmup_ratio"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    assert read_run(tmp_path / "run")[2] == config


def test_without_choices_python_gets_the_settings_that_it_gave(words: list[str], tmp_path: Path) -> None:
    job = jobs.finetune_job(words[2], [words[4]])
    config = FINETUNE.replace(steps=2, device="cpu", max_length=32)
    assert jobs.finetune(job, config, tmp_path / "python")
    saved = read_run(tmp_path / "python")[2]
    for name in ("lr", "batch_size", "warmup", "max_length", "steps"):
        assert getattr(saved, name) == getattr(config, name)


def test_a_run_that_torchrun_starts_again_keeps_its_choice(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be less memory then, or another rule after an update."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a choice was made again")

    assert main([*words, "--steps", "2"]) == 0
    monkeypatch.setattr(jobs, "choose_defaults", refuse)
    monkeypatch.setattr(jobs, "check_out", lambda *arguments: True)
    config = FINETUNE.replace(steps=2, device="cpu")
    assert jobs.finetune(jobs.finetune_job(words[2], [words[4]]), config, tmp_path / "run", choose=not_given(["steps"]))


# The warm-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 350])
def test_a_share_of_the_warm_up_is_that_many_steps(share: float, steps: int) -> None:
    by_share = PRETRAIN.replace(warmup_ratio=share)
    by_steps = PRETRAIN.replace(warmup=int(share * steps))
    assert [learning_rate(i, steps, by_share) for i in range(steps)] == [
        learning_rate(i, steps, by_steps) for i in range(steps)
    ]


def test_only_one_of_the_two_is_given() -> None:
    assert FINETUNE.replace(warmup_ratio=0.1).warmup == 0
    assert FINETUNE.replace(warmup_ratio=0.1).replace(warmup=5).warmup_ratio is None
    with pytest.raises(InputError, match="give --warmup or --warmup-ratio, not both"):
        FINETUNE.replace(warmup=3, warmup_ratio=0.1)
    with pytest.raises(InputError, match=r"warmup_ratio is 1\.5; it is a share of the run's steps, at most 1"):
        FINETUNE.replace(warmup_ratio=1.5)


# Real pairs -----------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_real_model_on_real_pairs(real_data: Path) -> None:
    """SmolLM2's shape, with the bundled tokenizer: 3 epochs of what is left of 1,260 pairs, and none is cut."""
    job = jobs.finetune_job("bundled", [str(real_data / "lamini_docs.jsonl")])
    split = jobs.read_data(job, BFLOAT16)
    encoded = jobs.encode(split, BFLOAT16.replace(max_length=8_192))
    lengths = [len(example) for example in encoded.examples]
    config, (line, *_) = chosen_for("smollm2-135m", lengths, memory=int(24e9))
    assert (config.epochs, config.batch_size * config.grad_accum) == (3, 32)
    assert 2e-5 <= config.lr <= 2e-4
    assert 0 < config.warmup < 12
    assert config.max_length >= max(lengths) > 256
    assert f"3 epochs of {-(-len(lengths) // 32)} steps ({len(lengths):,} pairs)" in line
