"""The promise of `Llama.random_weights`: the first weights are those of GPT-2, section 2.3, by their own numbers.

Each matrix is normal with mean 0, of the config's deviation; the two of each layer whose output is added to x are
smaller by the root of the number of such matrices, so that x does not grow with the depth. What is measured is held
against the formula with the error that a sample of that size has, and the sum itself against a model of other depth.
"""

import math

import pytest
import torch

from minift.model import Llama
from tests.helpers import random_tokens, small_model

STD = 0.05


def made(layers: int, seed: int = 0, **changes: object) -> Llama:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    return small_model(seed, std=STD, num_hidden_layers=layers, **shape, **changes)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_has_the_deviation_of_its_place(layers: int, tied: bool) -> None:
    seen = 0
    for name, weight in made(layers, tie_word_embeddings=tied).state_dict().items():
        if weight.ndim == 1:
            assert bool((weight == 1).all()), name
            continue
        written = name.split(".")[-2] in ("o_proj", "down_proj")
        expected = STD / math.sqrt(2 * layers) if written else STD
        n = weight.numel()
        assert float(weight.double().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * n)), name
        assert abs(float(weight.double().mean())) < 5 * expected / math.sqrt(n), name
        beyond = float((weight.abs() > 2 * expected).double().mean())  # of a normal distribution
        assert beyond == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n)), name
        seen += written
    assert seen == 2 * layers


@torch.no_grad()
def test_what_the_layers_add_does_not_grow_with_their_number() -> None:
    """Without the smaller deviation, 32 layers would add four times as much as 2."""
    added = []
    for layers in (2, 32):
        model = made(layers).double()
        tokens = random_tokens(4, 16)
        streams = list[torch.Tensor]()
        model.norm.register_forward_pre_hook(lambda _, inputs, streams=streams: streams.append(inputs[0]))
        model(tokens)
        added.append(float((streams[0] - model.embed_tokens(tokens)).norm()))
    assert added[1] == pytest.approx(added[0], rel=0.35)


def test_no_two_matrices_and_no_two_seeds_are_alike() -> None:
    matrices = [w for seed in (0, 1) for w in made(2, seed).parameters() if w.ndim == 2]
    assert len({tuple(weight.flatten()[:8].tolist()) for weight in matrices}) == len(matrices) == 2 * 15
    again = made(2, 1).embed_tokens.weight
    assert any(torch.equal(again, weight) for weight in matrices)
