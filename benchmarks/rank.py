"""Rank a class's submissions: each file's function, checked and timed in a process of its own.

    python -m benchmarks ops --rank submissions --against norm

Each file NAME.py of the folder has a function that is named as the operation. Its process holds it against the formula
(`variant.py`), and times it in turns with what minift trains with, forward and backward together; the ratio of the two
is what ranks it, because a machine has slower minutes, which both share. What minift trains with is timed twice in each
turn: where it differs from itself, so may everything else. What waits for ever, crashes, ends its process, takes too
much memory or prints gets its error, and the table goes on. The table is Markdown.

A process runs in a temporary folder, which is removed after it. Both guard against mistakes, and not against malice: a
submission runs with all that you may do.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import arguments, process, record, timers
from benchmarks.added import identity, is_noisy, ratio
from benchmarks.contract import CONTRACTS, describe
from benchmarks.operation import Setting, make_step
from benchmarks.operations import OPERATIONS
from benchmarks.samples import Samples
from benchmarks.timing import in_turns
from benchmarks.user_file import check_named, names_in, submissions
from benchmarks.variant import Trial, WrongError
from minift.errors import InputError, one_line
from minift.runs import machine

SECONDS = 60.0  # that a submission may take, in addition to its budget of turns
LEAST = 2.0  # seconds of turns for a submission, however many there are
GLANCE = 0.05  # seconds between two looks at a process
LAST = 2**12  # bytes that are kept of what a process prints to standard error
FORMULA = "the formula"
AGAIN = "used again"  # the side that is `used` a second time
RULE = (
    "A place is one more than the number of submissions that are surely faster: whose whole interval is above this "
    "one's. One that is too noisy to tell has no place."
)


@dataclass(frozen=True)
class Timed:
    """A submission that is right: its samples, and those of `used` in the same turns.

    Attributes:
        ratio: how many times as fast as `used` it is, and the interval of that.
        control: how many times as fast as itself `used` is; None where it is too short.
    """

    name: str
    own: Samples
    used: Samples
    ratio: tuple[float, float, float]
    control: tuple[float, float, float] | None


@dataclass(frozen=True)
class Wrong:
    """A submission that is wrong, and its error."""

    name: str
    error: str


# One submission -------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, setting: Setting, limits: tuple[float, float]) -> None:
    """Check and time one function, write its times or its error to a file, and end the process.

    Nothing that the submission left to be done at the end of the process is done.
    """
    place, name = options.add[0], options.against
    try:
        step = make_step(setting)
        operation = OPERATIONS[name](step)
        trial = Trial(place, name, step, operation, limits)
        trial.check()
        sides = {"used": operation.variants["used"], "own": trial.call(), AGAIN: operation.variants["used"]}
        if operation.leaves:
            operation.variants.update(sides)
            sides = {side: partial(operation.both, side) for side in sides}
        how: dict[str, Any] = {"device": setting.device, "timer": timer_of(options, setting), "caches": caches(options)}
        samples = in_turns(sides, options.repeats, budget=options.budget, **how)
        trial.check_again()
        answer: dict[str, Any] = {side: one.to_dict() for side, one in samples.items()}
    except WrongError as error:
        answer = {"error": str(error)}
    out = Path(options.measure[0])
    written = out.with_suffix(".new")
    written.write_text(json.dumps(answer), encoding="utf-8")
    written.replace(out)
    os._exit(0)


def measure(place: str, operation: str, words: Sequence[str], seconds: float, nbytes: float) -> dict[str, Any]:
    """Return the answer of `serve` from a process of its own, or what became of the process, as {"error": …}.

    Args:
        words: the options that say what is timed.
        seconds, nbytes: what the process may take.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, inside = Path(folder) / "answer.json", Path(folder) / "run"
        inside.mkdir()
        command = [sys.executable, "-m", "benchmarks", "ops", f"--add={place}", f"--against={operation}", *words]
        error = bounded([*command, "--measure", str(out)], seconds, nbytes, inside)
        if error is None and not out.is_file():
            error = "its process ended before it was done"
        answer: dict[str, Any] = {"error": error} if error else json.loads(out.read_text(encoding="utf-8"))
    return answer


def bounded(command: Sequence[str], seconds: float, nbytes: float, folder: Path) -> str | None:
    """Run a command in a folder to its end within bounds of time and memory, and end all that it has started.

    What it prints is thrown away, but for its last words. Return what went wrong, or None.
    """
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(process.ROOT), *map(os.path.abspath, known)])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stderr is not None
    said: list[bytes] = [b""]
    reader = threading.Thread(target=_read, args=(child.stderr, said), daemon=True)
    reader.start()
    try:
        error = _watch(child, seconds, nbytes)
    finally:
        _end(child)
    reader.join(1)
    return error or _how_it_ended(child.returncode, said[0])


