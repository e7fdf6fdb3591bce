"""The promise of `data/conversations.py` and `data/chats.py`: whatever a file calls them, the turns are what it says.

Each layout in which people have their data is written out here, next to the turns that it holds. What cannot be learned
is refused in a sentence, and what is not read is counted.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.data.chats import read_turns
from minift.data.conversations import Reading, read_all_conversations, scan_conversations
from minift.data.records import Record, scan
from minift.data.templates import choose_template, read_template
from minift.data.written import record_of
from minift.errors import InputError
from minift.prompts import Chat, Conversation, Pair, Turn
from tests.helpers import write_jsonl

ASK, TELL = Turn("user", "Name a fruit."), Turn("assistant", " Apple.\n", learned=True)
AGAIN, MORE = Turn("user", "Another?"), Turn("assistant", "Pear.", learned=True)
SYSTEM = Turn("system", "Be brief. ")


def given(turn: Turn) -> Turn:
    return Turn(turn.role, turn.text)


def message(turn: Turn, **more: Any) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.text} | more


def sharegpt(turn: Turn) -> dict[str, str]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": names[turn.role], "value": turn.text}


def read(tmp_path: Path, record: Any, **options: Any) -> Conversation:
    (found,) = read_all_conversations([write_jsonl(tmp_path / "x.jsonl", [record])], None, Reading(**options), say=None)
    return found


FOUR = (ASK, TELL, AGAIN, MORE)
PARTS = [{"type": "text", "text": "Name a "}, {"text": "fruit."}]
CHATS: dict[str, tuple[dict[str, Any], tuple[Turn, ...]]] = {
    "messages": ({"messages": [message(turn) for turn in FOUR]}, FOUR),
    "with a system text": ({"messages": [message(turn) for turn in (SYSTEM, *FOUR)]}, (SYSTEM, *FOUR)),
    "the system's text apart": ({"messages": [message(turn) for turn in FOUR], "system": SYSTEM.text}, (SYSTEM, *FOUR)),
    "the developer's": (
        {"messages": [message(Turn("developer", SYSTEM.text)), message(ASK), message(TELL)]},
        (SYSTEM, ASK, TELL),
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": PARTS}, message(TELL)]},
        (ASK, TELL),
    ),
    "weights": (
        {"messages": [message(ASK), message(TELL, weight=0), message(AGAIN), message(MORE, weight=1)]},
        (ASK, given(TELL), AGAIN, MORE),
    ),
    "ShareGPT": ({"id": "7", "conversations": [sharegpt(turn) for turn in FOUR]}, FOUR),
    "ShareGPT with roles": ({"conversations": [message(turn) for turn in FOUR]}, FOUR),
    "one conversation": ({"conversation": [message(turn) for turn in FOUR]}, FOUR),
    "capitals": ({"Messages": [message(ASK, role="User"), message(TELL, role="ASSISTANT")]}, (ASK, TELL)),
    "prompt and completion of messages": (
        {"prompt": [message(turn) for turn in (SYSTEM, ASK, TELL, AGAIN)], "completion": [message(MORE)]},
        (SYSTEM, ASK, given(TELL), AGAIN, MORE),
    ),
    "a prompt and messages": ({"prompt": ASK.text, "response": [message(TELL)]}, (ASK, TELL)),
    "a history of texts": (
        {"history": [[ASK.text, TELL.text]], "instruction": AGAIN.text, "output": MORE.text, "system": "Be brief. "},
        (SYSTEM, *FOUR),
    ),
    "a history of messages": (
        {"question": AGAIN.text, "answer": MORE.text, "history": [message(ASK), message(TELL)]},
        FOUR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_read_as_its_turns(tmp_path: Path, name: str) -> None:
    record, turns = CHATS[name]
    found = read(tmp_path, record)
    assert isinstance(found, Chat)
    assert found.turns == turns
    assert found.where == f"{tmp_path / 'x.jsonl'}:1"


PAIRS: dict[str, tuple[dict[str, Any], Pair]] = {
    "prompt and completion": ({"prompt": "Q", "completion": " A"}, Pair("Q", " A")),
    "prompt and response": ({"prompt": "Q", "response": "A"}, Pair("Q", "A")),
    "question and response": ({"question": "Q", "response": "A"}, Pair("Q", "A")),
    "capitals": ({"Question": "Q", "ANSWER": "A"}, Pair("Q", "A")),
    "Dolly": ({"instruction": "Q", "context": "C", "response": "A", "category": "open_qa"}, Pair("Q", "A", "C")),
    "a context": ({"question": "Q", "context": "C", "answer": "A"}, Pair("Q", "A", "C")),
    "an input": ({"question": "Q", "input": "C", "answer": "A"}, Pair("Q", "A", "C")),
    "OpenOrca": ({"id": "niv.1", "system_prompt": "S", "question": "Q", "response": "A"}, Pair("Q", "A", system="S")),
    "an empty history": ({"instruction": "Q", "input": "", "output": "A", "history": []}, Pair("Q", "A")),
    "a text": ({"text": " A text.\n"}, Pair("", " A text.\n")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_whatever_its_keys_are(tmp_path: Path, name: str) -> None:
    record, pair = PAIRS[name]
    found = read(tmp_path, record)
    assert isinstance(found, Pair)
    assert Pair(found.question, found.answer, found.context, found.system) == pair


def test_a_pair_is_two_turns() -> None:
    pair = Pair("Q", "A", "C", "S")
    assert pair.turns == (Turn("system", "S"), Turn("user", "Q\nC"), Turn("assistant", "A", learned=True))


@pytest.mark.parametrize(
    ("record", "fields", "turns"),
    [
        ({"ask": ASK.text, "reply": TELL.text, "question": "x", "answer": "y"}, ("ask", "reply"), (ASK, TELL)),
        ({"prompt": ASK.text, "chosen": [message(TELL)], "rejected": []}, ("prompt", "chosen"), (ASK, TELL)),
        ({"dialogue": [sharegpt(turn) for turn in FOUR]}, ("dialogue",), FOUR),
    ],
)  # fmt: skip
def test_the_user_names_the_keys(
    tmp_path: Path, record: dict[str, Any], fields: tuple[str, ...], turns: tuple[Turn, ...]
) -> None:
    assert read(tmp_path, record, fields=fields).turns == turns
    with pytest.raises(InputError, match=r"x.jsonl:1: 'nothing' is missing; its keys: "):
        read(tmp_path, record, fields=(fields[0], "nothing"))


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"messages": [message(ASK), message(TELL)], "tools": TOOLS}, "has tools"),
    "functions": ({"messages": [message(ASK), message(TELL)], "functions": TOOLS}, "has tools"),
    "a call": ({"messages": [message(ASK), message(TELL, content=None, tool_calls=TOOLS)]}, r"\[1\]: has tools"),
    "a tool's answer": ({"messages": [message(ASK), message(TELL, role="tool")]}, r"\[1\]: its role is 'tool'.*tools"),
    "a picture": ({"messages": [message(ASK, content=IMAGE)]}, r"\[0\]: its content.*'image_url'.*text"),
    "pictures apart": ({"messages": [message(ASK), message(TELL)], "images": ["x.png"]}, r"has pictures \(images\)"),
    "preferences": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "which of two answers.*--fields prompt chosen"),
    "preferences of messages": ({"chosen": [message(ASK)], "rejected": [message(ASK)]}, "which of two answers"),
    "an unknown role": ({"messages": [message(ASK, role="wizard")]}, r"\[0\]: its role is 'wizard'; known: system"),
    "no role": ({"messages": [{"text": "x"}]}, r"\[0\]: no role and content or from and value in \['text'\]"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "no message": ({"messages": ["x"]}, r"\[0\] is str, not a message"),
    "no text": ({"messages": [{"role": "user", "content": 5}]}, r"\[0\]: its content is int, not a text"),
    "a half weight": ({"messages": [message(TELL, weight=0.5)]}, r"weight is 0.5; known: 0 and 1"),
    "a history of words": ({"instruction": "Q", "output": "A", "history": [["x"]]}, "'history' must hold lists of two"),
    "neither": ({"ask": "Q", "reply": "A"}, r"no usable fields in \['ask', 'reply'\].*--fields QUESTION ANSWER"),
    "messages that are a text": ({"messages": "none"}, "no usable fields"),
    "no messages in a cell": ({"messages": "[]"}, "'messages' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused_in_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record, reason = REFUSED[name]
    file = write_jsonl(tmp_path / "x.jsonl", [record])
    with pytest.raises(InputError, match=rf"^{file}:1: .*{reason}"):
        read_all_conversations([file])
    assert main(["finetune", "--data", str(file), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}:1" in line
    assert not (tmp_path / "run").exists()


def test_one_bad_chat_costs_one_record(tmp_path: Path) -> None:
    records = [{"messages": [message(ASK), message(TELL)]}, {"messages": []}, {"question": "Q", "answer": "A"}]
    found = list(scan_conversations(scan(write_jsonl(tmp_path / "x.jsonl", [*records, records[0]]))))
    assert [type(item) for item in found] == [Chat, InputError, InputError, Chat]
    assert "x.jsonl:3: 'messages' is missing; its keys: question, answer" in str(found[2])


# What is not read -----------------------------------------------------------------------------------------------------


def test_keys_that_are_not_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the number of records that hold something under them; what only names a record is not."""
    records = [
        {"question": "Q", "answer": "A", "hint": "x" if number < 3 else " ", "id": "7", "source": "web", "score": 0.5}
        for number in range(8)
    ]
    records[5]["steps"] = ["one"]
    reading = Reading()
    read_all_conversations([write_jsonl(tmp_path / "x.jsonl", records)], None, reading, say=print)
    assert reading.unread == Counter({"hint": 3, "steps": 1})
    expected = ["note: 'hint' of 3 records is not read", "note: 'steps' of 1 record is not read"]
    assert capsys.readouterr().out.splitlines() == expected
    chats = [{"messages": [message(ASK, name="Ann"), message(TELL, reasoning_content="Hm.")] * 2, "topics": ["x"]}] * 2
    reading = Reading()
    read_all_conversations([write_jsonl(tmp_path / "y.jsonl", chats)], None, reading, say=None)
    assert reading.unread == Counter({"messages: name": 2, "messages: reasoning_content": 2, "topics": 2})


