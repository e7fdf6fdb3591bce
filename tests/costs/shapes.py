"""The shapes of models that the tests of `costs/` share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minift.config import LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "tied-gqa": {},
    "untied-gqa": {"tie_word_embeddings": False},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 10},
    "three layers": {"num_hidden_layers": 3, "intermediate_size": 22},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
# A shape in which no two sizes are alike, wide enough for the small things (RoPE's tables) to be small.
WIDER: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
}


def tokens_of(config: LlamaConfig, *shape: int) -> Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
