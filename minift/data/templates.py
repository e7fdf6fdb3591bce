"""The templates by name, those of a user's own, and the one that fits the data.

`auto` keeps the template that the questions of a file already carry (those of `lamini_docs.jsonl` end in
"### Answer:"). Chats are written in the model's own template, where it has one. For all else it takes `plain`.

    minift data format data/pairs.jsonl
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from minift.errors import InputError, did_you_mean
from minift.prompts import Conversation, Pair, Span, Template, TextTemplate
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.chat import chat_template, has_chat_template

_ALPACA = "Below is an instruction that describes a task"
_LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
_LLAMA3_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
TEMPLATES = {
    "plain": TextTemplate(
        question="{system}{question}",
        question_with_context="{system}{question}\n{context}",
        answer=" {answer}",
    ),
    "qa": TextTemplate(
        question="{system}### Question:\n{question}\n\n### Answer:",
        question_with_context="{system}### Question:\n{question}\n{context}\n\n### Answer:",
        answer="\n{answer}",
    ),
    # Source: Taori et al., "Stanford Alpaca" (2023), the two prompts of its README.
    "alpaca": TextTemplate(
        question=(
            f"{{system}}{_ALPACA}. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Response:"
        ),
        question_with_context=(
            f"{{system}}{_ALPACA}, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Input:\n{context}\n\n### Response:"
        ),
        answer="\n{answer}",
    ),
    # Source: Touvron et al., "Llama 2" (arXiv 2307.09288); the layout is that of Meta's own code, after BOS.
    "llama2": TextTemplate(
        question="[INST] {system}{question} [/INST]",
        question_with_context="[INST] {system}{question}\n{context} [/INST]",
        answer=" {answer}",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
    ),
    # Source: Meta's model card of Llama 3. Its markers are single ids where the tokenizer has them as special tokens.
    "llama3": TextTemplate(
        question=f"{{system}}{_LLAMA3_USER}{{question}}{_LLAMA3_END}",
        question_with_context=f"{{system}}{_LLAMA3_USER}{{question}}\n{{context}}{_LLAMA3_END}",
        answer="\n\n{answer}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    ),
    # The question is the whole prompt already, markers and all.
    "carried": TextTemplate(
        question="{system}{question}", question_with_context="{system}{question}\n{context}", answer="\n{answer}"
    ),
    # The answer brings its separator with it, and its end.
    "joined": TextTemplate(
        question="{system}{question}", question_with_context="{system}{question}\n{context}", answer="{answer}"
    ),
}
TEXT = TextTemplate(question="", question_with_context="", answer="{answer}")  # nothing is asked: a text to learn
_MISTAKEN = ("instruction", "input", "prompt", "response", "output", "completion", "content", "user", "assistant")
MARKERS = {"### Answer:": "qa", "### Response:": "alpaca"}  # the end of a prompt, and the template that writes it


@dataclass(frozen=True)
class RenderedTemplate(TextTemplate):
    """A template for data that are written in a template already: markers in them count, and white space stays.

    BOS and EOS are added, as to any text, but not next to a marker of the data's own.
    """

    markers: tuple[str, ...] = ()
    strips: ClassVar[bool] = False

    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return the text as `TextTemplate` does."""
        (spans,) = super().examples(conversation, learn)
        return [[self._rendered(span) for span in spans]]

    def _rendered(self, span: Span) -> Span:
        bos = span.bos and not span.text.lstrip().startswith(self.markers)
        return replace(span, parts=[span.text], bos=bos, eos=span.eos and not span.text.rstrip().endswith(self.markers))


