"""Run `minift chat`: a conversation in the terminal, in the model's own template."""

import re
import sys
from dataclasses import replace
from typing import Any

from minift.cli.parts import (
    MODEL_HELP,
    add_command,
    add_device,
    add_no_check,
    add_plain,
    add_sampling,
    add_template,
    load,
    print_answer,
    sampling_of,
)
from minift.errors import InputError, one_line

CHAT_MORE = """\
Each line is a question, and the model sees all that was said before it. /clear begins anew, /exit or
the end of the input leaves. Ctrl-C ends an answer and, where none is being given, leaves.

examples:
  minift chat --model runs/chats/final
  minift chat --model bundled --template qa --system "Be brief.\""""

COMMANDS = ("/clear", "/exit")


def add_chat(commands: Any) -> None:
    """Add `minift chat`."""
    text = "hold a conversation with a model in the terminal"
    command = add_command(commands, "chat", _chat, text, CHAT_MORE)
    command.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    command.add_argument("--system", default="", metavar="TEXT", help="tell the model this before the first question")
    add_template(command)
    add_sampling(command, max_new_tokens=256)
    add_device(command)
    add_plain(command)
    add_no_check(command)


def _chat(options: dict[str, Any]) -> int:
    from minift.data.templates import template_named
    from minift.prompts import Chat, Turn
    from minift.tokenizer.chat import has_chat_template, stop_at_turns

    sampling = sampling_of(options)
    model, tokenizer = load(options["model"], options["device"], options["plain"], options["check"])
    name = options["template"]
    if name == "auto":
        name = "chat" if has_chat_template(tokenizer) else "plain"
        if name == "plain":
            print("note: the model has no chat template; it is asked in plain (--template)", file=sys.stderr)
    template = template_named(name, tokenizer)
    stop_at_turns(model, template, tokenizer)
    begin = (Turn("system", options["system"]),) if options["system"] else ()
    chat, spoken = Chat(begin), sys.stdin.isatty()
    if spoken:
        print(f"{one_line(options['model'])}, template {one_line(name)}; {' and '.join(COMMANDS)} are commands")
    while (question := _question(spoken)) is not None:
        command = question.strip().lower()
        if command == "/exit":
            break
        if command == "/clear":
            chat = Chat(begin)
        elif re.fullmatch(r"/[a-z]+", command):
            print(f"note: unknown command {command}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        elif command:
            asked = replace(chat, turns=(*chat.turns, Turn("user", question)))
            try:
                asked, prompt = _fitting(asked, len(begin), template, tokenizer, model.config.max_position_embeddings)
            except InputError as error:  # the conversation goes on without this question
                print(f"note: {one_line(error)}", file=sys.stderr)
                continue
            limit = options["max_new_tokens"]
            answer = print_answer(model, tokenizer, prompt, limit, sampling, options["plain"], talks=True)
            chat = replace(asked, turns=(*asked.turns, Turn("assistant", answer)))
    return 0


def _question(spoken: bool) -> str | None:
    """Return the next line of standard input, or None at its end."""
    try:
        return input("> " if spoken else "")
    except (EOFError, KeyboardInterrupt):
        if spoken:
            print()
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not {error.encoding} text") from None


def _fitting(chat: Any, start: int, template: Any, tokenizer: Any, positions: int) -> tuple[Any, list[int]]:
    """Return the chat and the ids of its prompt, without its oldest questions where all do not fit the model.

    Args:
        start: the number of turns that are never left out, at the beginning.

    Raises:
        InputError: when the last question alone does not fit.
    """
    from minift.pack import encode_prompt
    from minift.prompts import Turn

    forgotten = 0
    while True:
        asked = replace(chat, turns=(*chat.turns, Turn("assistant", "", learned=True)))  # whose prompt is wanted
        prompt = encode_prompt(template.prompt(asked), tokenizer)
        if len(prompt) < positions:
            if forgotten:
                print(f"note: {forgotten} earlier answers no longer fit and are forgotten", file=sys.stderr)
            return chat, prompt
        if len(chat.turns) <= start + 1:
            raise InputError(f"the question takes {len(prompt)} tokens; the model has {positions} positions")
        chat = replace(chat, turns=(*chat.turns[:start], *chat.turns[start + 2 :]))
        forgotten += 1
