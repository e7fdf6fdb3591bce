"""The promise of `generate.Sampling`: its bounds are exact, it is greedy by default, and a seed decides the text.

That ids are chosen with the right probabilities is held in `way/test_slow_twins.py`.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from minift import reference
from minift.cli import main
from minift.errors import InputError
from minift.generate import Sampling, generate, sample, stream
from tests.helpers import small_model

EQUAL = torch.zeros(400, 4)  # of which each probability is exactly 0.25


def drawn(**options: float) -> int:
    """How many of four equal ids are ever chosen."""
    chosen = sample(EQUAL, Sampling(temperature=1.0, **options), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return len(chosen.unique())


@pytest.mark.parametrize(
    ("top_p", "ids"), [(0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_top_p_is_the_smallest_set_that_holds_so_much(top_p: float, ids: int) -> None:
    """A set that holds exactly as much is enough: for `sample`, and for the formula that it is held against."""
    assert drawn(top_p=top_p) == ids
    assert int(reference.token_log_probability(EQUAL[0], 1.0, 0, top_p).isfinite().sum()) == ids


@pytest.mark.parametrize(("top_k", "ids"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (0, 4)])
def test_top_k_is_so_many(top_k: int, ids: int) -> None:
    assert drawn(top_k=top_k) == ids


@pytest.mark.parametrize("temperature", [1e-39, 1e-4, 100.0])
def test_equal_ids_are_drawn_alike_at_every_temperature_above_0(temperature: float) -> None:
    chosen = sample(EQUAL, Sampling(temperature), torch.Generator().manual_seed(0))
    assert int(chosen.bincount(minlength=4).min()) > 60  # of 400 draws among four


def test_top_p_is_of_what_top_k_has_left() -> None:
    """Half of two equal ids is one; half of all four would be two."""
    assert drawn(top_k=2, top_p=0.5) == 1


def test_it_is_greedy_by_default_and_cannot_be_changed() -> None:
    rows = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(rows, Sampling(), torch.Generator()), rows.argmax(-1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 1.0}, {"top_p": 1e-9}, {"top_k": 0}, {"seed": 0}])
def test_the_last_value_within_bounds(options: dict[str, float]) -> None:
    Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1e-9}, {"top_p": 0.0}, {"top_p": 1.0 + 1e-9}, {"top_k": -1}, {"seed": -1}, {"seed": 2**31}],
)
def test_the_first_value_out_of_bounds(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_a_seed_decides_the_text() -> None:
    model = small_model(std=0.3, tie_word_embeddings=False).eval()
    texts = [generate(model, [[1, 5]], 12, Sampling(1.0, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert [list(stream(model, [1, 5], 12, Sampling(1.0, seed=3)))] == texts[0]


def test_the_command_passes_every_option_on(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        words = ["generate", "--model", str(small_checkpoint), "--prompt", "Tell me", "--device", "cpu"]
        assert main([*words, "--max-new-tokens", "9", *options]) == 0
        return capsys.readouterr().out

    greedy = said()
    assert said("--temperature", "3", "--top-k", "1") == greedy
    assert said("--temperature", "3", "--top-p", "1e-6") == greedy
    assert said("--plain") == greedy
    drawn = [said("--temperature", "3", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({greedy, *drawn}) == 3
