"""The promise of `tokenizer/base.py`: text becomes ids and comes back, to the character; no text forges a control id.

Every property is checked with the bundled vocabulary, with one trained here and, where real inputs are at hand, with
Llama 2's own. The ids are compared with what SentencePiece itself gives for the same file.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from minift.cli import main
from minift.errors import InputError
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.helpers import TEXTS, noise
from tests.tokenizer.kinds import CHATS, SAMPLE, kept, random_unicode, refused, trained

MODEL_FILES = ("bundled", "trained", "llama2")


@pytest.fixture(scope="module", params=MODEL_FILES)
def file(request: pytest.FixtureRequest, small_vocabulary: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a `tokenizer.model`, of each kind in turn."""
    if request.param == "bundled":
        return bundled("base") / "tokenizer.model"
    if request.param == "llama2":
        return request.getfixturevalue("real_data") / "tokenizer.model"
    folder = tmp_path_factory.mktemp("trained")
    small_vocabulary.save(folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def each_model(file: Path) -> Tokenizer:
    return load_tokenizer(file)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(each_model: Tokenizer, text: str) -> None:
    assert each_model.decode(each_model.encode(text, bos=True, eos=True)) == text
    assert each_model.decode(each_model.encode(text, bos=False)) == text


def test_decoding_gives_any_text_back(each_model: Tokenizer) -> None:
    for text in noise(300):
        assert each_model.decode(each_model.encode(text)) == text, ascii(text)


@pytest.mark.parametrize("answer", [*TEXTS, " Mexico City", "\nMexico City", "!", "s are joined"])
@pytest.mark.parametrize("prompt", ["What is the capital of Mexico?", "ends in a break\n", "日本", " "])
def test_a_continuation_goes_on_to_the_character(each_model: Tokenizer, prompt: str, answer: str) -> None:
    ids = each_model.encode(prompt) + each_model.encode_continuation(answer, eos=True)
    assert each_model.decode(ids) == prompt + answer
    assert each_model.decode_continuation(each_model.encode_continuation(answer)) == answer


def test_any_continuation_goes_on_to_the_character(each_model: Tokenizer) -> None:
    texts = noise(200)
    for prompt, answer in zip(texts[:100], texts[100:], strict=True):
        ids = each_model.encode(prompt) + each_model.encode_continuation(answer)
        assert each_model.decode(ids) == prompt + answer, ascii((prompt, answer))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces_own(file: Path, each_model: Tokenizer, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert each_model.encode(text, bos=False) == theirs.encode(text)
    assert each_model.encode(text, bos=True, eos=True) == theirs.encode(text, add_bos=True, add_eos=True)
    assert each_model.vocab_size == theirs.vocab_size()
    assert each_model.pieces(each_model.encode(text)) == ["<s>", *theirs.encode(text, out_type=str)]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<s></s><s>", "a <s> b </s>", " <s>"])
def test_no_text_is_a_control_id(each_model: Tokenizer, text: str) -> None:
    assert (each_model.bos_id, each_model.eos_id) == (1, 2)
    ids = each_model.encode(text, bos=True, eos=True)
    assert ids.count(1) == 1
    assert ids.count(2) == 1
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {1, 2} & set(each_model.encode_continuation(text))
    assert each_model.encode_continuation(text, eos=True).count(2) == 1


@pytest.mark.parametrize("id", [-1, -(10**6)])
def test_a_negative_id_is_refused(each_model: Tokenizer, id: int) -> None:
    """Those beyond the vocabulary stand for no text: see test_padded_vocabularies.py."""
    calls: list[Callable[[list[int]], object]] = [each_model.decode, each_model.decode_continuation, each_model.pieces]
    for call in calls:
        with pytest.raises(InputError, match=rf"id {id} is outside .* {each_model.vocab_size}"):
            call([5, id])


def test_repr_says_kind_size_bos_and_eos(tokenizer: Tokenizer) -> None:
    assert repr(tokenizer) == "<SentencePieceTokenizer: 2048 ids, BOS 1 '<s>', EOS 2 '</s>'>"


def test_a_tokenizer_is_opened_by_the_name_bundled(tokenizer: Tokenizer) -> None:
    assert load_tokenizer("bundled").files == tokenizer.files


def test_an_adapters_tokenizer_is_that_of_its_base(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "bundled"}')
    assert load_tokenizer(tmp_path).files == tokenizer.files


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_show_prints_each_piece_with_its_id(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    text = "What is the capital of Mexico?"
    assert main(["tokenizer", "show", text]) == 0
    *rows, summary = capsys.readouterr().out.splitlines()
    ids = [int(row.split()[0]) for row in rows]
    assert ids == tokenizer.encode(text)
    assert "".join(row.split()[1] for row in rows[1:]).replace("\u2581", " ") == " " + text
    assert summary.startswith(f"{len(ids)} ids")


def test_a_tokenizer_that_drops_line_breaks_is_refused() -> None:
    """SentencePiece's default normaliser does; `encode_continuation` would lose the start of every answer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Mexico City is the capital of Mexico."] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(InputError, match="drops line breaks"):
        SentencePieceTokenizer(model.getvalue())


def test_a_continuation_whose_first_piece_holds_the_line_break_is_refused() -> None:
    """Such a vocabulary has no ids for the answer alone after the line break that keeps the added space away."""
    made = SentencePieceTokenizer(trained(user_defined_symbols=["\nM"]))
    refused(lambda: made.encode_continuation("Mexico"), "line break")
    assert made.decode_continuation(made.encode_continuation("exico")) == "exico"


def test_decoding_gives_the_text_back_with_every_kind(any_kind: Tokenizer) -> None:
    for text in [*SAMPLE, *CHATS, *random_unicode(300)]:
        ids = any_kind.encode(text, eos=True, special=False)
        assert any_kind.decode(ids) == kept(any_kind, text), ascii(text)
        ids = any_kind.encode_continuation(text, eos=True, special=False)
        assert any_kind.decode_continuation(ids) == text, ascii(text)


@pytest.mark.parametrize("prompt", ["What is the capital of Mexico?", "ends in a break\n", "日本", "🙂", ""])
def test_a_continuation_goes_on_to_the_character_with_every_kind(any_kind: Tokenizer, prompt: str) -> None:
    for answer in [*SAMPLE, *random_unicode(40, seed=4), " Mexico City", "\nMexico City", "!", "s are joined"]:
        ids = any_kind.encode(prompt) + any_kind.encode_continuation(answer, eos=True)
        text = prompt + answer
        # Without a prompt to hold it, the first space is the one that the vocabulary adds.
        assert any_kind.decode(ids) == (text if prompt else text.removeprefix(" " if any_kind._anchor else ""))


@pytest.mark.parametrize("id", [-1, -(10**6)])
def test_a_negative_id_is_refused_by_every_kind(each: Tokenizer, id: int) -> None:
    for call in (each.decode, each.decode_continuation, each.pieces):
        refused(lambda call=call: call([5, id]), f"id {id}", str(each.vocab_size))  # type: ignore[misc]


def test_text_that_is_not_unicode_is_refused(each: Tokenizer) -> None:
    for call in (each.encode, each.encode_continuation):
        refused(lambda call=call: call("half \ud83d"), "not Unicode")  # type: ignore[misc]
