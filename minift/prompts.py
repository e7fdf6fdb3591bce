"""Instruction records → (prompt, answer): which fields hold them, and which text a template makes of them.

A base model only continues text. To finetune it to answer, a question and its answer are written as one text, and the
model is trained on the answer's part of it. *How* they are written is the template, and there is no right one: what
matters is that training and use agree, to the character. Here a template is two strings; `prompt + answer` is exactly
the text that the model sees. A prompt never ends in a space or newline (the separator belongs to the answer), because
in Llama's vocabulary a space is part of the word that follows it.

    plain    What is the capital of Mexico? Mexico City
    qa       ### Question:⏎What is the capital of Mexico?⏎⏎### Answer:⏎Mexico City
    alpaca   Below is an instruction that describes a task. … ### Response:⏎Mexico City

`auto` keeps the template that the questions of a file already carry (`lamini_docs.jsonl` ends each of them in
"### Answer:"), and takes `plain` where they carry none. See what a model makes of a template it was not trained with:

    minift generate --model bundled --template qa --prompt "What is the capital of Mexico?"

Read next: `pack.py`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minift.errors import InputError
from minift.records import Record, Skipped, find_files, scan

# The names under which data sets hold a question and its answer, in the order in which they are looked for.
FIELDS = (
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("input", "output"),
)
CARRIED_MARKERS = ("### Answer:", "### Response:")
METRICS = ("exact_match", "token_f1")


@dataclass(frozen=True)
class Pair:
    """One instruction record: what is asked, what should be answered.

    Attributes:
        answer: "" where a data set holds a question that nobody answered; such a pair has no target.
        context: extra text that the question speaks of (Alpaca's `input`), or "".
        metric: the score that fits the answer, one of METRICS; "" when the record does not say.
        where: `file:line`, for messages.
    """

    question: str
    answer: str
    context: str = ""
    metric: str = ""
    where: str = ""


@dataclass(frozen=True)
class Template:
    """How a pair becomes text. The strings hold `{question}`, `{context}` and `{answer}`."""

    prompt: str
    answer: str
    prompt_with_context: str

    def format(self, pair: Pair) -> tuple[str, str]:
        """The (prompt, answer) texts of a pair. Their concatenation is what the model reads."""
        prompt = self.prompt_with_context if pair.context else self.prompt
        return _fill(prompt, pair), _fill(self.answer, pair)


def _fill(text: str, pair: Pair) -> str:
    # One pass, so that braces inside a question stay what they are.
    values = {"question": pair.question, "context": pair.context, "answer": pair.answer}
    return re.sub(r"\{(question|context|answer)\}", lambda match: values[match[1]], text)


TEMPLATES = {
    "plain": Template(
        prompt="{question}",
        prompt_with_context="{question}\n{context}",
        answer=" {answer}",
    ),
    "qa": Template(
        prompt="### Question:\n{question}\n\n### Answer:",
        prompt_with_context="### Question:\n{question}\n{context}\n\n### Answer:",
        answer="\n{answer}",
    ),
    "alpaca": Template(
        prompt=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Response:"
        ),
        prompt_with_context=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Input:\n{context}\n\n### Response:"
        ),
        answer="\n{answer}",
    ),
    # The question is the whole prompt already, markers and all.
    "carried": Template(prompt="{question}", prompt_with_context="{question}\n{context}", answer="\n{answer}"),
}


def read_pairs(path: str | Path, skipped: Skipped | None = None) -> list[Pair]:
    """The instruction pairs of a JSON Lines file, in order.

    Args:
        skipped: counts what cannot be used; by default the first such record is raised.

    Raises:
        InputError: for an unreadable file, invalid JSON (`file:line`), a record whose fields are not there or not
            text, a blank question, as far as `skipped` does not bear it; for a file without records.
    """
    skipped = skipped or Skipped(strict=True)
    pairs: list[Pair] = []
    before = skipped.skipped
    for item in scan_pairs(scan(path)):
        skipped.records += 1
        if isinstance(item, InputError):
            skipped.add(item)
        else:
            pairs.append(item)
    if not pairs and skipped.skipped == before:
        raise InputError(f"{path}: holds no records")
    return pairs


def scan_pairs(items: Iterable[Record | InputError]) -> Iterator[Pair | InputError]:
    """The pairs of scanned records and, in the places of those that are none, what is wrong with them.

    The first pair's fields are those of all.
    """
    fields: tuple[str, str] | None = None
    for item in items:
        if isinstance(item, InputError):
            yield item
            continue
        try:
            pair, fields = read_pair(item, fields)
        except InputError as fault:
            yield fault
        else:
            yield pair


def read_all_pairs(sources: Iterable[str | Path], skipped: Skipped | None = None) -> list[Pair]:
    """The pairs of several files, globs or folders. Raises what `find_files`, `read_pairs` and `skipped` raise."""
    skipped = skipped or Skipped(strict=True)
    pairs = [pair for file in find_files(sources) for pair in read_pairs(file, skipped)]
    skipped.check()
    return pairs


def has_pair(record: Record) -> bool:
    """Whether a record holds a question and an answer under one of the names in FIELDS."""
    return any(question in record.values and answer in record.values for question, answer in FIELDS)


def find_fields(record: Record) -> tuple[str, str]:
    """The names under which a record holds its question and its answer, from FIELDS.

    Raises:
        InputError: when it has neither of the known combinations; the message lists the keys that are there.
    """
    for question, answer in FIELDS:
        if question in record.values and answer in record.values:
            return question, answer
    known = ", ".join(f"{question}/{answer}" for question, answer in FIELDS)
    raise InputError(f"{record.where}: no usable fields in {sorted(record.values)}; known: {known}")


def read_pair(record: Record, fields: tuple[str, str] | None = None) -> tuple[Pair, tuple[str, str]]:
    """The pair of a record, and the names of the fields in which it stood.

    Args:
        fields: in which it must stand; by default the first of FIELDS that fit.

    Raises:
        InputError: with `file:line`, when a field is not there or not text, or the question is blank.
    """
    question_field, answer_field = fields or find_fields(record)

    def text(key: str) -> str:
        value = record.values.get(key)
        if not isinstance(value, str):
            state = "missing" if key not in record.values else f"{type(value).__name__}, not a text"
            raise InputError(f"{record.where}: {key!r} is {state}")
        return value

    if not text(question_field).strip():
        raise InputError(f"{record.where}: {question_field!r} is blank")
    has_context = question_field == "instruction" and record.values.get("input")
    metric = record.values.get("metric", "")
    if metric not in ("", *METRICS):
        raise InputError(f"{record.where}: metric is {metric!r}; known: {', '.join(METRICS)}")
    pair = Pair(
        question=text(question_field).rstrip(),
        answer=text(answer_field).strip(),
        context=text("input").rstrip() if has_context else "",
        metric=metric,
        where=record.where,
    )
    return pair, (question_field, answer_field)


def templates_for(pair: Pair) -> list[str]:
    """The templates that a pair may be put into: its own, if its question carries one, or any of the others."""
    if pair.question.endswith(CARRIED_MARKERS):
        return ["carried"]
    return [name for name in TEMPLATES if name != "carried"]


def choose_template(name: str, pairs: Sequence[Pair]) -> str:
    """The name of the template to use: `name` itself, or for "auto" what the questions call for.

    Raises:
        InputError: for an unknown name; when only some of the questions carry a template; when `name` would put a
            second template around the one they carry.
    """
    if name != "auto" and name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; known: auto, {', '.join(TEMPLATES)}")
    carrying = [pair.question.endswith(CARRIED_MARKERS) for pair in pairs]
    if name == "auto":
        if any(carrying) and not all(carrying):
            odd = pairs[carrying.index(False)]
            raise InputError(
                f"{odd.where}: does not end in {' or '.join(CARRIED_MARKERS)} as other questions of the file do; "
                "mend it, or choose a --template"
            )
        return "carried" if any(carrying) else "plain"
    if name not in ("plain", "carried") and any(carrying):
        raise InputError(
            f"{pairs[carrying.index(True)].where}: the question already carries a template; "
            f"--template {name} would put a second one around it (use auto)"
        )
    return name
