"""The lists of mistakes hold the answers that they say, the most striking first."""

import json
from pathlib import Path

import pytest

from minift.cli import main
from minift.evaluation.evaluate import Answer, Evaluation, Question
from minift.evaluation.likelihood import Likelihood
from minift.evaluation.mistakes import mistakes, repetition
from minift.look.report import mistake_lines
from minift.pack import Example
from minift.prompts import Pair
from tests.helpers import write_jsonl


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d e f g h", 0.0),
        ("a a a a a a a", 3 / 4),  # 4 runs, of which one is new
        ("a b c d a b c d", 1 / 5),
        ("Tell me how " * 4, 6 / 9),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share, abs=1e-15)


# The right answer, the model's words, whether they ended, and the loss of each of two targets.
CASES = [
    ("yes", "yes", True, 0.1),
    ("a b c", "a b x", True, 0.5),
    ("no", "wrong", True, 1.0),
    ("no", "wrong, too", True, 3.0),
    ("x", "b b b b b b b b", False, 2.0),
    ("y", "to be or not to be or not to be", True, 0.2),
    ("z", "one two three four five six seven eight nine ten eleven twelve", False, 0.3),
]


def made_up() -> tuple[list[Question], Evaluation]:
    questions = [
        Question(Pair(f"Question {i}?", right), Example([1], [2, 3]), 5) for i, (right, *_) in enumerate(CASES)
    ]
    answers = [Answer(said, ended) for _, said, ended, _ in CASES]
    likelihoods = [Likelihood(2 * loss, 2, 0, 5) for *_, loss in CASES]
    text = Question(Pair("", "A text."), Example([1], [2]), 7)
    return [*questions, text], Evaluation({}, [*answers, Answer("", True)], [*likelihoods, Likelihood(9.0, 1, 0, 7)])


def test_the_lists() -> None:
    questions, evaluation = made_up()
    found = mistakes(questions, evaluation, count=10)
    assert (found["n"], found["counts"]) == (len(CASES), {"repetitive": 1, "truncated": 2})
    lists = {kind: [int(entry["question"][9]) for entry in entries] for kind, entries in found["lists"].items()}
    assert lists == {
        "worst": [3, 4, 2, 6, 5, 1],  # none of the words, by surprise; then some of them; what is right is no mistake
        "longest": [6, 5, 4, 1, 3, 0, 2],
        "repetitive": [4],
        "truncated": [6, 4],
    }
    losses = {entry["said"]: entry["nll_per_target"] for entry in found["lists"]["longest"]}
    assert losses == {said: pytest.approx(loss) for _, said, _, loss in CASES}
    few = mistakes(questions, evaluation, count=2)
    assert {kind: len(entries) for kind, entries in few["lists"].items()} == {
        "worst": 2, "longest": 2, "repetitive": 1, "truncated": 2,
    }  # fmt: skip
    assert few["counts"] == found["counts"]


def test_the_text() -> None:
    shown = mistake_lines(mistakes(*made_up(), count=1))
    assert "truncated (2 of 7)\n  Question 6?\n    said   one two" in shown
    assert "repetitive (1 of 7)\n  Question 4?" in shown
    assert "\n    said   b b b b b b b b … (cut)\n" in shown
    assert "\n    said   wrong, too\n" in shown


def test_evaluate_lists_them(tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": f"What is {i}?", "answer": "Yes."} for i in range(4)])
    words = ["evaluate", "--model", small_checkpoint, "--data", file, "--mistakes", 2, "--json", tmp_path / "x.json"]
    assert main([str(word) for word in words]) == 0
    written = json.loads((tmp_path / "x.json").read_text())["mistakes"]
    assert len(written["lists"]["worst"]) == 2
    assert written["n"] == 4
    assert "longest" in capsys.readouterr().out
    assert main([str(word) for word in [*words[:5], "--mistakes", -1]]) == 2
