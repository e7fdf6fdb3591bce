"""What can be wrong with a conversation that is learned from: its checks, and for each what to do about it.

Some look at the text, some at the ids and the mask that train (`pack.Example`). Each has a name, under which
`minift data audit` counts the records.

    minift data audit data/pairs.jsonl
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from minift.data.duplicates import normalised
from minift.data.encodings import mojibake
from minift.errors import InputError, one_line
from minift.pack import Example
from minift.prompts import Chat, Conversation, Pair, Template, TextTemplate
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat import ChatTemplate

SHOWN = 60  # characters of a text in a finding


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        changes: whether it changes what is learned or what is measured; otherwise it is only worth knowing.
        words: what was found, after the number; in [ ] the ending for one, then for several.
        remedy: what to do.
    """

    changes: bool
    words: str
    remedy: str


KINDS = {
    "unusable records": Kind(True, "record[|s] cannot be used", "mend them, or take them out"),
    "refused by the template": Kind(
        True,
        "record[|s] [has|have] no place in the template; finetune stops at such a record",
        "mend them, take them out, or choose another --template",
    ),
    "roles out of order": Kind(
        True,
        "conversation[|s] [is|are] not a question and its answer in turn",
        "put the turns in order, or take the records out; a text after the last answer is never learned",
    ),
    "records dropped": Kind(
        True,
        "example[|s] dropped: what is given fills --max-length, nothing of the answer fits",
        "raise --max-length, or shorten what is given",
    ),
    "answers cut": Kind(
        True,
        "example[|s] cut: the end of the answer is not learned, and neither is the stop token",
        "raise --max-length, or split long records",
    ),
    "nothing learned": Kind(
        True,
        "record[|s] with nothing to learn: no turn of the assistant, or all of weight 0",
        "add answers, or take the records out",
    ),
    "stop token not learned": Kind(
        True,
        "learned turn[|s] [does|do] not end in a token that ends a turn: the model learns not to stop there",
        "use a template that ends a turn in such a token",
    ),
    "empty turns": Kind(True, "record[|s] with a blank question or answer", "fill them, or take the records out"),
    "markers in the data": Kind(
        True,
        "record[|s] whose text holds markers of a template; they are learned as characters",
        "take them out of the text; if they were put there on purpose, give --rendered",
    ),
    "template twice": Kind(
        True,
        "record[|s] whose question carries the template's own words; they are written twice",
        "take them out of the text, or choose the template plain",
    ),
    "wrong encoding": Kind(
        True,
        "record[|s] with text that was read in a wrong encoding on its way",
        "make the file again from its source, as UTF-8; for a file in another encoding give --encoding",
    ),
    "held-out records trained on": Kind(
        True,
        "held-out record[|s] [is|are] also trained on, or [its question is|their questions are]",
        "take them out of one side: the scores say how well they are remembered",
    ),
    "keys not read": Kind(
        True, "key[|s] with something that is not read", "name what you need: --fields QUESTION ANSWER; or drop the key"
    ),
    "unknown markers": Kind(
        True,
        "marker[|s] of the template [is|are] no token of this tokenizer: [it is|they are] cut into pieces",
        "choose a template of the model's own (--template chat), or one without markers (plain, qa)",
    ),
    "duplicates": Kind(
        False, "record[|s] [is|are] there already, word for word", "keep one of each: copies count as many times"
    ),
    "near-duplicates": Kind(
        False,
        "record[|s] [is|are] nearly the same as an earlier one",
        "keep one of each, unless the difference is what you want learned",
    ),
    "contradictions": Kind(
        False, "record[|s] answer[s|] a question otherwise than an earlier record", "keep the answer that is right"
    ),
    "answer repeats its question": Kind(
        False, "record[|s] whose answer begins with the question", "take the question out of the answer"
    ),
    "HTML entities": Kind(
        False, "record[|s] with characters written as HTML entities", "unescape them, unless HTML is the subject"
    ),
    "packs badly": Kind(False, "% of the positions are padding although rows are packed", "see the lengths"),
}


