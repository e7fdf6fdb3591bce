"""Hold the verdicts of `compare --commits` to account: identical code must not differ, and a slowdown must be found.

Both sides are copies of the same working tree, and each comparison is one workload with the budget of one row, by the
same processes, turns and rules as `compare --commits`. Of some comparisons the new side is made slower by hand: after
each call it does so many small operations more, counted out beforehand to take that share of the call's time.

* *no difference* (A/A): a verdict of faster or slower is a false alarm;
* *3 %*, *10 %* (A/B): the share that is said to be slower is the power.

A competing load (`--load`) is a process that computes for a while and sleeps for a while, in turns of random length.

    python -m benchmarks alike                                      # all cases, about an hour
    python -m benchmarks alike --comparisons 50 --slowdown 3 --load --json alike.json

With `--json` each comparison is added to the file as soon as it is done, and a command that finds some of its
comparisons there only does the rest: it may be stopped, and the cases may be measured one after the other.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import arguments, commits, compare, record
from benchmarks.commits import Nursery, Plan, Side
from benchmarks.workloads import WORKLOADS
from minift.errors import InputError
from minift.runs.stop import ended_by_signals
from minift.values import check_number

AFRESH = 20  # comparisons by one nursery: what its processes have in common is drawn anew after so many
COUNTED, UNITS = 15, 2_000  # turns that count out what a slowdown takes, and its units in one call
WORDS = ("faster", "slower", "same", "undecided")


@dataclass(frozen=True)
class Case:
    """Comparisons of one kind: how many percent slower the new side is made, with a competing load or without."""

    slowdown: float
    load: bool

    @property
    def name(self) -> str:
        """Return its name for the table."""
        return (f"{self.slowdown:g} %" if self.slowdown else "no difference") + (", load" if self.load else "")


CASES = {  # how many comparisons of each, without other options
    Case(0, False): 200,
    Case(0, True): 200,
    Case(3, False): 50,
    Case(3, True): 50,
    Case(10, False): 50,
    Case(10, True): 50,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    parser.add_argument("--comparisons", type=int, metavar="N", help="of the case (without: all cases, 200 or 50)")
    parser.add_argument("--slowdown", type=float, default=0.0, metavar="X", help="percent (%(default)s: none)")
    parser.add_argument("--load", action="store_true", help="with a competing load")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="workloads, in turns (all)")
    parser.add_argument("--band", type=float, default=2.0, metavar="X", help="percent that matter (%(default)s)")
    budget = compare.BUDGET
    parser.add_argument("--budget", type=float, default=budget, metavar="S", help="of a comparison (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--clock", choices=commits.CLOCKS, help="(cpu with one thread on a CPU, else wall)")
    arguments.add_shape(parser, config="bundled", batch_size=2, length=64)
    arguments.add_machine(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Compare, print a table and write the JSON."""
    cases = dict(CASES)
    if options.comparisons is not None:
        arguments.check_counts(options, "comparisons")
        check_number("--slowdown", options.slowdown, least=0)
        cases = {Case(options.slowdown, options.load): options.comparisons}
    elif options.slowdown or options.load:
        raise InputError("--slowdown and --load choose a case: say with --comparisons how many of it")
    names = list(dict.fromkeys(options.rows or WORKLOADS))
    plan = compare.plan_of(options, names, options.budget)
    found = _continued(options.json, plan, options.threads)
    print(f"{compare.heading(plan, options.threads)} a comparison", flush=True)
    try:
        with ended_by_signals():
            for case, wanted in cases.items():
                for one in _compare(case, plan, options.threads, wanted, found):
                    found.append(one)
                    record.write(options.json, _result(options, plan, found))
    except KeyboardInterrupt:
        print(table(found) + ("\nthe same command goes on" if options.json else ""), flush=True)
        raise
    print(table(found))


# The comparisons ------------------------------------------------------------------------------------------------------


