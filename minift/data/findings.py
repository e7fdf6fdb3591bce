"""The kinds of findings of an audit, in words: what was found, and what to do.

A finding either changes what is learned or measured, or is only worth knowing. `finetune` prints the first kind.

    minift data audit data/pairs.jsonl
"""

import re
from dataclasses import dataclass

from minift.prompts import Conversation


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        changes: whether it changes what is learned or what is measured; otherwise it is only worth knowing.
        words: what was found, after the number; in [ ] the ending for one, then for several.
        remedy: what to do.
    """

    changes: bool
    words: str
    remedy: str


KINDS = {
    "unusable records": Kind(True, "record[|s] cannot be used", "mend them, or take them out"),
    "refused by the template": Kind(
        True,
        "record[|s] [has|have] no place in the template; finetune stops at such a record",
        "mend them, take them out, or choose another --template",
    ),
    "no template fits all": Kind(
        True,
        "record[|s] for which the others' template does not fit; finetune stops there",
        "mend the questions that differ, or give --template plain",
    ),
    "roles out of order": Kind(
        True,
        "conversation[|s] [is|are] not a question and its answer in turn",
        "put the turns in order, or take the records out; a text after the last answer is never learned",
    ),
    "records dropped": Kind(
        True,
        "example[|s] dropped: what is given fills --max-length, nothing of the answer fits",
        "raise --max-length, as far as the model has positions, or shorten what is given",
    ),
    "answers cut": Kind(
        True,
        "example[|s] cut: the end of the answer is not learned, and neither is the stop token",
        "raise --max-length, as far as the model has positions, or split long records",
    ),
    "nothing learned": Kind(
        True,
        "record[|s] with nothing to learn: no turn of the assistant, or all of weight 0",
        "add answers, or take the records out",
    ),
    "stop token not learned": Kind(
        True,
        "learned turn[|s] [does|do] not end in a token that ends a turn: the model learns not to stop there",
        "use a template that ends a turn in such a token",
    ),
    "empty turns": Kind(True, "record[|s] with a blank question or answer", "fill them, or take the records out"),
    "markers in the data": Kind(
        True,
        "record[|s] whose text holds markers of a template; they are learned as characters",
        "take them out of the text; if they were put there on purpose, give --rendered",
    ),
    "template twice": Kind(
        True,
        "record[|s] whose question carries the template's own words; they are written twice",
        "take them out of the text, or choose the template plain",
    ),
    "wrong encoding": Kind(
        True,
        "record[|s] with text that was read in a wrong encoding on its way",
        "make the file again from its source, as UTF-8; for a file in another encoding give --encoding",
    ),
    "held-out records trained on": Kind(
        True,
        "held-out record[|s] [is|are] also trained on, or [its question is|their questions are]",
        "take them out of one side: the scores say how well they are remembered",
    ),
    "keys not read": Kind(
        True, "key[|s] with something that is not read", "name what you need: --fields QUESTION ANSWER; or drop the key"
    ),
    "unknown markers": Kind(
        True,
        "marker[|s] of the template [is|are] no token of this tokenizer: [it is|they are] cut into pieces",
        "choose a template of the model's own (--template chat), or one without markers (plain, qa)",
    ),
    "duplicates": Kind(
        False, "record[|s] [is|are] there already, word for word", "keep one of each: copies count as many times"
    ),
    "near-duplicates": Kind(
        False,
        "record[|s] [is|are] nearly the same as an earlier one",
        "keep one of each, unless the difference is what you want learned",
    ),
    "contradictions": Kind(
        False, "record[|s] answer[s|] a question otherwise than an earlier record", "keep the answer that is right"
    ),
    "answer repeats its question": Kind(
        False, "record[|s] whose answer begins with the question", "take the question out of the answer"
    ),
    "HTML entities": Kind(
        False, "record[|s] with characters written as HTML entities", "unescape them, unless HTML is the subject"
    ),
    "packs badly": Kind(
        False,
        "% of the positions are padding although rows are packed",
        "give a larger --batch-size, or shorten the longest examples, which set the rows",
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        name: one of KINDS.
        changes: whether it changes what is learned or measured.
        count: of what `text` says.
        text: what was found, in a sentence.
        where: `file:line` of the first example, or "".
        detail: what was found there.
        remedy: what to do.
    """

    name: str
    changes: bool
    count: int
    text: str
    where: str
    detail: str
    remedy: str


def sentence(name: str, count: int) -> str:
    """Return a number with the words of its finding, in the singular or plural."""
    words = re.sub(r"\[([^|\]]*)\|([^|\]]*)\]", lambda match: match.group(1 if count == 1 else 2), KINDS[name].words)
    return f"{count:,} {words}"


@dataclass
class Found:
    """The number of records of a finding, and the first of them."""

    count: int = 0
    where: str = ""
    detail: str = ""
    conversation: Conversation | None = None

    def add(self, where: str, detail: str, conversation: Conversation | None = None) -> None:
        """Count one more."""
        if not self.count:
            self.where, self.detail, self.conversation = where, detail, conversation
        self.count += 1
