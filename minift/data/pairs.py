"""Records → instruction pairs: the fields under which data sets hold a question and its answer.

    {"question": "…", "answer": "…"}                                    minift's own data, lamini_docs.jsonl
    {"instruction": "…", "response": "…"}                               Dolly and others
    {"instruction": "…", "input": "…", "output": "…", "text": "…"}      Alpaca; `input` is the pair's context
    {"input": "…", "output": "…"}
    {"text": "…"}                                                       no question: the text is learned as it is

A record that holds a question and an answer is a pair, whatever else it holds: Alpaca's `text` repeats the whole prompt
and the answer. `is_pair` decides it, once for all commands.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from minift.data.encodings import UTF8
from minift.data.records import Record, Skipped, find_files, scan, warn
from minift.errors import InputError
from minift.prompts import Pair

# The names under which data sets hold a question and its answer, in the order in which they are looked for.
FIELDS = (
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("input", "output"),
)
TEXT_FIELD = "text"  # of a record without a question: its text is learned from the first word on
METRICS = ("exact_match", "token_f1")


def read_all_pairs(
    sources: Iterable[str | Path],
    skipped: Skipped | None = None,
    encoding: str = UTF8,
    say: Callable[[str], object] | None = warn,
) -> list[Pair]:
    """Return the pairs of several files, globs or folders, in order.

    Args:
        skipped: counts what cannot be used; by default the first such record is raised.
        encoding: that of the files.
        say: as for `find_files`.

    Raises:
        InputError: as `find_files`, `read_pairs` and `Skipped` do.
    """
    skipped = skipped or Skipped(strict=True)
    pairs = [pair for file in find_files(sources, say) for pair in read_pairs(file, skipped, encoding)]
    skipped.check()
    return pairs


def read_pairs(path: str | Path, skipped: Skipped | None = None, encoding: str = UTF8) -> list[Pair]:
    """Return the instruction pairs of one file, in order.

    Args:
        skipped: counts what cannot be used; by default the first such record is raised.
        encoding: that of the file.

    Raises:
        InputError: for a file that cannot be read to its end, invalid JSON (`file:line`), a record whose fields are
            missing or not text, a blank question, unless `skipped` tolerates it; for a file without records.
    """
    skipped = skipped or Skipped(strict=True)
    pairs: list[Pair] = []
    before = skipped.skipped
    for item in scan_pairs(scan(path, encoding)):
        skipped.records += 1
        if isinstance(item, InputError):
            skipped.add(item)
        else:
            pairs.append(item)
    if not pairs and skipped.skipped == before:
        raise InputError(f"{path}: holds no records")
    return pairs


def scan_pairs(items: Iterable[Record | InputError]) -> Iterator[Pair | InputError]:
    """Yield the pairs of scanned records and, in the place of each unusable one, what is wrong with it.

    All pairs must have the fields of the first.
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


def is_pair(record: Record, text_field: str | None = None) -> bool:
    """Return True for a record to be read as a pair, False for a page, which only has a text.

    Args:
        text_field: the key of a page's text, if the user named one: a record that has it is a page, even if it also
            holds a question and an answer.

    Raises:
        InputError: with `file:line`, when the record is neither; the message lists its keys.
    """
    return text_field not in record.values and find_fields(record)[0] != ""


def find_fields(record: Record) -> tuple[str, str]:
    """Return the keys of a record's question and answer, the first of FIELDS that fit; ("", TEXT_FIELD) for a text.

    Raises:
        InputError: with `file:line`, when it has none of them; the message lists its keys.
    """
    for question, answer in FIELDS:
        if question in record.values and answer in record.values:
            return question, answer
    if TEXT_FIELD in record.values:
        return "", TEXT_FIELD
    known = ", ".join([*(f"{question}/{answer}" for question, answer in FIELDS), TEXT_FIELD])
    raise InputError(f"{record.where}: no usable fields in {sorted(record.values)}; known: {known}")


def read_pair(record: Record, fields: tuple[str, str] | None = None) -> tuple[Pair, tuple[str, str]]:
    """Return the pair of a record, and the keys of its question and answer.

    Args:
        fields: the keys that it must have; by default those that `find_fields` finds.

    Raises:
        InputError: with `file:line`, when a field is missing or not text, or the question is blank.
    """
    question_field, answer_field = fields or find_fields(record)

    def text(key: str) -> str:
        value = record.values.get(key)
        if not isinstance(value, str):
            state = "missing" if key not in record.values else f"{type(value).__name__}, not a text"
            raise InputError(f"{record.where}: {key!r} is {state}")
        return value

    question = text(question_field) if question_field else ""
    if question_field and not question.strip():
        raise InputError(f"{record.where}: {question_field!r} is blank")
    has_context = question_field == "instruction" and record.values.get("input")
    metric = record.values.get("metric", "")
    if metric not in ("", *METRICS):
        raise InputError(f"{record.where}: metric is {metric!r}; known: {', '.join(METRICS)}")
    pair = Pair(
        question=question.rstrip(),
        answer=text(answer_field).strip(),
        context=text("input").rstrip() if has_context else "",
        system=text("system").strip() if record.values.get("system") else "",
        metric=metric,
        where=record.where,
    )
    return pair, (question_field, answer_field)
