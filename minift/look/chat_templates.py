"""What minift does with chat templates: a table, by rendering ten conversations with each.

minift tokenizer templates FILE.jinja DIR …
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from minift.errors import InputError, one_line
from minift.prompts import Chat, Turn
from minift.tokenizer.chat import ChatTemplate, chat_template
from minift.tokenizer.chat_files import chat_source
from minift.tokenizer.chat_text import ChatText
from minift.tokenizer.load import load_tokenizer

# What looks like the name of an added token in a template, where there is no tokenizer to ask.
_NAME = re.compile(
    r"<\|[^\s|<>']+\|?>|<[a-z_]+\|>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]|<\uff5c[^\uff5c\s]+\uff5c>|<\|[A-Z_]+\|>"
)
_BOS, _EOS = "<s>", "</s>"  # by these names a template sees BOS and EOS then

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_TEXTS: dict[str, tuple[tuple[str, str], ...]] = {
    "one question": (("u", "What is the capital of Mexico?"), ("a", "Mexico City.")),
    "two questions": (("u", "Hi"), ("a", "Hello."), ("u", "Bye"), ("a", "See you.")),
    "three questions": (("u", "1"), ("a", "one"), ("u", "2"), ("a", "two"), ("u", "3"), ("a", "three")),
    "a system text": (("s", "Be brief."), ("u", "Hi"), ("a", "Hello."), ("u", "Bye"), ("a", "See you.")),
    "Unicode": (("u", "日本 é🙂?"), ("a", "はい 👩‍👩‍👧.")),
    "white space": (("u", "  def f(x):\n\treturn x\n\n"), ("a", "\n  x = 1\n"), ("u", " "), ("a", " . ")),
    "markers as text": (("u", "What are <|im_end|> and </s>?"), ("a", "<|im_end|> and [/INST] end a turn.")),
    "reasoning": (
        ("u", "1+1"),
        ("a", "<think>\nAdd.\n</think>\n\n2"),
        ("u", "2+2"),
        ("a", "<think>\nSo\n</think>\n\n4"),
    ),
    "an answer first": (("a", "How can I help?"), ("u", "Hi"), ("a", "Hello.")),
    "two users": (("u", "Hi"), ("u", "Are you there?"), ("a", "Yes.")),
}
CONVERSATIONS = tuple(
    (name, Chat(tuple(Turn(_ROLES[role], text, role == "a") for role, text in turns), where=name))
    for name, turns in _TEXTS.items()
)


@dataclass
class Verdict:
    """The verdict on a template, from ten conversations.

    Attributes:
        name: the template's.
        spans: how what is learned is known: "generation" or "prefixes".
        in_one, apart: how many conversations become one text, and how many one for each answer.
        refused: the conversations that are refused, by the reason.
    """

    name: str
    spans: str = ""
    in_one: int = 0
    apart: int = 0
    refused: dict[str, list[str]] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The verdict in words: on most of the conversations."""
        if self.in_one + self.apart <= len(CONVERSATIONS) // 2:
            return "refused"
        return "own examples" if self.apart else "one text"


def judge(template: ChatTemplate, name: str) -> Verdict:
    """Return what is done with the ten conversations."""
    verdict = Verdict(name, "generation" if template.text.marks_answers else "prefixes")
    for title, conversation in CONVERSATIONS:
        try:
            examples = template.examples(conversation)
        except InputError as error:
            reason = str(error).removeprefix(f"{title}: ").partition("; use a template")[0]
            reason = re.sub(r"writes '.*' where", "writes another text where", reason)
            reason = re.sub(r"turn with '.*', which", "turn with the answer, which", reason)
            reason = re.sub(r"turn \d+", "a turn", reason).replace(f"template {template.text.where}", "template")
            verdict.refused.setdefault(reason, []).append(title)
        else:
            verdict.apart += len(examples) > 1
            verdict.in_one += len(examples) == 1
    return verdict


def judge_path(path: str) -> Verdict:
    """Return what is done with the template of a `.jinja` file or of a model's folder.

    A file comes without a tokenizer. What looks like the name of an added token in its text is taken for one then.

    Raises:
        InputError: when there is no template, or it cannot be read.
    """
    if path.endswith(".jinja"):
        source, where = chat_source({}, path)
        name, make = Path(path).stem, partial(template_alone, source, Path(where).name)
    else:
        tokenizer = load_tokenizer(path)
        chat_source(tokenizer.files, None)
        name, make = path, partial(chat_template, tokenizer)
    try:
        return judge(make(), name)
    except InputError as error:
        return Verdict(name, refused={str(error): [title for title, _ in CONVERSATIONS]})


def template_alone(source: str, where: str) -> ChatTemplate:
    """Return a template without its tokenizer, with the names of added tokens that its texts seem to hold."""
    variables = {"bos_token": _BOS, "eos_token": _EOS}
    text = ChatText(source, where, (_BOS, _EOS), variables)
    turns = CONVERSATIONS[1][1].turns
    written = text.render(turns, where) + text.render(turns[:-1], where, prompt=True)  # names may be put together
    names = {_BOS, _EOS, *_NAME.findall(source), *_NAME.findall(written)}
    return ChatTemplate(ChatText(source, where, tuple(sorted(names)), variables))


def table(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a table in Markdown, with a line that counts them."""
    lines = ["| template | verdict | spans by | refused, of ten conversations |", "| --- | --- | --- | --- |"]
    for verdict in verdicts:
        reasons = [
            f"{', '.join(titles) if len(titles) <= 4 else f'{len(titles)} of them'}: {reason}"
            for reason, titles in verdict.refused.items()
        ]
        cells = (verdict.name, verdict.word, verdict.spans, "; ".join(reasons))
        lines.append(f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    counts = Counter(verdict.word for verdict in verdicts)
    words = [f"{counts[word]} {word}" for word in ("one text", "own examples", "refused")]
    return "\n".join([*lines, "", f"{len(verdicts)} templates: {', '.join(words)}"])
