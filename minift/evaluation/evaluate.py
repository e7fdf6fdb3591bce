"""Is it better? Perplexity, accuracy, exact match and word overlap, for one model or for two side by side.

"The output looks better" becomes a number in two ways. *Likelihood*: how probable are the right answers? Perplexity is
the exponential of the mean loss per target; bits per byte can also be compared between tokenizers; next-token accuracy
is the share of targets to which no other id was preferred. *Generation*: let the model answer, greedily, and compare
its words with the right ones: exactly, exactly but for case, punctuation and articles, or by the words they share (F1)
where an answer may be worded in several ways. Which of them fits is said by a record's `metric`; records that do not
say are scored by all. Every score has its 95 % interval (`evaluation/intervals.py`), and so has the difference of two models.

Both models get the same prompt, to the character.

    minift compare data/base runs/finetune/final --data data/test.jsonl

Source of token F1 and of the normalised match: Rajpurkar et al., "SQuAD" (arXiv 1606.05250), section 6.1. Read next:
`evaluation/choices.py`.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.evaluation.intervals import Score, difference, exponential
from minift.generate import generate
from minift.loss import target_scores
from minift.model import Llama
from minift.pack import IGNORE, Example, collate, encode_pair
from minift.prompts import Pair, Template
from minift.tokenizer.base import Tokenizer

EXTRA_TOKENS = 16  # an answer may be this much longer than the right one before it is cut
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Question:
    """A held-out pair, its ids, and the UTF-8 bytes that its answer's ids stand for."""

    pair: Pair
    example: Example
    n_bytes: int


@dataclass(frozen=True)
class Likelihood:
    """The summed loss of some targets, in nats; their number; how many of them no other id was preferred to; and the
    UTF-8 bytes of text that they stand for."""

    nll: float
    n_targets: int
    n_foremost: int
    n_bytes: int = 0

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(
            self.nll + other.nll,
            self.n_targets + other.n_targets,
            self.n_foremost + other.n_foremost,
            self.n_bytes + other.n_bytes,
        )


def likelihood_scores(likelihoods: Sequence[Likelihood]) -> dict[str, Score]:
    """`perplexity` (per target token), `bits_per_byte` and `next_token_accuracy` of some texts."""
    nll, targets = [one.nll for one in likelihoods], [one.n_targets for one in likelihoods]
    return {
        "perplexity": Score(nll, targets, exponential),
        "bits_per_byte": Score([x / math.log(2) for x in nll], [one.n_bytes for one in likelihoods]),
        "next_token_accuracy": Score([one.n_foremost for one in likelihoods], targets),
    }


@dataclass(frozen=True)
class Answer:
    """A model's own words, and whether it came to an end by itself."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Evaluation:
    """A model on held-out questions.

    Attributes:
        scores: by name; None for one that fits no record.
        answers, likelihoods: of each question, in their order.
    """

    scores: dict[str, Score | None]
    answers: list[Answer]
    likelihoods: list[Likelihood]

    def to_dict(self) -> dict[str, Any]:
        """The scores' values; `n` and `n_token_f1`, how many records they are of; `intervals`, [low, high] of each."""
        counts = {}
        for metric, name in (("exact_match", "n"), ("token_f1", "n_token_f1")):
            score = self.scores[metric]
            counts[name] = 0 if score is None else len(score.parts)
        return {**values(self.scores), **counts}


def values(scores: dict[str, Score | None]) -> dict[str, Any]:
    """Scores as plain numbers, and their `intervals`."""
    return {
        **{name: None if score is None else score.value for name, score in scores.items()},
        "intervals": {name: list(score.interval()) for name, score in scores.items() if score is not None},
    }


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same text, white space at the ends aside."""
    return float(prediction.strip() == answer.strip())


def normalised_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same words: but for case, punctuation, articles and white space."""
    return float(_normalised(prediction) == _normalised(answer))


