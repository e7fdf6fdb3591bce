"""List the answers worth reading, by the ways in which generated text usually fails.

A score says how often a model fails, not how. So read some answers:

* the *worst*, which share the fewest words with the right one (of equals, those with the highest loss);
* the *longest*;
* the *repetitive*, in which most runs of four words have occurred before;
* the *truncated*, which had not ended where they were cut off.

The last two are usual in base models and after too little training. A model that is right but never stops was trained
without EOS.

    minift evaluate --model runs/finetune/final --data data/test.jsonl --mistakes 3
"""

from collections.abc import Sequence
from typing import Any

from minift.evaluation.evaluate import Answer, Evaluation, Question, token_f1
from minift.evaluation.likelihood import Likelihood

RUN = 4  # words
REPETITIVE = 0.5  # an answer is repetitive if a larger share of its runs has occurred before


def repetition(text: str) -> float:
    """Return the share of a text's runs of RUN words that occurred earlier in it; 0 for a text without a run.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319), seq-rep-4.
    """
    words = text.split()
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mistakes(questions: Sequence[Question], evaluation: Evaluation, count: int) -> dict[str, Any]:
    """Return the answers of an evaluation that are worth reading.

    Returns:
        `n`: the number of questions. `counts`: how many answers are `repetitive`, how many `truncated`. `lists`: at
        most `count` each of the `worst`, `longest`, `repetitive` and `truncated`, the most striking first, with
        `question`, right `answer`, the model's words (`said`), whether they `ended` before they were cut, `token_f1`,
        `words`, `repetition` and `nll_per_target`.
    """
    results = zip(questions, evaluation.answers, evaluation.likelihoods, strict=True)
    entries = [_entry(*result) for result in results if result[0].pair.question]
    wrong = [entry for entry in entries if entry["token_f1"] < 1]
    repetitive = [entry for entry in entries if entry["repetition"] > REPETITIVE]
    truncated = [entry for entry in entries if not entry["ended"]]
    lists = {
        "worst": sorted(wrong, key=lambda entry: (entry["token_f1"], -entry["nll_per_target"])),
        "longest": sorted(entries, key=lambda entry: -entry["words"]),
        "repetitive": sorted(repetitive, key=lambda entry: -entry["repetition"]),
        "truncated": sorted(truncated, key=lambda entry: -entry["words"]),
    }
    counts = {"repetitive": len(repetitive), "truncated": len(truncated)}
    return {"n": len(entries), "counts": counts, "lists": {kind: found[:count] for kind, found in lists.items()}}


def _entry(question: Question, answer: Answer, likelihood: Likelihood) -> dict[str, Any]:
    return {
        "question": question.pair.question,
        "answer": question.pair.answer,
        "said": answer.text.strip(),
        "token_f1": token_f1(answer.text, question.pair.answer),
        "words": len(answer.text.split()),
        "repetition": repetition(answer.text),
        "nll_per_target": likelihood.nll / likelihood.n_targets,
        "ended": answer.ended,
    }
