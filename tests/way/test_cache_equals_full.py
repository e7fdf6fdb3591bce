"""Generating with a cache is the same as reading the whole text anew for every token.

Held here: logits through a `KVCache`, fed one token at a time or in pieces of any size, equal those of one full
forward pass; `generate`, with the faster decoders of `kernels/` and without them, equals `reference.greedy`, which has
no cache, and `transformers`' own `generate`; a prompt's continuation is the same alone and in a batch with prompts of
other lengths; a text ends before EOS and at the model's last position; and options that make no sense are refused.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minift import reference
from minift.cache import KVCache
from minift.errors import InputError
from minift.generate import Sampling, generate, stream
from minift.model import Llama
from tests.helpers import random_model, random_tokens, to_transformers

LIMIT = 64  # helpers.SMALL's positions
PROMPTS = [[1, 5, 9, 80, 33], [1], [1, 44, 7], [1, *range(20, 43)]]


def talker(**changes: object) -> Llama:
    """A model in float64, so that two ways to compute a logit cannot disagree about which is largest."""
    return random_model(torch.float64, **{"std": 0.4, "tie_word_embeddings": False, **changes})


def cached_logits(model: Llama, tokens: Tensor, sizes: Sequence[int], documents: Tensor | None = None) -> Tensor:
    """The logits of all tokens, read in pieces of `sizes` through a cache."""
    assert sum(sizes) == tokens.shape[1]
    weight = model.embed_tokens.weight
    cache = KVCache(model.config, tokens.shape[0], tokens.shape[1], weight.device, weight.dtype)
    pieces, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        pieces.append(model(tokens[:, here], None, None if documents is None else documents[:, here], cache))
        start += size
        assert cache.length == start
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "sizes",
    [[1] * 19, [7] + [1] * 12, [5, 3, 1, 10], [18, 1], [19], [1, 18]],
    ids=["one at a time", "prefill, then one", "pieces", "all but one", "all at once", "one, then all"],
)
@torch.no_grad()
def test_logits_in_pieces(sizes: list[int], kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    model = random_model(dtype, num_key_value_heads=kv_heads, head_dim=8)
    tokens = random_tokens(2, 19)
    assert float((cached_logits(model, tokens, sizes) - model(tokens)).abs().max()) < tolerance


@pytest.mark.parametrize("sizes", [[1] * 19, [6, 4, 1, 8]], ids=["one at a time", "pieces"])
@torch.no_grad()
def test_logits_in_pieces_with_documents(sizes: list[int]) -> None:
    model = talker()
    tokens = random_tokens(2, 19)
    documents = torch.tensor([[0] * 8 + [1] * 11, [-1] * 3 + [0] * 16])
    full = model(tokens, None, documents)
    assert float((cached_logits(model, tokens, sizes, documents) - full).abs().max()) < 1e-12
    assert float((full - model(tokens)).abs().max()) > 0.1  # the documents do matter


@torch.no_grad()
def test_more_tokens_than_the_cache_holds_are_refused() -> None:
    model = talker()
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float64)
    model(random_tokens(1, 6), cache=cache)
    with pytest.raises(InputError, match="9 tokens do not fit a cache of 8"):
        model(random_tokens(1, 3), cache=cache)
    assert cache.length == 6
    model(random_tokens(1, 2), cache=cache)  # what does fit still goes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("company", [1, 3])
def test_plain_generates_the_same_without_a_fast_decoder(
    company: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass is the model's own, and `kernels/` is not asked for anything."""
    model, sampling = talker(), Sampling(temperature, top_k=9, top_p=0.9, seed=7)
    prompts = PROMPTS[:company]
    expected = generate(model, prompts, 12, sampling)
    asked: list[int] = []
    monkeypatch.setattr("minift.kernels.fast_decoder", lambda *given: asked.append(given[4]))
    assert generate(model, prompts, 12, sampling) == expected  # where it has none, the model's own pass is taken
    assert asked == [11]
    assert generate(model, prompts, 12, sampling, plain=True) == expected
    assert [list(stream(model, prompt, 12, plain=True)) for prompt in prompts] == generate(model, prompts, 12)
    generate(model, [prompts[0]], 1)  # a single token needs no decoder
    assert asked == [11, 11]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_is_the_slow_twins(kv_heads: int, tied: bool) -> None:
    model = talker(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    expected = [reference.greedy(model, prompt, 25) for prompt in PROMPTS]
    assert [generate(model, [prompt], 25)[0] for prompt in PROMPTS] == expected
    if not tied:  # a text that only repeats itself would test little
        assert max(len(set(text)) for text in expected) > 8


def test_greedy_is_what_transformers_generates() -> None:
    model = talker()
    prompt = PROMPTS[0]
    ids = torch.tensor([prompt])
    twin = to_transformers(model)
    theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    theirs = theirs[0, len(prompt) :].tolist()
    eos = model.config.eos_token_id
    theirs = theirs[: theirs.index(eos)] if eos in theirs else theirs
    assert len(theirs) > 8
    assert generate(model, [prompt], 30) == [theirs]


@pytest.mark.parametrize("alone", [True, False], ids=["theirs one by one", "theirs left-padded"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_batch_of_many_lengths_is_what_transformers_generates(kv_heads: int, alone: bool) -> None:
    """64 tokens after each of 20 prompts, all in one batch of ours."""
    model = talker(num_key_value_heads=kv_heads, max_position_embeddings=128)
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 2, 3, 5, 7, 8, 9, 11, 13, 16, 17, 20, 23, 24, 29, 31, 33, 40, 47, 55]
    prompts = [[1, *torch.randint(3, 97, (size - 1,), generator=generator).tolist()] for size in sizes]
    twin, eos = to_transformers(model), model.config.eos_token_id
    theirs = []
    for group in [[prompt] for prompt in prompts] if alone else [prompts]:
        T = max(map(len, group))
        ids = torch.tensor([[eos] * (T - len(prompt)) + prompt for prompt in group])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in group])
        found = twin.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=eos)
        theirs += [row[T:].tolist() for row in found]
    wanted = [text[: text.index(eos)] if eos in text else text for text in theirs]
    assert generate(model, prompts, 64) == wanted
    assert sum(map(len, wanted)) > 20 * 64 / 2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_prompt_alone_and_in_company(kv_heads: int) -> None:
    model = talker(num_key_value_heads=kv_heads)
    assert len({len(prompt) for prompt in PROMPTS}) > 2
    alone = [generate(model, [prompt], 25)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 25) == alone
    assert generate(model, PROMPTS[::-1], 25) == alone[::-1]


