"""The promise of `lesson accumulation`: its two gradients are the formulas', and its conclusion is the numbers'."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lessons import accumulation
from minift.checkpoint import load_model
from minift.errors import InputError
from minift.pack import Example
from minift.storage.names import model_path
from tests.helpers import run_here, small_model


def test_both_gradients_are_the_formulas() -> None:
    """Against plain cross-entropy in float64, example by example: nothing is packed, chunked or accumulated."""
    model = small_model().double()
    generator = torch.Generator().manual_seed(0)

    def example(n_prompt: int, n_answer: int) -> Example:
        ids = torch.randint(3, 97, (n_prompt + n_answer,), generator=generator).tolist()
        return Example(ids[:n_prompt], ids[n_prompt:])

    parts = [[example(3, 2)], [example(4, 5), example(2, 1), example(3, 3)]]

    def nlls(part: list[Example]) -> torch.Tensor:
        found = []
        for one in part:
            ids = torch.tensor([one.prompt + one.answer])
            logits = model(ids[:, :-1])[0, len(one.prompt) - 1 :]
            found.append(F.cross_entropy(logits, torch.tensor(one.answer), reduction="none"))
        return torch.cat(found)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    right = gradient(torch.cat([nlls(part) for part in parts]).mean())
    faulty = gradient(torch.stack([nlls(part).mean() for part in parts]).mean())
    torch.testing.assert_close(accumulation.right_gradient(model, parts), right)
    torch.testing.assert_close(accumulation.mean_of_means(model, parts), faulty)
    cosine, ratio, error = accumulation.compare(faulty, right)
    assert cosine == pytest.approx(float(F.cosine_similarity(faulty, right, dim=0)))
    assert (ratio, error) == pytest.approx(
        (float(faulty.norm() / right.norm()), float((faulty - right).norm() / right.norm()))
    )
    assert cosine < 0.99


def test_the_splits() -> None:
    assert accumulation.sizes(12, 3) == [[4, 4, 4], [6, 3, 3], [8, 2, 2], [10, 1, 1]]
    window = [Example([1], [i]) for i in range(12)]
    parts = accumulation.cut(window, [8, 2, 2])
    assert [len(part) for part in parts] == [8, 2, 2]
    assert [one for part in parts for one in part] == window  # the same pairs in every split


def test_the_right_gradient_is_the_same_for_every_split() -> None:
    model = load_model(model_path("bundled"))
    window = [Example([1, 40 + i], [50 + i, 60, 2]) for i in range(8)]
    whole = accumulation.right_gradient(model, [window])
    for split in accumulation.sizes(8, 4):
        torch.testing.assert_close(accumulation.right_gradient(model, accumulation.cut(window, split)), whole)


def test_the_more_unequal_the_further_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["--windows", 3, "--pairs", 8, "--micro-batches", 2, "--plot", tmp_path / "x.png", "--seed", 5]
    result = run_here("lesson", tmp_path, "accumulation", *words)
    levels = result["levels"]
    assert [level["sizes"] for level in levels] == [[4, 4], [5, 3], [6, 2], [7, 1]]
    assert levels[0]["error"]["value"] < 1e-5  # equal: the fault does nothing
    cosines, errors = ([level[key]["value"] for level in levels] for key in ("cosine", "error"))
    assert all(later < earlier for earlier, later in pairwise(cosines))
    assert all(later > earlier for earlier, later in pairwise(errors))
    assert cosines[-1] < 0.95
    assert "further apart" in result["conclusion"]
    assert {"machine", "versions", "commit", "seconds", "seed"} <= set(result)
    printed = capsys.readouterr().out
    assert "7 + 1" in printed
    assert "│████" in printed
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_conclusion_is_the_numbers(tmp_path: Path) -> None:
    level = {"sizes": [1], "share": 0.5} | {
        key: {"value": value, "interval": [value, value]}
        for key, value in (("cosine", 0.9), ("norm_ratio", 1.1), ("error", 0.1))
    }
    other = copy.deepcopy(level)
    other["cosine"]["value"] = 0.95  # … and so it rises again
    assert "does not fall at every level" in accumulation.conclusion({"levels": [level, other]})
    assert "further apart" in accumulation.conclusion({"levels": [other, level]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", 9], "--pairs 9 cannot be split evenly over 4"),
        (["--micro-batches", 1], "micro_batches is 1; it must be at least 2"),
        (["--windows", 0], "windows is 0"),
        (["--answer-tokens", 77], "only 0 answers have 77 tokens"),
        (["--plot", "x.pdf"], "--plot draws a .png, not x.pdf"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options(words: list[object], message: str, tmp_path: Path) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=message):
        run_here("lesson", tmp_path, "accumulation", *words)
