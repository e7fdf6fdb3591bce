"""Records → conversations: the keys under which data sets hold questions and answers, chats, and texts.

    {"question": "…", "answer": "…"}                                    minift's own data, lamini_docs.jsonl
    {"instruction": "…", "response": "…", "context": "…"}               Dolly and others
    {"instruction": "…", "input": "…", "output": "…", "text": "…"}      Alpaca; `input` is the pair's context
    {"prompt": "…", "completion": "…"}                                  also with lists of messages
    {"messages": [{"role": "user", "content": "…"}, …]}                 chats (`data/chats.py`)
    {"conversations": [{"from": "human", "value": "…"}, …]}
    {"text": "…"}                                                       no question: the text is learned as it is

Keys may be in capitals. `system` and `history` are read, too. `--fields QUESTION ANSWER` names any others. A record
that holds a question and an answer is a pair, whatever else it holds: Alpaca's `text` repeats the whole prompt and the
answer. `find_form` decides it, once for all commands. What else a record says is not lost in silence: keys that are not
read are counted, and reported.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minift.data.chats import check_refused, keys_by_name, read_turns, unread_keys
from minift.data.encodings import UTF8
from minift.data.records import Record, Skipped, find_files, scan, warn
from minift.errors import InputError, one_line
from minift.prompts import Chat, Conversation, Pair, Turn

# The names under which data sets hold a question and its answer, in the order in which they are looked for.
FIELDS = (
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
    ("input", "output"),
)
CHAT_FIELDS = ("messages", "conversations", "conversation")
TEXT_FIELD = "text"  # of a record without a question: its text is learned from the first word on
SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = ("context", "input")
PREFERENCE = ("chosen", "rejected")
METRICS = ("exact_match", "token_f1")
SHOWN_UNREAD = 6


@dataclass(frozen=True)
class Reading:
    """The settings of reading records, and what was noticed.

    Attributes:
        encoding: that of the files.
        fields: the keys of the question and of the answer, or the one key of a chat or a text, as the user names them;
            () finds them.
        unread: of how many records each key holds something that is not read.
    """

    encoding: str = UTF8
    fields: tuple[str, ...] = ()
    unread: Counter[str] = field(default_factory=Counter)

    def unread_lines(self) -> list[str]:
        """Return a line for each key that is not read, for the user."""
        common = self.unread.most_common(SHOWN_UNREAD)
        lines = [f"{one_line(key)!r} of {count:,} record{'s' * (count != 1)} is not read" for key, count in common]
        return lines + [f"and {len(self.unread) - SHOWN_UNREAD} more keys"] * (len(self.unread) > SHOWN_UNREAD)


@dataclass(frozen=True)
class Form:
    """The keys under which the records of a file hold what is learned: a question and an answer, a chat, or a text.

    Attributes:
        question: the key of the question; "" where there is none.
        answer: the key of the answer, of the chat, or of the text.
        chat: whether that holds messages.
    """

    question: str
    answer: str
    chat: bool = False


# Files ----------------------------------------------------------------------------------------------------------------


def read_all_conversations(
    sources: Iterable[str | Path],
    skipped: Skipped | None = None,
    reading: Reading | None = None,
    say: Callable[[str], object] | None = warn,
) -> list[Conversation]:
    """Return the conversations of several files, globs or folders, in order.

    Args:
        skipped: counts what cannot be used; by default the first such record is raised.
        say: gets a line about files that are reached twice, and about keys that are not read; None for no such line.

    Raises:
        InputError: as `find_files`, `read_conversations` and `Skipped` do.
    """
    skipped, reading = skipped or Skipped(strict=True), reading or Reading()
    found = [one for file in find_files(sources, say) for one in read_conversations(file, skipped, reading)]
    skipped.check()
    if say is not None:
        for line in reading.unread_lines():
            say(f"note: {line}")
    return found


def read_conversations(
    path: str | Path, skipped: Skipped | None = None, reading: Reading | None = None
) -> list[Conversation]:
    """Return the conversations of one file, in order.

    Args:
        skipped: counts what cannot be used; by default the first such record is raised.

    Raises:
        InputError: for a file that cannot be read to its end, invalid JSON (`file:line`), a record whose fields are
            missing or not text, a blank question, unless `skipped` tolerates it; for a file without records.
    """
    skipped, reading = skipped or Skipped(strict=True), reading or Reading()
    found: list[Conversation] = []
    before = skipped.skipped
    for item in scan_conversations(scan(path, reading.encoding), reading):
        skipped.records += 1
        if isinstance(item, InputError):
            skipped.add(item)
        else:
            found.append(item)
    if not found and skipped.skipped == before:
        raise InputError(f"{path}: holds no records")
    return found


def scan_conversations(
    items: Iterable[Record | InputError], reading: Reading | None = None
) -> Iterator[Conversation | InputError]:
    """Yield the conversations of scanned records and, in the place of each unusable one, what is wrong with it.

    All records of a file must have the form of the first that is usable.
    """
    reading, form, file = reading or Reading(), None, None
    for item in items:
        if isinstance(item, InputError):
            yield item
            continue
        if item.file != file:
            form, file = None, item.file
        try:
            conversation, form = read_conversation(item, form, reading)
        except InputError as fault:
            yield fault
        else:
            yield conversation


# Forms ----------------------------------------------------------------------------------------------------------------


def is_conversation(record: Record, text_field: str | None = None, fields: Sequence[str] = ()) -> bool:
    """Return True for a record to be read as a pair or a chat, False for a page, which only has a text.

    Args:
        text_field: the key of a page's text, if the user named one: a record that has it is a page, even if it also
            holds a question and an answer.
        fields: as in `Reading`.

    Raises:
        InputError: with `file:line`, when the record is neither; the message lists its keys.
    """
    if text_field in record.values:
        return False
    form = find_form(record, fields)
    return form.question != "" or form.chat


def find_form(record: Record, fields: Sequence[str] = ()) -> Form:
    """Return where a record holds what is learned: under `fields` if there are any, else as it is known above.

    Raises:
        InputError: with `file:line`, when it has none of the known keys; the message lists its keys.
    """
    values = record.values
    if fields:
        _check_keys(record, fields)
        question, answer = fields if len(fields) == 2 else ("", fields[0])
        return Form(
            question, answer, chat=isinstance(values[answer], list) or (not question and _is_list(values[answer]))
        )
    keys = keys_by_name(values)
    if all(name in keys for name in PREFERENCE):
        question = "prompt" if "prompt" in keys else "QUESTION"
        raise InputError(
            f"{record.where}: has chosen and rejected: such a file says which of two answers is better, for DPO and "
            f"its like; minift learns right answers: name their keys (--fields {question} chosen)"
        )
    chats = [keys[name] for name in CHAT_FIELDS if name in keys and _is_list(values[keys[name]])]
    if chats and values[chats[0]]:
        return Form("", chats[0], chat=True)
    for question, answer in FIELDS:
        if question in keys and answer in keys:
            return Form(keys[question], keys[answer], chat=isinstance(values[keys[answer]], list))
    if chats:
        return Form("", chats[0], chat=True)
    if TEXT_FIELD in keys:
        return Form("", keys[TEXT_FIELD])
    known = ", ".join([*(f"{question}/{answer}" for question, answer in FIELDS), *CHAT_FIELDS[:2], TEXT_FIELD])
    raise InputError(
        f"{record.where}: no usable fields in {sorted(values)}; known: {known}; or name them: --fields QUESTION ANSWER"
    )


def _is_list(value: object) -> bool:
    """Return whether a value is a list, or the text of one in JSON, as the cell of a table holds it."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _check_keys(record: Record, keys: Iterable[str]) -> None:
    for key in keys:
        if key and key not in record.values:
            raise InputError(f"{record.where}: {key!r} is missing; its keys: {', '.join(record.values) or 'none'}")


