"""The commands that use a model: `minift generate`, `compare`, `evaluate`, `convert` and `info`."""

import signal
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.cli.parts import (
    MODEL_HELP,
    TEXT_FIELD_HELP,
    add_command,
    add_device,
    add_no_check,
    add_plain,
    add_reading,
    add_rendered,
    add_sampling,
    add_template,
    json_text,
    load,
    print_answer,
    reading_of,
    sampling_of,
    write_json,
    write_texts,
)
from minift.config import TrainConfig
from minift.errors import InputError, did_you_mean, one_line
from minift.look.report import mistake_lines, samples, score_lines, table
from minift.storage.system import command_line
from minift.values import check_number, size

if TYPE_CHECKING:
    from minift.prompts import Conversation, Pair
    from minift.tokenizer.base import Tokenizer

FILE_DTYPES = ("float32", "bfloat16", "float16", "float64")


GENERATE_MORE = """\
examples:
  minift generate --model bundled --prompt "What is the capital of Mexico?"
  minift generate --model runs/finetune/final --prompt "Name a fruit." --temperature 1 --seed 3"""


def add_generate(commands: Any) -> None:
    """Add `minift generate`."""
    command = add_command(
        commands, "generate", _generate, "let a model continue a prompt, and print what it adds", GENERATE_MORE
    )
    command.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="continue this text")
    add_template(command)
    add_rendered(command)
    command.add_argument("--system", default="", metavar="TEXT", help="tell the model this before the prompt")
    add_sampling(command, max_new_tokens=64)
    add_device(command)
    add_plain(command)
    add_no_check(command)


def _generate(options: dict[str, Any]) -> int:
    from minift.data.templates import choose_template, template_named
    from minift.pack import encode_prompt
    from minift.prompts import Pair
    from minift.tokenizer.chat import stop_at_turns

    sampling = sampling_of(options)
    model, tokenizer = load(options["model"], options["device"], options["plain"], options["check"])
    pair, rendered = Pair(options["prompt"], answer="", system=options["system"]), options["rendered"]
    name = options["template"]
    if name == "auto":
        name, rendered = _template_of_prompt(pair, tokenizer, rendered)
    elif pair.question.strip():  # no question, no conflict: a text from its beginning
        name = choose_template(name, [pair], tokenizer, rendered)
    template = template_named(name, tokenizer, rendered)
    stop_at_turns(model, template, tokenizer)
    prompt = encode_prompt(template.prompt(pair), tokenizer)
    print_answer(model, tokenizer, prompt, options["max_new_tokens"], sampling, options["plain"])
    return 0


def _template_of_prompt(pair: "Pair", tokenizer: "Tokenizer", rendered: bool) -> tuple[str, bool]:
    """Return the template for a prompt, and whether it is rendered already: then its markers count.

    That is the model's own, if it has one, unless the prompt carries a template or holds a marker.
    """
    from minift.data.templates import carried_template, choose_template
    from minift.tokenizer.chat import has_chat_template

    written = (
        rendered or carried_template(pair.question) or any(name in pair.question for name in tokenizer.marker_names)
    )
    if has_chat_template(tokenizer) and pair.question.strip() and not written:
        return "chat", False
    name = choose_template("auto", [pair], tokenizer) if not pair.system else "plain"
    return ("plain" if name == "text" else name), True


COMPARE_MORE = """\
example:
  minift compare bundled runs/finetune/final --data data/test.jsonl --html compare.html"""


def add_compare(commands: Any) -> None:
    """Add `minift compare`."""
    text = "compare two models on held-out pairs or chats: scores with their intervals, and answers"
    command = add_command(commands, "compare", _compare, text, COMPARE_MORE)
    command.add_argument("before", metavar="BEFORE", help=MODEL_HELP)
    command.add_argument("after", metavar="AFTER", help="a second model, of any of these formats")
    text = "ask these pairs, or the last questions of these chats: JSON Lines, a JSON array, CSV, TSV, Parquet or Arrow"
    command.add_argument("--data", nargs="+", required=True, metavar="FILE", help=text)
    add_reading(command)
    add_template(command)
    add_rendered(command)
    command.add_argument("--show", type=int, default=4, metavar="N", help="print N answers (default: 4)")
    command.add_argument("--json", metavar="FILE", help="write the scores and all answers to FILE")
    command.add_argument("--html", metavar="FILE", help="write a page to FILE that a browser shows")
    add_device(command)
    add_plain(command)
    add_no_check(command)


