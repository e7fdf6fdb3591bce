"""Say of two results, or of two commits, in which rows the second is faster, slower or the same.

Every row gets a verdict by the rules of `verdict.py`: *faster* or *slower* when the difference is certain and larger
than the band, *same* when it is certainly smaller, and *undecided* with what would decide it.

* `--commits OLD NEW` measures both now, in turns, in fresh processes again and again (`commits.py`): the way to settle
  a dispute. A version is a commit or a folder; `.` is the working tree. A row is a workload of `workloads.py`.
* Two files of `--json` are two processes at two times. They are compared only where the control rows, `machine/…`, say
  that the machine was as fast, and never where machine, threads, shapes, dtypes or devices differ.
* `--history DIR` draws each row of all results of a folder over their dates (`history.py`).

    python -m benchmarks compare --commits main .
    python -m benchmarks compare --commits HEAD . --rows norm loss --band 1
    python -m benchmarks compare old.json new.json
    python -m benchmarks compare --history benchmarks/results --plot history.png

*The clock.* On a CPU with one thread (the default) it is the time that a process has a core, which other processes do
not lengthen; with `--threads` above 1 and on a GPU it is the time on the wall, without turns in which a core was taken
away. Exit code: 0 when nothing is slower, 1 when something is, 2 for wrong input and for a result that cannot be
written, 130 when it was interrupted. *Undecided* is 0, with `--strict` 1.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import arguments, commits, history, record, verdict
from benchmarks.commits import BOTH, CLOCKS, Measured, Plan
from benchmarks.verdict import Verdict
from benchmarks.workloads import WORKLOADS
from minift.errors import InputError, did_you_mean, one_line
from minift.values import check_number

BUDGET = 8.0  # seconds a row
CONTROL = "machine/"  # rows that measure the machine, not the code
MACHINE = ("cpu", "flags", "cores", "threads", "affinity")
OLD_SETTINGS = ("config", "dtype", "device", "batch_size", "length")  # of results of schema 1
HEAD = f"{'':<28}{'new / old':>10}{'interval':>16}  {'':<11}"


EPILOG = """\
verdicts, of each row, new over old:
  faster, slower  the difference is certain, and larger than the band
  same            it is certainly smaller than the band
  undecided       anything else; the row says what would decide it