def _normalised(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, as bags of lower-case words."""
    said, right = Counter(prediction.lower().split()), Counter(answer.lower().split())
    shared = (said & right).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / said.total(), shared / right.total()
    return 2 * precision * recall / (precision + recall)


SCORERS = {
    "exact_match": (exact_match, "exact_match"),
    "exact_match_normalised": (normalised_match, "exact_match"),
    "token_f1": (token_f1, "token_f1"),
}  # each with the `metric` of the records that it fits


def make_questions(
    pairs: Sequence[Pair], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Question], int]:
    """The pairs as prompts and answers in ids, and the number of those that do not fit `max_length`.

    Raises:
        InputError: when none fits.
    """
    encoded = [_question(pair, template, tokenizer, max_length) for pair in pairs]
    questions = [question for question in encoded if question is not None]
    if not questions:
        raise InputError(f"no question and answer fits into {max_length} tokens")
    return questions, len(pairs) - len(questions)


def _question(pair: Pair, template: Template, tokenizer: Tokenizer, max_length: int) -> Question | None:
    example = encode_pair(pair, template, tokenizer, max_length)
    if example is None:
        return None
    return Question(pair, example, len(tokenizer.decode_continuation(example.answer).encode()))


@torch.no_grad()
def example_scores(model: Llama, examples: Sequence[Example], batch_size: int = 64) -> list[Likelihood]:
    """How probable each example's answer is, after its prompt; without the bytes."""
    pad_id = model.config.eos_token_ids[0]
    found: dict[int, Likelihood] = {}
    for group in _groups(sorted(range(len(examples)), key=lambda i: len(examples[i])), batch_size):
        batch = collate([examples[i] for i in group], pad_id, pack=False).to(model.device)
        hidden = model.hidden(batch.tokens, batch.positions)
        nll, foremost = target_scores(hidden, model.head_weight, batch.targets)
        of_rows = (batch.targets != IGNORE).sum(1).tolist()
        for i, row_nll, row_foremost in zip(group, nll.split(of_rows), foremost.split(of_rows), strict=True):
            found[i] = Likelihood(float(row_nll.double().sum()), len(row_nll), int(row_foremost.sum()))
    return [found[i] for i in range(len(examples))]


def answer_likelihoods(model: Llama, questions: Sequence[Question], batch_size: int = 64) -> list[Likelihood]:
    """How probable each right answer is, after its own prompt."""
    scored = example_scores(model, [question.example for question in questions], batch_size)
    return [one + Likelihood(0.0, 0, 0, question.n_bytes) for one, question in zip(scored, questions, strict=True)]


def page_likelihoods(
    model: Llama, stream: DocumentStream, tokenizer: Tokenizer, max_length: int
) -> Iterator[Likelihood]:
    """How probable each document is. One longer than `max_length` is cut into windows that do not see each other.

    Raises:
        InputError: when the stream holds no text.
    """

    def windows() -> Iterator[tuple[Example, int]]:
        for text in stream:
            n_bytes = len(text.encode())
            ids = tokenizer.encode(text, bos=True, eos=True, special=False)
            for start in range(0, len(ids) - 1, max_length):
                window = ids[start : start + max_length + 1]
                yield Example(prompt=window[:1], answer=window[1:]), 0 if start else n_bytes

    document: Likelihood | None = None
    for group in _groups(windows(), 16):
        scored = example_scores(model, [example for example, _ in group])
        for window, (_, n_bytes) in zip(scored, group, strict=True):
            if n_bytes and document is not None:  # a window with bytes is a document's first
                yield document
                document = None
            here = window + Likelihood(0.0, 0, 0, n_bytes)
            document = here if document is None else document + here
    if document is not None:
        yield document


def answer_questions(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int = 64
) -> list[Answer]:
    """The model's own words after each question's prompt, greedily, in the order of `questions`.

    A text ends at EOS, or EXTRA_TOKENS behind the length of the right answer. Questions with answers of similar
    length share a batch, so that short ones do not wait for long ones.
    """
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].example.answer))
    for group in _groups(by_length, batch_size):
        prompts = [questions[i].example.prompt for i in group]
        longest = max(len(questions[i].example.answer) for i in group)
        for i, ids in zip(group, generate(model, prompts, longest + EXTRA_TOKENS), strict=True):
            # The same limit as alone: the group ran on to the longest's.
            limit = len(questions[i].example.answer) + EXTRA_TOKENS
            room = model.config.max_position_embeddings - len(questions[i].example.prompt)
            text = tokenizer.decode_continuation(ids[:limit])
            answers[i] = Answer(text, ended=len(ids) < min(limit, room))
    return [answers[i] for i in range(len(questions))]


def evaluate(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question]) -> Evaluation:
    """All scores of a model on held-out questions, and its answers; where nothing is asked, those are empty."""
    asked = [question for question in questions if question.pair.question]  # of a text, only the likelihood tells
    words = iter(answer_questions(model, tokenizer, asked))
    answers = [next(words) if question.pair.question else Answer("", ended=True) for question in questions]
    scores: dict[str, Score | None] = {}
    for name, (score, metric) in SCORERS.items():
        found = [
            score(answer.text, question.pair.answer)
            for question, answer in zip(questions, answers, strict=True)
            if question.pair.question and question.pair.metric in ("", metric)
        ]
        scores[name] = Score(found, [1.0] * len(found)) if found else None
    likelihoods = answer_likelihoods(model, questions)
    return Evaluation({**scores, **likelihood_scores(likelihoods)}, answers, likelihoods)


def compare(
    before: tuple[Llama, Tokenizer], after: tuple[Llama, Tokenizer], pairs: Sequence[Pair], template: Template
) -> dict[str, Any]:
    """Two models on the same questions.

    Returns:
        `before` and `after`, each as `Evaluation.to_dict` has it; `difference`: for each score its `value`, after less
        before, and the ends of its interval, `low` and `high`; `samples`, each with the `question`, the right `answer`
        and both models' words (`before`, `after`); `skipped`, how many questions did not fit one of the models and
        were left out for both.

    Raises:
        InputError: when none fits both.
    """
    encoded = [
        [_question(pair, template, tokenizer, model.config.max_position_embeddings - 1) for pair in pairs]
        for model, tokenizer in (before, after)
    ]
    fits = [i for i in range(len(pairs)) if encoded[0][i] and encoded[1][i]]
    if not fits:
        raise InputError("no question and answer fits into the positions of both models")
    old, new = (
        evaluate(model, tokenizer, [question for i in fits if (question := asked[i])])
        for (model, tokenizer), asked in zip((before, after), encoded, strict=True)
    )
    differences = {
        name: difference(score, other)
        for name, score in old.scores.items()
        if score is not None and (other := new.scores[name]) is not None
    }
    samples = [
        {
            "question": pairs[i].question,
            "answer": pairs[i].answer,
            "before": first.text.strip(),
            "after": second.text.strip(),
        }
        for i, first, second in zip(fits, old.answers, new.answers, strict=True)
        if pairs[i].question
    ]
    return {
        "before": old.to_dict(),
        "after": new.to_dict(),
        "difference": differences,
        "skipped": len(pairs) - len(fits),
        "samples": samples,
    }


def _groups(items: Sequence[_Item] | Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
