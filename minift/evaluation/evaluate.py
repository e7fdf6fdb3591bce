"""Score a model on held-out pairs, or two models side by side: by likelihood, and by their own words.

"The output looks better" becomes a number in two ways.

* *Likelihood*: how probable are the right answers? (`evaluation/likelihood.py`)
* *Generation*: the model answers, greedily, and its words are compared with the right ones: exactly; exactly except for
  case, punctuation and articles; or by the words that both share (F1), where an answer may be worded in several ways.
  A record's `metric` says which of them fits; a record without one is scored by all.

Every score has its 95 % interval (`evaluation/intervals.py`), and so has the difference of two models. Both models get
the same prompt, to the character.

    minift compare bundled runs/finetune/final --data data/test.jsonl

Source of token F1 and of the normalised match: Rajpurkar et al., "SQuAD" (arXiv 1606.05250), section 6.1.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from minift.errors import InputError
from minift.evaluation.intervals import Score, difference, score_values
from minift.evaluation.likelihood import Likelihood, example_likelihoods, in_groups, likelihood_scores
from minift.generate import generate
from minift.model import Llama
from minift.pack import Example, encode_conversation
from minift.prompts import Chat, Conversation, Template, has_answer
from minift.tokenizer.base import Tokenizer

EXTRA_TOKENS = 16  # an answer may be this much longer than the right one before it is cut


@dataclass(frozen=True)
class Question:
    """A held-out pair or chat, its ids up to its last answer, and the UTF-8 bytes of the text that the answer is."""

    pair: Conversation
    example: Example
    n_bytes: int


def make_questions(
    pairs: Sequence[Conversation], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Question], int]:
    """Return the pairs as prompts and answers in ids, and how many of them do not fit `max_length` or the template.

    Raises:
        InputError: when none fits.
    """
    encoded = [_question(pair, template, tokenizer, max_length) for pair in pairs]
    questions = [question for question in encoded if question is not None]
    if not questions:
        raise InputError(_why_none(pairs, template, max_length))
    return questions, len(pairs) - len(questions)


def _why_none(pairs: Sequence[Conversation], template: Template, max_length: int) -> str:
    """Return why none of the pairs can be asked: the first one's reason."""
    for pair in pairs:
        try:
            template.examples(pair, "last")
        except InputError as fault:
            return str(fault)
    if not any(map(has_answer, pairs)):
        return f"{pairs[0].where}: no record has an answer to be scored"
    return f"no question and answer fits into {max_length} tokens"


def _question(pair: Conversation, template: Template, tokenizer: Tokenizer, max_length: int) -> Question | None:
    try:
        example = encode_conversation(pair, template, tokenizer, max_length, learn="last")[-1]
    except InputError:  # the template has no place for it
        return None
    if example is None:
        return None
    pieces = zip(example.answer, tokenizer.pieces(example.answer), strict=True)
    words = [id for id, piece in pieces if piece not in tokenizer.marker_names]  # a marker is no text
    return Question(pair, example, len(tokenizer.decode_continuation(words).encode()))


def answer_likelihoods(model: Llama, questions: Sequence[Question], batch_size: int = 64) -> list[Likelihood]:
    """Return the likelihood of each right answer after its own prompt."""
    likelihoods = example_likelihoods(model, [question.example for question in questions], batch_size)
    n_bytes = [Likelihood(0.0, 0, 0, question.n_bytes) for question in questions]
    return [likelihood + more for likelihood, more in zip(likelihoods, n_bytes, strict=True)]


# The model's own words ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A model's own words, and whether it chose a stop token before they were cut off."""

    text: str
    ended: bool


def answer_questions(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int = 64, plain: bool = False
) -> list[Answer]:
    """Return the model's own words after each question's prompt, greedily, in the order of `questions`.

    A text ends at a stop token, at the model's last position, or EXTRA_TOKENS after the length of the right answer.
    Questions with answers of similar length share a batch, so that short ones do not wait for long ones. A terminal
    shows a bar of them.
    """
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].example.answer))
    bar = tqdm(total=len(questions), desc="answering", unit="question", leave=False, disable=None)
    for group in in_groups(by_length, batch_size):
        prompts = [questions[i].example.prompt for i in group]
        longest = max(len(questions[i].example.answer) for i in group)
        for i, ids in zip(group, generate(model, prompts, longest + EXTRA_TOKENS, plain=plain), strict=True):
            # Each text is cut where it would be alone: the group went on to the limit of its longest answer.
            positions_left = model.config.max_position_embeddings - len(questions[i].example.prompt)
            limit = len(questions[i].example.answer) + EXTRA_TOKENS
            text = tokenizer.decode_continuation(ids[:limit])
            answers[i] = Answer(text, ended=len(ids) < min(limit, positions_left))
        bar.update(len(group))
    bar.close()
    return [answers[i] for i in range(len(questions))]


def exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 if the two are the same text, except for white space at the ends; else 0.0."""
    return float(prediction.strip() == answer.strip())


def normalised_match(prediction: str, answer: str) -> float:
    """Return 1.0 if the two are the same words, except for case, punctuation, articles and white space; else 0.0."""
    return float(_normalised(prediction) == _normalised(answer))


def _normalised(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over words, as bags of lower-case words."""
    predicted_words, answer_words = Counter(prediction.lower().split()), Counter(answer.lower().split())
    shared = (predicted_words & answer_words).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / predicted_words.total(), shared / answer_words.total()
    return 2 * precision * recall / (precision + recall)


SCORERS = {
    "exact_match": (exact_match, "exact_match"),
    "exact_match_normalised": (normalised_match, "exact_match"),
    "token_f1": (token_f1, "token_f1"),
}  # each with the `metric` of the records that it fits


# One model, and two ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A model's results on held-out questions.

    Attributes:
        scores: by name; None for one that fits no record.
        answers, likelihoods: of each question, in their order.
    """

    scores: dict[str, Score | None]
    answers: list[Answer]
    likelihoods: list[Likelihood]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores' values, their `intervals`, and of how many records they are: `n` and `n_token_f1`."""
        counts = {}
        for metric, name in (("exact_match", "n"), ("token_f1", "n_token_f1")):
            score = self.scores[metric]
            counts[name] = 0 if score is None else len(score.parts)
        return {**score_values(self.scores), **counts}


def evaluate(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], plain: bool = False) -> Evaluation:
    """Return all scores of a model on held-out questions, and its answers.

    A pair without a question is a text: only its likelihood is scored, and its answer is empty.

    Args:
        plain: as `generate` takes it.
    """
    with_question = [question for question in questions if question.pair.question]
    words = iter(answer_questions(model, tokenizer, with_question, plain=plain))
    answers = [next(words) if question.pair.question else Answer("", ended=True) for question in questions]
    scores: dict[str, Score | None] = {}
    for name, (scorer, metric) in SCORERS.items():
        parts = [
            scorer(answer.text, question.pair.answer)
            for question, answer in zip(questions, answers, strict=True)
            if question.pair.question and question.pair.metric in ("", metric)
        ]
        scores[name] = Score(parts, [1.0] * len(parts), is_share=True) if parts else None
    likelihoods = answer_likelihoods(model, questions)
    return Evaluation({**scores, **likelihood_scores(likelihoods)}, answers, likelihoods)


def compare(
    before: tuple[Llama, Tokenizer],
    after: tuple[Llama, Tokenizer],
    pairs: Sequence[Conversation],
    template: Template,
    plain: bool = False,
) -> dict[str, Any]:
    """Evaluate two models on the same questions: those that fit the positions of both.

    Args:
        plain: as `generate` takes it.

    Returns:
        `before` and `after`: each as `Evaluation.to_dict` returns it. `difference`: for each score its `value`, after
        minus before, and the ends of its interval, `low` and `high`. `samples`: for each question, the `question`, the
        right `answer` and both models' words (`before`, `after`), each with whether it ended before it was cut
        (`before_ended`, `after_ended`), of a chat also the `earlier` turns. `skipped`: the number of questions that do
        not fit.

    Raises:
        InputError: when no question fits both.
    """
    encoded = [
        [_question(pair, template, tokenizer, model.config.max_position_embeddings - 1) for pair in pairs]
        for model, tokenizer in (before, after)
    ]
    fits = [i for i in range(len(pairs)) if encoded[0][i] and encoded[1][i]]
    if not fits:
        positions = min(model.config.max_position_embeddings for model, _ in (before, after))
        raise InputError(_why_none(pairs, template, positions - 1))
    old, new = (
        evaluate(model, tokenizer, [question for i in fits if (question := questions[i])], plain)
        for (model, tokenizer), questions in zip((before, after), encoded, strict=True)
    )
    differences = {
        name: difference(score, other)
        for name, score in old.scores.items()
        if score is not None and (other := new.scores[name]) is not None
    }
    return {
        "before": old.to_dict(),
        "after": new.to_dict(),
        "difference": differences,
        "skipped": len(pairs) - len(fits),
        "samples": _samples([pairs[i] for i in fits], old.answers, new.answers),
    }


def _samples(pairs: Sequence[Conversation], before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return each question with its right answer and both models' words, and what was said before it in a chat."""
    return [
        {
            "question": pair.question,
            "answer": pair.answer,
            "before": old.text.strip(),
            "before_ended": old.ended,
            "after": new.text.strip(),
            "after_ended": new.ended,
            **_earlier(pair),
        }
        for pair, old, new in zip(pairs, before, after, strict=True)
        if pair.question
    ]


def _earlier(pair: Conversation) -> dict[str, Any]:
    turns = pair.until_answer()[:-1] if isinstance(pair, Chat) else ()
    return {"earlier": [{"role": turn.role, "text": turn.text} for turn in turns]} if turns else {}