def test_a_text_that_repeats_the_pair_is_no_loss(tmp_path: Path) -> None:
    """As Alpaca's does. A text that says something else may be what the question is about."""
    for text, expected in (("### Q\n### A", Counter()), ("An article.", Counter({"text": 1}))):
        reading = Reading()
        file = write_jsonl(tmp_path / "x.jsonl", [{"question": "Q", "answer": "A", "text": text}])
        read_all_conversations([file], None, reading, say=None)
        assert reading.unread == expected


def test_a_name_in_the_terminal_cannot_command_it(tmp_path: Path) -> None:
    reading = Reading()
    file = write_jsonl(tmp_path / "x.jsonl", [{"question": "Q", "answer": "A", "\x1b[2J": "x"}])
    read_all_conversations([file], None, reading, say=None)
    (line,) = reading.unread_lines()
    assert "\x1b" not in line


# There and back -------------------------------------------------------------------------------------------------------

ALL = [*(record for record, _ in CHATS.values()), *(record for record, _ in PAIRS.values())]


@pytest.mark.parametrize("record", ALL, ids=[*CHATS, *PAIRS])
def test_what_format_writes_is_read_as_the_same_turns(tmp_path: Path, record: dict[str, Any]) -> None:
    before = read(tmp_path, record)
    file, out = write_jsonl(tmp_path / "x.jsonl", [record]), tmp_path / "out.jsonl"
    assert main(["data", "format", str(file), "--out", str(out)]) == 0
    (after,) = read_all_conversations([out])
    assert after.turns == before.turns
    assert type(after) is type(before)
    assert (after.context, after.metric) == (before.context, before.metric)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert record_of(after) == written == record_of(before)


