"""The promise of `lesson leakage`: what it says has crossed a border did, and what it says did not, did not."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lessons import leakage
from minift.errors import InputError
from minift.pack import Example, collate
from tests.helpers import run_here, small_model


def test_naive_packing_is_the_two_texts_as_one() -> None:
    """Against plain cross-entropy of the concatenated ids."""
    model = small_model()
    first, second = Example([1], [5, 6, 7, 8, 2]), Example([1], [9, 10, 2])
    batch = collate([first, second], 2, len(first) + len(second))
    ids = torch.tensor([[1, 5, 6, 7, 8, 1, 9, 10]])
    targets = torch.tensor([5, 6, 7, 8, 2, 9, 10, 2])
    expected = F.cross_entropy(model(ids)[0], targets, reduction="none")
    torch.testing.assert_close(leakage._nll(model, leakage.naive(batch)), expected.detach())
    alone = F.cross_entropy(model(torch.tensor([[1, 9, 10]]))[0], targets[5:], reduction="none")
    torch.testing.assert_close(leakage._nll(model, batch)[5:], alone.detach())


def test_the_gradients_change() -> None:
    model = small_model()
    one, other = (collate([Example([1], [i, i + 1, 2]), Example([1], [9, 2])], 2, 8) for i in (5, 40))
    only = [
        dataclasses.replace(batch, targets=torch.where(batch.document_ids == 1, batch.targets, -100), n_targets=2)
        for batch in (one, other)
    ]
    assert leakage._gradient_change(model, *only) == 0.0
    assert leakage._gradient_change(model, *map(leakage.naive, only)) > 0.01


def test_nothing_crosses_when_isolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", 8, "--lengths", 64, 128, "--tokens", 512, "--repeats", 1, "--seed", 3]
    result = run_here("lesson", tmp_path, "leakage", *words)
    assert result["isolated"]["largest"] == 0.0
    assert result["isolated"]["loss"]["interval"] == [0.0, 0.0]
    assert result["naive"]["loss"]["value"] > 0.05
    assert result["naive"]["gradient"]["value"] > 0.05
    assert result["whole"]["same"]["value"] < result["whole"]["stranger"]["value"]
    assert [(cost["length"], cost["tokens"], cost["mask_bytes"]) for cost in result["cost"]] == [
        (64, 512, 512 * 64),
        (128, 512, 512 * 128),
    ]
    assert "nothing crosses" in result["conclusion"]
    assert "after the same thing" in capsys.readouterr().out
    broken = copy.deepcopy(result)
    broken["isolated"]["largest"] = 0.5
    broken["whole"]["same"] = broken["whole"]["stranger"]
    assert "isolation is broken" in leakage.conclusion(broken)
    assert "did not lower B's loss" in leakage.conclusion(broken)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rows", 1], "rows is 1"), (["--lengths", 8], "lengths is 8"), (["--repeats", 0], "repeats is 0")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options(words: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_here("lesson", tmp_path, "leakage", *words)
