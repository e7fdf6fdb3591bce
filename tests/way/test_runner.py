"""The course's lines do what the commands do: `BasicModelRunner` gives the same prompts, weights and scores.

Held here: the README's own text, run in a fresh process; a call against `generate`; a training against
`jobs.finetune` on the same pairs, weight for weight; every way to load data; and one line for what is wrong.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import BasicModelRunner, bundled, load_model, save_model
from minift.config import FINETUNE, not_given
from minift.errors import InputError
from minift.generate import generate
from minift.model import Llama
from minift.pack import encode_prompt
from minift.runs import finetune as jobs
from minift.tokenizer.base import Tokenizer
from tests.helpers import ROOT

RECORDS = [{"question": f"What is number {i}?", "answer": f"Number {i} is {i * i}."} for i in range(12)]
QUICK: dict[str, Any] = {"steps": 3, "batch_size": 4, "max_length": 64}


@pytest.fixture
def runner(small_checkpoint: Path) -> BasicModelRunner:
    return BasicModelRunner(small_checkpoint)


def weights_equal(one: Llama, other: Llama) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_readmes_lines(tmp_path: Path) -> None:
    """In a process of its own, in a folder that holds pairs as the course's file has them."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
               if "BasicModelRunner" in block]  # fmt: skip
    pairs = [
        {"question": f"### Question:\nWhat is number {i}?\n\n### Answer:", "answer": f"It is {i}."} for i in range(40)
    ]
    (tmp_path / "lamini_docs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("question: ") == 3
    assert done.stdout.count("\ntrained: ") == done.stdout.count("\nbase: ") == 3
    assert load_model(tmp_path / "my_model").config == load_model(bundled("base")).config
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lamini_docs.jsonl", "my_model"]


def test_a_call_is_generate(runner: BasicModelRunner) -> None:
    """One text for a string, a list for a list; the options are handed on."""
    prompts = ["What is the capital of Mexico?", "Tell me"]
    ids = generate(runner.model, [runner.tokenizer.encode(prompt) for prompt in prompts], 9)
    expected = [runner.tokenizer.decode_continuation(answer).strip() for answer in ids]
    assert runner(prompts, max_tokens=9) == expected
    assert runner(prompts[0] + " \n", max_tokens=9) == expected[0]
    assert runner([]) == []
    random = [runner(prompts, max_tokens=9, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert random[0] == random[1] != random[2]
    assert runner(prompts, max_tokens=9, temperature=3.0, top_k=1) == expected
    assert runner(prompts, max_tokens=9, temperature=3.0, top_p=1e-6) == expected


def test_training_is_finetune(runner: BasicModelRunner, small_checkpoint: Path, tmp_path: Path) -> None:
    """On the same pairs: the same weights, and the comparison that is in the run's folder. The base stays as it was."""
    runner.load_data(RECORDS, input_key="question", output_key="answer")
    runner.train(out=tmp_path / "out", **QUICK)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    job = jobs.finetune_job(str(small_checkpoint), [str(file)])
    expected = jobs.finetune(job, FINETUNE.replace(**QUICK), tmp_path / "run", choose=not_given(QUICK))
    assert expected is not None
    assert weights_equal(runner.model, load_model(tmp_path / "run" / "final"))
    assert not weights_equal(runner.model, load_model(small_checkpoint))
    assert (tmp_path / "out" / "run" / "compare.json").read_text() == (tmp_path / "run" / "compare.json").read_text()

    results = runner.evaluate()
    assert (results["before"], results["after"]) == (expected["before"], expected["after"])
    (sample,) = expected["samples"]
    assert results["eval_results"] == [
        {
            "input": sample["question"],
            "outputs": [
                {"model_name": f"{small_checkpoint}, finetuned", "output": sample["after"]},
                {"model_name": str(small_checkpoint), "output": sample["before"]},
            ],
            "answer": sample["answer"],
        }
    ]
    runner.save(tmp_path / "saved")
    assert weights_equal(BasicModelRunner(tmp_path / "saved").model, runner.model)


def test_plain_runs_the_pages_as_they_are_read(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of `kernels/` is asked for a decoder; training and the comparison are plain, too."""
    fast, plain = (BasicModelRunner(small_checkpoint, device="cpu", plain=plain) for plain in (False, True))
    expected = fast("Tell me", max_tokens=9)

    def no_decoder(*given: Any) -> None:
        raise AssertionError("a fast decoder was asked for")

    monkeypatch.setattr("minift.kernels.fast_decoder", no_decoder)
    assert plain("Tell me", max_tokens=9) == expected
    asked: dict[str, Any] = {}
    finetune = jobs.finetune

    def spy(*given: Any, **options: Any) -> Any:
        asked.update(options, device=given[1].device)
        return finetune(*given, **options)

    monkeypatch.setattr(jobs, "finetune", spy)
    plain.load_data(RECORDS, "question", "answer")
    plain.train(**QUICK)
    assert asked == {"plain": True, "device": "cpu", "choose": not_given(QUICK)}
    assert len(plain.evaluate()["eval_results"]) == 1


def test_its_repr_says_what_it_is(runner: BasicModelRunner, small_checkpoint: Path) -> None:
    count = sum(parameter.numel() for parameter in runner.model.parameters())
    start = f"<BasicModelRunner {str(small_checkpoint)!r}: {count:,} parameters on {runner.model.device}"
    assert repr(runner) == f"{start}, 0 pairs, not trained>"
    runner.load_data(RECORDS[:1], "question", "answer")
    assert repr(runner) == f"{start}, 1 pair, not trained>"
    runner.load_data(RECORDS, "question", "answer")
    runner.train(**QUICK)
    assert repr(runner) == f"{start}, 13 pairs, trained>"


def test_a_second_training_begins_with_the_base(runner: BasicModelRunner) -> None:
    runner.load_data(RECORDS, "question", "answer")
    runner.train(**QUICK)
    once = runner.model
    runner.train(**QUICK)
    assert weights_equal(runner.model, once)
    runner.train(limit=5, **QUICK)
    assert len(runner.evaluate()["eval_results"]) == 1
    assert not weights_equal(runner.model, once)


class Frame:
    """What `load_data_from_dataframe` needs of a pandas DataFrame."""

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        assert orient == "records"
        return RECORDS


def test_every_way_to_load_data(runner: BasicModelRunner, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["answer", "question"], *([r["answer"], r["question"]] for r in RECORDS)])
    loads: list[Any] = [
        lambda: runner.load_data(iter(RECORDS), "question", "answer"),
        lambda: runner.load_data_from_jsonlines(tmp_path / "a.jsonl", input_key="question", output_key="answer"),
        lambda: runner.load_data_from_jsonlines(str(tmp_path / "b.json"), "question", "answer"),
        lambda: runner.load_data_from_csv(tmp_path / "c.csv", input_key="question", output_key="answer"),
        lambda: runner.load_data_from_dataframe(Frame(), input_key="question", output_key="answer"),
    ]
    found = []
    for load in loads:
        runner.clear_data()
        load()
        found.append([(pair.question, pair.answer) for pair in runner._pairs])
    assert found == [[(record["question"], record["answer"]) for record in RECORDS]] * len(loads)
    runner.load_data([{"input": "Q", "output": "A"}])  # the keys by default; and data is added to data
    assert len(runner._pairs) == len(RECORDS) + 1


def test_a_dataframe_of_pandas(runner: BasicModelRunner) -> None:
    pandas = pytest.importorskip("pandas")
    runner.load_data_from_dataframe(pandas.DataFrame(RECORDS), input_key="question", output_key="answer")
    assert [pair.answer for pair in runner._pairs] == [record["answer"] for record in RECORDS]


QUESTION = "What is number 1?"
CARRIED = f"### Question:\n{QUESTION}\n\n### Answer:"


@pytest.mark.parametrize(
    ("options", "prompt", "asked"),
    [
        ({}, QUESTION, QUESTION),
        ({}, QUESTION + "\n", QUESTION),
        ({"prompt_template": "qa"}, QUESTION, CARRIED),
        ({"prompt_template": "qa"}, CARRIED, CARRIED),
        ({"prompt_template": "User: {input}\nModel: "}, QUESTION, f"User: {QUESTION}\nModel:"),
        ({"system_prompt": "Be brief."}, QUESTION, f"Be brief.\n\n{QUESTION}"),
        ({"system_prompt": "Be brief.", "prompt_template": "llama2"}, QUESTION,
         f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{QUESTION} [/INST]"),
    ],
)  # fmt: skip
def test_the_template_around_a_question(
    small_checkpoint: Path, options: dict[str, str], prompt: str, asked: str
) -> None:
    assert [span.text for span in BasicModelRunner(small_checkpoint, **options)._prompt(prompt)] == [asked]


@pytest.mark.parametrize(
    ("options", "question", "asked"),
    [
        ({}, QUESTION, QUESTION),
        ({}, CARRIED, CARRIED),
        ({"prompt_template": "alpaca"}, QUESTION, None),
        ({"prompt_template": "User: {input}\nModel:"}, QUESTION, f"User: {QUESTION}\nModel:"),
        ({"system_prompt": "Be brief."}, QUESTION, f"Be brief.\n\n{QUESTION}"),
    ],
)
def test_once_trained_it_is_asked_as_in_training(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], question: str, asked: str | None
) -> None:
    """A call's prompt is, to the id, one that the training has seen, whether or not the question has markers on it."""
    runner = BasicModelRunner(small_checkpoint, **options)
    runner.load_data([{"input": question.replace("1", str(i)), "output": "A."} for i in range(6)])
    trained: list[list[int]] = []
    encode = jobs.encode_conversations

    def spy(*arguments: Any) -> Any:
        examples, dropped = encode(*arguments)
        trained.extend(example.prompt for example in examples)
        return examples, dropped

    monkeypatch.setattr(jobs, "encode_conversations", spy)
    runner.train(**{**QUICK, "max_length": 128})
    assert len(trained) == 6
    assert encode_prompt(runner._prompt(QUESTION), runner.tokenizer) in trained
    assert encode_prompt(runner._prompt(question), runner.tokenizer) in trained
    if asked is not None:
        assert [span.text for span in runner._prompt(question)] == [asked]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"q": "Q", "a": "A"}], r"record 1: no key 'input'; its keys: 'q', 'a' \(see input_key and output_key\)"),
        ([{"input": "Q", "output": "A"}, {"input": "Q"}], r"record 2: no key 'output'; its keys: 'input'"),
        ([{"input": "Q", "output": " \n"}], "record 1: 'output' is empty"),
        ([{"input": "", "output": "A"}], "record 1: 'input' is empty"),
        ([{"input": "Q", "output": 7}], "record 1: 'output' is int, not a text"),
        ([{}], "record 1: no key 'input'; its keys: none"),
    ],
)
def test_wrong_data(runner: BasicModelRunner, data: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.load_data(data)
    assert runner._pairs == []


def test_a_few_records_that_cannot_be_used_are_skipped(
    runner: BasicModelRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The course's own file has a question without an answer. Up to 1 %, each named; more are refused."""
    good, empty, broken = '{"question": "Q", "answer": "A"}\n', '{"question": "Q", "answer": ""}\n', "{\n"
    file = tmp_path / "x.jsonl"
    file.write_text(good * 300 + empty + broken)
    runner.load_data_from_jsonlines(file, "question", "answer")
    assert len(runner._pairs) == 300
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"skipped: {file}:301: 'answer' is empty"
    assert lines[1].startswith(f"skipped: {file}:302: not valid JSON")
    file.write_text(good + empty)
    with pytest.raises(InputError, match=r"x.jsonl:2: 'answer' is empty \(1 of 2 records cannot be used"):
        runner.load_data_from_jsonlines(file, "question", "answer")
    assert len(runner._pairs) == 300


@pytest.mark.slow
def test_the_courses_own_file(runner: BasicModelRunner) -> None:
    """All 1,400 records are looked at; the template that they carry is kept."""
    folder = os.environ.get("MINIFT_REAL_DATA")
    if not folder:
        pytest.skip("MINIFT_REAL_DATA is not set: no real inputs to try")
    runner.load_data_from_jsonlines(Path(folder) / "lamini_docs.jsonl", input_key="question", output_key="answer")
    assert 1_390 <= len(runner._pairs) < 1_400
    runner.train(limit=40, is_public=True, **{**QUICK, "max_length": 256})
    (first, *_) = runner.evaluate()["eval_results"]
    assert first["input"].endswith("### Answer:")
    assert (
        "".join(span.text for span in runner._prompt("What is Lamini?"))
        == "### Question:\nWhat is Lamini?\n\n### Answer:"
    )


def test_a_wrong_file_is_named(runner: BasicModelRunner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.csv: cannot be read"):
        runner.load_data_from_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-4}, "train has no option 'learning_rate'; known: limit, out, steps"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1}, "1 pairs to train on; load at least 2"),
        ({"template": "vicuna"}, "unknown template 'vicuna'"),
        ({"max_length": 10_000}, "max_length 10000 is more than the model's 512 positions"),
    ],
)
def test_wrong_options(runner: BasicModelRunner, options: dict[str, Any], message: str) -> None:
    runner.load_data(RECORDS, "question", "answer")
    with pytest.raises(InputError, match=message):
        runner.train(**options)


