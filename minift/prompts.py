"""Instruction records → (prompt, answer): which fields hold them, and which text a template makes of them.

A base model only continues text. To finetune it to answer, a question and its answer are written as one text, and the
model is trained on the answer's part of it. *How* they are written is the template, and there is no right one: what
matters is that training and use agree, to the character. Here a template is two strings; `prompt + answer` is exactly
the text that the model sees. A prompt never ends in a space or newline (the separator belongs to the answer), because
in Llama's vocabulary a space is part of the word that follows it.

    plain    What is the capital of Mexico? Mexico City
    qa       ### Question:⏎What is the capital of Mexico?⏎⏎### Answer:⏎Mexico City
    alpaca   Below is an instruction that describes a task. … ### Response:⏎Mexico City
    llama2   [INST] What is the capital of Mexico? [/INST] Mexico City
    llama3   <|start_header_id|>user<|end_header_id|>⏎⏎What is the capital of Mexico?<|eot_id|>…⏎⏎Mexico City

A template of your own is a file that holds the text of a pair, with `{question}` and `{answer}` where they belong, and
`{context}` and `{system}` if there is anything of that kind; `--template my_template.txt` takes it.

`auto` keeps the template that the questions of a file already carry (`lamini_docs.jsonl` ends each of them in
"### Answer:"), and takes `plain` where they carry none. See what a model makes of a template it was not trained with:

    minift generate --model bundled --template qa --prompt "What is the capital of Mexico?"

Read next: `pack.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minift.errors import InputError

CARRIED_MARKERS = ("### Answer:", "### Response:")


@dataclass(frozen=True)
class Pair:
    """One instruction record: what is asked, what should be answered.

    Attributes:
        answer: "" where a data set holds a question that nobody answered; such a pair has no target.
        question: "" where nothing is asked: all of the answer is learned, behind BOS.
        context: extra text that the question speaks of (Alpaca's `input`), or "".
        system: what the model is told before every question, or "".
        metric: the score that fits the answer, one of METRICS; "" when the record does not say.
        where: `file:line`, for messages.
    """

    question: str
    answer: str
    context: str = ""
    system: str = ""
    metric: str = ""
    where: str = ""


@dataclass(frozen=True)
class Template:
    """How a pair becomes text. The strings hold `{question}`, `{context}`, `{answer}`, and `{system}`.

    `system` is what stands for `{system}` where the pair has a system prompt: around its text, as the template has it.
    """

    prompt: str
    answer: str
    prompt_with_context: str
    system: str = "{system}\n\n"

    def format(self, pair: Pair) -> tuple[str, str]:
        """The (prompt, answer) texts of a pair. Their concatenation is what the model reads.

        Raises:
            InputError: for a pair with a context, or a system prompt, that the template has no place for.
        """
        prompt = self.prompt_with_context if pair.context else self.prompt
        for name in ("context", "system"):
            if getattr(pair, name) and f"{{{name}}}" not in prompt:
                raise InputError(f"{pair.where or 'a pair'}: has a {name}, and the template no {{{name}}} for it")
        system = _fill(self.system, {"system": pair.system}) if pair.system else ""
        values = {"question": pair.question, "context": pair.context, "answer": pair.answer, "system": system}
        return _fill(prompt, values), _fill(self.answer, values)

    @classmethod
    def from_file(cls, path: str | Path) -> "Template":
        """A template of one's own: the text of a pair, its prompt up to the white space before `{answer}`.

        Raises:
            InputError: when it cannot be read, or does not hold `{question}` and then `{answer}`, once each.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")  # with which editors end a file
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        for name in ("question", "answer", "context", "system"):
            count = text.count(f"{{{name}}}")
            if count > 1 or (count == 0 and name in ("question", "answer")):
                raise InputError(f"{path}: a template has {{{name}}} {'once' if count else 'in it'}; found {count}")
        before, answer = text.split("{answer}")
        prompt = before.rstrip()
        if any(f"{{{name}}}" in answer for name in ("question", "context", "system")):
            raise InputError(f"{path}: {{answer}} must come last: what stands behind it is learned with it")
        return cls(prompt, before[len(prompt) :] + "{answer}" + answer, prompt, system="{system}")


def _fill(text: str, values: dict[str, str]) -> str:
    # One pass, so that braces inside a question stay what they are.
    return re.sub(r"\{(question|context|answer|system)\}", lambda match: values.get(match[1], match[0]), text)


_ALPACA = "Below is an instruction that describes a task"
_LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
_LLAMA3_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
TEMPLATES = {
    "plain": Template(
        prompt="{system}{question}",
        prompt_with_context="{system}{question}\n{context}",
        answer=" {answer}",
    ),
    "qa": Template(
        prompt="{system}### Question:\n{question}\n\n### Answer:",
        prompt_with_context="{system}### Question:\n{question}\n{context}\n\n### Answer:",
        answer="\n{answer}",
    ),
    # Source: Taori et al., "Stanford Alpaca" (2023), the two prompts of its README.
    "alpaca": Template(
        prompt=(
            f"{{system}}{_ALPACA}. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Response:"
        ),
        prompt_with_context=(
            f"{{system}}{_ALPACA}, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{question}\n\n### Input:\n{context}\n\n### Response:"
        ),
        answer="\n{answer}",
    ),
    # Source: Touvron et al., "Llama 2" (arXiv 2307.09288); the layout is that of Meta's own code, behind BOS.
    "llama2": Template(
        prompt="[INST] {system}{question} [/INST]",
        prompt_with_context="[INST] {system}{question}\n{context} [/INST]",
        answer=" {answer}",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
    ),
    # Source: Meta's model card of Llama 3. Its markers are single ids where the tokenizer has them as special tokens.
    "llama3": Template(
        prompt=f"{{system}}{_LLAMA3_USER}{{question}}{_LLAMA3_END}",
        prompt_with_context=f"{{system}}{_LLAMA3_USER}{{question}}\n{{context}}{_LLAMA3_END}",
        answer="\n\n{answer}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    ),
    # The question is the whole prompt already, markers and all.
    "carried": Template(
        prompt="{system}{question}", prompt_with_context="{system}{question}\n{context}", answer="\n{answer}"
    ),
}
TEXT = Template(prompt="", prompt_with_context="", answer="{answer}")  # nothing is asked: a text to learn


def template_named(name: str) -> Template:
    """One of TEMPLATES, TEXT ("text"), or that of a file. Raises InputError when it is none of them."""
    if name in TEMPLATES or name == "text":
        return TEMPLATES.get(name, TEXT)
    if Path(name).suffix == ".txt":
        return Template.from_file(name)
    raise InputError(f"unknown template {name!r}; known: auto, {', '.join(TEMPLATES)}, or a file of your own (.txt)")


def templates_for(pair: Pair) -> list[str]:
    """The templates that a pair may be put into: its own, if its question carries one, or any of the others."""
    if pair.question.endswith(CARRIED_MARKERS):
        return ["carried"]
    return [name for name in TEMPLATES if name != "carried"] if pair.question else ["text"]


def choose_template(name: str, pairs: Sequence[Pair]) -> str:
    """The name of the template to use: `name` itself, or for "auto" what the questions call for.

    Raises:
        InputError: for an unknown name; when only some of the pairs have a question, or only some of the questions
            carry a template; when `name` would put a second template around the one they carry, or one around nothing.
    """
    if name != "auto":
        template_named(name)
    texts = [not pair.question for pair in pairs]
    if any(texts):
        if not all(texts):
            raise InputError(f"{pairs[texts.index(True)].where}: has no question, as other pairs have")
        if name not in ("auto", "text"):
            raise InputError(f"{pairs[0].where}: asks nothing that could be put into the template {name} (use auto)")
        return "text"
    if name == "text":
        raise InputError(f"{pairs[0].where}: has a question, which the template text would leave out (use auto)")
    carrying = [pair.question.endswith(CARRIED_MARKERS) for pair in pairs]
    if name == "auto":
        if any(carrying) and not all(carrying):
            odd = pairs[carrying.index(False)]
            raise InputError(
                f"{odd.where}: does not end in {' or '.join(CARRIED_MARKERS)} as other questions of the file do; "
                "mend it, or choose a --template"
            )
        return "carried" if any(carrying) else "plain"
    if name not in ("plain", "carried") and any(carrying):
        raise InputError(
            f"{pairs[carrying.index(True)].where}: the question already carries a template; "
            f"--template {name} would put a second one around it (use auto)"
        )
    return name