def test_company_at_the_last_position_does_not_cut_a_shorter_text() -> None:
    """A batch has room for as long as its shortest prompt has, not its longest."""
    model = talker()
    prompts = [[1, 5, 9], [1] + [7] * (LIMIT - 4)]
    alone = [generate(model, [prompt], 20)[0] for prompt in prompts]
    assert [len(text) for text in alone] == [20, 3]
    assert generate(model, prompts, 20) == alone


def test_a_text_ends_before_eos() -> None:
    free = talker()
    text = reference.greedy(free, PROMPTS[0], 20)
    end = next(i for i in range(4, 20) if text[i] not in text[:i])
    model = talker(eos_token_id=text[end])  # the same weights; only the meaning of one id differs
    assert generate(model, [PROMPTS[0]], 20) == [text[:end]]
    # In a batch the others go on, whatever the finished one would have said.
    others = [reference.greedy(model, prompt, 20) for prompt in PROMPTS[1:]]
    assert max(map(len, others)) > end
    assert generate(model, PROMPTS, 20) == [text[:end], *others]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_text_ends_before_any_of_several_stop_tokens(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them comes; and nothing is computed after all texts have ended."""
    free = talker()
    text = reference.greedy(free, PROMPTS[0], 20)
    end = next(i for i in range(4, 20) if text[i] not in text[:i])
    stops = [id for id in range(90, 97) if id not in text][:2]
    stops.insert(place, text[end])
    model = talker(eos_token_id=tuple(stops))
    assert list(stream(model, PROMPTS[0], 20)) == text[:end]
    read, hidden = [], Llama.hidden
    monkeypatch.setattr(Llama, "hidden", lambda self, *given: read.append(given) or hidden(self, *given))
    assert generate(model, [PROMPTS[0]], 20, plain=True) == [text[:end]]
    assert len(read) == end + 1  # the prompt, and each new token but the stop token


@pytest.mark.parametrize("length", [1, 30, LIMIT - 1])
def test_a_text_ends_at_the_last_position(length: int) -> None:
    model = talker()
    prompt = random_tokens(length, seed=length).tolist()
    text = generate(model, [prompt], 1_000)[0]
    assert len(text) == LIMIT - length
    assert text == reference.greedy(model, prompt, LIMIT - length)
    assert generate(model, [prompt], 1)[0] == text[:1]


def test_sampling_depends_on_the_seed_alone() -> None:
    model = talker()

    def say(seed: int) -> list[list[int]]:
        return generate(model, PROMPTS, 12, Sampling(temperature=1.0, seed=seed))

    torch.manual_seed(0)
    first = say(5)
    torch.manual_seed(1)
    assert say(5) == first
    assert say(6) != first


@pytest.mark.parametrize(
    ("prompts", "options", "culprit"),
    [
        ([], {}, "at least one token"),
        ([[]], {}, "at least one token"),
        ([[1, 2], []], {}, "at least one token"),
        ([[1] * LIMIT], {}, "64 tokens"),
        ([[1], [1] * (LIMIT + 3)], {}, "67 tokens"),
        ([[1, 97]], {}, "a token id of the prompt is 97; it must be below 97"),
        ([[-1]], {}, "a token id of the prompt is -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -0.5}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": math.inf}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"top_p": math.nan}, "top_p"),
        ([[1]], {"seed": -1}, "seed"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    prompts: list[list[int]], options: dict[str, Any], culprit: str
) -> None:
    model = talker()
    sampling = {name: value for name, value in options.items() if name != "max_new_tokens"}
    with pytest.raises(InputError, match=culprit):
        generate(model, prompts, options.get("max_new_tokens", 3), Sampling(**sampling))
