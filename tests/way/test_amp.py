"""Faster arithmetic changes the speed of training, not what is learned.

Held here:
* bfloat16 autocast trains on the CPU to float32's loss within 2 % over 100 steps, and the weights stay float32;
* float16 is refused on a CPU, with the reason;
* the scaler's order is unscale → clip → step → update: what is reported and applied does not depend on the scale, and a
  step that overflows moves no weight, no moment and no schedule, and halves the scale. `GradScaler` works on a CPU as
  well, so the order is tested there in float32 arithmetic, and again in real float16 where there is a GPU;
* a loss that stays not finite ends the run with an error that says so, its weights untouched;
* recomputing activations gives the same gradients, and so does `torch.compile`.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import minift.train
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.errors import InputError, RunError
from minift.model import Llama
from minift.optim import learning_rate
from minift.pack import Batch, Example
from minift.runs.loop import run_steps
from minift.runs.machine import COMPILING_PAYS, check_compiler, choose_compile, choose_device, choose_dtype
from minift.runs.start import start_state
from minift.tokenizer.base import Tokenizer
from minift.train import Plan, StepResult, TrainState, train_step
from tests.helpers import small_model

FLOAT32 = TrainConfig(steps=4, dtype="float32", device="cpu", lr=1e-3, warmup=2)


def pairs(seed: int = 0, n: int = 12, batch_size: int = 4) -> PairBatches:
    """Micro-batches of random pairs of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    examples = [Example([1, *ids(2 + i % 5)], [*ids(1 + i * 3 % 7), 2]) for i in range(n)]
    return PairBatches(examples, batch_size, pad_id=2, seed=seed)


def weights(model: Llama) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor.nan_to_num(12.5), other[name].nan_to_num(12.5)) for name, tensor in one.items())


class Recorder(torch.optim.SGD):
    """Keeps the gradients with which it is asked to step, then steps by them: weights move by minus `lr` of them."""

    def __init__(self, model: Llama):
        super().__init__(model.parameters(), lr=1.0)
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.gradients.append([p.grad.detach().clone() for group in self.param_groups for p in group["params"]])
        super().step()


def recorded_step(
    config: TrainConfig, scaler: torch.amp.GradScaler | None = None, **changes: object
) -> tuple[StepResult, list[Tensor]]:
    """One `train_step` of a fresh model: its report, and the gradients that reached the optimizer."""
    model = small_model(**changes)
    state = start_state(model, pairs(), config)
    state.optimizer = recorder = Recorder(model)
    state.scaler = scaler or state.scaler
    batches = iter(state.batches)
    result = train_step(state, [next(batches), next(batches)], 1.0, config)
    (gradients,) = recorder.gradients
    return result, gradients


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for our, right in zip(ours, expected, strict=True):
        assert float(right.norm()) > 0
        assert float((our - right).norm() / right.norm()) <= tolerance


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def noisy_pattern(steps: int, seed: int = 0) -> list[Batch]:
    """Rows in which each of 32 ids has one usual successor, taken 4 times in 5: learnable, to a loss well above 0."""
    generator = torch.Generator().manual_seed(seed)
    successor = torch.randperm(32, generator=generator)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, 32, (16, 1), generator=generator)
        for _ in range(32):
            usual = torch.rand(16, generator=generator) < 0.8
            other = torch.randint(0, 32, (16,), generator=generator)
            ids = torch.cat((ids, torch.where(usual, successor[ids[:, -1]], other)[:, None]), dim=1)
        positions = torch.arange(32).expand(16, 32)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], positions, torch.zeros_like(positions), False, 16 * 32))
    return batches


def train_on_pattern(dtype: str, device: str = "cpu", steps: int = 100) -> tuple[list[float], TrainState]:
    config = TrainConfig(steps=steps, dtype=dtype, device=device, lr=1e-2, warmup=10)
    model = small_model(std=0.02).to(device)
    state = start_state(model, pairs(), config)
    losses = []
    for step, batch in enumerate(noisy_pattern(steps)):
        on_device = batch.to(torch.device(device))
        losses.append(train_step(state, [on_device], learning_rate(step, steps, config), config).loss)
    return losses, state


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# With probability 0.8 + 0.2 / 32 the usual id, else any of 31: this many nats cannot be learned away.
FLOOR = -0.80625 * math.log(0.80625) - 31 * 0.00625 * math.log(0.00625)


