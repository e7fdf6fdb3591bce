"""The promise about BOS and markers: what is trained has the ids that `transformers` makes of the same rendered text.

Each folder here is of one model's kind: its pipeline, its post-processor, its class and its names of BOS and EOS.
"""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.data.templates import TEXT, read_template, template_named
from minift.evaluation.choices import ChoiceQuestion, choose
from minift.formats.convert import convert
from minift.generate import generate
from minift.pack import IGNORE, Example, collate, encode_each, encode_prompt
from minift.prompts import Chat, Pair, Template, Turn
from minift.runner import BasicModelRunner
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.huggingface import JsonTokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import encode_pair, texts_of, write_jsonl
from tests.tokenizer.kinds import (
    SAMPLE,
    byte_level,
    edit,
    model_for,
    read_by_transformers,
    refused,
    write_config,
)

tokenizers = pytest.importorskip("tokenizers")

CHATML = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
OWN_TEMPLATES = {  # how each kind writes a chat; its markers are special tokens on both sides of the answer
    "smollm2": CHATML,
    "llama 3": "<|im_start|>user\n\n{question}<|im_end|><|im_start|>assistant\n\n{answer}<|im_end|>",
    "llama 2": "[INST] {question} [/INST] {answer} </s>",
    "tinyllama": "<|user|>\n{question}</s>\n<|assistant|>\n{answer}</s>",
    "mistral": "[INST] {question} [/INST] {answer}</s>",
}
BEGINS = {"smollm2": [], "llama 3": ["<|begin_of_text|>"], "llama 2": ["<s>"], "tinyllama": ["<s>"], "mistral": ["<s>"]}
QUESTIONS = ["What is the capital of Mexico?", "def f(x):\n    return 1", "日本 🙂", "a  b"]
ANSWERS = ["Mexico City", "Lima.\n\nAnd Peru 12", "é 🙂", "  two"]


def sentencepiece_model() -> SentencePieceTokenizer:
    return SentencePieceTokenizer((bundled("base") / "tokenizer.model").read_bytes())


def llama_json() -> str:
    """Return the bundled vocabulary as a `tokenizer.json` that adds a space to a text's first word only."""
    values = json.loads(make_json(sentencepiece_model()))
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return json.dumps({**values, "normalizer": None, "pre_tokenizer": first})


def make_kind(kind: str, folder: Path) -> Path:
    llama = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    if kind == "smollm2":
        byte_level("smollm").save(str(folder / "tokenizer.json"))
        write_config(folder, "<|im_start|>", "<|im_end|>", tokenizer_class="GPT2Tokenizer", add_prefix_space=False)
    elif kind == "llama 3":
        made = byte_level("llama 3")
        bytes_ = tokenizers.processors.ByteLevel(trim_offsets=True)
        made.post_processor = tokenizers.processors.Sequence([bytes_, made.post_processor])
        made.save(str(folder / "tokenizer.json"))
        write_config(folder, "<|begin_of_text|>", "<|im_end|>")
    else:
        old = kind == "mistral"  # its file adds a space after every marker; transformers 5 reads it so without a class
        text = make_json(sentencepiece_model()) if old else llama_json()
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        if old:
            llama["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer.model").write_bytes((bundled("base") / "tokenizer.model").read_bytes())
        write_config(folder, "<s>", "</s>", **llama)
    return folder


