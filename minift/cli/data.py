"""The commands that look at data and train tokenizers: `minift tokenizer …` and `minift data …`."""

import json
import os
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.cli.parts import (
    MODEL_HELP,
    TEMPLATES,
    TEXT_FIELD_HELP,
    add_command,
    add_encoding,
    add_group,
    add_learn,
    add_reading,
    add_rendered,
    add_template,
    json_text,
    reading_of,
    write_json,
    write_texts,
)
from minift.errors import InputError, RunError, one_line
from minift.look.report import shorten
from minift.values import check_number

if TYPE_CHECKING:
    from minift.prompts import Conversation
    from minift.tokenizer.base import Tokenizer

PAGES_HELP = "files, globs or folders of JSON Lines, Parquet, Arrow or text, compressed or not; - for standard input"


# Tokenizers -----------------------------------------------------------------------------------------------------------

TRAIN_MORE = """\
example:
  minift tokenizer train --data "data/pages/*.json.gz" --vocab-size 2048 --out tokenizer.model"""

SHOW_MORE = """\
example:
  minift tokenizer show "What is the capital of Mexico?\""""


TEMPLATES_MORE = """\
Each template writes ten conversations, and what is done with them is its verdict.
"one text": a conversation is one text, and each of its answers is learned in it.
"own examples": earlier turns are written in another way once there are later ones, so each
answer is an example of its own.
"refused": of most conversations it is not certain what would be learned.
A file comes without a tokenizer: what looks like the name of a token is taken for one.

examples:
  minift tokenizer templates chat_template.jinja
  minift tokenizer templates MODEL_FOLDER"""


def add_tokenizer(commands: Any) -> None:
    """Add `minift tokenizer train|show|templates`."""
    text = "train a tokenizer, show how one cuts a text, or judge chat templates"
    verbs = add_group(commands, "tokenizer", text)
    train = add_command(verbs, "train", _tokenizer_train, "train a BPE vocabulary on pages", TRAIN_MORE)
    train.add_argument("--data", nargs="+", required=True, metavar="GLOB", help=f"train on these pages: {PAGES_HELP}")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="make a vocabulary of N pieces")
    text = "find a page's text under this key of its record (default: text)"
    train.add_argument("--text-field", default="text", metavar="NAME", help=text)
    add_encoding(train)
    train.add_argument("--out", required=True, metavar="FILE", help="write the tokenizer.model to FILE")
    show = add_command(verbs, "show", _tokenizer_show, "show the pieces and ids of a text", SHOW_MORE)
    show.add_argument("text", metavar="TEXT", help="encode this text")
    text = f"use the tokenizer of this model, or this tokenizer's file (default: bundled): {MODEL_HELP}"
    show.add_argument("--model", default="bundled", metavar="DIR|FILE", help=text)

    text = "print what is learned with chat templates, as a table"
    templates = add_command(verbs, "templates", _tokenizer_templates, text, TEMPLATES_MORE)
    text = "judge these templates: .jinja files, or folders of models"
    templates.add_argument("paths", nargs="+", metavar="FILE|DIR", help=text)


