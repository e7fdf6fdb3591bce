"""What is seen in conversations, one at a time: their examples as they train, and what is wrong with them.

`Examiner` is what a worker of `audit.py` runs. `finding_lines` is what `finetune` prints before it starts.

    minift data audit data/pairs.jsonl
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minift.config import TrainConfig
from minift.data.checks import Checker
from minift.data.duplicates import Fingerprinter, Fingerprints, question_hash
from minift.data.findings import KINDS, Found, sentence
from minift.data.samples import encode_twice
from minift.data.templates import template_named, unknown_markers
from minift.errors import InputError, one_line
from minift.pack import Example
from minift.prompts import Conversation, Template, has_answer
from minift.tokenizer.base import Tokenizer


@dataclass
class Examined:
    """All that was seen in some conversations, in order.

    Attributes:
        prints: their fingerprints.
        lengths: of each conversation, the positions of each example that trains.
        uncut: how often each length occurs among the examples before they are cut.
        counts: turns by role, and tokens and examples by what becomes of them.
        faults: of each conversation, what is wrong with it: pairs of a finding's name and what was found.
    """

    prints: Fingerprints
    lengths: list[list[int]]
    uncut: Counter[int]
    counts: Counter[str]
    faults: list[list[tuple[str, str]]]


class Examiner:
    """Examines conversations; a function that a worker can be given."""

    def __init__(self, name: str, tokenizer: Tokenizer, config: TrainConfig):
        self.template: Template = template_named(name, tokenizer, config.rendered)
        self.tokenizer, self.config = tokenizer, config
        self.checker = Checker(self.template, name, tokenizer, config.rendered)
        self._prints = Fingerprinter()

    def __call__(self, conversations: Sequence[Conversation]) -> Examined:
        """Examine some conversations."""
        examined = Examined(self._prints(conversations), [], Counter(), Counter(), [])
        for conversation in conversations:
            examined.lengths.append([])
            faults = dict(self.checker.of_text(conversation))
            examined.counts.update(f"{turn.role} turns" for turn in conversation.turns)
            try:
                encoded = encode_twice(conversation, self.template, self.tokenizer, self.config)
            except InputError as fault:
                if "roles out of order" not in faults:
                    faults["refused by the template"] = reason_of(fault)
                encoded = []
            for uncut, example in encoded:
                self._count(examined, faults, uncut, example)
            examined.faults.append(list(faults.items()))
        return examined

    def _count(
        self, examined: Examined, faults: dict[str, str], uncut: Example | None, example: Example | None
    ) -> None:
        counts = examined.counts
        if uncut is None:
            if "empty turns" not in faults:
                faults.setdefault("nothing learned", "no turn of the assistant is learned")
            return
        examined.uncut[len(uncut)] += 1
        learned = example.n_targets if example else 0
        kept = len(example) + 1 if example else 0
        counts["learned"] += learned
        counts["given"] += kept - learned
        counts["cut"] += len(uncut) + 1 - kept
        if example is None:
            counts["dropped"] += 1
            faults["records dropped"] = f"{len(uncut):,} tokens, {len(uncut.prompt):,} of them before the first answer"
            return
        counts["examples"] += 1
        examined.lengths[-1].append(len(example))
        if example.cut:
            counts["cut examples"] += 1
            faults["answers cut"] = f"{len(uncut):,} tokens"
        if wrong := self.checker.of_example(example):
            faults["stop token not learned"] = wrong


def reason_of(fault: InputError) -> str:
    """Return a message without the place that it begins with."""
    return re.sub(r"^.*?:\d+(: |\b)", "", one_line(fault), count=1).lstrip(": ") or one_line(fault)


# In finetune ----------------------------------------------------------------------------------------------------------


def finding_lines(
    training: Sequence[Conversation],
    held_out: Sequence[Conversation],
    cut: int,
    dropped: int,
    template: str,
    tokenizer: Tokenizer,
    config: TrainConfig,
) -> list[str]:
    """Return the findings that change what is learned or measured, each in one line.

    The conversations are not encoded again, and near-duplicates are left to `audit`.

    Args:
        cut, dropped: how many examples to train on were cut, and how many have no target.
        template: its name.
    """
    chosen = template_named(template, tokenizer, config.rendered)
    checker = Checker(chosen, template, tokenizer, config.rendered)
    without = sum(not has_answer(one) for one in training)
    counts = {"answers cut": cut, "records dropped": dropped - without}
    found = {name: Found(count) for name, count in counts.items() if count > 0}
    for conversation in training:
        for name, detail in checker.of_text(conversation):
            found.setdefault(name, Found()).add(conversation.where, detail)
    asked = {question_hash(one): one.where for one in reversed(training)}
    for one in held_out:
        if (question := question_hash(one)) and question in asked:
            found.setdefault("held-out records trained on", Found()).add(one.where, f"as {asked[question]}")
    for marker in unknown_markers(chosen, tokenizer):
        found.setdefault("unknown markers", Found()).add("", marker)
    lines = []
    for name, kind in KINDS.items():
        if kind.changes and name in found:
            total = found[name]
            example = ": ".join(filter(None, (total.where, total.detail)))
            words = f"{sentence(name, total.count)} ({example})" if example else sentence(name, total.count)
            lines.append(one_line(f"finding: {words}; {kind.remedy}"))
    return lines
