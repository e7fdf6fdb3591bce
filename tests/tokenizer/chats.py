"""Chat templates, tokenizers that know their markers, and conversations, for the tests of the model's own template."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minift.prompts import Chat, Span, Turn
from minift.tokenizer.base import Tokenizer
from tests.tokenizer.kinds import SAMPLE

ROLES = {"s": "system", "u": "user", "a": "assistant"}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must\talternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
REASONING = (  # earlier thoughts are dropped
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "llama 2": LLAMA_2,
    "zephyr": ZEPHYR,
    "reasoning": REASONING,
    "marked": MARKED,
}
NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat(*turns: tuple[str, str], given: Sequence[int] = ()) -> Chat:
    """Return a chat of turns such as ("u", "Hi"), whose answers are learned but for the turns `given`."""
    made = [Turn(ROLES[role], text, role == "a" and place not in given) for place, (role, text) in enumerate(turns)]
    return Chat(tuple(made), where="chats.jsonl:7")


def messages(turns: Sequence[Turn], in_parts: bool = False) -> list[dict[str, Any]]:
    """Return turns as `transformers` takes them."""
    return [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if in_parts else turn.text}
        for turn in turns
    ]


def make_folder(
    folder: Path,
    template: str | None,
    names: Sequence[str] = NAMES,
    merges: bool = False,
    split: str = "",
    **more: Any,
) -> Path:
    """Make a folder with a byte-level tokenizer, whose tokens are single bytes unless it has merges, and a template."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    first = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")] if split else []
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*first, bytes_])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700 if merges else 256,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SAMPLE, trainer)
    made.add_special_tokens(list(names))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def encode(tokenizer: Tokenizer, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Return the ids of spans, encoded apart, and which of them are learned (1)."""
    ids, learned = list[int](), list[int]()
    for place, span in enumerate(spans):
        starts = place == 0 or span.bos
        new = tokenizer.encode(span.parts, span.bos, span.eos) if starts else None
        new = new if new is not None else tokenizer.encode_continuation(span.parts, span.eos)
        ids += new
        learned += [int(span.learned)] * len(new)
    return ids, learned


def text_of(spans: Sequence[Span]) -> str:
    return "".join(span.text for span in spans)


def learned_texts(spans: Sequence[Span]) -> list[str]:
    return [span.text for span in spans if span.learned]


def trl_templates() -> Path:
    """Return the folder of trl's templates. Its package is not imported; without it the test is skipped."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found is not None and found.origin else None
    if folder is None or not folder.is_dir():
        pytest.skip("needs the templates in the package trl: pip install --no-deps trl")
    return folder
