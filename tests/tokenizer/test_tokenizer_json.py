"""The promise of `tokenizer/huggingface.py`: a model's own tokenizer gives the ids here that it gives everywhere else.

Five kinds are tried. Four are a `tokenizer.json`: byte-level pieces as Llama 3 and as SmolLM have them, Llama 2's file
as `make_json` writes it, and Metaspace, which marks only a text's first word. The others are SentencePiece models, the
bundled one and, where real inputs are at hand, Llama 2's. The ids and the text are compared with those of
`transformers` from the same folder, or with those of `sentencepiece` from the same file. Held here too: which ids are
BOS and EOS is said by the folder, and text from strangers can never forge them; chat tokens survive every save; text
that is shown while it is made is the text of the whole; and a damaged file is refused in one line.
"""

import copy
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

import minift.generate
from minift import reference
from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.config import LlamaConfig
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.formats.convert import convert
from minift.generate import Sampling, generate, stream
from minift.model import Llama
from minift.pack import encode_pair
from minift.prompts import TEMPLATES, Pair
from minift.storage.names import bundled
from minift.tokenizer.base import TextStream, Tokenizer, check_fit
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.load import TOKENIZER_FILES, load_tokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import SMALL, small_model, write_jsonl

tokenizers = pytest.importorskip("tokenizers")

