"""The promise of `prompts.py`: a record becomes exactly the text that its template says, and nothing is guessed.

Texts are written out here in full, independently of the module, so that a changed character in a template fails.
"""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from minift.data.conversations import FIELDS, Form, find_form, read_all_conversations, read_conversations
from minift.data.examples import encode_conversations
from minift.data.records import read_records
from minift.data.templates import TEMPLATES, carried_template, choose_template, template_named
from minift.errors import InputError
from minift.prompts import Pair
from minift.tokenizer.base import Tokenizer
from tests.helpers import texts_of, write_jsonl

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName a fruit.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName a fruit.\n\n### Input:\nIt is red.\n\n### Response:"
)
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA3_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
CARRIED = "### Question:\nName a fruit.\n\n### Answer:"


@pytest.mark.parametrize(("question", "answer"), FIELDS)
def test_fields_are_found_by_their_names(tmp_path: Path, question: str, answer: str) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"id": 7, answer: "Apple.", question: "Name a fruit."}])
    assert find_form(next(read_records(file))) == Form(question, answer)
    (pair,) = read_conversations(file)
    assert (pair.question, pair.answer, pair.context, pair.where) == ("Name a fruit.", "Apple.", "", f"{file}:1")


def test_the_known_fields_are_the_documented_ones() -> None:
    expected = "question answer, instruction response, instruction output, input output"
    more = "prompt completion, prompt response, question response"
    assert {" ".join(names) for names in FIELDS} == {*expected.split(", "), *more.split(", ")}


