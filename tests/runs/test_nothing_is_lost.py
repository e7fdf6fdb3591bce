"""The promise of a run that is interrupted: nothing is lost, and what each signal does is said at once.

Signals are sent to this process at chosen moments: in a forward pass, in an update of the weights, in a save, in an
evaluation, in the comparison. A run that is continued takes the same steps as one that was left alone, bit for bit.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minift import BasicModelRunner, load_model, train
from minift.cli import main
from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.errors import InputError, RunError
from minift.runs import clock, final, finetune, loop, space, steps
from minift.runs.start import start_state
from minift.train import Plan
from tests.helpers import ROOT, completed, make_examples, small_model, write_jsonl

STEPS = 8
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> list[str]:
    """Words of a short run of adapters with dropout, which draws random numbers in each step."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(20)]
    data, test = write_jsonl(folder / "a.jsonl", rows[:14]), write_jsonl(folder / "b.jsonl", rows[14:])
    found = ["finetune", "--model", small_checkpoint, "--data", data, "--test", test, "--steps", STEPS]
    found += ["--batch-size", 4, "--lora-rank", 2, "--lora-dropout", 0.2, "--lr", "0.01", "--eval-every", 2]
    return [str(word) for word in (*found, "--device", "cpu", "--dtype", "float32", "--warmup", 0)]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is left alone."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*words, "--out", str(out)]) == 0
    return out


def results(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.endswith(("seconds", "second"))} for line in lines]
    return metrics, load_model(out / "final").state_dict(), json.loads((out / "compare.json").read_text())


def assert_same(out: Path, whole: Path) -> None:
    (metrics, weights, compared), (expected, expected_weights, expected_compared) = results(out), results(whole)
    assert metrics == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert compared == expected_compared


