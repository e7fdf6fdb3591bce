"""The promise of `data audit`: every fault that is put into a data set is named at its line, and nothing else is.

Each data set here is clean but for one fault. Numbers are counted once more, with the tokenizer alone.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.config import FINETUNE
from minift.data import audit as auditing
from minift.data import examine
from minift.data.audit import Audit, audit
from minift.data.conversations import read_all_conversations
from minift.data.duplicates import Fingerprinter, contradictions, near_pairs
from minift.data.encodings import mojibake
from minift.data.examine import finding_lines
from minift.data.records import find_files
from minift.data.split import held_out_places
from minift.data.templates import TEMPLATES, Representatives, choose_template, template_named, unknown_markers
from minift.errors import InputError
from minift.prompts import Chat, Conversation, Pair, Span, TextTemplate, Turn
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import instruct_model

Records = list[dict[str, Any]]

# Clean data -----------------------------------------------------------------------------------------------------------

ANSWERS = [json.loads(line)["answer"] for line in bundled("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
WORDS = sorted({word for answer in ANSWERS for word in re.findall(r"\b[a-z]{4,6}\b", answer)})[::5]


def sentence(rng: random.Random, least: int = 3, most: int = 7) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most))).capitalize()


def pairs(count: int = 60, seed: int = 0) -> Records:
    rng = random.Random(seed)
    return [{"question": f"{sentence(rng)}?", "answer": f"{sentence(rng)}."} for _ in range(count)]


def dolly(count: int = 60) -> Records:
    rng = random.Random(1)
    passage = ". ".join(sentence(rng) for _ in range(12))  # several records ask about it
    return [
        {
            "instruction": f"{sentence(rng)}?",
            "context": passage if place % 4 == 0 else "",
            "response": f"{sentence(rng, 5, 20)}.",
            "category": rng.choice(["open_qa", "summarization"]),
        }
        for place in range(count)
    ]


def sharegpt(count: int = 40) -> Records:
    rng = random.Random(2)
    return [
        {
            "id": f"chat_{place}",
            "conversations": [
                {"from": ("human", "gpt")[turn % 2], "value": f"{sentence(rng)}{'?.'[turn % 2]}"}
                for turn in range(2 * rng.randint(1, 3))
            ],
        }
        for place in range(count)
    ]


def openai(count: int = 40) -> Records:
    """All with one long text of the system, and texts that are not English."""
    rng = random.Random(3)
    system = {"role": "system", "content": ". ".join(sentence(rng) for _ in range(15))}
    foreign = [
        "« Où êtes-vous ? À côté. »",
        "„Größe“ ÄÖÜ",
        "Это «пример» №5",
        "Việt Nam đã được ĐÃ”",
        "NÃO, SÃO»",
        "日本語",
    ]
    return [
        {
            "messages": [
                system,
                {"role": "user", "content": f"{sentence(rng)} {foreign[place % len(foreign)]}"},
                {"role": "assistant", "content": f"{sentence(rng)} {foreign[place % len(foreign)]}"},
            ]
        }
        for place in range(count)
    ]


def write(file: Path, records: Records | list[str]) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def look(file: Path, tokenizer: Tokenizer, test: Path | None = None, **settings: Any) -> Audit:
    config = FINETUNE.replace(**settings)
    return audit([file], tokenizer, config, test=[test] if test else [], samples=3)


@pytest.mark.parametrize("records", [pairs, dolly, sharegpt, openai])
def test_clean_data_have_no_finding(tmp_path: Path, tokenizer: Tokenizer, records: Callable[[], Records]) -> None:
    found = look(write(tmp_path / "clean.jsonl", records()), tokenizer, max_length=1024)
    assert [(one.name, one.where, one.detail) for one in found.findings] == []


def test_the_bundled_pairs_have_no_finding(tokenizer: Tokenizer) -> None:
    found = look(bundled("pairs.jsonl"), tokenizer, bundled("test.jsonl"))
    assert found.findings == []
    assert (found.counts["records"], found.counts["held-out records"]) == (1_108, 278)


def test_a_chat_template_is_audited_as_it_trains(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(instruct_model(tmp_path / "model"))
    for name, records in (("a", sharegpt()), ("b", openai())):
        found = look(write(tmp_path / f"{name}.jsonl", records), tokenizer, max_length=4096)
        assert found.template == "chat"
        assert found.findings == []


def test_real_data_have_their_own_faults_and_no_others(real_data: Path, tokenizer: Tokenizer) -> None:
    """One blank answer. What is worth knowing was read: the same questions, but for capitals, with other answers."""
    file = real_data / "lamini_docs.jsonl"
    found = look(file, tokenizer, max_length=2048)
    assert {one.name: (one.count, one.where) for one in found.findings} == {
        "empty turns": (1, f"{file}:424"),
        "held-out records trained on": (1, f"{file}:187"),
        "near-duplicates": (6, f"{file}:187"),
        "contradictions": (5, f"{file}:285"),
    }


# Faults ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A fault: what it makes of clean records, in which line it then is (0: in none), and what names it.

    Attributes:
        count: of the finding.
        says: part of its detail.
        settings: of the audit.
    """

    change: Callable[[Records], Any]
    finding: str
    line: int = 8
    count: int = 1
    says: str = ""
    records: Callable[[], Records] = pairs
    settings: tuple[tuple[str, Any], ...] = ()


