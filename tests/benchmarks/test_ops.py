"""The promise of `python -m benchmarks ops`: its variants compute the same, and its costs are those of the formulas.

FLOPs are held against PyTorch's own counter and against `minift/costs/flops.py`, bytes against formulas written out
here, and the textbook twins against what trains, in value and in gradient.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arguments, cold, floor, ops, record, roof, roofline
from benchmarks.operation import Operation, Setting, Work, make_step
from benchmarks.operations import OPERATIONS
from benchmarks.samples import Samples
from minift.config import LlamaConfig, TrainConfig
from minift.costs.flops import forward_flops_per_token
from minift.data.batches import PairBatches
from minift.errors import InputError
from minift.kernels.layer import LONGEST, WrittenShared
from minift.model import Llama, Shared
from minift.pack import Example
from minift.runs.start import start_state
from tests.helpers import SMALL, as_samples, run_here

B, T = 2, 12
SHAPE = LlamaConfig(**{**SMALL, "initializer_range": 0.2})
D, F, V = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size
H, K, C, L = SHAPE.num_attention_heads, SHAPE.num_key_value_heads, SHAPE.head_dim, SHAPE.num_hidden_layers
N = B * T
P = V * D + L * (2 * D * H * C + 2 * D * K * C + 3 * D * F + 2 * D) + D
PRODUCTS = ["qkv", "attention", "output", "swiglu", "loss"]


def make(name: str, dtype: torch.dtype = torch.float32) -> Operation:
    return OPERATIONS[name](make_step(Setting(SHAPE, B, T, dtype, "cpu")))


def difference(ours: Tensor, twin: Tensor) -> float:
    assert ours.shape == twin.shape
    assert ours.dtype == twin.dtype
    return float((ours.double() - twin.double()).norm() / twin.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_naive_is_used(name: str, dtype: torch.dtype) -> None:
    """Values, gradients, dtypes. Operations that work in place are done three times over."""
    operation, tolerance = make(name, dtype), 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(1 if operation.leaves else 3):
        values = [operation.variants[variant]() for variant in ("used", "naive")]
    for used, naive in zip(*values, strict=True):
        assert difference(used.detach(), naive.detach()) < tolerance
    if operation.leaves:
        gradients = [operation.both(variant) for variant in ("used", "naive")]
        for used, naive in zip(*gradients, strict=True):
            assert difference(used, naive) < tolerance


def test_what_works_in_place_does_work() -> None:
    clip, adamw = make("clip"), make("adamw")
    for variant in ("naive", "used"):
        clipped = clip.variants[variant]()
        assert math.sqrt(sum(float(g.square().sum()) for g in clipped)) == pytest.approx(1.0, abs=1e-4)
        before = [weight.clone() for weight in adamw.variants[variant]()]
        after = adamw.variants[variant]()
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_those_of_a_step(dtype: torch.dtype) -> None:
    """What the first layer's modules get when the model itself runs: the same numbers in the same dtype and layout."""
    step = make_step(Setting(SHAPE, B, T, dtype, "cpu"))
    got: dict[str, Tensor] = {}
    modules = {"stream": "input_layernorm", "normed": "self_attn", "mixed": "self_attn.o_proj"}
    for name, module in modules.items():
        step.layer.get_submodule(module).register_forward_pre_hook(
            lambda module, inputs, name=name: got.update({name: inputs[0]})
        )
    with step.setting.autocast(), torch.no_grad():
        step.model.hidden(step.tokens)
    for name in modules:
        ours = getattr(step, name)
        assert (ours.dtype, ours.stride()) == (got[name].dtype, got[name].stride())
        assert torch.equal(ours, got[name])


# Costs ----------------------------------------------------------------------------------------------------------------


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products_are_those_torch_counts(name: str) -> None:
    """Of attention, the textbook twin computes the whole square, and only what causality leaves is counted."""
    operation = make(name)
    forward, backward = (operation.work[phase].flops for phase in ("forward", "backward"))
    square = 2 * T / (T + 1) if name == "attention" else 1
    assert counted(operation.variants["naive"]) == pytest.approx(forward * square)
    assert counted(lambda: operation.both("naive")) == pytest.approx((forward + backward) * square)
    if name in ("qkv", "output", "swiglu"):  # the others' kernels are not all known to the counter
        both = counted(lambda: torch.autograd.backward(operation.variants["used"](), operation.gradients))
        assert both == forward + backward