def _tokenizer_train(options: dict[str, Any]) -> int:
    from minift.data.records import Skipped, find_files
    from minift.data.stream import DocumentStream
    from minift.tokenizer.sentencepiece import train_tokenizer

    out = Path(options["out"])
    if out.exists():
        raise InputError(f"{out}: exists; choose another --out")
    files, text_field, encoding = find_files(options["data"]), options["text_field"], options["encoding"]
    stream = DocumentStream(files, text_field, epochs=1, skipped=Skipped(), encoding=encoding)
    place = next(folder for folder in out.absolute().parents if os.path.lexists(folder))  # the others will be made
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{out}: cannot be written: {place} is no folder that may be written to")
    tokenizer = train_tokenizer(stream, options["vocab_size"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(tokenizer.files["tokenizer.model"])
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    print(f"saved: {out} ({tokenizer.vocab_size} pieces)")
    return 0


def _tokenizer_show(options: dict[str, Any]) -> int:
    from minift.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(options["model"])
    ids = tokenizer.encode(options["text"])
    for id, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        print(f"{id:>6}  {piece}")
    print(f"{len(ids)} ids, {len(options['text'])} characters, vocabulary of {tokenizer.vocab_size}")
    return 0


def _tokenizer_templates(options: dict[str, Any]) -> int:
    from minift.look.chat_templates import judge_path, table

    print(table([judge_path(path) for path in options["paths"]]))
    return 0


# Data -----------------------------------------------------------------------------------------------------------------

PEEK_MORE = """\
example:
  minift data peek "data/pages/*.json.gz" -n 3"""

STATS_MORE = """\
The first usable record tells whether the data are instruction pairs or pages.

examples:
  minift data stats "data/pages/*.json.gz"
  minift data stats data/pairs.jsonl --template qa"""

FORMAT_MORE = """\
With --out alone, the records are written in minift's own form, whatever form they had.

examples:
  minift data format data/pairs.jsonl
  minift data format sharegpt.json --out chats.jsonl
  minift data format data/pairs.jsonl --template qa --out pairs-qa.jsonl"""


AUDIT_MORE = """\
All is counted of the ids and masks that train. What changes what is learned or measured comes
first, each finding with its number, an example and what to do.

examples:
  minift data audit data/pairs.jsonl --test data/test.jsonl
  minift data audit chats.jsonl --model DIR --max-length 1024 --html audit.html"""


def add_data(commands: Any) -> None:
    """Add `minift data peek|stats|format|audit`."""
    verbs = add_group(commands, "data", "look at data: its first records, its lengths, its pairs as text, its faults")

    peek = add_command(verbs, "peek", _peek, "print the first records of a corpus of any size", PEEK_MORE)
    peek.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    peek.add_argument("-n", type=int, default=5, metavar="N", help="print N records (default: 5)")
    add_encoding(peek)
    peek.add_argument("--full", action="store_true", help="do not shorten long texts")

    text = "count documents or pairs, their tokens, and the records that cannot be used"
    stats = add_command(verbs, "stats", _stats, text, STATS_MORE)
    stats.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    text = "count the tokens of this tokenizer: a model, or a tokenizer's file (default: bundled)"
    stats.add_argument("--tokenizer", "--model", default="bundled", metavar="DIR|FILE", help=text)
    stats.add_argument("--text-field", metavar="NAME", help=TEXT_FIELD_HELP)
    add_reading(stats)
    add_template(stats)
    add_rendered(stats)
    stats.add_argument("--json", metavar="FILE", help="write the numbers to FILE")

    text = "print instruction pairs or chats in each template, or write them as JSON Lines"
    formats = add_command(verbs, "format", _format, text, FORMAT_MORE)
    formats.add_argument("data", nargs="+", metavar="FILE", help="read these instruction pairs or chats")
    add_reading(formats)
    formats.add_argument("-n", type=int, default=1, metavar="N", help="print N records (default: 1)")
    text = f"use only this template: {TEMPLATES} (default: all that fit; with --out, none)"
    formats.add_argument("--template", metavar="NAME", help=text)
    text = "take the template chat from this model or tokenizer"
    formats.add_argument("--tokenizer", "--model", metavar="DIR|FILE", help=text)
    add_rendered(formats)
    formats.add_argument("--out", metavar="FILE", help="write all records to FILE")
    formats.add_argument("--as-text", action="store_true", help="write each record as one text, as a page is")

    text = "say what instruction pairs or chats teach: counts, findings, and records as they are learned"
    audit = add_command(verbs, "audit", _audit, text, AUDIT_MORE)
    audit.add_argument("data", nargs="+", metavar="FILE", help="read these instruction pairs or chats")
    audit.add_argument("--model", default="bundled", metavar="DIR", help=f"{MODEL_HELP} (default: bundled)")
    text = "compare with these held-out records (default: the tenth of DATA that finetune holds out)"
    audit.add_argument("--test", nargs="+", default=(), metavar="FILE", help=text)
    add_reading(audit)
    add_template(audit)
    add_rendered(audit)
    add_learn(audit)
    text = "cut examples to N tokens, as finetune does with this flag (default: the positions of the model)"
    audit.add_argument("--max-length", type=int, metavar="N", help=text)
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="draw by this seed (default: 0)")
    text = "show N records that are drawn, and the example of each finding (default: 3; on a page: 20)"
    audit.add_argument("--sample", type=int, metavar="N", help=text)
    audit.add_argument("--html", metavar="FILE", help="write a page to FILE that a browser shows")
    audit.add_argument("--json", metavar="FILE", help="write the numbers, the findings and the samples to FILE")


def _peek(options: dict[str, Any]) -> int:
    from minift.data.records import find_files, read_records

    check_number("-n", options["n"], least=1)
    records = chain.from_iterable(read_records(file, options["encoding"]) for file in find_files(options["data"]))
    shown = 0
    for record in islice(records, options["n"]):  # each at once, however long the next one takes
        shown += 1
        print(one_line(record.where))
        for key, value in record.values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"  {one_line(key)}: {text if options['full'] else one_line(shorten(text, 300))}", flush=True)
    if not shown:
        raise InputError(f"{options['data'][0]}: holds no records")
    return 0