@pytest.mark.parametrize("answer", ["response", "output"])
@pytest.mark.parametrize("given", ["It is red.", "", None])
def test_alpacas_input_is_context(tmp_path: Path, answer: str, given: str | None) -> None:
    record = {"instruction": "Name a fruit.", "input": given, answer: "Apple."}
    (pair,) = read_conversations(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert (pair.question, pair.context, pair.answer) == ("Name a fruit.", given or "", "Apple.")


def test_white_space_of_data_stays(tmp_path: Path) -> None:
    """That of a code answer's first line is its indentation. Only a prompt does not end in white space."""
    record = {"instruction": "  Name a fruit. \n", "input": " It is red. \n", "output": "\n    Apple. \n"}
    (pair,) = read_conversations(write_jsonl(tmp_path / "x.jsonl", [record | {"system": " Be brief.\n"}]))
    assert (pair.question, pair.context, pair.answer) == (record["instruction"], record["input"], record["output"])
    prompt, answer = texts_of(TEMPLATES["plain"], pair)
    assert prompt == " Be brief.\n\n\n  Name a fruit. \n\n It is red."
    assert answer == " \n    Apple. \n"
    prompt, answer = texts_of(TEMPLATES["joined"], pair)
    assert prompt + answer == " Be brief.\n\n\n  Name a fruit. \n\n It is red. \n\n    Apple. \n"


@pytest.mark.parametrize(
    ("name", "context", "prompt", "answer"),
    [
        ("plain", "", "Name a fruit.", " Apple."),
        ("plain", "It is red.", "Name a fruit.\nIt is red.", " Apple."),
        ("qa", "", "### Question:\nName a fruit.\n\n### Answer:", "\nApple."),
        ("qa", "It is red.", "### Question:\nName a fruit.\nIt is red.\n\n### Answer:", "\nApple."),
        ("alpaca", "", ALPACA, "\nApple."),
        ("alpaca", "It is red.", ALPACA_WITH_INPUT, "\nApple."),
        ("llama2", "", "[INST] Name a fruit. [/INST]", " Apple."),
        ("llama2", "It is red.", "[INST] Name a fruit.\nIt is red. [/INST]", " Apple."),
        ("llama3", "", LLAMA3_USER + "Name a fruit." + LLAMA3_END, "\n\nApple."),
        ("llama3", "It is red.", LLAMA3_USER + "Name a fruit.\nIt is red." + LLAMA3_END, "\n\nApple."),
        ("carried", "", "Name a fruit.", "\nApple."),
    ],
)
def test_the_text_of_a_template_is_exact(name: str, context: str, prompt: str, answer: str) -> None:
    assert texts_of(TEMPLATES[name], Pair("Name a fruit.", "Apple.", context)) == (prompt, answer)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("plain", "Be brief.\n\nName a fruit."),
        ("qa", "Be brief.\n\n### Question:\nName a fruit.\n\n### Answer:"),
        ("alpaca", "Be brief.\n\n" + ALPACA),
        ("llama2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a fruit. [/INST]"),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            + LLAMA3_USER
            + "Name a fruit."
            + LLAMA3_END,
        ),
        ("carried", "Be brief.\n\nName a fruit."),
    ],
)
def test_a_system_prompt(tmp_path: Path, name: str, prompt: str) -> None:
    record = {"system": "Be brief.", "question": "Name a fruit.", "answer": "Apple."}
    (pair,) = read_conversations(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert texts_of(TEMPLATES[name], pair)[0] == prompt


LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "[INST] {{ system + messages[0]['content'] }} [/INST] {{ messages[1]['content'] }}"
)
LLAMA3_CHAT = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "{% if not loop.last %}<|eot_id|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(("name", "chat"), [("llama2", LLAMA2_CHAT), ("llama3", LLAMA3_CHAT)])
def test_chat_formats_are_those_of_the_published_templates(name: str, chat: str, system: str) -> None:
    """The models' own chat templates, which are Jinja, for one question (BOS and the end aside)."""
    jinja = pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Apple."}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    expected = jinja.Template(chat).render(messages=messages)
    assert "".join(texts_of(TEMPLATES[name], Pair("Name a fruit.", "Apple.", system=system))) == expected


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("Q: {question}\nA: {answer}\n", "Q: Name a fruit.\nA:", " Apple."),
        ("\ufeff{question}\n\n\t{answer}", "Name a fruit.", "\n\n\tApple."),
        ("<u>{question}</u>{answer}<end>", "<u>Name a fruit.</u>", "Apple.<end>"),
        ("{question}: {answer} \r\n\n", "Name a fruit.:", " Apple. "),
        ("{system}|{question}|{context}|{answer}", "|Name a fruit.||", "Apple."),
        ("{other} {question} {{}} {answer}", "{other} Name a fruit. {{}}", " Apple."),
    ],
)
def test_a_template_of_ones_own(tmp_path: Path, text: str, prompt: str, answer: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text, encoding="utf-8")
    pair = Pair("Name a fruit.", "Apple.")
    assert choose_template(str(file), [pair]) == str(file)
    assert texts_of(template_named(str(file)), pair) == (prompt, answer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question}", "a template must hold {answer} once; found 0"),
        ("{answer}", "a template must hold {question} once; found 0"),
        ("", "a template must hold {question} once; found 0"),
        ("{question}{answer}{answer}", "a template must hold {answer} once; found 2"),
        ("{context}{context}{question}{answer}", "a template must hold {context} at most once; found 2"),
        ("{answer} is the answer to {question}", "{answer} must come last"),
    ],
)
def test_a_template_without_its_fields(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{file}: {message}")):
        choose_template(str(file), [Pair("Name a fruit.", "Apple.")])
    with pytest.raises(InputError, match=r"none.txt: cannot be read"):
        template_named(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(("name", "pair"), [("context", Pair("Q", "A", "C")), ("system", Pair("Q", "A", system="S"))])
def test_nothing_of_a_pair_is_left_out(tmp_path: Path, name: str, pair: Pair) -> None:
    """A template that has no place for it is refused."""
    file = tmp_path / "mine.txt"
    file.write_text("{question} {answer}")
    with pytest.raises(InputError, match=f"has a {name}, and the template no {{{name}}} for it"):
        texts_of(template_named(str(file)), pair)


def test_a_text_is_learned_from_its_first_word_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = read_conversations(write_jsonl(tmp_path / "x.jsonl", [{"text": " A page. "}, {"text": "Another."}]))
    assert choose_template("auto", pairs) == choose_template("text", pairs) == "text"
    (example, _), _ = encode_conversations(pairs, template_named("text"), tokenizer, 100)
    assert example.prompt + example.answer == tokenizer.encode(" A page. ", bos=True, eos=True)  # as a page is
    assert example.prompt == [tokenizer.bos_id]
    (cut, _), _ = encode_conversations(pairs, template_named("text"), tokenizer, 2)
    assert cut.prompt + cut.answer == (example.prompt + example.answer)[:3]
    for name in ("qa", "plain"):
        with pytest.raises(InputError, match="asks nothing"):
            choose_template(name, pairs)
    with pytest.raises(InputError, match="has no question, as other pairs have"):
        choose_template("auto", [Pair("Name a fruit.", "Apple."), *pairs])
    with pytest.raises(InputError, match="which the template text would leave out"):
        choose_template("text", [Pair("Name a fruit.", "Apple.")])


@pytest.mark.parametrize("name", TEMPLATES)
def test_braces_stay_what_they_are(name: str) -> None:
    odd = "{answer} {question} {{x}} {context} {0} {} \\1 \\g<0> %s"
    prompt, answer = texts_of(TEMPLATES[name], Pair("Q " + odd, "A " + odd, "C " + odd))
    assert prompt.count("Q " + odd) == 1
    assert prompt.count("C " + odd) == 1
    assert answer.strip() == "A " + odd
    assert "A " + odd not in prompt


@pytest.mark.parametrize(("name", "tail", "context"), [*product(TEMPLATES, ["", " ", "\n", " \t\r\n "], ["", "red"])])
def test_a_prompt_never_ends_in_white_space(tmp_path: Path, name: str, tail: str, context: str) -> None:
    record = {"instruction": "Name a fruit." + tail, "input": context + tail if context else "", "output": "Apple."}
    (pair,) = read_conversations(write_jsonl(tmp_path / "x.jsonl", [record]))
    prompt, answer = texts_of(TEMPLATES[name], pair)
    assert prompt == prompt.rstrip()
    assert name == "joined" or answer[0] in " \n"  # the separator is the answer's
    assert answer.lstrip() == "Apple."


@pytest.mark.parametrize("marker", ["### Answer:", "### Response:"])
@pytest.mark.parametrize("tail", ["", "\n", " "])
def test_auto_keeps_a_template_that_the_questions_carry(tmp_path: Path, marker: str, tail: str) -> None:
    question = f"### Question:\nName a fruit.\n\n{marker}"
    records = [{"question": question + tail, "answer": "Apple."}] * 3
    pairs = read_conversations(write_jsonl(tmp_path / "x.jsonl", records))
    assert choose_template("auto", pairs) == "carried"
    assert texts_of(TEMPLATES["carried"], pairs[0]) == (question, "\nApple.")


def test_a_carried_template_gives_the_text_that_qa_makes() -> None:
    plain, carried = Pair("Name a fruit.", "Apple."), Pair(CARRIED, "Apple.")
    assert texts_of(TEMPLATES["carried"], carried) == texts_of(TEMPLATES["qa"], plain)


def test_auto_is_plain_where_no_template_is_carried() -> None:
    assert (
        choose_template("auto", [Pair("Name a fruit.", "Apple."), Pair("### Answer: is a marker", "Yes.")]) == "plain"
    )


@pytest.mark.parametrize("name", ["plain", "qa", "alpaca", "carried"])
def test_a_named_template_is_taken(name: str) -> None:
    assert choose_template(name, [Pair("Name a fruit.", "Apple.")]) == name


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_mixed_file_is_refused_and_the_odd_line_named(tmp_path: Path, odd: int) -> None:
    records = [{"question": "Name a fruit." if i == odd else CARRIED, "answer": "Apple."} for i in range(3)]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(InputError, match=rf"^{file}:{odd + 1}: "):
        choose_template("auto", read_conversations(file))


@pytest.mark.parametrize(
    ("name", "questions", "line"),
    [
        ("auto", [CARRIED, "1?", "2?"], 2),
        ("auto", ["1?", CARRIED, "2?"], 1),
        ("qa", ["1?", CARRIED, CARRIED], 2),
        ("auto", ["1?", "", ""], 2),
        ("auto", [CARRIED, "", "2?", ""], 2),
        ("qa", ["", ""], 1),
        ("text", ["1?", "2?"], 1),
    ],
)
def test_the_first_pair_that_does_not_fit_is_named(name: str, questions: list[str], line: int) -> None:
    pairs = [Pair(question, "Yes.", where=f"x.jsonl:{number}") for number, question in enumerate(questions, start=1)]
    with pytest.raises(InputError, match=rf"^x\.jsonl:{line}: "):
        choose_template(name, pairs)


@pytest.mark.parametrize("name", ["qa", "alpaca"])
def test_a_second_template_around_a_carried_one_is_refused(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": CARRIED, "answer": "Apple."}])
    with pytest.raises(InputError, match=rf"^{file}:1: .*--template {name}"):
        choose_template(name, read_conversations(file))


@pytest.mark.parametrize(
    ("question", "name"),
    [
        (CARRIED, "qa"),
        (ALPACA_WITH_INPUT, "alpaca"),
        ("What does ### Answer: mean?", ""),
        ("### Answer: ", "qa"),
        ("", ""),
    ],
)
def test_the_template_that_a_question_carries_is_known_by_its_end(question: str, name: str) -> None:
    assert carried_template(question) == name


def test_no_pairs_need_no_template() -> None:
    """Such is a file in which no record can be used; the error then says what is wrong with them."""
    assert choose_template("auto", []) == "plain"
    assert choose_template("text", []) == "text"


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown template 'vicuna'; known: auto, chat, plain, qa, alpaca"):
        choose_template("vicuna", [Pair("Name a fruit.", "Apple.")])


@pytest.mark.parametrize(
    ("record", "culprit"),
    [
        ({"ask": "a", "reply": "b"}, "question"),
        ({}, "question"),
        ({"question": "a"}, "answer"),
        ({"question": "a", "answer": None}, "answer"),
        ({"question": "a", "answer": 5}, "answer"),
        ({"question": "a", "answer": ["b"]}, "answer"),
        ({"question": " ", "answer": "b"}, "question"),
        ({"instruction": "a", "input": 5, "output": "b"}, "input"),
        ({"question": "a", "answer": "b", "metric": "bleu"}, "bleu"),
        ({"question": "a", "answer": "b", "metric": 5}, "metric"),
    ],
)
@pytest.mark.parametrize("line", [1, 3])
def test_a_bad_record_is_named(tmp_path: Path, record: dict[str, Any], culprit: str, line: int) -> None:
    good = {"instruction": "a", "output": "b"} if "instruction" in record else {"question": "a", "answer": "b"}
    file = write_jsonl(tmp_path / "x.jsonl", [good] * (line - 1) + [record])
    with pytest.raises(InputError) as error:
        read_conversations(file)
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert culprit in str(error.value).removeprefix(f"{file}:{line}: ")


def test_the_keys_of_a_record_without_usable_fields_are_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"ask": "a", "reply": "b"}])
    with pytest.raises(InputError, match=r"'ask', 'reply'.*known: question/answer, instruction/response"):
        read_conversations(file)