class Checker:
    """The checks of conversations that are written in a template, for a tokenizer.

    Args:
        name: the template's name.
        rendered: whether markers in the data's text count as markers.
    """

    def __init__(self, template: Template, name: str, tokenizer: Tokenizer, rendered: bool = False):
        self._tokenizer = tokenizer
        self._stops = {tokenizer.eos_id}
        if isinstance(template, ChatTemplate):
            self._stops.update(template.stop_ids(tokenizer))
        written = rendered or name in ("carried", "joined", "text")  # the data brings a template of its own, or none
        own = [] if written else own_words(template)
        self._own = _either(own) if own else None
        names = [re.escape(name) for name in tokenizer.marker_names if len(name) > 2 and not name.isalnum()]
        markers = [*names, *_FOREIGN, *([] if written else [_HEADINGS])]
        self._markers = None if rendered else re.compile("|".join(markers), re.MULTILINE)

    def of_text(self, conversation: Conversation) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the text of a conversation: (the name of the finding, what was found)."""
        turns = conversation.turns
        if isinstance(conversation, Chat) and (fault := order_fault(conversation)):
            yield "roles out of order", fault
        blank = [place for place, turn in enumerate(turns) if turn.role != "system" and not turn.text.strip()]
        if isinstance(conversation, Pair) and not conversation.question:
            blank = [place for place in blank if turns[place].role == "assistant"]
        if blank:
            yield "empty turns", f"turn {blank[0] + 1}, the {turns[blank[0]].role}'s, is blank"
        if not any(turn.learned for turn in turns):
            yield "nothing learned", "no turn is learned"
        found = dict[str, str]()
        for place, turn in enumerate(turns):
            for name, what in self._of_turn(turn.text, turn.role):
                found.setdefault(name, f"turn {place + 1}, the {turn.role}'s: {what}")
        for before, turn in zip(turns, turns[1:], strict=False):
            if (before.role, turn.role) == ("user", "assistant") and repeats(before.text, turn.text):
                found.setdefault("answer repeats its question", _excerpt(turn.text, 0))
        yield from found.items()

    def _of_turn(self, text: str, role: str) -> Iterator[tuple[str, str]]:
        twice = self._own.search(text) if self._own and role == "user" else None
        if twice:
            yield "template twice", _excerpt(text, twice.start())
        elif self._markers and (match := self._markers.search(text)):
            yield "markers in the data", _excerpt(text, match.start())
        if "\N{REPLACEMENT CHARACTER}" in text:
            yield "wrong encoding", _excerpt(text, text.index("\N{REPLACEMENT CHARACTER}"))
        elif stretch := mojibake(text):
            yield "wrong encoding", _excerpt(text, text.index(stretch))
        if "&" in text and (match := _ENTITY.search(text)):
            yield "HTML entities", _excerpt(text, match.start())

    def of_example(self, example: Example) -> str:
        """Return what is wrong with the ends of an example's learned stretches, "" if nothing is."""
        edges = [0, *(edge for pair in example.given for edge in pair), len(example.answer)]
        stretches = list(zip(edges[::2], edges[1::2], strict=True))
        for start, end in stretches[:-1] if example.cut else stretches:
            if not self._ends(example.answer[start:end]):
                return f"ends in {_excerpt(self._tokenizer.decode_continuation(example.answer[start:end][-8:]), 0)}"
        return ""

    def _ends(self, ids: list[int]) -> bool:
        """Return whether ids end in a stop token, white space after it left out."""
        for id in reversed(ids[-4:]):
            if id in self._stops:
                return True
            if self._tokenizer.decode_continuation([id]).strip():
                return False
        return False


# Markers --------------------------------------------------------------------------------------------------------------

_FOREIGN = (r"<\|[a-z_]{2,30}\|>", r"</?(?:start|end)_of_turn>", r"\[/?INST\]", r"<</?SYS>>", r"\A\s*<s>", r"</s>\s*\Z")
_HEADINGS = r"^###\s*(?:Instruction|Input|Response|Human|Assistant|Question|Answer|System|User)\s*:"
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5}|#x[0-9a-fA-F]{2,5});")


def own_words(template: Template) -> list[str]:
    """Return the lines that a template itself writes around a question, if they are long enough to be known again."""
    question = Pair("Seventeen?", "Thirty-nine.")
    if isinstance(template, TextTemplate):
        parts = template.parts(question)[0]
    else:
        try:
            parts = [part for spans in template.examples(question) for span in spans for part in span.parts]
        except InputError:  # it needs more than a question; each record is tried anyway
            return []
    text = "\0".join(parts[::2])
    return list(dict.fromkeys(line.strip() for line in re.split(r"[\n\0]", text) if len(line.strip()) > 3))


def _either(lines: list[str]) -> re.Pattern[str]:
    """Return a pattern of lines; a bare word with a colon ("Human:") only counts at the beginning of a text."""
    return re.compile(
        "|".join(rf"\A\s*{re.escape(line)}" if line[0].isalpha() and len(line) < 30 else re.escape(line) for line in lines)
    )


# Turns ----------------------------------------------------------------------------------------------------------------


def order_fault(chat: Chat) -> str:
    """Return what is wrong with the order of a chat's turns, "" where they are questions and answers in turn."""
    roles = [turn.role for turn in chat.turns]
    start = int(roles[:1] == ["system"])
    for place, role in enumerate(roles[start:], start):
        expected = ("user", "assistant")[(place - start) % 2]
        if role != expected:
            return f"turn {place + 1} is the {role}'s, where the {expected}'s is expected"
    return "" if roles[-1] == "assistant" or "assistant" not in roles else f"the last turn is the {roles[-1]}'s"


def repeats(question: str, answer: str) -> bool:
    """Return whether an answer begins with its question, of four words or more."""
    if question.lstrip()[:10].casefold() != answer.lstrip()[:10].casefold() or len(question.split()) < 4:
        return False
    return normalised(answer).startswith(normalised(question))


def _excerpt(text: str, place: int) -> str:
    """Return a stretch of a text, on one line, from shortly before a place."""
    start = max(0, place - SHOWN // 4)
    end = start + SHOWN
    return f"{'…' * (start > 0)}{one_line(text[start:end])}{'…' * (end < len(text))}"