@pytest.fixture(scope="module", params=OWN_TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kind(name, tmp_path_factory.mktemp(name.replace(" ", "-")))


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> Tokenizer:
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def other(model_folder: Path) -> Any:
    """Return what `transformers` reads from the same folder."""
    return read_by_transformers(model_folder)


@pytest.fixture(scope="module")
def own_template(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "mine.txt"
    file.write_text(OWN_TEMPLATES[name], encoding="utf-8")
    return file


def ids_of(other: Any, text: str) -> list[int]:
    """Return the ids that `transformers` gives a text, by default: BOS and all."""
    return list(other(text)["input_ids"])


def test_a_text_begins_as_in_transformers(ours: Tokenizer, other: Any, name: str) -> None:
    assert other.convert_ids_to_tokens(ids_of(other, "a"))[: len(BEGINS[name])] == BEGINS[name]
    assert ours.adds_bos == bool(BEGINS[name])
    for text in SAMPLE:
        assert ours.encode(text) == ids_of(other, text)
        assert ours.encode(text, bos=False) == other(text, add_special_tokens=False)["input_ids"]


def check_pairs(ours: Tokenizer, other: Any, template: Template) -> None:
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        pair = Pair(question, answer)
        example = encode_pair(pair, template, ours, max_length=500)
        assert example is not None
        prompt, text = texts_of(template, pair)
        assert example.prompt == ids_of(other, prompt)
        whole = ids_of(other, prompt + text)
        assert example.prompt + example.answer == whole + [ours.eos_id] * (whole[-1] != ours.eos_id)


def test_pairs_in_a_template_file_have_the_ids_of_transformers(ours: Tokenizer, other: Any, own_template: Path) -> None:
    check_pairs(ours, other, read_template(own_template))


@pytest.mark.parametrize("template", ["llama2", "llama3"])
def test_pairs_in_a_template_of_minift_have_the_ids_of_transformers(ours: Tokenizer, other: Any, template: str) -> None:
    check_pairs(ours, other, template_named(template))


def test_a_marker_has_one_id_on_both_sides_of_the_answer(tmp_path: Path) -> None:
    made = load_tokenizer(make_kind("smollm2", tmp_path))
    (tmp_path / "mine.txt").write_text(CHATML)
    example = encode_pair(Pair("Hi", "Ho"), read_template(tmp_path / "mine.txt"), made, max_length=99)
    assert example is not None
    assert made.pieces(example.prompt).count("<|im_end|>") == 1
    assert made.pieces(example.prompt)[0] == "<|im_start|>"
    assert made.pieces(example.answer).count("<|im_end|>") == 1  # which is EOS, once, and a target
    assert made.pieces(example.answer)[-1] == "<|im_end|>"
    assert collate([example], made.eos_id).targets.max() != IGNORE


def test_a_template_that_writes_bos_itself_gets_no_second_one(ours: Tokenizer, own_template: Path) -> None:
    (name,) = ours.pieces([ours.bos_id])
    own_template = own_template.with_name("with-bos.txt")
    own_template.write_text(f"{name}{{question}} => {{answer}}", encoding="utf-8")
    for question in ("Hi", f"Hi {name}", name):
        example = encode_pair(Pair(question, "Ho"), read_template(own_template), ours, 99)
        assert example is not None
        assert [example.prompt[0], example.prompt.count(ours.bos_id)] == [ours.bos_id, 1]


def test_pages_and_texts_have_the_ids_of_transformers(ours: Tokenizer, other: Any, tmp_path: Path) -> None:
    texts = [text for text in SAMPLE if text.strip()]
    expected = [[*ids_of(other, text), ours.eos_id] for text in texts]
    ids, lengths = ours.encode_documents(texts)
    assert ids.tolist() == [id for text in expected for id in text]
    assert lengths.tolist() == [len(text) for text in expected]
    for text, all_ids in zip(texts, expected, strict=True):
        assert encode_pair(Pair("", text), TEXT, ours, 10_000) == Example(all_ids[:1], all_ids[1:])
    file = write_jsonl(tmp_path / "pages.jsonl", [{"text": text} for text in texts])
    rows = PageBatches(DocumentStream([file], epochs=1), ours, batch_size=1, length=16)
    read = [id for batch in rows for id in batch.tokens.flatten().tolist()]
    assert read == ids.tolist()[: len(read)]
    assert len(read) > len(ids) - 32


def test_the_datas_own_text_is_never_special(ours: Tokenizer, other: Any, own_template: Path) -> None:
    """Where a pair spells markers, the template's are still special and the pair's are not, at any place."""
    template = read_template(own_template)
    specials = set(other.get_added_vocab())
    rng = random.Random(5)
    clean = encode_pair(Pair("Q", "A"), template, ours, 10_000)
    assert clean is not None
    count = [piece in specials for piece in ours.pieces(clean.prompt + clean.answer)].count(True)
    for _ in range(40):
        words = rng.choices([*specials, "hi", "\n", "é", "x "], k=6)
        pair = Pair(" ".join(words[:3]), "x" + "".join(words[3:]))
        example = encode_pair(pair, template, ours, 10_000)
        assert example is not None
        assert [piece in specials for piece in ours.pieces(example.prompt + example.answer)].count(True) == count
        names = ours.pieces([ours.bos_id, ours.eos_id])
        prompt, answer = (
            "".join(
                part.replace(names[0], "").replace(names[1], "") if place % 2 == 0 else part
                for place, part in enumerate(parts)
            )
            for parts in template.parts(pair)
        )
        assert ours.decode(example.prompt) == prompt
        assert ours.decode_continuation(example.answer) == answer


def test_a_text_that_is_cut_at_its_markers_has_the_ids_of_the_text_in_one(
    ours: Tokenizer, other: Any, own_template: Path
) -> None:
    """What is done only where the data spells a marker, done where `transformers` can be asked."""
    assert isinstance(ours, JsonTokenizer)
    template = read_template(own_template)
    marker = ours.pieces([ours.eos_id])[0]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        clean, spelled = (template.parts(Pair(question + more, answer))[0] for more in ("", marker))
        assert ours.encode(clean) == ids_of(other, "".join(clean))
        ids, longer = ours.encode(clean), ours.encode(spelled)
        changed = len(ours.encode_continuation(marker, special=False))
        end = next(place for place, (a, b) in enumerate(zip(ids, longer, strict=False)) if a != b)
        assert longer[end + changed :] == ids[end:]  # the same before and after what was added


def test_answers_come_through_the_same_ids(
    ours: Tokenizer, model_folder: Path, own_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner, `generate` and the questions with choices ask as training does; the tool prints what they answer."""
    model = model_for(ours)
    save = tmp_path / "saved"
    save_model(save, model, ours)
    template = read_template(own_template)
    example = encode_pair(Pair(QUESTIONS[0], "x"), template, ours, 99)
    assert example is not None
    ids = generate(model, [example.prompt], 8)[0]
    text = ours.decode_continuation(ids).strip()
    runner = BasicModelRunner(str(save), device="cpu")
    runner.prompt_template = str(own_template)
    assert runner(QUESTIONS[0], max_tokens=8) == text
    words = ["generate", "--model", str(save), "--prompt", QUESTIONS[0], "--template", str(own_template)]
    capsys.readouterr()
    assert main([*words, "--max-new-tokens", "8", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == text
    (((found, _), _),) = choose(model, ours, [ChoiceQuestion(QUESTIONS[0], ("x", "y"), 0)], template)
    logits = model(torch.tensor([example.prompt + example.answer]))[0].log_softmax(-1).detach()
    answer = ours.encode_continuation(template.parts(Pair(QUESTIONS[0], "x"))[1])  # no EOS but the template's
    places = range(len(example.prompt) - 1, len(example.prompt) + len(answer) - 1)
    assert found == pytest.approx(sum(float(logits[place, id]) for place, id in zip(places, answer, strict=True)))


@pytest.mark.parametrize("to", ["hf", "native", "meta"])
def test_an_exported_folder_sees_the_same_ids(
    ours: Tokenizer, other: Any, name: str, own_template: Path, tmp_path: Path, to: str
) -> None:
    save_model(tmp_path / "run", model_for(ours), ours)
    convert(tmp_path / "run", tmp_path / "out", to)
    again = load_tokenizer(tmp_path / "out")
    assert again.adds_bos == ours.adds_bos
    template = read_template(own_template)
    example = encode_pair(Pair(QUESTIONS[0], ANSWERS[0]), template, ours, 99)
    assert encode_pair(Pair(QUESTIONS[0], ANSWERS[0]), template, again, 99) == example
    assert example is not None
    if to == "hf":
        exported = read_by_transformers(tmp_path / "out")
        prompt, answer = texts_of(template, Pair(QUESTIONS[0], ANSWERS[0]))
        assert ids_of(exported, prompt) == example.prompt
        whole = ids_of(exported, prompt + answer)
        assert example.prompt + example.answer == whole + [ours.eos_id] * (whole[-1] != ours.eos_id)
        for text in SAMPLE:
            assert ids_of(exported, text) == ours.encode(text)
    assert load_model(tmp_path / "out").config.bos_token_id == ours.bos_id


@pytest.mark.parametrize("said", [None, True, False])
def test_a_sentencepiece_folder_begins_a_text_as_its_config_says(
    sentencepiece_folder: Path, tmp_path: Path, said: bool | None
) -> None:
    """Without a word about it BOS is added, as by the class LlamaTokenizer; the file that is made says the same."""
    more = {} if said is None else {"add_bos_token": said}
    write_config(sentencepiece_folder, "<s>", "</s>", tokenizer_class="LlamaTokenizer", **more)
    made = load_tokenizer(sentencepiece_folder)
    assert isinstance(made, SentencePieceTokenizer)
    begin = [] if said is False else [1]
    assert made.encode("a")[:1] == (begin or made.encode("a", bos=False)[:1])
    assert made.encode_documents(["a"])[0].tolist() == [*begin, *made.encode("a", bos=False), 2]
    save_model(tmp_path / "hf", model_for(made), made, format="hf")
    save_model(tmp_path / "native", model_for(made), made)
    exported = read_by_transformers(tmp_path / "hf")
    for text in ["a", "Mexico City\n 12"]:
        assert ids_of(exported, text) == made.encode(text)
        assert load_tokenizer(tmp_path / "native").encode(text) == made.encode(text)
        assert load_tokenizer(tmp_path / "hf").encode(text) == made.encode(text)


@pytest.mark.parametrize("value", ["yes", 2, [], "true"], ids=str)
def test_an_add_bos_token_that_says_nothing_is_refused(sentencepiece_folder: Path, value: Any) -> None:
    edit(sentencepiece_folder, lambda values: values.update(add_bos_token=value), "tokenizer_config.json")
    refused(lambda: load_tokenizer(sentencepiece_folder), "add_bos_token")


def test_a_tokenizer_can_be_sent_to_a_worker(ours: Tokenizer) -> None:
    assert isinstance(ours, JsonTokenizer)
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode("a") == ours.encode("a")


ENDED_BY_A_MARKER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_text_right_after_the_end_of_a_turn_has_the_ids_that_it_is_asked_with(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    """Some vocabularies add a space after a marker: in training as in use, and as `transformers` does."""
    pytest.importorskip("jinja2")
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(ENDED_BY_A_MARKER, encoding="utf-8")
    ours, other = load_tokenizer(tmp_path), read_by_transformers(tmp_path)
    template = template_named("chat", ours)
    said = ["Hi there", "hello", "bye", "see you", "again", "yes"]
    turns = [Turn(("user", "assistant")[i % 2], text, learned=i % 2 == 1) for i, text in enumerate(said)]
    (spans,) = template.examples(Chat(tuple(turns)))
    trained = [id for ids in encode_each(spans, ours) for id in ids]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert trained == other.apply_chat_template(messages, return_dict=True)["input_ids"]
    for count in (2, 4, 6):
        prompt = encode_prompt(template.prompt(Chat(tuple(turns[:count]))), ours)
        assert trained[: len(prompt)] == prompt