SAMPLE = [
    "What is the capital of Mexico?",
    "",
    " ",
    "  ",
    "   three spaces in front",
    "two spaces behind  ",
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


def noise(count: int, seed: int = 1) -> list[str]:
    """Random strings: ASCII with its control characters, all of Unicode, emoji, joiners, white space, U+FFFD."""
    rng = random.Random(seed)
    pools = ((0, 128), (1, 0xD800), (0xE000, 0x110000), (32, 33), (9, 14), (0x1F600, 0x1F640), (0x200B, 0x2010))
    texts = []
    for _ in range(count):
        chosen = [*rng.choices(pools, (8, 4, 2, 4, 2, 2, 1), k=rng.randrange(40))]
        text = "".join(chr(rng.randrange(*pool)) for pool in chosen)
        texts.append(text.replace("\u2581", "_"))  # SentencePiece's own mark for a space; it comes back as one
    return texts


def nasty(count: int) -> list[str]:
    """Random strings of what vocabularies stumble over: runs of spaces, marks, halves of pieces, control tokens."""
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


def byte_level(kind: str) -> tokenizers.Tokenizer:
    """Llama 3's special tokens lie behind its vocabulary, SmolLM's are its first ids."""
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    """A folder of each kind with a `tokenizer.json` and a `tokenizer_config.json`."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    llama_2 = json.loads(make_json(tokenizer))
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    metaspace = {**llama_2, "normalizer": None, "pre_tokenizer": first}
    made = {
        "llama 3": byte_level("llama 3"),
        "smollm": byte_level("smollm"),
        "llama 2": tokenizers.Tokenizer.from_str(json.dumps(llama_2)),
        "metaspace": tokenizers.Tokenizer.from_str(json.dumps(metaspace)),
    }
    found = {}
    for kind in KINDS:
        made[kind].add_special_tokens(list(CHAT_TOKENS))
        found[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        made[kind].save(str(found[kind] / "tokenizer.json"))
        write_config(found[kind], *NAMES[kind])
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path], kind: str) -> Path:
    return folders[kind]


@pytest.fixture(scope="module")
def each(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def read_by_transformers(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The same folder as `transformers` reads it."""
    return read_by_transformers(folder)


@pytest.fixture(scope="module", params=["bundled", "real"])
def model_file(request: pytest.FixtureRequest) -> Path:
    """A `tokenizer.model`, the bundled one and Llama 2's own in turn."""
    bundled_file = bundled("base") / "tokenizer.model"
    return bundled_file if request.param == "bundled" else request.getfixturevalue("real_data") / "tokenizer.model"


@pytest.fixture(scope="module", params=[*KINDS, "bundled", "real"])
def any_kind(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """A tokenizer of every kind in turn."""
    if request.param == "real":
        return load_tokenizer(request.getfixturevalue("real_data") / "tokenizer.model")
    return load_tokenizer(bundled("base") if request.param == "bundled" else folders[request.param])


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of a folder, to change."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture
def llama_3(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llama 3"], tmp_path / "llama-3"))


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """The bundled `tokenizer.model` with a `tokenizer_config.json` as Llama 2's folders have it."""
    folder = tmp_path / "sentencepiece"
    folder.mkdir()
    shutil.copy(bundled("base") / "tokenizer.model", folder)
    write_config(folder, "<s>", "</s>")
    return folder


def first_space_lost(tokenizer: Tokenizer) -> bool:
    """Metaspace adds no mark to a text that begins with one, as `transformers` has it; then that one is lost."""
    return isinstance(tokenizer, JsonTokenizer) and '"Metaspace"' in tokenizer.text


def kept(tokenizer: Tokenizer, text: str) -> str:
    return text.removeprefix(" ") if first_space_lost(tokenizer) else text


def model_for(tokenizer: Tokenizer, **changes: Any) -> Llama:
    """A small random model with a tokenizer's ids."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return small_model(**{"vocab_size": tokenizer.vocab_size, **ids, **changes}).eval()


def refused(call: Callable[[], object], *names: str) -> str:
    """The one line with which a call is refused; it says all of `names`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for name in names:
        assert name in message
    return message


# The same ids and the same text as everywhere else --------------------------------------------------------------------


@pytest.mark.parametrize("text", [*SAMPLE, "▁ a▁▁b", "<unk> and </s>x<|end_of_text|>", *CHATS])
def test_ids_and_text_are_those_of_transformers(each: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert each.encode(text, bos=False) == ids
    assert each.decode(ids) == theirs.decode([id for id in ids if id not in (each.bos_id, each.eos_id)])
    assert each.pieces(ids) == theirs.convert_ids_to_tokens(ids)
    assert each.encode(text, eos=True) == [theirs.bos_token_id, *ids, theirs.eos_token_id]


def test_ids_and_text_of_any_text_are_those_of_transformers(each: Tokenizer, theirs: Any) -> None:
    rng = random.Random(3)
    for text in [*noise(300), *nasty(300)]:
        if rng.random() < 0.5:
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(CHAT_TOKENS) + text[place:]
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert each.encode(text, bos=False) == ids, ascii(text)
        bare = [id for id in ids if id not in (each.bos_id, each.eos_id)]  # which leave no trace here
        assert each.decode(ids) == theirs.decode(bare), ascii(text)


def test_the_vocabulary_is_that_of_transformers(each: Tokenizer, theirs: Any) -> None:
    assert each.vocab_size == len(theirs)
    assert (each.bos_id, each.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    every = range(each.vocab_size)
    assert each.pieces(every) == theirs.convert_ids_to_tokens(list(every))


def test_repr_says_kind_size_bos_and_eos(folders: dict[str, Path]) -> None:
    made = load_tokenizer(folders["llama 3"])
    said = f"BOS {made.bos_id} '<|begin_of_text|>', EOS {made.eos_id} '<|end_of_text|>'"
    assert repr(made) == f"<JsonTokenizer: {made.vocab_size} ids, {said}>"


def test_a_sentencepiece_models_ids_and_text_are_those_of_sentencepiece(model_file: Path) -> None:
    ours, theirs = load_tokenizer(model_file), sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in [*SAMPLE, *CHATS, *nasty(300)]:
        assert ours.encode(text, bos=False) == theirs.encode(text), ascii(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), ascii(text)


def test_a_tokenizer_json_made_of_sentencepiece_gives_its_ids_and_its_text(model_file: Path, tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    (tmp_path / "tokenizer.json").write_text(make_json(SentencePieceTokenizer(model_file.read_bytes())))
    write_config(tmp_path, "<s>", "</s>")
    made = load_tokenizer(tmp_path)
    assert isinstance(made, JsonTokenizer)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (theirs.vocab_size(), 1, 2)
    for text in [*SAMPLE, *nasty(3000), *noise(300)]:
        ids = theirs.encode(text)
        assert made.encode(text, bos=False, special=False) == ids, ascii(text)
        assert made.decode(ids) == theirs.decode(ids), ascii(text)
    assert made.pieces(range(made.vocab_size)) == [theirs.id_to_piece(id) for id in range(made.vocab_size)]


def trained(**changes: Any) -> bytes:
    """A SentencePiece model of another making."""
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


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nfkc_cf"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["<mask>"]},
        {"user_defined_symbols": ["Mexico"]},
    ],
    ids=str,
)
def test_a_sentencepiece_model_that_a_tokenizer_json_cannot_say_is_refused(changes: dict[str, Any]) -> None:
    refused(lambda: make_json(SentencePieceTokenizer(trained(**changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_dummy_prefix": False},
        {"model_type": "char"},
        {"control_symbols": ["<ctl>"]},
        {"unk_piece": "[U]", "bos_piece": "[B]", "eos_piece": "[E]"},
        {"split_by_whitespace": False},
    ],
    ids=str,
)
def test_other_sentencepiece_models_give_the_same_ids_as_a_tokenizer_json(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    original = SentencePieceTokenizer(trained(**changes))
    (tmp_path / "tokenizer.json").write_text(make_json(original))
    write_config(tmp_path, *original.pieces([1, 2]))
    made = load_tokenizer(tmp_path)
    for text in [*SAMPLE, "Mexico  City<ctl>[B][E]<mask>", *nasty(300)]:
        assert made.encode(text, bos=False, special=False) == original.encode(text, bos=False), ascii(text)
        assert made.encode_continuation(text, special=False) == original.encode_continuation(text), ascii(text)


# There and back -------------------------------------------------------------------------------------------------------


def test_decoding_gives_the_text_back(any_kind: Tokenizer) -> None:
    for text in [*SAMPLE, *CHATS, *noise(300)]:
        ids = any_kind.encode(text, eos=True, special=False)
        assert any_kind.decode(ids) == kept(any_kind, text), ascii(text)
        ids = any_kind.encode_continuation(text, eos=True, special=False)
        assert any_kind.decode_continuation(ids) == text, ascii(text)


@pytest.mark.parametrize("prompt", ["What is the capital of Mexico?", "ends in a break\n", "日本", "🙂", ""])
def test_a_continuation_goes_on_to_the_character(any_kind: Tokenizer, prompt: str) -> None:
    for answer in [*SAMPLE, *noise(40, seed=4), " Mexico City", "\nMexico City", "!", "s are joined"]:
        ids = any_kind.encode(prompt) + any_kind.encode_continuation(answer, eos=True)
        text = prompt + answer
        # Without a prompt to hold it, the first space is the one that the vocabulary adds.
        assert any_kind.decode(ids) == (text if prompt else text.removeprefix(" " if any_kind._anchor else ""))


@pytest.mark.parametrize("wrong", [-1, 10**6, "vocab_size"])
def test_an_id_out_of_range_is_refused(each: Tokenizer, wrong: int | str) -> None:
    id = each.vocab_size if isinstance(wrong, str) else wrong
    for call in (each.decode, each.decode_continuation, each.pieces):
        refused(lambda call=call: call([5, id]), f"id {id}", str(each.vocab_size))  # type: ignore[misc]


def test_text_that_is_not_unicode_is_refused(each: Tokenizer) -> None:
    for call in (each.encode, each.encode_continuation):
        refused(lambda call=call: call("half \ud83d"), "not Unicode")  # type: ignore[misc]


# Which ids are BOS and EOS --------------------------------------------------------------------------------------------


def write_all(folder: Path, files: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    for name, values in files.items():
        (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


BOS, EOS = NAMES["llama 3"]
SAID: dict[str, tuple[dict[str, Any], tuple[str | int, str | int]]] = {
    "tokens": ({"tokenizer_config.json": {"bos_token": BOS, "eos_token": EOS}}, (BOS, EOS)),
    "tokens with flags": (
        {"tokenizer_config.json": {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": {"content": EOS}}},
        (BOS, EOS),
    ),
    "another EOS": ({"tokenizer_config.json": {"bos_token": BOS, "eos_token": "<|im_end|>"}}, (BOS, "<|im_end|>")),
    "special_tokens_map": ({"special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": EOS}}}, (BOS, EOS)),
    "the model's ids": ({"config.json": {"bos_token_id": 3, "eos_token_id": 4}}, (3, 4)),
    "id 0": ({"config.json": {"bos_token_id": 0, "eos_token_id": 0}}, (0, 0)),
    "the model's list": ({"config.json": {"bos_token_id": 3, "eos_token_id": [7, 4, 5]}}, (3, 7)),
    "the tokenizer before the model": (
        {
            "config.json": {"bos_token_id": 3, "eos_token_id": [4, 5]},
            "tokenizer_config.json": {"bos_token": BOS, "eos_token": EOS},
            "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
        (BOS, EOS),
    ),
    "the map before the model": (
        {
            "config.json": {"bos_token_id": 3, "eos_token_id": 4},
            "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
        CHAT_TOKENS,
    ),
    "each from the first that says it": (
        {
            "tokenizer_config.json": {"bos_token": None, "eos_token": EOS},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            "config.json": {"bos_token_id": 9, "eos_token_id": 4},
        },
        (9, EOS),
    ),
}


@pytest.mark.parametrize(("files", "expected"), SAID.values(), ids=SAID.keys())
def test_bos_and_eos_are_what_the_folder_says(
    llama_3: Path, files: dict[str, Any], expected: tuple[str | int, str | int]
) -> None:
    write_all(llama_3, files)
    made, ids = load_tokenizer(llama_3), tokenizers.Tokenizer.from_file(str(llama_3 / "tokenizer.json"))
    bos, eos = (ids.token_to_id(token) if isinstance(token, str) else token for token in expected)
    assert (made.bos_id, made.eos_id) == (bos, eos)
    assert made.encode("a", eos=True)[:: len(made.encode("a"))] == [bos, eos]


UNSAID: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no file": ({}, ("BOS", "tokenizer_config.json")),
    "nothing in it": ({"tokenizer_config.json": {}}, ("BOS",)),
    "no EOS": ({"tokenizer_config.json": {"bos_token": BOS}}, ("EOS",)),
    "an empty list": ({"config.json": {"bos_token_id": 1, "eos_token_id": []}}, ("EOS",)),
    "null": ({"config.json": {"bos_token_id": 1, "eos_token_id": None}}, ("EOS",)),
    "true": ({"config.json": {"bos_token_id": True, "eos_token_id": 1}}, ("BOS",)),
    "an unknown token": (
        {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": EOS}},
        ("tokenizer_config.json", "<s>"),
    ),
    "an unknown token in the map": (
        {"special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": "</s>"}}},
        ("special_tokens_map.json", "</s>"),
    ),
    "an empty name": ({"tokenizer_config.json": {"bos_token": "", "eos_token": EOS}}, ("tokenizer_config.json",)),
    "half a character": ({"tokenizer_config.json": {"bos_token": "\ud800", "eos_token": EOS}}, ()),
    "an id too large": ({"config.json": {"bos_token_id": 1, "eos_token_id": 100_000}}, ("EOS", "100000")),
    "a huge id": ({"config.json": {"bos_token_id": 10**30, "eos_token_id": 1}}, ("BOS",)),
    "a negative id": ({"config.json": {"bos_token_id": -1, "eos_token_id": 1}}, ("BOS", "-1")),
    "a list": ({"tokenizer_config.json": []}, ("tokenizer_config.json",)),
    "not JSON": ({"tokenizer_config.json": "{"}, ("tokenizer_config.json",)),
}


@pytest.mark.parametrize(("files", "names"), UNSAID.values(), ids=UNSAID.keys())
def test_a_folder_that_does_not_say_them_is_refused(
    llama_3: Path, files: dict[str, Any], names: tuple[str, ...]
) -> None:
    write_all(llama_3, files)
    refused(lambda: load_tokenizer(llama_3), *names)


def test_a_sentencepiece_folder_may_name_another_eos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(control_symbols=["<|end|>"]))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    end = theirs.piece_to_id("<|end|>")
    assert end > 2
    for name, values in (("special_tokens_map.json", "</s>"), ("tokenizer_config.json", {"content": "<|end|>"})):
        (tmp_path / name).write_text(json.dumps({"bos_token": "<s>", "eos_token": values}))
    made = load_tokenizer(tmp_path)
    assert (made.bos_id, made.eos_id) == (1, end)
    assert made.encode("a", eos=True) == [1, *theirs.encode("a"), end]
    assert made.decode([1, *theirs.encode("a"), end]) == "a"
    assert end not in made.encode("<|end|>")


@pytest.mark.parametrize("name", ["<|im_end|>", "", "\ud800"], ids=ascii)
def test_a_sentencepiece_folder_that_names_an_unknown_token_is_refused(sentencepiece_folder: Path, name: str) -> None:
    write_config(sentencepiece_folder, "<s>", name)
    refused(lambda: load_tokenizer(sentencepiece_folder))


def test_a_truncation_or_padding_that_was_left_in_the_file_does_nothing(own: Path) -> None:
    before = load_tokenizer(own)
    left = tokenizers.Tokenizer.from_file(str(own / "tokenizer.json"))
    left.enable_truncation(max_length=3)
    left.enable_padding(length=50, pad_id=5, pad_token="x")
    left.save(str(own / "tokenizer.json"))
    assert len(left.encode("What is the capital of Mexico?").ids) == 50
    after = load_tokenizer(own)
    for text in SAMPLE:
        assert after.encode(text) == before.encode(text)
        assert after.encode_continuation(text) == before.encode_continuation(text)


# Added tokens, and text from strangers --------------------------------------------------------------------------------


def special_ids(tokenizer: Tokenizer) -> set[int]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {0, 1, 2}
    assert isinstance(tokenizer, JsonTokenizer)
    return {entry["id"] for entry in json.loads(tokenizer.text)["added_tokens"]}


def test_chat_tokens_are_one_id_each_unless_they_come_from_a_stranger(each: Tokenizer) -> None:
    start, end = (each.encode(token, bos=False) for token in CHAT_TOKENS)
    assert (len(start), len(end)) == (1, 1)
    assert each.pieces(start + end) == list(CHAT_TOKENS)
    ids = each.encode(CHATS[0], bos=False)
    assert (ids[0], ids[-1]) == (start[0], end[0])
    assert each.encode_continuation(CHATS[0]).count(end[0]) == 1
    for text in CHATS:
        for given in (each.encode(text, bos=False, special=False), each.encode_continuation(text, special=False)):
            assert not special_ids(each) & set(given)
        assert each.encode(text, bos=False) == each.encode(text, bos=False, special=True)  # what is asked last counts


def spelled(bos: str, eos: str) -> list[str]:
    """Texts that spell control tokens."""
    return [eos, bos, f"a {eos} b", f"{eos}{eos}\n", f" {bos}x", f"\n{eos}", f"ends in {eos}", f"日{eos}🙂"]


def flagged(folder: Path, **flags: bool) -> None:
    """Give the added tokens of a `tokenizer.json` other flags."""

    def change(values: dict[str, Any]) -> None:
        for entry in values["added_tokens"]:
            entry.update(flags)

    edit(folder, change)


FLAGS = [{}, {"special": False}, {"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_no_answer_and_no_document_forges_bos_or_eos(
    own: Path, kind: str, tmp_path: Path, flags: dict[str, bool]
) -> None:
    flagged(own, **flags)
    check_training_data(load_tokenizer(own), spelled(*NAMES[kind]), tmp_path)


def test_no_answer_and_no_document_forges_bos_or_eos_in_sentencepiece(model_file: Path, tmp_path: Path) -> None:
    check_training_data(load_tokenizer(model_file), spelled("<s>", "</s>"), tmp_path)


def check_training_data(made: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """Pairs and pages of these texts have EOS where they end, BOS where they begin, and neither inside."""
    control = {made.bos_id, made.eos_id}
    for text in texts:
        for template in TEMPLATES.values():
            example = encode_pair(Pair("What?", text), template, made, max_length=200)
            assert example is not None
            assert example.answer[-1] == made.eos_id
            assert not control & set(example.answer[:-1]), text
            _, answer = template.format(Pair("What?", text))
            assert made.decode_continuation(example.answer) == answer
    file = write_jsonl(tmp_path / "pages.jsonl", [{"text": text} for text in [*texts, "the rest " * 40]])
    ids: list[int] = []
    for batch in PageBatches(DocumentStream([file], epochs=1), made, batch_size=1, length=8):
        ids += batch.tokens.flatten().tolist()
    for text in texts:
        assert ids.pop(0) == made.bos_id
        end = ids.index(made.eos_id)
        assert made.bos_id == made.eos_id or made.bos_id not in ids[:end]
        assert made.decode(ids[:end]) == kept(made, text)
        del ids[: end + 1]


def test_chat_tokens_survive_a_save(each: Tokenizer, tmp_path: Path) -> None:
    save_model(tmp_path / "saved", model_for(each), each)
    again = load_tokenizer(tmp_path / "saved")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (each.vocab_size, each.bos_id, each.eos_id)
    assert again.files == each.files
    for text in [*CHATS, *SAMPLE]:
        assert again.encode(text) == each.encode(text)
    check_fit(load_model(tmp_path / "saved").config, again, exact=True)


def test_every_file_travels_byte_for_byte_through_every_format(own: Path, tmp_path: Path) -> None:
    (own / "chat_template.jinja").write_bytes(b"{{ bos_token }}\r\n{%- for m in messages %}\xc3\xa9{%- endfor %}  \n\n")
    (own / "chat_template.json").write_bytes(b'{ "chat_template": "x" }')
    (own / "special_tokens_map.json").write_bytes(b'{"pad_token":   "<|im_end|>"}\r\n')
    (own / "added_tokens.json").write_bytes(b"{}")
    (own / "tokenizer.json").write_bytes((own / "tokenizer.json").read_bytes() + b"\n \n")
    there = {name: (own / name).read_bytes() for name in TOKENIZER_FILES if (own / name).exists()}
    assert len(there) == 6
    made = load_tokenizer(own)
    save_model(tmp_path / "native", model_for(made), made)
    steps = [("native", "hf"), ("hf", "meta"), ("meta", "hf-2"), ("hf-2", "native-2"), ("native-2", "meta-2")]
    for source, to in steps:
        assert main(["convert", str(tmp_path / source), str(tmp_path / to), "--to", to.split("-")[0]]) == 0
    for name in ("native", "hf", "meta", "hf-2", "native-2", "meta-2"):
        found = {file: (tmp_path / name / file).read_bytes() for file in there}
        assert found == there
        again = load_tokenizer(tmp_path / name)
        assert [again.encode(text) for text in CHATS] == [made.encode(text) for text in CHATS]
    for name in ("hf", "hf-2"):
        theirs = read_by_transformers(tmp_path / name)
        for text in [*CHATS, *SAMPLE]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == made.encode(text, bos=False)


@pytest.mark.parametrize("to", ["native", "hf", "meta"])  # llama2.c's format has no other ids than 1 and 2
def test_a_tokenizer_whose_ids_only_the_model_says_can_be_loaded_from_every_format(
    llama_3: Path, tmp_path: Path, to: str
) -> None:
    named = load_tokenizer(llama_3)
    (llama_3 / "tokenizer_config.json").unlink()
    (llama_3 / "config.json").write_text(json.dumps({"bos_token_id": named.bos_id, "eos_token_id": named.eos_id}))
    made = load_tokenizer(llama_3)
    save_model(tmp_path / "native", model_for(made), made)
    destination = tmp_path / "to" / "model"
    convert(tmp_path / "native", destination, to)
    again = load_tokenizer(destination)
    assert (again.bos_id, again.eos_id) == (made.bos_id, made.eos_id)
    assert again.encode(CHATS[0]) == made.encode(CHATS[0])


def test_a_text_that_begins_with_the_name_of_bos_gets_no_second_one(llama_3: Path) -> None:
    made = load_tokenizer(llama_3)
    (name,) = made.pieces([made.bos_id])
    assert made.encode(f"{name}hi") == made.encode("hi")
    assert made.encode(f"{name}hi", special=False).count(made.bos_id) == 1


def test_a_tokenizer_json_of_another_name_is_saved_as_one(llama_3: Path, tmp_path: Path) -> None:
    (llama_3 / "tokenizer.json").rename(llama_3 / "mine.json")
    made = load_tokenizer(llama_3 / "mine.json")
    save_model(tmp_path / "saved", model_for(made), made)
    assert load_tokenizer(tmp_path / "saved").encode(CHATS[0]) == made.encode(CHATS[0])


def added_decoder(names: dict[str, int], **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(id): {"content": name, **plain, **flags} for name, id in names.items()}}


def chat_ids(text: str, added: dict[str, int]) -> list[int]:
    """What SentencePiece gives for each part between two added tokens, as Llama 2's own tokenizer does it."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(bundled("base") / "tokenizer.model"))
    ids: list[int] = []
    while text:
        starts = [(text.index(name), name) for name in added if name in text]
        place, name = min(starts, default=(len(text), ""))
        ids += theirs.encode(text[:place]) + ([added[name]] if name else [])
        text = text[place + len(name) :]
    return ids


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "both"])
def test_added_tokens_behind_a_sentencepiece_vocabulary_have_their_ids(
    sentencepiece_folder: Path, tmp_path: Path, where: str
) -> None:
    added = {"<|im_end|>": 2049, "<|im_start|>": 2048}  # in no order
    if where != "added_tokens_decoder":
        (sentencepiece_folder / "added_tokens.json").write_text(json.dumps(added))
    if where != "added_tokens.json":
        more = added_decoder({"<unk>": 0, "<s>": 1, "</s>": 2, **added})
        write_config(sentencepiece_folder, "<s>", "</s>", **more)
    plain, made = load_tokenizer(bundled("base")), load_tokenizer(sentencepiece_folder)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (2050, 1, 2)
    assert made.pieces([2048, 2049]) == list(CHAT_TOKENS)
    for text in CHATS:
        assert made.encode(text, bos=False) == chat_ids(text, added)
        assert made.encode(text, special=False) == plain.encode(text)
    for text in SAMPLE:
        assert made.encode(text) == plain.encode(text)
        assert made.encode_continuation(text) == plain.encode_continuation(text)
    save_model(tmp_path / "native", model_for(made), made)
    for source, to in (("native", "hf"), ("hf", "meta"), ("native", "meta-2"), ("meta", "native-2")):
        convert(tmp_path / source, tmp_path / to, to.split("-")[0])
    for name in ("native", "hf", "meta", "meta-2", "native-2"):
        again = load_tokenizer(tmp_path / name)
        assert [again.encode(text) for text in CHATS] == [made.encode(text) for text in CHATS]
        assert (tmp_path / name / "tokenizer.model").read_bytes() == plain.files["tokenizer.model"]
    theirs = read_by_transformers(tmp_path / "hf")
    for text in CHATS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == chat_ids(text, added)


def test_the_flags_of_added_tokens_count_as_they_do_in_transformers(sentencepiece_folder: Path, tmp_path: Path) -> None:
    decoder = added_decoder({"<|im_start|>": 2048}, rstrip=True)["added_tokens_decoder"]
    decoder |= added_decoder({"<|im_end|>": 2049}, lstrip=True)["added_tokens_decoder"]
    write_config(sentencepiece_folder, "<s>", "</s>", added_tokens_decoder=decoder)
    made = load_tokenizer(sentencepiece_folder)
    save_model(tmp_path / "hf", model_for(made), made, format="hf")
    theirs = read_by_transformers(tmp_path / "hf")
    for text in [*CHATS, "<|im_start|> user\nhi <|im_end|> \n<|im_start|>\nassistant\n"]:
        assert made.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_tokens_that_only_the_config_adds_have_the_ids_that_transformers_gives(own: Path) -> None:
    size = load_tokenizer(own).vocab_size
    edit(own, lambda values: values.update(added_decoder({"<|eot|>": size})), "tokenizer_config.json")
    made, theirs = load_tokenizer(own), read_by_transformers(own)
    assert theirs("a<|eot|>", add_special_tokens=False)["input_ids"][-1] == size
    assert made.encode("a<|eot|>", bos=False) == theirs("a<|eot|>", add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_folder_with_nothing_but_added_tokens_keeps_its_bos_and_eos(tmp_path: Path) -> None:
    shutil.copy(bundled("base") / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 2048}')
    made = load_tokenizer(tmp_path)
    assert (made.vocab_size, made.bos_id, made.eos_id) == (2049, 1, 2)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ('{"<a>": 2049}', ("<a>", "2049", "2048")),
        ('{"<a>": 2048, "<b>": 2050}', ("<b>", "2050", "2049")),
        ('{"<a>": 2048, "<b>": 2048}', ("<a>", "<b>", "2048")),
        ('{"<a>": 5000}', ("<a>", "5000")),
        ('{"<a>": 1e30}', ("<a>",)),
    ],
)
def test_a_gap_in_the_added_tokens_is_refused(sentencepiece_folder: Path, table: str, names: tuple[str, ...]) -> None:
    (sentencepiece_folder / "added_tokens.json").write_text(table)
    refused(lambda: load_tokenizer(sentencepiece_folder), *names)


@pytest.mark.parametrize(
    "table",
    [
        "",
        "{",
        "[]",
        "null",
        '"<a>"',
        '{"<a>": null}',
        '{"<a>": "x"}',
        '{"<a>": [2048]}',
        '{"<a>": {}}',
        '{"<a>": NaN}',
        '{"<a>": Infinity}',
        '{"<a>": -1e999}',
        '{"<a>": 2048.7}',
        '{"<a>": %s}' % ("9" * 5000),
        '{"\\ud800": 2048}',
        '{"": 2048}',
        '{"\\u2581the": 2048}',
        '{"<s>": 2048}',
    ],
    ids=lambda table: table[:20],
)
def test_a_malformed_table_of_added_tokens_is_refused(sentencepiece_folder: Path, table: str) -> None:
    (sentencepiece_folder / "added_tokens.json").write_text(table)
    refused(lambda: load_tokenizer(sentencepiece_folder))


@pytest.mark.parametrize(
    "table",
    [
        [],
        "x",
        3,
        {"x": {"content": "<a>"}},
        {"2048": {}},
        {"2048": "<a>"},
        {"2048": 3},
        {"2048": None},
        {"2048": {"content": 3}},
        {"2048": {"content": None}},
        {"2048": {"content": ["<a>"]}},
        {"2048": {"content": ""}},
        {"2049": {"content": "<a>"}},
    ],
    ids=str,
)
def test_a_malformed_added_tokens_decoder_is_refused(sentencepiece_folder: Path, table: Any) -> None:
    write_config(sentencepiece_folder, "<s>", "</s>", added_tokens_decoder=table)
    refused(lambda: load_tokenizer(sentencepiece_folder))


# Text while it is made ------------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The parts of a `TextStream`; the last one is what `end` gives."""
    text = TextStream(tokenizer)
    return [*(text.add(id) for id in ids), text.end()]


def test_the_parts_joined_are_the_whole(any_kind: Tokenizer) -> None:
    for text in [*SAMPLE, *CHATS, " Mexico City", "  two spaces"]:
        ids = any_kind.encode_continuation(text, eos=True)
        parts = streamed(any_kind, ids)
        assert "".join(parts) == any_kind.decode_continuation(ids), ascii(text)
        assert not [part for part in parts if "\ufffd" in part], ascii(text)
        assert parts[-1] == "", ascii(text)
        assert "".join(streamed(any_kind, any_kind.encode_continuation(text, special=False))) == text, ascii(text)


def test_the_parts_of_any_text_joined_are_the_whole(any_kind: Tokenizer) -> None:
    for text in [*noise(300, seed=5), *(text.replace("▁", "_") for text in nasty(300))]:
        ids = any_kind.encode_continuation(text, special=False)
        parts = streamed(any_kind, ids)
        assert "".join(parts) == any_kind.decode_continuation(ids) == text, ascii(text)
        assert "\ufffd" in text or not [part for part in parts if "\ufffd" in part], ascii(text)


def test_text_is_shown_with_the_id_that_completes_it(any_kind: Tokenizer) -> None:
    ids = any_kind.encode_continuation(" The capital of Mexico is Mexico City.\n\tYes, it  is.")
    parts = streamed(any_kind, ids)
    assert all(parts[:-1])
    assert parts[0].startswith(" ")
    assert parts[-1] == ""
    spelled_out = any_kind.encode_continuation("\U0001fae0")  # an emoji that no vocabulary here has as one piece
    assert len(spelled_out) > 1
    assert streamed(any_kind, spelled_out) == [""] * (len(spelled_out) - 1) + ["\U0001fae0", ""]


def test_a_replacement_character_in_the_text_comes_out(any_kind: Tokenizer) -> None:
    for text in ("\ufffd", "a\ufffd", " \ufffd\ufffd b", "日\ufffd日", "\ufffd\n", "🙂\ufffd"):
        parts = streamed(any_kind, any_kind.encode_continuation(text))
        assert "".join(parts[:-1]) == text.rstrip("\ufffd"), ascii(text)
        assert parts[-1] == text[len(text.rstrip("\ufffd")) :], ascii(text)


def test_a_text_cut_inside_a_character_ends_in_replacement_characters(any_kind: Tokenizer) -> None:
    for before in ("", " a", "日本語\n", "\n", "🙂"):
        whole = any_kind.encode_continuation(before + "\U0001fae0")
        text = TextStream(any_kind)
        assert "".join(text.add(id) for id in whole[:-1]) == before
        assert set(text.end()) == {"\ufffd"}
        assert text.end() == ""
        assert "".join(text.add(id) for id in whole) == before + "\U0001fae0"  # it can be used again


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_streaming_gives_the_ids_of_generate(temperature: float) -> None:
    for seed in range(4):
        model = small_model(seed, std=0.3, eos_token_id=(2, *range(60, 70)), tie_word_embeddings=False).eval()
        for prompt in ([1], [1, 5, 9, 80], [1, *range(3, 61)]):
            sampling = Sampling(temperature, top_k=40, top_p=0.95, seed=seed)
            [expected] = generate(model, [prompt], 20, sampling)
            assert list(stream(model, prompt, 20, sampling)) == expected
            assert not set(model.config.eos_token_ids) & set(expected)


def test_streaming_refuses_what_generate_refuses() -> None:
    model = small_model().eval()
    for prompt in ([], [1] * 64, [97]):
        refused(lambda p=prompt: list(stream(model, p, 4)))  # type: ignore[misc]
    refused(lambda: list(stream(model, [1], 0)))


def test_an_id_is_given_before_the_next_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    original = minift.generate.sample

    def counted(*given: Any) -> torch.Tensor:
        result = original(*given)
        chosen.append(int(result))
        return result

    monkeypatch.setattr(minift.generate, "sample", counted)
    model = small_model(eos_token_id=96, std=0.3, tie_word_embeddings=False).eval()
    for count, id in enumerate(stream(model, [1, 5], 12), start=1):
        assert chosen[-1] == id
        assert len(chosen) == count
    assert len(chosen) > 3


def test_a_text_ends_at_each_of_several_ends() -> None:
    def model(*ends: int) -> Llama:
        return small_model(3, std=0.5, eos_token_id=ends, tie_word_embeddings=False).eval()

    long = reference.greedy(model(0), [1], 20)
    assert len(set(long)) > 4
    for id in set(long):
        for ends in ((0, id), (id, long[-1]), (long[-1], 2, id, 3)):
            ending = model(*ends)
            expected = long[: min(long.index(end) for end in ends if end in long)]
            assert reference.greedy(ending, [1], 20) == expected
            assert generate(ending, [[1, 5, 7], [1]], 20)[1] == expected
            assert list(stream(ending, [1], 20)) == expected


class Screen(io.StringIO):
    """A standard output that remembers what was written when."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.events = events

    def write(self, text: str) -> int:
        self.events.append(text)
        return super().write(text)


@pytest.mark.parametrize("which", ["bundled", "llama 3", "llama 2"])
@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_the_command_prints_while_it_generates_and_prints_the_whole(
    which: str, temperature: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = bundled("base"), "What is the capital of Mexico?"
    if which != "bundled":
        folder, made = tmp_path / "model", load_tokenizer(folders[which])
        save_model(folder, model_for(made, std=0.4, max_position_embeddings=128, tie_word_embeddings=False), made)
    model, made = load_model(folder), load_tokenizer(folder)
    [ids] = generate(model, [made.encode(prompt)], 24, Sampling(float(temperature), seed=3))

    events: list[str] = []
    original = minift.generate.stream

    def watched(*given: Any) -> Iterator[int]:
        for id in original(*given):
            events.append(f"id {id}")
            yield id

    monkeypatch.setattr(minift.generate, "stream", watched)
    monkeypatch.setattr(sys, "stdout", screen := Screen(events))
    words = ["--model", str(folder), "--prompt", prompt, "--max-new-tokens", "24", "--temperature", temperature]
    assert main(["generate", *words, "--seed", "3", "--device", "cpu"]) == 0
    assert screen.getvalue() == made.decode_continuation(ids).strip() + "\n"
    assert [event for event in events if event.startswith("id ")] == [f"id {id}" for id in ids]
    last_id = max(place for place, event in enumerate(events) if event.startswith("id "))
    early = [event for event in events[:last_id] if not event.startswith("id ") and event]
    assert len(early) > 2


# A tokenizer and a model ----------------------------------------------------------------------------------------------


def shape(tokenizer: Tokenizer, **changes: Any) -> LlamaConfig:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return LlamaConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size, **ids, **changes})


def test_a_tokenizer_fits_a_model_with_its_ids(each: Tokenizer) -> None:
    size, eos = each.vocab_size, each.eos_id
    check_fit(shape(each), each, exact=True)
    check_fit(shape(each, vocab_size=size + 62), each)  # spare ids
    for ends in ((eos,), (eos, 7), (7, 8, eos)):
        check_fit(shape(each, eos_token_id=ends), each)
    refused(lambda: check_fit(shape(each, vocab_size=size + 62), each, exact=True), str(size), str(size + 62))
    refused(lambda: check_fit(shape(each, eos_token_id=(7, 8)), each), "eos_token_id", str(eos))
    refused(lambda: check_fit(shape(each, eos_token_id=8), each), "eos_token_id", "8")
    refused(lambda: check_fit(shape(each, bos_token_id=8), each), "bos_token_id", "8")
    smaller = shape(each, vocab_size=size - 1, bos_token_id=0, eos_token_id=0)
    refused(lambda: check_fit(smaller, each), str(size), str(size - 1))


def test_a_vocabulary_bigger_than_the_model_is_refused_by_the_command(
    llama_3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", small_model(), None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_3 / name, tmp_path / "model")
    assert main(["generate", "--model", str(tmp_path / "model"), "--prompt", "a", "--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "they do not fit" in line


# Damage ---------------------------------------------------------------------------------------------------------------


def test_random_damage_is_refused_in_one_line_or_harmless(own: Path) -> None:
    rng, file = random.Random(6), own / "tokenizer.json"
    whole, messages = file.read_bytes(), []
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(rng.choice((2000, len(damaged))))
            damaged[place] = rng.choice((damaged[place] ^ 1 << rng.randrange(8), *b'019"{}[]:,- \x00\xff'))
        file.write_bytes(damaged)
        try:
            made = load_tokenizer(own)
            made.decode(made.encode("What is the capital of Mexico? <|im_end|>\n日\x00"))
            made.pieces(range(made.vocab_size))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if len(message.splitlines()) != 1]


WHOLE_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "white space": lambda whole: b" \n",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole.rstrip()[:-1],
    "text": lambda whole: b"not JSON",
    "null": lambda whole: b"null",
    "a list": lambda whole: b"[]",
    "a string": lambda whole: b'"x"',
    "an empty object": lambda whole: b"{}",
    "JSON of something else": lambda whole: b'{"bos_token": "<s>", "version": "1.0"}',
    "deep": lambda whole: b"[" * 100_000,
    "deep in the model": lambda whole: b'{"version": "1.0", "model": ' + b'{"type": ' * 10_000,
    "zeros": lambda whole: bytes(1000),
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "twice": lambda whole: whole + whole,
    "not UTF-8": lambda whole: whole.replace(b"<|im_start|>", b"<|im_st\xffart|>"),
}


@pytest.mark.parametrize("damage", WHOLE_FILES.values(), ids=WHOLE_FILES.keys())
def test_a_file_that_is_no_tokenizer_is_refused(llama_3: Path, damage: Callable[[bytes], bytes]) -> None:
    file = llama_3 / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json")


WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
WORD_PIECE = {
    "type": "WordPiece",
    "vocab": {"a": 0},
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": False}
BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
PARTS: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "a number for a model": {"model": 3},
    "an unknown model": {"model": {**BPE, "type": "Nonsense"}},
    "a merge of nothing": {"model": {**BPE, "merges": [["a", "b"]]}},
    "a negative id": {"model": {**BPE, "vocab": {"a": -1}}},
    "a huge id": {"model": {**BPE, "vocab": {"a": 2**40}}},
    "a vocabulary that is a list": {"model": {**BPE, "vocab": [["a", 0]]}},
    "an empty vocabulary": {"model": {**BPE, "vocab": {}}},
    "no unknown token": {"model": {**BPE, "unk_token": "<unk>"}},
    "words": {"model": WORD_LEVEL},
    "pieces of words": {"model": WORD_PIECE},
    "unigrams": {"model": UNIGRAM},
    "no unigrams": {"model": {**UNIGRAM, "vocab": []}},
    "an unknown unigram": {"model": {**UNIGRAM, "unk_id": 7}},
    "added tokens that are none": {"added_tokens": {"<s>": 1}},
    "an added token without a name": {"added_tokens": [{"id": 1}]},
    "a normalizer that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a wrong pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}},
    "a pre-tokenizer that is none": {"pre_tokenizer": {"type": "Nonsense"}},
    "a pre-tokenizer that drops": {"pre_tokenizer": {"type": "Whitespace"}},
    "no decoder": {"decoder": None},
    "a decoder that is none": {"decoder": []},
    "a truncation that is none": {"truncation": {"max_length": -1}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_a_part_of_the_wrong_kind_is_refused(llama_3: Path, parts: dict[str, Any]) -> None:
    edit(llama_3, lambda values: values.update(copy.deepcopy(parts)))
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json")


def test_the_command_refuses_a_damaged_file_in_one_line(llama_3: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (llama_3 / "tokenizer.json").write_bytes((llama_3 / "tokenizer.json").read_bytes()[:1000])
    assert main(["tokenizer", "show", "a", "--model", str(llama_3)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("minift: error: ")
    assert "tokenizer.json" in line


def test_tiktokens_ranks_are_refused_with_a_hint_and_a_tokenizer_json_beside_them_is_used(
    llama_3: Path, tmp_path: Path
) -> None:
    ranks = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n" * 500
    (tmp_path / "tokenizer.model").write_bytes(ranks)
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model", "tiktoken's ranks", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "tokenizer.model"), "tiktoken's ranks")
    (llama_3 / "tokenizer.model").write_bytes(ranks)
    made = load_tokenizer(llama_3)
    assert isinstance(made, JsonTokenizer)
    assert made.files["tokenizer.model"] == ranks
    for content in (b"", b"not a model", bytes(100), b"\n \n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert "tiktoken's" not in refused(lambda: load_tokenizer(tmp_path), "tokenizer.model")


def test_a_place_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.model", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "model.bin"), str(tmp_path), "tokenizer.model", "tokenizer.json")
    refused(lambda: load_tokenizer(tmp_path / "tokenizer.json"), "tokenizer.json", "cannot be read")
    refused(lambda: load_tokenizer(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "tokenizer.json").mkdir()
    refused(lambda: load_tokenizer(tmp_path), str(tmp_path))


def test_the_package_that_is_missing_is_named(llama_3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: load_tokenizer(llama_3), "tokenizer.json", "minift[hf]")


def test_show_prints_the_pieces_of_a_tokenizer_json(
    folder: Path, each: Tokenizer, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<|im_start|>What is the capital of Mexico?<|im_end|>"
    for path in (folder, folder / "tokenizer.json"):
        assert main(["tokenizer", "show", text, "--model", str(path)]) == 0
        *rows, summary = capsys.readouterr().out.splitlines()
        ids = [theirs.bos_token_id, *theirs(text, add_special_tokens=False)["input_ids"]]
        assert [row.split() for row in rows] == [
            [str(id), piece] for id, piece in zip(ids, theirs.convert_ids_to_tokens(ids), strict=True)
        ]
        assert summary.startswith(f"{len(ids)} ids")
        assert str(each.vocab_size) in summary
