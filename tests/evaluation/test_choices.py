"""The likeliest choice is what a plain loop over ids finds, summed or by bytes, whatever the batches.

Held here: sums against the logits of each text alone, id by id; both ways to compare them; every way in which a file
may name the right answer; and one line for a record that is no such question.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.cli import main
from minift.data.records import read_records
from minift.data.templates import TEMPLATES
from minift.errors import InputError
from minift.evaluation.choices import ChoiceQuestion, choice_scores, choose, read_choices
from minift.model import Llama
from minift.tokenizer.base import Tokenizer
from tests.helpers import plain_nll, small_model, write_jsonl

QUESTIONS = [
    ChoiceQuestion("Which gas do plants take in?", ("carbon dioxide", "helium", "neon and some other gases"), 0),
    ChoiceQuestion("2 + 2 =", ("4", "twenty-two"), 0),
    ChoiceQuestion("The capital of Mexico is", ("M\u00e9xico", "Lima", "Oslo", "Bern"), 0),
]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Llama:
    return small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, dtype=torch.float64)


@pytest.mark.parametrize("template", ["plain", "qa"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@torch.no_grad()
def test_a_choice_is_scored_as_by_a_plain_loop(
    model: Llama, tokenizer: Tokenizer, template: str, batch_size: int
) -> None:
    """Its ids after the question's, and no EOS."""
    found = choose(model, tokenizer, QUESTIONS, TEMPLATES[template], batch_size)
    start, between = ("", " ") if template == "plain" else ("### Question:\n", "\n")
    end = "" if template == "plain" else "\n\n### Answer:"
    for question, scores in zip(QUESTIONS, found, strict=True):
        prompt = tokenizer.encode(f"{start}{question.question}{end}")
        for choice, (total, size) in zip(question.choices, scores, strict=True):
            ids = prompt + tokenizer.encode_continuation(between + choice)
            assert total == pytest.approx(-plain_nll(model, ids, len(prompt)), rel=1e-11)
            assert size == len(choice.encode())


def test_sums_and_means() -> None:
    """A short wrong choice has the larger sum; by the byte the right one is likelier. Of equals the first is taken."""
    found = [[(-6.0, 30), (-5.0, 10), (-9.0, 30)], [(-1.0, 1), (-1.0, 2)], [(-2.0, 4), (-1.0, 4), (-3.0, 4), (-4.0, 4)]]
    scores = choice_scores(QUESTIONS, found)
    assert list(scores["accuracy"].parts) == [0.0, 1.0, 0.0]
    assert list(scores["accuracy_normalised"].parts) == [1.0, 0.0, 0.0]
    assert scores["accuracy"].value == pytest.approx(1 / 3)


