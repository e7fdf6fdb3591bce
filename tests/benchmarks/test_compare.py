"""The promise of `compare`: only what is alike is compared, both sides take turns in fresh processes, nothing is left.

Files are written here; the engine is driven by processes that do not exist and a clock that only they move. Two real
comparisons, of this checkout with itself, are ended by a signal.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import alike, commits, compare, history, record, workloads
from benchmarks.__main__ import main
from benchmarks.commits import Plan, Side
from minift.errors import InputError
from tests.helpers import ROOT

SETTING = {"config": "bundled", "batch_size": 2, "length": 64, "dtype": "float32", "device": "cpu"}


# Files ----------------------------------------------------------------------------------------------------------------


def result(path: Path, factor: float = 1.0, seed: int = 0, **changes: Any) -> Path:
    """A result with two rows and one of the machine, whose times are `factor` times as long in the first row."""
    draw = np.random.default_rng(seed)

    def seconds(center: float) -> list[float]:
        return [float(center * np.exp(0.002 * draw.standard_normal())) for _ in range(100)]

    rows = [
        record.row("norm/used/both/warm", seconds(1e-3 * factor)),
        record.row("loss/used/both/warm", seconds(2e-3)),
        record.row("machine/product", seconds(5e-3 * changes.pop("machine_factor", 1.0))),
    ]
    whole = {"benchmark": "ops", **record.environment(), "config": "stories15m", "dtype": "float32", "device": "cpu"}
    record.write(str(path), {**whole, "batch_size": 16, "length": 256, "rows": rows})
    values = json.loads(path.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (values[part] if part else values)[name] = value
    path.write_text(json.dumps(values))
    return path


def called(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, words)])
    return main()


def verdicts(file: Path) -> dict[str, Any]:
    return {name: one["word"] for name, one in json.loads(file.read_text())["verdicts"].items()}


NORM, LOSS = "norm/used/both/warm", "loss/used/both/warm"


@pytest.mark.parametrize(
    ("factor", "word", "code"), [(1.1, "slower", 1), (0.9, "faster", 0), (1.0, "same", 0), (1.02, "undecided", 0)]
)
def test_two_files(
    factor: float, word: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old, new = result(tmp_path / "a.json"), result(tmp_path / "b.json", factor, seed=1)
    assert called(monkeypatch, "compare", old, new, "--json", tmp_path / "c.json") == code
    assert verdicts(tmp_path / "c.json") == {NORM: word, LOSS: "same"}
    said = capsys.readouterr().out
    assert "b.json, against a.json, is " in said
    assert ("more turns" in said or "another --band" in said) == (word == "undecided")
    strict = called(monkeypatch, "compare", old, new, "--strict")
    assert strict == int(word in ("slower", "undecided"))
    assert called(monkeypatch, "compare", old, new, "--rows", LOSS) == 0


def test_a_file_is_the_same_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a noisy one, and one of schema 1."""
    noisy = result(tmp_path / "a.json")
    values = json.loads(noisy.read_text())
    values["rows"][0]["samples"] = [[None, 10.0 ** (i % 5), 1, i, []] for i in range(20)]
    noisy.write_text(json.dumps(values))
    for file in (noisy, ROOT / "benchmarks" / "results" / "ops-cpu.json"):
        assert called(monkeypatch, "compare", file, file, "--strict", "--json", tmp_path / "c.json") == 0
        assert set(verdicts(tmp_path / "c.json").values()) == {"same"}


UNLIKE = [
    ({"machine__cpu": "another"}, "cpu is"),
    ({"machine__threads": 77}, "threads is"),
    ({"machine__gpu": {"name": "NVIDIA H200"}}, "gpu is not said and NVIDIA H200"),
    ({"settings__dtype": "bfloat16"}, "dtype is float32 and bfloat16"),
    ({"settings__device": "cuda"}, "device is cpu and cuda"),
    ({"settings__shape": "stories42m"}, "shape is stories15m and stories42m"),
    ({"settings__batch_size": 8}, "batch_size is 16 and 8"),
    ({"settings__length": 8}, "length is 256 and 8"),
    ({"benchmark": "step"}, "benchmark is ops and step"),
]


