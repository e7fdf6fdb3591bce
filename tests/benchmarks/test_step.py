"""The promise of the benchmarks of a training step: what they take apart is the step, and the parts make up the whole.

Here they run on a tiny shape. Their times are not looked at, but by a clock of the test's own; memory is bytes of
tensors, the same on every machine, and is.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import __main__, job, memory, process, profile, roof, step
from benchmarks.alive import CAST, Alive
from tests.helpers import SMALL, run_here

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TINY = {**SMALL, "vocab_size": 2_048, "hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 256}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """The file of a shape that takes the bundled tokenizer's ids."""
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


def tiny_job(shape: Path, **changes: Any) -> job.Job:
    words: dict[str, Any] = {"batch_size": 2, "length": 16, "grad_accum": 1, "dtype": "float32", "device": "cpu"}
    options = {"config": str(shape), "data": None, "tokenizer": "bundled", "compile": False, **words, **changes}
    return job.prepare(argparse.Namespace(**options))


# A step in parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parts_do_what_train_step_does(shape: Path, dtype: str) -> None:
    """The same weights and moments after three steps of two micro-batches, bit for bit."""
    whole, parts = (tiny_job(shape, dtype=dtype, grad_accum=2) for _ in range(2))
    before = [parameter.clone() for parameter in whole.state.model.parameters()]
    for _ in range(3):
        step.whole_step(whole)
        job.take_step(parts, nullcontext)
    assert whole.state.step == parts.state.step == 3
    for old, a, b in zip(before, whole.state.model.parameters(), parts.state.model.parameters(), strict=True):
        assert not torch.equal(old, a)
        assert torch.equal(a, b)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.state.optimizer.state[a][moment], parts.state.optimizer.state[b][moment])
    assert torch.equal(next(whole.micro_batches).tokens, next(parts.micro_batches).tokens)


def test_the_parts_are_complete_and_in_order(shape: Path) -> None:
    entered: list[str] = []
    open_parts: list[str] = []

    @contextmanager
    def part(name: str) -> Iterator[None]:
        assert not open_parts  # one at a time: no second is counted twice
        entered.append(name)
        open_parts.append(name)
        yield
        open_parts.pop()

    result = job.take_step(tiny_job(shape, grad_accum=2), part)
    assert result.stepped
    assert entered == [
        "bookkeeping",
        *2 * ["next batch", "copy to device"],
        *2 * ["forward", "loss", "backward"],
        "clip",
        "optimizer",
        "zero_grad",
        "bookkeeping",
    ]
    assert set(entered) == set(job.PARTS)


class Clock:
    """A clock that only moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("whole_seconds", "gap", "adds_up"),
    [(4.5, 0, True), (4.3, 0, True), (4.2, 0, False), (5.0, 0, False), (4.5, 0.2, True), (4.5, 0.3, False)],
)
def test_the_parts_are_held_against_the_whole(
    shape: Path,
    whole_seconds: float,
    gap: float,
    adds_up: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each part takes its place in PARTS times 0.1 s, so all nine take 4.5 s; `gap` is in none of them."""
    clock, taken, running = Clock(), [], tiny_job(shape)

    def take_parts(_: job.Job, part: job.Part) -> None:
        taken.append("parts")
        for number, name in enumerate(job.PARTS, start=1):
            for _ in range(2):  # as for two micro-batches
                with part(name):
                    clock.now += number / 20
        clock.now += gap

    def take_whole(_: job.Job) -> None:
        taken.append("whole")
        clock.now += whole_seconds

    monkeypatch.setattr(step, "take_step", take_parts)
    monkeypatch.setattr(step, "whole_step", take_whole)
    monkeypatch.setattr(roof, "measure", lambda device, dtype: roof.Roof("float32", 1e9, 1e9, 1e9))
    whole, around, parts, _ = step.measure(running, 3, clock)
    assert taken == ["parts", "whole", "whole", "parts"] * 2 + ["parts", "whole"]
    assert whole == pytest.approx([whole_seconds] * 3)
    assert around == pytest.approx([4.5 + gap] * 3)
    found = step.summary(running, whole, around, parts)
    for number, (name, times) in enumerate(found["parts_seconds"].items(), start=1):
        assert times == pytest.approx({"median": number / 10, "min": number / 10, "max": number / 10, "n": 3})
        assert found["parts_share"][name] == pytest.approx(number / 45)
    assert found["parts_of_whole_step"] == pytest.approx(4.5 / whole_seconds)
    assert found["parts_of_same_step"] == pytest.approx(4.5 / (4.5 + gap))
    assert found["adds_up"] is adds_up
    assert found["tokens_per_second"] == pytest.approx(32 / whole_seconds)
    assert found["mfu"] == pytest.approx(found["model_flops_per_second"] / 1e9)
    words = {"config": "tiny", "dtype": "float32", "device": "cpu", "batch_size": 2, "length": 16}
    step.show({**words, "grad_accum": 1, "compile": False, **found})
    assert ("WARNING" in capsys.readouterr().out) is not adds_up


