"""The promise of `lesson forgetting`: what it costs to learn fast, and a conclusion from its numbers."""

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lessons import forgetting
from benchmarks.lessons.forgetting import PAGES
from minift.checkpoint import load_model
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.storage.names import model_path
from minift.tokenizer.load import load_tokenizer
from tests.helpers import run_here


@pytest.mark.slow
def test_a_larger_learning_rate_forgets_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rates", 3e-3, 3e-4, "--ranks", 2, "--lora-rates", 5e-3, "--seeds", 1, "--steps", 10, "--pages", 30]
    result = run_here("lesson", tmp_path, "forgetting", *words, "--questions", 12, "--processes", 0)
    base, (slow, fast, adapters) = result["base"], result["sides"]
    assert [side["lr"] for side in (base, slow, fast, adapters)] == [0.0, 3e-4, 3e-3, 5e-3]
    for gentler, rougher in pairwise((base, slow, fast)):
        assert gentler["tell"]["value"] < rougher["tell"]["value"]
    for side in (slow, fast, adapters):
        assert side["rise"]["value"] == pytest.approx(side["tell"]["value"] - base["tell"]["value"])
    assert fast["rise"]["interval"][0] > slow["rise"]["interval"][1]
    assert [base["trained"], slow["trained"], adapters["trained"]] == [0, 1_820_352, 25_600]
    tell, ask = _perplexities(30)
    assert base["tell"]["value"] == pytest.approx(tell, rel=1e-4)
    assert base["ask"]["value"] == pytest.approx(ask, rel=1e-4)
    assert "the more is forgotten" in result["conclusion"]
    assert "adapters, rank 2" in capsys.readouterr().out


@torch.no_grad()
def _perplexities(count: int) -> tuple[float, float]:
    """Of the base, page by page and in float64, by the plain loss: of the pages that tell, and of those that ask."""
    model, tokenizer = load_model(model_path("bundled")).double(), load_tokenizer(model_path("bundled"))
    sums = {False: [0.0, 0], True: [0.0, 0]}
    for text in islice(DocumentStream([PAGES], epochs=1), count):
        ids = tokenizer.encode(text, bos=True, eos=True)
        for start in range(0, len(ids) - 1, 256):
            window = torch.tensor([ids[start : start + 257]])
            nll = F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum")
            sums["?" in text][0] += float(nll)
            sums["?" in text][1] += window.shape[1] - 1
    tell, ask = (float(torch.tensor(nll / n, dtype=torch.float64).exp()) for nll, n in sums.values())
    return tell, ask


def _side(rank: int, lr: float, perplexity: float, right: float = 0.9, ask: float | None = None) -> dict[str, Any]:
    def found(value: float) -> dict[str, Any]:
        return {"value": value, "interval": [value - 0.1, value + 0.1], "n": 3}

    names = {"rank": rank, "lr": lr, "trained": 1}
    measured = {"right": found(right), "tell": found(perplexity), "rise": found(perplexity - 1.5)}
    return {**names, **measured, "ask": found(ask) if ask else None}


def _conclusion(*sides: dict[str, Any], ask: float | None = None) -> str:
    return forgetting.conclusion({"base": _side(0, 0.0, 1.5, 0.0, ask), "sides": list(sides)})


@pytest.mark.parametrize(
    ("value", "verdict"), [(1.6, "forget less, for"), (9.0, "forget more, for"), (2.1, "not shown here")]
)
def test_the_verdict_on_adapters_needs_runs_apart(value: float, verdict: str) -> None:
    assert verdict in _conclusion(_side(0, 1e-4, 2.0), _side(8, 5e-3, value))


def test_adapters_are_compared_where_they_have_learned_as_much() -> None:
    text = _conclusion(_side(0, 1e-4, 2.0), _side(8, 1e-4, 1.5, right=0.5), _side(8, 5e-3, 3.0))
    assert "(rank 8, 5e-03) 3.00" in text
    assert "forget more" in text
    assert "Runs of all weights alone come within" in _conclusion(_side(0, 1e-4, 2.0), _side(8, 1e-4, 1.5, right=0.5))


def test_the_rates_are_the_numbers() -> None:
    slow, fast = _side(0, 1e-4, 2.0), _side(0, 1e-3, 3.0)
    assert "the more is forgotten" in _conclusion(slow, fast)
    assert "does not rise with every learning rate" in _conclusion({**slow, "lr": 1e-3}, {**slow, "lr": 3e-3})
    assert "overlap" in _conclusion(slow, _side(0, 1e-3, 2.1))


def test_what_is_lost_is_the_numbers() -> None:
    assert "most on the pages that ask (2.00 times" in _conclusion(_side(0, 1e-4, 2.0, ask=4.0), ask=2.0)
    assert "not more on the pages that ask" in _conclusion(_side(0, 1e-4, 2.0, ask=2.0), ask=2.0)


def test_the_table_fits_a_screen() -> None:
    sides = [_side(0, 3e-3, 99.0, ask=899.0), _side(32, 5e-3, 2.0)]
    chosen = {"seeds": [0, 1, 2]}
    lines = forgetting.table({"base": _side(0, 0.0, 1.5, 0.0), "sides": sides, "settings": chosen}).splitlines()
    assert max(map(len, lines)) <= 120
    assert "0.90 [0.80, 1.00] " in lines[3]  # columns stay apart
    assert "99.00 [98.90, 99.10] " in lines[3]


@pytest.mark.parametrize(
    "words",
    [["--steps", 0], ["--ranks", 0], ["--rates", 0.0], ["--lora-rates", -1.0], ["--pages", 0], ["--seeds", 0]],
    ids=str,
)
def test_wrong_options(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words[0]):
        run_here("lesson", tmp_path, "forgetting", *words)
