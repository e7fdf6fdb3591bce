"""The promise of `python -m benchmarks lora`: its sides differ in what is trained, which is counted right."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora, process
from minift.checkpoint import load_model
from minift.errors import InputError
from tests.helpers import run_here, write_jsonl


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process for each side takes its time."""
    monkeypatch.setattr(process, "fresh", lambda name, words: lora._measure(words))


def test_a_run(tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    data = write_jsonl(
        tmp_path / "x.jsonl", [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]
    )
    words = ["--model", small_checkpoint, "--data", data, "--steps", 2, "--ranks", 1, 3, "--device", "cpu"]
    result = run_here("lora", tmp_path, *words)
    sides: dict[str, Any] = result["sides"]
    assert list(sides) == ["all weights", "adapters, rank 1", "adapters, rank 3"]
    total = sum(parameter.numel() for parameter in load_model(small_checkpoint).parameters())
    # Of each of 2 layers: q and o [24, 24], k and v [12, 24], gate and up [40, 24], down [24, 40].
    a_rank = 2 * (2 * (24 + 24) + 2 * (12 + 24) + 3 * (40 + 24))
    assert [side["trained"] for side in sides.values()] == [total, a_rank, 3 * a_rank]
    assert {side["parameters"] for side in sides.values()} == {total}
    assert [side["gradient_and_moment_bytes"] for side in sides.values()] == [12 * total, 12 * a_rank, 36 * a_rank]
    assert [side["steps"] for side in sides.values()] == [2, 2, 2]
    assert [side["lr"] for side in sides.values()] == [1e-4, 5e-3, 5e-3]
    assert len({side["before"]["perplexity"] for side in sides.values()}) == 1
    assert len({side["scores"]["perplexity"] for side in sides.values()}) == 3
    assert "adapters, rank 3" in capsys.readouterr().out
    assert {"machine", "versions", "commit"} <= set(result)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--ranks must be at least 1"):
        run_here("lora", tmp_path, "--ranks", 0)
