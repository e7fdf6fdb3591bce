"""A corpus, looked at before training: how many documents and tokens it has, how long they are, what is unusable.

Lengths are counted, not kept: the table of how often each occurs is small however large the corpus is, and medians and
percentiles read from it are exact.

    minift data stats "data/pages/*.json.gz"
    minift data stats data/pairs.jsonl
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minift.data.conversations import TEXT_FIELD, Reading, is_conversation, scan_conversations
from minift.data.records import SHOWN, Record, kind_of, scan
from minift.data.templates import choose_template, template_named
from minift.data.unpack import UnreadableError
from minift.errors import InputError, one_line
from minift.pack import encode_each
from minift.prompts import Chat, Conversation, Template
from minift.tokenizer.base import Tokenizer

LOOKED_AT = 100  # records among which the first usable one tells pairs from pages
BAR = 40  # characters of the histogram's longest bar


def survey(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    text_field: str | None = None,
    template: str = "auto",
    reading: Reading | None = None,
    rendered: bool = False,
) -> dict[str, Any]:
    """Count the documents of pages, or the pairs or chats of an instruction set. The first usable record tells which.

    Args:
        text_field: the key of a page's text; None for "text", in records that hold no pair.
        template: of the pairs or chats.
        rendered: whether markers in their text count.

    Returns:
        `kind` ("documents", "pairs" or "chats"), how many there are under that name, `malformed` and what is wrong with
        the `first_malformed`; then for `characters` and `tokens` (of pairs and chats also `prompt_tokens` and
        `answer_tokens`, what is given and what is learned, with BOS and EOS) their `total`, `min`, `median`, `mean`,
        `p90`, `p99` and `max`; and `histogram`, rows of
        (least, most, documents) by tokens. Pairs and chats have the name of their `template`, and `unread`, lines about
        keys that are not read.

    Raises:
        InputError: when there is no usable record at all, for a file that cannot be read to its end,
            or for an unknown template.
    """
    reading = reading or Reading()
    items = chain.from_iterable(scan(file, reading.encoding) for file in files)
    head: list[Record | InputError] = []
    pairs, reason = False, ""
    for item in islice(items, LOOKED_AT):
        head.append(item)
        if isinstance(item, Record):
            try:
                pairs = is_conversation(item, text_field, reading.fields)
                break
            except InputError as fault:
                reason = str(fault) if len(head) == 1 else reason
    if not head:
        raise InputError(f"{files[0]}: holds no records")
    if pairs:
        return _survey_conversations(chain(head, items), tokenizer, template, reading, rendered)
    return _survey_pages(chain(head, items), tokenizer, text_field or TEXT_FIELD, reason if text_field is None else "")


class Lengths:
    """A table of how often each length occurs."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """Count one more of this length."""
        self.counts[length] += 1

    def summary(self) -> dict[str, float]:
        """Return total, mean, extremes and percentiles (of these, the smallest length that so many do not exceed)."""
        n, total = self.counts.total(), sum(length * count for length, count in self.counts.items())
        return {
            "total": total,
            "min": min(self.counts),
            "median": self._percentile(0.5),
            "mean": total / n,
            "p90": self._percentile(0.9),
            "p99": self._percentile(0.99),
            "max": max(self.counts),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return rows of (least, most, how many), in classes whose borders are powers of two."""
        classes: Counter[int] = Counter()
        for length, count in self.counts.items():
            classes[length.bit_length()] += count
        return [(2**bits // 2, 2**bits - 1, classes[bits]) for bits in range(min(classes), max(classes) + 1)]

    def _percentile(self, share: float) -> int:
        left = share * self.counts.total()
        for length in sorted(self.counts):
            left -= self.counts[length]
            if left <= 0:
                return length
        return max(self.counts)


def _survey_pages(
    items: Iterable[Record | InputError], tokenizer: Tokenizer, text_field: str, reason: str
) -> dict[str, Any]:
    characters, tokens, faults = Lengths(), Lengths(), _Faults(reason)
    for item in items:
        try:
            if isinstance(item, InputError):
                raise item
            text = item.text(text_field)
        except InputError as fault:
            faults.add(fault)
            continue
        characters.add(len(text))
        tokens.add(len(tokenizer.encode(text, bos=True, eos=True, special=False)))
    columns = {"characters": characters, "tokens": tokens}
    return _result("documents", faults, columns)


def _survey_conversations(
    items: Iterable[Record | InputError], tokenizer: Tokenizer, template: str, reading: Reading, rendered: bool
) -> dict[str, Any]:
    conversations: list[Conversation] = []
    faults = _Faults()
    for item in scan_conversations(items, reading):
        if isinstance(item, InputError):
            faults.add(item)
        else:
            conversations.append(item)
    name = choose_template(template, conversations, tokenizer, rendered)
    chosen = template_named(name, tokenizer, rendered)
    columns = {key: Lengths() for key in ("characters", "tokens", "prompt_tokens", "answer_tokens")}
    for conversation in conversations:
        try:
            _add_conversation(columns, conversation, chosen, tokenizer)
        except InputError as fault:  # the template has no place for it
            faults.add(fault)
    kind = "chats" if any(isinstance(one, Chat) for one in conversations) else "pairs"
    return {"template": name, "unread": reading.unread_lines(), **_result(kind, faults, columns)}


def _add_conversation(
    columns: dict[str, Lengths], conversation: Conversation, template: Template, tokenizer: Tokenizer
) -> None:
    examples = template.examples(conversation)
    given = learned = 0
    for spans in examples:
        for span, ids in zip(spans, encode_each(spans, tokenizer), strict=True):
            given, learned = given + len(ids) * (not span.learned), learned + len(ids) * span.learned
    columns["characters"].add(sum(len(span.text) for spans in examples for span in spans))
    columns["tokens"].add(given + learned)
    columns["prompt_tokens"].add(given)
    columns["answer_tokens"].add(learned)


class _Faults:
    """The reasons why records cannot be used: the first record with each, and how many have it."""

    def __init__(self, reason: str = ""):
        self.count = 0
        self._first: dict[str, str] = {}  # by the reason
        self._counts = Counter[str]()
        self.reason = reason  # why the first record is neither pair nor page

    def add(self, fault: InputError) -> None:
        if isinstance(fault, UnreadableError):  # the counts would be those of a part
            raise fault
        self.count += 1
        reason = kind_of(fault)
        if reason in self._first or len(self._first) < SHOWN:
            self._first.setdefault(reason, one_line(fault))
            self._counts[reason] += 1

    @property
    def first(self) -> list[str]:
        """Return a line for each of the first reasons."""
        more = {reason: count - 1 for reason, count in self._counts.items()}
        return [f"{text} (and {more[kind]:,} more)" if more[kind] else text for kind, text in self._first.items()]


def _result(kind: str, faults: _Faults, columns: dict[str, Lengths]) -> dict[str, Any]:
    if not columns["characters"].counts:
        raise InputError(faults.reason or faults.first[0])
    return {
        "kind": kind,
        kind: columns["characters"].counts.total(),
        "malformed": faults.count,
        "first_malformed": faults.first,
        **{name: lengths.summary() for name, lengths in columns.items()},
        "histogram": columns["tokens"].histogram(),
    }


def survey_text(result: dict[str, Any]) -> str:
    """Return a survey as aligned text, with a bar for each class of lengths."""
    kind = result["kind"]
    keys = ("total", "min", "median", "mean", "p90", "p99", "max")
    lines = [f"{kind:<16}{result[kind]:>16,}", f"{'malformed':<16}{result['malformed']:>16,}"]
    lines += [f"  {fault}" for fault in result["first_malformed"]]
    lines += [f"note: {line}" for line in result.get("unread", ())]
    if "template" in result:
        lines.append(f"{'template':<16}{result['template']:>16}")
    lines += ["", f"{'':<16}" + f"{keys[0]:>16}" + "".join(f"{key:>11}" for key in keys[1:])]
    for name in ("characters", "tokens", "prompt_tokens", "answer_tokens"):
        if name in result:
            row = result[name]
            cells = [f"{row['total']:>16,}"] + [f"{row[key]:>11,.{int(key == 'mean')}f}" for key in keys[1:]]
            lines.append(f"{name.replace('_', ' '):<16}" + "".join(cells))
    lines.append(f"{'characters a token':<20}{result['characters']['total'] / result['tokens']['total']:>12.2f}")
    lines += ["", f"{kind} by tokens"]
    most = max(count for _, _, count in result["histogram"])
    for least, greatest, count in result["histogram"]:
        bar = "#" * max(round(BAR * count / most), count > 0)
        lines.append(f"{least:>9,} - {greatest:<9,} {count:>12,}  {bar}".rstrip())
    return "\n".join(lines)
