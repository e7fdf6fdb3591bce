"""The promise of `runs/steps.py` against kill -9: k steps, a kill and N - k more steps are N steps, bit for bit.

Real processes are killed while they train: at random moments, and at each single operation that changes the disk.
They are resumed until they are done, and compared with a run that was never killed: every number of every step, the
weights, the optimizer's moments, the place in the data and the state of torch's random numbers, in all their bits. Step
folders are damaged byte by byte, and must be named and passed over.

Starting Python with torch takes seconds, so all runs are forked from one process that has imported everything.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import train
from minift.cli import main
from minift.data import encode
from minift.data.batches import PageBatches
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.runs import common, loop
from minift.runs.folder import read_run
from minift.runs.steps import check_step, step_folders
from minift.storage.checksums import CHECKSUMS
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import IMPORTED_BY_RUNS, ROOT, SMALL, completed, write_jsonl

pytestmark = pytest.mark.slow
TIMES = ("seconds", "tokens_per_second")  # the only numbers in which a resumed run may differ
PATIENCE = 60  # seconds until the workers of a killed run must have noticed
KILLS = 5  # of each run that is cut at random


# A run in a process of its own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hooks:
    """Changes to a run, made inside its process.

    Attributes:
        chunk: characters that are encoded at a time. 1 encodes each document alone, so that only a row's ids wait.
        draw: draw a number from torch's own generator in each step, as dropout does.
        cut: (function, its n-th call, "before" or "half"): kill this process there.
        stop: the step in which this process sends itself SIGTERM.
        watch: a file that lists the step folders before each removal and after each save.
    """

    chunk: int | None = 1
    draw: bool = False
    cut: tuple[str, int, str] | None = None
    stop: int = 0
    watch: Path | None = None


def child(words: list[str], log: Path, hooks: Hooks) -> None:
    """Run `minift` with its hooks: the body of a forked process."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a process that was not forked
    torch.set_num_threads(1)  # so that every sum is taken in the same order
    if hooks.chunk:
        encode.CHUNK_CHARACTERS = hooks.chunk
    step = train.train_step

    def watched_step(state: Any, *arguments: Any) -> Any:
        if hooks.draw:
            torch.rand(1)
        if state.step + 1 == hooks.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *arguments)

    train.train_step = watched_step
    train_all = common.run_steps

    def watched_train(*arguments: Any) -> bool:
        done = train_all(*arguments)
        write_random(random_of(arguments[5]))  # a run that is killed after this is not trained again
        return done

    common.run_steps = watched_train
    if hooks.cut:
        cut(*hooks.cut)
    if hooks.watch:
        watch(hooks.watch)
    code = main(words)
    write_random(log.with_suffix(".random"))
    sys.exit(code)


def write_random(file: Path) -> None:
    """Write the state of torch's random numbers, without the functions that `cut` replaces."""
    with file.open("wb") as opened:
        opened.write(random_state(torch.default_generator))


def random_state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def random_of(out: Path) -> Path:
    """Return the file with the state of torch's random numbers at the end of the training in `out`."""
    return out.with_name(f"{out.name}.random")