def _read(pipe: IO[bytes], said: list[bytes]) -> None:
    """Read to the end, and keep the last bytes."""
    with pipe:
        while block := os.read(pipe.fileno(), 2**16):
            said[0] = (said[0] + block)[-LAST:]


def _watch(child: subprocess.Popen[bytes], seconds: float, nbytes: float) -> str | None:
    """Return when a process has ended, or took too much: then, what."""
    end = time.monotonic() + seconds
    while child.poll() is None:
        time.sleep(GLANCE)
        if time.monotonic() > end:
            return f"it took more than {seconds:g} s (--limit)"
        if (held := _memory_of(child.pid)) > nbytes:
            return f"it took {held / 1e9:.1f} GB of memory; {nbytes / 1e9:.1f} GB are allowed (--memory)"
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process, and what it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def _memory_of(pid: int) -> int:
    """Return the resident bytes of a process; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def _how_it_ended(code: int, said: bytes) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    last = said.decode(errors="replace").strip().splitlines()
    return f"its process ended with exit code {code}" + (f": {one_line(last[-1])}" if last else "")


# All of them ----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, setting: Setting, limits: tuple[float, float]) -> None:
    """Rank the submissions, print a table for each operation and write the JSON.

    Raises:
        InputError: when the folder has no submissions, or the formula itself cannot be timed.
        SystemExit: with 1 when some submission was wrong.
    """
    if options.measure:
        serve(options, setting, limits)
    files, others = submissions(options.rank)
    refused = [Wrong(file.stem, f"{one_line(file.name)} {reason}") for file, reason in others.items()]
    names = [options.against] if options.against else operations_in(files)
    budget = max(LEAST, options.budget / len(files) / len(names))
    words = _words(options, setting, budget)
    seconds = options.limit or SECONDS + budget
    nbytes = 1e9 * options.memory if options.memory else (machine.free_memory(torch.device("cpu")) or math.inf) / 2
    digests = {**{file.stem: identity(file) for file in files}, **{one.name: {} for one in refused}}
    tables: dict[str, Any] = {}
    for name in names:
        formula, timed = _measured(name, files, words, seconds, nbytes)
        entries = [*timed, *refused]
        print(f"{_heading(name, entries, options, setting)}\n\n{table(formula, entries)}\n", flush=True)
        submitted = {entry.name: {**digests[entry.name], **_recorded(entry)} for entry in entries}
        tables[name] = {"formula": _recorded(formula), "submissions": submitted}
    result = {
        "benchmark": "ops",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": setting.device,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "ranked": tables,
    }
    record.write(options.json, result)
    if any("error" in entry for one in tables.values() for entry in one["submissions"].values()):
        raise SystemExit(1)


def operations_in(files: Sequence[Path]) -> list[str]:
    """Return the operations that functions of some files are named as; the files are read, not run.

    Raises:
        InputError: when there is none.
    """
    names: set[str] = set()
    for file in files:
        with suppress(WrongError):
            names |= {name for name, function in names_in(file).items() if function}
    found = [name for name in CONTRACTS if name in names]
    if not found:
        raise InputError(f"{files[0].parent}: no function there is named as an operation: {', '.join(CONTRACTS)}")
    return found


def _measured(
    name: str, files: Sequence[Path], words: Sequence[str], seconds: float, nbytes: float
) -> tuple[Timed, list[Timed | Wrong]]:
    """Return the entries of the formula, for comparison, and of all submissions to an operation."""

    def entry(label: str, file: Path) -> Timed | Wrong:
        place = f"{file.resolve()}:{name}"
        try:
            check_named(place)
            answer = measure(place, name, words, seconds, nbytes)
        except InputError as error:
            answer = {"error": str(error)}
        if "error" in answer:
            return Wrong(label, answer["error"].replace(str(file.resolve()), one_line(file.name)))
        own, used, again = (Samples.from_dict(side, answer[side]) for side in ("own", "used", AGAIN))
        found = ratio(used, own)
        if found is None:
            return Wrong(
                label, f"a call is shorter than {own.floor:.1g} s, and cannot be timed: give more --batch-size"
            )
        return Timed(label, own, used, found, ratio(used, again))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "formula.py"
        file.write_text(describe(name), encoding="utf-8")
        formula = entry(FORMULA, file)
    if isinstance(formula, Wrong):
        raise InputError(f"{name}: the formula itself cannot be timed: {formula.error}")
    entries = []
    for number, file in enumerate(files, 1):
        entries.append(one := entry(file.stem, file))
        said = "wrong" if isinstance(one, Wrong) else f"{one.ratio[0]:.2f} times as fast as used"
        said += ", too noisy to tell" if isinstance(one, Timed) and is_noisy(one.ratio) else ""
        print(f"{name} {number}/{len(files)} {one_line(file.stem)}: {said}", file=sys.stderr, flush=True)
    return formula, entries


def _recorded(entry: Timed | Wrong) -> dict[str, Any]:
    """Return an entry's values for a record."""
    if isinstance(entry, Wrong):
        return {"error": entry.error}
    times = {"own": entry.own.to_dict(), "used": entry.used.to_dict()}
    return {"times_as_fast_as_used": entry.ratio, "used_as_fast_as_itself": entry.control, **times}