# One record -----------------------------------------------------------------------------------------------------------


def read_conversation(
    record: Record, form: Form | None = None, reading: Reading | None = None
) -> tuple[Conversation, Form]:
    """Return the conversation of a record, and its form.

    Args:
        form: the one that it must have; by default the one that `find_form` finds.
        reading: whose `unread` counts the keys that are not read.

    Raises:
        InputError: with `file:line`, when a field is missing or not text, the question is blank, or the record comes
            with tools or pictures.
    """
    reading = reading or Reading()
    form = form or find_form(record, reading.fields)
    _check_keys(record, (form.question, form.answer))
    check_refused(record.values, record.where)
    if record.values.get("tools") or record.values.get("functions"):
        raise InputError(f"{record.where}: has tools, and minift does not learn their use")
    unread = Counter[str]()
    fields = _Fields(record, {form.question, form.answer})
    conversation = _chat(fields, form, unread) if form.chat else _pair(fields, form)
    if turns := fields.history(unread):
        conversation = _after(turns, conversation)
    text = str(record.values.get(fields.key(TEXT_FIELD), ""))
    if conversation.question.strip() in text and conversation.answer.strip() in text:
        fields.read.add(fields.key(TEXT_FIELD))  # all of the record once more, as one text
    unread.update(unread_keys(record.values, fields.read))
    reading.unread.update(set(unread))
    return conversation, form


