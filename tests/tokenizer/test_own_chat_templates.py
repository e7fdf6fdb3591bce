"""The promise: the model's own chat template is found, rendered and bounded, and its spans are right, by examples.

The ids are those of `transformers`. What a template may not do, and what it must, is refused in one line.
"""

import json
import pickle
import random
import sys
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.errors import InputError
from minift.prompts import Chat, Pair, Span, Turn
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat import ChatTemplate, chat_template, has_chat_template
from minift.tokenizer.chat_text import ChatText
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import soon_done
from tests.tokenizer.chats import (
    CHATML,
    LLAMA_2,
    MARKED,
    NAMES,
    OWN,
    REASONING,
    chat,
    encode,
    learned_texts,
    make_folder,
    messages,
    text_of,
)
from tests.tokenizer.kinds import LLAMA_3_SPLIT, read_by_transformers, refused, write_config

pytest.importorskip("jinja2")

TWO = chat(("u", "Hi"), ("a", "Hello."), ("u", "Bye"), ("a", "See you."))
CHATS = {
    "one": chat(("u", "What is the capital of Mexico?"), ("a", "Mexico City")),
    "two": TWO,
    "system": chat(("s", "Be kind."), ("u", "Hi"), ("a", "Hello."), ("u", "日本 é🙂?"), ("a", "はい 👩‍👩‍👧")),
    "code": chat(("u", "def f(x):\n    return 1\n\n"), ("a", "x = 1\n    y = 2")),
    "empty": chat(("u", ""), ("a", "Yes")),
}


def of(source: str, names: tuple[str, ...] = NAMES, **more: Any) -> ChatTemplate:
    return ChatTemplate(ChatText(source, "mine.jinja", names, {"bos_token": "<s>", "eos_token": "</s>"}, **more))


# What is learned ------------------------------------------------------------------------------------------------------

LEARNED = {
    "chatml": ["Hello.<|im_end|>\n", "See you.<|im_end|>\n"],
    "llama 3": ["Hello.<|eot_id|>", "See you.<|eot_id|>"],
    "llama 2": [" Hello. </s>", " See you. </s>"],
    "zephyr": ["Hello.</s>\n", "See you.</s>\n"],
    "reasoning": ["Hello.<|im_end|>\n", "See you.<|im_end|>\n"],
    "marked": ["Hello.<|im_end|>", "See you.<|im_end|>"],
}


@pytest.mark.parametrize("name", OWN)
def test_answers_are_learned_with_what_ends_them(name: str) -> None:
    template = of(OWN[name], (*NAMES, "</s>"))
    (spans,) = template.examples(TWO)
    assert learned_texts(spans) == LEARNED[name]
    assert [span.learned for span in spans][:4] == [False, True, False, True]
    (last,) = template.examples(TWO, "last")
    assert learned_texts(last) == LEARNED[name][1:]
    assert text_of(last) == text_of(spans)
    (prompt,) = template.prompt(TWO)
    assert text_of(spans).startswith(prompt.text)
    assert prompt.text + LEARNED[name][1] == text_of(spans).removesuffix("\n" if name == "marked" else "")


def test_a_turn_that_is_only_given_is_not_learned() -> None:
    mixed = chat(*(("ua"[i % 2], str(i)) for i in range(8)), given=[3])
    for source in (CHATML, MARKED):
        (spans,) = of(source).examples(mixed)
        assert [text.rstrip("\n") for text in learned_texts(spans)] == [f"{i}<|im_end|>" for i in (1, 5, 7)]
    given = chat(("u", "1"), ("a", "2"), given=[1])
    for conversation in (given, chat(("u", "1")), chat(("a", "How can I help?"))):  # the last is never asked for
        (spans,) = of(CHATML).examples(conversation)
        assert learned_texts(spans) == []
    (spans,) = of(CHATML).examples(chat(("a", "How can I help?"), ("u", "So"), ("a", "Yes.")))
    assert learned_texts(spans) == ["Yes.<|im_end|>\n"]


def test_turns_after_the_last_answer_are_left_out() -> None:
    (spans,) = of(CHATML).examples(chat(("u", "1"), ("a", "2"), ("u", "3")))
    assert text_of(spans) == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"


