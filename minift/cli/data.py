"""The commands that look at data and make tokenizers: `minift tokenizer …` and `minift data …`. See `cli/__init__.py`."""

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minift.cli.parts import MODEL_HELP, add_command, write_json
from minift.errors import InputError, RunError, one_line
from minift.look.report import shorten
from minift.storage.names import model_path
from minift.values import check_number

PAGES_HELP = "files, globs or folders of JSON Lines or text, packed or not; - for standard input"


def add_tokenizer(commands: Any) -> None:
    """`minift tokenizer train|show`."""
    parser = commands.add_parser("tokenizer", help="train a tokenizer, or look at what one does")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    train = add_command(verbs, "train", _tokenizer_train, "make a BPE vocabulary from pages")
    train.add_argument("--data", nargs="+", required=True, metavar="GLOB", help=PAGES_HELP)
    train.add_argument("--vocab-size", type=int, required=True, metavar="N")
    train.add_argument("--text-field", default="text", metavar="NAME", help="key of a page's text (text)")
    train.add_argument("--out", required=True, metavar="FILE", help="where to write the tokenizer.model")
    show = add_command(verbs, "show", _tokenizer_show, "the pieces and ids of a text")
    show.add_argument("text", metavar="TEXT")
    show.add_argument("--model", default="bundled", metavar="DIR|FILE", help=f"{MODEL_HELP}, or a tokenizer.model")


def _tokenizer_train(options: dict[str, Any]) -> int:
    from minift.data.records import Skipped
    from minift.data.stream import DocumentStream
    from minift.tokenizer.sentencepiece import train_tokenizer

    out = Path(options["out"])
    if out.exists():
        raise InputError(f"{out}: exists; choose another --out")
    stream = DocumentStream(options["data"], options["text_field"], epochs=1, skipped=Skipped())
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

    tokenizer = load_tokenizer(model_path(options["model"]))
    ids = tokenizer.encode(options["text"])
    for id, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        print(f"{id:>6}  {piece}")
    print(f"{len(ids)} ids, {len(options['text'])} characters, vocabulary of {tokenizer.vocab_size}")
    return 0


def add_data(commands: Any) -> None:
    """`minift data peek|stats|format`."""
    parser = commands.add_parser("data", help="look at data: its first records, its lengths, its formats")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    peek = add_command(verbs, "peek", _peek, "the first records of a corpus of any size, at once")
    peek.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    peek.add_argument("-n", type=int, default=5, metavar="N", help="records to show (5)")
    peek.add_argument("--full", action="store_true", help="do not shorten long texts")

    stats = add_command(verbs, "stats", _stats, "documents or pairs, tokens, lengths, and what cannot be used")
    stats.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    stats.add_argument("--tokenizer", default="bundled", metavar="DIR|FILE", help="that counts the tokens (bundled)")
    stats.add_argument("--text-field", default="text", metavar="NAME", help="key of a page's text (text)")
    stats.add_argument("--template", default="auto", metavar="NAME", help="that pairs are put into (auto)")
    stats.add_argument("--json", metavar="FILE", help="write the numbers to FILE")

    text = "instruction pairs as text, in each template: to look at, or to write as JSON Lines"
    formats = add_command(verbs, "format", _format, text)
    formats.add_argument("data", nargs="+", metavar="FILE", help="instruction pairs")
    formats.add_argument("-n", type=int, default=1, metavar="N", help="pairs to show (1)")
    formats.add_argument("--template", metavar="NAME", help="only this one (for looking: all that fit)")
    formats.add_argument("--out", metavar="FILE", help="write all pairs to FILE, as question and answer")
    formats.add_argument("--as-text", action="store_true", help="write each pair as one text, as a page is")


def _peek(options: dict[str, Any]) -> int:
    from minift.data.records import find_files, read_records

    check_number("-n", options["n"], least=1)
    records = chain.from_iterable(read_records(file) for file in find_files(options["data"]))
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
    tokenizer = load_tokenizer(model_path(options["tokenizer"]))
    result = survey(files, tokenizer, options["text_field"], options["template"])
    print(survey_text(result))
    write_json(options["json"], result)
    return 0


def _format(options: dict[str, Any]) -> int:
    from minift.data.pairs import read_all_pairs
    from minift.data.records import Skipped
    from minift.prompts import TEMPLATES, choose_template, template_named, templates_for
    from minift.storage.atomic import write_file

    check_number("-n", options["n"], least=1)
    out, wanted = options["out"], options["template"]
    if out is not None and Path(out).exists():
        raise InputError(f"{out}: exists; choose another --out")
    skipped = Skipped()
    pairs = read_all_pairs(options["data"], skipped)
    if out is None:
        for pair in pairs[: options["n"]]:
            for name in [choose_template(wanted, [pair])] if wanted else templates_for(pair):
                prompt, answer = template_named(name).format(pair)
                print(f"--- {one_line(pair.where)}, {name}: the prompt, then what is learned\n{prompt}[{answer}]")
        return 0
    if wanted is None:
        raise InputError(f"--out needs a --template: {', '.join(TEMPLATES)} or auto")
    name = choose_template(wanted, pairs)
    lines = []
    for pair in pairs:
        prompt, answer = template_named(name).format(pair)
        values = {"text": prompt + answer} if options["as_text"] else {"question": prompt, "answer": pair.answer}
        if pair.metric and not options["as_text"]:
            values["metric"] = pair.metric
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    try:
        write_file(Path(out), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))
    except RunError as error:
        raise InputError(str(error)) from None
    print(f"saved: {out} ({len(pairs):,} pairs in the template {name})")
    return 0
