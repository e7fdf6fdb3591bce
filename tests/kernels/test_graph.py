"""The promise of `kernels/graph.py`: one more token of each of many texts is the model's own forward pass.

The twin is `Llama.hidden` with one token of each and a `KVCache`. On a CPU every token is computed directly; on a GPU
the third one and those after it are a recording that is played.
"""

import math

import pytest
import torch

from minift import reference
from minift.cache import KVCache
from minift.errors import InputError
from minift.generate import generate
from minift.kernels.graph import GraphDecoder
from minift.pack import PADDING
from tests.helpers import random_model, random_tokens
from tests.twins import SHAPES

PROMPTS = [[1, 5, 9, 80, 33], [1], [1, 44, 7], [1, *range(20, 43)]]


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
    """Three texts token by token, one of them after padding; and what that leaves in the cache, whose rest was NaN."""
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
        expected = model(tokens[:, here], positions[:, here], documents[:, here] if padded else None, theirs)[:, 0]
        assert found.dtype == dtype
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())
        assert ours.length == theirs.length == place + 1
    assert (decoder.graph is not None) == (device == "cuda")
    for found, expected in zip(ours.stored.flatten(0, 1), theirs.stored.flatten(0, 1), strict=True):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    with pytest.raises(InputError, match="31 tokens do not fit a cache of 30"):
        decoder.logits(tokens[:, :1])


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_generating_on_a_gpu_says_what_is_said_without_a_cache(tokens: int) -> None:
    """The first token by reading the prompt, the second one as it comes, the third one recorded, the rest played."""
    model = random_model(torch.float64, std=0.4, tie_word_embeddings=False)
    expected = [reference.greedy(model, prompt, tokens) for prompt in PROMPTS]
    model.cuda()
    assert generate(model, PROMPTS, tokens) == expected
    assert [generate(model, [prompt], tokens)[0] for prompt in PROMPTS] == expected


@torch.inference_mode()
def test_the_model_is_left_as_it_is() -> None:
    """What a recording runs is a copy with kernels over the same weights."""
    model = random_model()
    kinds = [type(module) for module in model.modules()]
    cache = KVCache(model.config, 2, 8, model.device, torch.float32)
    place = torch.zeros(2, 1, dtype=torch.int64)
    decoder = GraphDecoder(model, cache, place, place)
    assert [type(module) for module in model.modules()] == kinds != [type(module) for module in decoder.model.modules()]
    for one, other in zip(model.parameters(), decoder.model.parameters(), strict=True):
        assert one is other