def test_a_pair_is_a_chat_of_two_turns() -> None:
    pair = Pair("What?", "That.", context="About this.", system="Be kind.")
    (spans,) = of(CHATML).examples(pair)
    (same,) = of(CHATML).examples(chat(("s", "Be kind."), ("u", "What?\nAbout this."), ("a", "That.")))
    assert spans == same
    (prompt,) = of(CHATML).prompt(pair)
    assert prompt == spans[0]
    assert of(CHATML).answer_parts(pair) == ["That."]


def test_answers_whose_thoughts_are_dropped_later_are_examples_of_their_own() -> None:
    thinks = chat(
        ("u", "1+1"), ("a", "<think>\nAdd.\n</think>\n\n2"), ("u", "2+2"), ("a", "<think>\nSo\n</think>\n\n4")
    )
    first, second = of(REASONING).examples(thinks)
    assert learned_texts(first) == ["<think>\nAdd.\n</think>\n\n2<|im_end|>\n"]
    assert learned_texts(second) == ["<think>\nSo\n</think>\n\n4<|im_end|>\n"]
    assert "<|im_start|>assistant\n2<|im_end|>" in second[0].text
    assert [second] == of(REASONING).examples(thinks, "last")
    marked = MARKED.replace(
        "m.content + '<|im_end|>' }}{% endgen", "(m.content if loop.last else 'x') + '<|im_end|>' }}{% endgen"
    )
    first, second = of(marked).examples(TWO)
    assert [learned_texts(first), learned_texts(second)] == [["Hello.<|im_end|>"], ["See you.<|im_end|>"]]


def test_a_tag_that_begins_before_the_prompt_ends_is_cut_there() -> None:
    early = MARKED.replace(
        "+ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ ",
        "}}{% if m.role == 'assistant' %}{% generation %}{{ '\n' + ",
    )
    early = early.replace("{% else %}{{ m.content", "{% else %}{{ '\n' + m.content")
    (spans,) = of(early).examples(TWO)
    assert learned_texts(spans) == ["\n", "Hello.<|im_end|>", "\n", "See you.<|im_end|>"]
    (prompt,) = of(early).prompt(TWO)
    assert text_of(spans).startswith(prompt.text)


def test_tags_that_follow_one_another_are_one_span() -> None:
    two = MARKED.replace("m.content + '<|im_end|>'", "m.content }}{% endgeneration %}{% generation %}{{ '<|im_end|>'")
    assert of(two).examples(TWO) == of(MARKED).examples(TWO)


def test_the_parts_of_an_answer_have_no_end() -> None:
    assert of(CHATML).answer_parts(TWO) == ["See you."]
    assert of(LLAMA_2).answer_parts(TWO) == [" See you."]
    named = chat(("u", "1"), ("a", "a <|im_end|> b"))
    assert of(CHATML).answer_parts(named) == ["a ", "<|im_end|>", " b"]


# The data's own markers -----------------------------------------------------------------------------------------------


def test_markers_in_data_are_told_from_those_of_the_template() -> None:
    spelled = chat(("u", "what is <|im_end|>?\n<|im_end|>"), ("a", "<|im_start|> <|im_end|>"))
    (spans,) = of(CHATML).examples(spelled)
    assert spans[0].parts[1::2] == ["<|im_end|>", "<|im_end|>"]
    assert spans[1].parts == ["", "<|im_start|>", " ", "<|im_end|>", "<|im_end|>\n"]
    (prompt,) = of(CHATML).prompt(spelled)
    assert prompt == Span(spans[0].parts)
    (spans,) = of(CHATML, rendered=True).examples(spelled)
    assert [len(span.parts) for span in spans] == [1, 1]
    (spans,) = of(CHATML).examples(TWO)
    assert all(len(span.parts) == 1 for span in spans)  # the ordinary case


def test_markers_in_data_have_no_special_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_folder(tmp_path, CHATML))
    template, rng = chat_template(tokenizer), random.Random(1)
    for _ in range(50):
        words = ["".join(rng.choices([*NAMES, "hi", "\n", "é", "x "], k=5)) for _ in range(4)]
        spelled = chat(*zip("uaua", words, strict=True))
        (spans,) = template.examples(spelled)
        ids, _ = encode(tokenizer, spans)
        special = [piece for piece in tokenizer.pieces(ids) if piece in NAMES]
        assert special == ["<|im_start|>", "<|im_end|>"] * 4
        assert text_of(spans) == template.text.render(spelled.turns, "")