exit codes:
  0    no row is slower; undecided ones do not count, but with --strict
  1    a row is slower; with --strict, or undecided
  2    wrong input, or the result cannot be written
  130  interrupted, by Ctrl-C or SIGTERM
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = EPILOG
    parser.add_argument("files", nargs="*", metavar="FILE", help="two results: old and new")
    parser.add_argument("--commits", nargs=2, metavar=("OLD", "NEW"), help="measure two versions in turns")
    parser.add_argument("--history", metavar="DIR", help="draw the rows of all results in DIR")
    parser.add_argument("--plot", metavar="FILE.png", help="of --history (history.png)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; workloads are " + ", ".join(WORKLOADS))
    percent = 100 * verdict.BAND
    parser.add_argument("--band", type=float, default=percent, metavar="X", help="percent that matter (%(default)s)")
    parser.add_argument("--budget", type=float, metavar="S", help=f"seconds of --commits ({BUDGET:.0f} a row)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of --commits (%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, help="of --commits (cpu with one thread on a CPU, else wall)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a row is undecided, too")
    arguments.add_shape(parser, config="bundled", batch_size=2, length=64)
    arguments.add_machine(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compare, print a table, write the JSON and return the exit code."""
    asked = [bool(options.files), bool(options.commits), bool(options.history)]
    if sum(asked) != 1 or len(options.files) not in (0, 2):
        raise InputError("give two files, or --commits OLD NEW, or --history DIR")
    check_number("--band", options.band, above=0)
    if options.history:
        plot = options.plot or "history.png"
        arguments.check_plot(plot)
        print(history.draw(Path(options.history), plot, options.rows))
        return 0
    if options.plot:
        raise InputError("--plot is for --history")
    verdicts = _commits(options) if options.commits else _files(options)
    words = [one.word for one in verdicts.values()]
    return int("slower" in words or (options.strict and "undecided" in words))


# Commits --------------------------------------------------------------------------------------------------------------


def plan_of(options: argparse.Namespace, names: Sequence[str], budget: float) -> Plan:
    """Return the plan that the options describe. Raises InputError for invalid ones and unknown workloads."""
    for name in names:
        if name not in WORKLOADS:
            known = ", ".join(WORKLOADS)
            raise InputError(f"unknown workload {name!r}{did_you_mean(name, WORKLOADS)}; known: {known}")
    arguments.check_counts(options, "threads")
    check_number("--budget", budget, above=0)
    config = arguments.train_config(options)
    alone = config.device == "cpu" and options.threads == 1
    setting = {
        "config": str(Path(options.config).resolve()) if options.config.endswith(".json") else options.config,
        "batch_size": config.batch_size,
        "length": config.max_length,
        "dtype": config.dtype,
        "device": config.device,
    }
    return Plan(tuple(names), setting, budget, options.band / 100, options.clock or ("cpu" if alone else "wall"))


def heading(plan: Plan, threads: int) -> str:
    """Return the line that says what is measured, and by which clock."""
    setting, clock = plan.setting, "time on a core" if plan.clock == "cpu" else "time on the wall"
    shape = f"{Path(setting['config']).name}, {setting['batch_size']} x {setting['length']} tokens"
    where = f"{setting['dtype']} on {setting['device']}, {threads} thread{'s' * (threads > 1)}"
    return f"{shape}, {where}, {clock}; band {100 * plan.band:g} %, {plan.budget:.0f} s"


def _commits(options: argparse.Namespace) -> dict[str, Verdict]:
    names = list(dict.fromkeys(options.rows or WORKLOADS))
    plan = plan_of(options, names, BUDGET * len(names) if options.budget is None else options.budget)
    with commits.folder() as place:
        sides = [
            commits.make_side(version, place / which) for which, version in zip(BOTH, options.commits, strict=True)
        ]
        old, new = (side.name for side in sides)
        print(f"old: {old}; new: {new}\n{heading(plan, options.threads)}", flush=True)
        with commits.Nursery(place, options.threads) as nursery:
            measured = commits.measure(nursery, sides, plan, lambda text: print(f"  {text}", flush=True))
    _show(measured.verdicts, measured.missing, old, new)
    record.write(options.json, _result(options, plan, measured, old, new))
    return measured.verdicts


def _result(options: argparse.Namespace, plan: Plan, measured: Measured, old: str, new: str) -> dict[str, Any]:
    more = {"config": arguments.recorded_shape(options.config)}
    return {
        "benchmark": "compare",
        **record.environment(),
        **plan.setting,
        **more,
        "sides": {"old": old, "new": new},
        "band": plan.band,
        "budget": plan.budget,
        "looks": measured.looks,
        "threads": options.threads,
        "missing": measured.missing,
        "verdicts": {name: recorded(one) for name, one in measured.verdicts.items()},
        "rows": [
            record.row(f"{name}/{which}", measured.of_side(name, i, plan.clock), pairs=measured.pairs[name])
            for name in measured.samples
            for i, which in enumerate(BOTH)
        ],
    }


# Files ----------------------------------------------------------------------------------------------------------------


def _files(options: argparse.Namespace) -> dict[str, Verdict]:
    old, new = (record.read(file) for file in options.files)
    check_alike(options.files, old, new)
    verdicts, missing = compare_files(old, new, options.rows, options.band / 100)
    names = [Path(file).name for file in options.files]
    one, other = options.files if names[0] == names[1] and old != new else names
    _show(verdicts, missing, one, other, "; both are the same result" if old == new else "")
    settings = {"band": options.band / 100, "commits": {"old": old["commit"], "new": new["commit"]}}
    found = {name: recorded(one) for name, one in verdicts.items()}
    record.write(
        options.json,
        {"benchmark": "compare", **record.environment(), **settings, "missing": missing, "verdicts": found},
    )
    return verdicts


def check_alike(files: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise InputError, one line that names all that differs, unless two results are of the same thing and machine.

    A result of `compare` has verdicts on two versions; another one has them on others.
    """
    for file, result in zip(files, (old, new), strict=True):
        if result["benchmark"] == "compare":
            raise InputError(
                f"{file}: a result of compare itself, which holds verdicts on two versions and cannot be compared with "
                "another result; give results of other benchmarks, or measure two versions: compare --commits OLD NEW"
            )
    one, other = _conditions(old), _conditions(new)
    unlike = [
        f"{key} is {_short(one.get(key))} and {_short(other.get(key))}"
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    ]
    if unlike:
        raise InputError(f"{files[0]} and {files[1]} cannot be compared: " + "; ".join(unlike))


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    machine, gpu = result["machine"], result["machine"].get("gpu") or {}
    known = {key: machine[key] for key in MACHINE if key in machine}
    settings = dict(result["settings"]) or {key: result[key] for key in OLD_SETTINGS if key in result}
    settings = {("shape" if key == "config" else key): value for key, value in settings.items()}
    return {"benchmark": result["benchmark"], **known, "gpu": gpu.get("name"), **settings}


def _short(value: object) -> str:
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"{len(value)} of them ({', '.join(map(str, value[:2]))} …)"
    return "not said" if value is None else str(value)[:60]


def compare_files(
    old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str] | None, band: float
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Return the verdict on each row that two results share, and why others have none.

    Raises:
        InputError: when they share none, or a name of `names` is in neither.
    """
    mine, theirs = (times_of(result) for result in (old, new))
    known = [name for name in (*mine, *theirs) if not name.startswith(CONTROL)]
    for name in names or ():
        if name not in known:
            raise InputError(f"--rows {name}: in neither file{did_you_mean(name, known)}")
    asked = [name for name in dict.fromkeys(known) if not names or name in names]
    missing = {name: f"only in the old one{_wrong(name, new)}" for name in asked if name not in theirs}
    missing |= {name: f"only in the new one{_wrong(name, old)}" for name in asked if name not in mine}
    missing |= {
        row["name"]: f"its unit is {row['unit']}, which is no time"
        for row in (*old["rows"], *new["rows"])
        if row.get("unit", "s") != "s"
    }
    shared = [name for name in asked if name not in missing]
    if not shared:
        raise InputError("the two results share no row with times" + _reasons(missing))
    reason = "" if mine == theirs else machine_differs(mine, theirs, band)
    estimates = {name: verdict.unpaired(mine[name], theirs[name]) for name in shared}
    enough = {name: one for name, one in estimates.items() if one is not None}
    judged = verdict.decide(enough, band, more="turns")
    found = {}
    for name in shared:
        ratio = statistics.median(theirs[name]) / statistics.median(mine[name])
        if mine[name] == theirs[name]:  # one measurement, not two
            found[name] = Verdict("same", 1.0, 1.0, 1.0, 1, len(mine[name]))
        elif reason or name not in judged:
            needs = reason or "no samples, or fewer than six: measure again with this version, or compare --commits"
            found[name] = Verdict("undecided", ratio, 0.0, math.inf, 1, len(mine[name]), needs)
        else:
            found[name] = judged[name]
    return found, missing


def _wrong(name: str, result: Mapping[str, Any]) -> str:
    """Return that a result lacks a row because the function of one's own was wrong; "" where that is not the reason."""
    added = result.get("added")
    for label, values in added.items() if isinstance(added, Mapping) else ():
        if f"/{label}/" in f"/{name}/" and isinstance(values, Mapping) and "error" in values:
            return f"; in the other, {label} was wrong and got no time: {one_line(values['error'])}"
    return ""


def times_of(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of the turns that count by row; of a result of schema 1, each median that it has."""
    if result["schema"] == 1:
        return {name: [value] for name, value in _medians(result).items()}
    rows = {
        row["name"]: [s[1] for s in row["samples"] if not s[4]] for row in result["rows"] if row.get("unit", "s") == "s"
    }
    return {name: values for name, values in rows.items() if values and min(values) > 0}


def _medians(values: Mapping[str, Any], path: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, Mapping) and "median" in value:
            if "seconds" in name and value["median"] > 0:
                found[name] = float(value["median"])
        elif isinstance(value, Mapping):
            found |= _medians(value, name)
    return found


def machine_differs(old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]], band: float) -> str:
    """Return why the times of two files cannot be held against each other; empty when they can."""
    controls = [name for name in old if name.startswith(CONTROL) and name in new]
    if not controls:
        return "no rows machine/… in both say that the machine was as fast: compare --commits"
    off = max(abs(math.log(statistics.median(new[name]) / statistics.median(old[name]))) for name in controls)
    if off <= math.log1p(band):
        return ""
    return f"the machine itself differed by {math.expm1(off):.1%}; run both in turns: compare --commits"


# The table ------------------------------------------------------------------------------------------------------------


def _show(verdicts: Mapping[str, Verdict], missing: Mapping[str, str], old: str, new: str, remark: str = "") -> None:
    print(HEAD)
    for name, one in verdicts.items():
        print(line(name, one))
    for name, reason in missing.items():
        print(f"{name:<28}left out: {reason}")
    print(conclusion(verdicts, old, new) + remark)


def line(name: str, one: Verdict) -> str:
    """Return a row of the table. A ratio of which nothing is known is not shown."""
    known = one.low > 0.1 and one.high < 10  # two pairs of processes may leave anything possible
    interval = f"{one.low:.3f}-{one.high:.3f}" if known else "unknown" if says_something(one) else "-"
    ratio = f"{one.ratio:.3f}" if says_something(one) else "-"
    pairs = f" in {one.pairs} pairs of processes" if one.pairs > 1 else ""
    number = verdict.counted(one.turns, "turns") + pairs
    return f"{name:<28}{ratio:>10}{interval:>16}  {one.word:<11}" + (one.needs or number)


def says_something(one: Verdict) -> bool:
    """Return whether a verdict's ratio has an interval: that of two machines, or of a few turns, has none."""
    return one.low > 0 or one.high < math.inf


def recorded(one: Verdict) -> dict[str, Any]:
    """Return a verdict for a record, with null in place of a ratio of which nothing is known."""
    unknown = {} if says_something(one) else dict.fromkeys(("ratio", "low", "high"))
    return {**asdict(one), **unknown}


def conclusion(verdicts: Mapping[str, Verdict], old: str, new: str) -> str:
    """Return one sentence: in which rows the new side is faster, slower, the same, and which are undecided."""
    parts = []
    for word in ("faster", "slower", "same", "undecided"):
        names = [name for name, one in verdicts.items() if one.word == word]
        if word in ("faster", "slower") and names:
            ratios = (verdicts[name].ratio if word == "slower" else 1 / verdicts[name].ratio for name in names)
            listed = ", ".join(f"{name} ({ratio:.2f} x)" for name, ratio in zip(names, ratios, strict=True))
            parts.append(f"{word} in {listed}")
        elif names:
            rows = "all rows" if len(names) == len(verdicts) else f"{len(names)} row{'s' * (len(names) > 1)}"
            parts.append(f"{'the same' if word == 'same' else word} in {rows}")
    return f"{new}, against {old}, is " + ", ".join(parts)


def _reasons(missing: Mapping[str, str]) -> str:
    return ": " + "; ".join(f"{name} is {why}" for name, why in list(missing.items())[:3]) if missing else ""
