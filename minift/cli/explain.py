"""`minift explain`: from the command's words to X-rays. Read next: `look/explain.py`."""

import os
import shutil
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from minift.cli.parts import MODEL_HELP, add_command, json_text, load, write_texts
from minift.config import TrainConfig
from minift.errors import InputError
from minift.look.report import xray_table
from minift.values import check_number

if TYPE_CHECKING:  # which imports torch, and `minift --help` does without
    from minift.prompts import Pair


def add_explain(commands: Any) -> None:
    """Add the command to the parser."""
    text = "what the loss sees at every token of a text, or of a question and its answer"
    command = add_command(commands, "explain", _explain, text)
    command.add_argument("text", nargs="?", metavar="TEXT", help="a text; with --answer, a question")
    command.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    command.add_argument("--against", metavar="DIR", help="a second model to put beside it, as --model")
    command.add_argument("--answer", metavar="TEXT", help="the answer to learn; the question is then only given")
    command.add_argument("--data", nargs="+", metavar="FILE", help="in place of TEXT: records to look at")
    command.add_argument("-n", type=int, default=1, metavar="N", help="… so many of them, packed as in training (1)")
    command.add_argument("--skip", type=int, default=0, metavar="N", help="… behind the first N (0)")
    command.add_argument("--no-pack", dest="pack", action="store_false", help="… each in a row of its own")
    command.add_argument("--template", default="auto", metavar="NAME", help="that pairs are put into (auto)")
    command.add_argument("--dtype", default="float32", metavar="float32|bfloat16|float16", help="(float32)")
    command.add_argument("--colour", default="auto", metavar="auto|always|never", help="by surprise (auto)")
    command.add_argument("--html", metavar="FILE", help="write a page to look at in a browser")
    command.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda")


def _explain(options: dict[str, Any]) -> int:
    from minift.look.explain import XRay, explain
    from minift.look.pages.xray import xray_page
    from minift.pack import encode_pairs
    from minift.prompts import choose_template, template_named
    from minift.runs.machine import choose_device

    colour = _colour(options["colour"])
    if options["against"] == options["model"]:
        raise InputError("--against is the same model as --model; there would be nothing to compare")
    pairs = _pairs(options)
    name = choose_template(options["template"], pairs)
    config = TrainConfig(dtype=options["dtype"], device=options["device"], template=name)
    choose_device(config)
    xrays: dict[str, XRay] = {}
    for path in (options["model"], options["against"]):
        if path is None:
            continue
        model, tokenizer = load(path, options["device"])
        length = model.config.max_position_embeddings
        examples, dropped = encode_pairs(pairs, template_named(name), tokenizer, length)
        if dropped:
            print(f"note: {dropped} of {len(pairs)} records have no target and are left out", file=sys.stderr)
        if any(example.answer[-1] != tokenizer.eos_id for example in examples):
            print(f"note: cut to the {length:,} positions of {path}", file=sys.stderr)
        xrays[path] = explain(model, tokenizer, examples, config, options["pack"])
    print(xray_table(xrays, colour, shutil.get_terminal_size((120, 24)).columns))
    texts = {}
    if options["html"] is not None:
        texts[options["html"]] = xray_page(xrays)
    if options["json"] is not None:
        texts[options["json"]] = json_text({"models": {path: xray.to_dict() for path, xray in xrays.items()}})
    write_texts(texts)
    return 0


def _pairs(options: dict[str, Any]) -> "list[Pair]":
    """What to look at: the text, the question with its answer, or some records of a file."""
    from minift.data.pairs import scan_pairs
    from minift.data.records import find_files, scan
    from minift.prompts import Pair

    text, answer = options["text"], options["answer"]
    if (text is None) == (options["data"] is None):
        raise InputError("give a TEXT, or --data with records to look at: one of them (see minift explain --help)")
    if text is not None:
        if not text.strip():
            raise InputError("TEXT is blank: there is nothing to look at")
        if answer is None:
            return [Pair(question="", answer=text)]
        if not answer.strip():
            raise InputError("--answer is blank: there would be nothing to learn")
        return [Pair(question=text.rstrip(), answer=answer.strip())]
    if answer is not None:
        raise InputError("--answer belongs to a TEXT; the records of --data have their own")
    count, skip = options["n"], options["skip"]
    check_number("n", count, least=1)
    check_number("skip", skip, least=0)
    files = find_files(options["data"])
    pairs = list(islice(scan_pairs(item for file in files for item in scan(file)), skip, skip + count))
    for pair in pairs:
        if isinstance(pair, InputError):
            raise pair
    if not pairs:
        raise InputError(f"{options['data'][0]}: has no more than {skip} records" if skip else f"{files[0]}: is empty")
    return [pair for pair in pairs if isinstance(pair, Pair)]


def _colour(when: str) -> bool:
    if when not in ("auto", "always", "never"):
        raise InputError(f"--colour is {when!r}; choose from auto, always, never")
    if when == "auto":  # a terminal whose user has not asked for none (no-color.org)
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return when == "always"
