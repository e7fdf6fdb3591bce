"""The promise of `TextStream` and `generate.stream`: text that is shown id by id is the text of all the ids."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minift.generate
from minift import reference
from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.generate import Sampling, generate, stream
from minift.model import Llama
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.stream import TextStream
from tests.helpers import small_model
from tests.tokenizer.kinds import CHATS, SAMPLE, model_for, nasty, random_unicode, refused


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the parts of a `TextStream`; the last one is what `end` gives."""
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
    for text in [*random_unicode(300, seed=5), *(text.replace("▁", "_") for text in nasty(300))]:
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
