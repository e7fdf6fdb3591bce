"""What the commands share: a parser whose errors are one line, flags, loading a model, writing a result."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minift.cli.streams import write_exact
from minift.config import LEARN, TrainConfig
from minift.errors import InputError, did_you_mean, printable
from minift.values import check_number

if TYPE_CHECKING:
    from minift.data.conversations import Reading
    from minift.generate import Sampling

MODEL_HELP = (
    "a model of any format: a minift, Hugging Face or Meta folder, a llama2.c .bin, an adapter's folder, "
    "a name on Hugging Face's hub whose files are in this machine's cache, or `bundled`, minift's own small base"
)
TEXT_FIELD_HELP = (
    "find a page's text under this key of its record (default: text); if it is given, records that have it are pages, "
    "even those that hold a pair as well"
)
TEMPLATES = "auto, chat (the model's own), plain, qa, alpaca, llama2, llama3, or a FILE.txt or FILE.jinja"


# The parser -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line, as all errors of minift are. It keeps the lines of a description."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help="show this help")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # of a command's own words, too
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # a group's words are its verb's
            self._check_flags(words[: words.index("--")] if "--" in words else words)
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _check_flags(self, words: Sequence[str]) -> None:
        """Raise InputError for a flag that is unknown, before another one is missed that may be meant."""
        for word in words:
            flag, known = word.partition("=")[0], self._option_string_actions
            if flag.startswith("--") and " " not in word and flag not in known:
                names = [name for name in known if name.startswith("--")]
                self.error(f"unrecognized arguments: {word}{did_you_mean(flag, names)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "unknown" if isinstance(action.choices, dict) else "invalid choice:"  # a command, or a flag's value
            known = [str(choice) for choice in action.choices]
            message = f"{what} {value!r}{did_you_mean(str(value), known)}; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stdout, flush=True)  # argparse would hide that writing failed

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        values = super()._get_values(action, arg_strings)
        if values == [] and action.nargs != 0:  # `--lr=--`: some versions of Python drop every "--"
            raise argparse.ArgumentError(action, "expected an argument, found --")
        return values


def add_command(
    commands: Any, name: str, run: Callable[[dict[str, Any]], int], text: str, more: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand that calls `run` with its options and exits with what `run` returns; return its parser.

    Args:
        text: what it does, as a line in the list of commands.
        more: what its own help says after that, in lines of at most 100 characters, with an example.
    """
    description = f"{text[0].upper()}{text[1:]}.\n\n{more}".strip()
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    command.set_defaults(run=run)
    return command


def add_group(commands: Any, name: str, text: str) -> Any:
    """Add a subcommand that has subcommands of its own, its verbs; return what `add_command` adds them to."""
    more = f"`minift {name} VERB --help` describes a verb."
    group = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=more)
    return group.add_subparsers(title="verbs", metavar="VERB", required=True)


def add_device(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    text = "compute on this device; auto takes a GPU if there is one (default: auto)"
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help=text)


def add_template(command: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add --template."""
    text = f"write questions and answers in this template: {TEMPLATES} (default: {default})"
    command.add_argument("--template", default=default, metavar="NAME", help=text)


def add_reading(command: argparse.ArgumentParser, default: Any = None) -> None:
    """Add --encoding and --fields: how records of pairs and chats are read."""
    add_encoding(command, default or "utf-8")
    text = "read the question and the answer (or the one chat, or text) under these keys of a record"
    command.add_argument("--fields", nargs="+", default=default or (), metavar="KEY", help=text)


def add_rendered(command: argparse.ArgumentParser) -> None:
    """Add --rendered."""
    text = "take markers in the data's text as markers: it has been written in a template already"
    command.add_argument("--rendered", action="store_true", help=text)


def add_learn(command: argparse.ArgumentParser) -> None:
    """Add --learn."""
    text = "learn all answers of a chat, or only the last (default: all)"
    command.add_argument("--learn", default="all", choices=LEARN, metavar="|".join(LEARN), help=text)


def reading_of(options: dict[str, Any]) -> "Reading":
    """Return how the records are to be read, by --encoding and --fields."""
    from minift.data.conversations import Reading

    return Reading(options["encoding"], check_fields(options["fields"]))


def check_fields(names: Sequence[str]) -> tuple[str, ...]:
    """Return --fields. Raise InputError unless they are one or two different keys."""
    if len(names) > 2 or len(set(names)) < len(names) or "" in names:
        raise InputError(
            f"--fields is {' '.join(names)!r}; give the keys of a question and its answer, or that of a chat"
        )
    return tuple(names)


def add_encoding(command: argparse.ArgumentParser, default: str = "utf-8") -> None:
    """Add --encoding."""
    text = "read the data in this encoding: utf-8, utf-16, cp1252 or another (default: utf-8)"
    command.add_argument("--encoding", type=_encoding, default=default, metavar="NAME", help=text)


def _encoding(name: str) -> str:
    from minift.data.encodings import check_encoding

    try:
        return check_encoding(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_plain(command: argparse.ArgumentParser, trains: bool = False) -> None:
    """Add --plain."""
    text = "run the code as it is read: install no faster kernels (minift/kernels/)"
    text += ". --resume wants it again" * trains
    command.add_argument("--plain", action="store_true", help=text)


def add_no_check(command: argparse.ArgumentParser) -> None:
    """Add --no-check."""
    text = "use the model's files without comparing them with their checksums (SHA256SUMS): faster, but blind to damage"
    command.add_argument("--no-check", dest="check", action="store_false", help=text)


# Models and results ---------------------------------------------------------------------------------------------------


def load(name: str, device: str, plain: bool, check: bool) -> Any:
    """Return a model and its tokenizer; unless it is to be plain, with the kernels for a model that is not trained.

    Args:
        check: compare its files with the checksums in its folder first.

    Raises:
        InputError: when they are missing or damaged, or do not fit together.
    """
    from minift import kernels
    from minift.checkpoint import load_model
    from minift.runs.machine import choose_device
    from minift.tokenizer.load import check_fit, load_tokenizer

    model = load_model(name, device=choose_device(TrainConfig(device=device)), check=check)
    tokenizer = load_tokenizer(name)
    check_fit(model.config, tokenizer)
    if not plain:
        kernels.install(model, kernels.choose_for_reading(model.device))
    return model, tokenizer


def add_sampling(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add --max-new-tokens, --temperature, --top-k, --top-p and --seed."""
    text = f"add at most N tokens (default: {max_new_tokens})"
    command.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=text)
    text = "divide the logits by X before a token is drawn; 0 always takes the likeliest token (default: 0)"
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help=text)
    text = "draw among the N likeliest tokens; 0 draws among all (default: 0)"
    command.add_argument("--top-k", type=int, default=0, metavar="N", help=text)
    text = "draw among the likeliest tokens that together have the probability X (default: 1)"
    command.add_argument("--top-p", type=float, default=1.0, metavar="X", help=text)
    text = "start the random numbers from N: the same seed gives the same text (default: 0)"
    command.add_argument("--seed", type=int, default=0, metavar="N", help=text)


