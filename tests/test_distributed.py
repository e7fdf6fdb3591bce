"""The promise of `--parallel`: however many processes share a run, they take the steps of one.

Everything that is compared is in float64. The examples hold very unequal numbers of targets (1 to 30), so that what is
averaged wrongly somewhere shows: a test does the usual faults on purpose, and sees them.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minift.config import TrainConfig
from minift.distributed import World, fill, whole
from minift.lora import LoRAConfig, add_lora, init_adapters
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import Batch, Example, PairBatches
from minift.train import Plan, TrainState, start_state, train_step, validation_loss
from tests.conftest import small_model
from tests.ranks import alone, run_ranks
from tests.test_accumulation import make_examples

STEPS = 20
CONFIG = TrainConfig(
    steps=STEPS, dtype="float32", device="cpu", lr=1e-2, clip=1.6, grad_accum=2, warmup=3, loss_chunk=7
)
LENGTHS = [1, 30, 2, 1, 17, 25, 3, 28, 1, 1, 9, 30, 5, 2, 14, 1, 22, 8, 1, 3, 11, 1, 1]
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))


def examples() -> list[Example]:
    return make_examples(LENGTHS)


def make_state(world: World, tied: bool = True, lora: bool = False, config: TrainConfig = CONFIG) -> TrainState:
    """A float64 model in training; under FSDP it is built without memory, as a run's is."""
    source = small_model(dtype=torch.float64, tie_word_embeddings=tied)
    model = source
    if world.parallel == "fsdp":
        with torch.device("meta"):
            model = Llama(source.config).double()
    if lora:
        add_lora(model, LORA, torch.Generator().manual_seed(5))
    batches = PairBatches(examples(), 8, 2, seed=0, rank=world.rank, world=world.size)
    state = start_state(model, batches, config, world)
    if world.parallel == "fsdp":
        fill(model, world, source.state_dict().items())
        if lora:
            init_adapters(model, torch.Generator().manual_seed(5))
    return state


def take_steps(state: TrainState, steps: int, config: TrainConfig = CONFIG) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    plan, found = Plan.make(config, 0), []
    micro_batches = iter(state.batches)
    for step in range(steps):
        window = [next(micro_batches) for _ in range(config.grad_accum)]
        result = train_step(state, window, learning_rate(step, plan.steps, config), config)
        assert result.stepped
        found.append((result.loss, result.grad_norm))
        state.step += 1
    return found


def trained(world: World, tied: bool, lora: bool) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    state = make_state(world, tied, lora)
    results = take_steps(state, STEPS)
    return {name: whole(tensor).clone() for name, tensor in state.model.state_dict().items()}, results


@functools.cache
def trained_alone(tied: bool, lora: bool) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    weights, results = alone(trained, tied, lora)
    return weights, results


def apart(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any tensor, by norm."""
    assert set(ours) == set(expected)
    return max(float((ours[name] - expected[name]).norm() / expected[name].norm()) for name in ours)


@pytest.mark.parametrize(
    ("tied", "lora"), [(True, False), (False, False), (True, True)], ids=["tied", "untied", "LoRA"]
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_processes_takes_the_steps_of_one(size: int, parallel: str, tied: bool, lora: bool) -> None:
    expected, results = trained_alone(tied, lora)
    for weights, found in run_ranks(size, parallel, trained, tied, lora):
        assert apart(weights, expected) < 1e-6
        torch.testing.assert_close(torch.tensor(found), torch.tensor(results), rtol=1e-6, atol=0)


def test_the_comparison_begins_and_ends_with_different_weights() -> None:
    """Or it would show nothing: training moves every tensor, and clips some steps and not others."""
    state = make_state(World())
    first = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    weights, results = trained_alone(True, False)
    assert all(float((weights[name] - first[name]).norm() / first[name].norm()) > 1e-3 for name in first)
    norms = [norm for _, norm in results]
    assert min(norms) < CONFIG.clip < max(norms)


def mean_of_means(world: World) -> dict[str, Tensor]:
    """The fault: every rank divides by its own targets, and the gradients are averaged."""
    state = make_state(world)
    plain, total = state.objective, World.total

    def own_targets(self: World, *values: float) -> list[float]:
        return list(values) if isinstance(values[0], int) else total(self, *values)

    World.total = own_targets  # type: ignore[method-assign]
    for parameter in state.model.parameters():
        parameter.register_hook(lambda gradient: gradient / world.size)
    assert state.objective is plain
    take_steps(state, STEPS)
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def clipped_too_early(world: World) -> dict[str, Tensor]:
    """The fault: every rank clips its own gradient, and then they are added up."""
    state = make_state(world)
    state.objective = type(make_state(World()).objective)(state.model)  # no synchronisation by DDP
    clip = torch.nn.utils.clip_grad_norm_

    def clip_first(parameters: Any, limit: float) -> Tensor:
        kept = list(parameters)
        norm = clip(kept, limit)
        for parameter in kept:
            dist.all_reduce(parameter.grad)
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_first  # type: ignore[assignment]
    take_steps(state, STEPS)
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize("fault", [mean_of_means, clipped_too_early])
def test_the_usual_faults_would_have_been_seen(fault: Callable[[World], dict[str, Tensor]]) -> None:
    expected, _ = trained_alone(True, False)
    weights, _ = run_ranks(2, "ddp", fault)
    assert apart(weights, expected) > 1e-3  # a thousand times what is borne


def gradients_sent(world: World) -> list[int]:
    """How many all-reduces of gradients each micro-batch of a window starts."""
    state = make_state(world)
    batches = iter(state.batches)
    counts, real = [0], dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counts[-1] += options.get("async_op", False)
        return real(tensor, *arguments, **options)

    dist.all_reduce = counted
    forward = type(state.objective.module).forward

    def begun(self: Any, batch: Batch, chunk: int) -> Any:
        counts.append(0)
        return forward(self, batch, chunk)

    type(state.objective.module).forward = begun
    train_step(state, [next(batches) for _ in range(4)], 0.1, CONFIG)
    return counts[1:]


def test_gradients_are_sent_once_a_step_behind_the_last_micro_batch() -> None:
    for counts in run_ranks(2, "ddp", gradients_sent):
        assert counts[:-1] == [0, 0, 0]
        assert counts[-1] >= 1


def validated(world: World) -> float:
    state = make_state(world)
    take_steps(state, 2)
    batches = iter(PairBatches(examples(), 3, 2, seed=1))
    return validation_loss(state, [next(batches) for _ in range(7)], CONFIG)  # 7: not a multiple of 2 or 4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_validation_loss_is_that_of_one(size: int, parallel: str) -> None:
    expected = alone(validated)
    for found in run_ranks(size, parallel, validated):
        assert found == pytest.approx(expected, rel=1e-9)