@pytest.mark.parametrize("blank", ["", "  \n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_with_nothing_to_answer_is_dropped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, blank: str, name: str
) -> None:
    """Files in the wild have such records (lamini_docs.jsonl one); they have no target, and end no run."""
    answers = ["Apple.", blank, "Pear.", blank]
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": "Name a fruit.", "answer": answer} for answer in answers])
    examples, dropped = encode_conversations(read_conversations(file), TEMPLATES[name], tokenizer, max_length=100)
    assert dropped == 2
    kept = [tokenizer.decode_continuation(example.answer).strip() for example in examples]
    assert kept == ["Apple.", "Pear."]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [b"", b" "])
    with pytest.raises(InputError, match=rf"^{file}: holds no records"):
        read_conversations(file)


def test_each_file_has_its_own_fields(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question": "1", "answer": "one", "metric": "exact_match"}])
    write_jsonl(tmp_path / "b.json.gz", [{"instruction": "2", "response": "two"}])
    pairs = read_all_conversations([tmp_path])
    assert [(pair.question, pair.answer, pair.metric) for pair in pairs] == [
        ("1", "one", "exact_match"),
        ("2", "two", ""),
    ]


def test_lamini_docs_carry_their_template(real_data: Path) -> None:
    file = real_data / "lamini_docs.jsonl"
    pairs = read_conversations(file)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert choose_template("auto", pairs) == "carried"
    assert len(pairs) == len(records) == 1400
    for pair, record in zip(pairs, records, strict=True):
        prompt, answer = texts_of(TEMPLATES["carried"], pair)
        assert prompt == record["question"].rstrip()
        assert prompt.endswith("### Answer:")
        assert answer == "\n" + record["answer"].strip()


@pytest.mark.parametrize(("name", "text"), [("plain", "Q \n A"), ("joined", "Q \nA")])
def test_rendered_data_keep_the_white_space_before_an_answer(name: str, text: str) -> None:
    """The template's own separator stays, too, whatever the question ends in; so does the end of a context."""
    template = template_named(name, rendered=True)
    assert "".join(texts_of(template, Pair("Q \n", "A"))) == text
    spaced = {"plain": "Q  A", "joined": "Q A"}[name]
    assert "".join(texts_of(template, Pair("Q ", "A"))) == spaced
    assert texts_of(template, Pair("Q", "A", context="C \n"))[0] == "Q\nC \n"
