"""Compare two versions of minift by running both in turns: every pair of processes is fresh, every turn is a pair.

A side is a folder with a copy of `minift` as a commit (or the working tree) has it, and of `benchmarks` as it is here:
the code that is measured differs, the code that measures does not. The copy of a commit comes from `git archive`, so
nothing is registered in the repository, and the checkout is only read. All is in one temporary folder.

Processes come from `nursery.py`. A pair of them, one a side, takes turns at every workload, in an order that is
reversed each time; then they end, and a new pair starts in the other order. The pairs are the clusters of the
bootstrap (`verdict.py`). After each quarter of the budget the rows are looked at, and those with a verdict are done.
"""

import contextlib
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import process, verdict
from benchmarks.samples import Sample, Samples
from benchmarks.timing import in_turn_order
from benchmarks.verdict import LOOKS, Verdict
from minift.errors import InputError, did_you_mean

SAMPLE, BURST = 0.001, 4  # seconds that a sample should last, and how many of such are a turn
TURNS = 12  # of a pair of processes, at least
ENOUGH = 0.25  # of all two turns have to be undisturbed, or all count
CLOCKS = ("cpu", "wall")
BOTH = ("old", "new")  # the sides, in the order in which they are given
PATIENCE = 120.0  # seconds for torch to be imported and for a child to be ready


@dataclass(frozen=True)
class Side:
    """One version: its name, the folder with its code, and units of more work that are put in by hand, by workload."""

    name: str
    root: Path
    extra: Mapping[str, float] = field(default_factory=dict)


# Folders --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Yield a temporary folder, and remove it."""
    with tempfile.TemporaryDirectory(prefix="minift-") as name:
        yield Path(name).resolve()


def make_side(version: str, target: Path, repository: Path = process.ROOT) -> Side:
    """Copy a version of minift and this `benchmarks` into a new folder.

    Args:
        version: a commit, or a folder (`.` is the working tree).

    Raises:
        InputError: for a commit that the repository does not have, one without minift, and without git.
    """
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "results")
    if Path(version).is_dir():
        if not (Path(version) / "minift" / "__init__.py").is_file():
            raise InputError(f"{version}: there is no minift/ in it; give a commit, or the root of a checkout")
        shutil.copytree(Path(version) / "minift", target / "minift", ignore=ignore)
        name = str(Path(version)) if version != "." else "the working tree"
    else:
        name = _commit(repository, version)
        archive = _git(repository, "archive", "--format=tar", name, "minift")
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(target, filter="data")
    shutil.copytree(Path(__file__).parent, target / "benchmarks", ignore=ignore)
    return Side(name, target)


def _commit(repository: Path, version: str) -> str:
    """Return the short name of a commit. Raises InputError, with the branch that may be meant, where there is none."""
    known = _git(repository, "for-each-ref", "--format=%(refname:short)").decode("utf-8", "replace").split()
    try:
        words = ("rev-parse", "--short", "--verify", "--end-of-options", f"{version}^{{commit}}")
        return _git(repository, *words).decode("ascii").strip()
    except InputError:
        near = did_you_mean(version, known)
        raise InputError(f"no such commit: {version} (in this repository){near}") from None