LINE = 7  # the record that is changed, counted from 0


def put(**values: Any) -> Callable[[Records], None]:
    """Return a change of values of one record."""

    def change(records: Records) -> None:
        records[LINE].update(values)

    return change


def speak(*turns: tuple[str, str] | dict[str, Any]) -> Callable[[Records], None]:
    """Return a change of the messages of one record."""

    def change(records: Records) -> None:
        keys = ("role", "content")
        records[LINE]["messages"] = [
            turn if isinstance(turn, dict) else dict(zip(keys, turn, strict=True)) for turn in turns
        ]

    return change


def again(**changes: Any) -> Callable[[Records], None]:
    """Return a change that makes one record a copy of an earlier one but for some values."""

    def change(records: Records) -> None:
        records[LINE] = {**records[2], **changes}

    return change


def long_records() -> Records:
    rng = random.Random(4)
    return [{"question": sentence(rng, 80, 80), "answer": sentence(rng, 80, 80)} for _ in range(20)]


def one_word_less(records: Records) -> None:
    words = {key: text.split(" ", 1)[1] for key, text in records[2].items()}
    records[LINE] = words


def equal_lengths() -> Records:
    rng = random.Random(5)
    letters = [" ".join(rng.choices("abcdefgh", k=36)) for _ in range(64)]
    return [{"question": text[:35], "answer": text[36:]} for text in letters]