def test_products_are_the_models_flops() -> None:
    operations = [make(name) for name in PRODUCTS]
    total = sum(operation.calls * operation.work["forward"].flops for operation in operations)
    assert total == pytest.approx(N * forward_flops_per_token(SHAPE, T))


def test_a_whole_layer_is_its_parts() -> None:
    """Its FLOPs are its four products', as torch counts them (the textbook takes attention in full)."""
    operations = {name: make(name) for name in OPERATIONS}
    whole, inside = operations.pop("layer"), [name for name, one in operations.items() if one.inside]
    assert inside == ["norm", "rope", "qkv", "attention", "output", "swiglu"]
    assert all(operations[name].inside == L * (2 if name == "norm" else 1) for name in inside)
    assert (whole.calls, whole.inside) == (L, 0)
    parts = [operations[name] for name in inside if name in PRODUCTS]
    forward, backward = (sum(part.work[phase].flops for part in parts) for phase in ("forward", "backward"))
    assert (whole.work["forward"].flops, whole.work["backward"].flops) == (forward, backward)
    masked = operations["attention"].work["forward"].flops * (2 * T / (T + 1) - 1)
    assert counted(whole.variants["naive"]) == pytest.approx(forward + masked)
    assert counted(lambda: whole.both("naive")) == pytest.approx(forward + backward + 3 * masked)


@pytest.mark.parametrize(
    ("dtype", "length", "expected"),
    [
        (torch.bfloat16, T, WrittenShared),
        (torch.float32, T, Shared),
        (torch.bfloat16, LONGEST + 1, Shared),
    ],
    ids=str,
)
def test_the_layer_that_is_timed_is_the_one_that_trains(dtype: torch.dtype, length: int, expected: type) -> None:
    """The same class of layer, reading the same kind of what layers share, as `start_state` and `Llama.hidden` have."""
    config = TrainConfig(dtype=str(dtype).removeprefix("torch."), device="cpu", compile=False)
    shape = dataclasses.replace(SHAPE, max_position_embeddings=length)
    step = make_step(Setting(shape, B, length, dtype, "cpu"))
    example = Example(step.tokens[0].tolist(), [1])
    model = start_state(Llama(shape), PairBatches([example], 1, 0, 0), config).model
    read: list[type] = []
    layers = [step.trained, *model.layers]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: read.append(type(inputs[1])))
    with step.setting.autocast():
        model.hidden(step.tokens)
    OPERATIONS["layer"](step).variants["used"]()
    assert type(step.trained) is type(model.layers[-1])
    assert set(read) == {expected}
    assert len(read) >= 1 + len(model.layers)


def test_flops_element_by_element() -> None:
    flops = {
        name: [work.flops for work in make(name).work.values()]
        for name in ("embedding", "norm", "rope", "clip", "adamw")
    }
    rope = 3 * N * (H + K) * C
    assert flops == {
        "embedding": [0, N * D],
        "norm": [4 * N * D, 9 * N * D],
        "rope": [rope, rope],
        "clip": [3 * P],
        "adamw": [16 * P],
    }


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes_by_their_formulas(dtype: torch.dtype, size: int) -> None:
    """Each input once and each output once. The stream and the weights are float32 in either case."""
    step = make_step(Setting(SHAPE, B, T, dtype, "cpu"))
    nbytes = {
        name: [work.nbytes for work in make_operation(step).work.values()]
        for name, make_operation in OPERATIONS.items()
    }
    rows, ids, stream, heads, queries = len(step.tokens.unique()), 8 * N, 4 * N * D, size * N * C, size * N * H * C
    tables, projections, network = 2 * 4 * N * C, 4 * D * (H + 2 * K) * C, 4 * 3 * D * F
    projected, down = heads * (H + 2 * K), size * N * D
    all_weights = projections + 4 * D * H * C + network + 2 * 4 * D
    assert nbytes == {
        "embedding": [ids + 4 * rows * D + stream, ids + stream + 4 * V * D],
        "norm": [2 * stream + 4 * D, 3 * stream + 2 * 4 * D],
        "rope": [2 * heads * (H + K) + tables, 2 * heads * (H + K) + tables],
        "qkv": [stream + projections + projected, 2 * stream + 2 * projections + projected],
        "attention": [projected + queries, 2 * projected + queries],
        "output": [queries + 4 * H * C * D + down, 2 * queries + 2 * 4 * H * C * D + down],
        "swiglu": [stream + network + down, 2 * stream + 2 * network + down],
        "layer": [2 * stream + all_weights + tables, 3 * stream + 2 * all_weights + tables],
        "loss": [stream + 4 * V * D + ids + 4, 2 * stream + 2 * 4 * V * D + ids + 4],
        "clip": [8 * P],
        "adamw": [28 * P],
    }


