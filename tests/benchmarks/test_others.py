"""Sides of `peers` from other packages begin with minift's weights, and compute its loss and gradient; or are refused.

LitGPT and torchtune ask for versions of other packages that do not fit those of the tests: where they are not
installed, what needs them is skipped.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import others, peers, side
from minift.config import TrainConfig
from minift.errors import InputError
from minift.loss import next_token_loss
from minift.model import Llama
from tests.helpers import small_model
from tests.twins import apart

UNTIED = {"tie_word_embeddings": False, "vocab_size": 96}
CASES = [("litgpt", {}), ("litgpt", UNTIED), ("torchtune", UNTIED)]


def made(package: str, model: Llama) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    try:
        return getattr(others, package)(model, compiled=False)
    except InputError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(f"{package} is not installed, or not with packages that fit it")


@pytest.mark.parametrize(("package", "shape"), CASES, ids=str)
def test_the_same_loss_and_gradient(package: str, shape: dict[str, Any]) -> None:
    """Of the embedding, whose gradient has gone through every layer."""
    model = small_model(**shape)
    theirs, loss_of = made(package, model)
    tokens = torch.randint(90, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = side.whole_rows(tokens[None])[0]
    ours = next_token_loss(model.hidden(tokens), model.head_weight, batch.targets) / batch.n_targets
    loss = loss_of(tokens)
    assert apart(loss, ours) < 1e-5
    ours.backward()
    loss.backward()
    embedding = theirs.transformer.wte if package == "litgpt" else theirs.tok_embeddings
    assert apart(embedding.weight.grad, model.embed_tokens.weight.grad) < 1e-4


@pytest.mark.parametrize(("package", "shape"), CASES, ids=str)
def test_steps_train_the_same(package: str, shape: dict[str, Any]) -> None:
    """As many steps as there are batches, and one more, each with the loss of minift's step."""
    made(package, small_model(**shape))
    ids = torch.randint(90, (side.BATCHES, 2, 17), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=9, dtype="float32", lr=1e-3, weight_decay=0.0, compile=False)
    ours, theirs = (peers.MAKERS[name](small_model(**shape), ids, config) for name in ("minift", package))
    losses = {"minift": [], package: []}  # type: dict[str, list[float]]
    for _ in range(side.BATCHES + 1):
        losses["minift"].append(ours())
        losses[package].append(theirs())
    assert len({round(loss, 3) for loss in losses["minift"]}) > 2
    assert side.losses_apart(losses) < 1e-4


@pytest.mark.parametrize("package", ["litgpt", "torchtune"])
def test_what_is_not_compared_or_not_installed_is_refused_by_name(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(others, "import_module", missing)
    with pytest.raises(InputError, match=f"No module named '{package}.*pip install {package}"):
        getattr(others, package)(small_model(**UNTIED), compiled=False)
    assert {side.partition(",")[0] for side in peers.SIDES} == set(peers.MAKERS)
    assert not [side for side in peers.UNASKED if side.startswith(package)]


def test_a_tied_head_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type("Package", (), {"llama2": None, "hf_to_tune": None})
    monkeypatch.setattr(others, "import_module", lambda name: stand_in)
    with pytest.raises(InputError, match="torchtune: a tied head"):
        others.torchtune(small_model(), compiled=False)
