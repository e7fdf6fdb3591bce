"""The promise of `lesson how-many`: more different pairs, more right answers; and a conclusion from its numbers."""

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.lessons import estimate, how_many
from minift.data.conversations import read_all_conversations
from minift.errors import InputError
from minift.storage.names import bundled
from tests.helpers import run_here


@pytest.mark.slow
def test_more_pairs_answer_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--counts", 200, 10, "--seeds", 1, "--steps", 40, "--questions", 60, "--processes", 0, "--lr", 5e-4]
    result = run_here("lesson", tmp_path, "how-many", *words)
    few, many = result["counts"]
    assert (few["count"], many["count"]) == (10, 200)
    assert few["value"] + 0.2 < many["value"]
    assert [run["right"] for run in result["runs"]] == [few["value"], many["value"]]
    assert result["questions"] == 60
    assert "made the difference" in result["conclusion"]
    assert "40.0 x" in capsys.readouterr().out  # that each of 10 pairs was read, in 40 steps of 10


def test_the_sets_of_a_seed_are_nested_and_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []
    monkeypatch.setattr(
        how_many, "finetune", lambda model, tok, pairs, config, steps: taken.append([p.question for p in pairs])
    )
    capital = [float(pair.question.startswith("What is the capital")) for pair in _test()]
    monkeypatch.setattr(how_many, "right_answers", lambda model, tok, pairs: capital)
    asked = {"seed": 3, "steps": 1, "batch_size": 10, "lr": 1e-4, "questions": 0}
    found = [how_many._measure({**asked, "count": count}) for count in (10, 30)]
    pairs = read_all_conversations([bundled("pairs.jsonl")])
    Random("3 how many").shuffle(pairs)
    assert taken == [[pair.question for pair in pairs[:count]] for count in (10, 30)]
    kinds = how_many._kinds()
    for count, run in zip((10, 30), found, strict=True):
        taught = {kinds[pair.question] for pair in pairs[:count]}
        assert run["others"] == sum(kinds[pair.question] not in taught for pair in _test())
        assert run["right_of_others"] == ("country/capital" not in taught) * sum(capital)
        assert (run["right"], run["questions"]) == (sum(capital) / 228, 228)


def _test() -> list[Any]:
    return [pair for pair in read_all_conversations([bundled("test.jsonl")]) if pair.metric == "exact_match"]


def _made(*medians: float, half: float = 0.01, others: int = 0) -> dict[str, Any]:
    rows = [
        {"count": 10 ** (i + 1), "value": value, "interval": [value - half, value + half], "n": 3}
        | {"others": others, "right_of_others": 1 if others else 0}
        for i, value in enumerate(medians)
    ]
    runs = [{"count": row["count"], "seed": 0, "right": row["value"]} for row in rows]
    chosen = {"steps": 5, "batch_size": 10, "lr": 1e-4, "seeds": [0, 1, 2]}
    return {"settings": chosen, "questions": 7, "runs": runs, "counts": rows}


def test_the_conclusion_is_the_numbers() -> None:
    rising = how_many.conclusion(_made(0.1, 0.9, 0.93))
    assert "never falls" in rising
    assert "100 come within 5 points of the best" in rising
    assert "falls: not every step up" in how_many.conclusion(_made(0.1, 0.95, 0.9))
    flat = how_many.conclusion(_made(0.90, 0.91))
    assert "no clear difference" in flat
    assert "made the difference" not in flat
    assert "Of 8 questions of a kind that no pair was of, 2 were" in how_many.conclusion(_made(0.1, 0.9, others=4))
    assert "no pair" not in rising
    falling = copy.deepcopy(_made(0.1, 0.9))
    falling["counts"].reverse()
    assert "no clear difference" in how_many.conclusion(falling)


def test_the_table_fits_a_screen() -> None:
    lines = how_many.table(_made(0.1, 0.5, 0.7, 0.9, others=4)).splitlines()
    assert max(map(len, lines)) <= 120
    assert "in 75% of cases" in " ".join(lines)  # for 3 runs


def test_a_range_of_runs_is_as_certain_as_it_says() -> None:
    """By drawing: how often the range of 6 holds the median, which is 0, of what they are drawn from."""
    rng = Random(0)
    draws = [estimate.of_runs([rng.gauss(0, 1) for _ in range(6)])["interval"] for _ in range(4_000)]
    assert sum(low < 0 < high for low, high in draws) / 4_000 == pytest.approx(estimate.certainty(6), abs=0.01)
    assert estimate.certainty(6) == 31 / 32
    assert estimate.of_runs([3.0, 1.0, 2.5]) == {"value": 2.5, "interval": [1.0, 3.0], "n": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--counts", 0], "--counts is 0"),
        (["--counts", 5000], "below 1109"),
        (["--counts", 15], "--counts 15 is not a multiple of --batch-size 10"),
        (["--seeds", 0], "--seeds is 0"),
        (["--lr", 0], "--lr is 0"),
        (["--questions", -1], "--questions is -1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options(words: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_here("lesson", tmp_path, "how-many", *words)
