"""The checks of a conversation that is learned from.

Some look at the text, some at the ids and the mask that train (`pack.Example`). Each has a name, under which
`minift data audit` counts the records.

    minift data audit data/pairs.jsonl
"""

import re
from collections.abc import Iterator
from html.entities import html5
from itertools import pairwise

from minift.data.duplicates import normalised
from minift.data.encodings import mojibake
from minift.errors import InputError, one_line
from minift.pack import Example
from minift.prompts import Chat, Conversation, Pair, Template, TextTemplate
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat import ChatTemplate

SHOWN = 60  # characters of a text in a finding


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
        self._own = _either(own)
        names = [re.escape(name) for name in tokenizer.marker_names if len(name) > 2 and name not in _HTML]
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
        if not blank and not any(turn.learned for turn in turns):
            yield "nothing learned", "no turn is learned"
        found = dict[str, str]()
        for place, turn in enumerate(turns):
            for name, what in self._of_turn(turn.text, turn.role):
                found.setdefault(name, f"turn {place + 1}, the {turn.role}'s: {what}")
        for before, turn in pairwise(turns):
            if (before.role, turn.role) == ("user", "assistant") and repeats(before.text, turn.text):
                found.setdefault("answer repeats its question", _excerpt(turn.text, 0))
        yield from found.items()

    def _of_turn(self, text: str, role: str) -> Iterator[tuple[str, str]]:
        twice = self._own.search(text) if role == "user" else None
        if twice:
            yield "template twice", _excerpt(text, twice.start())
        elif self._markers and (match := self._markers.search(text)):
            yield "markers in the data", _excerpt(text, match.start())
        if broken := _BROKEN.search(text):
            yield "wrong encoding", _excerpt(text, broken.start())
        elif stretch := mojibake(text):
            yield "wrong encoding", _excerpt(text, text.index(stretch))
        if "&" in text and (match := next(filter(_is_entity, _ENTITY.finditer(text)), None)):
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

_FOREIGN = (
    r"<[|\uff5c][A-Za-z0-9_\u2581]{2,40}[|\uff5c]>",
    r"</?(?:start|end)_of_turn>",
    r"\[/?INST\]",
    r"\[(?:TOOL_CALLS|SYSTEM_PROMPT)\]",
    r"<</?SYS>>",
    r"\A\s*<(?:s|bos)>",
    r"<(?:/s|eos)>\s*\Z",
)
_HTML = ("<s>", "</s>", "<u>", "</u>", "<unk>", "<pad>")  # tags of a page, or words about one; see their ends above
_HEADINGS = r"^###\s*(?:Instruction|Input|Response|Human|Assistant|Question|Answer|System|User)\s*:"
_ENTITY = re.compile(r"&(?:([A-Za-z][A-Za-z0-9]{1,20})|#\d{1,7}|#x[0-9A-Fa-f]{1,6});")
_BROKEN = re.compile("[\N{REPLACEMENT CHARACTER}\0\x80-\x9f]")  # and what no text has: NUL, and the controls of C1


def _is_entity(match: re.Match[str]) -> bool:
    return match.group(1) is None or f"{match.group(1)};" in html5


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
    lines = (line.strip() for line in re.split(r"[\n\0]", "\0".join(parts[::2])))
    return list(dict.fromkeys(line for line in lines if len(line) > 3 and any(map(str.isalnum, line))))


def _either(lines: list[str]) -> re.Pattern[str]:
    """Return a pattern of lines: of markers and of long sentences anywhere, of "Human:" at the beginning of a text."""
    patterns = [r"(?!)"]  # it matches nothing
    for line in lines:
        if not line[0].isalpha() or len(line) > 30:
            patterns.append(re.escape(line))
        elif line.endswith(":"):
            patterns.append(rf"\A\s*{re.escape(line)}")
    return re.compile("|".join(patterns))


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