def _git(repository: Path, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", *words], cwd=repository, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"git: {error.strerror or error}; --commits needs it") from None
    if done.returncode:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise InputError(f"git {words[0]} {words[-1]}: {last}")
    return done.stdout


# Processes ------------------------------------------------------------------------------------------------------------


class Nursery:
    """The parent of all processes that are measured (`nursery.py`). They end when it ends."""

    def __init__(self, place: Path, threads: int | None = None):
        process.check_system("fork", "comparing commits")
        self._place, self._threads = place, threads
        self._socket = str(place / "socket")
        self._errors = (place / "errors").open("w+b")
        command = [sys.executable, "-P", str(Path(__file__).with_name("nursery.py")), self._socket]
        env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, env=env, cwd=place)
        assert self._parent.stdout is not None
        if self._parent.stdout.readline() != b"ready\n":
            self.__exit__()
            raise InputError(f"the processes to measure do not start: {self.last_error()}")

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def last_error(self) -> str:
        """Return the last line that a process has written to standard error."""
        self._errors.seek(0)
        return (self._errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]

    def child(
        self, side: Side, seed: int, names: Sequence[str], setting: Mapping[str, Any], units: float = 0
    ) -> "Child":
        """Start a process of a side. It gets ready by itself; `Child.ready` waits for it."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(self._socket)
        first = {
            "root": str(side.root),
            "cache": str(self._place / "cache"),
            "seed": seed,
            "names": list(names),
            "setting": dict(setting),
            "extra": {name: side.extra[name] for name in names if name in side.extra},
            "threads": self._threads,
            "units": units,
        }
        return Child(side.name, connection, first, self.last_error)


class Child:
    """A process of one side, which takes a sample when it is asked."""

    def __init__(self, name: str, connection: socket.socket, first: Mapping[str, Any], error: Callable[[], str]):
        self._name, self._connection, self._error = name, connection, error
        self._lines = connection.makefile("rw", encoding="utf-8")
        self._tell(first)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()
        self._connection.close()

    def answer(self) -> dict[str, Any]:
        """Return its next answer. Raises InputError when it has ended."""
        line = self._lines.readline()
        if not line:
            raise InputError(f"a process of {self._name} has ended: {self._error()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, name: str, calls: int, burst: int = 1) -> dict[str, Any]:
        """Take a sample of a workload, as `workloads.sample` describes it."""
        self._tell({"name": name, "calls": calls, "burst": burst})
        return self.answer()

    def _tell(self, words: Mapping[str, Any]) -> None:
        print(json.dumps(words), file=self._lines, flush=True)


# Turns ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How two sides are compared.

    Attributes:
        names: of the workloads.
        setting: config, batch_size, length, dtype and device of them.
        budget: seconds for all.
        band: the difference that matters, as a share.
        clock: "cpu", the time that the process had a core, or "wall".
        seed: of the shifts of the processes' heaps, and of the bootstrap.
    """

    names: tuple[str, ...]
    setting: Mapping[str, Any]
    budget: float
    band: float = verdict.BAND
    clock: str = "cpu"
    seed: int = 0


