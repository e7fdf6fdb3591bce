"""The promise of `minift info --world` and of `benchmarks scale`: messages whose bytes can be checked by hand, and a
measurement in which all sides train the same.

`runs/test_distributed.py` holds the same formulas against the collectives of a running step.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minift.config import LlamaConfig
from minift.costs.communication import Collective, communication
from minift.costs.flops import count_parameters
from minift.values import size
from tests.helpers import ROOT, completed

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


def test_what_fsdp_sends_adds_up_by_hand() -> None:
    """70B among 16 ranks: each layer twice in bfloat16, and the gradients once in float32; no size needs padding."""
    root = 2 * 32_000 * 8_192 + 8_192
    layers = count_parameters(SEVENTY).total - root
    found = communication(SEVENTY, "fsdp", 16, "bfloat16")
    assert found["all-gather"] == Collective(2 * 80 + 1, 2 * 2 * layers + 4 * root)
    assert found["reduce-scatter"] == Collective(80 + 1, 4 * layers + 4 * root)
    assert found["all-reduce"] == Collective(1, 4 * (9 * 80 + 3))
    sent = sum(each.sent(kind, 16) for kind, each in found.items())
    assert sent == pytest.approx((2 * 2 * layers + 4 * root + 4 * layers + 4 * root) * 15 / 16, rel=1e-6)


def test_ddp_sends_once_and_fsdp_for_each_micro_batch() -> None:
    once, four = (communication(SEVEN, "ddp", 8, "bfloat16", n)["all-reduce"] for n in (1, 4))
    assert once == four
    once, four = (communication(SEVEN, "fsdp", 8, "bfloat16", n) for n in (1, 4))
    assert four["all-gather"].calls == 4 * once["all-gather"].calls
    assert four["reduce-scatter"] == once["reduce-scatter"]


def test_info_prints_the_messages(minift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = minift("info", "--config", "llama2-7b", "--world", "8", "--json", tmp_path / "info.json")
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "info.json").read_text())
    assert values["world"] == 8
    assert "messages of a step, 8 processes" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ddp", "fsdp"))]
    for parallel, kinds in values["messages"].items():
        expected = communication(SEVEN, parallel, 8, "bfloat16")
        assert kinds.keys() == expected.keys()
        for kind, each in expected.items():
            sent = each.sent(kind, 8)
            assert kinds[kind] == {"calls": each.calls, "bytes": each.nbytes, "sent_by_each": sent}
            row = next(line for line in lines if line.startswith(f"{parallel}, {kind}"))
            assert row.split()[2:] == f"{each.calls} {size(each.nbytes)} {size(sent)}".split()
    assert len(lines) == 4
    alone = minift("info", "--config", "llama2-7b", "--json", tmp_path / "alone.json")
    assert "messages" not in alone.stdout
    assert "messages" not in json.loads((tmp_path / "alone.json").read_text())
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
    done = completed([sys.executable, "-m", "benchmarks", *words], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scale.json").read_text())
    assert result["processes"] == {"one process": 1, "ddp": 2, "fsdp": 2}
    assert result["losses_apart_at_most"] < 1e-3
    assert result["of_one_process"]["one process"] == 1
    assert all(len(result["peak_bytes"][name]) == n for name, n in result["processes"].items())