def _stats(options: dict[str, Any]) -> int:
    from minift.data.records import find_files
    from minift.data.survey import survey, survey_text
    from minift.tokenizer.load import load_tokenizer

    files = find_files(options["data"])
    tokenizer = load_tokenizer(options["tokenizer"])
    options_of_text = options["text_field"], options["template"], reading_of(options), options["rendered"]
    result = survey(files, tokenizer, *options_of_text)
    print(survey_text(result))
    write_json(options["json"], result)
    return 0


def _format(options: dict[str, Any]) -> int:
    from minift.data.conversations import read_all_conversations
    from minift.data.records import Skipped
    from minift.data.templates import choose_template, template_named
    from minift.data.written import record_of, written
    from minift.storage.atomic import write_file
    from minift.tokenizer.load import load_tokenizer

    check_number("-n", options["n"], least=1)
    out, template = options["out"], options["template"]
    if out is not None and Path(out).exists():
        raise InputError(f"{out}: exists; choose another --out")
    tokenizer = load_tokenizer(options["tokenizer"]) if options["tokenizer"] else None
    found = read_all_conversations(options["data"], Skipped(), reading_of(options))
    if out is None:
        for conversation in found[: options["n"]]:
            _print_conversation(conversation, template, tokenizer, options["rendered"])
        return 0
    if template is None:
        if options["as_text"]:
            raise InputError(f"--as-text needs a --template: {TEMPLATES}")
        lines, state = [record_of(conversation) for conversation in found], "as they were read"
    else:
        name = choose_template(template, found, tokenizer, options["rendered"])
        lines, reading = written(found, template_named(name, tokenizer, options["rendered"]), options["as_text"])
        state = f"in the template {name}{reading}"
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in lines)
    try:
        write_file(Path(out), lambda partial: partial.write_text(text, encoding="utf-8"))
    except RunError as error:
        raise InputError(str(error)) from None
    kind = (
        "pairs" if all(conversation.question and len(conversation.turns) < 4 for conversation in found) else "records"
    )
    print(f"saved: {out} ({len(found):,} {kind} {state})")
    return 0


def _audit(options: dict[str, Any]) -> int:
    from minift.config import FINETUNE
    from minift.data.audit import audit
    from minift.data.records import find_files
    from minift.look.audit import audit_text
    from minift.look.pages.audit import audit_page
    from minift.runs.defaults import batch_size_of
    from minift.tokenizer.load import load_tokenizer

    names = ("template", "learn", "rendered", "seed")
    positions = _positions(options["model"])
    length = options["max_length"]
    if length is None:  # finetune keeps all that the model can hold
        length = positions or FINETUNE.max_length
    config = FINETUNE.replace(max_length=length, **{name: options[name] for name in names})
    count = options["sample"]
    if count is not None:
        check_number("--sample", count, least=0, below=1_001)
    shown = 3 if count is None else count
    files, test = find_files(options["data"]), find_files(options["test"]) if options["test"] else []
    tokenizer = load_tokenizer(options["model"])
    drawn = 20 if options["html"] is not None and count is None else shown
    if 0 < positions < config.max_length:
        raise InputError(f"--max-length is {config.max_length}; the model has {positions} positions")
    result = audit(files, tokenizer, config, reading_of(options), test, drawn, positions, batch_size_of)
    print(audit_text(result, shown))
    texts = {}
    if options["html"] is not None:
        texts[options["html"]] = audit_page(result, options["model"])
    if options["json"] is not None:
        texts[options["json"]] = json_text({"model": options["model"], **result.to_dict()})
    write_texts(texts)
    return 0


def _positions(model: str) -> int:
    """Return the positions of a model; 0 where only its tokenizer is there."""
    from minift.formats.open import open_model
    from minift.storage.names import model_path

    try:
        return open_model(model_path(model)).config.max_position_embeddings
    except InputError:
        return 0


def _print_conversation(
    conversation: "Conversation", template: str | None, tokenizer: "Tokenizer | None", rendered: bool
) -> None:
    """Print a pair or chat in one template, or in all that fit it."""
    from minift.data.templates import TEMPLATES as TEXT_TEMPLATES
    from minift.data.templates import choose_template, template_named

    names = [choose_template(template or "auto", [conversation], tokenizer, rendered)]
    if template is None and names == ["plain"]:  # it has a question, and the question carries no template
        names = [name for name in TEXT_TEMPLATES if name not in ("carried", "joined")]
    for name in names:
        for spans in template_named(name, tokenizer, rendered).examples(conversation):
            text = "".join(f"[{span.text}]" if span.learned else span.text for span in spans)
            print(f"--- {one_line(conversation.where)}, {name}: the text; what is learned is in [ ]\n{text}")
