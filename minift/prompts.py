"""Conversations → text: a template writes the turns of a conversation as one text, and says what of it is learned.

A base model only continues text. To finetune it to answer, a question and its answer are written as one text, and the
model is trained on the answer's part of it. So a record is a list of *turns*, each the text of one role, learned or
only given. An instruction pair is two of them, a chat is many. The *template* says how they are written. No template is
the right one: what matters is that training and use agree, to the character.

    plain    What is the capital of Mexico? Mexico City
    qa       ### Question:⏎What is the capital of Mexico?⏎⏎### Answer:⏎Mexico City
    alpaca   Below is an instruction that describes a task. … ### Response:⏎Mexico City
    llama2   [INST] What is the capital of Mexico? [/INST] Mexico City
    llama3   <|start_header_id|>user<|end_header_id|>⏎⏎What is the capital of Mexico?<|eot_id|>…⏎⏎Mexico City
    chat     the model's own (`tokenizer/chat.py`)

A template gives *spans*: stretches of the text, each learned or given. The separator before an answer belongs to the
answer, so that a prompt never ends in white space: in Llama's vocabulary a space is part of the word that follows it. A
template of your own is a text file with `{question}` and `{answer}` in it, and with `{context}` and `{system}` if the
pairs have them: `--template my_template.txt`. See what a model does with a template it was not trained on:

    minift generate --model bundled --template qa --prompt "What is the capital of Mexico?"

Read next: `tokenizer/base.py` and `tokenizer/sentencepiece.py`, then `pack.py`.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from minift.errors import InputError

# Conversations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The text of one role, "system", "user" or "assistant"; and whether it is learned, or only given."""

    role: str
    text: str
    learned: bool = False


@dataclass(frozen=True)
class Pair:
    """An instruction pair: what is asked, and what should be answered.

    Attributes:
        question: "" where nothing is asked: then all of the answer is learned, from BOS on.
        answer: "" where the data has a question without an answer; such a pair has no target.
        context: text that the question is about (Alpaca's `input`), or "".
        system: what the model is told before every question, or "".
        metric: the score that fits the answer, one of `data.conversations.METRICS`; "" when the record does not say.
        where: `file:line`, for messages.
    """

    question: str
    answer: str
    context: str = ""
    system: str = ""
    metric: str = ""
    where: str = ""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The pair as turns, the context in the question's."""
        asked = f"{self.question}\n{self.context}" if self.context else self.question
        system = (Turn("system", self.system),) if self.system else ()
        return *system, Turn("user", asked), Turn("assistant", self.answer, learned=True)

    def exchanges(self) -> list[tuple["Pair", bool]]:
        """Return each question with its answer, and whether that is learned: this pair alone."""
        return [(self, True)]


@dataclass(frozen=True)
class Chat:
    """A conversation of any number of turns. Its `question` and `answer` are those of its last answer."""

    turns: tuple[Turn, ...]
    metric: str = ""
    where: str = ""
    context: str = ""  # a chat has none of its own

    @property
    def system(self) -> str:
        """The text of the system's turn at its beginning, or ""."""
        return self.turns[0].text if self.turns[0].role == "system" else ""

    @property
    def question(self) -> str:
        """The last text of the user before the last answer, or ""."""
        return next((turn.text for turn in reversed(self.until_answer()) if turn.role == "user"), "")

    @property
    def answer(self) -> str:
        """The last answer that is learned; where none is, the last one, or ""."""
        return self.turns[place].text if (place := self._last_answer()) < len(self.turns) else ""

    def until_answer(self) -> tuple[Turn, ...]:
        """Return the turns before the last answer; all, where there is none."""
        return self.turns[: self._last_answer()]

    def _last_answer(self) -> int:
        answers = [(turn.learned, place) for place, turn in enumerate(self.turns) if turn.role == "assistant"]
        return max(answers, default=(False, len(self.turns)))[1]

    def exchanges(self) -> list[tuple[Pair, bool]]:
        """Return each question with its answer, and whether that is learned. The system's text goes with the first.

        Raises InputError when the turns are not a question and an answer, in this order, again and again.
        """
        rest = [turn for place, turn in enumerate(self.turns) if place or turn.role != "system"]
        for place, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[place % 2]:
                found = (
                    f"{self.where or 'a chat'}: turn {place + 1} is the {turn.role}'s; this template needs questions"
                )
                raise InputError(f"{found} and answers in turn (--template chat may not)")
        return [
            (Pair(asked.text, answer.text, system="" if place else self.system, where=self.where), answer.learned)
            for place, (asked, answer) in enumerate(zip(rest[::2], rest[1::2], strict=False))
        ]