def read_template(path: str | Path) -> TextTemplate:
    """Read a template from a text file. Its prompt ends before the white space in front of `{answer}`.

    Raises:
        InputError: when the file cannot be read, or does not hold `{question}` and then `{answer}`, once each.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")  # editors end a file with a line break
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for name, least in (("question", 1), ("answer", 1), ("context", 0), ("system", 0)):
        count = text.count(f"{{{name}}}")
        if not least <= count <= 1:
            allowed = "once" if least else "at most once"
            raise InputError(f"{path}: a template must hold {{{name}}} {allowed}; found {count}")
    if other := next((word for word in re.findall(r"\{(\w+)\}", text) if word.lower() in _MISTAKEN), ""):
        known = ", ".join(f"{{{place}}}" for place in ("question", "context", "system", "answer"))
        raise InputError(f"{path}: {{{other}}} is unknown; a template may hold {known}")
    before, answer = text.split("{answer}")
    if any(f"{{{name}}}" in answer for name in ("question", "context", "system")):
        raise InputError(f"{path}: {{answer}} must come last: everything after it would be learned as well")
    prompt = before.rstrip()
    return TextTemplate(prompt, before[len(prompt) :] + "{answer}" + answer, prompt, system="{system}")


def is_chat_template(name: str) -> bool:
    """Return whether a template's name is that of the model's own, or of a `.jinja` file."""
    return name == "chat" or Path(name).suffix == ".jinja"


def passes_over_own(name: str, tokenizer: Tokenizer) -> bool:
    """Return whether the model has a template of its own that the one called `name` is chosen over."""
    return has_chat_template(tokenizer) and name != "text" and not is_chat_template(name)


def template_named(name: str, tokenizer: Tokenizer | None = None, rendered: bool = False) -> Template:
    """Return one of TEMPLATES, TEXT ("text"), the template in a file, or the model's own ("chat").

    Args:
        tokenizer: the model's, which brings its own template.
        rendered: whether markers in the data's text count (`RenderedTemplate`).

    Raises:
        InputError: for any other name; for "chat" and a `.jinja` file as `chat_template` does.
    """
    if is_chat_template(name):
        if tokenizer is None:
            raise InputError(f"the template {name} is that of a model: none is given")
        return chat_template(tokenizer, None if name == "chat" else name, rendered)
    if name in TEMPLATES or name == "text" or Path(name).suffix == ".txt":
        template = read_template(name) if Path(name).suffix == ".txt" else TEMPLATES.get(name, TEXT)
        markers = tokenizer.marker_names if tokenizer else ()
        return RenderedTemplate(**vars(template), markers=markers) if rendered else template
    known = f"auto, chat, {', '.join(TEMPLATES)}, or a file of your own (.txt, .jinja)"
    raise InputError(f"unknown template {name!r}{did_you_mean(name, ('auto', 'chat', *TEMPLATES))}; known: {known}")


def carried_template(question: str) -> str:
    """Return the name of the template that a question already carries, by the marker it ends in; "" for none."""
    question = question.rstrip()
    return next((name for marker, name in MARKERS.items() if question.endswith(marker)), "")


def _natural_template(conversation: Conversation) -> str:
    """Return the name of the template that adds nothing to a conversation but the separator before its answer."""
    if isinstance(conversation, Pair) and not conversation.question:
        return "text"
    return "carried" if carried_template(conversation.question) else "plain"


def choose_template(
    name: str, conversations: Sequence[Conversation], tokenizer: Tokenizer | None = None, rendered: bool = False
) -> str:
    """Return the name of the template for all conversations: `name` itself, or for "auto" the one that fits best.

    That is the model's own for chats, if it has one; else the one that adds least, nothing if the data are `rendered`.

    Raises:
        InputError: for an unknown name; when only some of the records have a question, or only some of the questions
            carry a template; when `name` would put a second template around the one they carry, or one around nothing.
    """
    if name != "auto":
        template_named(name, tokenizer)
    where = {_natural_template(one): one.where for one in reversed(conversations)}  # the first one of each kind
    if "text" in where:
        if len(where) > 1:
            raise InputError(f"{where['text']}: has no question, as other pairs have; add one, or take the record out")
        if name not in ("auto", "text"):
            raise InputError(f"{where['text']}: asks nothing that could be put into the template {name} (use auto)")
        return "text"
    if name == "text" and conversations:
        first = conversations[0].where or "the record"
        raise InputError(f"{first}: has a question, which the template text would leave out (use auto)")
    pairs = all(isinstance(one, Pair) for one in conversations)
    if rendered and conversations and pairs and is_chat_template(name):
        raise InputError(f"--rendered says that the data are written in a template, and --template {name} writes one")
    if name == "auto":
        if not pairs and tokenizer is not None and has_chat_template(tokenizer):
            return "chat"
        answers = [one.answer for one in conversations if one.answer.strip()]
        if pairs and answers and (rendered or all(answer[0].isspace() for answer in answers)):
            return "joined"
        if len(where) > 1:
            raise InputError(
                f"{where['plain']}: does not end in {' or '.join(MARKERS)}, as that of {where['carried']} does; "
                "mend one of the two, or give --template plain"
            )
        _check_carried(conversations if "carried" in where else [])
        return next(iter(where), "plain")
    if "carried" in where and name not in ("plain", "carried"):
        raise InputError(
            f"{where['carried']}: the question already carries a template; "
            f"--template {name} would put a second one around it (use auto)"
        )
    _check_carried(conversations if "carried" in where else [])
    return name


def _check_carried(conversations: Sequence[Conversation]) -> None:
    """Raise InputError for a question that carries a template and has a context, which would come after its end."""
    for one in conversations:
        if one.context:
            raise InputError(
                f"{one.where or 'a pair'}: the question carries a template already, and has no place for the context "
                "of the record; write it into the question, or leave it out"
            )


# The template and what it is used with --------------------------------------------------------------------------------


class Representatives:
    """The first conversation of each kind that `choose_template` tells apart: enough for it, however many there are."""

    def __init__(self) -> None:
        self._first: dict[tuple[object, ...], Conversation] = {}

    def add(self, conversation: Conversation) -> None:
        """Keep a conversation if it is the first of its kind."""
        answer = conversation.answer
        kind = (type(conversation), _natural_template(conversation), bool(answer.strip()), answer[:1].isspace())
        self._first.setdefault(kind, conversation)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._first.values())


MARKER = re.compile(r"<\|[^|>\s]+\|>|</?s>|</?(?:start|end)_of_turn>|</?\|?[a-z]+_of_[a-z]+\|?>")


def unknown_markers(template: Template, tokenizer: Tokenizer) -> list[str]:
    """Return the markers, such as `<|eot_id|>`, that a template of text writes and the tokenizer has no token for.

    They are cut into several ids, which a model must learn first, and which are not what it was trained with. Words in
    square brackets are not named: `[INST]` is text in Llama 2's own layout.
    """
    if not isinstance(template, TextTemplate):  # a chat template belongs to its tokenizer
        return []
    text = "".join((template.question, template.question_with_context, template.answer, template.system))
    found = dict.fromkeys(MARKER.findall(text))
    return [marker for marker in found if len(tokenizer.encode(marker, bos=False)) > 1]
