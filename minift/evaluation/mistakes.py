"""What goes wrong? The answers worth looking at, by the ways in which generated text usually fails.

A score says how often, not how. So look: at the *worst* answers, those that share the fewest words with the right one
(of equals, those whose right answer surprised the model most); at the *longest*; at the *repetitive*, most of whose
four-word runs have been there before; and at the *truncated*, that had not ended where they were cut off. The last two
are usual in base models and after too little training; a model that is right but never stops was trained without EOS.

    minift evaluate --model runs/finetune/final --data data/test.jsonl --mistakes 3

Read next: `reference.py`.
"""

from collections.abc import Sequence
from typing import Any

from minift.evaluation.evaluate import Evaluation, Question, token_f1

RUN = 4  # words
REPETITIVE = 0.5  # share of the runs that have been there before, above which an answer is repetitive


def repetition(text: str) -> float:
    """The share of a text's runs of RUN words that occurred earlier in it; 0 for a text without such a run.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319), seq-rep-4.
    """
    words = text.split()
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mistakes(questions: Sequence[Question], evaluation: Evaluation, count: int) -> dict[str, Any]:
    """The answers of an evaluation to look at.

    Returns:
        `n`: questions asked. `counts`: how many answers are `repetitive`, how many `truncated`. `lists`: at most
        `count` each of the `worst`, `longest`, `repetitive` and `truncated`, the most striking first, with `question`,
        right `answer`, what was `said`, `token_f1`, `words`, `repetition` and `nll_per_target`.
    """
    entries: list[dict[str, Any]] = [
        {
            "question": question.pair.question,
            "answer": question.pair.answer,
            "said": answer.text.strip(),
            "token_f1": token_f1(answer.text, question.pair.answer),
            "words": len(answer.text.split()),
            "repetition": repetition(answer.text),
            "nll_per_target": likelihood.nll / likelihood.n_targets,
            "ended": answer.ended,
        }
        for question, answer, likelihood in zip(questions, evaluation.answers, evaluation.likelihoods, strict=True)
        if question.pair.question
    ]
    lists = {
        "worst": sorted((e for e in entries if e["token_f1"] < 1), key=lambda e: (e["token_f1"], -e["nll_per_target"])),
        "longest": sorted(entries, key=lambda e: -e["words"]),
        "repetitive": sorted((e for e in entries if e["repetition"] > REPETITIVE), key=lambda e: -e["repetition"]),
        "truncated": sorted((e for e in entries if not e["ended"]), key=lambda e: -e["words"]),
    }
    counts = {kind: len(lists[kind]) for kind in ("repetitive", "truncated")}
    return {"n": len(entries), "counts": counts, "lists": {kind: found[:count] for kind, found in lists.items()}}
