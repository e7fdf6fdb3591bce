"""The promise of `train_tokenizer`: the same texts give the same vocabulary, in which nothing is unknown."""

import pytest

from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.sentencepiece import train_tokenizer


def test_training_is_deterministic_and_leaves_nothing_unknown(small_vocabulary: Tokenizer) -> None:
    texts = ["The capital of Mexico is Mexico City.\nThe capital of Peru is Lima. " * 3, "12 34\n"]
    assert train_tokenizer(iter(texts), 300).files["tokenizer.model"] == small_vocabulary.files["tokenizer.model"]
    assert (
        train_tokenizer(["The capital of Peru is Lima, and nothing else. " * 3], 290).files["tokenizer.model"]
        != small_vocabulary.files["tokenizer.model"]
    )
    pieces = small_vocabulary.pieces(range(small_vocabulary.vocab_size))
    assert small_vocabulary.vocab_size == 300
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    # A character that training never saw is spelled by its UTF-8 bytes, which start at id 3.
    assert small_vocabulary.encode_continuation("🙂\n") == [3 + byte for byte in "🙂\n".encode()]
    assert not [piece for piece in pieces[259:] if len(piece.strip("\u2581")) > 1 and any(c.isdigit() for c in piece)]


def test_each_digit_is_a_piece() -> None:
    made = train_tokenizer(["In 2020 and 2021 and 2020 again " * 20], 284)
    assert [piece for piece in made.pieces(made.encode(" 2020", bos=False)) if piece.strip("\u2581")] == list("2020")


def test_training_learns_the_words_of_its_text(small_vocabulary: Tokenizer) -> None:
    assert len(small_vocabulary.encode("The capital of Mexico", bos=False)) < len("The capital of Mexico") / 2


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_without_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(texts, 300)


@pytest.mark.parametrize("size", [0, -1, 100, 100_000])
def test_training_with_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=str(size)):
        train_tokenizer(["The capital of Peru is Lima."], size)