def _compare(options: dict[str, Any]) -> int:
    from minift.data.conversations import read_all_conversations
    from minift.data.templates import choose_template, template_named
    from minift.evaluation.evaluate import compare
    from minift.look.pages.run import comparison_page
    from minift.tokenizer.chat import has_chat_template, stop_at_turns

    check_number("show", options["show"], least=0)
    pairs = read_all_conversations(options["data"], None, reading_of(options))
    device, plain, check = options["device"], options["plain"], options["check"]
    before, after = (load(options[name], device, plain, check) for name in ("before", "after"))
    # Both get the same text: in a chat template, that of the model after training, or of the one before.
    owner = next((tokenizer for _, tokenizer in (after, before) if has_chat_template(tokenizer)), after[1])
    template = choose_template(options["template"], pairs, owner, options["rendered"])
    chosen = template_named(template, owner, options["rendered"])
    for (model, tokenizer), name in ((before, options["before"]), (after, options["after"])):
        stop_at_turns(model, chosen, tokenizer)
        missing = sorted(set(owner.marker_names) - set(tokenizer.marker_names)) if template == "chat" else []
        if missing:
            print(f"note: {one_line(name)} has no tokens for the template's markers ({', '.join(missing[:3])})")
    scores = compare(before, after, pairs, chosen, options["plain"])
    print(_template_line(template, pairs, owner))
    result = {"template": template, **scores}
    print(f"{table(result)}\n\n{samples(result, options['show'])}")
    texts = {}
    if options["html"] is not None:
        words = ["minift", "compare", options["before"], options["after"], "--data", *options["data"]]
        if options["encoding"] != "utf-8":
            words += ["--encoding", options["encoding"]]
        if options["fields"]:
            words += ["--fields", *options["fields"]]
        command = command_line([*words, "--template", options["template"], *["--rendered"] * options["rendered"]])
        texts[options["html"]] = comparison_page(result, [model.config for model, _ in (before, after)], command)
    if options["json"] is not None:
        texts[options["json"]] = json_text(result)
    write_texts(texts)
    return 0


def _template_line(name: str, conversations: "Sequence[Conversation]", tokenizer: "Tokenizer") -> str:
    """Return a line about what is asked, and in which template."""
    from minift.data.templates import passes_over_own
    from minift.prompts import Chat

    asked = "; of a chat, its last answer is asked" * any(isinstance(one, Chat) for one in conversations)
    own = passes_over_own(name, tokenizer)
    return f"template {one_line(name)}{' (the model has one of its own: --template chat)' * own}{asked}"


EVALUATE_MORE = """\
examples:
  minift evaluate --model runs/finetune/final --data data/test.jsonl --mistakes 3
  minift evaluate --data "data/pages/*.json.gz" --model bundled"""


def add_evaluate(commands: Any) -> None:
    """Add `minift evaluate`."""
    text = "score a model on held-out pairs, on multiple-choice questions, or on pages"
    command = add_command(commands, "evaluate", _evaluate, text, EVALUATE_MORE)
    command.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    text = "score on these records; the first one tells whether they are pairs, chats, multiple choice, or pages"
    command.add_argument("--data", nargs="+", required=True, metavar="FILE", help=text)
    add_reading(command)
    add_template(command)
    add_rendered(command)
    command.add_argument("--text-field", metavar="NAME", help=TEXT_FIELD_HELP)
    text = "cut a page into windows of N tokens (default: 256, or the model's positions if they are fewer)"
    command.add_argument("--max-length", type=int, metavar="N", help=text)
    text = "for pairs: list N answers of each kind of mistake (default: 0)"
    command.add_argument("--mistakes", type=int, default=0, metavar="N", help=text)
    command.add_argument("--json", metavar="FILE", help="write the scores to FILE")
    add_device(command)
    add_plain(command)
    add_no_check(command)


