"""Instruction pairs → text: a template turns a question and its answer into (prompt, answer).

A base model only continues text. To finetune it to answer, a question and its answer are written as one text, and the
model is trained on the answer's part of it. The *template* says how they are written. No template is the right one:
what matters is that training and use agree, to the character. Here a template is two strings, and `prompt + answer` is
exactly the text that the model sees. A prompt never ends in white space: the separator belongs to the answer, because
in Llama's vocabulary a space is part of the word that follows it.

    plain    What is the capital of Mexico? Mexico City
    qa       ### Question:⏎What is the capital of Mexico?⏎⏎### Answer:⏎Mexico City
    alpaca   Below is an instruction that describes a task. … ### Response:⏎Mexico City
    llama2   [INST] What is the capital of Mexico? [/INST] Mexico City
    llama3   <|start_header_id|>user<|end_header_id|>⏎⏎What is the capital of Mexico?<|eot_id|>…⏎⏎Mexico City

A template of your own is a text file with `{question}` and `{answer}` in it, and with `{context}` and `{system}` if the
pairs have them: `--template my_template.txt`.

`auto` keeps the template that the questions of a file already carry (those of `lamini_docs.jsonl` end in
"### Answer:"), and takes `plain` where they carry none. See what a model does with a template it was not trained on:

    minift generate --model bundled --template qa --prompt "What is the capital of Mexico?"

Read next: `tokenizer/base.py` and `tokenizer/sentencepiece.py`, then `pack.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minift.errors import InputError


@dataclass(frozen=True)
class Pair:
    """An instruction pair: what is asked, and what should be answered.

    Attributes:
        question: "" where nothing is asked: then all of the answer is learned, from BOS on.
        answer: "" where the data has a question without an answer; such a pair has no target.
        context: text that the question is about (Alpaca's `input`), or "".
        system: what the model is told before every question, or "".
        metric: the score that fits the answer, one of `data.pairs.METRICS`; "" when the record does not say.
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
    """The two texts of a pair, with `{question}`, `{context}`, `{answer}` and `{system}` where its fields go.

    Attributes:
        prompt: what the model is given.
        answer: what it learns, separator included.
        prompt_with_context: the prompt of a pair that has a context.
        system: the text that replaces `{system}` in a prompt when the pair has a system prompt.
    """

    prompt: str
    answer: str
    prompt_with_context: str
    system: str = "{system}\n\n"

    def format(self, pair: Pair) -> tuple[str, str]:
        """Return the (prompt, answer) texts of a pair: their `parts`, joined. What the model reads is both, joined."""
        prompt, answer = self.parts(pair)
        return "".join(prompt), "".join(answer)

    def parts(self, pair: Pair) -> tuple[list[str], list[str]]:
        """Return both texts in parts: at even places the template's own, where markers count, at odd ones the pair's.

        Raises:
            InputError: for a pair with a context or a system prompt that the template has no place for.
        """
        prompt = self.prompt_with_context if pair.context else self.prompt
        for name in ("context", "system"):
            if getattr(pair, name) and f"{{{name}}}" not in prompt:
                raise InputError(f"{pair.where or 'a pair'}: has a {name}, and the template no {{{name}}} for it")
        return _fill(prompt.replace("{system}", self.system if pair.system else ""), pair), _fill(self.answer, pair)

    @classmethod
    def from_file(cls, path: str | Path) -> "Template":
        """Read a template from a text file. Its prompt ends before the white space in front of `{answer}`.

        Raises:
            InputError: when the file cannot be read, or does not hold `{question}` and then `{answer}`, once each.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")  # editors end a file with a line break
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        for name, least in (("question", 1), ("answer", 1), ("context", 0), ("system", 0)):
            count = text.count(f"{{{name}}}")
            if not least <= count <= 1:
                allowed = "once" if least else "at most once"
                raise InputError(f"{path}: a template must hold {{{name}}} {allowed}; found {count}")
        before, answer = text.split("{answer}")
        if any(f"{{{name}}}" in answer for name in ("question", "context", "system")):
            raise InputError(f"{path}: {{answer}} must come last: everything after it would be learned as well")
        prompt = before.rstrip()
        return cls(prompt, before[len(prompt) :] + "{answer}" + answer, prompt, system="{system}")


def _fill(text: str, pair: Pair) -> list[str]:
    parts = re.split(r"\{(question|context|answer|system)\}", text)  # in one pass: braces inside a question stay
    parts[1::2] = [getattr(pair, name) for name in parts[1::2]]
    return parts


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
    # Source: Touvron et al., "Llama 2" (arXiv 2307.09288); the layout is that of Meta's own code, after BOS.
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
MARKERS = {"### Answer:": "qa", "### Response:": "alpaca"}  # the end of a prompt, and the template that writes it


def template_named(name: str) -> Template:
    """Return one of TEMPLATES, TEXT ("text"), or the template in a file. Raise InputError for any other name."""
    if name in TEMPLATES or name == "text":
        return TEMPLATES.get(name, TEXT)
    if Path(name).suffix == ".txt":
        return Template.from_file(name)
    raise InputError(f"unknown template {name!r}; known: auto, {', '.join(TEMPLATES)}, or a file of your own (.txt)")


def carried_template(question: str) -> str:
    """Return the name of the template that a question already carries, by the marker it ends in; "" for none."""
    return next((name for marker, name in MARKERS.items() if question.endswith(marker)), "")


def _natural_template(pair: Pair) -> str:
    """Return the name of the template that adds nothing to a pair but the separator before its answer."""
    if not pair.question:
        return "text"
    return "carried" if carried_template(pair.question) else "plain"


def choose_template(name: str, pairs: Sequence[Pair]) -> str:
    """Return the name of the template for all pairs: `name` itself, or for "auto" the one that adds least.

    Raises:
        InputError: for an unknown name; when only some of the pairs have a question, or only some of the questions
            carry a template; when `name` would put a second template around the one they carry, or one around nothing.
    """
    if name != "auto":
        template_named(name)
    where = {_natural_template(pair): pair.where for pair in reversed(pairs)}  # reversed: the first pair of each kind
    if "text" in where:
        if len(where) > 1:
            raise InputError(f"{where['text']}: has no question, as other pairs have; add one, or take the record out")
        if name not in ("auto", "text"):
            raise InputError(f"{where['text']}: asks nothing that could be put into the template {name} (use auto)")
        return "text"
    if name == "text" and pairs:
        raise InputError(f"{pairs[0].where}: has a question, which the template text would leave out (use auto)")
    if name == "auto":
        if len(where) > 1:
            raise InputError(
                f"{where['plain']}: does not end in {' or '.join(MARKERS)} as other questions of the file do; "
                "mend it, or choose a --template"
            )
        return next(iter(where), "plain")
    if "carried" in where and name not in ("plain", "carried"):
        raise InputError(
            f"{where['carried']}: the question already carries a template; "
            f"--template {name} would put a second one around it (use auto)"
        )
    return name
