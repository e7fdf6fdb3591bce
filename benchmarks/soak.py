"""Train for hours: test whether memory grows, files stay open, or a run that is killed many times loses anything.

The bundled job is trained twice at once, with the same seed and one thread each. One run is undisturbed, and its memory
and open files are sampled every few seconds. The other is killed (SIGKILL) at random moments and resumed, until it has
finished too. Both save and evaluate regularly. At the end their `metrics.jsonl`, except for the times in it, and their
weights must be the same.

    python -m benchmarks soak                          # two hours
    python -m benchmarks soak --minutes 10 --kills 4

Memory is read from /proc, so this needs Linux. A minute's memory is the largest sample in it, because an evaluation
takes more than a step.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import arguments, record
from benchmarks.process import ROOT, check_system
from minift.errors import InputError
from minift.values import size

WARM_UP = 0.1  # share of the time that does not count: caches and the allocator fill up
LOOK = 2.0  # seconds between two samples of a process
TIMES = ("seconds", "tokens_per_second")  # keys of a line of metrics that differ from run to run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--minutes", type=float, default=120, metavar="N", help="of undisturbed training (%(default)s)")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of the other run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the kills' moments (%(default)s)")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Train both runs, print the result, and write the JSON. Raise InputError when they are not the same."""
    check_system("sched_setaffinity", "sampling the memory of a run")
    if options.minutes <= 0:
        raise InputError("--minutes must be more than 0")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = _steps(folder, options.minutes)
        print(f"{steps:,} steps, which should take about {options.minutes:g} minutes", flush=True)
        alone, killed = Run(folder / "alone", steps, 0), Run(folder / "killed", steps, 1)
        kills = _train_both(alone, killed, options)
        result: dict[str, Any] = {
            "steps": steps,
            "minutes": (alone.ended - alone.began) / 60,
            "kills": kills,
            "memory": flatness([(when, resident) for when, resident, _ in alone.looks]),
            "open_files": flatness([(when, files) for when, _, files in alone.looks]),
            "same_metrics": metrics(alone.out) == metrics(killed.out),
            "same_weights": checksum(alone.out) == checksum(killed.out),
        }
    memory, files = result["memory"], result["open_files"]
    print(f"left alone for {result['minutes']:.0f} minutes; the most of each minute, after a tenth of them:")
    for what, seen in (("memory", memory), ("open files", files)):
        first, last = (size(seen[key]) if seen is memory else seen[key] for key in ("first", "last"))
        print(f"  {what}: {first} at first, {last} at last, never more than {seen['off']:.2%} off the median")
    same = {key: "the same" if result[f"same_{key}"] else "NOT the same" for key in ("metrics", "weights")}
    print(f"killed {kills} times, the other has {same['metrics']} metrics and {same['weights']} weights")
    record.write(options.json, {"benchmark": "soak", **record.environment(), **result})
    if not (result["same_metrics"] and result["same_weights"]):
        raise InputError("the run that was killed is not the one that was left alone")


class Run:
    """A training run in its folder, which can be started, killed and started again.

    Attributes:
        out: the folder.
        looks: samples (seconds since the start, bytes of memory, open files), taken while it trains.
        began, ended: the times of start and end, in seconds; `ended` is 0 until the end.
    """

    def __init__(self, out: Path, steps: int, core: int):
        self.out = out
        self._words = [
            "finetune",
            "--out",
            str(out),
            "--steps",
            str(steps),
            "--eval-every",
            "50",
            "--save-every",
            "100",
        ]
        self._words += ["--keep", "2"]
        self._core = core
        self.looks: list[tuple[float, int, int]] = []
        self.began, self.ended = time.monotonic(), 0.0
        self._start(self._words)

    def _start(self, words: list[str]) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            self._child = subprocess.Popen([sys.executable, "-m", "minift", *words], stdout=log, stderr=log, env=env)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self._child.pid, {cores[self._core % len(cores)]})

    def done(self) -> bool:
        """Return whether it has ended. Raise InputError with the last line of its log when it failed."""
        if self._child.poll() is None:
            return False
        if self._child.returncode:
            log = (self.out.parent / f"{self.out.name}.log").read_text(encoding="utf-8", errors="replace")
            last = log.strip().splitlines()[-1]
            raise InputError(f"{self.out.name} ended with {self._child.returncode}: {last}")
        self.ended = self.ended or time.monotonic()
        return True

    def look(self) -> None:
        """Sample its memory and its open files while it trains: what follows `final/` is not training."""
        if (self.out / "metrics.jsonl").exists() and not (self.out / "final").exists():
            try:
                status = Path(f"/proc/{self._child.pid}/status").read_text(encoding="utf-8")
                files = len(os.listdir(f"/proc/{self._child.pid}/fd"))
            except FileNotFoundError:
                return
            resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
            self.looks.append((time.monotonic() - self.began, resident, files))

    def kill(self) -> None:
        """Kill it, as if the power were lost, and resume it."""
        self._child.kill()
        self._child.wait()
        begun = (self.out / "config.json").exists()
        self._start(["finetune", "--resume", "--out", str(self.out)] if begun else self._words)


def _steps(folder: Path, minutes: float) -> int:
    """Return how many steps take this many minutes on one core, while a second run uses another core."""
    pair = [Run(folder / f"trial_{core}", 150, core) for core in range(2)]
    while not all(run.done() for run in pair):
        time.sleep(0.2)
    seconds = [json.loads(line)["seconds"] for line in (pair[0].out / "metrics.jsonl").open(encoding="utf-8")]
    return max(150, int(60 * minutes / (sum(seconds[50:]) / len(seconds[50:]))))


def _train_both(alone: Run, killed: Run, options: argparse.Namespace) -> int:
    """Wait until both runs are done. Return how often the second was killed."""
    draw = random.Random(options.seed)
    moments = sorted(draw.uniform(0, 60 * options.minutes) for _ in range(options.kills))
    kills = 0
    while not (alone.done() and killed.done()):
        alone.look()
        if moments and time.monotonic() - killed.began > moments[0] and not killed.done():
            del moments[0]
            killed.kill()
            kills += 1
            print(f"killed at {time.monotonic() - killed.began:,.0f} s", flush=True)
        time.sleep(LOOK)
    return kills


def flatness(looks: list[tuple[float, int]]) -> dict[str, Any]:
    """Summarise how a quantity changed over time: the maximum of each minute, after the warm-up.

    Args:
        looks: (seconds since the start, value) of each sample.

    Returns:
        first, last: the median of the first and of the last tenth of these minutes.
        off: the largest difference from the median of all, as a share of it.
        minutes: the maxima of all minutes, from the start.
    """
    minutes: dict[int, int] = defaultdict(int)
    for when, value in looks:
        minutes[int(when // 60)] = max(minutes[int(when // 60)], value)
    everything = [minutes[minute] for minute in sorted(minutes)]
    counted = everything[round(WARM_UP * len(everything)) :]
    tenth = max(1, len(counted) // 10)
    median = _median(counted)
    return {
        "first": _median(counted[:tenth]),
        "last": _median(counted[-tenth:]),
        "off": max(abs(value - median) for value in counted) / median,
        "minutes": everything,
    }


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, without the times in them."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def checksum(out: Path) -> str:
    """Return the SHA-256 of the finished model's weights."""
    return hashlib.sha256((out / "final" / "model.pt").read_bytes()).hexdigest()