@pytest.mark.parametrize(("changes", "said"), UNLIKE, ids=lambda value: next(iter(value)) if value is dict else "")
def test_what_is_not_alike_is_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old, new = result(tmp_path / "a.json"), result(tmp_path / "b.json", **changes)
    assert called(monkeypatch, "compare", old, new) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "a.json" in line
    assert "b.json" in line


def test_another_machine_speed_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    old, new = result(tmp_path / "a.json"), result(tmp_path / "b.json", 1.5, seed=1, machine_factor=1.07)
    assert called(monkeypatch, "compare", old, new, "--json", tmp_path / "c.json") == 0
    assert set(verdicts(tmp_path / "c.json").values()) == {"undecided"}
    said = capsys.readouterr().out
    assert re.search(r"the machine itself differed by [67]\.\d%; run both in turns: compare --commits", said)
    assert re.search(rf"^{NORM} +- +- +undecided ", said, re.MULTILINE)  # 1.5 would be read as a result
    assert json.loads((tmp_path / "c.json").read_text())["verdicts"][NORM]["ratio"] is None


def test_results_without_samples_are_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    old = ROOT / "benchmarks" / "results" / "ops-cpu.json"
    values = json.loads(old.read_text())
    values["operations"]["norm"]["phases"]["both"]["variants"]["used"]["seconds"]["median"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(values))
    assert called(monkeypatch, "compare", old, tmp_path / "b.json", "--json", tmp_path / "c.json") == 0
    words = verdicts(tmp_path / "c.json")
    assert [name for name, word in words.items() if word != "same"] == [
        "operations/norm/phases/both/variants/used/seconds"
    ]
    assert "compare --commits" in capsys.readouterr().out


def test_rows_of_one_file_alone_are_named(tmp_path: Path) -> None:
    rows = [record.row("both", [1.0] * 9), record.row("old alone", [1.0] * 9), record.row("memory", [5.0], unit="B")]
    old = {"schema": 2, "rows": rows}
    new = {"schema": 2, "rows": [record.row("both", [1.0] * 9), record.row("new alone", [1.0] * 9)]}
    found, missing = compare.compare_files(old, new, None, 0.02)
    assert list(found) == ["both"]
    assert missing == {
        "old alone": "only in the old one",
        "new alone": "only in the new one",
        "memory": "its unit is B, which is no time",
    }


def test_a_row_that_is_missing_because_a_function_was_wrong_says_so() -> None:
    rows = [record.row(name, [1.0] * 9) for name in ("norm/used/both/warm", "norm/mine/both/warm")]
    good = {"schema": 2, "rows": rows, "added": {"mine": {"file": "mine.py"}}}
    wrong = {"schema": 2, "rows": rows[:1], "added": {"mine": {"file": "mine.py", "error": "off by\n0.3"}}}
    for old, new, which in ((good, wrong, "old"), (wrong, good, "new")):
        _, missing = compare.compare_files(old, new, None, 0.02)
        said = f"only in the {which} one; in the other, mine was wrong and got no time: off by 0.3"
        assert missing == {"norm/mine/both/warm": said}


def test_the_same_result_twice_is_remarked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one, other = result(tmp_path / "a.json"), result(tmp_path / "b.json", seed=1)
    (tmp_path / "copies").mkdir()
    for content, remarked in ((one, True), (other, False)):
        (tmp_path / "copies" / "a.json").write_text(content.read_text())
        assert called(monkeypatch, "compare", one, tmp_path / "copies" / "a.json") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith("; both are the same result") == remarked
        assert (str(tmp_path) in last) != remarked  # two results of one name are told apart by their folders


def test_a_verdict_is_no_result_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    a, b = result(tmp_path / "a.json"), result(tmp_path / "b.json", benchmark="compare")
    for files in ((b, b), (a, b)):
        assert called(monkeypatch, "compare", *files) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "b.json: a result of compare itself" in line
        assert "compare --commits OLD NEW" in line


FULL = Path("/dev/full")
has_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@has_full
def test_a_full_disk_is_not_called_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    a = result(tmp_path / "a.json")
    assert called(monkeypatch, "compare", a, a, "--json", FULL) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "benchmarks: error: /dev/full: the result cannot be written: No space left on device"