@dataclass
class Measured:
    """What a comparison has found.

    Attributes:
        verdicts: by workload.
        samples: by workload, of both sides, old and new; a turn of one is the same turn of the other.
        pairs: by workload, the number of turns of each pair of processes.
        missing: workloads that a side lacks, with its reason.
        calls, bursts: by workload, the calls of a sample and the samples of a turn.
        looks: how many of the four looks were taken.
    """

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    samples: dict[str, tuple[list[Sample], list[Sample]]] = field(default_factory=dict)
    pairs: dict[str, list[int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    bursts: dict[str, int] = field(default_factory=dict)
    looks: int = 0

    def ratios(self, name: str) -> list[list[float]]:
        """Return the ratio new over old of all two turns that count, by pair of processes.

        Two turns, one in each order, are one ratio, their geometric mean: who is asked a second time in a row still has
        its caches, which is worth up to a quarter of the time, and a ratio of one turn is now above and now below the
        truth by as much. Turns in which another process took a core away are left out where enough others remain.
        """
        both, found = list(zip(*self.samples[name], strict=True)), list[list[tuple[float, bool]]]()
        for turns in self.pairs[name]:
            here, both = both[:turns], both[turns:]
            two = zip(here[::2], here[1::2], strict=False)
            found.append([(ratio_of(first, second), is_calm(first, second)) for first, second in two])
        all_count = sum(calm for one in found for _, calm in one) < ENOUGH * sum(map(len, found))
        return [[ratio for ratio, calm in one if calm or all_count] for one in found]

    def of_side(self, name: str, side: int, clock: str) -> Samples:
        """Return the samples of one workload and side for a record."""
        stopped = "budget" if self.verdicts[name].word == "undecided" else "decided"
        return Samples(name, clock, "warm", tuple(self.samples[name][side]), stopped, 0.0)


def ratio_of(*turns: tuple[Sample, Sample]) -> float:
    """Return the geometric mean of the ratios new over old of some turns, of which each has the samples old and new."""
    return math.exp(sum(math.log(new.seconds / old.seconds) for old, new in turns) / len(turns))


def is_calm(*turns: tuple[Sample, Sample]) -> bool:
    """Return whether no sample of some turns has a mark."""
    return not any(sample.marks for turn in turns for sample in turn)


def measure(
    nursery: Nursery,
    sides: Sequence[Side],
    plan: Plan,
    show: Callable[[str], object] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
) -> Measured:
    """Compare two sides, old and new, until all workloads are decided or the budget is gone.

    Raises:
        InputError: when a process ends, or no workload is left that both sides have.
    """
    measured, begin, pending = Measured(), clock(), list(plan.names)

    def left() -> float:
        return plan.budget - (clock() - begin)

    for pair in count():
        pending = _take_pair(nursery, sides, plan, pair, pending, measured, left)
        look = min(len(LOOKS), int(len(LOOKS) * (1 - left() / plan.budget)))
        if look > measured.looks:
            measured.looks = look
            _look(measured, plan, look)
            pending = [name for name in pending if measured.verdicts[name].word == "undecided"]
            show(f"{verdict.counted(pair + 1, 'pairs of processes')}: {_count(measured)}")
        if not pending or look == len(LOOKS):
            return measured
    raise AssertionError


def _look(measured: Measured, plan: Plan, look: int) -> None:
    """Judge what has no verdict yet. Rows that have one count in the correction for many rows."""
    judged = {name: verdict.paired(measured.ratios(name), plan.seed) for name in measured.samples}
    known = {name: one for name, one in judged.items() if one is not None}
    new = verdict.decide(known, plan.band, LOOKS[look - 1])
    for name in judged:
        if measured.verdicts.get(name, UNKNOWN).word == "undecided":
            measured.verdicts[name] = new.get(name, UNKNOWN)


UNKNOWN = Verdict("undecided", 1.0, 0.0, float("inf"), 0, 0, "at least two pairs of processes; give a larger --budget")


def _count(measured: Measured) -> str:
    words = [one.word for one in measured.verdicts.values()]
    return ", ".join(f"{words.count(word)} {word}" for word in ("faster", "slower", "same", "undecided"))


def _take_pair(
    nursery: Nursery,
    sides: Sequence[Side],
    plan: Plan,
    pair: int,
    names: list[str],
    measured: Measured,
    left: Callable[[], float],
) -> list[str]:
    """Start a process of each side, let them take turns, and end them. Return the workloads that both have."""
    start = left()
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for which in in_turn_order(BOTH, pair):
            side, seed = sides[BOTH.index(which)], 10_000 * plan.seed + 2 * pair + BOTH.index(which)
            children[which] = stack.enter_context(nursery.child(side, seed, names, plan.setting))
        ready = [children[which].answer() for which in BOTH]
        if pair == 0:
            names = _begin(measured, sides, names, ready)
        fresh = left()
        for name in names:
            measured.pairs[name].append(0)
        for turn in count():  # as long as the start took, so that half of the time is spent on samples
            if (turn >= TURNS and fresh - left() >= start - fresh) or (turn >= 2 and left() <= 0):
                return names
            for name in names:
                _take_turn(children, name, turn, measured, plan.clock)
    raise AssertionError


def _take_turn(children: Mapping[str, Child], name: str, turn: int, measured: Measured, clock: str) -> None:
    asked = (name, measured.calls[name], measured.bursts[name])
    answers = {which: children[which].sample(*asked) for which in in_turn_order(BOTH, turn)}
    measured.pairs[name][-1] += 1
    for which, taken in zip(BOTH, measured.samples[name], strict=True):
        one = answers[which]
        marks = ("other load",) if one["preempted"] else ()
        seconds = one["cpu"] if clock == "cpu" else one["seconds"]
        taken.append(Sample(one["at"], seconds, measured.calls[name], len(taken), marks))


def _begin(measured: Measured, sides: Sequence[Side], names: list[str], ready: Sequence[Any]) -> list[str]:
    """Note what a side lacks, and how many calls make a sample. Return the workloads that both have."""
    for side, answer in zip(sides, ready, strict=True):
        for name, reason in answer["missing"].items():
            measured.missing.setdefault(name, f"{side.name} lacks it ({reason})")
    names = [name for name in names if name not in measured.missing]
    if not names:
        raise InputError("nothing to compare: " + "; ".join(f"{name}: {why}" for name, why in measured.missing.items()))
    for name in names:
        seconds = max(answer["seconds"][name] for answer in ready)
        calls = measured.calls[name] = max(1, min(1_000, round(SAMPLE / max(seconds, 1e-9))))
        measured.bursts[name] = max(1, min(BURST, round(BURST * SAMPLE / max(calls * seconds, 1e-9))))
        measured.samples[name], measured.pairs[name] = ([], []), []
    return names
