"""Generating with a cache is the same as reading the whole text anew for every token.

Held here: logits through a `KVCache`, fed one token at a time or in pieces of any size, equal those of one full
forward pass; `generate` equals `reference.greedy`, which has no cache, and `transformers`' own `generate`; a prompt's
continuation is the same alone and in a batch with prompts of other lengths; a text ends before EOS and at the model's
last position; and options that make no sense are refused.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minift import reference
from minift.cache import KVCache
from minift.config import RopeScaling
from minift.errors import InputError
from minift.generate import Sampling, generate, stream
from minift.kernels.decode import NARROW, Decoder, _Products, _width
from minift.kernels.graph import GraphDecoder
from minift.model import Llama
from minift.pack import PADDING
from tests.helpers import random_model, random_tokens, to_transformers

LIMIT = 64  # conftest.SMALL's positions
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


SHAPES: dict[str, dict[str, object]] = {
    "shared heads": {"num_key_value_heads": 2},
    "wide heads, tied": {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Llama 3's RoPE": {
        "rope_scaling": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        )
    },
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("tokens_to_come", [1, 64], ids=["few tokens", "many, so weights are transposed"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_decoder_is_the_models_forward_pass(
    shape: str, tokens_to_come: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Token by token after a prompt, and what it leaves in the cache. (The norms reduce in float32 in all of them.)"""
    model = random_model(dtype, **{"std": 0.2, "tie_word_embeddings": False, **SHAPES[shape]})
    tokens = random_tokens(1, 30)
    ours, theirs = (KVCache(model.config, 1, 30, torch.device("cpu"), dtype) for _ in range(2))
    for cache in (ours, theirs):
        model(tokens[:, :7], cache=cache)
    decoder = Decoder(model, ours, tokens_to_come)
    for position in range(7, 30):
        found = decoder.logits(int(tokens[0, position]))
        wanted = model(tokens[:, position : position + 1], cache=theirs)[0, 0]
        assert found.dtype == dtype
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
        assert ours.length == theirs.length == position + 1
    for found, wanted in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
    with pytest.raises(InputError, match="31 tokens do not fit a cache of 30"):
        decoder.logits(1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
@torch.inference_mode()
def test_the_graph_decoder_is_the_models_forward_pass(
    padded: bool, shape: str, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """Three texts token by token, one of them behind padding; and what that leaves in the cache, whose rest was NaN."""
    model = random_model(dtype, **{"std": 0.2, "tie_word_embeddings": False, **SHAPES[shape]}).to(device)
    tokens, padding = random_tokens(3, 30).to(device), torch.tensor([0, 4, 0], device=device)[:, None] * padded
    positions = torch.arange(30, device=device)[None] - padding
    documents = torch.where(positions < 0, PADDING, 0)
    positions = positions.clamp(min=0)
    ours, theirs = (KVCache(model.config, 3, 30, torch.device(device), dtype) for _ in range(2))
    for cache in (ours, theirs):
        cache.stored.fill_(math.nan)
        model(tokens[:, :7], positions[:, :7], documents[:, :7] if padded else None, cache)
    decoder = GraphDecoder(model, ours, positions[:, 7:8], documents[:, 7:8])
    for place in range(7, 30):
        here = slice(place, place + 1)
        found = decoder.logits(tokens[:, here])
        wanted = model(tokens[:, here], positions[:, here], documents[:, here] if padded else None, theirs)[:, 0]
        assert found.dtype == dtype
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
        assert ours.length == theirs.length == place + 1
    assert (decoder.graph is not None) == (device == "cuda")
    for found, wanted in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
    with pytest.raises(InputError, match="31 tokens do not fit a cache of 30"):
        decoder.logits(tokens[:, :1])


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_generating_on_a_gpu_says_what_is_said_without_a_cache(tokens: int) -> None:
    """The first token by reading the prompt, the second one as it comes, the third one recorded, the rest played."""
    model = talker()
    wanted = [reference.greedy(model, prompt, tokens) for prompt in PROMPTS]
    model.cuda()
    assert generate(model, PROMPTS, tokens) == wanted
    assert [generate(model, [prompt], tokens)[0] for prompt in PROMPTS] == wanted


@pytest.mark.parametrize(
    "rows", [(1,), (37,), (64,), (96, 32, 32), (768, 768), (2 * 3 * 5, 7 * 11), (2 * 3 * 5 * 7 * 11,)], ids=str
)
@pytest.mark.parametrize("columns", [1, 6, 24, 576])
@torch.inference_mode()
def test_a_product_from_a_transposed_copy(rows: tuple[int, ...], columns: int) -> None:
    """Of each of two layers, in any order: against float64, and as `torch.mv` rounds it."""
    generator = torch.Generator().manual_seed(0)
    layers = [[torch.randn(n, columns, generator=generator).bfloat16() for n in rows] for _ in range(2)]
    products, plain = _Products(layers, transpose=True), _Products(layers, transpose=False)
    assert products.transposed == (rows not in ((1,), (2 * 3 * 5, 7 * 11)))  # not in parts of one row
    assert not plain.transposed
    for i in (0, 1, 1, 0):
        x = torch.randn(columns, generator=generator).bfloat16()
        wanted = torch.cat([matrix.double() @ x.double() for matrix in layers[i]])
        for these in (products, plain):
            these.x.copy_(x)
            found = these(i)
            assert found.shape == these.shape
            assert float((found.flatten().double() - wanted).norm()) <= 2**-8 * float(wanted.norm())


def test_which_products_are_transposed() -> None:
    """Those of narrow bfloat16 matrices: wide ones PyTorch reads as fast as memory gives them."""
    for dtype, columns in ((torch.float32, 64), (torch.bfloat16, NARROW)):
        assert not _Products([[torch.zeros(8, columns, dtype=dtype)]], True).transposed


@pytest.mark.parametrize(
    ("sizes", "threads", "width"),
    [
        ((576, 192, 192), 2, 96),  # 5 + 5 parts; of 192 it would be 3 + 2, and one thread would wait
        ((1536, 1536), 2, 384),
        ((576,), 2, 288),
        ((576,), 1, 288),  # 576 sums do not stay in registers
        ((576,), 16, 36),
        ((49152,), 16, 384),
        ((769,), 2, 769),  # a prime
        ((30, 77), 2, None),
    ],
    ids=str,
)
def test_how_wide_a_part_is(
    sizes: tuple[int, ...], threads: int, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busiest thread has as little as it can, in parts as wide as they can be."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _width(sizes) == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_prompt_is_decoded_without_the_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first pass; in company the model reads all new tokens together."""
    model = random_model(dtype, std=0.4)
    seen: list[tuple[int, ...]] = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, *more: (seen.append(tuple(tokens.shape)), hidden(tokens, *more))[1]
    )
    generate(model, [[1, 5, 9]], 4)
    assert seen == [(1, 3)]
    seen.clear()
    generate(model, [[1, 5, 9], [1, 7, 8]], 3)
    assert seen == [(2, 3), (2, 1), (2, 1)]


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
    """64 tokens behind each of 20 prompts, all in one batch of ours."""
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