def test_a_name_that_the_template_looks_for_stays_a_marker() -> None:
    names = (*NAMES, "<think>", "</think>")
    thinks = chat(("u", "<|im_end|>"), ("a", "<think>a</think>b"), ("u", "2"), ("a", "c <|im_end|>"))
    first, second = of(REASONING, names).examples(thinks)
    assert second[0].parts[1::2] == ["<|im_end|>"]  # while </think> was found, and what comes before it dropped
    assert second[1].parts == ["c ", "<|im_end|>", "<|im_end|>\n"]
    assert first[1].parts[1::2] == ["<think>", "</think>"]  # here nothing is looked for: the last turn stays as it is


def test_two_names_that_the_template_looks_for_together_stay_markers() -> None:
    either = "{{ m.content if '<think>' in m.content or '</think>' in m.content else '<think></think>' + m.content }}"
    source = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", either + "<|im_end|>{% endgeneration %}"
    )
    thinks = chat(("u", "<|im_end|>"), ("a", "<think>a</think>b <|eot_id|>"))
    (spans,) = of(source, (*NAMES, "<think>", "</think>")).examples(thinks)
    assert spans[0].parts[1::2] == ["<|im_end|>"]
    assert spans[1].parts == ["<think>a</think>b ", "<|eot_id|>", "<|im_end|>"]


def test_a_name_that_the_template_changes_is_refused() -> None:
    shouts = CHATML.replace(
        "message['content'] +", "message['content'].replace('f', 'F') + (message['content']|length|string) +"
    )
    message = refused(lambda: of(shouts).examples(chat(("u", "<|eot_id|>"), ("a", "x"))), "chats.jsonl:7", "--rendered")
    assert "<|eot_id|>" in message


def test_characters_of_the_private_use_area_stay() -> None:
    data = chat(("u", "\ue000 <|im_end|> \ue001"), ("a", "\ue002\ue000"))
    (spans,) = of(MARKED).examples(data)
    assert text_of(spans) == of(MARKED).text.render(data.turns, "")
    assert learned_texts(spans) == ["\ue002\ue000<|im_end|>"]


# The ids of transformers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["chatml", "llama 3", "marked", "llama 2", "zephyr"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a template and its kind of tokenizer: byte-level BPE, or Llama 2's as a `tokenizer.json`."""
    name, folder = request.param, tmp_path_factory.mktemp("model")
    if name in ("llama 2", "zephyr"):
        values = json.loads(make_json(SentencePieceTokenizer((bundled("base") / "tokenizer.model").read_bytes())))
        first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        values = {**values, "normalizer": None, "pre_tokenizer": first}
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        write_config(folder, "<s>", "</s>", tokenizer_class="LlamaTokenizer", legacy=False)
        (folder / "chat_template.jinja").write_text(OWN[name], encoding="utf-8")
        return folder
    return make_folder(folder, OWN[name], merges=True, split=LLAMA_3_SPLIT if name == "llama 3" else "")


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_transformers(folder: Path, name: str) -> None:
    ours, theirs, conversation = load_tokenizer(folder), read_by_transformers(folder), CHATS[name]
    template, turns = chat_template(ours), messages(conversation.turns)
    (spans,) = template.examples(conversation)
    ids, mask = encode(ours, spans)
    assert text_of(spans) == theirs.apply_chat_template(turns, tokenize=False)
    assert ids == theirs.apply_chat_template(turns)["input_ids"]
    if template.text.marks_answers:
        made = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert mask == made["assistant_masks"]
    prompt, _ = encode(ours, template.prompt(conversation))
    assert prompt == theirs.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert ids[-1] in template.stop_ids(ours) or ours.decode_continuation(ids[-1:]) == "\n"


