"""The promise of `ladder` and `peers`: every side trains the same thing, and only what is named differs."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ladder, peers, process, roof, soak
from benchmarks.samples import Samples
from benchmarks.timing import in_turn_order
from minift import kernels
from minift.config import PRETRAIN, LlamaConfig
from minift.costs.flops import training_flops_per_token
from minift.errors import InputError
from minift.pack import Batch
from minift.train import TrainState
from tests.helpers import as_samples, run_here

TINY = LlamaConfig.preset("stories260k")
CONFIG = PRETRAIN.replace(device="cpu", dtype="bfloat16", batch_size=6, max_length=32, compile=False)


def climb(name: str) -> tuple[list[float], Batch, TrainState]:
    """Three losses of a rung, its batch, and its state."""
    step, batch, state = ladder.make_rung(name, TINY, CONFIG)
    return [step() for _ in range(3)], batch, state


def test_all_rungs_train_the_same() -> None:
    """The same loss at each step, to rounding, over the same targets; only packing computes fewer positions."""
    first, padded, _ = climb("textbook")
    assert first[2] < first[0]
    for name in ladder.RUNGS[1:-1]:
        losses, batch, _ = climb(name)
        assert losses == pytest.approx(first, rel=1e-5 if name == "plain" else 5e-3), name
        assert batch.n_targets == padded.n_targets
        packed = ladder.RUNGS.index(name) >= ladder.RUNGS.index("+ packing")
        assert (batch.tokens.numel() < padded.tokens.numel()) == packed
        assert batch.isolated == packed


def test_a_rung_has_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one kernel more than the rung below, as `kernels.install` is told, and its modules are there."""
    asked: list[set[str]] = []
    install = kernels.install
    monkeypatch.setattr(kernels, "install", lambda module, names: (asked.append(set(names)), install(module, names))[1])
    taken = kernels.choose(CONFIG, torch.device("cpu"))
    rungs = [name for name in ladder.RUNGS[:-1] if not name.startswith("+ ") or name[2:] in (*taken, "AMP", "packing")]
    kinds: list[set[str]] = []
    for name in rungs:
        *_, state = climb(name)
        kinds.append(
            {type(module).__name__ for module in state.objective.modules()} | {type(state.optimizer).__module__}
        )
    assert asked[:4] == [set()] * 4
    assert [asked[i] - asked[i - 1] for i in range(4, len(asked))] == [{name[2:]} for name in rungs[4:]]
    assert {"TextbookAttention", "TextbookLoss"} <= kinds[0]
    assert not {"TextbookAttention", "TextbookLoss"} & kinds[1]
    new = {name[2:]: kinds[i] - kinds[i - 1] for i, name in enumerate(rungs) if i >= 4}
    assert new == {
        "malloc": set(),
        "adamw": {"minift.kernels.adamw"},
        "norm": {"FusedRMSNorm", "FusedInputNorm", "FusedRoPE"},
        "attention": {"FastScaledDotProduct"},
        "cross_entropy": {"FusedNextTokenLoss"},
        "targets": {"TargetsLayer", "TargetsObjective"},
        "layer": {"WrittenLayer", "WrittenPrepare"},
    }


def test_break_even() -> None:
    ready = {"+ adamw": {"first_step_seconds": 2.0}, "+ compile": {"first_step_seconds": 32.0}}
    pays = ladder.break_even(ready, {"+ adamw": [2.0, 2.0, 3.0], "+ compile": [1.0, 1.0, 1.5]}, "+ adamw")
    assert pays == {"cost_seconds": 30.0, "saved_seconds_a_step": 1.0, "steps": 30.0}
    pays = ladder.break_even(ready, {"+ adamw": [1.0], "+ compile": [1.0]}, "+ adamw")
    assert pays["steps"] is None  # never


