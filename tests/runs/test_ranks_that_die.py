"""The promise: whatever happens to one of several processes, the run ends at once, says why once, and can be continued.

Real processes are killed: twenty at random moments, then under `torchrun`, which starts the run again by itself.
Nothing is lost and nothing repeated: `metrics.jsonl` has every step once, and all its numbers but the times, and the
weights, are those of a run without a kill, bit for bit.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minift.checkpoint import load_model
from minift.config import FINETUNE, TrainConfig
from minift.distributed import world as distributed
from minift.errors import RunError
from minift.runs.finetune import finetune, finetune_job
from tests.helpers import IMPORTED_BY_RUNS, ROOT, write_jsonl
from tests.runs.ranks import as_rank, free_port

CPU = torch.device("cpu")
RANKS = 2
STEPS = 24
CONFIG = FINETUNE.replace(
    steps=STEPS, batch_size=6, grad_accum=2, save_every=5, keep=2, dtype="float32", device="cpu", max_length=64
)
PROMPTLY = 60  # seconds in which the other ranks must have noticed, on a busy machine; they do at once
PATIENCE = 240  # seconds for a whole run, which takes one or two
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def imported_before_forking() -> None:
    for name in (*IMPORTED_BY_RUNS, "torch.distributed.checkpoint"):
        with suppress(ModuleNotFoundError):
            import_module(name)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"question": f"What is number {i}?", "answer": "one more " * (1 + i * 7 % 5)} for i in range(50)]
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[:1])
    return folder / "pairs.jsonl", folder / "test.jsonl"


def run(
    rank: int, port: int, met: Any, parallel: str, model: str, data: tuple[Path, Path], out: Path, config: TrainConfig
) -> None:
    """Run one rank of a run: it continues from the last checkpoint, once it has met the others."""
    as_rank(rank, RANKS, port)
    connect = dist.init_process_group

    def connect_and_say_so(*arguments: Any, **more: Any) -> None:
        connect(*arguments, **more)
        met.send(True)

    dist.init_process_group = connect_and_say_so
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as this process lives
    job = finetune_job(model, [str(data[0])], [str(data[1])])
    done = finetune(job, config.replace(parallel=parallel), out, resume=(out / "config.json").exists())
    sys.exit(3 if done is None else 0)


def start(*arguments: Any) -> list[Any]:
    """Start the ranks of a run, and wait until they have met: only `torchrun` can notice a loss before that.

    Each says so through a pipe of its own. A barrier has a lock that all share: a rank that is killed while it leaves
    the barrier takes the lock with it, and the others wait for it for ever.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks, pipes = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe(duplex=False)
        ranks.append(context.Process(target=run, args=(rank, port, theirs, *arguments)))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        assert pipe.poll(PATIENCE), "the ranks have not met"
        assert pipe.recv()  # EOFError where a rank has ended before that
    return ranks


