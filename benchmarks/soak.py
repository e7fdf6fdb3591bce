"""Train for hours: test whether memory grows, files stay open, or a run that is disturbed many times loses anything.

The bundled job is trained twice at once, with the same seed and one thread each. One run is undisturbed, and its memory
and open files are sampled every few seconds. The other is disturbed at random moments, and resumed until it has
finished too: it is killed (SIGKILL), interrupted (Ctrl-C) once or twice, its disk is full, or the same run is started a
second time. Each of these ends must be said in one line, with the exit code that belongs to it. Both runs save and
evaluate regularly. At the end their `metrics.jsonl`, except for the times in it, and their weights must be the same.

    python -m benchmarks soak                          # two hours
    python -m benchmarks soak --minutes 10 --blows 8

A disk is full at FULL bytes of any file (RLIMIT_FSIZE): metrics can be written for some time, and no checkpoint can.

Memory is read from /proc, so this needs Linux. A minute's memory is the largest sample in it, because an evaluation
takes more than a step.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
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
FULL = 1_000_000  # bytes
PATIENCE = 120.0  # seconds in which a disturbed run must have ended
# How a run ends when it is disturbed: its exit code, and the last line that it prints.
INTERRUPTED = (
    r"stopped and saved; continue with: .*|minift: interrupted|minift: error: (the comparison was )?interrupted.*"
)
ENDS = {
    "interrupted once": (1, INTERRUPTED),
    "interrupted twice": (1, INTERRUPTED),
    "full disk": (1, r"minift: error: .*(cannot be written: )?File too large.*"),
    "started twice": (2, r"minift: error: .*(another run is writing it|already holds a run).*"),
}
TIMES = ("seconds", "tokens_per_second")  # keys of a line of metrics that differ from run to run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--minutes", type=float, default=120, metavar="N", help="of undisturbed training (%(default)s)")
    parser.add_argument("--blows", type=int, default=20, metavar="N", help="to the other run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the blows and their moments (%(default)s)")
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
        alone, disturbed = Run(folder / "alone", steps, 0), Run(folder / "disturbed", steps, 1)
        try:
            blows = _train_both(alone, disturbed, options)
        finally:
            alone.end()
            disturbed.end()
        result: dict[str, Any] = {
            "steps": steps,
            "minutes": (alone.ended - alone.began) / 60,
            "blows": blows,
            "memory": flatness([(when, resident) for when, resident, _ in alone.looks]),
            "open_files": flatness([(when, files) for when, _, files in alone.looks]),
            "same_metrics": metrics(alone.out) == metrics(disturbed.out),
            "same_weights": checksum(alone.out) == checksum(disturbed.out),
        }
    memory, files = result["memory"], result["open_files"]
    print(f"left alone for {result['minutes']:.0f} minutes; the most of each minute, after a tenth of them:")
    for what, seen in (("memory", memory), ("open files", files)):
        first, last = (size(seen[key]) if seen is memory else seen[key] for key in ("first", "last"))
        print(f"  {what}: {first} at first, {last} at last, never more than {seen['off']:.2%} off the median")
    same = {key: "the same" if result[f"same_{key}"] else "NOT the same" for key in ("metrics", "weights")}
    shown = ", ".join(f"{what} {count} times" for what, count in blows.items())
    print(f"the other, {shown}, has {same['metrics']} metrics and {same['weights']} weights")
    record.write(options.json, {"benchmark": "soak", **record.environment(), **result})
    if not (result["same_metrics"] and result["same_weights"]):
        raise InputError("the run that was disturbed is not the one that was left alone")


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
        self._child = self._process(words)

    def _process(self, words: list[str], full: bool = False, log: str = "") -> "subprocess.Popen[bytes]":
        """Return a process that prints into a log.

        Args:
            full: let its disk be full.
            log: the end of the log's name; "" for the run's own.
        """
        import resource  # not on Windows, where this benchmark is refused

        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "minift", *words]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))) if full else None
        with self._log(log).open("ab") as file:
            child = subprocess.Popen(command, stdout=file, stderr=file, env=env, preexec_fn=limit)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(child.pid, {cores[self._core % len(cores)]})
        return child

    def _log(self, name: str = "") -> Path:
        return self.out.parent / f"{self.out.name}{name}.log"

    def _last_line(self, log: str = "") -> str:
        text = self._log(log).read_text(errors="replace").replace("\r", "\n").strip()
        return text.splitlines()[-1] if text else ""

    def done(self) -> bool:
        """Return whether it has ended. Raise InputError with the last line of its log when it failed."""
        if self._child.poll() is None:
            return False
        if self._child.returncode:
            raise InputError(f"{self.out.name} ended with {self._child.returncode}: {self._last_line()}")
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

    def disturb(self, blow: str, draw: random.Random) -> None:
        """Deal it a blow, and resume it where that has ended it.

        Raises:
            InputError: when it does not end as it should.
        """
        again = ["finetune", "--resume", "--out", str(self.out)] if (self.out / "config.json").exists() else self._words
        if blow == "started twice":
            self._check_end(self._process(again, log=".other"), blow, ".other")
            return
        if blow.startswith("interrupted"):
            self._child.send_signal(signal.SIGINT)
            if blow == "interrupted twice":
                time.sleep(draw.uniform(0, 0.3))
                self._child.send_signal(signal.SIGINT)
            self._check_end(self._child, blow)
        else:
            self._child.kill()
            self._child.wait()
        if blow == "full disk":
            self._log(".full").unlink(missing_ok=True)  # it is on that disk, too, and must not be full itself
            self._check_end(self._process(again, full=True, log=".full"), blow, ".full")
        if self._child.returncode:
            again = ["finetune", "--resume", "--out", str(self.out)] if (self.out / "config.json").exists() else again
            self._start(again)

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._child.kill()
        self._child.wait()

    def _check_end(self, process: "subprocess.Popen[bytes]", blow: str, log: str = "") -> None:
        """Raise InputError unless a process ends with the code and the line that ENDS has, or is complete."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise InputError(f"{blow}: has not ended after {PATIENCE:g} seconds") from None
        expected, line = ENDS[blow]
        last = self._last_line(log)
        # A bar that a killed process has left may stand before it, in the same line.
        if code and (code != expected or not re.search(f"({line})$", last)):
            raise InputError(f"{blow}: ended with {code}: {last}")


def _steps(folder: Path, minutes: float) -> int:
    """Return how many steps take this many minutes on one core, while a second run uses another core."""
    pair = [Run(folder / f"trial_{core}", 150, core) for core in range(2)]
    while not all(run.done() for run in pair):
        time.sleep(0.2)
    seconds = [json.loads(line)["seconds"] for line in (pair[0].out / "metrics.jsonl").open(encoding="utf-8")]
    return max(150, int(60 * minutes / (sum(seconds[50:]) / len(seconds[50:]))))


def _train_both(alone: Run, disturbed: Run, options: argparse.Namespace) -> dict[str, int]:
    """Wait until both runs are done. Return how often the second was dealt each blow."""
    draw = random.Random(options.seed)
    moments = sorted(draw.uniform(0, 60 * options.minutes) for _ in range(options.blows))
    blows = dict.fromkeys(("killed", *ENDS), 0)
    while not (alone.done() and disturbed.done()):
        alone.look()
        if moments and time.monotonic() - disturbed.began > moments[0] and not disturbed.done():
            del moments[0]
            blow = draw.choice(list(blows))
            disturbed.disturb(blow, draw)
            blows[blow] += 1
            print(f"{blow} at {time.monotonic() - disturbed.began:,.0f} s", flush=True)
        time.sleep(LOOK)
    return blows


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
