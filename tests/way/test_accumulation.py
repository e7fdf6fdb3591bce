"""A window of micro-batches is one batch: its gradient is that of all its targets together.

Micro-batches hold very unequal numbers of targets (from 1 to 30), and everything is in float64, so "the same" means
twelve digits. The expected gradient is made without packing, padding or `next_token_loss`: each example alone,
PyTorch's cross-entropy summed over all of them, divided once. Held here for `train_step`, and for whole runs of `train`
whose micro-batches do not divide into windows: the last, partial window is an ordinary step with its own count, and
every example is used exactly once an epoch. The same tests show that a mean of the micro-batches' means is another
gradient.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minift import reference
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import IGNORE, Batch, Example, collate
from minift.runs.loop import run_steps
from minift.tokenizer.base import Tokenizer
from minift.train import Objective, Plan, TrainState, train_step
from tests.helpers import make_examples, small_model

CONFIG = TrainConfig(steps=1, dtype="float32", device="cpu", clip=0.0, loss_chunk=7)
WINDOWS = {
    "one of one": [[4]],
    "a single target beside thirty": [[1], [30]],
    "three sizes": [[2, 1], [30, 25, 28], [1]],
    "four, packed": [[1, 2, 3], [14, 15], [1, 1], [22, 3, 9, 30]],
}


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, model: Llama):
        super().__init__(model.parameters(), {"lr": 0.0})
        self.gradients: list[list[Tensor]] = []
        self.rates: list[float] = []

    def step(self, closure: object = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.gradients.append([parameter.grad.clone() for parameter in parameters])
        self.rates += [group["lr"] for group in self.param_groups]


class RecordedBatches(PairBatches):
    """Micro-batches of pairs that remember what they have given out."""

    def __iter__(self) -> Iterator[Batch]:
        self.given: list[Batch] = []
        for batch in super().__iter__():
            self.given.append(batch)
            yield batch


def recorded_state(model: Llama, batches: PairBatches | None = None) -> tuple[TrainState, Recorder]:
    recorder = Recorder(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, recorder, scaler, batches, Objective(model, CONFIG.loss_chunk)), recorder


def summed_loss(model: Llama, examples: Sequence[Example]) -> Tensor:
    """The slow way: each example alone, nothing packed and nothing padded."""
    losses = []
    for example in examples:
        logits = model(torch.tensor([example.prompt + example.answer[:-1]]))[0]
        answered = logits[len(example.prompt) - 1 :]
        losses.append(F.cross_entropy(answered, torch.tensor(example.answer), reduction="sum"))
    return torch.stack(losses).sum()


def gradient_of_mean(model: Llama, examples: Sequence[Example]) -> list[Tensor]:
    loss = summed_loss(model, examples) / sum(len(example.answer) for example in examples)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def mean_of_gradients(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(of_one_parameter).mean(0) for of_one_parameter in zip(*gradients, strict=True)]


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of any parameter's gradient, by norm."""
    pairs = list(zip(ours, expected, strict=True))
    assert all(float(right.norm()) > 0 for _, right in pairs)
    return max(float((our - right).norm() / right.norm()) for our, right in pairs)


def make_window(lengths: Sequence[Sequence[int]], pack: bool) -> tuple[list[list[Example]], list[Batch]]:
    examples = iter(make_examples([length for micro in lengths for length in micro]))
    groups = [[next(examples) for _ in micro] for micro in lengths]
    return groups, [collate(group, pad_id=2, length=40, pack=pack) for group in groups]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("lengths", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_window_is_one_batch(lengths: list[list[int]], pack: bool, tied: bool) -> None:
    model = small_model(dtype=torch.float64, tie_word_embeddings=tied)
    groups, window = make_window(lengths, pack)
    everything = [example for group in groups for example in group]
    expected = gradient_of_mean(model, everything)

    state, recorder = recorded_state(model)
    result = train_step(state, window, 0.1, CONFIG)
    assert result.stepped
    assert len(recorder.gradients) == 1  # one step, however many micro-batches
    assert difference(recorder.gradients[0], expected) < 1e-12
    assert all(parameter.grad is None for parameter in model.parameters())  # the next window starts from nothing

    targets = sum(map(sum, lengths))
    assert result.loss == pytest.approx(summed_loss(model, everything).item() / targets, rel=1e-6)
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected))
    assert result.grad_norm == pytest.approx(norm, rel=1e-10)

    if len(lengths) > 1:  # what the loop must not do, and that the comparison above would notice
        wrong = mean_of_gradients([gradient_of_mean(model, group) for group in groups])
        assert difference(wrong, expected) > 1e-2


def test_windows_do_not_depend_on_how_they_are_cut() -> None:
    model = small_model(dtype=torch.float64)
    examples = make_examples([1, 30, 2, 9, 1, 17])
    gradients = []
    for cuts in ([6], [1, 5], [3, 3], [1, 1, 1, 1, 1, 1]):
        rest = iter(examples)
        window = [collate([next(rest) for _ in range(n)], pad_id=2) for n in cuts]
        state, recorder = recorded_state(model)
        train_step(state, window, 0.1, CONFIG)
        gradients += recorder.gradients
    for gradient in gradients[1:]:
        assert difference(gradient, gradients[0]) < 1e-12


