"""Measure a GPU by one command that ends within its budget: first whether the code is right there, then how fast it is.

A GPU is often lent for minutes. So each part is a process of its own, with a bound on its time: the tests that need a
GPU; training steps next to those of `transformers`, of 1.1B and of 7B weights; every operation, with cold and with warm
caches; generated text; memory. A part gets its share of the time that is left, so what one does not use goes to those
after it. One that does not fit any more is left out, by name.

The file is written before and after each part, and a part that is stopped leaves what it has written itself: a kill
loses nothing. Where a test fails the times still come, and the last line says that they are of wrong code.

    python -m benchmarks card --json card.json
    python -m benchmarks card --budget 300 --only tests ops --json card.json
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks import arguments, nvml, record
from benchmarks.process import ROOT
from minift.config import TrainConfig
from minift.errors import InputError
from minift.runs.machine import choose_device
from minift.runs.stop import ended_by_signals
from minift.storage.atomic import write_file
from minift.values import check_number

BUDGET = 840.0  # seconds: a quarter of an hour, less a minute for starting the machine
GRACE = 5.0  # seconds between asking a part to end and ending it
TAIL = 60  # lines of a part's output that are kept and shown
EVERY = 1.0  # seconds between two looks at the GPU
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # 7B weights leave no room for holes in 141 GB


@dataclass(frozen=True)
class Part:
    """One process of the measurement.

    Attributes:
        words: what `python -m` runs; the options for the device and the file of the result are added.
        share: of the time that is left, relative to the shares of the parts after it; in seconds of BUDGET.
        least: seconds with which it is not worth beginning.
        aim: the MFU of the data sheet that minift should reach, if this part tells it.
        measures: whether it takes those two options; the tests do not.
    """

    name: str
    words: tuple[str, ...]
    share: float
    least: float
    aim: float | None = None
    measures: bool = True


def peers(name: str, config: str, share: float, aim: float, *words: str) -> Part:
    """Return the part that compares training steps of a shape."""
    usual = ("benchmarks", "peers", f"--config={config}", "--lr=1e-5", "--apart", "--repeats=4")
    return Part(name, (*usual, *words), share, least=60, aim=aim)


PARTS = (
    Part("tests", ("pytest", "-m", "cuda", "-q", "-n", "0", "-p", "no:cacheprovider"), 120, 30, measures=False),
    peers("peers-1.1b", "tinyllama-1.1b", 210, 0.55, "--batch-size=8", "--length=2048"),
    peers(
        *("peers-7b", "llama2-7b", 240, 0.60, "--batch-size=4", "--length=4096", "--loss-chunk=4096"),
        *("--sides", "minift, compiled", "transformers, compiled", "transformers, checkpointed"),
    ),
    Part(
        "ops",
        ("benchmarks", "ops", "--config=tinyllama-1.1b", "--batch-size=8", "--length=2048", "--budget=60"),
        130,
        45,
    ),
    Part("generate", ("benchmarks", "generate"), 90, 30),
    Part("memory", ("benchmarks", "memory", "--shapes=tinyllama-1.1b:8x2048", "--dtypes=bfloat16"), 50, 25),
)


class Gpu(Protocol):
    """What tells about a GPU: `nvml.Gpu`."""

    def megahertz(self) -> float | None: ...
    def reasons(self) -> frozenset[str] | None: ...
    def celsius(self) -> float | None: ...
    def watts(self) -> float | None: ...


class Process(Protocol):
    """What runs a part: `subprocess.Popen`."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    names = [part.name for part in PARTS]
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of all parts (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of " + ", ".join(names))
    arguments.add_device(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the parts, print what each says, and write the JSON. Exit with 1 where one failed."""
    check_number("--budget", options.budget, least=1)
    if choose_device(TrainConfig(device=options.device)).type != "cuda":
        raise InputError("card measures a GPU, and torch finds none here; each of its parts runs on a CPU by itself")
    try:
        gpu, missing = nvml.find(), None
    except InputError as error:
        gpu, missing = None, str(error)
    parts = [part for part in PARTS if part.name in (options.only or [part.name])]
    card = Card(options.json, options.budget, gpu)
    card.result["gpu_not_watched"] = missing
    try:
        with ended_by_signals():
            card.measure(parts)
    except KeyboardInterrupt:
        print("\ninterrupted\n" + card.summary())
    if not all(part["state"] == "done" for part in card.result["parts"]):
        raise SystemExit(1)


def start(command: Sequence[str], log: IO[str]) -> Process:
    """Start a process in a group of its own, so that it can be ended with all that it starts."""
    to_log: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    env = {**os.environ, **ALLOCATOR}
    return subprocess.Popen(command, cwd=ROOT, env=env, **to_log, start_new_session=hasattr(os, "killpg"))


def end(process: Process) -> None:
    """Ask a process and all that it has started to end; GRACE seconds later, kill them."""
    for number in ("SIGTERM", "SIGKILL"):
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, number))
            else:  # Windows
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


class Card:
    """The measurement of one GPU.

    Attributes:
        result: what is written, complete after each part.

    Args:
        file: where the result is written; next to it, in a folder of this name and ".parts", what the parts write.
        budget: seconds from now until all is over.
        gpu: tells what the GPU does during a part; None: it is not watched.
        clock, start, end: return seconds, start a part, and end it; tests replace them.
    """

    def __init__(
        self,
        file: str | None,
        budget: float,
        gpu: Gpu | None,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Sequence[str], IO[str]], Process] = start,
        end: Callable[[Process], None] = end,
    ):
        self.file, self.gpu, self.clock, self.start, self.end = file, gpu, clock, start, end
        self.folder = Path(f"{file}.parts" if file else tempfile.mkdtemp(prefix="minift-card-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = clock()
        self.result: dict[str, Any] = {"benchmark": "card", "budget_seconds": budget, "correct": None, "parts": []}
        self.result["allocator"] = ALLOCATOR
        self.result |= record.environment()

    def measure(self, parts: Sequence[Part]) -> None:
        """Run parts one after the other, each within its share of the time that is left."""
        for i, part in enumerate(parts):
            left = self.result["budget_seconds"] - (self.clock() - self.began)
            seconds = left * part.share / sum(later.share for later in parts[i:]) - GRACE
            if importlib.util.find_spec(part.words[0]) is None:
                self._leave_out(part, f"{part.words[0]} is not installed")
            elif seconds < part.least:
                why = f"{max(0, seconds):.0f} s are left for it, and it needs at least {part.least:.0f}"
                self._leave_out(part, why)
            else:
                self._run(part, seconds)
        print("\n" + self.summary(), flush=True)

    def _leave_out(self, part: Part, why: str) -> None:
        self._keep({"name": part.name, "state": "left out", "why": why})
        print(f"\n{part.name}: left out, {why}", flush=True)

    def _run(self, part: Part, seconds: float) -> None:
        file, log = self.folder / f"{part.name}.json", self.folder / f"{part.name}.txt"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", *part.words]
        command += ["--device=cuda", f"--json={file.resolve()}"] if part.measures else cuda_tests()
        shown = shlex.join(["python", *command[1 : 2 + len(part.words)]])
        entry: dict[str, Any] = {"name": part.name, "state": "running", "command": shown, "bound_seconds": seconds}
        self._keep(entry)
        print(f"\n{part.name}: at most {seconds:.0f} s: {shown}", flush=True)
        began, code = self.clock(), None
        with log.open("w", encoding="utf-8") as output, watched(self.gpu, self.clock) as looks:
            process = self.start(command, output)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                entry["why"] = f"its {seconds:.0f} s were over"
            finally:  # also after a signal
                if code is None:
                    self.end(process)
                state = "stopped" if code is None else "failed" if code else "done"
                entry |= {"state": state, "seconds": self.clock() - began, "exit_code": code}
                entry |= {"gpu": watched_summary(looks), "output": _tail(log), "result": _read(file)}
                self._judge(part, entry)
                self._keep(entry)
        ended = f"{part.name}: {state} after {entry['seconds']:.0f} s"
        print("\n".join([*entry["output"], ended]), flush=True)

    def _judge(self, part: Part, entry: dict[str, Any]) -> None:
        """Add to a part's entry, and to the result, what it says about correctness and about its aim."""
        if not part.measures:
            self.result["correct"] = {"done": True, "failed": False}.get(entry["state"])
        if part.aim is not None and entry["result"]:
            shares = entry["result"].get("mfu_of_data_sheet") or {}
            ours = [share for side, share in shares.items() if side.startswith("minift")]
            entry |= {"aim_mfu": part.aim, "mfu": max(ours, default=None)}

    def _keep(self, entry: dict[str, Any]) -> None:
        """Put a part's entry into the result, in place of an earlier one of it, and write the file."""
        others = [one for one in self.result["parts"] if one["name"] != entry["name"]]
        self.result |= {"parts": [*others, entry], "seconds": self.clock() - self.began}
        if self.file:
            write_file(Path(self.file), lambda path: record.write(str(path), self.result))

    def summary(self) -> str:
        """Return a line for each part: how it ended, how long it took, and whether its aim was reached."""
        lines = []
        for entry in self.result["parts"]:
            line = f"{entry['name']:<12}{entry['state']:<10}"
            line += f"{entry['seconds']:>5.0f} s" if "seconds" in entry else f"  {entry['why']}"
            if entry.get("mfu"):
                reached = "reached" if entry["mfu"] >= entry["aim_mfu"] else "not reached"
                line += f"  MFU {entry['mfu']:.3f}; the aim of {entry['aim_mfu']:.2f} is {reached}"
            lines.append(line)
        if self.result["correct"] is False:
            lines.append("tests failed: these are times of wrong code, not to be quoted")
        elif self.result["correct"] is None:
            lines.append("whether the code is right on this GPU is not known: the tests have not come to their end")
        return "\n".join(lines)


def cuda_tests() -> list[str]:
    """Return the test files that need a GPU: to collect all others would take longer than to run these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text(encoding="utf-8")]


@contextmanager
def watched(gpu: Gpu | None, clock: Callable[[], float]) -> Iterator[list[list[Any]]]:
    """Look at a GPU every EVERY seconds in this context; give the list that grows: time, MHz, watts, °C, reasons."""
    looks: list[list[Any]] = []
    over = threading.Event()

    def look(gpu: Gpu) -> None:
        began = clock()
        while True:
            reasons = sorted(gpu.reasons() or ())
            looks.append([round(clock() - began, 2), gpu.megahertz(), gpu.watts(), gpu.celsius(), reasons])
            if over.wait(EVERY):
                return

    thread = threading.Thread(target=look, args=(gpu,), daemon=True) if gpu else None
    if thread:
        thread.start()
    try:
        yield looks
    finally:
        over.set()
        if thread:
            thread.join()


def watched_summary(looks: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Return what a GPU did during a part, and all looks at it; None where it was not watched."""
    if not looks:
        return None

    def known(column: int) -> list[float]:
        return [look[column] for look in looks if look[column] is not None]

    return {
        "median_megahertz": statistics.median(known(1)) if known(1) else None,
        "mean_watts": statistics.fmean(known(2)) if known(2) else None,
        "highest_celsius": max(known(3), default=None),
        "slowed_down": dict(Counter(reason for look in looks for reason in look[4])),  # how many looks saw each reason
        "looks": [list(look) for look in looks],
    }


def _tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]


def _read(file: Path) -> Any:
    """Return what a part has written; None where that is nothing, or was cut off."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