TEXTS = ["one", "two", "three"]


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"choices": TEXTS, "answer": 1}, 1),
        ({"choices": TEXTS, "answer": "B"}, 1),
        ({"choices": TEXTS, "answer": "two"}, 1),
        ({"choices": TEXTS, "answerKey": "C"}, 2),
        ({"choices": {"text": TEXTS, "label": ["A", "B", "C"]}, "answerKey": "A"}, 0),
        ({"choices": {"text": TEXTS, "label": ["1", "2", "3"]}, "answerKey": "3"}, 2),
        ({"choices": {"text": ["B", "A"], "label": ["A", "B"]}, "answer": "A"}, 0),  # a label before a text
        ({"choices": ["2", "1"], "answer": 1}, 1),
    ],
)
def test_how_the_right_answer_is_named(tmp_path: Path, values: dict[str, Any], answer: int) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": "Which?", **values}])
    (question,) = read_choices(read_records(file))
    assert question.answer == answer
    assert question.where == f"{file}:1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": TEXTS}, "'answer' is None; it must be a place"),
        ({"choices": TEXTS, "answer": 3}, "'answer' is 3; it must be a place"),
        ({"choices": TEXTS, "answer": -1}, "'answer' is -1"),
        ({"choices": TEXTS, "answer": True}, "'answer' is True"),
        ({"choices": TEXTS, "answer": "D"}, "'answer' is 'D'"),
        ({"choices": ["same", "same"], "answer": "same"}, "'answer' is 'same'"),
        ({"choices": ["one"], "answer": 0}, "'choices' must be at least two texts"),
        ({"choices": ["one", ""], "answer": 0}, "'choices' must be at least two texts"),
        ({"choices": ["one", 2], "answer": 0}, "'choices' must be at least two texts"),
        ({"choices": "one two", "answer": 0}, "'choices' must be at least two texts"),
        ({"choices": {"text": TEXTS}, "answer": 0}, "'choices' must have a 'label' for each 'text'"),
        ({"choices": {"text": TEXTS, "label": ["A"]}, "answer": 0}, "'choices' must have a 'label' for each"),
        ({"choices": {"label": TEXTS}, "answer": 0}, "'choices' must be at least two texts"),
        ({"question": " ", "choices": TEXTS, "answer": 0}, "'question' is not a text, or blank"),
        ({"question": 7, "choices": TEXTS, "answer": 0}, "'question' is not a text, or blank"),
    ],
)
def test_what_is_no_question(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    good = {"question": "Which?", "choices": TEXTS, "answer": 0}
    file = write_jsonl(tmp_path / "x.jsonl", [good, {"question": "Which?", **values}])
    with pytest.raises(InputError) as caught:
        read_choices(read_records(file))
    assert str(caught.value).startswith(f"{file}:2: {message}")


def test_a_file_that_changes_its_mind(tmp_path: Path) -> None:
    good = {"question": "Which?", "choices": TEXTS, "answer": 0}
    file = write_jsonl(tmp_path / "x.jsonl", [good, {"question": "What?", "answer": "Yes."}])
    with pytest.raises(InputError, match=r"x.jsonl:2: no key 'choices'; its keys: question, answer"):
        read_choices(read_records(file))
    with pytest.raises(InputError, match="no multiple-choice question"):
        read_choices([])


def test_a_question_that_is_too_long(model: Llama, tokenizer: Tokenizer) -> None:
    long = ChoiceQuestion("word " * 200, ("a", "b"), 0, "x.jsonl:7")
    with pytest.raises(InputError, match=r"x.jsonl:7: takes \d+ positions; the model has 128"):
        choose(model, tokenizer, [long], TEMPLATES["plain"])
    words = "word " * 60
    longest = ChoiceQuestion(words, ("a", "b" * 40), 0, "x.jsonl:8")
    prompt, answer = (tokenizer.encode(words.rstrip()), tokenizer.encode_continuation(" " + "b" * 40))
    positions = len(prompt) + len(answer) - 1  # of its longest choice: the last id is only predicted
    for limit in (positions, positions + 1):
        fits = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=limit)
        assert len(choose(fits, tokenizer, [longest], TEMPLATES["plain"])[0]) == 2
    short = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=positions - 1)
    with pytest.raises(InputError, match=f"takes {positions} positions; the model has {positions - 1}"):
        choose(short, tokenizer, [longest], TEMPLATES["plain"])


def test_one_question_that_is_too_long_is_left_out_and_counted(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}
    long = {**record, "choices": ["4", "5 " * 600]}
    words = ["evaluate", "--model", str(small_checkpoint), "--json", str(tmp_path / "out.json"), "--data"]
    assert main([*words, str(write_jsonl(tmp_path / "some.jsonl", [record, long, record, long]))]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["n"], written["skipped"]) == (2, 2)
    assert "skipped                          2" in capsys.readouterr().out
    assert main([*words, str(write_jsonl(tmp_path / "none.jsonl", [long]))]) == 2
    assert "none.jsonl:1: takes" in capsys.readouterr().err


def test_evaluate_recognises_them(tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"question": one.question, "choices": list(one.choices), "answer": one.answer} for one in QUESTIONS]
    (tmp_path / "x.json").write_text(json.dumps(records))
    words = ["evaluate", "--model", small_checkpoint, "--data", tmp_path / "x.json", "--json", tmp_path / "out.json"]
    assert main([str(word) for word in words]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written) == {"accuracy", "accuracy_normalised", "n", "skipped", "intervals"}
    assert written["n"] == 3
    assert written["accuracy"] in [0, 1 / 3, 2 / 3, 1]
    assert "accuracy_normalised" in capsys.readouterr().out