@pytest.mark.parametrize("share", [0.01, 0.7, 0.99, 1.01, 1.5, 100.0])
def test_the_whole_window_is_clipped_not_its_parts(share: float) -> None:
    """To a share of its own norm; at the bound, too, where just less is left as it is, and just more is not."""
    model = small_model(dtype=torch.float64)
    groups, window = make_window(WINDOWS["three sizes"], pack=True)
    whole = gradient_of_mean(model, [example for group in groups for example in group])
    _, norm = reference.clip(whole, 1.0)
    clip = share * norm
    expected, _ = reference.clip(whole, clip)
    state, recorder = recorded_state(model)
    result = train_step(state, window, 0.1, CONFIG.replace(clip=clip))
    assert result.grad_norm == pytest.approx(norm, rel=1e-10)  # what is reported is the norm before clipping
    assert difference(recorder.gradients[0], expected) < 1e-5  # PyTorch adds 1e-6 to the norm


@pytest.mark.parametrize(
    ("n_examples", "batch_size", "grad_accum", "epochs", "windows"),
    [
        (11, 2, 4, 1, [4, 2]),  # 6 micro-batches, the last of one example, the last window half full
        (11, 2, 4, 2, [4, 4, 4]),  # a window reaches over the end of the epoch
        (11, 2, 5, 2, [5, 5, 2]),
        (7, 3, 8, 1, [3]),  # not even one full window
        (6, 2, 1, 2, [1] * 6),
    ],
)
def test_every_example_is_used_once_an_epoch(
    n_examples: int,
    batch_size: int,
    grad_accum: int,
    epochs: int,
    windows: list[int],
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    model = small_model(dtype=torch.float64)
    examples = make_examples([1, 30, 2, 9, 1, 17, 4, 1, 26, 3, 8][:n_examples])
    batches = RecordedBatches(examples, batch_size, pad_id=2, seed=0)
    config = TrainConfig(epochs=epochs, grad_accum=grad_accum, dtype="float32", device="cpu", clip=0.0, warmup=1)
    plan = Plan.make(config, len(batches))
    state, recorder = recorded_state(model, batches)
    assert run_steps(state, plan, config, tokenizer, [], tmp_path)

    used = Counter(
        int(first)
        for batch in batches.given
        for first in batch.tokens[(batch.positions == 0) & (batch.document_ids >= 0)]
    )
    assert used == {3 + i: epochs for i in range(n_examples)}

    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(windows) + 1))
    assert state.step == plan.steps == len(recorder.gradients) == len(windows)
    assert recorder.rates == [learning_rate(step, len(windows), config) for step in range(len(windows))]
    # A partial window is an ordinary step: the mean over its own targets, neither smaller nor padded out.
    given = iter(batches.given)
    for size, gradient, step in zip(windows, recorder.gradients, steps, strict=True):
        window = [example for _ in range(size) for example in examples_of(next(given), examples)]
        assert difference(gradient, gradient_of_mean(model, window)) < 1e-12
        assert step["tokens"] == sum(len(example) for example in window)
        mean = summed_loss(model, window).item() / sum(len(example.answer) for example in window)
        assert step["loss"] == pytest.approx(mean, rel=1e-6)
    assert next(given, None) is None  # nothing was drawn and thrown away


def examples_of(batch: Batch, examples: Sequence[Example]) -> list[Example]:
    """The examples that a batch holds, by their unique first ids; its targets must be theirs and no others."""
    begins = batch.tokens[(batch.positions == 0) & (batch.document_ids >= 0)]
    found = [examples[int(first) - 3] for first in begins]
    targets = batch.targets[batch.targets != IGNORE].tolist()
    assert Counter(targets) == Counter(id for example in found for id in example.answer)
    assert len(targets) == batch.n_targets
    return found


@pytest.mark.parametrize("grad_accum", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2, 2.5])
@pytest.mark.parametrize("per_epoch", [1, 5, 6, 31])
def test_a_plan_uses_all_micro_batches(per_epoch: int, epochs: float, grad_accum: int) -> None:
    plan = Plan.make(TrainConfig(epochs=epochs, grad_accum=grad_accum), per_epoch)
    windows = [plan.window(step) for step in range(plan.steps)]
    assert sum(windows) == plan.micro_batches
    assert abs(plan.micro_batches - epochs * per_epoch) <= (0.5 if epochs * per_epoch >= 0.5 else 1)
    assert all(window == grad_accum for window in windows[:-1])
    assert 1 <= windows[-1] <= grad_accum


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_a_plan_of_steps_has_full_windows_only(grad_accum: int) -> None:
    plan = Plan.make(TrainConfig(steps=5, grad_accum=grad_accum), 4)
    assert [plan.window(step) for step in range(plan.steps)] == [grad_accum] * 5