# The benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """The words that make a run take no time. Its roof is then not one."""
    monkeypatch.setitem(roof.SIDE, "cpu", 32)
    monkeypatch.setitem(roof.COPIED, "cpu", 2**14)
    monkeypatch.setattr(floor, "TIMES", 0)  # the operations are as short as the clock's own cost
    monkeypatch.setattr(cold, "cache", lambda device: cold.Cache(2**16))
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    size = ["--batch-size", B, "--length", T, "--repeats", 2, "--dtype", "float32", "--device", "cpu"]
    return ["--config", tmp_path / "shape.json", *size]


def test_a_run(tiny: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation is recorded, and the shares of the roof are those of the recorded times, FLOPs and bytes."""
    pytest.importorskip("matplotlib")
    result = run_here("ops", tmp_path, *tiny, "--no-compile", "--plot", tmp_path / "plots" / "roofline.png")
    assert str(tmp_path) not in json.dumps({**result, "command": ""})
    assert list(result["operations"]) == list(OPERATIONS)
    printed = capsys.readouterr().out
    assert result["caches"] == list(result["floors"]) == ["warm", "cold"]
    assert list(result["operations_cold"]) == list(OPERATIONS)
    assert [printed.count(f" {mode} ") for mode in result["caches"]] == [9 * 3 + 2] * 2
    for name, operation in [*result["operations"].items(), *result["operations_cold"].items()]:
        machine = roof.Roof(**operation["roof"])
        assert roof.best([machine, roof.Roof(**result["roof"])]) == roof.Roof(**result["roof"])
        assert name in printed
        assert list(operation["phases"]) == (["step"] if name in ("clip", "adamw") else ["forward", "backward", "both"])
        for phase, values in operation["phases"].items():
            least = machine.seconds(values["flops"], values["bytes"])
            assert values["roof_seconds"] == least
            assert values["intensity"] == values["flops"] / values["bytes"]
            assert list(values["variants"]) == ["naive", "used"]
            for variant, measured in values["variants"].items():
                assert measured["seconds"]["n"] == 2
                if name == "loss" and variant == "used" and phase != "both":  # it computes gradients going forward
                    assert measured["share_of_roof"] is None
                elif phase != "backward":  # a difference of two short times may be anything
                    assert measured["share_of_roof"] == pytest.approx(least / measured["seconds"]["median"])
    for key in ("step_seconds", "step_seconds_of_whole_layers"):
        assert set(result[key]) == {"at the roof", "naive", "used"}
    assert (tmp_path / "plots" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_compiled_run(tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without the last stage, the C++ compiler, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(arguments, "check_compiler", lambda *_: None)
    result = run_here("ops", tmp_path, *tiny, "--only", "norm", "embedding")
    assert "step_seconds" not in result  # of two operations there is no whole
    variants = {
        name: {tuple(values["variants"]) for values in operation["phases"].values()}
        for name, operation in result["operations"].items()
    }
    assert variants == {"norm": {("naive", "used", "compiled")}, "embedding": {("naive", "used")}}


def test_the_backward_pass_is_what_a_turn_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases are paired turn by turn; the sum of a step takes each operation as often as a step does it."""

    seconds = {
        "naive forward warm": [4.0, 1.0, 2.0],
        "naive both warm": [10.0, 4.0, 6.0],
        "naive forward cold": [5.0, 2.0, 3.0],
        "naive both cold": [11.0, 5.0, 8.0],
        "used forward warm": [1.0, 1.0, 1.0],
        "used both warm": [3.0, 2.0, 3.0],
        "used forward cold": [2.0, 2.0, 2.0],
        "used both cold": [6.0, 4.0, 5.0],
    }

    def in_turns(sides: dict[str, object], **how: object) -> dict[str, Samples]:
        assert list(sides) == list(seconds)  # pairs side by side
        assert how == {"device": "cpu", "repeats": 3, "caches": {name: name.split()[-1] for name in seconds}}
        return as_samples(seconds)

    monkeypatch.setattr(ops, "in_turns", in_turns)
    operation = make("norm")
    found = ops.measure(operation, "cpu", ("warm", "cold"), repeats=3)
    backward = {mode: {name: one.seconds for name, one in times["backward"].items()} for mode, times in found.items()}
    assert backward == {
        "warm": {"naive": [6.0, 3.0, 4.0], "used": [2.0, 1.0, 2.0]},
        "cold": {"naive": [6.0, 3.0, 5.0], "used": [4.0, 2.0, 3.0]},
    }
    times = found["warm"]
    machine = roof.Roof("float32", 100.0, 10.0, 10.0)
    summary = ops.summary(operation, times, machine)
    both, work = summary["phases"]["both"], operation.work["forward"] + operation.work["backward"]
    assert (both["flops"], both["bytes"]) == (work.flops, work.nbytes)
    assert both["variants"]["used"]["times_as_fast_as_naive"] == 2.0
    assert both["variants"]["used"]["seconds"] == {"median": 3.0, "min": 2.0, "max": 3.0, "n": 3}
    total = ops.step_seconds({"norm": summary})
    assert total == {"at the roof": 5 * machine.seconds(work.flops, work.nbytes), "naive": 5 * 6.0, "used": 5 * 3.0}


def test_a_time_below_the_floor_is_not_a_number_in_the_table() -> None:
    """4 µs where the timer takes 2: no time, no share, no ratio; and a difference below 0 is shown, as it is noise."""
    work = {"forward": Work(10.0, 10.0), "backward": Work(20.0, 10.0)}
    operation = Operation(1, 0, work, {}, leaves=(torch.ones(1),))
    long, short = as_samples({"naive": [9e-6] * 6, "used": [4e-6] * 6}).values()
    forward = {one.name: dataclasses.replace(one, floor=6e-6) for one in (long, short)}
    times = {"forward": forward, "both": forward, "backward": as_samples({"naive": [-1e-6] * 6, "used": [1e-6] * 6})}
    found = ops.summary(operation, times, roof.Roof("float32", 1e7, 1e7, 1e7))
    variants = found["phases"]["forward"]["variants"]
    assert variants["naive"]["least_seconds"] is None
    assert variants["naive"]["interval"] == (9e-6, 9e-6)
    assert variants["used"]["least_seconds"] == 6e-6
    assert variants["used"]["share_of_roof"] is None
    assert "times_as_fast_as_naive" not in variants["used"]
    table = ops._rows("norm", {"warm": found}).splitlines()
    assert table[0].split()[-6:] == ["0%", "0.11", "<", "0.00600", "-", "-"]
    assert "-0.00100" in table[2]


def test_the_table_says_how_turns_ended_and_which_timer_was_used() -> None:
    sides = as_samples({"naive": [1.0] * 3, "used": [1.0] * 3})
    assert ops._how_it_ended({"step": sides}) == ""
    (first, *rest), used = sides["naive"].samples, dataclasses.replace(sides["used"], timer="events")
    marked = (dataclasses.replace(first, marks=("clock",)), *rest)
    naive = dataclasses.replace(sides["naive"], samples=marked, stopped="budget")
    said = "turns: 3; the budget is gone, 1 left out: clock, naive step by wall"
    assert ops._how_it_ended({"step": {"naive": naive, "used": used}}, "events").strip() == said


@pytest.mark.parametrize("mode", ["warm", "cold"])
def test_one_kind_of_caches(mode: str, tiny: list[object], tmp_path: Path) -> None:
    result = run_here("ops", tmp_path, *tiny, "--no-compile", "--only", "norm", "--caches", mode)
    assert result["caches"] == [mode]
    assert "operations_cold" not in result


def test_a_budget_is_shared_by_the_operations(
    tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets an equal part of what is left: here, a clock on which each takes 2 of its seconds."""
    seen: list[Any] = []
    whole, now = ops.measure, itertools.count(0, 2)

    def measure(operation: Operation, device: str, modes: list[str], **how: Any) -> Any:
        seen.append(how["budget"])
        return whole(operation, device, modes, **{**how, "repeats": 1})

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    run_here("ops", tmp_path, *tiny, "--no-compile", "--only", "norm", "rope", "output", "--budget", 30)
    assert seen == [30 / 3, 28 / 2, 26 / 1]


def test_a_step_is_counted_by_operations_or_by_layers() -> None:
    """Three layers with two norms each, and one norm after them."""

    def operation(calls: int, inside: int, seconds: float) -> dict[str, object]:
        both = {"roof_seconds": seconds, "variants": {name: {"seconds": {"median": seconds}} for name in ops.VARIANTS}}
        return {"calls": calls, "inside": inside, "phases": {"both": both}}

    operations = {"norm": operation(7, 6, 1.0), "qkv": operation(3, 3, 10.0), "layer": operation(3, 0, 100.0)}
    assert set(ops.step_seconds(operations).values()) == {7 * 1.0 + 3 * 10.0}
    assert set(ops.step_seconds(operations, whole_layers=True).values()) == {1.0 + 3 * 100.0}


def test_a_share_is_withheld_where_phases_do_not_compare() -> None:
    work = {"forward": Work(10.0, 10.0), "backward": Work(20.0, 10.0)}
    operation = Operation(1, 0, work, {}, leaves=(torch.ones(1),), early=("used",))
    times = {phase: as_samples({"naive": [2.0], "used": [1.0]}) for phase in ("forward", "both")}
    times["backward"] = as_samples({"naive": [-0.5], "used": [1.0]})  # by chance
    phases = ops.summary(operation, times, roof.Roof("float32", 10.0, 10.0, 10.0))["phases"]
    shares = {phase: [v["share_of_roof"] for v in values["variants"].values()] for phase, values in phases.items()}
    assert shares == {"forward": [0.5, None], "backward": [None, None], "both": [1.5, 3.0]}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--budget", "0"], "--budget"),
        (["--device", "cpu", "--dtype", "float32", "--timer", "graph"], "graph"),
        (["--config", "nonesuch"], "nonesuch"),
        (["--plot", "roofline.pdf"], "roofline.pdf"),
        (["--device", "cpu", "--dtype", "float16"], "float16"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(roof, "measure", lambda *_: pytest.fail("measured"))
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    with pytest.raises(InputError, match=named):
        ops.run(parser.parse_args(["--no-compile", *words]))


def test_the_record_does_not_say_where_the_plot_went() -> None:
    words = ["ops", "--plot", "somewhere/roofline.png", "--repeats", "1"]
    assert record.named_command(words) == ["ops", "--repeats", "1"]


# The plot -------------------------------------------------------------------------------------------------------------


def test_names_do_not_lie_on_each_other() -> None:
    places = [0.1, 0.5, 0.5, 0.5, 0.52, 0.9]
    apart = roofline.spread_out(places, 0.05)
    assert all(after - before > 0.05 - 1e-6 for before, after in itertools.pairwise(apart))
    assert (apart[0], apart[-1]) == (0.1, 0.9)  # there was room already
    assert sum(apart) == pytest.approx(sum(places))


def test_points_are_of_both_phases() -> None:
    def phase(flops: float, seconds: float) -> dict[str, object]:
        return {"flops": flops, "intensity": 2.0, "variants": {"used": {"seconds": {"median": seconds}}}}

    found = roofline.points(
        {"a": {"phases": {"forward": phase(1, 1), "both": phase(6, 2)}}, "b": {"phases": {"step": phase(8, 2)}}}
    )
    assert found == [roofline.Point("a", "used", 2.0, 3.0), roofline.Point("b", "used", 2.0, 4.0)]


def other_value(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(1.001 * value for value in call())


def other_gradient(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The same values, half of whose gradient is lost."""
    return lambda: tuple((value + value.detach()) / 2 for value in call())


def one_result_less(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: call()[:-1]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("variant", ["used", "compiled"])
@pytest.mark.parametrize("spoil", [other_value, other_gradient])
def test_a_variant_that_computes_something_else_is_not_timed(
    name: str,
    variant: str,
    spoil: Callable[[Any], Any],
    tiny: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By one part in a thousand, or in the gradient alone: no time is taken, and no record is written."""
    if name in ("clip", "adamw") and spoil is other_gradient:
        pytest.skip("works in place: it has no gradient")
    whole = OPERATIONS[name]

    def spoilt(step: Any) -> Operation:
        operation = whole(step)
        variants = {**operation.variants, variant: spoil(operation.variants["naive"])}
        return dataclasses.replace(operation, variants=variants)

    monkeypatch.setitem(OPERATIONS, name, spoilt)
    monkeypatch.setattr(ops, "in_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(
        InputError, match=rf"{name}: (value|gradient) \d+ of {variant} is .* off naive's; it is not timed"
    ):
        run_here("ops", tmp_path, *tiny, "--no-compile", "--only", name)
    assert not list(tmp_path.glob("*.json.partial")) + [
        file for file in tmp_path.glob("*.json") if file.stem != "shape"
    ]


def test_a_variant_that_gives_less_is_not_timed(tiny: list[object], tmp_path: Path) -> None:
    operation = make("rope")
    spoilt = dataclasses.replace(
        operation, variants={**operation.variants, "used": one_result_less(operation.variants["used"])}
    )
    with pytest.raises(InputError, match=r"rope: used gives \d+ results, naive \d+"):
        ops.check("rope", dataclasses.replace(spoilt, leaves=()), torch.float32)
