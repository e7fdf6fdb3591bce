"""The kinds of tokenizer that the tests of this folder try, texts that are hard for them, and what several tests call.

Four kinds are a `tokenizer.json`: byte-level pieces as Llama 3 and as SmolLM have them, Llama 2's file as `make_json`
writes it, and Metaspace, which marks only the first word of a text. The others are SentencePiece models: the bundled
one and, where real inputs are at hand, Llama 2's.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minift.errors import InputError
from minift.model import Llama
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from tests.helpers import small_model

SAMPLE = [
    "What is the capital of Mexico?",
    "",
    " ",
    "  ",
    "   three spaces in front",
    "two spaces at the end  ",
    "many     spaces   inside a      line",
    " \n \n mixed \t tabs\tand\r\nother breaks \x0b\x0c\r",
    "\n",
    "\r\n\r\nbegins with line breaks",
    "ends with line breaks\n\n\n",
    "\t\ttabs\t\t",
    "no\u00a0break, \u3000wide\u3000space, \u2003em, \u200b zero width, \u2028line\u2029paragraph\u0085",
    "控制 " + "".join(map(chr, range(0x20))) + "\x7f\u0080\ufeff",
    "\x00",
    "中文字符\uff1a你好\uff0c世界。墨西哥的首都是墨西哥城。",
    "日本語のテキスト、カタカナとひらがな。ﾊﾝｶｸ",
    "한국어 텍스트 \u1112\u1161\u11ab",
    "العربية: مرحبا بالعالم ١٢٣ \u200fRTL\u200e \u202bembedded\u202c עברית",
    "हिन्दी: क्षत्रिय, ज़्यादा, र्\u200dक",
    "ไทย: สวัสดีชาวโลก น้ำ",
    "Ελληνικά, кириллица, አማርኛ, Հայերեն, ქართული",
    "é e\u0301 a\u0323\u0302 Z\u0351\u036b\u0343 ﬁ ² Å K: no normalisation",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇲🇽🇯🇵 ❤️ 1️⃣ 🧑🏿‍🚀",
    "\U0001d518\U0001d52b\U0001d526 \U0002070e \U0010ffff \ue000",
    "def f(x):\n    if x < 2:\n\t\treturn {'a': [1, 2.50, -3e10]}  # comment\n\n\nclass A:\n        pass\n",
    "#include <stdio.h>\r\nint main() {\r\n\treturn x->y ? !z : ~0xFF; // it's\r\n}",
    "I'm sure they'll say we've it's DON'T O'Neill's",
    "1234567890 and 3.14159, 1,000,000 ½ ٣ Ⅷ",
    "<0x0A> and [INST] and <|x|> are text",
    "!!!??...---===___***\n\n###",
]
CHATS = [
    "<|im_start|>user\nhi<|im_end|>",
    "<|im_start|>user\nWhat is the capital of Mexico?<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c",
    "<|im_end|><|im_end|> <|im_start|>",
    "日<|im_start|>🙂<|im_end|>\n\n",
    "<|im_start|",
]
KINDS = ("llama 3", "smollm", "llama 2", "metaspace")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
NAMES = {  # BOS and EOS
    "llama 3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "smollm": ("<|endoftext|>", "<|endoftext|>"),
    "llama 2": ("<s>", "</s>"),
    "metaspace": ("<s>", "</s>"),
}
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_unicode(count: int, seed: int = 1) -> list[str]:
    """Return random strings: ASCII with its control characters, all of Unicode, emoji, joiners, white space, U+FFFD."""
    rng = random.Random(seed)
    pools = ((0, 128), (1, 0xD800), (0xE000, 0x110000), (32, 33), (9, 14), (0x1F600, 0x1F640), (0x200B, 0x2010))
    texts = []
    for _ in range(count):
        chosen = [*rng.choices(pools, (8, 4, 2, 4, 2, 2, 1), k=rng.randrange(40))]
        text = "".join(chr(rng.randrange(*pool)) for pool in chosen)
        texts.append(text.replace("\u2581", "_"))  # SentencePiece's own mark for a space; it comes back as one
    return texts


def nasty(count: int) -> list[str]:
    """Return random strings that are hard to cut: runs of spaces, marks, halves of pieces, control tokens."""
    rng = random.Random(2)
    alphabet = [*" \u2581\n\t\r\x00ab</s>019ée\u0301日本🙂\u200d\ufffd\ufeff\u00a0\u3000.,'", "  ", "   ", "▁▁", "\n\n"]
    words = ["the", " the", "capital", "Mexico", "ing", "s", "</s>", "<s>", "<unk>", "<0x0A>", "▁", "  ", "\n", "é"]
    return ["".join(rng.choices(rng.choice((alphabet, words)), k=rng.randrange(24))) for _ in range(count)]


def write_config(folder: Path, bos: Any, eos: Any, **more: Any) -> None:
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "bos_token": bos, "eos_token": eos, **more}))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> None:
    """Change the values of a JSON file."""
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    change(values)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def byte_level(kind: str) -> Any:
    """Make a byte-level tokenizer. Llama 3's special tokens come after its vocabulary, SmolLM's are its first ids."""
    tokenizers = pytest.importorskip("tokenizers")
    llama = kind == "llama 3"
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=llama))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_SPLIT), "isolated")
    first = split if llama else tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([first, bytes_])
    made.decoder = tokenizers.decoders.ByteLevel()
    special = list(dict.fromkeys((*NAMES[kind], *CHAT_TOKENS)))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[] if llama else special,
        show_progress=False,
    )
    made.train_from_iterator([*SAMPLE, "The capital of Mexico is Mexico City. " * 9], trainer)
    made.add_special_tokens(special)
    if llama:
        bos = (special[0], made.token_to_id(special[0]))
        made.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return made


def read_by_transformers(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def trained(**changes: Any) -> bytes:
    """Train a SentencePiece model, as Llama's but for the changes."""
    model, text = io.BytesIO(), ["Mexico City is the capital of Mexico. 12 34 a<mask>b\tfi"] * 9
    options = {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **{**options, **changes})
    return model.getvalue()


def first_space_lost(tokenizer: Tokenizer) -> bool:
    """Return whether a text's first space is lost: Metaspace adds no mark to a text that begins with one."""
    return isinstance(tokenizer, JsonTokenizer) and '"Metaspace"' in tokenizer.text


def kept(tokenizer: Tokenizer, text: str) -> str:
    """Return what decoding gives back of a text."""
    return text.removeprefix(" ") if first_space_lost(tokenizer) else text


def model_for(tokenizer: Tokenizer, **changes: Any) -> Llama:
    """Return a small random model with a tokenizer's ids."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return small_model(**{"vocab_size": tokenizer.vocab_size, **ids, **changes}).eval()


def refused(call: Callable[[], object], *names: str) -> str:
    """Return the one line with which a call is refused, and check that it says all of `names`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for name in names:
        assert name in message
    return message