def cut(name: str, n: int, moment: str) -> None:
    """Replace a function so that its `n`-th call is the last thing that this process does, in whole or in part."""
    owner = {"os": os, "shutil": shutil, "torch": torch, "Path": Path}[name.split(".")[0]]
    original = getattr(owner, name.split(".")[1])
    calls = 0

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < n:
            return original(*arguments, **keywords)
        if moment == "half" and name == "shutil.rmtree" and Path(arguments[0]).is_dir():
            files = sorted(Path(arguments[0]).iterdir())
            for file in files[: -(-len(files) // 2)]:
                file.unlink()
        elif moment == "half" and name == "torch.save":
            original(*arguments, **keywords)
            arguments[1].flush()
            os.truncate(arguments[1].fileno(), arguments[1].tell() // 2)
        elif moment == "half" and name.startswith("Path.write"):
            original(arguments[0], arguments[1][: len(arguments[1]) // 2], **keywords)
        elif moment == "torn":  # the file is open, and nothing written
            original(arguments[0], arguments[1][:0], **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name.split(".")[1], deadly)


def watch(file: Path) -> None:
    """Write down which step folders there are before each removal and after each save."""
    rename, save_step = Path.rename, loop.save_step

    def note(what: str, run: Path, name: str) -> None:
        folders = step_folders(run)
        for folder in folders:
            check_step(folder)  # each folder with a step's name is whole
        with file.open("a") as lines:
            lines.write(json.dumps([what, name, [folder.name for folder in folders]]) + "\n")

    def noted_rename(self: Path, target: Path) -> Path:
        if self.name.startswith("step_"):
            note("remove", self.parent, self.name)
        return rename(self, target)

    def noted_save(run: Path, *arguments: Any) -> Path:
        folder = save_step(run, *arguments)
        note("saved", run, folder.name)
        return folder

    Path.rename, loop.save_step = noted_rename, noted_save  # type: ignore[method-assign]


class Zygote:
    """A process that starts runs by forking itself.

    Attributes:
        killed: the logs of runs that were killed, by which their workers are found.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*IMPORTED_BY_RUNS, __name__])
        self.killed: list[Path] = []
        self._logs = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()

    def start(self, words: list[Any], hooks: Hooks) -> tuple[ForkServerProcess, Path]:
        """Start a run; return its process, and the file that gets what it prints."""
        self._logs += 1
        log = self.folder / f"{self._logs}.log"
        process = self.context.Process(target=child, args=([str(word) for word in words], log, hooks))
        process.start()
        return process, log

    def run(
        self, words: list[Any], hooks: Hooks = Hooks(), after: float | None = None, training: bool = False
    ) -> tuple[int, str, Path]:
        """Start a run and wait for its end; return its exit code, what it printed, and its log.

        Args:
            after: seconds after which it is killed, if it has not ended.
            training: count them from its first step, not from its start.
        """
        process, log = self.start(words, hooks)
        while training and process.exitcode is None and not began(log):
            time.sleep(0.002)
        process.join(after)
        if process.exitcode is None and after is not None:
            process.kill()
        process.join(240)
        code = process.exitcode
        assert code is not None, "the run hangs"
        if code == -signal.SIGKILL:
            self.killed.append(log)
        printed = log.read_text() if log.exists() else ""
        assert "Traceback" not in printed, printed
        return code, printed, log


def began(log: Path) -> bool:
    return log.exists() and b"training:" in log.read_bytes()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    check_that_workers_end(zygote.killed)


def check_that_workers_end(logs: list[Path]) -> None:
    """Wait until the workers of killed runs have ended. End those that do not, and fail."""
    deadline = time.monotonic() + PATIENCE
    while (left := living(logs)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "workers have outlived their run"


def living(logs: list[Path]) -> list[int]:
    """Return the processes that still write to one of these logs, whatever their parent is now."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if output.readlink() in logs:
                found.append(int(output.parts[2]))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """Return for each job the words of a run, without its length. An epoch is some 45 rows; one record is unusable."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = random.Random(1)
    (folder / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(folder)
    for shard in range(4):
        pages: list[Any] = [
            {"text": f"Page {shard}.{i} says: {' and '.join(str(draw.randrange(999)) for _ in range(1 + i % 4))}."}
            for i in range(30)
        ]
        if shard == 2:
            pages.insert(9, b"{not json")
        write_jsonl(folder / f"pages-{shard}.{'json.gz' if shard % 2 else 'jsonl'}", pages)
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(24)]
    data, test = write_jsonl(folder / "pairs.jsonl", pairs[:23]), write_jsonl(folder / "test.jsonl", pairs[23:])
    pretrain = ["pretrain", "--config", folder / "shape.json", "--data", folder / "pages-*", "--tokenizer", folder]
    pretrain += ["--batch-size", 2, "--max-length", 40, "--shuffle-buffer", 16, "--lr", 3e-3]
    finetune = ["finetune", "--model", small_checkpoint, "--data", data, "--test", test, "--batch-size", 4]
    return {
        "pretrain": [str(word) for word in (*pretrain, "--device", "cpu")],
        "finetune": [str(word) for word in (*finetune, "--device", "cpu")],
    }


# Comparing ------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value that equals another one only if all its bits do."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return type(value).__name__, repr(value)


def difference(a: Any, b: Any, where: str = "") -> str:
    """Return where two values made by `plain` differ, or an empty text."""
    if a == b:
        return ""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(difference(a[key], b[key], f"{where}.{key}") for key in a if a[key] != b[key])
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"{where}: {str(a)[:200]} is not {str(b)[:200]}"


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def following(folder: Path, count: int = 60) -> list[Any]:
    """Return the batches that follow a step folder: what its data state means, however it is written."""
    _, given, config = read_run(folder.parent)
    stream = DocumentStream(given["data"], seed=config.seed, shuffle_buffer=config.shuffle_buffer)
    stream.skipped.strict = False
    tokenizer = load_tokenizer(given["tokenizer"])
    batches = PageBatches(stream, tokenizer, config.batch_size, config.max_length, isolate=config.isolate)
    batches.load_state_dict(load(folder / "training.pt")["batches"])
    return [plain(vars(batch)) for batch in islice(batches, count)]


def assert_same_run(out: Path, whole: Path, steps: int, keep: int, same_place: bool = True) -> None:
    """Check that two runs have the same numbers at every step, weights, and newest step folders.

    Args:
        same_place: their data states are equal; otherwise the same batches must follow.
    """
    assert [record["step"] for record in metrics(out)] == list(range(1, steps + 1))
    assert difference(plain(metrics(out)), plain(metrics(whole)), "metrics") == ""
    assert difference(plain(load(out / "final/model.pt")), plain(load(whole / "final/model.pt")), "final") == ""
    assert (out / "final/config.json").read_bytes() == (whole / "final/config.json").read_bytes()
    names = [folder.name for folder in step_folders(whole)[:keep]]
    assert [folder.name for folder in step_folders(out)[:keep]] == names
    for name in names:
        check_step(out / name)
        assert difference(plain(load(out / name / "model.pt")), plain(load(whole / name / "model.pt")), name) == ""
        mine, theirs = (load(run / name / "training.pt") for run in (out, whole))
        if not same_place:
            assert following(out / name) == following(whole / name)
            mine["batches"] = theirs["batches"] = None
        assert difference(plain(mine), plain(theirs), name) == ""
    assert [path.name for path in out.glob(".*")] == []  # nothing is half written or half removed


def assert_all_whole(out: Path) -> None:
    for folder in step_folders(out):
        check_step(folder)


# Kills at random moments ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to be killed at random. `words` without --out; `resume` are the words added at each resume, in turn."""

    job: str
    words: str
    steps: int
    hooks: Hooks = Hooks()
    resume: tuple[str, ...] = ("",)


CASES = {
    "plain": Case("pretrain", "--save-every 3 --keep 0 --dtype float32", 80, Hooks(draw=True)),
    "workers, isolated, accumulated": Case(
        "pretrain", "--save-every 2 --keep 0 --dtype float32 --workers 2 --isolate --grad-accum 2", 45
    ),
    "bfloat16, recomputed, isolated, accumulated": Case(
        "pretrain",
        "--save-every 2 --keep 0 --dtype bfloat16 --checkpoint-activations --isolate --grad-accum 2",
        40,
        Hooks(chunk=900, draw=True),
    ),
    "workers, bfloat16, recomputed, long chunks": Case(
        "pretrain",
        "--save-every 3 --keep 0 --dtype bfloat16 --workers 2 --checkpoint-activations",
        60,
        Hooks(chunk=None),
    ),
    "workers come and go": Case(
        "pretrain",
        "--save-every 3 --keep 0 --dtype float32 --workers 2",
        70,
        Hooks(draw=True),
        ("--workers 0", "--workers 2", "--workers 1"),
    ),
    "pairs": Case("finetune", "--save-every 2 --keep 0 --dtype float32 --grad-accum 2", 50, Hooks(draw=True)),
}


@dataclass
class Outcome:
    """The result of a case.

    Attributes:
        resumed: the data states from which it was resumed.
    """

    out: Path
    whole: Path
    kills: int = 0
    resumed: list[dict[str, Any]] = field(default_factory=list)
    random: tuple[bytes, bytes] = (b"", b"")


Campaign = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def campaign(zygote: Zygote, inputs: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Run a case, once without and once with kills."""

    @cache
    def outcome(name: str) -> Outcome:
        case, folder = CASES[name], tmp_path_factory.mktemp("runs")
        words = [*inputs[case.job], *case.words.split(), "--keep", 3, "--steps", case.steps]
        code, printed, _ = zygote.run([*words, "--out", folder / "whole"], case.hooks)
        records = (folder / "whole" / "metrics.jsonl").stat().st_mtime
        took = records - (folder / "whole" / "config.json").stat().st_mtime
        assert code == 0, printed
        for attempt in range(3):  # a machine that was busy then may be so fast now that the run is done too soon
            result = killed(case, words, folder, random.Random(f"{name} {attempt}"), took / 2**attempt)
            if result.kills >= 2:
                break
        return result

    def killed(case: Case, words: list[Any], folder: Path, draw: random.Random, took: float) -> Outcome:
        shutil.rmtree(folder / "run", ignore_errors=True)
        result = Outcome(folder / "run", folder / "whole")
        code, legs = -signal.SIGKILL, 0
        while code != 0:
            out = result.out
            if (out / "config.json").exists():
                folders = step_folders(out)
                if folders:
                    result.resumed.append(load(folders[0] / "training.pt")["batches"])
                extra = case.resume[legs % len(case.resume)].split()
                now = [case.job, "--resume", "--out", out, *extra]
                legs += 1
            else:
                now = [*words, "--out", out]
            after = draw.uniform(0.0, took * 0.4) if result.kills < KILLS else None
            code, printed, _ = zygote.run(now, case.hooks, after, training=result.kills != 1)
            assert code in (0, -signal.SIGKILL), printed
            result.kills += code == -signal.SIGKILL
            assert_all_whole(out)
        result.random = (random_of(result.out).read_bytes(), random_of(result.whole).read_bytes())
        return result

    return outcome


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(campaign: Campaign, name: str) -> None:
    case, outcome = CASES[name], campaign(name)
    assert outcome.kills >= 2
    # With one document a chunk no more is read than a row needs; else a resumed run may have read further ahead.
    assert_same_run(outcome.out, outcome.whole, case.steps, 3, same_place=case.hooks.chunk == 1)
    assert (outcome.out / "report.html").is_file()  # also by a run that was killed when all but that was done
    mine, theirs = outcome.random
    assert mine == theirs
    assert (mine == random_state(torch.Generator().manual_seed(0))) != case.hooks.draw


def test_the_kills_were_many_and_fell_where_they_could_hurt(campaign: Campaign) -> None:
    outcomes = {name: campaign(name) for name in CASES}
    assert sum(outcome.kills for outcome in outcomes.values()) >= 20
    pages = [state for name, it in outcomes.items() if CASES[name].job == "pretrain" for state in it.resumed]
    assert len(pages) >= 10
    middle_of_a_row = [state for state in pages if len(state["ids"]) % 40]
    assert len(middle_of_a_row) >= 5
    middle_of_a_document = [state for state in pages if len(state["ids"]) and not state["firsts"][0]]
    assert len(middle_of_a_document) >= 5
    assert sum(len(state["stream"]["buffer"]) > 0 for state in pages) >= 5
    assert sum(len(state["stream"]["shards"]) > 1 for state in pages) >= 5
    assert len({state["stream"]["epoch"] for state in pages}) >= 2
    assert any(state["stream"]["skipped"]["skipped"] for state in pages)  # some are after an unusable record
    assert len({state["epoch"] for state in outcomes["pairs"].resumed}) >= 2


@pytest.mark.parametrize("chunk", [1, None])
def test_the_workers_of_a_killed_run_end_by_themselves(
    zygote: Zygote, inputs: dict[str, list[str]], tmp_path: Path, chunk: int | None
) -> None:
    """Also when they wait for a reader of what they have encoded: long chunks fill a pipe."""
    words = [*inputs["pretrain"], "--workers", 2, "--steps", 10_000, "--out", tmp_path / "run"]
    run, log = zygote.start(words, Hooks(chunk=chunk))
    deadline = time.monotonic() + 240
    while not (began(log) and len(living([log])) == 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    run.kill()
    check_that_workers_end([log])


def test_a_worker_whose_run_was_killed_before_it_began_ends_by_itself() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=encode._work, args=(theirs, ours, None))
    worker.start()
    ours.close(), theirs.close()  # as when the run is killed
    worker.join(PATIENCE)
    assert worker.exitcode == 0


# Kills at each operation of a save ------------------------------------------------------------------------------------

STEPS = 7  # saved at 2, 4 and 6; the last step is not, so that a run resumed from 6 has something to do
DRAWING = Hooks(draw=True)


@pytest.fixture(scope="module")
def words(inputs: dict[str, list[str]]) -> list[str]:
    return [*inputs["pretrain"], "--dtype", "float32", "--save-every", "2", "--keep", "0", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def whole(zygote: Zygote, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run that was never killed, with all its step folders."""
    out = tmp_path_factory.mktemp("short") / "whole"
    code, printed, _ = zygote.run([*words, "--out", out], DRAWING)
    assert code == 0, printed
    assert [folder.name for folder in step_folders(out)] == ["step_000006", "step_000004", "step_000002"]
    return out


def as_of(whole: Path, out: Path, step: int) -> Path:
    """Make the folder of a run as a kill leaves it, one step after its newest step folder."""
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    for folder in step_folders(whole):
        if int(folder.name[5:]) <= step:
            shutil.copytree(folder, out / folder.name)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[: step + 1]))
    return out


OPERATIONS = {  # and the least number of calls at which a resumed run, which saves once and ends, must have been killed
    ("os.fsync", "before"): 12,
    ("os.rename", "before"): 3,
    ("os.replace", "before"): 1,
    ("shutil.rmtree", "before"): 3,
    ("shutil.rmtree", "half"): 3,
    ("torch.save", "before"): 1,
    ("torch.save", "half"): 1,
    ("Path.write_text", "torn"): 4,
    ("Path.write_text", "half"): 4,
    ("Path.write_bytes", "half"): 2,
}


def cut_everywhere(
    zygote: Zygote, whole: Path, folder: Path, operation: str, moment: str, prepare: Callable[[Path], Path]
) -> int:
    """Kill a resumed run at each call of an operation, resume it, and compare. Return the number of kills.

    Args:
        prepare: make the folder of a run.
    """
    n, dead = 0, True
    while dead:
        n += 1
        out = prepare(folder / f"{n}")
        resume = ["pretrain", "--resume", "--keep", 2, "--out", out]
        code, printed, _ = zygote.run(resume, replace(DRAWING, cut=(operation, n, moment)))
        dead = code == -signal.SIGKILL
        if dead:
            code, printed, _ = zygote.run(resume, DRAWING)
        assert code == 0, f"{operation} {n}: {printed}"
        assert_same_run(out, whole, STEPS, keep=2)
    return n - 1


@pytest.mark.parametrize(("operation", "moment"), OPERATIONS)
def test_a_kill_at_any_operation_loses_nothing(
    zygote: Zygote, whole: Path, tmp_path: Path, operation: str, moment: str
) -> None:
    """The run is resumed after step 4: it cuts its metrics, saves step 6, removes step 2, and writes its model."""
    kills = cut_everywhere(zygote, whole, tmp_path, operation, moment, lambda out: as_of(whole, out, 4))
    assert kills >= OPERATIONS[operation, moment]


@pytest.mark.parametrize(("operation", "moment"), [("os.rename", "before"), ("shutil.rmtree", "half")])
def test_a_kill_while_a_damaged_folder_is_replaced_loses_nothing(
    zygote: Zygote, whole: Path, tmp_path: Path, operation: str, moment: str
) -> None:
    def prepare(out: Path) -> Path:
        as_of(whole, out, 6)
        os.truncate(out / "step_000006" / "model.pt", 1000)
        return out

    kills = cut_everywhere(zygote, whole, tmp_path, operation, moment, prepare)
    assert kills >= 4  # of the folder, its successor, the one that is not kept, and final/


def test_a_run_killed_while_it_began_can_be_resumed_or_begun_again(
    zygote: Zygote, whole: Path, words: list[str], tmp_path: Path
) -> None:
    """Its `config.json` may be there, and still be empty."""
    out = tmp_path / "run"
    first = replace(DRAWING, cut=("Path.write_text", 1, "torn"))
    assert zygote.run([*words, "--out", out], first)[0] == -signal.SIGKILL
    resumed, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
    if resumed != 0:
        begun, also, _ = zygote.run([*words, "--out", out], DRAWING)
        assert begun == 0, printed + also
    assert_same_run(out, whole, STEPS, keep=0)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a whole step folder, to be damaged."""
    shutil.copytree(whole / "step_000006", tmp_path / "step_000006")
    check_step(tmp_path / "step_000006")
    return tmp_path / "step_000006"


def files_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != CHECKSUMS)


def sha256sum_finds_it_whole(folder: Path) -> bool:
    """Return the verdict of the system's own tool; skip the test where there is none."""
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    done = completed(["sha256sum", "-c", CHECKSUMS], cwd=folder)
    return done.returncode == 0


def test_checksums_are_those_of_sha256sum_and_of_all_files(folder: Path) -> None:
    assert files_of(folder) == ["config.json", "model.pt", "tokenizer.model", "training.pt"]
    assert [line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()] == files_of(folder)
    assert sha256sum_finds_it_whole(folder)


def test_a_flipped_byte_anywhere_is_found(folder: Path) -> None:
    draw = random.Random(60)
    for i in range(200):
        file = folder / files_of(folder)[i % 4]
        data = file.read_bytes()
        place = draw.randrange(len(data))
        changed = data[place] ^ (1 << draw.randrange(8))  # a single bit
        file.write_bytes(data[:place] + bytes([changed]) + data[place + 1 :])
        with pytest.raises(InputError, match=rf"{file}: damaged"):
            check_step(folder)
        if i < 12:
            assert not sha256sum_finds_it_whole(folder)
        file.write_bytes(data)
        check_step(folder)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_file_that_was_cut_off_is_found(folder: Path, size: int) -> None:
    for name in files_of(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])
        with pytest.raises(InputError, match=rf"{folder / name}: damaged"):
            check_step(folder)
        assert not sha256sum_finds_it_whole(folder)
        (folder / name).write_bytes(data)


def test_a_file_that_is_gone_or_a_folder_is_found(folder: Path) -> None:
    for name in files_of(folder):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"{folder / name}: missing"):
            check_step(folder)
        assert not sha256sum_finds_it_whole(folder)
        (folder / name).mkdir()
        with pytest.raises(InputError, match=rf"{folder / name}: cannot be read: Is a directory"):
            check_step(folder)
        (folder / name).rmdir()
        (folder / name).write_bytes(data)
    (folder / CHECKSUMS).unlink()
    with pytest.raises(InputError, match=rf"{folder / CHECKSUMS}: cannot be read: No such file"):
        check_step(folder)


def test_any_changed_byte_of_the_checksums_is_found(folder: Path) -> None:
    """And named: the checksums, or the file of that line. Zeros are tried because damaged disks often return them."""
    for name in files_of(folder):  # small ones, so that the test takes no minute
        (folder / name).write_text(name)
    lines = [f"{sha256(name.encode()).hexdigest()}  {name}\n" for name in files_of(folder)]
    data = "".join(lines).encode()
    wrong = {}
    for place, byte in enumerate(data):
        for changed in {0, 0x0B, 0x20, byte ^ 1, byte ^ 0x80} - {byte}:
            said = said_of_checksums(folder, data[:place] + bytes([changed]) + data[place + 1 :])
            if not said.startswith(str(folder)):
                wrong[place, changed] = said
    assert wrong == {}
    assert said_of_checksums(folder, data) == "nothing"


def test_checksums_that_were_cut_off_are_found(folder: Path) -> None:
    data = (folder / CHECKSUMS).read_bytes()
    sizes = range(len(data) - 1)  # without its last line break it means the same
    assert [size for size in sizes if said_of_checksums(folder, data[:size]) == "nothing"] == []


def said_of_checksums(folder: Path, data: bytes) -> str:
    """Return the message of `check_step` for a folder with these checksums."""
    (folder / CHECKSUMS).write_bytes(data)
    try:
        check_step(folder)
    except InputError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return "nothing"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def zero_in_a_name(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"model.pt", b"mod\0l.pt"))


def cut_with_its_file(file: Path) -> None:
    """Remove the last line, and the file that it names."""
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    (file.parent / "training.pt").unlink()


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (flip, "model.pt"),
    (flip, "training.pt"),
    (lambda file: os.truncate(file, file.stat().st_size // 2), "training.pt"),
    (lambda file: os.truncate(file, 0), "config.json"),
    (Path.unlink, "tokenizer.model"),
    (Path.unlink, CHECKSUMS),
    (lambda file: os.truncate(file, 0), CHECKSUMS),
    (lambda file: file.write_bytes(bytes(300)), CHECKSUMS),
    (zero_in_a_name, CHECKSUMS),
    (cut_with_its_file, CHECKSUMS),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_newest_folder_is_named_and_passed_over(
    zygote: Zygote, whole: Path, tmp_path: Path, damage: Callable[[Path], Any], name: str
) -> None:
    out = as_of(whole, tmp_path / "run", 6)
    damage(out / "step_000006" / name)
    code, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
    assert code == 0, printed
    assert f"passed over: {out / 'step_000006' / name}: " in printed
    assert f"continues after step 4 of {STEPS}" in printed
    assert_same_run(out, whole, STEPS, keep=3)  # the damaged folder is replaced, too


def test_two_damaged_folders_are_passed_over(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    out = as_of(whole, tmp_path / "run", 6)
    flip(out / "step_000006" / "training.pt")
    flip(out / "step_000004" / "model.pt")
    code, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
    assert code == 0, printed
    assert printed.count("passed over: ") == 2
    assert f"continues after step 2 of {STEPS}" in printed
    assert_same_run(out, whole, STEPS, keep=3)


def test_when_all_are_damaged_nothing_is_begun_from_the_start(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    out = as_of(whole, tmp_path / "run", 6)
    for folder in step_folders(out):
        flip(folder / "training.pt")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
    assert code == 2
    for folder in step_folders(out):
        assert f"passed over: {folder / 'training.pt'}: damaged" in printed
    assert printed.splitlines()[-1].startswith("minift: error: ")
    assert "training.pt" in printed.splitlines()[-1]
    assert "continues" not in printed
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_damaged_newer_folder_does_not_push_out_a_whole_one(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """With --keep 1, the folder to keep is the one just saved, not a newer one that cannot be used."""
    out = as_of(whole, tmp_path / "run", 6)
    flip(out / "step_000006" / "model.pt")
    code, printed, _ = zygote.run(["pretrain", "--resume", "--keep", 1, "--out", out], replace(DRAWING, stop=5))
    assert code == 1
    assert "stopped and saved" in printed
    code, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
    assert code == 0, printed
    assert f"continues after step 5 of {STEPS}" in printed
    assert_same_run(out, whole, STEPS, keep=1)


# What is kept, and the state itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_the_newest_folders_are_kept_and_none_goes_before_its_successor_is_whole(
    zygote: Zygote, words: list[str], tmp_path: Path, keep: int
) -> None:
    out, file = tmp_path / "run", tmp_path / "watched"
    hooks = replace(DRAWING, watch=file)
    code, printed, _ = zygote.run([*words, "--save-every", 1, "--keep", keep, "--out", out], hooks)
    assert code == 0, printed
    names = [f"step_{step:06d}" for step in range(1, STEPS + 1)]
    seen = [json.loads(line) for line in file.read_text().splitlines()]
    assert [name for what, name, _ in seen if what == "saved"] == names
    for what, name, folders in seen:
        last = names.index(name) + (keep if what == "remove" else 0)
        oldest = names.index(name) if what == "remove" else max(0, last - keep + 1) if keep else 0
        assert folders == names[oldest : last + 1][::-1]
    assert [name for what, name, _ in seen if what == "remove"] == (names[:-keep] if keep else [])
    assert [folder.name for folder in step_folders(out)] == names[-keep:][::-1]


def test_torchs_random_numbers_go_on(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """Each step draws one. The state at the end is that after seven draws, whichever steps were taken twice."""
    expected = torch.Generator().manual_seed(0)
    torch.rand(STEPS, generator=expected)
    for step in (2, 4, 6):
        out = as_of(whole, tmp_path / f"{step}", step)
        code, printed, log = zygote.run(["pretrain", "--resume", "--out", out], DRAWING)
        assert code == 0, printed
        assert log.with_suffix(".random").read_bytes() == random_state(expected)
        assert_same_run(out, whole, STEPS, keep=3)


def test_a_resumed_run_holds_no_more_than_one_that_was_not_stopped(
    zygote: Zygote, words: list[str], tmp_path: Path
) -> None:
    """What is saved does not grow with each restart: waiting ids are used before more text is read."""
    hooks = replace(DRAWING, chunk=None)  # the default: a chunk is enough for many steps
    code, printed, _ = zygote.run([*words, "--out", tmp_path / "whole"], hooks)
    assert code == 0, printed
    out = as_of(tmp_path / "whole", tmp_path / "run", 4)
    code, printed, _ = zygote.run(["pretrain", "--resume", "--out", out], hooks)
    assert code == 0, printed
    assert_same_run(out, tmp_path / "whole", STEPS, keep=3, same_place=False)
    mine, theirs = (load(run / "step_000006" / "training.pt")["batches"] for run in (out, tmp_path / "whole"))
    assert len(mine["ids"]) == len(theirs["ids"])
    assert difference(plain(mine), plain(theirs)) == ""