def test_a_sentencepiece_model_gets_its_markers_as_ids(sentencepiece_folder: Path) -> None:
    """A `tokenizer.model` alone finds no names in a text; the spans say where BOS and EOS are."""
    (sentencepiece_folder / "chat_template.jinja").write_text(LLAMA_2)
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    template = chat_template(tokenizer)
    (spans,) = template.examples(TWO)
    assert spans == [
        Span(["[INST] Hi [/INST]"], bos=True),
        Span([" Hello. "], learned=True, eos=True),
        Span(["[INST] Bye [/INST]"], bos=True),
        Span([" See you. "], learned=True, eos=True),
    ]
    ids, mask = encode(tokenizer, spans)
    assert [ids.count(1), ids.count(2)] == [2, 2]
    assert [id for id, learned in zip(ids, mask, strict=True) if learned].count(2) == 2
    assert template.stop_ids(tokenizer) == [2]
    (spans,) = template.examples(chat(("u", "what is </s>?"), ("a", "x")))
    assert spans[0].parts == ["[INST] what is ", "</s>", "? [/INST]"]
    prompt, _ = encode(tokenizer, template.prompt(TWO))
    assert prompt == ids[: len(prompt)]
    assert len(prompt) == len(encode(tokenizer, template.examples(TWO)[0][:3])[0])


def test_what_ends_a_turn_stops_generation(tmp_path: Path) -> None:
    for name, end in (
        ("chatml", "<|im_end|>"),
        ("llama 3", "<|eot_id|>"),
        ("zephyr", "</s>"),
        ("marked", "<|im_end|>"),
    ):
        tokenizer = load_tokenizer(make_folder(tmp_path / name, OWN[name]))
        assert tokenizer.pieces(chat_template(tokenizer).stop_ids(tokenizer)) == [end]


# Where a template comes from ------------------------------------------------------------------------------------------


def tokenizer_with(folder: Path, jinja: str | None = None, config: Any = None, old: Any = None) -> Tokenizer:
    make_folder(folder, jinja, **({} if config is None else {"chat_template": config}))
    if old is not None:
        (folder / "chat_template.json").write_text(json.dumps(old))
    return load_tokenizer(folder)


def written(tokenizer: Tokenizer) -> str:
    return chat_template(tokenizer).text.source


def variant(word: str) -> str:
    return word + CHATML