def sampling_of(options: dict[str, Any]) -> "Sampling":
    """Return how tokens are drawn. Raises InputError for a number out of bounds."""
    from minift.generate import Sampling

    check_number("max_new_tokens", options["max_new_tokens"], least=1)
    return Sampling(options["temperature"], options["top_k"], options["top_p"], options["seed"])


def print_answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    limit: int,
    sampling: "Sampling",
    plain: bool,
    talks: bool = False,
) -> str:
    """Print what a model adds to a prompt, as it comes, without white space around it. Return all of its text.

    In a conversation (`talks`), Ctrl-C ends the answer alone. On a terminal, an answer that was cut is said to be.
    """
    from minift.generate import stream
    from minift.tokenizer.stream import TextStream

    text, answer, waiting = TextStream(tokenizer), "", ""
    shown, count, room = False, 0, model.config.max_position_embeddings - len(prompt)
    try:
        for id in chain(stream(model, prompt, limit, sampling, plain), [None]):
            count += id is not None
            part = text.end() if id is None else text.add(id)
            answer, waiting = answer + part, waiting + part
            ready = waiting.rstrip()  # no blank lines around the text: white space is shown when something follows it
            if ready:
                part = ready if shown else ready.lstrip()
                write_exact(printable(part) if sys.stdout.isatty() else part)  # what reads a pipe gets the text itself
                shown, waiting = True, waiting[len(ready) :]
    except KeyboardInterrupt:
        if not talks:
            raise
    print()
    if count == min(limit, room) and sys.stderr.isatty():
        why = f"--max-new-tokens {limit}" if limit <= room else f"the model's last position, {len(prompt) + room}"
        print(f"note: stopped at {why}; the model had not ended its text", file=sys.stderr)
    return answer


def check_outputs(options: Mapping[str, Any]) -> None:
    """Raise InputError when a file of results (--json, --html) cannot be written: before the work, not after it."""
    for name in ("json", "html"):
        if (file := options.get(name)) is None:
            continue
        path = Path(file)
        if os.path.isdir(path):
            reason = "is a folder"
        elif not os.path.isdir(path.parent):
            reason = f"there is no folder {path.parent}"
        elif not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
            reason = "Permission denied"
        elif name == "html" and options.get("json") == file:
            reason = "--json names the same file"
        else:
            continue
        raise InputError(f"{file}: cannot be written: {reason}")


def json_text(values: dict[str, Any]) -> str:
    """Return the text of a file of results."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def write_json(file: str | None, values: dict[str, Any]) -> None:
    """Write a result to a file, if one was asked for. Raises InputError when the disk refuses."""
    if file is not None:
        write_texts({file: json_text(values)})


def write_texts(texts: Mapping[str, str]) -> None:
    """Write each text to its file: all of them, or none.

    What is not Unicode in them (a path may be so) is escaped; in JSON it is read back as it was.

    Raises:
        InputError: when the disk refuses.
    """
    created = [file for file in texts if not os.path.lexists(file)]
    for file, text in texts.items():
        try:
            Path(file).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            for other in created:
                with suppress(OSError):
                    os.unlink(other)
            raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None