@has_full
def test_an_output_that_is_full_is_not_called_slower(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json")
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "benchmarks", "compare", str(a), str(a)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "benchmarks: error: standard output: cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_the_help_explains_words_and_codes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        called(monkeypatch, "compare", "--help")
    said = capsys.readouterr().out
    for start in ("faster, slower", "same", "undecided", "0", "1", "2", "130"):
        assert re.search(rf"^  {start} +\w", said, re.MULTILINE), start


WRONG = [
    ([], "give two files, or --commits OLD NEW, or --history DIR"),
    (["a.json"], "give two files"),
    (["a.json", "b.json", "--history", "."], "give two files"),
    (["a.json", "b.json", "--band", "0"], "--band is 0"),
    (["a.json", "b.json", "--plot", "x.png"], "--plot is for --history"),
    (["a.json", "b.json", "--rows", "nrom/used/both/warm"], "did you mean norm/used/both/warm?"),
    (["--commits", ".", ".", "--rows", "nrom"], "did you mean norm?"),
    (["--commits", ".", ".", "--budget", "0"], "--budget is 0"),
    (["--commits", ".", "tests"], "tests: there is no minift/ in it"),
    (["--commits", ".", "nonesuch"], "no such commit: nonesuch (in this repository)"),
    (["--history", "nonesuch"], "--history nonesuch: not a folder"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a.json", "b.json"):
        result(tmp_path / name)
    places = [str(tmp_path / word) if word.endswith(".json") else word for word in words]
    assert called(monkeypatch, "compare", *places) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# The engine -----------------------------------------------------------------------------------------------------------


class FakeNursery:
    """Processes whose samples take what a function says, on a clock that only they move."""

    def __init__(self, seconds: Callable[[str, str], float], lacks: Mapping[str, str] | None = None) -> None:
        self.now, self.log, self.seconds = 0.0, list[tuple[str, ...]](), seconds
        self.lacks, self.alive, self.seeds = lacks or {}, 0, list[int]()

    def child(self, side: Side, seed: int, names: Sequence[str], setting: Mapping[str, Any], units: float = 0) -> Any:
        self.log.append(("start", side.name, *names))
        self.seeds.append(seed)
        self.alive += 1
        self.now += 0.1
        missing = {name: "ImportError: no such thing" for name in names if self.lacks.get(name) == side.name}
        ready = {"seconds": {name: 0.0005 for name in names if name not in missing}, "missing": missing}

        def sample(name: str, calls: int, burst: int = 1) -> dict[str, Any]:
            self.log.append((side.name, name))
            self.now += 0.01
            seconds = self.seconds(side.name, name)
            return {"at": self.now, "seconds": 9.0, "cpu": seconds, "preempted": False}

        class Child(SimpleNamespace):
            def __enter__(self) -> Any:
                return self

            def __exit__(child, *error: object) -> None:  # noqa: N805
                self.alive -= 1

        return Child(answer=lambda: ready, sample=sample)


SIDES = [Side("old", Path()), Side("new", Path())]


def test_a_pair_of_processes_takes_turns_in_an_order_that_is_reversed() -> None:
    nursery = FakeNursery(lambda side, name: 1.0)
    plan = Plan(("norm",), SETTING, budget=4.0)
    measured = commits.measure(nursery, SIDES, plan, clock=lambda: nursery.now)  # type: ignore[arg-type]
    starts = [entry[1] for entry in nursery.log if entry[0] == "start"]
    assert starts[:6] == ["old", "new", "new", "old", "old", "new"]
    first = [entry[0] for entry in nursery.log[2 : nursery.log.index(("start", "new", "norm"), 2)]]
    assert first[:6] == ["old", "new", "new", "old", "old", "new"]
    assert nursery.alive == 0
    assert len(set(nursery.seeds)) == len(nursery.seeds)  # each process has a layout of its own
    assert measured.verdicts["norm"].word == "same"
    assert sum(measured.pairs["norm"]) == len(measured.samples["norm"][0]) == len(measured.samples["norm"][1])


def test_a_decided_row_is_measured_no_more_and_the_others_go_on() -> None:
    draw = np.random.default_rng(0)

    def seconds(side: str, name: str) -> float:
        noise = 0.001 if name == "norm" else 0.5
        return float((1.5 if side == "new" else 1.0) ** (name == "norm") * np.exp(noise * draw.standard_normal()))

    nursery = FakeNursery(seconds)
    plan = Plan(("norm", "loss"), SETTING, budget=20.0)
    measured = commits.measure(nursery, SIDES, plan, clock=lambda: nursery.now)  # type: ignore[arg-type]
    assert measured.verdicts["norm"].word == "slower"
    assert measured.verdicts["norm"].ratio == pytest.approx(1.5, rel=1e-2)
    assert measured.verdicts["loss"].word == "undecided"
    assert measured.looks == 4
    assert len(measured.pairs["norm"]) < len(measured.pairs["loss"])
    assert 20 <= nursery.now < 22  # the budget, and what a pair takes that had begun


def test_what_a_side_lacks_is_left_out_by_name() -> None:
    nursery = FakeNursery(lambda side, name: 1.0, {"decode": "old"})
    plan = Plan(("norm", "decode"), SETTING, budget=2.0)
    measured = commits.measure(nursery, SIDES, plan, clock=lambda: nursery.now)  # type: ignore[arg-type]
    assert list(measured.verdicts) == ["norm"]
    assert measured.missing == {"decode": "old lacks it (ImportError: no such thing)"}
    alone = Plan(("decode",), SETTING, budget=2.0)
    with pytest.raises(InputError, match="nothing to compare: decode: old lacks it"):
        commits.measure(nursery, SIDES, alone, clock=lambda: nursery.now)  # type: ignore[arg-type]
    assert nursery.alive == 0


def test_too_small_a_budget_is_undecided_and_says_so() -> None:
    nursery = FakeNursery(lambda side, name: 1.0)
    plan = Plan(("norm",), SETTING, budget=0.01)
    measured = commits.measure(nursery, SIDES, plan, clock=lambda: nursery.now)  # type: ignore[arg-type]
    assert measured.verdicts["norm"].word == "undecided"
    assert "larger --budget" in measured.verdicts["norm"].needs


def test_caches_that_a_second_turn_in_a_row_finds_full_cancel() -> None:
    """Turns are old, new, new, old, and so on: who is asked twice in a row is a quarter faster the second time."""
    measured = commits.Measured(samples={"a": ([], [])}, pairs={"a": [0]}, calls={"a": 1}, bursts={"a": 1})
    asked: list[str] = []

    def sample(which: str) -> dict[str, Any]:
        again = asked[-1:] == [which]
        asked.append(which)
        seconds = (0.75 if again else 1.0) * (1.1 if which == "new" else 1.0)
        return {"at": 0.0, "seconds": seconds, "cpu": seconds, "preempted": False}

    for turn in range(9):
        children = {which: SimpleNamespace(sample=lambda *_, which=which: sample(which)) for which in commits.BOTH}
        commits._take_turn(children, "a", turn, measured, "cpu")  # type: ignore[arg-type]
    (ratios,) = measured.ratios("a")
    assert len(ratios) == 4
    assert ratios[1:] == pytest.approx([1.1] * 3)


def test_disturbed_turns_are_left_out_while_enough_are_left() -> None:
    one = {"at": 0.0, "seconds": 1.0, "cpu": 1.0}
    for disturbed, counted in ((0, 4), (5, 1), (7, 4)):  # of four ratios, each of two turns
        measured = commits.Measured(samples={"a": ([], [])}, pairs={"a": [0]}, calls={"a": 1}, bursts={"a": 1})
        for turn in range(8):
            answers = {"old": {**one, "preempted": turn < disturbed}, "new": {**one, "preempted": False}}
            children = {which: SimpleNamespace(sample=lambda *_, which=which, a=answers: a[which]) for which in answers}
            commits._take_turn(children, "a", turn, measured, "cpu")  # type: ignore[arg-type]
        assert [len(turns) for turns in measured.ratios("a")] == [counted]


def test_what_serves_a_workload_needs_little_of_the_version_that_is_measured() -> None:
    """An older minift lacks much: its workloads are left out by name, and the process that serves them still runs."""
    code = "import sys, benchmarks.workloads; print(*sorted(name for name in sys.modules if name.startswith('minift')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["minift", "minift.errors"]


def test_a_sample_is_the_median_of_what_nothing_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, switches = iter([5.0, 1.0, 3.0, 2.0]), iter([0, 1, 1, 1, 1, 1, 1, 1])  # the first sample was interrupted
    monkeypatch.setattr(workloads, "seconds_a_call", lambda *_: next(taken))
    monkeypatch.setattr(workloads, "preemptions", lambda: next(switches))
    found = workloads.sample(lambda: None, 1, 4, "cpu")
    assert found["seconds"] == 2.0
    assert found["preempted"] is False


# Versions and processes -----------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_side_is_what_the_commit_has_and_the_checkout_is_not_touched(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "minift").mkdir(parents=True)
    (repository / "minift" / "__init__.py").write_text("VERSION = 1\n")
    git(tmp_path, "init", "-q", str(repository))
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "one")
    (repository / "minift" / "__init__.py").write_text("VERSION = 2\n")  # not committed
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    sides = [
        commits.make_side(version, tmp_path / which, repository)
        for which, version in (("old", "HEAD"), ("new", str(repository)))
    ]
    texts = [(side.root / "minift" / "__init__.py").read_text() for side in sides]
    assert texts == ["VERSION = 1\n", "VERSION = 2\n"]
    assert sides[0].name == git(repository, "rev-parse", "--short", "HEAD").strip()
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    for side in sides:
        assert (side.root / "benchmarks" / "commits.py").read_bytes() == Path(commits.__file__).read_bytes()
    git(repository, "branch", "faster-loss")
    for wrong, said in (("nonesuch", ""), ("fastr-loss", " (did you mean faster-loss?)"), ("--all", "")):
        with pytest.raises(InputError) as error:
            commits.make_side(wrong, tmp_path / f"no {wrong}", repository)
        assert str(error.value) == f"no such commit: {wrong} (in this repository){said}"
    with pytest.raises(InputError, match="not a git repository"):
        commits.make_side("HEAD", tmp_path / "fourth", tmp_path)


def processes_with(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_behind(number: signal.Signals, tmp_path: Path) -> None:
    """Fresh processes of both sides are measured; a signal to the command ends them all."""
    words = ["compare", "--commits", ".", ".", "--rows", "norm", "--budget", "4000", "--dtype", "float32"]
    command = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    assert "old: the working tree" in command.stdout.readline()
    end = time.monotonic() + 120
    while len(processes_with(str(tmp_path))) < 3 and time.monotonic() < end:  # the parent and two children
        time.sleep(0.05)
    assert len(processes_with(str(tmp_path))) >= 3
    command.send_signal(number)
    _, errors = command.communicate(timeout=60)
    while processes_with(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_with(str(tmp_path)) == []
    if number == signal.SIGINT:
        assert (command.returncode, errors) == (130, "benchmarks: interrupted\n")
        assert list(tmp_path.iterdir()) == []


# The experiment -------------------------------------------------------------------------------------------------------


def test_a_slowdown_is_so_many_units_of_work_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[float]()
    work = SimpleNamespace(mul_=done.append)
    monkeypatch.setattr(workloads, "torch", SimpleNamespace(ones=lambda n: work))
    call = workloads.with_extra(lambda: "result", 2.25)
    assert {call() for _ in range(8)} == {"result"}
    assert len(done) == 18


def test_units_are_counted_out() -> None:
    """A call takes 1, and the 2,000 units 4: 3 % of a call are 15 units."""
    nursery = FakeNursery(lambda side, name: 4.0 if name == "units" else 1.0)
    units, _ = alike.count_out(nursery, SIDES[1], 0.03, Plan(("norm",), SETTING, 1.0))  # type: ignore[arg-type]
    assert units == pytest.approx(15)


def test_the_experiment_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = iter(["same", "slower", "undecided", "same"])
    rows = list[str]()

    def one(nursery: Any, sides: Any, case: alike.Case, plan: Plan) -> dict[str, Any]:
        rows.append(plan.names[0])
        values = {"ratio": 1.0, "low": 0.9, "high": 1.1, "pairs": 5, "turns": 60, "word": next(words)}
        return {"case": {"slowdown": case.slowdown, "load": case.load}, "row": plan.names[0], **values,
                "turn_deviation": 0.1, "seconds": 2.0}  # fmt: skip

    class Nothing(argparse.Namespace):
        def __enter__(self) -> "Nothing":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(alike, "_one", one)
    monkeypatch.setattr(alike, "Nursery", lambda *_: Nothing())
    monkeypatch.setattr(commits, "make_side", lambda version, target: Side("", target))
    command = ["alike", "--rows", "norm", "loss", "--json", tmp_path / "r.json", "--comparisons"]
    assert called(monkeypatch, *command, "1") == 0
    assert called(monkeypatch, *command, "3") == 0
    assert rows == ["norm", "loss", "norm"]
    assert called(monkeypatch, *command, "3") == 0  # nothing is left to do
    assert len(rows) == 3
    (case,) = json.loads((tmp_path / "r.json").read_text())["table"].values()
    assert case == {"comparisons": 3, "faster": 0, "slower": 1, "same": 1, "undecided": 1, "seconds": 2.0}
    assert "33.3%" in capsys.readouterr().out
    assert called(monkeypatch, *command, "4", "--budget", "9") == 2
    assert "its budget is 8.0, this command's 9.0" in capsys.readouterr().err
    assert called(monkeypatch, "alike", "--load") == 2


# The history ----------------------------------------------------------------------------------------------------------


def test_a_history_is_a_figure_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    image = pytest.importorskip("matplotlib.image")
    folder = tmp_path / "results"
    folder.mkdir()
    for i, factor in enumerate((1.0, 1.2, 0.8)):
        result(folder / f"{i}.json", factor, seed=i, commit=f"c0ffee{i}", began=1e9 + i)
    plot = tmp_path / "h.png"
    assert called(monkeypatch, "compare", "--history", folder, "--plot", plot) == 0
    assert f"{plot}: 3 rows of 3 results" in capsys.readouterr().out
    pixels = image.imread(plot)
    assert pixels.shape[0] > 200
    assert pixels.std() > 0.01
    assert called(monkeypatch, "compare", "--history", folder, "--plot", plot, "--rows", NORM) == 0
    assert f"{plot}: 1 row of 3 results\n" in capsys.readouterr().out
    assert called(monkeypatch, "compare", "--history", folder, "--plot", plot, "--rows", "nrom") == 2
    assert called(monkeypatch, "compare", "--history", tmp_path / "results", "--plot", tmp_path / "h.pdf") == 2


def test_results_of_one_commit_are_at_one_place() -> None:
    """The commit a is measured twice, b once between: the line has two places, and a's is the median of its results."""
    a, b = ("a", "1"), ("b", "2")
    points = [history.Point(at, code, s, None, "call") for at, code, s in ((1, a, 2.0), (2, b, 9.0), (3, a, 4.0))]
    assert history.through(points, [a, b]) == ([0, 1], [3.0, 9.0])
    x = history.places(points, [a, b])
    assert x[1] == 1
    assert x[0] < 0 < x[2] < 0.3
    assert x[0] + x[2] == pytest.approx(0)


def test_a_panel_says_what_its_seconds_are_for_and_has_room_for_its_bars() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    points = [history.Point(1, ("a", "1"), 2.0, (1.0, 9.0), "TFLOP"), history.Point(2, ("b", "2"), 3.0, None, "TFLOP")]
    history._panel(axis, "machine/product", {"line": points}, {"line": ("#000000", "o")})
    assert axis.get_ylabel() == "s per TFLOP"
    assert axis.get_ylim()[1] > 9.0
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b"]
    pyplot.close(figure)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_history_leaves_out_what_is_no_result_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    folder, plot = tmp_path / "results", tmp_path / "h.png"
    folder.mkdir()
    for i in range(8):
        (folder / f"note{i}.json").write_text("{}")
    (folder / "cut.json").write_text("{")
    result(folder / "verdict.json", benchmark="compare")
    result(folder / "timeless.json", began="today")
    (folder / "old.json").write_text((ROOT / "benchmarks" / "results" / "ops-cpu.json").read_text())
    os.mkfifo(folder / "pipe.json")
    assert called(monkeypatch, "compare", "--history", folder, "--plot", plot) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with samples; left out: " in line
    assert not plot.exists()
    result(folder / "new.json")
    assert called(monkeypatch, "compare", "--history", folder, "--plot", plot) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{plot}: 3 rows of 1 result; left out: ")
    for said in (
        "cut.json (1: not valid JSON",
        "note0.json, note1.json, note2.json, note3.json, note4.json, note5.json and 2 more (not a result",
        "old.json (no samples",
        "pipe.json (not a regular file",
        "timeless.json (began is 'today'",
        "verdict.json (a result of compare",
    ):
        assert said in line