def _compare(
    case: Case, plan: Plan, threads: int, wanted: int, found: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the comparisons of a case that are not in `found` yet."""
    done = sum(_case_of(one) == case for one in found)
    while done < wanted:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(commits.folder())
            sides = [commits.make_side(str(commits.process.ROOT), place / which) for which in commits.BOTH]
            nursery = stack.enter_context(Nursery(place, threads))
            if case.load:
                stack.enter_context(competing_load(done))
            for _ in range(min(AFRESH, wanted - done)):
                name = plan.names[done % len(plan.names)]
                one = _one(nursery, sides, case, Plan((name,), plan.setting, plan.budget, plan.band, plan.clock, done))
                done += 1
                print(f"{case.name:<22}{done:>4} of {wanted}  {_line(one)}", flush=True)
                yield one


def _one(nursery: Nursery, sides: Sequence[Side], case: Case, plan: Plan) -> dict[str, Any]:
    """Compare once; return the verdict, the spread of single turns and the slowdown that was put in."""
    (name,), begin = plan.names, time.time()
    units, put_in = count_out(nursery, sides[1], case.slowdown / 100, plan) if case.slowdown else (0.0, 0.0)
    slower = Side(sides[1].name, sides[1].root, {name: units})
    measured = commits.measure(nursery, [sides[0], slower], plan)
    if name in measured.missing:
        raise InputError(f"{name}: {measured.missing[name]}")
    ratios = [ratio for turns in measured.ratios(name) for ratio in turns]
    return {
        "case": asdict(case),
        "row": name,
        "put_in": put_in,
        "began": begin,
        "seconds": time.time() - begin,
        "looks": measured.looks,
        "turn_deviation": statistics.pstdev(ratios),
        **asdict(measured.verdicts[name]),
    }


def count_out(nursery: Nursery, side: Side, share: float, plan: Plan) -> tuple[float, float]:
    """Return how many units of work take this share of a call, and what share they took when they were counted."""
    (name,) = plan.names
    with nursery.child(side, plan.seed, [name], plan.setting, UNITS) as child:
        ready = child.answer()
        calls = max(1, round(commits.SAMPLE / max(ready["seconds"][name], 1e-9)))
        pairs = [
            (
                child.sample(name, calls)[plan.clock if plan.clock == "cpu" else "seconds"],
                child.sample("units", 1)[plan.clock if plan.clock == "cpu" else "seconds"],
            )
            for _ in range(COUNTED)
        ]
    unit = statistics.median(units / call for call, units in pairs) / UNITS  # as a share of a call
    return share / unit, share


@contextlib.contextmanager
def competing_load(seed: int) -> Iterator[None]:
    """Let another process compute and sleep in turns while the block runs."""
    code = (
        "import os, random, sys, time\n"
        "draw, parent = random.Random(int(sys.argv[1])), int(sys.argv[2])\n"
        "while os.getppid() == parent:\n"
        "    end = time.monotonic() + draw.uniform(0.05, 1.0)\n"
        "    while time.monotonic() < end:\n"
        "        sum(range(10_000))\n"
        "    time.sleep(draw.uniform(0.05, 1.0))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(seed), str(os.getpid())]) as burner:
        try:
            yield
        finally:
            burner.kill()


# The result -----------------------------------------------------------------------------------------------------------


def _conditions(plan: Plan, threads: int) -> dict[str, Any]:
    return {**plan.setting, "budget": plan.budget, "band": plan.band, "clock": plan.clock, "threads": threads}


def _continued(file: str | None, plan: Plan, threads: int) -> list[dict[str, Any]]:
    """Return the comparisons that a file holds already. Raises InputError when they were made otherwise."""
    if file is None or not Path(file).exists():
        return []
    result, conditions = record.read(file), _conditions(plan, threads)
    if result["benchmark"] != "alike":
        raise InputError(f"{file}: a result of {result['benchmark']}; give another --json")
    for key, value in conditions.items():
        if result.get(key) != value:
            raise InputError(f"{file}: its {key} is {result.get(key)}, this command's {value}; give another --json")
    comparisons: list[dict[str, Any]] = result["comparisons"]
    return comparisons


def _result(options: argparse.Namespace, plan: Plan, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "alike",
        **record.environment(),
        **_conditions(plan, options.threads),
        "table": {case.name: shares(rows) for case, rows in _by_case(found).items()},
        "comparisons": list(found),
    }


def _case_of(one: Mapping[str, Any]) -> Case:
    return Case(**one["case"])


def _by_case(found: Sequence[Mapping[str, Any]]) -> dict[Case, list[Mapping[str, Any]]]:
    cases: dict[Case, list[Mapping[str, Any]]] = {}
    for one in found:
        cases.setdefault(_case_of(one), []).append(one)
    return cases


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of comparisons of a case, of each verdict, and the median seconds of one."""
    words = [one["word"] for one in rows]
    counts = {word: words.count(word) for word in WORDS}
    return {"comparisons": len(rows), **counts, "seconds": statistics.median(one["seconds"] for one in rows)}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the verdicts by case."""
    lines = [f"{'the new side is slower by':<26}{'n':>5}" + "".join(f"{word:>11}" for word in WORDS) + f"{'s':>7}"]
    for case, rows in _by_case(found).items():
        counts = shares(rows)
        cells = "".join(f"{counts[word] / len(rows):>11.1%}" for word in WORDS)
        lines.append(f"{case.name:<26}{len(rows):>5}{cells}{counts['seconds']:>7.1f}")
    return "\n".join(lines)


def _line(one: Mapping[str, Any]) -> str:
    return (
        f"{one['row']:<10}{one['ratio']:>7.3f} ({one['low']:.3f}-{one['high']:.3f})  {one['word']:<10}"
        f"{one['pairs']:>3} pairs,{one['turns']:>5} turns ± {one['turn_deviation']:.0%},{one['seconds']:>6.1f} s"
    )
