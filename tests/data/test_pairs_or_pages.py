"""The promise of `is_conversation`: all commands agree whether a file holds pairs or pages, also about Alpaca's own.

Alpaca's file has the whole prompt and the answer under `text`, next to the parts of which it was made. The layouts are
written out here, and `data stats`, `evaluate` and `finetune` are run on each of them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.data.conversations import is_conversation, read_all_conversations
from minift.data.records import Record
from minift.data.survey import LOOKED_AT, survey
from minift.data.templates import TEMPLATES
from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from tests.helpers import texts_of, write_jsonl


def alpaca(number: int) -> dict[str, str]:
    """Return a record as in Alpaca's file; every other one has an input."""
    given = f"It is {number}." if number % 2 else ""
    instruction, output = f"Name the number {number}.", f"Number {number}."
    below = "Below is an instruction that describes a task"
    more = ", paired with an input that provides further context" if given else ""
    middle = f"### Input:\n{given}\n\n" if given else ""
    text = (
        f"{below}{more}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{middle}### Response:\n{output}"
    )
    return {"instruction": instruction, "input": given, "output": output, "text": text}


@pytest.fixture(params=["array", "lines", "lines.gz"])
def alpacas_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Write records in its own layout, one array, and as JSON Lines, as copies of it are."""
    records = [alpaca(number) for number in range(40)]
    if request.param == "array":
        file = tmp_path / "alpaca_data.json"
        file.write_text(json.dumps(records, indent=4), encoding="utf-8")
        return file
    return write_jsonl(tmp_path / request.param.replace("lines", "alpaca.jsonl"), records)


def test_alpacas_text_is_what_the_template_makes_of_the_parts(alpacas_file: Path) -> None:
    for number, pair in enumerate(read_all_conversations([alpacas_file])):
        assert "".join(texts_of(TEMPLATES["alpaca"], pair)) == alpaca(number)["text"]


def test_all_commands_take_alpacas_file_for_pairs(
    alpacas_file: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(alpacas_file), tmp_path / "stats.json"
    assert main(["data", "stats", file, "--template", "alpaca", "--json", str(out)]) == 0
    counted = json.loads(out.read_text(encoding="utf-8"))
    assert (counted["kind"], counted["pairs"], counted["malformed"]) == ("pairs", 40, 0)
    assert counted["characters"]["total"] == sum(len(alpaca(number)["text"]) for number in range(40))
    assert "### Response:" not in capsys.readouterr().out

    scores = tmp_path / "scores.json"
    model = ["--model", str(small_checkpoint), "--template", "alpaca"]
    assert main(["evaluate", *model, "--data", file, "--json", str(scores)]) == 0
    scored = json.loads(scores.read_text(encoding="utf-8"))
    assert scored["n"] + scored["skipped"] == 40
    assert "exact_match" in scored

    run = tmp_path / "run"
    flags = ["--steps", "1", "--test", file, "--out", str(run), "--max-length", "256"]
    assert main(["finetune", *model, "--data", file, *flags]) == 0
    compared = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    assert compared["template"] == "alpaca"
    questions = [sample["question"] for sample in compared["samples"]]
    assert questions[0].startswith("Name the number ")
    assert not any("### Response:" in question for question in questions)


@pytest.mark.parametrize(
    ("values", "text_field", "expected"),
    [
        ({"question": "a", "answer": "b"}, None, True),
        ({"instruction": "a", "response": "b"}, None, True),
        ({"instruction": "a", "output": "b"}, None, True),
        ({"input": "a", "output": "b"}, None, True),
        (alpaca(1), None, True),
        ({"text": "a", "question": "b", "answer": "c"}, None, True),
        ({"text": "a", "question": "b", "answer": "c"}, "text", False),
        ({"body": "a", "question": "b", "answer": "c"}, "body", False),
        ({"text": "a", "question": "b", "answer": "c"}, "body", True),
        ({"text": "a", "url": "b"}, None, False),
        ({"text": "a", "url": "b"}, "body", False),
        ({"body": "a"}, "body", False),
        ({"text": "a", "question": "b"}, None, False),
        ({"text": "a", "instruction": "b", "answer": "c"}, None, False),
    ],
)
def test_a_record_is_a_pair_or_a_page(values: dict[str, Any], text_field: str | None, expected: bool) -> None:
    assert is_conversation(Record(values, Path("x.jsonl"), 1), text_field) is expected


@pytest.mark.parametrize(("values", "text_field"), [({"body": "a"}, None), ({"body": "a"}, "page"), ({}, None)])
def test_a_record_that_is_neither_is_named(values: dict[str, Any], text_field: str | None) -> None:
    with pytest.raises(
        InputError,
        match=r"^x\.jsonl:7: no usable fields in .*; known: question/answer, .*, text; or name them: --fields QUESTION",
    ):
        is_conversation(Record(values, Path("x.jsonl"), 7), text_field)


def test_the_first_usable_record_decides_the_survey(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "x.jsonl"
    bad: list[Any] = [b"{oops", {"url": "neither"}] * 30
    pairs = [{"question": f"{number}?", "answer": "Yes."} for number in range(5)]
    result = survey([write_jsonl(file, [*bad, *pairs])], tokenizer)
    assert (result["kind"], result["pairs"], result["malformed"]) == ("pairs", 5, 60)
    pages = [{"text": "a page"}] * 5
    result = survey([write_jsonl(file, [*bad, *pages, *pairs])], tokenizer)
    assert (result["kind"], result["documents"], result["malformed"]) == ("documents", 5, 65)
    many = [b"{oops"] * LOOKED_AT
    result = survey([write_jsonl(file, [*many, *pages])], tokenizer)  # pages, if nothing says that they are pairs
    assert (result["kind"], result["documents"], result["malformed"]) == ("documents", 5, LOOKED_AT)
    with pytest.raises(InputError, match=r"x\.jsonl:1: "):
        survey([write_jsonl(file, bad)], tokenizer)


def test_a_text_field_that_is_given_makes_pages_of_pairs(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_jsonl(tmp_path / "alpaca.jsonl", [alpaca(number) for number in range(6)]))
    assert main(["data", "stats", file, "--text-field", "text"]) == 0
    assert capsys.readouterr().out.startswith("documents")
    words = ["evaluate", "--model", str(small_checkpoint), "--data", file, "--text-field", "text"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "bits_per_byte" in printed
    assert "exact_match" not in printed