def test_places_are_named_within_a_chat() -> None:
    messages = [message(ASK), {"role": "user"}]
    with pytest.raises(InputError, match=r"^here\[1\]: no role and content"):
        read_turns(messages, "here")
    record = Record({"messages": messages}, Path("x.jsonl"), 7)
    (fault,) = scan_conversations([record])
    assert str(fault).startswith("x.jsonl:7: 'messages'[1]: ")


# Brothers of what was found by others ---------------------------------------------------------------------------------


def test_a_blank_answer_is_not_learned(tmp_path: Path) -> None:
    """It would teach to say nothing. Alone, such a record has no target; within a chat the others are learned."""
    blank = Turn("assistant", " \n", learned=False)
    found = read(tmp_path, {"messages": [message(turn) for turn in (ASK, TELL, AGAIN, blank)]})
    assert found.turns == (ASK, TELL, AGAIN, blank)


@pytest.mark.parametrize("key", ["train", "mask", "loss", "weight", "trainable"])
def test_a_flag_about_what_is_learned_is_not_passed_over(tmp_path: Path, key: str) -> None:
    reading = Reading()
    flag = {} if key == "weight" else {key: False}  # a message's weight is read
    record = {"messages": [message(ASK), message(TELL, **flag)], key: 0}
    read_all_conversations([write_jsonl(tmp_path / "x.jsonl", [record])], None, reading, say=None)
    assert reading.unread == Counter({key: 1, **{f"messages: {name}": 1 for name in flag}})