def results(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return a run's metrics without the times, and its weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.endswith(("seconds", "second"))} for line in lines]
    return metrics, load_model(out / "final").state_dict()


def assert_same(out: Path, undisturbed: Path) -> None:
    (metrics, weights), (expected, expected_weights) = results(out), results(undisturbed)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twenty_kills(parallel: str, tmp_path: Path, small_checkpoint: Path, pairs: tuple[Path, Path]) -> None:
    lots = random.Random(parallel)
    whole = start(parallel, str(small_checkpoint), pairs, tmp_path / "whole", CONFIG)
    met = time.perf_counter()
    for process in whole:
        process.join(PATIENCE)
    assert [process.exitcode for process in whole] == [0] * RANKS
    takes = time.perf_counter() - met
    kills, attempts = 0, 0
    while kills < KILLS // 2:  # of either kind of run
        out = tmp_path / f"run {attempts}"
        attempts += 1
        while not (out / "final").is_dir():
            ranks = start(parallel, str(small_checkpoint), pairs, out, CONFIG)
            victim = lots.choice(ranks)
            victim.join(lots.uniform(0.0, 0.9) * takes)
            if killed := victim.is_alive() and kills < KILLS // 2:
                victim.kill()
                kills += 1
            for process in ranks:
                process.join(PROMPTLY + takes)
                assert not process.is_alive(), "a rank did not notice that another is gone"
            assert killed or [process.exitcode for process in ranks] == [0] * RANKS
        assert_same(out, tmp_path / "whole")


def test_ranks_that_never_come_are_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GATHERING", timedelta(seconds=1))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    as_rank(0, RANKS, free_port())
    with pytest.raises(RunError, match="waited 1 seconds for the 2 processes"), distributed.join("ddp", CPU):
        pytest.fail("it went on alone")


def test_a_signal_to_one_rank_saves_on_all(tmp_path: Path, small_checkpoint: Path, pairs: tuple[Path, Path]) -> None:
    out, config = tmp_path / "run", CONFIG.replace(steps=100_000, save_every=0)
    ranks = start("ddp", str(small_checkpoint), pairs, out, config)
    deadline = time.monotonic() + PATIENCE
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for process in ranks:
        process.join(PROMPTLY)
    assert [process.exitcode for process in ranks] == [3] * RANKS  # both were stopped and have saved
    (folder,) = out.glob("step_*")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == int(folder.name[5:])


# torchrun -------------------------------------------------------------------------------------------------------------


def torchrun(*words: str | Path, restarts: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [f"--max-restarts={restarts}", "-m", "minift", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def words_for(model: Path, data: tuple[Path, Path], out: Path, steps: int) -> list[str | Path]:
    words: list[str | Path] = ["finetune", "--model", model, "--data", data[0], "--test", data[1], "--out", out]
    words += [
        "--steps",
        str(steps),
        "--batch-size",
        "6",
        "--grad-accum",
        "2",
        "--save-every",
        "5",
        "--dtype",
        "float32",
    ]
    return [*words, "--max-length", "64", "--keep", "2"]


def workers_of(torchrun: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"minift" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_torchrun_starts_a_killed_run_again(tmp_path: Path, small_checkpoint: Path, pairs: tuple[Path, Path]) -> None:
    whole = torchrun(*words_for(small_checkpoint, pairs, tmp_path / "whole", STEPS))
    out, error = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, error
    assert out.count("saved: ") == 1  # one rank reports it
    assert error.count("?step/s]") == 1  # and one shows a bar, whose end may be shown twice
    ours = tmp_path / "run"
    begun = torchrun(*words_for(small_checkpoint, pairs, ours, STEPS), restarts=2)
    deadline = time.monotonic() + PATIENCE
    while len(first := workers_of(begun)) < RANKS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first[1], signal.SIGKILL)  # long before they have met
    while not list(ours.glob("step_*")):
        assert time.monotonic() < deadline
        assert begun.poll() is None, begun.communicate(timeout=PATIENCE)
        time.sleep(0.01)
    os.kill(workers_of(begun)[1], signal.SIGKILL)
    _, error = begun.communicate(timeout=PATIENCE)
    assert begun.returncode == 0, error
    assert_same(ours, tmp_path / "whole")


@pytest.mark.slow
def test_an_error_is_said_once(tmp_path: Path, small_checkpoint: Path) -> None:
    ended = torchrun(
        *words_for(small_checkpoint, (tmp_path / "none.jsonl", tmp_path / "none.jsonl"), tmp_path / "o", 3)
    )
    _, error = ended.communicate(timeout=PATIENCE)
    assert ended.returncode != 0
    said = [line for line in error.splitlines() if line.startswith("minift: ")]
    assert len(said) == 1
    assert "none.jsonl: no such file" in said[0]
    assert "Traceback (most recent call last)" not in error.split("minift: ")[0]
    assert not (tmp_path / "o").exists()