@pytest.mark.slow
def test_the_ladder_from_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "stories260k", "--batch-size", 4, "--length", 32, "--repeats", 2]
    result = run_here("ladder", tmp_path, *words, "--rungs", "plain", "+ packing")
    assert list(result["rungs"]) == ["plain", "+ packing"]
    for rung in result["rungs"].values():
        speed = rung["targets_per_second"]
        assert speed["n"] == 2
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert rung["peak_bytes"] > 2**26
    assert "compiling_pays" not in result
    assert "+ packing" in capsys.readouterr().out
    assert {"machine", "versions", "commit"} <= set(result)


@pytest.mark.slow
def test_peers_train_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(roof, "SIDE", {"cpu": 64})
    words = ["--config", "stories260k", "--batch-size", 2, "--length", 32, "--repeats", 2, "--steps", 3]
    result = run_here("peers", tmp_path, *words, "--dtype", "float32", "--sides", "minift", "transformers")
    ours, theirs = result["losses"]["minift"], result["losses"]["transformers"]
    assert len(ours) == 2 + 2 * 3
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[4] < ours[0]  # the same batch again
    assert result["losses_apart_at_most"] < 1e-4
    ratios = result["times_as_fast_as"]
    assert ratios["minift"]["minift"] == 1
    assert ratios["minift"]["transformers"] > 0
    assert "losses at most" in capsys.readouterr().out


def made_up(losses: float) -> peers.Turns:
    turn: dict[str, Any] = {"peak_bytes": 10}
    return peers.Turns(
        ready={name: {"first_step_seconds": 1.0, "losses": [3.0]} for name in ("minift", "transformers")},
        answers={
            "minift": [{"seconds": 1.0, "losses": [2.0], **turn}],
            "transformers": [{"seconds": 2.0, "losses": [losses], **turn}],
        },
        rates={"minift": [1e12], "transformers": [1e12]},
    )


