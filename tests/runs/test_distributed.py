"""The promise of `--parallel`: however many processes share a run, they take the steps of one.

All is compared in float64. The examples have very unequal numbers of targets (1 to 30), so that a wrong average shows:
one test makes the usual faults on purpose, and sees them.
"""

import functools
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minift.checkpoint import load_model, model_without_memory, save_model, weights_of
from minift.config import TrainConfig
from minift.costs.communication import communication
from minift.costs.flops import count_parameters
from minift.costs.memory import training_memory
from minift.data.batches import PairBatches
from minift.distributed.sharding import copy_into, fill, gathered, local_shard, unwrapped
from minift.distributed.shards import _Unpickler
from minift.distributed.world import World
from minift.errors import InputError
from minift.formats.convert import convert
from minift.formats.shapes import model_without_weights
from minift.lora import LoRAConfig, add_lora, init_adapters
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import Batch, Example
from minift.runs.start import start_state
from minift.runs.steps import load_step, save_step, step_folders
from minift.train import Plan, TrainState, train_step, validation_loss
from tests.helpers import make_examples, small_model
from tests.runs.ranks import alone, run_ranks

STEPS = 20
CONFIG = TrainConfig(
    steps=STEPS, dtype="float32", device="cpu", lr=1e-2, clip=1.6, grad_accum=2, warmup=3, loss_chunk=7
)
LENGTHS = [1, 30, 2, 1, 17, 25, 3, 28, 1, 1, 9, 30, 5, 2, 14, 1, 22, 8, 1, 3, 11, 1, 1]
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))


def examples() -> list[Example]:
    return make_examples(LENGTHS)


def make_state(world: World, tied: bool = True, lora: bool = False, config: TrainConfig = CONFIG) -> TrainState:
    """Return the state of a float64 model; under FSDP it is built without memory, as in a run."""
    source = small_model(dtype=torch.float64, tie_word_embeddings=tied)
    model = source
    if world.parallel == "fsdp":
        model = model_without_weights(source.config).double()
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
    """Take steps; return the loss and the gradient norm of each."""
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
    return {name: gathered(tensor).clone() for name, tensor in state.model.state_dict().items()}, results


@functools.cache
def trained_alone(tied: bool, lora: bool) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    weights, results = alone(trained, tied, lora)
    return weights, results


