"""The promise of `python -m benchmarks defaults`: only the rate differs between runs, and the rule is a good one."""

from pathlib import Path

import pytest

from benchmarks import defaults
from minift.errors import InputError
from tests.helpers import run_here


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is pretrained once, and each run has as many steps and its own rate."""
    monkeypatch.setitem(defaults.PRETRAINING, "small", {"batch_size": 2, "max_length": 32})
    monkeypatch.setattr("minift.runs.defaults.FEWEST_STEPS", 10)
    words = ["--sizes", "small", "--pairs", 4, "--factors", 3, "--questions", 6, "--device", "cpu"]
    words += ["--folder", tmp_path / "models", "--pretrain-steps", 2]
    result = run_here("defaults", tmp_path, *words)
    (row,) = result["sweeps"]
    assert (row["size"], row["pairs"], row["steps"]) == ("small", 4, 10)
    rule, tripled = row["runs"]
    assert (rule["factor"], tripled["factor"]) == (1, 3)
    assert tripled["lr"] == pytest.approx(3 * rule["lr"])
    assert rule["losses"][0] == tripled["losses"][0]  # the same model on the same questions
    assert rule["losses"][1:] != tripled["losses"][1:]
    for one in row["runs"]:
        assert len(one["losses"]) == 11
        assert (one["best"], one["end"]) == (min(one["losses"]), one["losses"][-1])
        assert 0 <= one["right"] <= 1
    assert "the rule" in capsys.readouterr().out
    monkeypatch.setattr(defaults, "pretrain", None)
    run_here("defaults", tmp_path, *words, "--factors", 1)
    assert {"machine", "versions", "commit"} <= set(result)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        run_here("defaults", tmp_path, "--pairs", 0)
    with pytest.raises(InputError, match="--pairs 5000: there are 1108"):
        run_here("defaults", tmp_path, "--sizes", "bundled", "--pairs", 5_000)


def test_ten_pairs_make_the_bundled_model_better_at_nearly_the_best_rate(tmp_path: Path) -> None:
    """Fewer pairs than a batch: ten epochs of one step each changed nothing."""
    words = ["--sizes", "bundled", "--pairs", 10, "--factors", 3, "--questions", 40, "--device", "cpu"]
    (row,) = run_here("defaults", tmp_path, *words)["sweeps"]
    rule = row["runs"][0]
    assert rule["best"] < 0.5 * rule["losses"][0]
    assert rule["best"] < min(one["best"] for one in row["runs"]) + 0.3
    assert rule["right"] > max(one["right"] for one in row["runs"]) - 0.1