Conversation: TypeAlias = Pair | Chat


def has_answer(conversation: Conversation) -> bool:
    """Return whether a conversation has an answer to be learned that is not blank."""
    return any(turn.learned and turn.text.strip() for turn in conversation.turns)


# Templates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A stretch of a conversation's text, learned or given.

    Attributes:
        parts: the text in parts: at even places the template's own, where markers count, at odd ones the data's.
        bos, eos: whether the text begins, ends here, as the tokenizer marks it.
    """

    parts: list[str]
    learned: bool = False
    bos: bool = False
    eos: bool = False

    @property
    def text(self) -> str:
        """The parts, joined."""
        return "".join(self.parts)


class Template(ABC):
    """The way from a conversation to text."""

    @abstractmethod
    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return the texts to train on, each in spans: one, unless the template writes earlier turns anew.

        Of them "all" answers are learned, or only the "last". Raises InputError (`file:line`) where they do not fit.
        """

    @abstractmethod
    def prompt(self, conversation: Conversation) -> list[Span]:
        """Return what a model is given that is to answer the last question. Raises InputError as `examples`."""

    @abstractmethod
    def answer_parts(self, conversation: Conversation) -> list[str]:
        """Return the parts of the last answer, as it follows its prompt, without what ends it."""


@dataclass(frozen=True)
class TextTemplate(Template):
    """The two texts of a pair, with `{question}`, `{context}`, `{answer}` and `{system}` where its fields go.

    A chat is written as pairs, one after the other, each of them from BOS to EOS, as Llama 2's own code does it.

    Attributes:
        question: what the model is given.
        answer: what it learns, separator included.
        question_with_context: what it is given of a pair that has a context.
        system: the text that replaces `{system}` when the pair has a system prompt.
    """

    question: str
    answer: str
    question_with_context: str
    system: str = "{system}\n\n"
    strips: ClassVar[bool] = True  # a prompt never ends in white space

    def examples(self, conversation: Conversation, learn: str = "all") -> list[list[Span]]:
        """Return one text: each question, given, and its answer, learned."""
        exchanges, spans = conversation.exchanges(), list[Span]()
        last = max((place for place, (_, learned) in enumerate(exchanges) if learned), default=0)
        for place, (pair, learned) in enumerate(exchanges):
            question, answer = self.parts(pair)
            is_learned = learned and (learn == "all" or place == last)
            if any(question):
                spans += [Span(question, bos=True), Span(answer, is_learned, eos=True)]
            else:  # nothing is asked: the text is one of its own, as a page is
                spans.append(Span(answer, is_learned, bos=True, eos=True))
        return [spans]

    def prompt(self, conversation: Conversation) -> list[Span]:
        """Return the earlier questions with their answers, and the last question."""
        if isinstance(conversation, Chat):
            conversation = replace(conversation, turns=(*conversation.until_answer(), Turn("assistant", "")))
        (spans,) = self.examples(conversation)
        return spans[:-1] or [Span([""], bos=True)]  # nothing is asked: a text from its beginning

    def answer_parts(self, conversation: Conversation) -> list[str]:
        """Return the parts of the answer, its separator included."""
        return self._fill(self.answer, conversation)

    def parts(self, pair: Pair) -> tuple[list[str], list[str]]:
        """Return the parts of the question and of the answer. Raise InputError as `examples`."""
        text = self.question_with_context if pair.context else self.question
        for name in ("context", "system"):
            if getattr(pair, name) and f"{{{name}}}" not in text:
                raise InputError(f"{pair.where or 'a pair'}: has a {name}, and the template no {{{name}}} for it")
        text = text.replace("{system}", self.system if pair.system else "")
        question, answer = self._fill(text, pair), self.answer_parts(pair)
        if self.strips and len(question) > 1 and not question[-1]:  # it ends in the data's text
            stripped = question[-2].rstrip()
            answer[0] = answer[0] or question[-2][len(stripped) :]
            question[-2] = stripped
        return question, answer

    def _fill(self, text: str, pair: Conversation) -> list[str]:
        parts = re.split(r"\{(question|context|answer|system)\}", text)  # in one pass: braces inside a question stay
        return [getattr(pair, part) if place % 2 else part for place, part in enumerate(parts)]