def test_bfloat16_trains_to_the_loss_of_float32() -> None:
    exact, _ = train_on_pattern("float32")
    rounded, state = train_on_pattern("bfloat16")
    assert exact[0] > 4.0
    assert FLOOR < mean(exact[-10:]) < 2.0  # it was learned, and there is a loss left to compare
    assert mean(rounded[-10:]) == pytest.approx(mean(exact[-10:]), rel=0.02)
    assert rounded != exact  # bfloat16 was really used …
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())  # … over float32 weights
    assert not state.scaler.is_enabled()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_multiplies_in_the_runs_dtype(dtype: str, expected: torch.dtype) -> None:
    model = small_model()
    seen = []
    for layer in model.layers:
        for product in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            product.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = next(iter(pairs()))
    with start_state(model, pairs(), FLOAT32.replace(dtype=dtype), plain=True).autocast():
        hidden = model.hidden(batch.tokens, batch.positions, batch.document_ids)
    assert seen == [expected] * 6
    assert hidden.dtype == torch.float32  # the stream, and with it the norms and the loss, stays wide


# --- float16 and its scaler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_float16_on_a_cpu_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"float16.*CPU.*bfloat16"):
        choose_device(TrainConfig(dtype="float16", device=device))
    for dtype in ("bfloat16", "float32"):
        assert choose_device(TrainConfig(dtype=dtype, device=device)).type == "cpu"


def test_a_gpu_that_is_not_there_is_refused_and_one_that_is_may_use_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU"):
        choose_device(TrainConfig(device="cuda", dtype="float32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(TrainConfig(device="auto", dtype="float16")).type == "cuda"
    assert choose_device(TrainConfig(device="cpu", dtype="float32")).type == "cpu"
    with pytest.raises(InputError, match="float16"):
        choose_device(TrainConfig(device="cpu", dtype="float16"))


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e6])
def test_the_scale_changes_neither_the_report_nor_the_step(clip: float) -> None:
    """Clipping before unscaling, or not unscaling at all, would show in the norm and in the gradients."""
    config = FLOAT32.replace(clip=clip)
    plain, expected = recorded_step(config)
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in expected))
    assert norm == pytest.approx(min(plain.grad_norm, clip or math.inf), rel=1e-4)
    assert 0.1 < plain.grad_norm < 1e6
    for scale in (1.0, 2.0**10, 2.0**30):
        result, gradients = recorded_step(config, torch.amp.GradScaler("cpu", init_scale=scale))
        assert result.stepped
        assert result.loss == plain.loss
        assert result.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
        assert_close(gradients, expected, 1e-6)


def overflowing_state(device: str = "cpu", scale: float = 2.0**127, **changes: object) -> TrainState:
    """A run whose scaler starts far too high: on a CPU at the end of float32, whose weights are then large too."""
    model = small_model(**changes).to(device)
    dtype = "float16" if device == "cuda" else "float32"
    state = start_state(model, pairs(), FLOAT32.replace(dtype=dtype, device=device))
    state.scaler = torch.amp.GradScaler(device, init_scale=scale)
    return state


def check_overflow(state: TrainState, config: TrainConfig) -> None:
    """One step that overflows: reported as not taken, and it has moved nothing but the scale."""
    before, scale = weights(state.model), state.scaler.get_scale()
    device = state.model.embed_tokens.weight.device
    result = train_step(state, [next(iter(state.batches)).to(device)], 0.1, config)
    assert not result.stepped
    assert not math.isfinite(result.grad_norm)
    assert math.isfinite(result.loss)  # the loss itself is fine: only its scaled gradient was not
    assert same_bits(before, weights(state.model))
    assert state.scaler.get_scale() == scale / 2
    for moments in state.optimizer.state.values():
        assert int(moments["step"]) == 0
        assert not moments["exp_avg"].any()
        assert not moments["exp_avg_sq"].any()
    assert all(parameter.grad is None for parameter in state.model.parameters())