@pytest.mark.parametrize("device", DEVICES)
def test_step(shape: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "SIDE", {device: 64})
    monkeypatch.setattr(roof, "COPIED", {device: 2**16})
    words = ["--batch-size", 2, "--length", 16, "--repeats", 2, "--device", device, "--config", shape]
    result = run_here("step", tmp_path, *words)
    assert {"cpu", "cores", "memory_bytes", "system"} <= set(result["machine"])
    assert (result["device"], result["batch_size"], result["length"], result["tokens"]) == (device, 2, 16, 32)
    assert list(result["parts_seconds"]) == list(job.PARTS)
    assert sum(result["parts_share"].values()) == pytest.approx(1)
    assert all(times["n"] == 2 for times in (*result["parts_seconds"].values(), result["whole_step_seconds"]))
    assert 0.5 < result["parts_of_same_step"] <= 1
    assert result["mfu"] > 0


# A step under the profiler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_profile(shape: Path, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batch-size", 2, "--length", 16, "--repeats", 1, "--device", device, "--config", shape]
    trace = tmp_path / "made" / "step.json.gz"
    result = run_here("profile", tmp_path, *words, "--dtype", "float32", "--trace", trace)
    assert {"cpu", "cores", "memory_bytes", "system"} <= set(result["machine"])
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events}
    assert {*job.PARTS, "aten::mm"} <= names
    assert sum(event["name"] == "forward" and event["cat"] == "user_annotation" for event in events) == 1
    operators = {row["name"]: row for row in result["operators"]}
    assert operators["aten::mm"]["calls"] > 0
    assert profile.PYTHON in operators
    assert not set(job.PARTS) & set(operators)
    assert sum(row["share"] for row in operators.values()) == pytest.approx(1)
    assert 0 <= result["idle"] <= 1
    assert "aten::mm" in capsys.readouterr().out

    found = result["peak_memory"]["bytes"]
    weights = 4 * (2_048 * 96 + 2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256 + 2 * 96) + 96)
    assert found["weights"] == weights
    assert 0 <= found["optimizer state"] - 2 * weights < 200  # AdamW's own counts of steps
    assert found["gradients"] <= weights
    assert found["activations"] > 0
    if device == "cuda":
        assert sum(found.values()) <= result["peak_memory"]["max_memory_allocated"]


def test_operators_of_a_gpu() -> None:
    """Kernels are counted where they were started, once, and what started none has no share."""

    def event(key: str, kind: DeviceType, cpu: float, cuda: float, note: bool = False) -> SimpleNamespace:
        times = {"self_cpu_time_total": cpu, "self_device_time_total": cuda}
        return SimpleNamespace(key=key, count=2, device_type=kind, is_user_annotation=note, **times)

    rows = profile.operators_of(
        [
            event("aten::add", DeviceType.CPU, 70.0, 128.0),
            event("aten::mm", DeviceType.CPU, 10.0, 384.0),
            event("gemm_kernel", DeviceType.CUDA, 0.0, 300.0),
            event("forward", DeviceType.CPU, 20.0, 0.0, note=True),
            event("forward", DeviceType.CUDA, 0.0, 400.0, note=True),
            event("backward", DeviceType.CPU, 30.0, 0.0, note=True),
        ],
        cuda=True,
    )
    assert [(row["name"], row["share"]) for row in rows] == [
        ("aten::mm", 0.75),
        ("aten::add", 0.25),
        (profile.PYTHON, 0.0),
    ]
    assert rows[-1]["self_cpu_seconds"] == pytest.approx(50e-6)


def test_a_gpu_is_busy_once_at_a_time() -> None:
    spans = [("kernel", 0, 10), ("kernel", 5, 10), ("gpu_memcpy", 6, 1), ("kernel", 20, 5), ("cpu_op", 0, 100)]
    events = [{"cat": kind, "ts": start, "dur": length} for kind, start, length in spans]
    assert profile.busy_seconds([{"ph": "M", "name": "process_name"}, *events]) == pytest.approx(20e-6)
    assert profile.busy_seconds([]) == 0


# Memory ---------------------------------------------------------------------------------------------------------------


def test_alive_tells_when_memory_comes_and_goes_and_what_for() -> None:
    weight = torch.ones(10, 10, requires_grad=True)  # 400 bytes
    with Alive({"weights": [weight]}) as alive:
        with alive.part("early"):
            torch.zeros(50)  # gone at once
        with alive.part("forward"):
            low = weight.detach().to(torch.bfloat16)  # 200
            columns = weight.new_empty(10, 10, dtype=torch.bfloat16)  # 200
            columns[:5] = weight.detach()[:5].to(torch.bfloat16)
            columns[5:] = low[5:]
            root = (weight * 4).sqrt()  # 400, which its gradient needs; the product is gone by then
            view = root[2:]
        del low, columns
        with alive.part("backward"):
            view.sum().backward()
        alive.label("gradients", [tensor for tensor in [weight.grad] if tensor is not None])
        del root, view
    found: dict[str, int] = {}

    def purpose(memory: Any) -> str:
        name = memory.label or (f"{memory.made_by} of {memory.copy_of}" if memory.copy_of else "")
        name = name or ("saved" if memory.saved else "other") + f" in {memory.part}"
        found[name] = max(found.get(name, 0), memory.nbytes)
        return name

    peak = alive.peak(purpose)
    assert found["weights"] == found["saved in forward"] == 400
    assert (peak.part, peak.total) == ("backward", sum(peak.nbytes.values()))
    assert peak.nbytes["weights"] == peak.nbytes["saved in forward"] == 400
    assert found[f"{CAST} of weights"] == 200
    assert found["aten::new_empty of weights"] == 200
    assert f"{CAST} of weights" not in peak.nbytes  # gone by then
    assert peak.total == 400 + 400 + sum(v for k, v in peak.nbytes.items() if k not in ("weights", "saved in forward"))
    assert sum(change for _, _, change in alive._history) == 800  # the weights and their gradient are left


