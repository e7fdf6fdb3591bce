"""The promise of `data stats` and `data format`: numbers that can be counted again, and files that train the same way.

Lengths are taken once more with SentencePiece itself, and medians, percentiles and classes with plain Python on all of
them. A file that `data format` writes is read as finetuning reads it, and must give the very ids of the original.
"""

import json
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minift.cli import main
from minift.data.conversations import read_all_conversations
from minift.data.examples import encode_conversations
from minift.data.records import find_files
from minift.data.stream import DocumentStream
from minift.data.survey import Lengths, survey, survey_text
from minift.data.templates import TEMPLATES, choose_template
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from tests.helpers import texts_of, write_jsonl


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(bundled("base") / "tokenizer.model"))


def by_hand(lengths: Sequence[int]) -> dict[str, float]:
    """Return a summary of all the lengths at once: of percentiles, the smallest length that so many do not exceed."""
    ordered = sorted(lengths)
    return {
        "total": sum(ordered),
        "min": ordered[0],
        "median": statistics.median_low(ordered),
        "mean": pytest.approx(statistics.fmean(ordered), rel=1e-12),
        "p90": ordered[-(-90 * len(ordered) // 100) - 1],
        "p99": ordered[-(-99 * len(ordered) // 100) - 1],
        "max": ordered[-1],
    }


def check_histogram(histogram: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> None:
    assert sum(count for _, _, count in histogram) == len(lengths)
    for least, most, count in histogram:
        assert count == sum(least <= length <= most for length in lengths)
        assert (least, most) == (0, 0) or (least.bit_count() == 1 and most == 2 * least - 1)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(histogram))
    assert histogram[0][2] > 0
    assert histogram[-1][2] > 0


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 99, 100, 101, 199, 200, 1000, 1001])
def test_lengths_are_summed_up_exactly(n: int) -> None:
    rng = random.Random(n)
    for top in (0, 1, 7, 10**6):
        lengths = [rng.randint(0, top) for _ in range(n)]
        table = Lengths()
        for length in lengths:
            table.add(length)
        assert table.summary() == by_hand(lengths)
        check_histogram(table.histogram(), lengths)


def some_pages(count: int) -> list[dict[str, str]]:
    rng = random.Random(count)
    words = ["the", "Mexico", "\u00e9t\u00e9", "\u4e2d\u6587", "12345", "<s>", "\U0001f642", "a\nb", "  "]
    return [{"text": "x" + " ".join(rng.choices(words, k=rng.randrange(60)))} for _ in range(count)]


def test_the_numbers_of_pages(
    tmp_path: Path,
    tokenizer: Tokenizer,
    pieces: sentencepiece.SentencePieceProcessor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = some_pages(230)
    write_jsonl(tmp_path / "a.jsonl.gz", [*pages[:100], b"{oops", b"", {"url": "x"}])
    write_jsonl(tmp_path / "b.jsonl.zst", [b"\xff", {"text": " "}, *pages[100:]])
    result = survey(find_files([tmp_path]), tokenizer)
    texts = [page["text"] for page in pages]
    tokens = [2 + len(pieces.encode(text)) for text in texts]
    assert (result["kind"], result["documents"], result["malformed"]) == ("documents", 230, 4)
    places = ["a.jsonl.gz:101", "a.jsonl.gz:103", "b.jsonl.zst:1", "b.jsonl.zst:2"]
    assert [fault.split(": ")[0] for fault in result["first_malformed"]] == [f"{tmp_path}/{place}" for place in places]
    assert result["characters"] == by_hand([len(text) for text in texts])
    assert result["tokens"] == by_hand(tokens)
    check_histogram(result["histogram"], tokens)
    assert "template" not in result

    out = tmp_path / "stats.json"
    assert main(["data", "stats", str(tmp_path), "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert rows["documents"] == ["documents", "230"]
    assert rows["malformed"] == ["malformed", "4"]
    for name in ("characters", "tokens"):
        row = [float(cell.replace(",", "")) for cell in rows[name][1:]]
        assert row == pytest.approx(list(result[name].values()), abs=0.05)
    assert f"{sum(map(len, texts)) / sum(tokens):.2f}" in rows["characters a token"][-1]
    bars = printed[printed.index("documents by tokens") :].splitlines()[1:]
    assert [int(line.split()[3].replace(",", "")) for line in bars] == [row[2] for row in result["histogram"]]
    assert max(line.count("#") for line in bars) == 40
    for line, row in zip(bars, result["histogram"], strict=True):
        assert bool(line.count("#")) == bool(row[2])


def test_the_text_field_of_pages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "content": "four"}, {"content": "fives"}, {"text": "a"}])
    result = survey([file], tokenizer, text_field="content")
    assert (result["documents"], result["malformed"], result["characters"]["total"]) == (2, 1, 9)


def some_pairs(count: int, context: bool) -> list[dict[str, str]]:
    """Return pairs under Alpaca's names, with and without an input, and with text that looks like a template's."""
    rng = random.Random(count)
    pairs = [
        {
            "instruction": rng.choice(["", "Please say: "]) + f"What is {i}\u00b2{{answer}}? " + "x" * rng.randrange(9),
            "input": f"{{question}}\nThe number {i}.\n" if context and i % 2 else "",
            "output": f"It is {i * i}. " * rng.randrange(1, 4),
        }
        for i in range(count)
    ]
    pairs[1]["output"] = ""  # without an answer
    pairs[2]["instruction"] += " \n"
    pairs[3]["output"] = "\n  ### Response:\n\u00e9\U0001f642 <s>"
    return pairs


@pytest.mark.parametrize("template", ["auto", "plain", "qa", "alpaca"])
def test_the_numbers_of_pairs(
    tmp_path: Path, tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor, template: str
) -> None:
    """The texts of the templates are written down here once more."""
    pairs = some_pairs(101, context=True)
    file = write_jsonl(tmp_path / "x.jsonl", [b"{oops", *pairs, {"instruction": "no output"}])
    below = "Below is an instruction that describes a task"
    finish = "Write a response that appropriately completes the request."
    prompts, answers = [], []
    for pair in pairs:
        question, context, answer = pair["instruction"], pair["input"], pair["output"]
        both = f"{question}\n{context}" if context else question
        prompt = {"qa": f"### Question:\n{both}\n\n### Answer:", "alpaca": ""}.get(template, both.rstrip())
        if template == "alpaca":
            middle = f"\n\n### Input:\n{context}" if context else ""
            more = ", paired with an input that provides further context" if context else ""
            prompt = f"{below}{more}. {finish}\n\n### Instruction:\n{question}{middle}\n\n### Response:"
        prompts.append(prompt)
        answers.append((" " if template in ("auto", "plain") else "\n") + answer)
    newline = len(pieces.encode("\n"))
    of_prompts = [1 + len(pieces.encode(prompt)) for prompt in prompts]
    of_answers = [len(pieces.encode("\n" + answer)) - newline + 1 for answer in answers]
    both = [a + b for a, b in zip(of_prompts, of_answers, strict=True)]

    result = survey([file], tokenizer, template=template)
    assert (result["kind"], result["pairs"], result["malformed"]) == ("pairs", 101, 2)
    assert [fault.split(": ")[0] for fault in result["first_malformed"]] == [f"{file}:1", f"{file}:103"]
    assert result["template"] == ("plain" if template == "auto" else template)
    assert result["characters"] == by_hand([len(a + b) for a, b in zip(prompts, answers, strict=True)])
    assert result["prompt_tokens"] == by_hand(of_prompts)
    assert result["answer_tokens"] == by_hand(of_answers)
    assert result["tokens"] == by_hand(both)
    check_histogram(result["histogram"], both)


def test_the_bundled_data(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    file = bundled("pairs.jsonl")
    assert main(["data", "stats", str(file)]) == 0
    count = len(file.read_text(encoding="utf-8").splitlines())
    assert capsys.readouterr().out.splitlines()[0].split() == ["pairs", f"{count:,}"]


def test_pages_that_look_like_pairs_are_pages_if_their_field_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"text": "a page", "question": "what?", "answer": "this"}
    assert survey([write_jsonl(tmp_path / "x.jsonl", [record])], tokenizer, text_field="text")["kind"] == "documents"
    assert survey([tmp_path / "x.jsonl"], tokenizer, text_field="body")["kind"] == "pairs"
    assert survey([tmp_path / "x.jsonl"], tokenizer)["kind"] == "pairs"


def test_an_unknown_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_jsonl(tmp_path / "x.jsonl", some_pairs(5, context=False)))
    for command in ("stats", "format"):
        assert main(["data", command, file, "--template", "vicuna"]) == 2
        assert "unknown template 'vicuna'" in capsys.readouterr().err


# data format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("template", ["plain", "qa", "alpaca"])
def test_a_formatted_file_trains_the_same_way(
    tmp_path: Path, tokenizer: Tokenizer, template: str, context: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_jsonl(tmp_path / "x.jsonl", some_pairs(40, context)), tmp_path / "out.jsonl"
    assert main(["data", "format", str(file), "--template", template, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"saved: {out} (40 pairs in the template {template})\n"
    before, after = read_all_conversations([file]), read_all_conversations([out])
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == [
        {"question": texts_of(TEMPLATES[template], pair)[0], "answer": pair.answer} for pair in before
    ]  # whatever reads it next, an answer begins with no separator
    name = choose_template("auto", after)
    assert name == ("plain" if template == "plain" else "carried")
    examples, dropped = encode_conversations(before, TEMPLATES[template], tokenizer, 512)
    assert dropped == 1  # the one without an answer
    assert encode_conversations(after, TEMPLATES[name], tokenizer, 512) == (examples, dropped)
    middle = statistics.median_low(map(len, examples))  # at which about a half of them are cut off
    cut = encode_conversations(before, TEMPLATES[template], tokenizer, middle)
    assert cut[0] != examples
    assert encode_conversations(after, TEMPLATES[name], tokenizer, middle) == cut
    assert any(before[i].context for i in range(40)) == context


@pytest.mark.parametrize("template", ["plain", "qa", "alpaca"])
def test_a_file_formatted_as_text_holds_what_the_model_would_read(
    tmp_path: Path, tokenizer: Tokenizer, template: str
) -> None:
    file, out = write_jsonl(tmp_path / "x.jsonl", some_pairs(20, context=True)), tmp_path / "out.jsonl"
    assert main(["data", "format", str(file), "--template", template, "--out", str(out), "--as-text"]) == 0
    assert all(json.loads(line).keys() == {"text"} for line in out.read_text(encoding="utf-8").splitlines())
    pairs = read_all_conversations([file])
    texts = list(DocumentStream([out], epochs=1))
    assert texts == ["".join(texts_of(TEMPLATES[template], pair)) for pair in pairs]
    examples, _ = encode_conversations(pairs, TEMPLATES[template], tokenizer, 512)
    answered = [text for text, pair in zip(texts, pairs, strict=True) if pair.answer]
    for text, example in zip(answered, examples, strict=True):
        assert tokenizer.decode(example.prompt + example.answer) == text


def test_pairs_that_carry_a_template_keep_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    carried = [{"question": f"### Question:\n{i}?\n\n### Answer:", "answer": f"{i}."} for i in range(5)]
    file, out = write_jsonl(tmp_path / "x.jsonl", carried), tmp_path / "out.jsonl"
    assert main(["data", "format", str(file), "--template", "auto", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == carried


def test_an_out_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_jsonl(tmp_path / "x.jsonl", some_pairs(5, context=False)), tmp_path / "out.jsonl"
    out.write_text("years of work")
    for taken in (out, file):
        before = taken.read_bytes()
        assert main(["data", "format", str(file), "--template", "qa", "--out", str(taken)]) == 2
        assert capsys.readouterr().err == f"minift: error: {taken}: exists; choose another --out\n"
        assert taken.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--out", "{}/out.jsonl", "--as-text"], "--template"),
        (["--out", "{}/x.jsonl/out.jsonl", "--template", "qa"], "cannot be written"),
        (["-n", "0"], "-n"),
        (["--template", "alpaca", "{}/carried.jsonl"], "already carries a template"),
        (["--template", "alpaca", "{}/carried.jsonl", "--out", "{}/out.jsonl"], "already carries a template"),
    ],
)
def test_what_cannot_be_formatted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], culprit: str
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", some_pairs(5, context=False))
    write_jsonl(tmp_path / "carried.jsonl", [{"question": "Why?\n### Answer:", "answer": "So."}])
    sources = [] if any("carried" in word for word in words) else [str(file)]
    words = [word.format(tmp_path) for word in words]
    if not sources:  # the files come first
        words = [words[2], *words[:2], *words[3:]]
    assert main(["data", "format", *sources, *words]) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert culprit in stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_pairs_are_shown_in_each_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Any] = [{"question": "Why?", "answer": "So."}, {"question": "How?", "answer": "Thus."}]
    file = write_jsonl(tmp_path / "x.jsonl", [*records, {"question": "Q\n### Answer:", "answer": "A"}])
    assert main(["data", "format", str(file)]) == 0
    blocks = capsys.readouterr().out.split("--- ")[1:]
    assert [block.split(",")[0] for block in blocks] == [f"{file}:1"] * 5
    assert [block.split(", ")[1].split(":")[0] for block in blocks] == ["plain", "qa", "alpaca", "llama2", "llama3"]
    assert blocks[0].endswith("\nWhy?[ So.]\n")
    assert blocks[1].endswith("\n### Question:\nWhy?\n\n### Answer:[\nSo.]\n")
    assert main(["data", "format", str(file), "-n", "3", "--template", "auto"]) == 0
    blocks = capsys.readouterr().out.split("--- ")[1:]
    assert [block.split(":")[1].split(",")[1].strip() for block in blocks] == ["plain", "plain", "carried"]


def test_a_reason_that_many_records_share_is_said_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Whatever numbers are in it; another reason, which comes after many of those, is not lost."""
    for i in range(7):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": "A page."}, {"url": "x"}, {"url": i}, *[b"{oops"] * (i == 6)])
    result = survey(find_files([tmp_path]), tokenizer)
    assert result["malformed"] == 15
    first, second = result["first_malformed"]
    assert first.startswith(f"{tmp_path / '0.jsonl'}:2: ")
    assert first.endswith(" (and 13 more)")
    assert second.startswith(f"{tmp_path / '6.jsonl'}:4: ")
    assert not second.endswith("more)")
    assert f"\n  {first}\n  {second}\n" in survey_text(result)
