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
from minift.tokenizer.sentencepiece import SentencePieceTokenizer, train_tokenizer
from tests.helpers import TEXTS, noise

KINDS = ("bundled", "trained", "llama2")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A vocabulary of 300 pieces that has seen nothing but a little English."""
    return train_tokenizer(["The capital of Mexico is Mexico City.\nThe capital of Peru is Lima. " * 3, "12 34\n"], 300)


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.model`, of each kind in turn."""
    if request.param == "bundled":
        return bundled("base") / "tokenizer.model"
    if request.param == "llama2":
        return request.getfixturevalue("real_data") / "tokenizer.model"
    folder = tmp_path_factory.mktemp("trained")
    trained.save(folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def each(file: Path) -> Tokenizer:
    return load_tokenizer(file)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(each: Tokenizer, text: str) -> None:
    assert each.decode(each.encode(text, bos=True, eos=True)) == text
    assert each.decode(each.encode(text, bos=False)) == text


def test_decoding_gives_any_text_back(each: Tokenizer) -> None:
    for text in noise(300):
        assert each.decode(each.encode(text)) == text, ascii(text)


@pytest.mark.parametrize("answer", [*TEXTS, " Mexico City", "\nMexico City", "!", "s are joined"])
@pytest.mark.parametrize("prompt", ["What is the capital of Mexico?", "ends in a break\n", "日本", " "])
def test_a_continuation_goes_on_to_the_character(each: Tokenizer, prompt: str, answer: str) -> None:
    ids = each.encode(prompt) + each.encode_continuation(answer, eos=True)
    assert each.decode(ids) == prompt + answer
    assert each.decode_continuation(each.encode_continuation(answer)) == answer


def test_any_continuation_goes_on_to_the_character(each: Tokenizer) -> None:
    texts = noise(200)
    for prompt, answer in zip(texts[:100], texts[100:], strict=True):
        ids = each.encode(prompt) + each.encode_continuation(answer)
        assert each.decode(ids) == prompt + answer, ascii((prompt, answer))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces_own(file: Path, each: Tokenizer, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert each.encode(text, bos=False) == theirs.encode(text)
    assert each.encode(text, bos=True, eos=True) == theirs.encode(text, add_bos=True, add_eos=True)
    assert each.vocab_size == theirs.vocab_size()
    assert each.pieces(each.encode(text)) == ["<s>", *theirs.encode(text, out_type=str)]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<s></s><s>", "a <s> b </s>", " <s>"])
def test_no_text_is_a_control_id(each: Tokenizer, text: str) -> None:
    assert (each.bos_id, each.eos_id) == (1, 2)
    ids = each.encode(text, bos=True, eos=True)
    assert ids.count(1) == 1
    assert ids.count(2) == 1
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {1, 2} & set(each.encode_continuation(text))
    assert each.encode_continuation(text, eos=True).count(2) == 1


@pytest.mark.parametrize("wrong", [-1, 10**6, "vocab_size"])
def test_an_id_out_of_range_is_refused(each: Tokenizer, wrong: int | str) -> None:
    id = each.vocab_size if isinstance(wrong, str) else wrong
    calls: list[Callable[[list[int]], object]] = [each.decode, each.decode_continuation, each.pieces]
    for call in calls:
        with pytest.raises(InputError, match=rf"id {id} is outside .* {each.vocab_size}"):
            call([5, id])


def test_training_is_deterministic_and_leaves_nothing_unknown(trained: Tokenizer) -> None:
    texts = ["The capital of Mexico is Mexico City.\nThe capital of Peru is Lima. " * 3, "12 34\n"]
    assert train_tokenizer(iter(texts), 300).files["tokenizer.model"] == trained.files["tokenizer.model"]
    assert (
        train_tokenizer(["The capital of Peru is Lima, and nothing else. " * 3], 290).files["tokenizer.model"]
        != trained.files["tokenizer.model"]
    )
    pieces = trained.pieces(range(trained.vocab_size))
    assert trained.vocab_size == 300
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    # A character that training never saw is spelled by its UTF-8 bytes, which start at id 3.
    assert trained.encode_continuation("🙂\n") == [3 + byte for byte in "🙂\n".encode()]
    assert not [piece for piece in pieces[259:] if len(piece.strip("\u2581")) > 1 and any(c.isdigit() for c in piece)]


def test_training_learns_the_words_of_its_text(trained: Tokenizer) -> None:
    assert len(trained.encode("The capital of Mexico", bos=False)) < len("The capital of Mexico") / 2


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_without_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(texts, 300)


@pytest.mark.parametrize("size", [0, -1, 100, 100_000])
def test_training_with_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=str(size)):
        train_tokenizer(["The capital of Peru is Lima."], size)


def test_repr_says_kind_size_bos_and_eos(tokenizer: Tokenizer) -> None:
    assert repr(tokenizer) == "<SentencePieceTokenizer: 2048 ids, BOS 1 '<s>', EOS 2 '</s>'>"


def test_a_tokenizer_is_opened_by_the_name_bundled(tokenizer: Tokenizer) -> None:
    assert load_tokenizer("bundled").files == tokenizer.files


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