def apart(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative difference of any two tensors, by norm."""
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
    """Or the comparison would show nothing: training changes every tensor, and clips some steps and not others."""
    state = make_state(World())
    first = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    weights, results = trained_alone(True, False)
    assert all(float((weights[name] - first[name]).norm() / first[name].norm()) > 1e-3 for name in first)
    norms = [norm for _, norm in results]
    assert min(norms) < CONFIG.clip < max(norms)


def mean_of_means(world: World) -> dict[str, Tensor]:
    """Make a fault: every rank divides by its own targets, and the gradients are averaged."""
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
    """Make a fault: every rank clips its own gradient, and then the gradients are added up."""
    state = make_state(world)
    state.objective = unwrapped(state.objective)  # so DDP does not synchronise
    norm_of = torch.nn.utils.get_total_norm

    def clip_first(gradients: list[Tensor]) -> Tensor:
        share = min(1.0, CONFIG.clip / float(norm_of(gradients)))
        for gradient in gradients:
            dist.all_reduce(gradient.mul_(share))
        return torch.zeros(())  # clipping is done

    torch.nn.utils.get_total_norm = clip_first  # type: ignore[assignment]
    take_steps(state, STEPS)
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize("fault", [mean_of_means, clipped_too_early])
def test_the_usual_faults_would_have_been_seen(fault: Callable[[World], dict[str, Tensor]]) -> None:
    expected, _ = trained_alone(True, False)
    weights, _ = run_ranks(2, "ddp", fault)
    assert apart(weights, expected) > 1e-3  # a thousand times the tolerance


def left_out(world: World) -> tuple[Tensor, Tensor]:
    """Return what dropout leaves of ones in an adapter of this rank, before and after it has gone on from a file."""
    model = small_model()
    add_lora(model, replace(LORA, dropout=0.5), torch.Generator().manual_seed(5))
    batches = PairBatches(examples(), 8, 2, seed=0, rank=world.rank, world=world.size)
    state = start_state(model, batches, CONFIG.replace(seed=3), world)
    with torch.no_grad():
        adapter: Any = model.layers[0].self_attn.q_proj
        adapter.lora_A.fill_(0)[0, :].copy_(torch.ones(24))
        adapter.lora_B.fill_(1.0)
        adapter.weight.fill_(0)
        ones = torch.eye(24).repeat(4, 1)  # one number of each row, so that each can be seen
        folder = save_step(Path(os.environ["MINIFT_TEST_OUT"]), state, None)
        first = adapter(ones).ne(0).any(-1)
        load_step(folder, state)
        return first, adapter(ones).ne(0).any(-1)


@pytest.mark.parametrize("parallel", ["ddp"])
def test_every_rank_has_random_numbers_of_its_own(
    parallel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all ranks would leave out the same places. A run that goes on gives each rank its own again."""
    monkeypatch.setenv("MINIFT_TEST_OUT", str(tmp_path))
    found = run_ranks(3, parallel, left_out)
    for rank, (first, again) in enumerate(found):
        assert 20 < int(first.sum()) < 76  # of 96, half
        assert torch.equal(first, again)
        for other, _ in found[:rank]:
            assert not torch.equal(first, other)
            assert 20 < int((first != other).sum()) < 76
    torch.manual_seed(3 + 2)  # the seed of the run, and the rank
    assert torch.equal(found[2][0], torch.nn.functional.dropout(torch.eye(24).repeat(4, 1), 0.5).ne(0).any(-1))


def gradients_sent(world: World) -> list[int]:
    """Return how many all-reduces of gradients each micro-batch of a window starts."""
    state = make_state(world)
    batches = iter(state.batches)
    counts, real = [0], dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counts[-1] += options.get("async_op", False)
        return real(tensor, *arguments, **options)

    dist.all_reduce = counted
    forward = type(state.objective.module).forward

    def begun(self: Any, batch: Batch) -> Any:
        counts.append(0)
        return forward(self, batch)

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
    return validation_loss(state, [next(batches) for _ in range(7)])  # 7: not a multiple of 2 or 4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_validation_loss_is_that_of_one(size: int, parallel: str) -> None:
    expected = alone(validated)
    for found in run_ranks(size, parallel, validated):
        assert found == pytest.approx(expected, rel=1e-9)


# What is sent, and what is kept ---------------------------------------------------------------------------------------

MICRO_BATCHES = 3


def collectives(world: World, shape: dict[str, Any], dtype: str) -> dict[str, tuple[int, int]]:
    """Return the calls and elements of each collective in a step, but those of single numbers, by the profiler."""
    config = CONFIG.replace(dtype=dtype)
    model = small_model(**shape)
    batches = PairBatches(examples(), 8, 2, seed=0, rank=world.rank, world=world.size)
    state = start_state(model, batches, config, world)
    micro_batches = iter(batches)
    for _ in range(2):  # DDP brings its buckets into their final order after the first step
        train_step(state, [next(micro_batches) for _ in range(MICRO_BATCHES)], 1e-3, config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        train_step(state, [next(micro_batches) for _ in range(MICRO_BATCHES)], 1e-3, config)
    found: dict[str, tuple[int, int]] = {}
    names = {"c10d::_allgather_base_": "all-gather", "c10d::_reduce_scatter_base_": "reduce-scatter"}
    scattered = []  # gloo makes a reduce-scatter of an all-reduce, which the profiler counts, too
    for event in profile.events():
        if event.name in names:
            kind = names[event.name]
            whole_one = event.input_shapes[0 if kind == "all-gather" else 1][0]
            scattered += [whole_one] if kind == "reduce-scatter" else []
        elif event.name == "gloo:all_reduce" and event.input_shapes[0] != [1]:
            kind, whole_one = "all-reduce", event.input_shapes[0][0]
        else:
            continue
        calls, elements = found.get(kind, (0, 0))
        found[kind] = (calls + 1, elements + whole_one)
    if scattered:
        calls, elements = found["all-reduce"]
        found["all-reduce"] = (calls - len(scattered), elements - sum(scattered))
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("parallel", "dtype"), [("ddp", "float32"), ("fsdp", "float32"), ("fsdp", "bfloat16")])
def test_what_is_sent_is_what_the_formula_says(parallel: str, dtype: str, size: int, tied: bool) -> None:
    large = {"hidden_size": 192, "intermediate_size": 320, "vocab_size": 1_009, "tie_word_embeddings": tied}
    found = run_ranks(size, parallel, collectives, large, dtype)[0]
    config = small_model(**large).config
    expected = communication(config, parallel, size, dtype, MICRO_BATCHES)
    assert {kind: calls for kind, (calls, _) in found.items()} == {kind: each.calls for kind, each in expected.items()}
    if parallel == "ddp":
        assert expected["all-reduce"].calls > 1  # more than one bucket
    gathered_in_halves = 2 * MICRO_BATCHES * config.num_hidden_layers if dtype == "bfloat16" else 0
    for kind, (_, elements) in found.items():
        if kind == "all-gather" and gathered_in_halves:
            wide = communication(config, parallel, size, "float32", MICRO_BATCHES)[kind]
            assert 4 * elements == wide.nbytes
            assert (
                wide.nbytes - expected[kind].nbytes
                == (wide.nbytes - MICRO_BATCHES * 4 * root_elements(config, size)) / 2
            )
        else:
            assert 4 * elements == expected[kind].nbytes


def root_elements(config: Any, size: int) -> int:
    """Return how many numbers are outside the layers, each tensor padded to a multiple of the ranks."""
    embedding = -(-config.vocab_size // size) * size * config.hidden_size
    return embedding * (1 if config.tie_word_embeddings else 2) + -(-config.hidden_size // size) * size


def kept(world: World) -> dict[str, int]:
    """Return the bytes of this rank's weights, gradients and moments between the backward pass and the step."""
    state = make_state(world)
    found: dict[str, int] = {}

    def look(*_: Any) -> None:
        parameters = list(state.model.parameters())
        found["gradients"] = sum(local_shard(p.grad).nbytes for p in parameters)

    state.optimizer.register_step_pre_hook(look)
    take_steps(state, 2)
    parameters = list(state.model.parameters())
    found["weights"] = sum(local_shard(p.detach()).nbytes for p in parameters)
    moments = [state.optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
    found["AdamW's two moments"] = sum(local_shard(moment).nbytes for moment in moments)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_a_rank_keeps_falls_as_one_over_their_number(size: int) -> None:
    config = small_model().config
    ledger = training_memory(config, "float32", 1, 1, ranks=size)
    for found in run_ranks(size, "fsdp", kept):
        for name, nbytes in found.items():
            assert nbytes / 2 == pytest.approx(ledger[name], rel=0.15)  # float64 here, float32 in the ledger


def loaded(world: World, folder: str) -> tuple[int, int]:
    """Return how far this process's own memory rose while a model was loaded: at the peak, and at the end."""
    model = model_without_memory(folder)
    state = start_state(model, PairBatches(examples(), 8, 2, 0), CONFIG, world)
    before = most = _own_memory()
    for name, tensor in weights_of(folder):
        fill_one(state.model, world, name, tensor, first=most == before)
        most = max(most, _own_memory())
    return most - before, _own_memory() - before


def fill_one(model: Llama, world: World, name: str, tensor: Tensor, first: bool) -> None:
    if first:
        fill(model, world, [])
    copy_into(dict(model.named_parameters())[name], tensor)


def _own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_rank_ever_holds_the_whole_model_while_loading(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1_376, "num_hidden_layers": 6, "vocab_size": 4_000}
    model = small_model(**shape)
    save_model(tmp_path / "model", model)
    nbytes = 4 * count_parameters(model.config).total  # 84 MB
    largest = 4 * 4_000 * 512
    for most, in_the_end in run_ranks(4, "fsdp", loaded, str(tmp_path / "model")):
        assert in_the_end < 1.15 * nbytes / 4  # or less: memory that was free before is used first
        assert most < nbytes / 4 + 2 * largest
        assert most < 0.5 * nbytes


def loaded_from(world: World, folder: str) -> dict[str, Tensor]:
    model = model_without_memory(folder)
    state = start_state(model, PairBatches(examples(), 8, 2, 0), CONFIG, world)
    fill(state.model, world, weights_of(folder))
    return {name: gathered(tensor).clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize("format", ["native", "hf", "meta", "llama2c"])
def test_every_format_can_be_loaded_in_parts(format: str, tmp_path: Path) -> None:
    if format == "hf":
        pytest.importorskip("safetensors")
    save_model(tmp_path / "source", small_model(tie_word_embeddings=False))
    place = tmp_path / ("model.bin" if format == "llama2c" else "model")
    convert(tmp_path / "source", place, format)
    expected = load_model(place).state_dict()
    for weights in run_ranks(3, "fsdp", loaded_from, str(place)):
        assert set(weights) == set(expected)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# Saved, and continued -------------------------------------------------------------------------------------------------


def continued(
    world: World, run: str, steps: int, lora: bool, parallel: str
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Continue from the newest step folder, if there is one, and save; also return each step's place in the data."""
    state = make_state(world, lora=lora)
    for folder in step_folders(Path(run))[:1]:
        load_step(folder, state)
    plan, micro_batches, places = Plan.make(CONFIG, 0), iter(state.batches), []
    for _ in range(steps):
        window = [next(micro_batches) for _ in range(CONFIG.grad_accum)]
        places.append([state.batches.epoch, state.batches.position])
        assert train_step(state, window, learning_rate(state.step, plan.steps, CONFIG), CONFIG).stepped
        state.step += 1
    save_step(Path(run), state, None)
    return {name: gathered(tensor).clone() for name, tensor in state.model.state_dict().items()}, places


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("ways", [("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")], ids="-".join)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, ways: tuple[str, str], lora: bool) -> None:
    """Four, then two, then one; also where the ranks share the weights in another way from then on."""
    run, (first, then) = str(tmp_path), ways
    expected, _ = trained_alone(True, lora)
    places = []
    for size, parallel, steps in [(4, first, 7), (2, then, 6)]:
        results = run_ranks(size, parallel, continued, run, steps, lora, parallel)
        places += results[0][1]
    weights, last = alone(continued, run, STEPS - 13, lora, "alone")
    assert apart(weights, expected) < 1e-6
    assert places + last == alone(continued, str(tmp_path / "whole"), STEPS, lora, "alone")[1]


def drawn(world: World, run: str) -> list[float]:
    """Save, if there is no step folder yet, and draw a random number; load the folder, and draw again. Return all."""
    state, found = make_state(world), []
    if not step_folders(Path(run)):
        torch.manual_seed(100 + world.rank)  # as dropout may have drawn differently on each rank
        save_step(Path(run), state, None)
        found.append(float(torch.rand(())))
    load_step(step_folders(Path(run))[0], state)
    return [*found, float(torch.rand(()))]


def test_each_rank_gets_its_own_random_numbers_back(tmp_path: Path) -> None:
    """A rank that was not there when the run was saved continues with its own seed."""
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(100 + rank))) for rank in range(2)]
    assert run_ranks(2, "ddp", drawn, str(tmp_path)) == [[value, value] for value in expected]
    third = float(torch.rand((), generator=torch.Generator().manual_seed(CONFIG.seed + 2)))
    assert run_ranks(3, "ddp", drawn, str(tmp_path)) == [[expected[0]], [expected[1]], [third]]


def test_a_sharded_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'hacked'}",)

    run_ranks(2, "fsdp", continued, str(tmp_path / "run"), 1, False, "fsdp")
    (folder,) = step_folders(tmp_path / "run")
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=r"asks for posix\.system"):
        load_step(folder, make_state(World()))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_in_a_sharded_checkpoint_is_read_whatever_python_wrote_it(module: str, kind: str) -> None:
    """Python 3.13 pickles its paths under the name of another module than older and newer versions."""
    written = f"c{module}\n{kind}\n(V/\nVruns\ntR.".encode()  # protocol 0: a class, its arguments, a call
    assert _Unpickler(io.BytesIO(written)).load() == Path("/runs")