def test_the_newest_source_comes_first_as_in_transformers(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": variant("b")}]
    cases = [
        ({"jinja": variant("a"), "config": variant("b"), "old": {"chat_template": variant("c")}}, "a"),
        ({"config": variant("b"), "old": {"chat_template": variant("c")}}, "b"),
        ({"config": listed}, "b"),
    ]
    for number, (files, word) in enumerate(cases):
        tokenizer = tokenizer_with(tmp_path / str(number), **files)
        assert has_chat_template(tokenizer)
        theirs = read_by_transformers(tmp_path / str(number)).apply_chat_template(messages(TWO.turns), tokenize=False)
        assert written(tokenizer) == variant(word)
        assert text_of(chat_template(tokenizer).examples(TWO)[0]) == theirs
    assert written(tokenizer_with(tmp_path / "old", old={"chat_template": variant("c")})) == variant("c")


def test_a_folder_without_a_template_says_what_would_work(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    assert not has_chat_template(tokenizer)
    assert has_chat_template(tokenizer_with(tmp_path / "listed", config=[{"name": "rag", "template": "x"}]))
    refused(lambda: chat_template(tokenizer), "chat_template.jinja", "tokenizer_config.json", "--template")
    (tmp_path / "mine.jinja").write_text(CHATML)
    template = chat_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert learned_texts(template.examples(TWO)[0]) == LEARNED["chatml"]
    refused(lambda: chat_template(tokenizer, str(tmp_path / "other.jinja")), "other.jinja", "No such file")
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe")
    refused(lambda: chat_template(tokenizer, str(tmp_path / "mine.jinja")), "mine.jinja", "UTF-8")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config": [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]}, ["rag, tool_use"]),
        ({"config": 3}, ["chat_template", "int"]),
        ({"config": [3]}, ["(none)"]),
        ({"old": [1]}, ["chat_template.json", "list"]),
        ({"jinja": "{% for %}"}, ["chat_template.jinja:1"]),
        ({"jinja": "\n\n{{ messages | no_such_filter }}"}, ["chat_template.jinja:3", "no_such_filter"]),
        ({"jinja": "\n{{ messages[0].content.x.y }}"}, ["chat_template.jinja:2", "x"]),
        ({"jinja": "{{ 1 / 0 }}"}, ["ZeroDivisionError"]),
        ({"jinja": "no turns at all"}, ["does not write"]),
        ({"jinja": ""}, ["does not write"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_template_is_refused(tmp_path: Path, files: dict[str, Any], words: list[str]) -> None:
    tokenizer = tokenizer_with(tmp_path, **files)
    refused(lambda: chat_template(tokenizer), *words)


def test_the_command_prints_what_is_done_with_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thinks.jinja").write_text(REASONING)
    (tmp_path / "damaged.jinja").write_text("{% for %}")
    folder = str(make_folder(tmp_path / "model", LLAMA_2))
    paths = [str(tmp_path / "thinks.jinja"), folder, str(tmp_path / "damaged.jinja")]
    assert main(["tokenizer", "templates", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| thinks | own examples | prefixes |  |"
    assert lines[3].startswith(f"| {folder} | one text | prefixes | an answer first, two users: the chat")
    assert lines[4].startswith("| damaged | refused |  | 10 of them: damaged.jinja:1: not a chat template: ")
    assert lines[6] == "3 templates: 1 one text, 1 own examples, 1 refused"
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for path in (folder, str(tmp_path / "none.jinja"), str(tmp_path / "none")):
        assert main(["tokenizer", "templates", path]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("bos", ["<s>", None, {"content": "<s>", "__type": "AddedToken"}], ids=str)
def test_a_template_sees_the_special_tokens_of_the_files(tmp_path: Path, bos: Any) -> None:
    names = "{{ bos_token }}/{{ eos_token }}/{{ pad_token }}/{{ unk_token }}/{{ image_token }}" + CHATML
    folder = make_folder(tmp_path, names, bos_token=bos, pad_token="<|eot_id|>", image_token="<|im_end|>")
    if bos is None:  # minift itself needs to know one
        (folder / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": 6}))
    theirs = read_by_transformers(folder).apply_chat_template(messages(TWO.turns), tokenize=False)
    assert text_of(chat_template(load_tokenizer(folder)).examples(TWO)[0]) == theirs


@pytest.mark.parametrize("described", [True, False])
def test_the_older_map_of_special_tokens_counts_where_no_token_is_described(tmp_path: Path, described: bool) -> None:
    more = {"added_tokens_decoder": {"256": {"content": "<s>", "special": True}}} if described else {}
    folder = make_folder(tmp_path, "{{ bos_token }}/{{ pad_token }}" + CHATML, **more)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "pad_token": "<|eot_id|>"}))
    theirs = read_by_transformers(folder).apply_chat_template(messages(TWO.turns), tokenize=False)
    assert text_of(chat_template(load_tokenizer(folder)).examples(TWO)[0]) == theirs


def test_json_is_written_as_in_transformers(tmp_path: Path) -> None:
    source = "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}" + CHATML
    conversation = chat(("u", "é <b> & 'x' \"y\" \u2028"), ("a", "日本"))
    theirs = read_by_transformers(make_folder(tmp_path, source))
    expected = theirs.apply_chat_template(messages(conversation.turns), tokenize=False)
    assert of(source).text.render(conversation.turns, "") == expected


def test_without_jinja_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    assert has_chat_template(tokenizer)
    refused(lambda: chat_template(tokenizer), "chat_template.jinja", "pip install jinja2", "minift[chat]")


def test_a_template_can_be_sent_to_a_worker_and_keeps_its_time() -> None:
    template = of("{{ strftime_now('%Y %f') }}" + CHATML, now=datetime(2024, 2, 29, microsecond=7))
    again = pickle.loads(pickle.dumps(template))
    assert text_of(template.examples(TWO)[0]).startswith("2024 000007<|im_start|>")
    assert again.examples(TWO) == template.examples(TWO) == pickle.loads(pickle.dumps(again)).examples(TWO)


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_refusal_of_the_template_is_told_in_its_words() -> None:
    message = refused(lambda: of(LLAMA_2).examples(chat(("u", "1"), ("u", "2"), ("a", "3"))))
    assert message == "chats.jsonl:7: the chat template refuses this conversation: roles must alternate"
    hostile = CHATML + "{{ raise_exception(messages[0].content) if messages[0].content != 'Seventeen' }}"
    message = refused(lambda: of(hostile).examples(chat(("u", "\x1b[2J\u202ea\nb" + "x" * 5000), ("a", "3"))))
    assert message.isprintable()
    assert len(message) <= 1_000


TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
UNMARKED_END = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
NOTHING_MARKED = MARKED.replace(
    "{% generation %}", "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
).replace("<|im_end|>' }}{% endgeneration %}", "<|im_end|>' }}")
ENDED = "{% endgeneration %}"
COUNTED = MARKED.replace("{% generation %}", "{% set x %}{% generation %}").replace(
    "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ x if x|length != 18 else 'no<|im_end|>' }}"
)
UNCERTAIN = {
    "no end": (TURN, ["ends the assistant's turn", "'assistant: Hello.'"]),
    "thinks first": (
        CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
        ["'<think>\\n'", "'Hello.<|im_end|>\\n'"],
    ),
    "end unmarked": (UNMARKED_END, ["ends the assistant's turn", "'Hello.'"]),
    "nothing marked": (NOTHING_MARKED, ["marks nothing"]),
    "tag in a tag": (
        MARKED.replace("{% generation %}", "{% generation %}" * 2).replace(ENDED, ENDED * 2),
        ["not certain"],
    ),
    "marks counted": (COUNTED, ["not certain"]),
    "system dropped": (CHATML.replace("in messages", "in messages if message.role != 'system'"), ["has a system text"]),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_refused(name: str) -> None:
    source, words = UNCERTAIN[name]
    conversation = chat(("s", "Be kind"), ("u", "Hi"), ("a", "Hello.")) if name == "system dropped" else TWO
    refused(lambda: of(source).examples(conversation), "chats.jsonl:7", "mine.jinja", *words)


def test_a_conversation_without_turns_is_refused() -> None:
    refused(lambda: of(CHATML).examples(Chat((), where="a.jsonl:3")), "a.jsonl:3", "no turns")
    refused(lambda: of(CHATML).prompt(Chat((), where="a.jsonl:3")), "a.jsonl:3", "no turns")
    refused(lambda: of(CHATML).prompt(Chat((Turn("assistant", "x"),), where="a.jsonl:3")), "a.jsonl:3", "nothing comes")


def doubled(value: str) -> str:
    return f"{{% set n = namespace(x='aaaaaaaa') %}}{{% for i in range(60) %}}{{% set n.x = {value} %}}{{% endfor %}}"


HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "subclasses": "{{ {}.__class__.__base__.__subclasses__() }}",
    "attr": "{{ messages | attr('__class__') | attr('mro') }}{{ cycler.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "change": "{{ messages.clear() }}",
    "import": "{% include '/etc/passwd' %}",
    "environment": "{{ self._TemplateReference__context.environment.pay }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "quiet loops": "{% for a in range(9999) %}{{ range(99999) | list | sort | unique | list | length }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n - 1) }}{% endmacro %}{{ f(1) }}",
    "two macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "repeat": "{{ 'a' * 10 ** 11 }}",
    "repeat a list": "{{ ([messages] * 10 ** 10) | length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "doubling": doubled("n.x + n.x"),
    "doubling with ~": doubled("n.x ~ n.x"),
    "doubling by join": doubled("[n.x, n.x] | join"),
    "doubling by format": doubled("'%s%s' % (n.x, n.x)"),
    "doubling by blocks": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by replace": doubled("n.x.replace('a', 'aa')"),
    "wide": "{{ '%99999999999d' % 1 }}",
    "wide filter": "{{ '%99999999999d' | format(1) }}",
    "wide method": "{{ '{:99999999999}'.format(1) }}",
    "centre": "{{ 'a' | center(10 ** 11) }}",
    "centre by method": "{{ 'a'.center(10 ** 11) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "indent": "{{ 'a\n' | indent(10 ** 11) }}",
    "json": "{{ {'a': 1} | tojson(indent=10 ** 11) }}",
    "lipsum": "{{ lipsum(n=10 ** 6) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from minift.tokenizer import jinja

    monkeypatch.setattr(jinja, "SECONDS", 0.5)
    monkeypatch.setattr(jinja, "BUDGET", 1 << 24)
    with soon_done(5):
        message = refused(lambda: of(CHATML + HOSTILE[name]).examples(TWO), "mine.jinja")
    assert message.isprintable()


def test_a_template_may_not_reach_python() -> None:
    for source in ("{{ ''.__class__ }}", "{{ messages.__len__ }}", "{{ raise_exception.__code__ }}"):
        text = of(CHATML + source).text.render(TWO.turns, "x")
        assert text == of(CHATML).text.render(TWO.turns, "x")  # undefined, and so nothing


# Long chats -----------------------------------------------------------------------------------------------------------

HEAD = "{% if messages[0].role != 'system' %}{{ bos_token }}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
ROUND = "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}" + ROUND + "{% endfor %}" + ASKED
GROWING = {
    "plain": LOOP,
    "first": HEAD + LOOP,
    "counted": HEAD + LOOP.replace("{{ m.role", "{% if loop.first %}{{ loop.index0 }}{% endif %}{{ m.role"),
    "a macro": "{% macro say(m) %}" + ROUND + "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}" + ASKED,
    "numbered": LOOP.replace("{{ m.content", "{{ loop.index }} {{ m.content"),  # each answer differs from the first
    "other answers": LOOP.replace("{{ m.content", "{% if loop.index == 6 %}!{% endif %}{{ m.content"),
}
NOT_GROWING = {
    "last": LOOP.replace("{{ m.role", "{% if loop.last %}{{ eos_token }}{% endif %}{{ m.role"),
    "how many": LOOP.replace("{{ m.role", "{% if messages | length > 9 %}!{% endif %}{{ m.role"),
    "the end": LOOP + "{% if messages[-1].role == 'user' %}{% endif %}",
    "next": LOOP.replace("{{ m.role", "{{ '' if loop.nextitem is defined else '' }}{{ m.role"),
    "renamed": "{% set all = messages %}" + LOOP,
    "without the first": "{% if not bos_token %}{% set messages = messages[1:] %}{% endif %}" + LOOP,
    "namespace": "{% set n = namespace(k=0) %}" + LOOP.replace(ROUND, "{% set n.k = n.k + 1 %}" + ROUND),
    "a used-up list": "{% set n = [1, 2, 3] | map('string') %}" + LOOP.replace(ROUND, "{{ n | first }}" + ROUND),
    "asked in the loop": LOOP.replace(ROUND, "{% if add_generation_prompt %}{% endif %}" + ROUND),
    "two loops": LOOP + "{% for m in messages %}{% endfor %}",
    "filtered": LOOP.replace("in messages", "in messages if m.role != 'system'"),
    "marked": MARKED,
}


def long_chat(turns: int) -> Chat:
    said = [("u" if place % 2 == 0 else "a", f"Text {place}.") for place in range(turns)]
    return chat(*said)


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("name", [*GROWING, *NOT_GROWING])
def test_a_text_that_is_written_once_is_the_same(name: str, learn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one that each answer, and what asks for it, was looked at for: where that can be known, and elsewhere."""
    found = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(ChatTemplate, "_written_once", lambda *_: None)
        template = of({**GROWING, **NOT_GROWING}[name])
        try:
            found.append(template.examples(long_chat(13), learn))
        except InputError as refusal:
            found.append(str(refusal))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", GROWING)
def test_a_long_chat_is_written_a_few_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not twice for each answer, which took a chat of 4,000 turns 13 s."""
    renderer = import_module("minift.tokenizer.jinja").Renderer
    rendered, render = [], renderer.render

    def counted(self: Any, messages: Any, *arguments: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, *arguments)

    monkeypatch.setattr(renderer, "render", counted)
    of(GROWING[name]).examples(long_chat(200))
    assert sum(rendered) < 10 * 200


@pytest.mark.parametrize("name", NOT_GROWING)
def test_a_text_that_a_later_turn_may_change_is_written_for_each_answer(name: str) -> None:
    assert of(NOT_GROWING[name])._written_once(long_chat(8).turns, [1, 3, 5, 7], "a chat") is None
