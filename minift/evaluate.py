"""Is it better? Perplexity, bits per byte, exact match and token F1, for one model or for two side by side.

"The output looks better" becomes a number in two ways. *Likelihood*: how probable are the right answers? Perplexity is
the exponential of the mean loss per target; bits per byte can also be compared between tokenizers. *Generation*: let
the model answer, greedily, and compare its words with the right ones: exactly, or by the words they share (F1) where an
answer may be worded in several ways. Which of the two fits is said by a record's `metric`; records that do not say are
scored by both.

Both models get the same prompt, to the character.

    minift compare data/base runs/finetune/final --data data/test.jsonl

Source of token F1: Rajpurkar et al., "SQuAD" (arXiv 1606.05250), section 6.1. Read next: `reference.py`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from minift.errors import InputError
from minift.generate import generate
from minift.loss import next_token_loss
from minift.model import Llama
from minift.pack import Batch, Example, collate, encode_pair
from minift.prompts import Pair, Template
from minift.stream import DocumentStream
from minift.tokenizer import Tokenizer

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
    """The summed loss of some targets, in nats; their number; the UTF-8 bytes of text that they stand for."""

    nll: float
    n_targets: int
    n_bytes: int

    def scores(self) -> dict[str, float]:
        """`perplexity` (per target token) and `bits_per_byte`."""
        mean = self.nll / self.n_targets
        return {
            # Beyond this the exponential is no longer a float; the model is then worse than any vocabulary's guess.
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": self.nll / math.log(2) / max(1, self.n_bytes),
        }


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same text, white space at the ends aside."""
    return float(prediction.strip() == answer.strip())


def token_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, as bags of lower-case words."""
    said, right = Counter(prediction.lower().split()), Counter(answer.lower().split())
    shared = (said & right).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / said.total(), shared / right.total()
    return 2 * precision * recall / (precision + recall)


SCORERS = {"exact_match": exact_match, "token_f1": token_f1}


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
def answer_likelihood(model: Llama, questions: Sequence[Question], batch_size: int = 64) -> Likelihood:
    """How probable the right answers are, each after its own prompt."""
    device, pad_id = model.device, model.config.eos_token_ids[0]
    nll = 0.0
    for group in _groups(sorted(questions, key=lambda question: len(question.example)), batch_size):
        batch = collate([question.example for question in group], pad_id, pack=False).to(device)
        nll += float(_nll(model, batch))
    n_targets = sum(len(question.example.answer) for question in questions)
    n_bytes = sum(question.n_bytes for question in questions)
    return Likelihood(nll, n_targets, n_bytes)


@torch.no_grad()
def page_likelihood(model: Llama, stream: DocumentStream, tokenizer: Tokenizer, max_length: int) -> Likelihood:
    """How probable whole documents are. One longer than `max_length` is cut into windows that do not see each other.

    Raises:
        InputError: when the stream holds no text.
    """
    device, pad_id = model.device, model.config.eos_token_ids[0]
    nll, n_targets, n_bytes = 0.0, 0, 0

    def windows() -> Iterator[Example]:
        nonlocal n_bytes
        for text in stream:
            n_bytes += len(text.encode())
            ids = tokenizer.encode(text, bos=True, eos=True, special=False)
            for start in range(0, len(ids) - 1, max_length):
                window = ids[start : start + max_length + 1]
                yield Example(prompt=window[:1], answer=window[1:])

    for group in _groups(windows(), 16):
        batch = collate(group, pad_id, pack=False).to(device)
        nll += float(_nll(model, batch))
        n_targets += batch.n_targets
    return Likelihood(nll, n_targets, n_bytes)


def answer_questions(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int = 64
) -> list[str]:
    """The model's own words after each question's prompt, greedily, in the order of `questions`.

    A text ends at EOS, or EXTRA_TOKENS behind the length of the right answer. Questions with answers of similar
    length share a batch, so that short ones do not wait for long ones.
    """
    answers: dict[int, str] = {}
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].example.answer))
    for group in _groups(by_length, batch_size):
        prompts = [questions[i].example.prompt for i in group]
        longest = max(len(questions[i].example.answer) for i in group)
        for i, ids in zip(group, generate(model, prompts, longest + EXTRA_TOKENS), strict=True):
            # The same limit as alone: the group ran on to the longest's.
            limit = len(questions[i].example.answer) + EXTRA_TOKENS
            answers[i] = tokenizer.decode_continuation(ids[:limit])
    return [answers[i] for i in range(len(questions))]


def evaluate(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question]) -> tuple[dict[str, Any], list[str]]:
    """All scores of a model on held-out questions, and its answers.

    Returns:
        scores: `exact_match` with its `n`, `token_f1` with its `n_token_f1`, `perplexity`, `bits_per_byte`. A score
            that fits no record is None.
        answers: the model's words, in the order of `questions`; "" where nothing is asked.
    """
    asked = [question for question in questions if question.pair.question]  # of a text, only the likelihood tells
    words = iter(answer_questions(model, tokenizer, asked))
    answers = [next(words) if question.pair.question else "" for question in questions]
    scores: dict[str, Any] = {}
    for metric, score in SCORERS.items():
        values = [
            score(answer, question.pair.answer)
            for question, answer in zip(questions, answers, strict=True)
            if question.pair.question and question.pair.metric in ("", metric)
        ]
        scores[metric] = sum(values) / len(values) if values else None
        scores["n" if metric == "exact_match" else f"n_{metric}"] = len(values)
    return {**scores, **answer_likelihood(model, questions).scores()}, answers


def compare(
    before: tuple[Llama, Tokenizer], after: tuple[Llama, Tokenizer], pairs: Sequence[Pair], template: Template
) -> dict[str, Any]:
    """Two models on the same questions: `before` and `after`, each as `evaluate` scores it, and `samples`.

    Each sample has the `question`, the right `answer` and both models' words (`before`, `after`). A question that
    does not fit one of the models is left out for both and counted in `skipped`.
    """
    encoded = [
        [_question(pair, template, tokenizer, model.config.max_position_embeddings - 1) for pair in pairs]
        for model, tokenizer in (before, after)
    ]
    fits = [i for i in range(len(pairs)) if encoded[0][i] and encoded[1][i]]
    if not fits:
        raise InputError("no question and answer fits into the positions of both models")
    results, words = [], []
    for (model, tokenizer), asked in zip((before, after), encoded, strict=True):
        scores, answers = evaluate(model, tokenizer, [question for i in fits if (question := asked[i])])
        results.append(scores)
        words.append(answers)
    samples = [
        {"question": pairs[i].question, "answer": pairs[i].answer, "before": old.strip(), "after": new.strip()}
        for i, old, new in zip(fits, *words, strict=True)
        if pairs[i].question
    ]
    return {"before": results[0], "after": results[1], "skipped": len(pairs) - len(fits), "samples": samples}


def _nll(model: Llama, batch: Batch) -> torch.Tensor:
    hidden = model.hidden(batch.tokens, batch.positions)
    return next_token_loss(hidden, model.head_weight, batch.targets)[0]


def _groups(items: Sequence[_Item] | Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
