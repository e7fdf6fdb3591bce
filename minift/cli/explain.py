"""Run `minift explain`: from the command's words to X-rays."""

import shutil
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from minift.cli.parts import (
    MODEL_HELP,
    add_command,
    add_device,
    add_learn,
    add_no_check,
    add_plain,
    add_reading,
    add_rendered,
    add_template,
    json_text,
    load,
    reading_of,
    write_texts,
)
from minift.cli.streams import shows_colours, write_exact
from minift.config import TrainConfig
from minift.errors import InputError, did_you_mean
from minift.look.report import xray_table
from minift.values import check_number

if TYPE_CHECKING:  # `minift --help` need not wait for what these import
    from minift.look.explain import XRay
    from minift.prompts import Conversation, Template


EXPLAIN_MORE = """\
examples:
  minift explain "The capital of France is Paris." --model bundled
  minift explain "What is the capital of Mexico?" --answer "Mexico City" --model bundled --html xray.html"""


def add_explain(commands: Any) -> None:
    """Add `minift explain`."""
    text = "show what the loss sees at every token of a text, or of a question and its answer"
    command = add_command(commands, "explain", _explain, text, EXPLAIN_MORE)
    command.add_argument("text", nargs="?", metavar="TEXT", help="a text; with --answer, a question")
    command.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    command.add_argument("--against", metavar="DIR", help="a second model, of any of these formats")
    command.add_argument("--answer", metavar="TEXT", help="learn this answer; the question is then only given")
    command.add_argument("--data", nargs="+", metavar="FILE", help="show records of these files instead of TEXT")
    add_reading(command)
    text = "show N records of --data, packed as in training (default: 1)"
    command.add_argument("-n", type=int, default=1, metavar="N", help=text)
    command.add_argument("--skip", type=int, default=0, metavar="N", help="skip the first N records (default: 0)")
    command.add_argument("--no-pack", dest="pack", action="store_false", help="give each record its own row")
    add_template(command)
    add_rendered(command)
    add_learn(command)
    text = "compute in this dtype (default: float32)"
    command.add_argument("--dtype", default="float32", metavar="float32|bfloat16|float16", help=text)
    text = "colour the lines by surprise; auto does so in a terminal (default: auto)"
    command.add_argument("--colour", default="auto", metavar="auto|always|never", help=text)
    command.add_argument("--html", metavar="FILE", help="write a page to FILE that a browser shows")
    command.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    add_device(command)
    add_plain(command)
    add_no_check(command)


def _explain(options: dict[str, Any]) -> int:
    from minift.look.pages.xray import xray_page
    from minift.runs.machine import choose_device

    colour = _colour(options["colour"])
    if options["against"] == options["model"]:
        raise InputError("--against is the same model as --model; give another one to compare with")
    conversations = _conversations(options)
    names = ("dtype", "device", "template", "learn", "rendered")
    config = TrainConfig(**{name: options[name] for name in names})
    choose_device(config)  # refuse a wrong device before a model is loaded
    models = [model for model in (options["model"], options["against"]) if model is not None]
    template = _template(models, conversations, config)
    xrays = {model: _xray(model, conversations, template, config, options) for model in models}
    shown = xray_table(xrays, colour, shutil.get_terminal_size((120, 24)).columns)
    if colour:  # nothing but the colours of the table is obeyed: tokens and names in it are spelled out
        write_exact(f"{shown}\n")
    else:
        print(shown)
    texts = {}
    if options["html"] is not None:
        texts[options["html"]] = xray_page(xrays)
    if options["json"] is not None:
        texts[options["json"]] = json_text({"models": {model: xray.to_dict() for model, xray in xrays.items()}})
    write_texts(texts)
    return 0


def _template(models: "list[str]", conversations: "list[Conversation]", config: TrainConfig) -> "Template":
    """Return the template of the conversations, for all models; a chat template is the last one's, or the first's."""
    from minift.data.templates import choose_template, template_named
    from minift.tokenizer.chat import has_chat_template
    from minift.tokenizer.load import load_tokenizer

    tokenizers = [load_tokenizer(model) for model in reversed(models)]
    owner = next(filter(has_chat_template, tokenizers), tokenizers[0])
    return template_named(
        choose_template(config.template, conversations, owner, config.rendered), owner, config.rendered
    )


def _xray(
    path: str, conversations: "list[Conversation]", template: "Template", config: TrainConfig, options: dict[str, Any]
) -> "XRay":
    """Load a model and return its X-ray of the conversations. Say on standard error what is left out or cut."""
    from minift.data.examples import encode_conversations
    from minift.look.explain import explain

    # `explain` installs the kernels of training.
    model, tokenizer = load(path, config.device, plain=True, check=options["check"])
    positions = model.config.max_position_embeddings
    examples, dropped = encode_conversations(conversations, template, tokenizer, positions, config.learn)
    if dropped:
        print(f"note: {dropped} of {dropped + len(examples)} records have no target and are left out", file=sys.stderr)
    if any(example.cut for example in examples):
        print(f"note: cut to the {positions:,} positions of {path}", file=sys.stderr)
    return explain(model, tokenizer, examples, config, options["pack"], options["plain"])


def _conversations(options: dict[str, Any]) -> "list[Conversation]":
    """Return what to show: the text, the question with its answer, or some records of a file."""
    from minift.data.conversations import scan_conversations
    from minift.data.records import find_files, scan
    from minift.prompts import Pair

    text, answer = options["text"], options["answer"]
    if (text is None) == (options["data"] is None):
        raise InputError("give a TEXT, or --data with records to show: one of them (see minift explain --help)")
    if text is not None:
        if not text.strip():
            raise InputError("TEXT is blank: there is nothing to show")
        if answer is None:
            return [Pair(question="", answer=text)]
        if not answer.strip():
            raise InputError("--answer is blank: there would be nothing to learn")
        return [Pair(question=text, answer=answer)]
    if answer is not None:
        raise InputError("--answer belongs to a TEXT; the records of --data have their own")
    count, skip = options["n"], options["skip"]
    check_number("n", count, least=1)
    check_number("skip", skip, least=0)
    files, reading = find_files(options["data"]), reading_of(options)
    records = (item for file in files for item in scan(file, reading.encoding))
    found = list(islice(scan_conversations(records, reading), skip, skip + count))
    for fault in found:
        if isinstance(fault, InputError):
            raise fault
    if not found:
        raise InputError(f"{options['data'][0]}: has no more than {skip} records" if skip else f"{files[0]}: is empty")
    for line in reading.unread_lines():
        print(f"note: {line}", file=sys.stderr)
    return [conversation for conversation in found if not isinstance(conversation, InputError)]


def _colour(when: str) -> bool:
    """Return whether to use colours. Raises InputError for a word that is not known."""
    known = ("auto", "always", "never")
    if when not in known:
        raise InputError(f"--colour is {when!r}{did_you_mean(when, known)}; choose from {', '.join(known)}")
    return shows_colours() if when == "auto" else when == "always"