def interrupt(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("signals", [(2,), (15,), (2, 2), (15, 15), (2, 15, 2)], ids=str)
@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_in_a_forward_pass(
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    signals: tuple[int, ...],
    step: int,
) -> None:
    """A second one ends it without this step; the run continues as if nothing had been."""
    dropout, plain = torch.nn.functional.dropout, train.train_step
    sent, now = [], [0]

    def spied(x: Any, p: float, training: bool) -> Any:
        dropped = dropout(x, p, training)  # a random number of this step is drawn
        if now[0] == step and not sent and training:
            sent.append(True)
            interrupt(*signals)
        return dropped

    def counted(state: Any, *arguments: Any) -> Any:
        now[0] = state.step + 1
        return plain(state, *arguments)

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(torch.nn.functional, "dropout", spied)
    code = main([*words, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    printed = capfd.readouterr()
    assert "stopping after this step" in printed.err
    once = len(signals) == 1
    assert ("stopping now" in printed.err) == (not once)
    assert code == 1
    if once and step == STEPS:  # it was the last one
        assert printed.err.splitlines()[-1].endswith("final is saved, and --resume does the rest")
        assert not (tmp_path / "run" / "compare.json").exists()
        assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    else:
        assert printed.out.splitlines()[-1].startswith("stopped and saved; continue with: ")
        taken = [int(folder.name[5:]) for folder in (tmp_path / "run").glob("step_*")]
        assert taken == ([step] if once else [step - 1] if step > 1 else [])
        assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("moment", ["update", "save", "best"])
def test_where_nothing_may_be_interrupted(
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    sent = []

    def before(call: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            if not sent:
                sent.append(True)
                interrupt(signal.SIGINT, signal.SIGINT, signal.SIGINT)
            return call(*arguments, **named)

        return called

    where = {"update": (torch, "_fused_adamw_"), "save": (steps, "_save"), "best": (loop, "save_best")}[moment]
    monkeypatch.setattr(*where, before(getattr(*where)))
    assert main([*words, "--save-every", "3", "--out", str(tmp_path / "run")]) == 1
    assert sent
    printed = capfd.readouterr()
    assert "already stopping" in printed.err
    assert "stopping now" not in printed.err
    monkeypatch.undo()
    saved = [int(folder.name[5:]) for folder in (tmp_path / "run").glob("step_*")]
    assert saved == ([] if moment == "best" else [1] if moment == "update" else [3])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == sum(saved)
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("call", [1, 2, 5], ids=["before the first step", "after a step", "after the last"])
def test_an_evaluation_that_is_interrupted_is_made_again(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    plain, calls = loop.validation_loss, []

    def spied(*arguments: Any) -> float:
        calls.append(True)
        if len(calls) == call:
            interrupt(signal.SIGINT, signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(loop, "validation_loss", spied)
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    monkeypatch.undo()
    assert main(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_comparison(
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    """The run's end is there: only the comparison is made by `--resume`."""
    handlers = [signal.getsignal(one) for one in SIGNALS]
    monkeypatch.setattr(finetune, "compare", lambda *arguments: interrupt(number))
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"minift: error: the comparison was interrupted; {out / 'final'} is saved, and --resume compares"
    assert [signal.getsignal(one) for one in SIGNALS] == handlers
    assert (out / "report.html").is_file()
    assert not (out / "compare.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(train, "train_step", None)  # no step is taken
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert_same(out, whole)


def test_the_comparison_of_a_runner(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is in a temporary folder: what was trained has to be in the runner."""
    rows = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(9)]
    runner = BasicModelRunner(str(small_checkpoint), device="cpu")
    runner.load_data(rows, input_key="question", output_key="answer")
    before = runner.model.state_dict()["norm.weight"].clone()
    monkeypatch.setattr(finetune, "compare", lambda *arguments: interrupt(signal.SIGINT))
    with pytest.raises(RunError, match="the runner answers with the trained model"):
        runner.train(steps=3, lr=0.1, keep_last=True, dtype="float32")
    assert not torch.equal(runner.model.state_dict()["norm.weight"], before)
    with pytest.raises(InputError, match="nothing to compare yet"):
        runner.evaluate()
    runner.train(steps=1, compare=0, dtype="float32")
    assert "trained" in repr(runner)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_last_save(
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    """Of a short run it is the first: nothing would be left without it."""
    save = final.save_model

    def spied(*arguments: Any) -> None:
        interrupt(number, number)
        save(*arguments)

    monkeypatch.setattr(final, "save_model", spied)
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 1
    error = capfd.readouterr().err
    assert "stopping when final/ is saved" in error
    assert error.splitlines()[-1] == f"minift: error: interrupted; {out / 'final'} is saved, and --resume does the rest"
    monkeypatch.undo()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert_same(out, whole)


def test_how_many_are_compared(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--steps", "1", "--compare", "2", "--out", str(tmp_path / "two")]) == 0
    result = json.loads((tmp_path / "two" / "compare.json").read_text())
    assert [sample["question"] for sample in result["samples"]] == ["What is 14?", "What is 17?"]
    assert "2 of 6 pairs held out" in capsys.readouterr().out
    assert main([*words, "--steps", "1", "--compare", "0", "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none" / "compare.json").exists()
    printed = capsys.readouterr().out
    assert "exact match" not in printed
    assert f"saved: {tmp_path / 'none' / 'final'} (the model)" in printed


IMPORTED = """
import os, signal, sys
from minift.cli import main

class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except BaseException:
                pass

sys.meta_path.insert(0, Swallowing())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_an_import_does_not_swallow_it(command: str, tmp_path: Path) -> None:
    """Libraries catch everything that is raised while they try what they can import."""
    words = [sys.executable, "-c", IMPORTED, command, "--out", str(tmp_path / "run")]
    done = completed(words, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (1, "minift: interrupted\n")
    assert not (tmp_path / "run").exists()


AT_ONCE = """
import os, runpy, signal, sys

class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), int(sys.argv[2]))
            for _ in range(1000): pass

sys.meta_path.insert(0, Pressing())
if sys.argv[3] == "module":
    runpy.run_module("minift", run_name="__main__")
else:
    from importlib import import_module
    module, name = sys.argv[3].split(":")
    sys.exit(getattr(import_module(module), name)())
"""


@pytest.mark.parametrize("way", ["module", "command"])
@pytest.mark.parametrize("imported", ["minift.cli", "minift.cli.commands", "argparse"])
@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_first_moment(way: str, imported: str, number: int) -> None:
    """While the command line itself is imported."""
    command = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["minift"]
    words = [sys.executable, "-c", AT_ONCE, imported, str(int(number)), way if way == "module" else command]
    done = completed(words, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "minift: interrupted\n")


def test_in_the_last_moment() -> None:
    """While Python ends: all is done, so a second Ctrl-C changes neither the exit code nor the output."""
    pressed = "import atexit, os, signal, sys; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); "
    code = pressed + "sys.argv[1:] = ['data', '--help']; import minift.__main__ as it; sys.exit(it.main())"
    told = completed([sys.executable, "-m", "minift", "data", "--help"], cwd=ROOT, timeout=120)
    done = completed([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr, told.returncode) == (0, "", 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step(words: list[str], tmp_path: Path, number: int) -> None:
    """While the data are read: the pipe that they come from does not end."""
    os.mkfifo(tmp_path / "pairs.jsonl")
    given = [*words, "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "minift", *given]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started as process, (tmp_path / "pairs.jsonl").open("w"):  # when the run has opened its end
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (1, "minift: interrupted\n")
    assert not (tmp_path / "run").exists()


# Minutes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_minute_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a minute pass in each step."""
    now = [0.0]

    def passing(call: Any) -> Any:
        def called(*arguments: Any) -> Any:
            now[0] += 60
            return call(*arguments)

        return called

    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train, "train_step", passing(train.train_step))


@pytest.mark.usefixtures("a_minute_a_step")
def test_saves_are_due_after_minutes(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = loop.save_step
    monkeypatch.setattr(
        loop, "save_step", lambda out, state, *more: saved.append(state.step) or save(out, state, *more)
    )
    long = [*words, "--steps", "45", "--eval-every", "0", "--compare", "0"]
    assert main([*long, "--out", str(tmp_path / "default")]) == 0
    assert saved == [10, 20, 30, 40]
    assert not list((tmp_path / "default").glob("step_*"))
    saved.clear()
    assert main([*long, "--save-every", "20.5m", "--keep", "1", "--out", str(tmp_path / "other")]) == 0
    assert saved == [21, 42]
    assert [folder.name for folder in (tmp_path / "other").glob("step_*")] == ["step_000042"]


@pytest.mark.usefixtures("a_minute_a_step")
def test_a_run_ends_when_its_minutes_are_over(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([*words, "--steps", "90", "--eval-every", "0", "--max-minutes", "4.5", "--out", str(tmp_path / "a")]) == 0
    )
    assert "stopped after step 5 of 90: 4.5 minutes" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert "validation_loss" in lines[-1]  # or it would not be known whether it is the best
    assert (tmp_path / "a" / "final").is_dir()
    assert (tmp_path / "a" / "compare.json").is_file()


@pytest.mark.parametrize("value", ["0m", "m", "1h", "-1", "1e3m", "10 m", ""])
def test_what_is_no_time_between_saves(value: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--save-every", value]) == 2
    assert "save_every is" in capsys.readouterr().err


def test_a_number_of_steps_may_be_given_as_before() -> None:
    assert TrainConfig.from_dict({"steps": 1, "save_every": 500}).save_every == 500
    with pytest.raises(InputError, match=r"save_every is 1\.5; it must be int or str"):
        TrainConfig.from_dict({"steps": 1, "save_every": 1.5})


# Space ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--keep 3", "--keep 0", "--keep-last", "--keep 2 --lora-rank 24"])
def test_the_space_that_saves_take(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """What is in the folder at any moment is about what was said."""
    most, said = [0], []

    def measured(call: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            call(*arguments, **named)
            found = [file.stat().st_size for file in (tmp_path / "run").rglob("*.pt") if file.is_file()]
            most[0] = max(most[0], sum(found))

        return called

    computed = space.bytes_of_saves
    monkeypatch.setattr("minift.runs.common.bytes_of_saves", lambda *a, **n: said.append(computed(*a, **n)) or said[-1])
    monkeypatch.setattr("minift.storage.atomic.flush_path", measured(lambda path: None))
    run = words[: words.index("--lora-rank")] + words[words.index("--lr") :]
    assert main([*run, "--save-every", "1", *flags.split(), "--compare", "0", "--out", str(tmp_path / "run")]) == 0
    assert 0.6 * said[0] < most[0] < 1.2 * said[0]  # the files of so small tensors have much structure around them


def test_a_disk_without_room_is_refused_before_the_first_step(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(train, "train_step", None)
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"saves need up to \d+ kB in .*, where 10\d kB are free; choose another --out", error)


def test_a_resumed_run_may_use_the_room_that_it_has_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"x" * 600)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    space.check_space(tmp_path, 1_000)


def test_an_overflow_does_not_lose_its_window() -> None:
    """A scaler that begins far too high leaves steps out: the same windows are trained in the end, each once."""
    config = TrainConfig(epochs=1, batch_size=2, dtype="float32", device="cpu", grad_accum=2)

    def windows(scale: float | None) -> tuple[list[Any], int]:
        batches = PairBatches(make_examples([3, 5, 2, 7, 4, 6, 3]), 2, 0, 0)
        state = start_state(small_model(std=1.0), batches, config)
        if scale is not None:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        taken = list(train.train(state, Plan.make(config, len(batches)), config))
        found = [[batch.tokens.tolist() for batch in step.window] for step in taken if step.result.stepped]
        return found, len(taken) - len(found)

    plain, none = windows(None)
    again, some = windows(2.0**127)
    assert again == plain
    assert none == 0 < some