# What goes wrong ------------------------------------------------------------------------------------------------------


def poisoned(world: World, what: str) -> tuple[bool, str | None]:
    """Take a step with a NaN in the last row of a matrix, or in its gradient: under FSDP the last rank has that row."""
    state = make_state(world)
    parameter = state.model.layers[1].mlp.up_proj.weight
    if what == "the weight":
        own = local_shard(parameter.detach())
        if world.rank == world.size - 1:
            own[-1, 0] = float("nan")
    elif world.rank == world.size - 1:
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    batches = iter(state.batches)
    result = train_step(state, [next(batches)], 0.1, CONFIG)
    return result.stepped, result.culprit


@pytest.mark.parametrize(
    ("parallel", "size", "what"),
    [
        ("alone", 1, "the weight"),
        ("ddp", 2, "the weight"),
        ("fsdp", 2, "the weight"),
        ("alone", 1, "the gradient of"),
        ("ddp", 2, "the gradient of"),  # (no hook is called on a sharded parameter)
    ],
)
def test_what_is_not_finite_is_named(parallel: str, size: int, what: str) -> None:
    results = [alone(poisoned, what)] if parallel == "alone" else run_ranks(size, parallel, poisoned, what)
    assert results == [(False, f"{what} layers.1.mlp.up_proj.weight")] * size