def _evaluate(options: dict[str, Any]) -> int:
    from minift.data.conversations import is_conversation
    from minift.data.records import find_files, read_records
    from minift.data.unpack import is_pipe, pipe_in_words
    from minift.evaluation.choices import has_choices

    check_number("mistakes", options["mistakes"], least=0)
    model, tokenizer = load(options["model"], options["device"], options["plain"], options["check"])
    files = find_files(options["data"])
    if (pipe := next(filter(is_pipe, files), None)) is not None:
        raise InputError(f"{pipe_in_words(pipe)} can be read only once; evaluate has to look at its data first")
    first = next(read_records(files[0], options["encoding"]), None)
    if first is not None and has_choices(first):
        scores = _evaluate_choices(model, tokenizer, files, options)
    elif first is None or is_conversation(first, options["text_field"], options["fields"]):
        scores = _evaluate_pairs(model, tokenizer, options)
    else:
        scores = _evaluate_pages(model, tokenizer, options)
    write_json(options["json"], scores)
    return 0


def _evaluate_pairs(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    from minift.data.conversations import read_all_conversations
    from minift.data.templates import choose_template, template_named
    from minift.evaluation.evaluate import evaluate, make_questions
    from minift.evaluation.mistakes import mistakes
    from minift.tokenizer.chat import stop_at_turns

    pairs = read_all_conversations(options["data"], None, reading_of(options), say=None)
    name = choose_template(options["template"], pairs, tokenizer, options["rendered"])
    template = template_named(name, tokenizer, options["rendered"])
    stop_at_turns(model, template, tokenizer)
    questions, skipped = make_questions(pairs, template, tokenizer, model.config.max_position_embeddings - 1)
    found = evaluate(model, tokenizer, questions, options["plain"])
    scores = {**found.to_dict(), "skipped": skipped}
    print(_template_line(name, pairs, tokenizer))
    print(score_lines(scores))
    if options["mistakes"]:
        scores["mistakes"] = mistakes(questions, found, options["mistakes"])
        print(f"\n{mistake_lines(scores['mistakes'])}")
    return scores


def _evaluate_pages(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    from minift.data.conversations import TEXT_FIELD
    from minift.data.records import Skipped
    from minift.data.stream import DocumentStream
    from minift.evaluation.intervals import score_values
    from minift.evaluation.likelihood import likelihood_scores, page_likelihoods

    positions = model.config.max_position_embeddings
    window = min(256, positions) if options["max_length"] is None else options["max_length"]
    check_number("max_length", window, least=1, below=positions + 1)
    text_field = options["text_field"] or TEXT_FIELD
    stream = DocumentStream(options["data"], text_field, epochs=1, skipped=Skipped(), encoding=options["encoding"])
    found = list(page_likelihoods(model, stream, tokenizer, window))
    scores = {**score_values(likelihood_scores(found)), "n": len(found)}
    print(score_lines(scores))
    return scores


def _evaluate_choices(model: Any, tokenizer: Any, files: Sequence[Path], options: dict[str, Any]) -> dict[str, Any]:
    from minift.data.records import read_records
    from minift.data.templates import choose_template, template_named
    from minift.evaluation.choices import choice_scores, choose, fitting_questions, read_choices
    from minift.evaluation.intervals import score_values
    from minift.prompts import Pair

    questions = read_choices(chain.from_iterable(read_records(file, options["encoding"]) for file in files))
    asked = [Pair(one.question, "", where=one.where) for one in questions]
    template = template_named(choose_template(options["template"], asked, tokenizer), tokenizer, options["rendered"])
    questions, skipped = fitting_questions(questions, template, tokenizer, model.config.max_position_embeddings)
    found = choose(model, tokenizer, questions, template)
    scores = {**score_values(choice_scores(questions, found)), "n": len(questions), "skipped": skipped}
    print(score_lines(scores))
    return scores


# Checkpoints ----------------------------------------------------------------------------------------------------------


CONVERT_MORE = """\
examples:
  minift convert runs/finetune/final my-model --to hf
  minift convert my-model model.bin --to llama2c"""


def add_convert(commands: Any) -> None:
    """Add `minift convert`."""
    command = add_command(commands, "convert", _convert, "write a model in another format", CONVERT_MORE)
    command.add_argument("source", metavar="SRC", help=MODEL_HELP)
    command.add_argument("destination", metavar="DST", help="the folder to write; for llama2c, the file")
    command.add_argument("--to", required=True, metavar="native|hf|meta|llama2c", help="the format to write")
    text = "write the weights in this dtype (default: each tensor's own)"
    command.add_argument("--dtype", metavar="|".join(FILE_DTYPES), help=text)
    text = "write N model-parallel shards; for meta only (default: 1)"
    command.add_argument("--shards", type=int, default=1, metavar="N", help=text)
    text = "write this version of the header, 0 being the legacy one; for llama2c only (default: 0)"
    command.add_argument("--llama2c-version", type=int, default=0, metavar="0|1", help=text)
    text = "save this tokenizer with the model (default: the source's)"
    command.add_argument("--tokenizer", metavar="DIR|FILE", help=text)
    command.add_argument("--force", action="store_true", help="replace the checkpoint that is at DST")
    add_no_check(command)


def _convert(options: dict[str, Any]) -> int:
    import torch

    from minift.formats.convert import convert
    from minift.formats.files import dtype_name

    name, out = options["dtype"], options["destination"]
    if name is not None and name not in FILE_DTYPES:
        raise InputError(f"--dtype is {name!r}{did_you_mean(name, FILE_DTYPES)}; choose from {', '.join(FILE_DTYPES)}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up on a kill as on Ctrl-C
    try:
        result = convert(
            options["source"],
            out,
            options["to"],
            getattr(torch, name) if name else None,
            options["shards"],
            options["llama2c_version"],
            options["tokenizer"],
            options["force"],
            options["check"],
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    for note in result.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    total, nbytes = (sum(getattr(spec, what) for spec in result.specs.values()) for what in ("numel", "nbytes"))
    kinds = " and ".join(sorted({dtype_name(spec.dtype) for spec in result.specs.values()}))
    print(f"saved: {out} ({options['to']}, from {result.opened.format}; {total:,} parameters, {kinds}, {size(nbytes)})")
    return 0


INFO_MORE = """\
examples:
  minift info --model bundled
  minift info --config llama2-7b --device cuda --world 8"""


def add_info(commands: Any) -> None:
    """Add `minift info`."""
    text = "show a model's shape, and count its parameters, FLOPs and memory"
    command = add_command(commands, "info", _info, text, INFO_MORE)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help=MODEL_HELP)
    which.add_argument(
        "--config", metavar="NAME|FILE", help="a shape without weights: a preset's name, or a config.json"
    )
    command.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="count the memory of N texts at once (default: 1)"
    )
    text = "count texts of N tokens (default: all positions of the model, at most 4096)"
    command.add_argument("--max-length", type=int, metavar="N", help=text)
    text = "count the memory of training on this device (default: auto)"
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help=text)
    command.add_argument("--world", type=int, metavar="N", help="count what N processes send each other in a step")
    command.add_argument("--json", metavar="FILE", help="write the numbers to FILE; memory in bytes")


def _info(options: dict[str, Any]) -> int:
    import torch

    from minift.costs.info import info, info_text

    device = TrainConfig(device=options["device"]).device  # it need not be in this machine: nothing is run on it
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    result = info(
        options["model"],
        options["config"],
        options["batch_size"],
        options["max_length"],
        device,
        options["world"],
    )
    print(info_text(result))
    write_json(options["json"], result)
    return 0