def timer_of(options: argparse.Namespace, setting: Setting) -> str:
    """Return what reads the time."""
    return options.timer or timers.usual(setting.device)


def caches(options: argparse.Namespace) -> str:
    """Return the state of the caches that is ranked by: warm, unless cold is asked for."""
    return "cold" if options.caches == "cold" else "warm"


def _words(options: argparse.Namespace, setting: Setting, budget: float) -> list[str]:
    config = setting.train_config().replace(batch_size=setting.batch_size, max_length=setting.length)
    turns = f"--budget={budget}" if options.repeats is None else f"--repeats={options.repeats}"
    how = [f"--timer={timer_of(options, setting)}", f"--caches={caches(options)}", turns]
    shape = os.path.abspath(options.config) if options.config.endswith(".json") else options.config
    named = argparse.Namespace(**{**vars(options), "config": shape})
    return [*arguments.words(named, config), "--no-compile", *how]


# The table ------------------------------------------------------------------------------------------------------------


def table(formula: Timed, entries: Sequence[Timed | Wrong]) -> str:
    """Return the entries in Markdown: the right ones by their ratio, then the wrong ones with their errors.

    The formula stands among the right ones, without a place.
    """
    rows = [["place", "file", "times as fast as used", "in 95 % between", "ms", "used ms"]]
    right = [entry for entry in entries if isinstance(entry, Timed)]
    place_of = dict(zip((id(entry) for entry in right), places(right), strict=True))
    for entry in in_order([*right, formula]):
        middle, low, high = entry.ratio
        times = [f"{1e3 * (side.median or 0):.4g}" for side in (entry.own, entry.used)]
        interval = f"{low:.2f} and {high:.2f}" if math.isfinite(high - low) else "too few turns"
        if is_noisy(entry.ratio) and math.isfinite(high - low):
            interval += ", too noisy to tell"
        place = str(place_of.get(id(entry)) or "")
        rows.append([place, one_line(entry.name).replace("|", r"\|"), f"{middle:.2f}", interval, *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    wrong = [f"* {one_line(entry.name)}: wrong: {entry.error}" for entry in entries if isinstance(entry, Wrong)]
    below = [RULE, *caution([formula, *right])]
    return "\n".join([*lines, "", *below, *([""] if wrong else []), *wrong])


def caution(entries: Sequence[Timed]) -> list[str]:
    """Return a line on those in whose process `used` was surely faster or slower than itself; none where all is well.

    One in twenty is so by chance, as the intervals hold 95 %.
    """
    off = [
        f"{one_line(one.name)} {one.control[0]:.2f} ({one.control[1]:.2f} to {one.control[2]:.2f})"
        for one in entries
        if one.control is not None and not one.control[1] <= 1 <= one.control[2]
    ]
    if not off:
        return []
    return [
        f"Caution: used, timed twice in the same turns, differs from itself in {len(off)} of {len(entries)} processes "
        f"(one in twenty by chance), so the machine was disturbed: {', '.join(off)}."
    ]


def in_order(entries: Sequence[Timed]) -> list[Timed]:
    """Return the entries, the fastest first."""
    return sorted(entries, key=lambda entry: -entry.ratio[0])


def places(entries: Sequence[Timed]) -> list[int | None]:
    """Return the place of each: one more than the number of those that are surely faster.

    Surely faster is one whose whole interval is above this one's. A noisy one has no place, and takes none from others.
    """
    told = [entry for entry in entries if not is_noisy(entry.ratio)]
    return [
        None if is_noisy(entry.ratio) else 1 + sum(other.ratio[1] > entry.ratio[2] for other in told)
        for entry in entries
    ]


def _heading(name: str, entries: Sequence[Timed | Wrong], options: argparse.Namespace, setting: Setting) -> str:
    shape = arguments.shape_name(arguments.recorded_shape(options.config))
    wrong = sum(isinstance(entry, Wrong) for entry in entries)
    return (
        f"{name}: {len(entries)} submissions, {wrong} wrong; {setting.batch_size} x {setting.length} tokens of "
        f"{shape}, {str(setting.dtype).removeprefix('torch.')} on {setting.device}, {caches(options)} caches, forward "
        "and backward"
    )
