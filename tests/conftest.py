"""What several tests share: small random models, the bundled tokenizer, and running the command line.

The whole suite runs on two cores of a CPU: as two processes (pytest-xdist) of one thread each, which their own
subprocesses inherit. What needs a GPU is marked `cuda` and skipped without one.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minift.checkpoint import save_model
from minift.config import LlamaConfig, bundled
from minift.model import Llama
from minift.tokenizer.base import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}

# What runs import, which is most of a short one's time: tests that fork many of them import it once, where it is there.
IMPORTED_BY_RUNS = (
    "torch._dynamo",
    "torch.utils.data",
    "torch.utils.checkpoint",
    "sentencepiece",
    "minift.runs.finetune",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and run the slow tests last."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: object) -> Llama:
    """A random model of a few thousand weights; a large `std` makes its logits far from uniform."""
    model = Llama(LlamaConfig(**{**SMALL, "initializer_range": std, **changes}))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(dtype)


def random_model(dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: object) -> Llama:
    """A model whose norms are random too: at their initial 1 they would hide a missing multiplication."""
    model = small_model(dtype=dtype, std=std, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def to_transformers(model: Llama, attention: str = "sdpa") -> Any:
    """The same model as `transformers` has it, in the same dtype. Without the package, the test is skipped."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            attn_implementation=attention,
        )
    )
    twin = twin.to(model.embed_tokens.weight.dtype).eval()
    weights = {hf_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = twin.load_state_dict(weights, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == config.tie_word_embeddings
    return twin


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the bundled base."""
    return load_tokenizer(bundled("base"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A minift checkpoint with random weights and the bundled tokenizer: fast to train in the tests of jobs."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, std=0.02)
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def minift() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `minift …` as a user does, in a process of its own; `cwd` and `env` may be given."""

    def run(*words: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "minift", *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs that do not belong to the project."""
    folder = os.environ.get("MINIFT_REAL_DATA")
    if not folder:
        pytest.skip("MINIFT_REAL_DATA is not set: no real inputs to try")
    return Path(folder)