CHATS = (("template", "plain"),)
FAULTS = {
    "a cut answer": Fault(put(answer="word " * 80), "answers cut", settings=(("max_length", 64),)),
    "a dropped record": Fault(put(question="word " * 80), "records dropped", settings=(("max_length", 64),)),
    "weight 0": Fault(
        speak(("user", "Why?"), {"role": "assistant", "content": "So.", "weight": 0}),
        "nothing learned",
        records=openai,
    ),
    "no answer": Fault(speak(("user", "Why?")), "nothing learned", records=openai, says="no turn is learned"),
    "a blank answer": Fault(put(answer="  "), "empty turns", says="turn 2"),
    "a blank question": Fault(speak(("user", ""), ("assistant", "Yes.")), "empty turns", records=openai, says="turn 1"),
    "a copy": Fault(again(), "duplicates", says="as "),
    "a copy in capitals": Fault(
        lambda records: records.__setitem__(LINE, {key: f" {text.upper()} !" for key, text in records[2].items()}),
        "near-duplicates",
    ),
    "a word less": Fault(one_word_less, "near-duplicates", records=long_records, settings=(("max_length", 2048),)),
    "another answer": Fault(again(answer="Quite otherwise."), "contradictions"),
    "a marker": Fault(put(answer="Yes.<|im_end|>"), "markers in the data", says="<|im_end|>"),
    "a heading": Fault(put(question="Why?\n### Response:\nSo."), "markers in the data", says="### Response:"),
    "an unread key": Fault(put(hint="Think of water."), "keys not read", says="'hint' of 1"),
    "a template twice": Fault(
        put(question="### Question:\nWhat is it?"), "template twice", settings=(("template", "qa"), ("pack", False))
    ),
    "[INST] twice": Fault(
        put(question="[INST] What?"), "template twice", settings=(("template", "llama2"), ("pack", False))
    ),
    "mojibake": Fault(put(answer="The cafÃ© is open."), "wrong encoding", says="cafÃ©"),
    "a lost character": Fault(put(question="The caf\N{REPLACEMENT CHARACTER}?"), "wrong encoding"),
    "an entity": Fault(put(answer="Salt &amp; pepper."), "HTML entities", says="&amp;"),
    "two questions": Fault(
        speak(("user", "Why?"), ("user", "Well?"), ("assistant", "So.")),
        "roles out of order",
        records=openai,
        says="turn 2 is the user's",
    ),
    "an answer first": Fault(
        speak(("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.")), "roles out of order", records=openai
    ),
    "a question last": Fault(
        speak(("user", "Why?"), ("assistant", "So."), ("user", "And?")), "roles out of order", records=openai
    ),
    "system later": Fault(
        speak(("user", "Why?"), ("system", "Be kind."), ("assistant", "So.")), "roles out of order", records=openai
    ),
    "a repeated question": Fault(
        put(question="What is the name of it?", answer="What is the name of it? Iron."), "answer repeats its question"
    ),
    "no place": Fault(
        put(system="Be kind."), "refused by the template", says="{system}", settings=(("template", "own.txt"),)
    ),
    "bad rows": Fault(lambda records: None, "packs badly", line=1, count=0, records=equal_lengths),
    "unknown markers": Fault(
        lambda records: None, "unknown markers", line=0, count=3, settings=(("template", "llama3"), ("pack", False))
    ),
    "no fields": Fault(lambda records: records[LINE].pop("answer"), "unusable records", says="'answer' is missing"),
    "no JSON": Fault(lambda records: records.__setitem__(LINE, "{oops"), "unusable records", says="not valid JSON"),
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("Q: {question}\nA: {answer}")
    write(tmp_path / "test.jsonl", pairs(5, seed=99))
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_at_its_line_and_nothing_else_is(name: str, room: Path, tokenizer: Tokenizer) -> None:
    fault = FAULTS[name]
    records = fault.records()
    fault.change(records)
    file = write(room / "data.jsonl", records)
    settings = {"max_length": 1024, **dict(fault.settings)}
    found = look(file, tokenizer, room / "test.jsonl", **settings)
    assert [one.name for one in found.findings] == [fault.finding]
    (finding,) = found.findings
    if fault.finding == "packs badly":
        assert finding.count >= 30
    else:
        assert (finding.count, finding.where) == (fault.count, f"{file}:{fault.line}" if fault.line else "")
    assert fault.says in finding.detail
    assert finding.remedy
    assert len(str(finding.text).splitlines()) == 1


def test_an_end_that_is_not_learned_is_named(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No template of minift's own does that; here is one."""

    class Endless(TextTemplate):
        def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
            texts = super().examples(conversation, learn)
            if "third" not in conversation.answer:
                return texts
            return [[replace(span, eos=False) for span in spans] for spans in texts]

    plain = TEMPLATES["plain"]
    endless = Endless(plain.question, plain.answer, plain.question_with_context)
    monkeypatch.setattr(examine, "template_named", lambda *_: endless)
    records = pairs(40)
    records[2]["answer"] = "The third."
    file = write(tmp_path / "data.jsonl", records)
    (finding,) = look(file, tokenizer, max_length=1024).findings
    assert (finding.name, finding.count, finding.where) == ("stop token not learned", 1, f"{file}:3")


@pytest.mark.parametrize("kind", ["whole", "question", "near"])
def test_a_record_on_both_sides_of_the_split_is_named(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    records = long_records()
    (held,) = held_out_places(10, seed=3)
    records = records[:10]
    trained = records[0 if held else 1]
    question, answer = trained.values()
    records[held] = {
        "whole": dict(trained),
        "question": {"question": question.upper(), "answer": "Otherwise."},
        "near": {"question": question + " too", "answer": answer + " too"},
    }[kind]
    file = write(tmp_path / "data.jsonl", records)
    found = {one.name: one for one in look(file, tokenizer, max_length=2048, seed=3).findings}
    finding = found.pop("held-out records trained on")
    assert (finding.count, finding.where) == (1, f"{file}:{held + 1}")
    assert set(found) == {{"whole": "duplicates", "question": "contradictions", "near": "near-duplicates"}[kind]}
    test = write(tmp_path / "test.jsonl", [records[held]])
    del records[held]
    (finding,) = look(write(file, records), tokenizer, test, max_length=2048).findings
    assert (finding.name, finding.where) == ("held-out records trained on", f"{test}:1")


def test_markers_of_the_tokenizer_are_named_unless_they_are_meant(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(instruct_model(tmp_path / "model"))
    records = pairs(40)
    records[4]["answer"] = "So.<|im_end|>\n<|im_start|>user"
    file = write(tmp_path / "data.jsonl", records)
    (finding,) = look(file, tokenizer).findings
    assert (finding.name, finding.where, finding.count) == ("markers in the data", f"{file}:5", 1)
    assert "--rendered" in finding.remedy
    assert look(file, tokenizer, rendered=True).findings == []


# Numbers --------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_that_the_tokenizer_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records, limit = pairs(200), 24
    found = look(write(tmp_path / "data.jsonl", records), tokenizer, max_length=limit)
    prompts = [tokenizer.encode(record["question"]) for record in records]
    answers = [tokenizer.encode_continuation(f" {record['answer']}", eos=True) for record in records]
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    kept = [
        (len(prompt), min(len(answer), limit + 1 - len(prompt)))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(prompt) <= limit
    ]
    learned, given = sum(count for _, count in kept), sum(count for count, _ in kept)
    cut = sum(length > limit and len(prompt) <= limit for length, prompt in zip(lengths, prompts, strict=True))
    assert 0 < cut < 200
    counts = found.counts
    assert (counts["records"], counts["conversations"], counts["user turns"], counts["assistant turns"]) == (200,) * 4
    assert (counts["tokens learned"], counts["tokens given"]) == (learned, given)
    assert counts["tokens cut"] == sum(map(len, prompts)) + sum(map(len, answers)) - learned - given
    assert (counts["examples"], counts["examples cut"]) == (len(kept), cut)
    assert counts["examples dropped"] == 200 - len(kept)
    held_out = held_out_places(200, seed=0)
    left = sum(len(prompts[place]) <= limit for place in range(200) if place not in held_out)
    assert (counts["held-out records"], counts["examples to train on"]) == (20, left)
    assert counts["steps an epoch"] == -(-left // FINETUNE.batch_size)
    assert sum(found.lengths.values()) == 200
    assert max(found.lengths) == max(lengths)
    enough = f"{max(lengths):,} keeps all, {sorted(lengths)[197]:,} keeps 99 %"
    assert [enough in one.remedy for one in found.findings if one.name == "answers cut"] == [True]
    assert look(tmp_path / "data.jsonl", tokenizer, max_length=max(lengths)).findings == []


def test_samples_are_the_tokens_that_train(tmp_path: Path, tokenizer: Tokenizer) -> None:
    limit = 16
    file = write(tmp_path / "data.jsonl", [{"question": "Wo ist 日本?", "answer": "Es ist 🙂 dort, " * 4}, *pairs(9)])
    found = audit([file], tokenizer, FINETUNE.replace(max_length=limit), samples=10)
    texts = {sample.where: sample for sample in found.samples}
    sample = texts[f"{file}:1"]
    (pieces,) = sample.examples
    joined = {state: "".join(piece.text for piece in pieces if piece.state == state) for state in ("given", "learned")}
    assert joined["given"] == "<s>Wo ist 日本?"
    prompt = tokenizer.encode("Wo ist 日本?")
    answer = tokenizer.encode_continuation(" " + "Es ist 🙂 dort, " * 4, eos=True)
    assert joined["learned"] == tokenizer.decode_continuation(answer[: limit + 1 - len(prompt)])
    assert "".join(piece.text for piece in pieces) == "<s>Wo ist 日本? " + "Es ist 🙂 dort, " * 4 + "</s>"
    assert "answers cut" in sample.findings


def test_two_processes_find_what_one_finds(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = pairs(400)
    records[300]["answer"] = "cafÃ©"
    records[350] = dict(records[20])
    file = write(tmp_path / "data.jsonl", records)
    alone = look(file, tokenizer)
    monkeypatch.setattr(auditing, "HEAD", 50)
    monkeypatch.setattr(auditing, "CHUNK", 30)
    monkeypatch.setattr(auditing, "usable_cores", lambda: 2)
    assert look(file, tokenizer) == alone
    assert {one.name for one in alone.findings} >= {"wrong encoding", "duplicates"}


def test_the_template_is_that_of_all_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second file has chats, after those records by which the template is chosen at first."""
    tokenizer = load_tokenizer(instruct_model(tmp_path / "model"))
    files = [write(tmp_path / "a.jsonl", pairs(30)), write(tmp_path / "b.jsonl", sharegpt(10))]
    expected = audit(files, tokenizer, FINETUNE)
    assert expected.template == "chat"
    monkeypatch.setattr(auditing, "HEAD", 20)
    assert audit(files, tokenizer, FINETUNE) == expected


@pytest.mark.parametrize("seed", range(40))
def test_representatives_choose_as_all_records_do(seed: int, tokenizer: Tokenizer) -> None:
    rng = random.Random(seed)
    kinds: list[Callable[[str], Conversation]] = [
        lambda where: Pair("What?", "It.", where=where),
        lambda where: Pair("### Question:\nWhat?\n\n### Answer:", "It.", where=where),
        lambda where: Pair("", "A text.", where=where),
        lambda where: Pair("What?", " It.", where=where),
        lambda where: Pair("What?", "", where=where),
        lambda where: Chat((Turn("user", "Hi?"), Turn("assistant", "Ho.", True)), where=where),
    ]
    some = rng.sample(kinds, rng.randint(1, 3))
    conversations = [rng.choice(some)(f"x:{place}") for place in range(rng.randint(1, 30))]
    seen = Representatives()
    for one in conversations:
        seen.add(one)
    for name in ("auto", "qa", "plain", "text"):
        outcomes = []
        for which in (conversations, list(seen)):
            try:
                outcomes.append(choose_template(name, which, tokenizer))
            except InputError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


# Duplicates -----------------------------------------------------------------------------------------------------------


def test_templated_records_are_not_near_duplicates() -> None:
    rng = random.Random(6)
    long = ". ".join(sentence(rng) for _ in range(30))
    records: list[Conversation] = [Pair(f"What is number {i}?", f"It is {i}.") for i in range(300)]
    records += [Pair(f"{long} What is number {i}?", f"It is {i}. {long}") for i in range(300)]
    records += [Pair(f"Is the company owned by {word}?", f"No, {long}") for word in WORDS]
    records += [Pair(f"{sentence(rng)}?", "It is so.", context=long) for _ in range(100)]
    chats = [Chat((Turn("system", long), Turn("user", sentence(rng)), Turn("assistant", "Yes.", True)))]
    assert list(near_pairs(Fingerprinter()([*records, *chats]))) == []


def test_near_duplicates_are_found_by_the_share_of_runs_of_words() -> None:
    """Of 400 words one is changed: J is about 0.97. Of 100 words, 20 are: J is below 0.5."""
    rng = random.Random(7)
    records: list[Conversation] = []
    for changes, length in ((2, 400), (20, 100)):
        for _ in range(40):
            question, answer = (rng.choices(WORDS, k=length) for _ in range(2))
            records.append(Pair(" ".join(question), " ".join(answer)))
            for words in (question, answer):
                for place in rng.sample(range(length), changes // 2):
                    words[place] = "changed"
            records.append(Pair(" ".join(question), " ".join(answer)))
    found = set(near_pairs(Fingerprinter()(records)))
    assert found == {(place, place + 1) for place in range(0, 80, 2)}


def test_a_contradiction_is_the_same_question_with_another_answer() -> None:
    records = [
        Pair("Why?", "So."),
        Pair("WHY", "so"),
        Pair("Why?", "Otherwise."),
        Pair("Why?", ""),
        Pair("", "A text."),
        Pair("", "Another text."),
        Pair("???", "What do you mean?"),
        Pair("!!!", "Calm down."),
        Pair("Why?", "Not so.", system="Be brief."),
    ]
    assert contradictions(Fingerprinter()(records)) == [(0, 2)]


# Encodings ------------------------------------------------------------------------------------------------------------

REAL = (
    "créée à l'été, ÇA VA ? « OUI » CAFÉ® CAFÉ™ voilà»…",
    "„JÄ“ GROSSE GRÖẞE „DIÄ“ Spaß§ Größe ÜBER\u2013ALL",
    "ĐÃ” LÂ” Việt Nam: đã được “ĐÔI” CHẤM Ã",
    "Привет, мир — «да» №5",
    "São João NÃO Ã. ÇÃO» coração",
    "naïve façade 20°C 5€ £3 ½ Å Åland Ø Øre",
    "año ¡SÍ! ¿QUÉ? MÁLAGA» “É” \u2018È\u2019 Ï… Ü\u2013Ö— Â\xa0",
    "日本語 한국어 العربية हिन्दी 🙂",
)


@pytest.mark.parametrize("text", REAL)
def test_real_text_is_not_mojibake(text: str) -> None:
    assert mojibake(text) == ""


WRONG = [
    "café",
    "it\u2019s",
    "Привет, мир",
    "über alles",
    "“quoted” text",
    "1 £",
    "Việt Nam",
    "日本語",
    "nice 🙂",
    "a \u2013 b",
]


@pytest.mark.parametrize("text", WRONG)
def test_utf8_read_as_another_encoding_is_mojibake(text: str) -> None:
    latin = text.encode().decode("latin-1")
    western = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    for wrong in (latin, western):
        assert mojibake(f"Yes: {wrong}.")


# Markers --------------------------------------------------------------------------------------------------------------


def test_markers_that_the_tokenizer_does_not_know(tmp_path: Path, tokenizer: Tokenizer) -> None:
    known = load_tokenizer(instruct_model(tmp_path / "model"))
    assert unknown_markers(template_named("qa"), tokenizer) == []
    assert unknown_markers(template_named("llama2"), tokenizer) == []  # [INST] is text
    expected = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert unknown_markers(template_named("llama3"), tokenizer) == expected
    own = tmp_path / "own.txt"
    own.write_text("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}")
    assert unknown_markers(template_named(str(own)), known) == []
    assert unknown_markers(template_named(str(own)), tokenizer) == ["<|im_start|>", "<|im_end|>"]


# Commands -------------------------------------------------------------------------------------------------------------


def test_finetune_names_the_findings_that_change_something(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = pairs(40)
    records[3]["answer"] = "cafÃ©"
    records[5]["answer"] = "word " * 300
    records[6]["answer"] = ""
    records[8]["answer"] = "Salt &amp; pepper."  # worth knowing, no more
    file = write(tmp_path / "data.jsonl", records)
    training = read_all_conversations([file])
    test = [replace(training[9], where="test:1")]
    lines = finding_lines(training, test, 1, 1, "plain", tokenizer, FINETUNE)
    assert [line.split(";")[0] for line in lines] == [
        "finding: 1 example cut: the end of the answer is not learned, and neither is the stop token",
        f"finding: 1 record with a blank question or answer ({file}:7: turn 2, the assistant's, is blank)",
        f"finding: 1 record with text that was read in a wrong encoding on its way ({file}:4: turn 2, the assistant's: "
        "cafÃ©)",
        f"finding: 1 held-out record is also trained on, or its question is (test:1: as {file}:10)",
    ]
    assert finding_lines(read_all_conversations([write(file, pairs(40))]), [], 0, 0, "plain", tokenizer, FINETUNE) == []


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    records = pairs(30)
    records[3]["answer"] = "\x1b[31m<script>cafÃ©</script>"
    return write(tmp_path / "data.jsonl", records)


def test_the_command_prints_and_writes_what_was_found(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "x.json", tmp_path / "x.html"
    assert main(["data", "audit", str(faulty), "--json", str(out), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "1 record with text that was read in a wrong encoding on its way" in printed
    assert f"{faulty}:4" in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.split("records as they are learned")[0].splitlines())) <= 100
    result = json.loads(out.read_text())
    assert result["model"] == "bundled"
    assert [one["name"] for one in result["findings"]] == ["wrong encoding"]
    assert result["counts"]["records"] == 30
    assert "<script>caf" not in page.read_text()


def test_what_cannot_be_audited_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad.jsonl", ["{oops"])
    good = write(tmp_path / "good.jsonl", pairs(5))
    for words, message in (
        ([str(bad)], f"{bad}:1: not valid JSON"),
        ([str(good), "--sample", "-1"], "--sample"),
        ([str(good), "--max-length", "0"], "max_length"),
        ([str(good), "--html", str(tmp_path / "no" / "x.html")], "cannot be written"),
    ):
        assert main(["data", "audit", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_file_is_found_as_everywhere(faulty: Path, tokenizer: Tokenizer) -> None:
    assert audit(find_files([faulty.parent]), tokenizer, FINETUNE).counts["records"] == 30


# Brothers of what was found by others ---------------------------------------------------------------------------------

APART = {
    "operators": ("3 + 5", "3 - 5", "3 * 5", "3 < 5", "3 == 5", "3 != 5"),
    "languages": ("What is C?", "What is C++?", "What is C#?"),
    "numbers": (
        "What is 1.5 doubled?",
        "What is 15 doubled?",
        "What is -15 doubled?",
        "Is 1 + 23 odd?",
        "Is 12 + 3 odd?",
    ),
    "emoji": ("Say it: \U0001f44d", "Say it: \U0001f44e", "Say it: \U0001f389"),
    "vowels": ("\u0915\u092e?", "\u0915\u093e\u092e?", "\u0e21\u0e32?", "\u0e21\u0e49\u0e32?"),
    "tones": ("ma?", "ma\u0301?", "ma\u0300?"),
}


@pytest.mark.parametrize("name", APART)
def test_questions_that_differ_in_a_sign_are_not_the_same(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All but one are trained on, each is held out once; none answers another."""
    records = [{"question": one, "answer": f"Answer {place}."} for place, one in enumerate(APART[name])]
    for place in range(len(records)):
        file = write(tmp_path / "x.jsonl", [*records[:place], *records[place + 1 :]])
        test = write(tmp_path / "test.jsonl", [records[place]])
        found = audit([file], tokenizer, FINETUNE, test=[test])
        names = {finding.name for finding in found.findings}
        assert not names & {"held-out records trained on", "contradictions", "near-duplicates", "duplicates"}


def test_the_same_question_in_other_dress_is_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "x.jsonl", [{"question": "What, then, is  a cat?", "answer": "An animal."}])
    test = write(tmp_path / "test.jsonl", [{"question": "what then is a CAT", "answer": "A pet."}])
    (finding,) = audit([file], tokenizer, FINETUNE, test=[test]).findings
    assert (finding.name, finding.where) == ("held-out records trained on", f"{test}:1")


def test_one_question_that_carries_a_template_is_a_finding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """`finetune` stops there; the audit says so, names both lines, and goes on."""
    carried = {"question": "### Question:\nWhy?\n\n### Answer:", "answer": "So."}
    file = write(tmp_path / "x.jsonl", [*pairs(5), carried])
    found = audit([file], tokenizer, FINETUNE)
    (finding,) = [one for one in found.findings if one.name == "no template fits all"]
    assert finding.where == f"{file}:1"
    assert f"{file}:6" in finding.detail


def test_all_unusable_records_are_counted_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad: list[Any] = ["{oops", '{"question": 5, "answer": "a"}', "[1]", '{"a": 1,}', '{"ab": 1,}', '{"question": " "}']
    file = write(tmp_path / "x.jsonl", [*pairs(20), *bad * 3])
    (finding,) = [one for one in audit([file], tokenizer, FINETUNE).findings if one.name == "unusable records"]
    assert finding.count == 18
    assert finding.where == f"{file}:21"
    assert "times" in finding.detail
    assert "refuses more than 1%" in finding.remedy


def test_advice_about_lengths_is_held_against_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_checkpoint: Path
) -> None:
    file = write(tmp_path / "x.jsonl", [*pairs(20), {"question": "Long?", "answer": "word " * 900}])
    assert main(["data", "audit", str(file), "--model", str(small_checkpoint)]) == 0
    assert "(the model has 512 positions)" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "audit", str(file), "--model", str(small_checkpoint), "--max-length", "513"]) == 2
    assert "the model has 512 positions" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{oops\n"])
def test_held_out_files_are_read_as_strictly_as_by_finetune(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "x.jsonl", pairs(20))
    (tmp_path / "test.jsonl").write_text(content)
    for command in (["data", "audit", str(file)], ["finetune", "--data", str(file), "--out", str(tmp_path / "run")]):
        assert main([*command, "--test", str(tmp_path / "test.jsonl")]) == 2
        assert "test.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("it\x92s", "wrong encoding"),
        ("a\0b\0c", "wrong encoding"),
        ("caf&eacute; &mdash; &#128512;", "HTML entities"),
        ("<|START_OF_TURN_TOKEN|>", "markers in the data"),
        ("<\uff5cUser\uff5c>Hi", "markers in the data"),
        ("use &self; and a&b;", None),
        ("so <s>old</s> and <u>new</u> words", None),
    ],
)
def test_what_a_text_is_named_for(tmp_path: Path, tokenizer: Tokenizer, text: str, name: str | None) -> None:
    file = write(tmp_path / "x.jsonl", [*pairs(20), {"question": "What is it?", "answer": text}])
    found = {finding.name: finding.where for finding in audit([file], tokenizer, FINETUNE).findings}
    assert found == ({name: f"{file}:21"} if name else {})


@pytest.mark.parametrize("count", [9, 100, 1_000])
def test_steps_are_counted_as_finetune_would_take_them(
    count: int, tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of as many records as it chooses for them."""
    data, model = str(write(tmp_path / "data.jsonl", pairs(count))), str(small_checkpoint)
    assert main(["data", "audit", data, "--model", model, "--json", str(tmp_path / "audit.json")]) == 0
    steps = json.loads((tmp_path / "audit.json").read_text())["counts"]["steps an epoch"]
    capsys.readouterr()
    run = ["--epochs", "1", "--compare", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["finetune", "--model", model, "--data", data, *run]) == 0
    taken = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert taken == steps