def test_a_chat_in_the_cell_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.csv"
    cell = json.dumps([message(ASK), message(TELL)]).replace('"', '""')
    file.write_text(f'id,messages\n1,"{cell}"\n', encoding="utf-8")
    (found,) = read_all_conversations([file], say=None)
    assert found.turns == (ASK, TELL)
    file.write_text("messages\n\"[{'role': 'user', 'content': 'as Python prints it'}]\"\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"x.csv:2: 'messages' is a text, and no list of messages in JSON"):
        read_all_conversations([file])


def test_preferences_are_refused_whatever_else_is_there(tmp_path: Path) -> None:
    record = {"messages": [message(ASK), message(TELL)], "chosen": "A", "rejected": "B"}
    with pytest.raises(InputError, match="which of two answers is better"):
        read(tmp_path, record)
    assert read(tmp_path, record, fields=("messages",)).turns == (ASK, TELL)


def test_each_file_has_a_form_of_its_own_for_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_checkpoint: Path
) -> None:
    """`data stats` counts what `finetune` trains on."""
    records = {
        "a.jsonl": [{"messages": [message(ASK), message(TELL)]}] * 5,
        "b.jsonl": [{"conversations": [sharegpt(ASK), sharegpt(TELL)]}] * 5,
        "c.jsonl": [{"question": "Q", "answer": "A"}] * 5,
    }
    files = [str(write_jsonl(tmp_path / name, found)) for name, found in records.items()]
    assert main(["data", "stats", *files, "--json", str(tmp_path / "stats.json")]) == 0
    stats = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    assert (stats["kind"], stats["chats"], stats["malformed"]) == ("chats", 15, 0)
    words = ["finetune", "--model", str(small_checkpoint), "--data", *files, "--steps", "1", "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "13 chats to train on" in capsys.readouterr().out  # a tenth is held out, rounded


def test_stats_gives_the_reason_that_finetune_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}] * 3)
    reasons = set()
    for words in (["data", "stats"], ["data", "format"], ["data", "audit"]):
        assert main([*words, str(file)]) == 2
        (*_, line) = capsys.readouterr().err.splitlines()
        assert "which of two answers is better" in line
        reasons.add(line.split(" (")[0])
    assert len(reasons) == 1


def test_a_file_in_which_nothing_is_learned_says_so(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not advise to raise a length that is not the reason."""
    records = [{"messages": [message(ASK), message(TELL, weight=0)]}] * 4
    file = str(write_jsonl(tmp_path / "x.jsonl", records))
    for words in (["finetune", "--out", str(tmp_path / "run")], ["evaluate"], ["explain"]):
        model = ["--model", str(small_checkpoint), "--device", "cpu"]
        assert main([*words, *model, "--data", file]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "raise it" not in line
        assert "answer" in line
    assert main(["data", "format", file, "--template", "qa", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_a_context_after_a_carried_template_is_refused(tmp_path: Path) -> None:
    """It would come after "### Answer:", as if it began the answer."""
    pair = Pair("### Question:\nq\n\n### Answer:", "a", context="C")
    for name in ("auto", "carried", "plain"):
        with pytest.raises(InputError, match="carries a template already, and has no place for the context"):
            choose_template(name, [pair])


def test_a_place_that_a_template_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{instruction} {question}: {answer}")
    with pytest.raises(InputError, match=r"mine.txt: {instruction} is unknown; a template may hold {question}"):
        read_template(tmp_path / "mine.txt")
