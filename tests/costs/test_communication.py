"""The promise of `minift info --world` and of `benchmarks scale`: a plan whose parts can be checked by hand, and a
measurement in which both sides train the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minift.config import LlamaConfig
from minift.costs.flops import count_parameters, training_flops_per_token
from minift.costs.communication import ALONE, CARD_FLOPS, LINK, NETWORK_BANDWIDTH, Collective, communication, plan
from tests.helpers import ROOT

SEVEN = LlamaConfig.preset("llama2-7b")
SEVENTY = LlamaConfig.preset("llama2-70b")


def test_the_presets_have_the_published_numbers_of_parameters() -> None:
    assert count_parameters(LlamaConfig.preset("llama2-13b")).total == 13_015_864_320
    assert count_parameters(SEVENTY).total == 68_976_648_192


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_sends_what_simulating_it_sends(ranks: int) -> None:
    """Each rank passes on, in every round, one of N equal parts: N - 1 rounds, and as many again to all-reduce."""
    nbytes = 24 * ranks
    rounds = ranks - 1
    assert Collective(1, nbytes).sent("all-gather", ranks) == rounds * 24
    assert Collective(1, nbytes).sent("all-reduce", ranks) == 2 * rounds * 24


def test_a_plan_adds_up_by_hand() -> None:
    """70B on 16 cards: twice all weights in bfloat16 and the gradients in float32, through the network."""
    found = plan(SEVENTY, 16, 4_096)
    assert found is not None
    assert found.parallel == "fsdp"
    root = 2 * 32_000 * 8_192 + 8_192
    layers = count_parameters(SEVENTY).total - root
    sent = (2 * 2 * layers + 4 * root + 4 * layers + 4 * root) * 15 / 16
    assert found.sent_bytes[0] == 0
    assert found.sent_bytes[1] == pytest.approx(sent, rel=1e-3)
    assert found.communication_seconds == pytest.approx(sent / (LINK * NETWORK_BANDWIDTH), rel=1e-3)
    compute = 4_096 * training_flops_per_token(SEVENTY, 4_096) / (ALONE * CARD_FLOPS)
    assert found.compute_seconds == pytest.approx(compute)
    assert found.mfu == pytest.approx(ALONE * compute / found.communication_seconds, rel=1e-3)


def test_what_fits_and_what_does_not() -> None:
    assert [(p := plan(SEVEN, cards, 4_096)) and p.parallel for cards in (1, 8, 1_024)] == [
        "alone",
        "ddp",
        "fsdp x ddp",
    ]
    assert plan(SEVENTY, 8, 4_096) is None
    memory = [found.card_bytes for cards in (16, 64, 256) if (found := plan(SEVENTY, cards, 4_096))]
    assert memory == sorted(memory, reverse=True)
    assert len(memory) == 3


def test_ddp_sends_once_and_fsdp_for_each_micro_batch() -> None:
    once, four = (communication(SEVEN, "ddp", 8, "bfloat16", n)["all-reduce"] for n in (1, 4))
    assert once == four
    once, four = (communication(SEVEN, "fsdp", 8, "bfloat16", n) for n in (1, 4))
    assert four["all-gather"].calls == 4 * once["all-gather"].calls
    assert four["reduce-scatter"] == once["reduce-scatter"]


def test_info_prints_the_plan(minift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = minift("info", "--config", "llama2-70b", "--world", "64", "--json", tmp_path / "info.json")
    assert done.returncode == 0, done.stderr
    assert "on 64 H200s, on paper" in done.stdout
    values = json.loads((tmp_path / "info.json").read_text())["plan"]
    assert values["cards"] == 64
    assert f"expected MFU {values['mfu']:.2f}" in done.stdout
    small = minift("info", "--config", "llama2-70b", "--world", "2")
    assert "so many H200s cannot hold it" in small.stdout
    wrong = minift("info", "--config", "llama2-7b", "--world", "0")
    assert (wrong.returncode, wrong.stderr) == (2, "minift: error: world is 0; it must be at least 1\n")


def test_parallel_without_torchrun_is_refused(
    minift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = minift("finetune", "--parallel", "fsdp", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scale_measures_sides_that_train_the_same(tmp_path: Path) -> None:
    words = ["scale", "--config", "stories260k", "--batch-size", "4", "--length", "64", "--dtype", "float32"]
    words += ["--steps", "1", "--repeats", "2", "--json", str(tmp_path / "scale.json")]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scale.json").read_text())
    assert result["processes"] == {"one process": 1, "ddp": 2, "fsdp": 2}
    assert result["losses_apart_at_most"] < 1e-3
    assert result["of_one_process"]["one process"] == 1
    assert all(len(result["peak_bytes"][name]) == n for name, n in result["processes"].items())
