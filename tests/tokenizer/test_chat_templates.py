"""The promise: with published chat templates, the text and the learned tokens are those of `transformers`, or refused.

The templates are those in the package `trl`. Most have a twin, `NAME_training.jinja`, in which its authors marked what
the model writes; `return_assistant_tokens_mask` gives these tokens. Nothing of trl is imported.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.errors import InputError
from minift.look.chat_templates import CONVERSATIONS, judge_path, table, template_alone
from minift.prompts import Chat, Span, Turn
from minift.tokenizer.chat import ChatTemplate
from minift.tokenizer.chat_text import ChatText
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT
from tests.tokenizer.chats import encode, make_folder, messages, text_of, trl_templates
from tests.tokenizer.kinds import read_by_transformers

pytest.importorskip("jinja2")
pytest.importorskip("transformers")

# Where the authors of the twins marked what is not learned here: what the template writes when it asks for an answer.
MARKED_THOUGH_ASKED_WITH = {
    "deepseek_r1_distill": "<\uff5cAssistant\uff5c> and <think> (marked in one with the answer)",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    **{f"nemotron_3_{size}": "<think> and its line break" for size in ("nano", "super", "ultra", "5_lightning")},
    "qwen2_5": "the line break after <|im_start|>assistant",
    "qwen3_5_nothink": "<think>, its line breaks, </think>",
    "qwen3_5_think": "<think> and its line break",
    "qwen3_6": "<think> and its line break",
    "qwen3_8": "<think> and its line break",
}
LEARNED_THOUGH_UNMARKED = {"llava_next": "the space after </s>"}
NO_TWIN = {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "llama3_1", "llama3_2"}
REFUSED = {  # what is asked is not the beginning of what is answered; or no token ends a turn (glm4moe)
    *("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training", "glm4moe"),
    *(f"nemotron_3_{size}{twin}" for size in ("nano", "super", "ultra", "5_lightning") for twin in ("", "_training")),
}


@pytest.fixture(scope="module")
def templates() -> Path:
    return trl_templates()


class Programs:
    """One tokenizer that knows the markers of all templates, read by minift and by transformers; all templates."""

    def __init__(self, folder: Path, tmp_path: Path):
        self.sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
        self.names = {stem: template_alone(source, stem).text.names for stem, source in self.sources.items()}
        names = dict.fromkeys(name for stem in self.sources for name in self.names[stem])
        made = make_folder(tmp_path, None, list(names))
        self.ours, self.theirs = load_tokenizer(made), read_by_transformers(made)
        self.template = cache(self._template)

    def _template(self, stem: str, rendered: bool) -> ChatTemplate:
        variables = {"bos_token": "<s>", "eos_token": "</s>"}
        return ChatTemplate(ChatText(self.sources[stem], stem, self.names[stem], variables, rendered))

    def twin(self, stem: str) -> str | None:
        """Return the template with the marks of its authors."""
        own = self.sources[stem] if self.template(stem, True).text.marks_answers else None
        return self.sources.get(f"{stem}_training", own)

    def apply(self, stem: str, turns: Sequence[Turn], source: str | None = None, **options: Any) -> Any:
        """Call `apply_chat_template`."""
        values = messages(turns, self.template(stem, True).text.writes_parts)
        return self.theirs.apply_chat_template(values, chat_template=source or self.sources[stem], **options)


@pytest.fixture(scope="module")
def programs(templates: Path, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(templates, tmp_path_factory.mktemp("all"))


def or_refusal(call: Callable[[], Any], begins: str) -> Any:
    """Return what a call returns, or None where it is refused, in one line that begins with the conversation's."""
    try:
        return call()
    except InputError as refusal:
        message = str(refusal)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(begins), message
    return None