@pytest.mark.parametrize("device", DEVICES)
def test_memory(
    shape: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger of a tiny shape: the lines that must be equal are, and all of them together are within 10 %."""
    monkeypatch.setattr(process, "fresh", lambda name, *words: memory.measure(*map(str, words)))
    monkeypatch.setattr(process, "give_back_freed", lambda: None)  # that is for a process of its own
    monkeypatch.setattr("minift.kernels.cross_entropy.CACHED", 2**16)  # few of the rows, as with a real vocabulary
    # Logits are most of it, as with a real vocabulary: the ledger is of that moment, not of a layer's backward pass.
    shape.write_text(json.dumps({**TINY, "vocab_size": 8_208}))
    result = run_here("memory", tmp_path, "--shapes", f"{shape}:16x64", "--device", device)
    assert {"cpu", "cores", "memory_bytes", "system"} <= set(result["machine"])
    printed = capsys.readouterr().out
    assert [run["dtype"] for run in result["runs"]] == ["float32", "bfloat16"]
    for run in result["runs"]:
        lines = run["lines"]
        for name in ("weights", "gradients", "the loss's own gradients"):
            assert lines[name]["measured"] == lines[name]["ledger"], name
        assert 0 <= lines["AdamW's two moments"]["measured"] - lines["AdamW's two moments"]["ledger"] < 200
        activations = lines["activations for the backward pass"]
        assert activations["measured"] == pytest.approx(activations["ledger"], rel=0.05)  # RoPE's tables are in no line
        assert sum(line["measured"] for line in lines.values()) == run["measured_bytes"]
        assert sum(line["ledger"] for line in lines.values()) == run["ledger_bytes"]
        assert run["ledger_of_measured"] == pytest.approx(1, abs=memory.TOLERANCE)
        assert run["fullest_in"] in ("loss", "backward")
        assert all(name in printed for name in lines)
    copies = result["runs"][1]["lines"]["autocast's copies of matrices"]
    assert copies["measured"] == copies["ledger"] > 0
    assert "WARNING" not in printed


def test_the_ledger_of_a_small_vocabulary(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the backward pass of a layer, written out in bfloat16, is the fullest moment: within 10 %, too."""
    monkeypatch.setattr("minift.kernels.cross_entropy.CACHED", 2**16)
    for dtype in ("float32", "bfloat16"):
        run = memory.measure(memory.KEEP, f"{shape}:16x256", dtype, "cpu", "bundled")
        assert run["fullest_in"] == ("backward" if dtype == "bfloat16" else "loss")
        assert run["ledger_of_measured"] == pytest.approx(1, abs=memory.TOLERANCE), dtype


def test_a_ledger_that_is_off_is_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    run = {"shape": "x:1x1", "dtype": "float32", "device": "cpu", "fullest_in": "loss", "outside_bytes": 100}
    lines = {"weights": {"ledger": 89, "measured": 100}}
    memory.show({**run, "lines": lines, "ledger_bytes": 89, "measured_bytes": 100, "ledger_of_measured": 0.89})
    assert "WARNING" in capsys.readouterr().out


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["step", "--config", "nonesuch"], "unknown preset 'nonesuch'"),
        (["step", "--repeats", "0"], "repeats is 0"),
        (["step", "--batch-size", "0"], "batch_size is 0"),
        (["step", "--dtype", "float16", "--device", "cpu"], "float16"),
        (["step", "--length", "257"], "length is 257"),
        (["step", "--config", "stories260k"], "the tokenizer has 2048 pieces"),
        (["step", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["step", "--json", "README.md/x.json"], "README.md/x.json: cannot be written"),
        (["profile", "--trace", "trace.txt"], "trace.txt must end in .json"),
        (["profile", "--trace", "README.md/x.json"], "cannot be written"),
        (["profile", "--top", "0"], "top is 0"),
        (["memory", "--shapes", "stories15m"], "is not NAME:BxT"),
        (["memory", "--shapes", "stories15m:0x4"], "batch_size is 0"),
        (["memory", "--shapes", "nonesuch:1x4"], "unknown preset 'nonesuch'"),
        (["memory", "--dtypes", "int8"], "invalid choice: 'int8'; choose from auto, float32"),
        (["memory", "--json", "README.md/x.json"], "README.md/x.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    assert __main__.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: error: ")
    assert named in line