class _Fields:
    """The fields of a record by name, in any capitals, and which of its keys have been read."""

    def __init__(self, record: Record, read: set[str]):
        self.values, self.where, self.read = record.values, record.where, read
        self._keys = keys_by_name(record.values)

    def key(self, name: str) -> str:
        """Return the key that is `name`, but for capitals; `name` itself where there is none."""
        return self._keys.get(name, name)

    def text(self, key: str) -> str:
        """Return the text under a key. Raises InputError for anything else."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key!r} is {type(value).__name__}, not a text")
        return value

    def first_text(self, names: Sequence[str]) -> str:
        """Return the first text that is not blank under one of the names, "" where there is none, and note its key."""
        for name in names:
            key = self.key(name)
            if key in self.values and key not in self.read and self.values[key]:
                text = self.text(key)
                self.read.add(key)
                if text.strip():
                    return text
        return ""

    def metric(self) -> str:
        """Return the metric that the record names, or ""."""
        metric = self.values.get("metric") or ""
        if metric not in ("", *METRICS):
            raise InputError(f"{self.where}: metric is {metric!r}; known: {', '.join(METRICS)}")
        self.read.add("metric")
        return str(metric)

    def history(self, unread: Counter[str]) -> tuple[Turn, ...]:
        """Return earlier turns: `history` holds messages, or lists of a question and its answer."""
        key = self.key("history")
        history = self.values.get(key)
        if not history or key in self.read:
            return ()
        self.read.add(key)
        if isinstance(history, list) and all(isinstance(item, list) for item in history):
            if not all(len(item) == 2 and all(isinstance(text, str) for text in item) for item in history):
                raise InputError(f"{self.where}: {key!r} must hold lists of two texts, a question and its answer")
            pairs = [(Turn("user", asked), Turn("assistant", answer, learned=True)) for asked, answer in history]
            return tuple(turn for pair in pairs for turn in pair)
        return read_turns(history, f"{self.where}: {key!r}", unread)


def _pair(fields: _Fields, form: Form) -> Pair:
    question = fields.text(form.question) if form.question else ""
    answer = fields.text(form.answer)
    if form.question and not question.strip():
        raise InputError(f"{fields.where}: {form.question!r} is blank")
    return Pair(
        question=question,
        answer=answer,
        context=fields.first_text(CONTEXT_FIELDS) if form.question else "",
        system=fields.first_text(SYSTEM_FIELDS) if form.question else "",
        metric=fields.metric(),
        where=fields.where,
    )


def _chat(fields: _Fields, form: Form, unread: Counter[str]) -> Chat:
    """Return the chat of a record; where a list of messages is the prompt, only the answer's turns are learned."""
    turns = read_turns(fields.values[form.answer], f"{fields.where}: {form.answer!r}", unread)
    if form.question:
        asked = fields.values[form.question]
        before = (
            (Turn("user", asked),)
            if isinstance(asked, str)
            else read_turns(asked, f"{fields.where}: {form.question!r}", unread)
        )
        turns = (*(replace(turn, learned=False) for turn in before), *turns)
    if turns[0].role != "system" and (system := fields.first_text(SYSTEM_FIELDS)):
        turns = (Turn("system", system), *turns)
    return Chat(turns, fields.metric(), fields.where)


def _after(history: tuple[Turn, ...], conversation: Conversation) -> Chat:
    """Return a conversation with earlier turns in front of it, after the system's text."""
    turns = conversation.turns
    start = int(turns[0].role == "system")
    return Chat((*turns[:start], *history, *turns[start:]), conversation.metric, conversation.where)