def test_wrong_use(runner: BasicModelRunner, small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 pairs to train on"):
        runner.train()
    with pytest.raises(InputError, match="call train first"):
        runner.evaluate()
    with pytest.raises(InputError, match="exists; choose another"):
        runner.save(tmp_path)
    with pytest.raises(InputError, match="unknown template"):
        BasicModelRunner(small_checkpoint, prompt_template="vicuna")
    with pytest.raises(InputError, match="hf download meta-llama/Llama-2-7b-hf"):
        BasicModelRunner("meta-llama/Llama-2-7b-hf")
    with pytest.raises(InputError, match="seed is -1"):
        runner("Q", seed=-1)
    runner.load_data(RECORDS, "question", "answer")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        runner.train(out=tmp_path / "taken")


@pytest.mark.parametrize("shape", ["TinyLlama", "SmolLM2"])
def test_a_folder_of_another_program_goes_through_the_same_lines(
    tmp_path: Path, tokenizer: Tokenizer, shape: str
) -> None:
    """Shared heads of one width, tied or not, in a Hugging Face folder as `transformers` writes it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6 if shape == "SmolLM2" else 8,
        num_key_value_heads=2,
        head_dim=8 if shape == "SmolLM2" else 6,
        max_position_embeddings=256,
        tie_word_embeddings=shape == "SmolLM2",
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes((bundled("base") / "tokenizer.model").read_bytes())
    model = BasicModelRunner(tmp_path / "theirs")
    before = model("What is number 1?", max_tokens=5)
    model.load_data(RECORDS, input_key="question", output_key="answer")
    model.train(**QUICK)
    assert isinstance(before, str)
    assert len(model(["What is number 1?", "And 2?"], max_tokens=5)) == 2
    assert len(model.evaluate()["eval_results"]) == 1
    model.save(tmp_path / "mine")
    save_model(tmp_path / "theirs again", model.model, model.tokenizer, format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs again", dtype=torch.float32)
    ids = torch.tensor([model.tokenizer.encode("What is number 1?")])
    torch.testing.assert_close(theirs(ids).logits, model.model(ids), rtol=1e-4, atol=1e-4)