def check_recovery(
    state: TrainState, config: TrainConfig, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run that begins with overflows: the schedule waits until the scale fits, then has no gap."""
    results: list[StepResult] = []
    rates: list[float] = []

    def recording(state: TrainState, window: Sequence[Batch], lr: float, config: TrainConfig) -> StepResult:
        results.append(train_step(state, window, lr, config))
        rates.append(lr)
        return results[-1]

    monkeypatch.setattr(minift.train, "train_step", recording)
    first_scale, before = state.scaler.get_scale(), weights(state.model)
    plan = Plan.make(config, len(state.batches))
    assert run_steps(state, plan, config, tokenizer, [], out)

    taken = [result.stepped for result in results]
    assert not taken[0]
    assert taken.count(True) == state.step == plan.steps
    # A skipped step is tried again, on the next window, at the same place in the schedule; wherever it occurs.
    schedule = [learning_rate(step, plan.steps, config) for step in range(plan.steps)]
    assert rates == [schedule[taken[:i].count(True)] for i in range(len(taken))]
    assert [math.isfinite(result.grad_norm) for result in results] == taken
    scales = [first_scale / 2 ** taken[:i].count(False) for i, stepped in enumerate(taken) if stepped]
    assert state.scaler.get_scale() == scales[-1]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, plan.steps + 1))
    assert [line["lr"] for line in lines] == schedule
    assert [line["loss_scale"] for line in lines] == scales
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert all(int(moments["step"]) == plan.steps for moments in state.optimizer.state.values())
    after = weights(state.model)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not any(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_step_that_overflows_moves_nothing() -> None:
    check_overflow(overflowing_state(std=1.0), FLOAT32)


def test_the_schedule_waits_for_a_scale_that_fits(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recovery(overflowing_state(std=1.0), FLOAT32, tmp_path, tokenizer, monkeypatch)


@pytest.mark.cuda
def test_float16_on_a_gpu_skips_an_overflow_and_recovers(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FLOAT32.replace(dtype="float16", device="cuda")
    check_overflow(overflowing_state("cuda", scale=2.0**40), config)
    check_recovery(overflowing_state("cuda", scale=2.0**40), config, tmp_path, tokenizer, monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_gpu_trains_to_the_loss_of_float32(dtype: str) -> None:
    exact, _ = train_on_pattern("float32", "cuda")
    rounded, state = train_on_pattern(dtype, "cuda")
    assert FLOOR < mean(exact[-10:]) < 2.0
    assert mean(rounded[-10:]) == pytest.approx(mean(exact[-10:]), rel=0.02)
    assert state.scaler.is_enabled() == (dtype == "float16")
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(
    poison: float, scaled: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """At once in float32; with a scaler when halving the scale to below 1 has not helped."""
    model = small_model()
    with torch.no_grad():
        model.layers[0].mlp.gate_proj.weight[0, 0] = poison
    state = start_state(model, pairs(), FLOAT32)
    if scaled:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    before = weights(model)
    with pytest.raises(RunError, match=r"step 1 is not finite .*--lr"):
        run_steps(state, Plan.make(FLOAT32, 3), FLOAT32, tokenizer, [], tmp_path)
    assert state.step == 0
    assert same_bits(before, weights(model))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_that_blows_up_midway_ends_at_that_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model()
    config = FLOAT32.replace(steps=6)
    state = start_state(model, pairs(), config)
    step = state.optimizer.step

    def poisoned(*arguments: object, **options: object) -> None:
        step(*arguments, **options)
        if state.step == 2:  # the third step's result
            with torch.no_grad():
                model.norm.weight[0] = math.nan

    state.optimizer.step = poisoned
    with pytest.raises(RunError, match="step 4 is not finite"):
        run_steps(state, Plan.make(config, 3), config, tokenizer, [], tmp_path)
    assert state.step == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# --- recomputing and compiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradients(dtype: str) -> None:
    config = FLOAT32.replace(dtype=dtype)
    plain, expected = recorded_step(config)
    result, gradients = recorded_step(config.replace(checkpoint_activations=True))
    assert result.loss == plain.loss
    assert_close(gradients, expected, 1e-6)


@pytest.mark.parametrize(("recompute", "runs"), [(False, 1), (True, 2)])
def test_activations_are_recomputed_only_on_request_and_only_for_a_gradient(recompute: bool, runs: int) -> None:
    model = small_model()
    config = FLOAT32.replace(checkpoint_activations=recompute)
    state = start_state(model, pairs(), config)
    calls = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    batch = next(iter(state.batches))
    train_step(state, [batch], 0.1, config)
    assert [calls.count(layer.mlp) for layer in model.layers] == [runs, runs]
    calls.clear()
    minift.train.validation_loss(state, [batch])
    assert len(calls) == len(model.layers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_compiled_model_gives_the_same_gradients() -> None:
    plain, expected = recorded_step(FLOAT32)
    kept: list[torch.Size] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        result, gradients = recorded_step(FLOAT32.replace(compile=True))
    # Of a layer's feed-forward network gate and up, in each micro-batch, but not the product made of them.
    layers, width = small_model().config.num_hidden_layers, small_model().config.intermediate_size
    assert sum(shape[-1] == width and shape.numel() == 64 * width for shape in kept) == 2 * 2 * layers
    assert result.loss == pytest.approx(plain.loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    assert_close(gradients, expected, 1e-5)
    model = small_model()
    names = list(model.state_dict())
    start_state(model, pairs(), FLOAT32.replace(compile=True))
    assert list(model.state_dict()) == names  # a compiled model's checkpoint is a checkpoint
    assert all(layer._compiled_call_impl is not None for layer in model.layers)


def test_a_gpu_copy_is_made_of_tensors_that_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share memory (an expanded range of positions) cannot be pinned; every GPU run copies batches so."""
    tokens = torch.arange(8).view(2, 4)
    shared = torch.arange(4).expand(2, 4)
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert 0 not in tensor.stride()
        pinned.append(tensor.clone())
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = Batch(shared, tokens, tokens, tokens, False, 8)
    with pytest.raises(RuntimeError, match="no GPU here"):
        batch.to(torch.device("cuda"))
    assert torch.equal(pinned[0], shared)


@pytest.mark.parametrize("in_hardware", [True, False, None])
def test_auto_computes_in_bfloat16_only_where_it_is_in_hardware(
    monkeypatch: pytest.MonkeyPatch, in_hardware: bool | None
) -> None:
    if in_hardware is None:  # a torch that cannot say
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: in_hardware, raising=False)
    expected = "bfloat16" if in_hardware else "float32"
    assert choose_dtype(TrainConfig(), torch.device("cpu")) == expected
    assert choose_dtype(TrainConfig(dtype="bfloat16"), torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_a_long_run_is_compiled_unasked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, long = torch.device(kind), COMPILING_PAYS[kind]
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_compile(TrainConfig(), device, long)
    assert not choose_compile(TrainConfig(), device, 0.99 * long)
    assert choose_compile(TrainConfig(compile=True), device, 0)
    assert not choose_compile(TrainConfig(compile=False), device, long)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not choose_compile(TrainConfig(), device, long)
    with pytest.raises(InputError, match=r"compiling for a .* needs .* compiler"):
        check_compiler(TrainConfig(compile=True), device)
    check_compiler(TrainConfig(), device)


def test_compiling_for_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not choose_compile(TrainConfig(), torch.device("cuda"), COMPILING_PAYS["cuda"])
    with pytest.raises(InputError, match="Triton"):
        check_compiler(TrainConfig(compile=True), torch.device("cuda"))
