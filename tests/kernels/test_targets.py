"""The promise of `kernels/targets.py`: the loss and gradients of `train.Objective`, the end computed for targets alone.

Which positions the last layer's feed-forward network, the last norm and the loss are computed for is counted, too.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from minift.errors import InputError
from minift.kernels import targets, with_kernels
from minift.kernels.targets import FEW, TargetsLayer, TargetsObjective
from minift.model import Llama
from minift.pack import IGNORE, Batch, Example, collate
from minift.train import Objective
from tests.helpers import make_examples, random_model
from tests.twins import apart, difference


def a_batch(answer_lengths: Sequence[int] = (5, 2, 9, 1, 4, 7), length: int = 24) -> Batch:
    """Rows with prompts, several documents each, and padding."""
    batch = collate(make_examples(answer_lengths), 2, length)
    assert batch.isolated
    assert (batch.document_ids < 0).any()
    return batch


def loss_and_gradients(objective: nn.Module, batch: Batch, autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll_sum = objective(batch)
    return [nll_sum, *torch.autograd.grad(nll_sum, list(objective.parameters()))]


def plain_and_targets(model: Llama, chunk: int = 5) -> tuple[Objective, Objective]:
    plain = Objective(model, chunk)
    other = with_kernels(plain, ["targets"])
    assert type(other) is TargetsObjective
    assert [type(layer) for layer in other.model.layers] == [TargetsLayer] * 2
    return plain, other


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_and_gradients_are_those_of_the_objective(tied: bool, recompute: bool) -> None:
    model = random_model(torch.float64, tie_word_embeddings=tied)
    model.checkpoint_activations = recompute
    plain, few = plain_and_targets(model)
    batch = a_batch()
    for one, other in zip(loss_and_gradients(few, batch), loss_and_gradients(plain, batch), strict=True):
        assert difference(one, other) < 1e-12


def test_under_autocast_it_is_no_further_from_the_truth() -> None:
    plain, few = plain_and_targets(random_model())
    batch = a_batch()
    truth = loss_and_gradients(plain, batch)
    theirs, ours = (loss_and_gradients(one, batch, autocast=True) for one in (plain, few))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
    far = [sum(apart(one, exact) for one, exact in zip(ways, truth, strict=True)) for ways in (ours, theirs)]
    assert 0 < far[0] < 1.5 * far[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_layer_is_computed_again_where_activations_are_not_kept(recompute: bool) -> None:
    model = random_model()
    model.checkpoint_activations = recompute
    _, few = plain_and_targets(model)
    calls: list[int] = []
    for number, layer in enumerate(few.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    loss_and_gradients(few, a_batch())
    assert calls == ([0, 1, 1, 0] if recompute else [0, 1])


def test_states_are_those_of_positions_with_a_target() -> None:
    model = random_model(torch.float64)
    _, few = plain_and_targets(model)
    assert isinstance(few, TargetsObjective)
    batch = a_batch()
    learned = batch.targets != IGNORE
    hidden, expected = few.states(batch)
    assert torch.equal(expected, batch.targets[learned][None])
    right = model.hidden(batch.tokens, batch.positions, batch.documents)[learned][None]
    assert float((hidden - right).detach().abs().max()) < 1e-12


def seen_by_the_end(objective: Objective, batch: Batch) -> list[tuple[int, ...]]:
    """The shapes of what the layers' feed-forward networks, the last norm and the loss read."""
    shapes: list[tuple[int, ...]] = []
    parts: list[nn.Module] = [getattr(layer, "mlp") for layer in objective.model.layers]  # noqa: B009
    handles = [
        part.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        for part in (*parts, objective.model.norm, objective.loss)
    ]
    objective(batch)
    for handle in handles:
        handle.remove()
    return shapes


def test_what_is_computed_for_targets_alone() -> None:
    """28 of 48 positions, filled up to 64 for the shapes; the loss reads 28. The first layer computes them all."""
    plain, few = plain_and_targets(random_model())
    batch = a_batch()
    assert (batch.n_targets, tuple(batch.tokens.shape)) == (28, (2, 24))
    assert seen_by_the_end(few, batch) == [(2, 24, 24), (64, 24), (64, 24), (1, 28, 24)]
    assert seen_by_the_end(plain, batch) == [(2, 24, 24)] * 4


@pytest.mark.parametrize(("prompt", "computed"), [(2, (64, 24)), (1, (2, 20, 24))], ids=["18 of 20", "19 of 20"])
def test_where_most_positions_have_a_target_all_are_computed(prompt: int, computed: tuple[int, ...]) -> None:
    """From more than 9 of 10 on."""
    examples = [Example(list(range(3, 3 + prompt + 1)), list(range(40, 60 - prompt))) for _ in range(2)]
    batch = collate(examples, 2, 20, pack=False)
    assert batch.n_targets == 40 - 2 * prompt
    assert FEW == 0.9
    plain, few = plain_and_targets(random_model(torch.float64))
    assert seen_by_the_end(few, batch)[1] == computed
    for one, other in zip(loss_and_gradients(few, batch), loss_and_gradients(plain, batch), strict=True):
        assert difference(one, other) < 1e-12


def test_a_batch_without_targets_has_no_loss_and_moves_nothing() -> None:
    """As a rank has one at the end of a validation."""
    batch = a_batch()
    none = Batch(**{**vars(batch), "targets": torch.full_like(batch.targets, IGNORE), "n_targets": 0})
    for objective in plain_and_targets(random_model(torch.float64)):
        value, *gradients = loss_and_gradients(objective, none)
        assert value.item() == 0
        assert not any(gradient.any() for gradient in gradients)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    batch = a_batch()
    batch.tokens[0, 3] = 97
    for objective in plain_and_targets(random_model()):
        with pytest.raises(InputError, match="token id 97 is outside the model's vocabulary of 97"):
            objective(batch)


def test_positions_fill_up_to_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    _, few = plain_and_targets(random_model())
    monkeypatch.setattr(targets, "ALIGNED", 7)  # 28 is a multiple: nothing is added
    assert seen_by_the_end(few, a_batch())[1] == (28, 24)
    monkeypatch.setattr(targets, "ALIGNED", 9)
    assert seen_by_the_end(few, a_batch())[1] == (36, 24)