def test_sides_that_train_differently_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(config="stories260k", apart=False)
    result = peers._result(options, CONFIG, TINY, made_up(2.019))
    assert result["times_as_fast_as"]["minift"]["transformers"] == 2
    flops = CONFIG.batch_size * CONFIG.max_length * training_flops_per_token(TINY, CONFIG.max_length)
    assert result["share_of_roof"]["minift"]["median"] == pytest.approx(flops / 1.0 / 1e12)
    assert result["mfu_of_data_sheet"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    of_a_gpu = peers._result(options, CONFIG.replace(device="cuda", dtype="bfloat16"), TINY, made_up(2.019))
    assert of_a_gpu["mfu_of_data_sheet"] == pytest.approx(
        {"minift": flops / 989e12, "transformers": flops / 2 / 989e12}
    )
    # With all pairs of tokens, seen or not, as many projects count: 4·H·C for each, three times, in each layer.
    per_token = training_flops_per_token(TINY, CONFIG.max_length)
    unseen = (CONFIG.max_length - 1) / 2
    more = 3 * TINY.num_hidden_layers * 4 * TINY.num_attention_heads * TINY.head_dim * unseen
    assert of_a_gpu["mfu_factor_if_attention_were_whole"] == pytest.approx(1 + more / per_token)
    with pytest.raises(InputError, match="do not train the same"):
        peers._result(options, CONFIG, TINY, made_up(2.021))


def test_the_roof_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of its runs: 2 n³ operations, a tensor read and written, each weight read once."""
    monkeypatch.setattr(roof, "SIDE", {"cpu": 16})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 4096})
    seen: list[tuple[tuple[int, ...], int]] = []

    def in_turns(sides: dict[str, Any], repeats: int, device: str) -> dict[str, Samples]:
        seen.append((tuple(sides["product"]().shape), repeats))
        return as_samples({name: [2.0, 0.5, 4.0] for name in sides})

    monkeypatch.setattr(roof, "in_turns", in_turns)
    roofs = roof.meter("cpu", torch.bfloat16)
    assert [roofs(3), roofs(2)] == [roof.Roof("bfloat16", 2 * 16**3 / 0.5, 2 * 2048 / 0.5, 2048 / 0.5)] * 2
    assert seen == [((16, 16), 3), ((16, 16), 2)]


@pytest.fixture
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers that start no process, and what they do, in order. One side does not fit."""
    done: list[str] = []

    class Worker:
        def __init__(self, benchmark: str, name: str, *words: str):
            if name == "transformers":
                raise InputError(f"{name} failed: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.")
            self.name = name
            self.ready = {"first_step_seconds": 1.0, "losses": [3.0]}
            done.append(f"{name} starts")

        def __enter__(self) -> "Worker":
            return self

        def __exit__(self, *error: object) -> None:
            done.append(f"{self.name} ends")

        def ask(self, words: str) -> dict[str, Any]:
            done.append(f"{self.name} steps")
            return {"seconds": 1.0, "losses": [2.0], "peak_bytes": 2**30}

    monkeypatch.setattr(process, "Worker", Worker)
    monkeypatch.setattr(roof, "meter", lambda device, dtype: lambda repeats: roof.Roof("bfloat16", 1e12, 1e10, 1e10))
    return done


def test_peers_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fake_workers: list[str]
) -> None:
    """It is skipped by name."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run_here("peers", tmp_path, "--repeats", 1)
    names = ("minift, compiled", "minift")
    assert fake_workers == [f"{name} {verb}" for verb in ("starts", "steps") for name in names] + [
        f"{name} ends" for name in reversed(names)
    ]
    assert "transformers is not installed: skipped" in capsys.readouterr().out


def test_peers_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_workers: list[str]) -> None:
    """Each side ends before the next one begins, and one that does not fit is left out by name."""
    pytest.importorskip("transformers")
    sides = ["minift", "transformers", "transformers, checkpointed"]
    result = run_here("peers", tmp_path, "--repeats", 2, "--apart", "--sides", *sides)
    assert fake_workers == [f"{name} {v}" for name in sides[::2] for v in ("starts", "steps", "steps", "ends")]
    assert result["skipped"] == ["transformers"]
    assert list(result["tokens_per_second"]) == sides[::2]
    assert "transformers: skipped, it does not fit" in capsys.readouterr().out
    with pytest.raises(InputError, match="out of memory"):  # together, nobody is left out quietly
        run_here("peers", tmp_path, "--repeats", 2, "--sides", *sides)


def test_a_worker_says_why_it_failed() -> None:
    with pytest.raises(InputError, match=r"naive failed: .*unknown preset 'nonesuch'"):
        process.Worker("ladder", "naive", "--config=nonesuch")


def test_turns() -> None:
    assert [list(in_turn_order(["a", "b", "c"], turn)) for turn in range(3)] == [list("abc"), list("cba"), list("abc")]


# soak -----------------------------------------------------------------------------------------------------------------


def test_flatness_is_of_the_most_of_each_minute_behind_the_warm_up() -> None:
    """20 minutes, of which two warm up; in each a step and an evaluation, which takes more."""
    most = [50, 90, *range(100, 118)]
    looks = [
        (60.0 * minute + second, value - 7 * (second < 30)) for minute, value in enumerate(most) for second in (2, 40)
    ]
    flat = soak.flatness(looks)
    assert flat["minutes"] == most
    assert (flat["first"], flat["last"]) == (100, 117)
    assert flat["off"] == pytest.approx(9 / 109)
    assert soak.flatness([(second, 4) for second in range(600)])["off"] == 0


def test_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    """By any number but the times."""
    lines = [{"step": i, "loss": 1.0 / (1 + i), "seconds": 0.1 * i, "tokens_per_second": 7.0 + i} for i in range(3)]
    variants = {"a": lines, "b": [{**line, "seconds": 9.0, "tokens_per_second": 1.0} for line in lines]}
    variants["c"] = [*lines[:2], {**lines[2], "loss": 0.33333333333333337}]
    for name, rows in variants.items():
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / name / "final" / "model.pt").write_bytes(b"weights" + b"!" * (name == "c"))
    assert soak.metrics(tmp_path / "a") == soak.metrics(tmp_path / "b") != soak.metrics(tmp_path / "c")
    assert soak.checksum(tmp_path / "a") == soak.checksum(tmp_path / "b") != soak.checksum(tmp_path / "c")
