"""The commands that look at data and train tokenizers: `minift tokenizer …` and `minift data …`."""

import json
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.cli.parts import MODEL_HELP, TEXT_FIELD_HELP, add_command, write_json
from minift.errors import InputError, RunError, one_line
from minift.look.report import shorten
from minift.storage.names import model_path
from minift.values import check_number

if TYPE_CHECKING:
    from minift.prompts import Pair

PAGES_HELP = "files, globs or folders of JSON Lines or text, compressed or not; - for standard input"


def add_tokenizer(commands: Any) -> None:
    """Add `minift tokenizer train|show`."""
    parser = commands.add_parser("tokenizer", help="train a tokenizer, or show how one cuts a text")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    train = add_command(verbs, "train", _tokenizer_train, "train a BPE vocabulary on pages")
    train.add_argument("--data", nargs="+", required=True, metavar="GLOB", help=PAGES_HELP)
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces of the vocabulary")
    train.add_argument("--text-field", default="text", metavar="NAME", help="key of a page's text (text)")
    train.add_argument("--out", required=True, metavar="FILE", help="where to write the tokenizer.model")
    show = add_command(verbs, "show", _tokenizer_show, "show the pieces and ids of a text")
    show.add_argument("text", metavar="TEXT", help="the text to encode")
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
    """Add `minift data peek|stats|format`."""
    parser = commands.add_parser("data", help="look at data: its first records, its lengths, its pairs as text")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    peek = add_command(verbs, "peek", _peek, "print the first records of a corpus of any size, at once")
    peek.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    peek.add_argument("-n", type=int, default=5, metavar="N", help="records to show (5)")
    peek.add_argument("--full", action="store_true", help="do not shorten long texts")

    stats = add_command(verbs, "stats", _stats, "count documents or pairs, their tokens, and what cannot be used")
    stats.add_argument("data", nargs="+", metavar="GLOB", help=PAGES_HELP)
    stats.add_argument(
        "--tokenizer", default="bundled", metavar="DIR|FILE", help="count its tokens (bundled)"
    )
    stats.add_argument("--text-field", metavar="NAME", help=TEXT_FIELD_HELP)
    stats.add_argument("--template", default="auto", metavar="NAME", help="the template of pairs (auto)")
    stats.add_argument("--json", metavar="FILE", help="write the numbers to FILE")

    text = "print instruction pairs in each template, or write them as JSON Lines"
    formats = add_command(verbs, "format", _format, text)
    formats.add_argument("data", nargs="+", metavar="FILE", help="instruction pairs")
    formats.add_argument("-n", type=int, default=1, metavar="N", help="pairs to show (1)")
    formats.add_argument("--template", metavar="NAME", help="use only this one (all that fit; needed with --out)")
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
    from minift.prompts import TEMPLATES, choose_template
    from minift.storage.atomic import write_file

    check_number("-n", options["n"], least=1)
    out, template = options["out"], options["template"]
    if out is not None and Path(out).exists():
        raise InputError(f"{out}: exists; choose another --out")
    pairs = read_all_pairs(options["data"], Skipped())
    if out is None:
        for pair in pairs[: options["n"]]:
            _print_pair(pair, template)
        return 0
    if template is None:
        raise InputError(f"--out needs a --template: {', '.join(TEMPLATES)} or auto")
    name = choose_template(template, pairs)
    lines = _formatted(pairs, name, options["as_text"])
    try:
        write_file(Path(out), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))
    except RunError as error:
        raise InputError(str(error)) from None
    print(f"saved: {out} ({len(pairs):,} pairs in the template {name})")
    return 0


def _print_pair(pair: "Pair", template: str | None) -> None:
    """Print a pair in one template, or in all that fit it."""
    from minift.prompts import TEMPLATES, choose_template, template_named

    names = [choose_template(template or "auto", [pair])]
    if template is None and names == ["plain"]:  # it has a question, and the question carries no template
        names = [name for name in TEMPLATES if name != "carried"]
    for name in names:
        prompt, answer = template_named(name).format(pair)
        print(f"--- {one_line(pair.where)}, {name}: the prompt, then what is learned\n{prompt}[{answer}]")


def _formatted(pairs: Sequence["Pair"], template: str, as_text: bool) -> list[str]:
    """Return lines of JSON whose questions (or, `as_text`, texts) are in a template."""
    from minift.prompts import template_named

    chosen = template_named(template)
    lines = []
    for pair in pairs:
        prompt, answer = chosen.format(pair)
        values = {"text": prompt + answer} if as_text else {"question": prompt, "answer": pair.answer}
        if pair.metric and not as_text:
            values["metric"] = pair.metric
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return lines
