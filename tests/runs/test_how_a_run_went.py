"""The promise of a run to say how it went: when its held-out loss rises, and when it ends worse than it began.

And of its folder: whoever asks for it while the comparison is made is refused, as while it trains.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.distributed.world import World
from minift.errors import InputError
from minift.look.report import worse_line
from minift.runs import finetune as jobs
from minift.runs.folder import own_folder
from minift.runs.progress import Best
from tests.helpers import write_jsonl


def evaluated(*losses: float) -> Best:
    best = Best()
    for step, loss in enumerate(losses, start=1):
        best.add({"step": step, "validation_loss": loss})
    return best


@pytest.mark.parametrize(
    ("losses", "rose"),
    [
        ((2.0,), False),
        ((2.0, 1.5), False),
        ((2.0, 2.01), False),
        ((2.0, 2.03), True),
        ((2.0, 2.5, 1.9), False),
        ((), False),
    ],
)
def test_a_loss_that_rises_by_more_than_a_hundredth_is_noticed(losses: tuple[float, ...], rose: bool) -> None:
    assert evaluated(*losses).rose is rose


@pytest.fixture
def few(tmp_path: Path) -> list[str]:
    """Words of a run that learns eight pairs by heart, and forgets the rest."""
    pairs = [{"question": f"What is {i}?", "answer": f"The number {i} of {i * 7 % 11}."} for i in range(8)]
    other = [{"question": f"Who was {name}?", "answer": f"{name} was a king."} for name in ("Ann", "Bob", "Eve")]
    train, test = write_jsonl(tmp_path / "train.jsonl", pairs), write_jsonl(tmp_path / "test.jsonl", other)
    flags = "--epochs 40 --lr 3e-3 --eval-every 5 --warmup 0 --device cpu --dtype float32"
    return ["finetune", "--data", str(train), "--test", str(test), "--out", str(tmp_path / "run"), *flags.split()]


def test_a_run_that_gets_worse_says_so(few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When it happens, at the end, and in its report."""
    assert main(few) == 0
    printed = capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one["validation_loss"] for one in records if "validation_loss" in one}
    losses[0] = records[0]["validation_loss_before"]
    lowest = min(losses, key=lambda step: losses[step])
    assert losses[max(losses)] > 1.01 * losses[lowest]
    low, last = losses[lowest], losses[max(losses)]
    said = re.findall(r"step \d+: the validation loss was lowest", printed.out + printed.err)
    assert said
    assert len(said) == len(set(said)) <= len(losses)
    assert all(int(re.findall(r"\d+", one)[0]) in losses for one in said)  # said after an evaluation, and no other step
    assert f"where the validation loss was lowest: {low:.4f}" in printed.out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"where the validation loss was lowest: {low:.4f}. At the end it was {last:.4f}." in page
    result = json.loads((tmp_path / "run" / "compare.json").read_text(encoding="utf-8"))
    worse = result["after"]["perplexity"] > result["before"]["perplexity"]
    assert ("less likely than before" in printed.out) == worse


def test_the_line_about_a_worse_model() -> None:
    def result(before: float | None, after: float | None) -> dict[str, Any]:
        return {"before": {"perplexity": before}, "after": {"perplexity": after}}

    assert worse_line(result(2.0, 1.5)) is None
    assert worse_line(result(None, None)) is None
    assert "perplexity 2.000, then 3.000" in str(worse_line(result(2.0, 3.0)))


def test_the_folder_is_the_runs_until_its_last_file_is_written(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second `--resume` during the comparison would read and write what the first is writing."""
    refused = []
    compare, write_report = jobs.compare, jobs.write_report

    def spy(call: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            code = "import sys; from minift.cli import main; sys.exit(main(sys.argv[1:]))"
            words = [sys.executable, "-c", code, "finetune", "--resume", "--out", str(tmp_path / "run")]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            refused.append((done.returncode, "another run is writing it" in done.stderr))
            return call(*arguments, **named)

        return called

    monkeypatch.setattr(jobs, "compare", spy(compare))
    monkeypatch.setattr(jobs, "write_report", spy(write_report))
    few[few.index("40")] = "1"
    assert main(few) == 0
    assert refused == [(2, True), (2, True)]
    with own_folder(tmp_path / "run", True, World()):  # free again
        pass
    with pytest.raises(InputError, match="already holds a run"), own_folder(tmp_path / "run", False, World()):
        pass