def same_text(programs: Programs, stem: str, turns: Sequence[Turn], prompt: bool) -> None:
    """Check that a text is that of transformers to the byte, or that both refuse."""
    try:
        theirs = programs.apply(stem, turns, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        theirs = None
    text = programs.template(stem, False).text
    ours = or_refusal(lambda: text.render(turns, "chats.jsonl:1", prompt), "chats.jsonl:1: ")
    assert not turns or ours == theirs


def expected(programs: Programs, stem: str, turns: Sequence[Turn], learned: Sequence[int], ids: list[int]) -> Any:
    """Return the mask of the twin in turns that are learned, after what is asked; None where it writes another text."""
    twin = programs.twin(stem)
    if twin is None:
        return None
    try:
        made = programs.apply(stem, turns, twin, return_dict=True, return_assistant_tokens_mask=True)
    except Exception:
        return None
    if made["input_ids"] != ids:
        return None
    mask, answers = made["assistant_masks"], [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    starts = [
        len(programs.apply(stem, turns[:i], add_generation_prompt=True)["input_ids"]) if i else 0 for i in answers
    ]
    result, name = [0] * len(mask), stem.removesuffix("_training")
    for begin, end in runs(mask):
        place, start = max((i, start) for i, start in zip(answers, starts, strict=True) if start < end)
        if place in learned:
            begin = begin if programs.template(stem, True).text.marks_answers else max(begin, start)
            result[begin:end] = [1] * (end - begin)
            if stem in LEARNED_THOUGH_UNMARKED:
                assert programs.ours.decode(ids[end : end + 1]) == " "
                result[end] = 1
    if learned == answers and name not in {*MARKED_THOUGH_ASKED_WITH, *LEARNED_THOUGH_UNMARKED}:
        assert result == mask
    return result


def runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each run of ones begins and ends."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_examples(programs: Programs, stem: str, chat: Chat, learn: str) -> str:
    """Check the examples of a conversation. Return what became of it."""
    examples = or_refusal(lambda: programs.template(stem, True).examples(chat, learn), f"{chat.where}: ")
    if examples is None:
        return "refused"
    answers = [i for i, turn in enumerate(chat.turns) if turn.role == "assistant" and turn.learned and i]
    answers = answers if learn == "all" else answers[-1:]
    if not answers:
        assert not any(span.learned for span in examples[0])
        return "given"
    compared = "alone"
    one = len(examples) == 1
    for example, last in zip(examples, answers[-1:] if one else answers, strict=True):
        turns, learned = chat.turns[: last + 1], answers if one else [last]
        assert text_of(example) == programs.apply(stem, turns, tokenize=False)
        ids, mask = encode(programs.ours, example)
        assert ids == programs.apply(stem, turns)["input_ids"]
        check_prompts(programs, stem, example, turns, learned)
        twins = expected(programs, stem, turns, learned, ids)
        if twins is not None:
            assert mask == twins
            compared = "compared"
    return compared


def check_prompts(
    programs: Programs, stem: str, example: Sequence[Span], turns: Sequence[Turn], learned: Sequence[int]
) -> None:
    """Check that what comes before the last answer is what a model is given in use, and encoded apart."""
    template = programs.template(stem, True)
    (prompt,) = template.prompt(Chat((*turns[: learned[-1]], Turn("assistant", "x", learned=True))))
    asked = programs.apply(stem, turns[: learned[-1]], tokenize=False, add_generation_prompt=True)
    assert prompt.text == asked
    starts, length = [], 0
    for span in example:
        starts.append(length)
        length += len(span.text)
    assert len(asked) in starts


TEN = [chat for _, chat in CONVERSATIONS]


def all_stems() -> list[str]:
    try:
        return sorted(path.stem for path in trl_templates().glob("*.jinja"))
    except pytest.skip.Exception:
        return ["none"]


@pytest.mark.parametrize("stem", all_stems())
def test_ten_conversations(programs: Programs, stem: str) -> None:
    """Rendered text, ids and masks are those of transformers; a template that is refused is refused by name."""
    found = Counter[str]()
    for chat in TEN:
        for prompt in (False, True):
            same_text(programs, stem, chat.turns, prompt)
        for learn in ("all", "last"):
            found[check_examples(programs, stem, chat, learn)] += 1
    assert (found["refused"] > len(TEN)) == (stem in REFUSED)
    if stem.removesuffix("_training") not in NO_TWIN and stem not in REFUSED:
        assert found["compared"] >= 8, found


def test_a_text_that_is_written_once_is_the_same(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one that is written again for each answer: of all templates, and some of them are written once."""
    turns = [Turn(("user", "assistant")[place % 2], f"Text {place}.", bool(place % 2)) for place in range(12)]
    chats = [Chat(tuple(turns)), Chat((Turn("system", "Be kind."), *turns))]
    found, once = list[dict[Any, Any]](), set[str]()
    written = ChatTemplate._written_once

    def seen(self: ChatTemplate, *arguments: Any) -> Any:
        spans = written(self, *arguments)
        if spans is not None:
            once.add(self.text.where)
        return spans

    for way in (seen, lambda *_: None):
        monkeypatch.setattr(ChatTemplate, "_written_once", way)
        found.append({})
        for stem in programs.sources:
            for chat in chats:
                try:
                    found[-1][stem, chat] = programs.template(stem, False).examples(chat)
                except InputError as refusal:
                    found[-1][stem, chat] = str(refusal)
    assert found[0] == found[1]
    assert once


@cache
def words() -> st.SearchStrategy[str]:
    pieces = [
        "Hi",
        "1 ",
        " ",
        "\n",
        "\t",
        "é",
        "日本",
        "🙂",
        "<|im_end|>",
        "</s>",
        "<think>",
        "</think>",
        "[/INST]",
        "x<",
        "'{{",
    ]
    return st.lists(st.sampled_from(pieces), max_size=5).map("".join)


def conversations() -> st.SearchStrategy[Chat]:
    def made(system: str | None, texts: list[str], given: int, odd: int) -> Chat:
        roles = ["user", "assistant"] * 3
        turns = [
            Turn(role, text, role == "assistant" and place != given)
            for place, (role, text) in enumerate(zip(roles, texts, strict=False))
        ]
        if odd == 0 and turns:
            turns = turns[1:]
        return Chat((*([Turn("system", system)] if system is not None else []), *turns)[:6], where="chats.jsonl:1")

    return st.builds(made, st.none() | words(), st.lists(words(), max_size=6), st.integers(0, 9), st.integers(0, 9))


def test_a_thousand_conversations(programs: Programs) -> None:
    found = Counter[str]()

    @settings(
        max_examples=1_000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(sorted(programs.sources)), conversations(), st.sampled_from(["all", "last"]), st.booleans())
    def check(stem: str, chat: Chat, learn: str, prompt: bool) -> None:
        same_text(programs, stem, chat.turns, prompt)
        found[check_examples(programs, stem, chat, learn)] += 1
        if chat.turns:
            check_data_names(programs, stem, chat)

    check()
    assert found["compared"] > 200, found
    assert found["refused"] < 500, found


def check_data_names(programs: Programs, stem: str, chat: Chat) -> None:
    """Check that the template's markers are those of the same conversation without names in its data."""
    if any("think" in turn.text for turn in chat.turns):
        return  # some templates look for these
    template = programs.template(stem, False)

    def clean(text: str) -> str:
        return template.text.name.sub("NAME", text)

    plain = Chat(tuple(Turn(turn.role, clean(turn.text), turn.learned) for turn in chat.turns), where=chat.where)
    try:
        spelled, without = template.examples(chat), template.examples(plain)
    except InputError:
        return
    for ours, theirs in zip(spelled, without, strict=True):
        assert [span.learned for span in ours] == [span.learned for span in theirs]
        for span, other in zip(ours, theirs, strict=True):
            markers = [name for part in span.parts[::2] for name in template.text.name.findall(part)]
            assert markers == template.text.name.findall(other.text)
            assert clean("".join("NAME" if i % 2 else part for i, part in enumerate(span.parts))) == clean(other.text)


def test_the_table_of_the_readme_is_what_the_command_prints(templates: Path) -> None:
    printed = table([judge_path(str(path)) for path in sorted(templates.glob("*.jinja"))])
    assert len(printed.splitlines()) == 2 + 72 + 2
    assert printed in (ROOT / "minift" / "tokenizer" / "README.md").read_text(encoding="utf-8")
