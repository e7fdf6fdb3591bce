"""Score multiple choice: the answer that a model finds likeliest is its choice.

A benchmark such as ARC gives a question and four answers. The model is not asked to say a letter: each answer follows
the question as its answer does in training, and the log-probabilities of the answer's ids are summed. The answer with
the largest sum is the model's choice.

Sums favour short answers, because every further id lowers the sum. So there is a second score, which divides each sum
by the bytes of its answer. (To divide by its ids would depend on the tokenizer.) Which of the two is fairer depends on
the answers. Tables of results usually call them "acc" and "acc_norm".

    {"question": "Which gas do plants take in?", "choices": ["carbon dioxide", "helium"], "answer": 0}
    {"question": …, "choices": {"text": ["carbon dioxide", "helium"], "label": ["A", "B"]}, "answerKey": "A"}

    minift evaluate --model bundled --data arc.jsonl

Source: Clark et al., "ARC" (arXiv 1803.05457); Brown et al., "GPT-3" (arXiv 2005.14165), section 2.4, on normalising.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minift.data.records import Record
from minift.errors import InputError
from minift.evaluation.intervals import Score
from minift.evaluation.likelihood import example_likelihoods
from minift.model import Llama
from minift.pack import Example, encode_prompt
from minift.prompts import Pair, Template
from minift.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, the choices, and the place of the right one (from 0)."""

    question: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""


def has_choices(record: Record) -> bool:
    """Return whether a record is a multiple-choice question."""
    return "choices" in record.values and "question" in record.values


def read_choices(records: Iterable[Record]) -> list[ChoiceQuestion]:
    """Return the multiple-choice questions of some records, in order.

    Raises:
        InputError: with `file:line`, for a record that is not one; when there is no record.
    """
    questions = [_read_choice(record) for record in records]
    if not questions:
        raise InputError("no multiple-choice question to score")
    return questions


def _read_choice(record: Record) -> ChoiceQuestion:
    """Return the question of a record, in either of the two forms above."""
    values, where = record.values, record.where
    for key in ("question", "choices"):
        if key not in values:
            raise InputError(f"{where}: no key {key!r}; its keys: {', '.join(values) or 'none'}")
    question = values["question"]
    choices: Any = values["choices"]
    labels: Any = [chr(ord("A") + i) for i in range(26)]
    labelled = isinstance(choices, dict)
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: 'question' is not a text, or blank")
    if not _are_texts(choices) or len(choices) < 2:
        raise InputError(f"{where}: 'choices' must be at least two texts, or have them under 'text'")
    if not _are_texts(labels) or (labelled and len(labels) != len(choices)):
        raise InputError(f"{where}: 'choices' must have a 'label' for each 'text'")
    answer = values.get("answer", values.get("answerKey"))
    return ChoiceQuestion(question.rstrip(), tuple(choices), _index(answer, choices, labels, where), where)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _index(answer: Any, choices: Sequence[str], labels: Sequence[str], where: str) -> int:
    """Return the place of the choice that an answer names: by its place, its label, or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    for names in (labels[: len(choices)], choices):
        if isinstance(answer, str) and names.count(answer) == 1:
            return names.index(answer)
    raise InputError(f"{where}: 'answer' is {answer!r}; it must be a place (from 0), a label or the text of a choice")


def choose(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion], template: Template, batch_size: int = 64
) -> list[list[tuple[float, int]]]:
    """Return the summed log-probability in nats, and the bytes of its text, of each choice of each question.

    Raises:
        InputError: with `file:line`, for a question that is too long for the model.
    """
    limit = model.config.max_position_embeddings
    examples = [example for one in questions for example in _examples(one, template, tokenizer, limit)]
    sizes = [len(choice.strip().encode()) for question in questions for choice in question.choices]
    likelihoods = example_likelihoods(model, examples, batch_size)
    log_probabilities = iter([(-each.nll, size) for each, size in zip(likelihoods, sizes, strict=True)])
    return [[next(log_probabilities) for _ in question.choices] for question in questions]


def fitting_questions(
    questions: Sequence[ChoiceQuestion], template: Template, tokenizer: Tokenizer, positions: int
) -> tuple[list[ChoiceQuestion], int]:
    """Return the questions that fit a model's positions with each of their choices, and how many do not.

    Raises:
        InputError: with `file:line` of the first question, when none fits.
    """
    fitting, fault = list[ChoiceQuestion](), None
    for question in questions:
        try:
            _examples(question, template, tokenizer, positions)
            fitting.append(question)
        except InputError as error:
            fault = fault or error
    if not fitting and fault is not None:
        raise fault
    return fitting, len(questions) - len(fitting)


def _examples(question: ChoiceQuestion, template: Template, tokenizer: Tokenizer, positions: int) -> list[Example]:
    """Return the question with each of its choices as ids. Raises InputError when one takes too many positions."""
    examples = []
    for choice in question.choices:
        pair = Pair(question.question, choice.strip(), where=question.where)
        # Without an end: the question is not whether the answer ends here.
        answer = tokenizer.encode_continuation(template.answer_parts(pair))
        example = Example(encode_prompt(template.prompt(pair), tokenizer), answer)
        if len(example) > positions:
            raise InputError(f"{question.where}: takes {len(example)} positions; the model has {positions}")
        examples.append(example)
    return examples


def choice_scores(
    questions: Sequence[ChoiceQuestion], found: Sequence[Sequence[tuple[float, int]]]
) -> dict[str, Score]:
    """Return `accuracy`, by the sums, and `accuracy_normalised`, by the sums divided by the bytes.

    Args:
        found: as `choose` returns it. Of equal choices the first is the model's.
    """
    right: dict[str, list[float]] = {"accuracy": [], "accuracy_normalised": []}
    for question, choices in zip(questions, found, strict=True):
        sums = [total for total, _ in choices]
        means = [total / size for total, size in choices]
        right["accuracy"].append(float(sums.index(max(sums)) == question.answer))
        right["accuracy_normalised"].append(float(means.index(max(means)) == question.answer))
    return {name: Score(parts, [1.0] * len(parts), is_share=True) for name, parts in right.items()}
