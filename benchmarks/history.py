"""Draw how each row of a folder's results changed from one commit to the next.

One panel a row, of the results of one benchmark; each colour is one machine and one setting, as times of two machines
are no history. A point is the median of a result, its bar the interval of that median. Results of the same code are at
one place, and the line goes through the middle of them, as two measurements of one code are no progress. The places are
in the order in which their first results were measured. `compare --history` calls it.

    python -m benchmarks compare --history benchmarks/results --plot history.png
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.samples import median_interval
from benchmarks.verdict import counted
from minift.errors import InputError, did_you_mean, need

MOST = 60  # panels: more cannot be read
COLUMNS = 3
NAMED = 6  # files that are left out for one reason: more are counted
APART = 0.12  # between results of the same code, where two commits are 1 apart
# Okabe and Ito's colours, which colour-blind readers can distinguish; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"), ("#56B4E9", "^"), ("#000000", "x"))


@dataclass(frozen=True)
class Point:
    """One row of one result: when, which code, the median in seconds, and its interval (None: of too few samples).

    Attributes:
        code: the commit and the checksum of the code, as a commit with "+" may be anything.
        per: what the seconds are for.
    """

    began: float
    code: tuple[str, str]
    median: float
    interval: tuple[float, float] | None
    per: str


Lines = dict[str, dict[str, list[Point]]]  # by panel, by machine and setting: in the order of time


def draw(folder: Path, file: str, names: Sequence[str] | None = None) -> str:
    """Draw the history of a folder's results to a PNG file. Return what was drawn and what was left out, in one line.

    Raises:
        InputError: for a folder without any results with rows, unknown `names`, too many rows, and without matplotlib.
    """
    if not folder.is_dir():
        raise InputError(f"--history {folder}: not a folder")
    panels, left_out = _collect(folder)
    for name in names or ():
        if name not in {panel.split(": ", 1)[1] for panel in panels}:
            known = [panel.split(": ", 1)[1] for panel in panels]
            raise InputError(f"--rows {name}: in no result of {folder}{did_you_mean(name, known)}")
    panels = {panel: lines for panel, lines in panels.items() if not names or panel.split(": ", 1)[1] in names}
    if not panels:
        said = left_out or "it has no file *.json"
        raise InputError(f"--history {folder}: no result of `python -m benchmarks … --json` with samples; {said}")
    if len(panels) > MOST:
        raise InputError(f"--history {folder}: {len(panels)} rows are more than the {MOST} of a figure; give --rows")
    _figure(panels, file)
    results = {(point.began, point.code) for lines in panels.values() for line in lines.values() for point in line}
    drawn = f"{file}: {counted(len(panels), 'rows')} of {counted(len(results), 'results')}"
    return f"{drawn}; {left_out}" if left_out else drawn


def _collect(folder: Path) -> tuple[Lines, str]:
    """Return the points of all results, and which files are left out and why: empty where none is."""
    panels: Lines = {}
    reasons = defaultdict[str, list[str]](list)
    for file in sorted(folder.rglob("*.json")):
        try:
            result = record.read(file)
            points = _points(result)
        except InputError as error:
            reasons[str(error).removeprefix(f"{file}: ").removeprefix(f"{file}:")].append(str(file.relative_to(folder)))
            continue
        for name, point in points.items():
            panels.setdefault(f"{result['benchmark']}: {name}", {}).setdefault(_line_of(result), []).append(point)
    for lines in panels.values():
        for line in lines.values():
            line.sort(key=lambda point: point.began)
    return panels, "left out: " + "; ".join(map(_listed, reasons, reasons.values())) if reasons else ""


def _listed(reason: str, files: Sequence[str]) -> str:
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return f"{', '.join(files[:NAMED])}{more} ({reason})"


def _points(result: Mapping[str, Any]) -> dict[str, Point]:
    """Return the point of each row that is a time. Raises InputError for a result that has none."""
    if result["benchmark"] == "compare":
        raise InputError("a result of compare, which is of two versions")
    if result["schema"] == 1:
        raise InputError("no samples: an earlier version wrote it, which kept medians only")
    began = result.get("began")
    if not isinstance(began, int | float) or isinstance(began, bool):
        raise InputError(f"began is {began!r:.40}, not a time in seconds")
    points = {}
    for row in result["rows"]:
        values = [sample[1] for sample in row["samples"] if not sample[4]]
        if row.get("unit", "s") == "s" and values and statistics.median(values) > 0:
            interval = median_interval(values)
            bar = interval if all(map(math.isfinite, interval)) else None
            code = (result["commit"], result["code"])
            points[row["name"]] = Point(began, code, statistics.median(values), bar, str(row.get("per", "call")))
    if not points:
        raise InputError("no samples of times")
    return points


def _line_of(result: Mapping[str, Any]) -> str:
    """Return the name of the line that a result belongs to: its machine and what was measured."""
    machine, settings = result["machine"], result["settings"]
    where = (machine.get("gpu") or {}).get("name") if settings.get("device") == "cuda" else machine.get("cpu")
    words = [str(where), f"{machine.get('threads', machine.get('cores'))} threads"]
    words += [str(settings[key])[:24] for key in ("shape", "dtype") if key in settings]
    shape = [str(settings[key]) for key in ("batch_size", "length") if key in settings]
    return ", ".join([*words, *([" x ".join(shape)] if shape else [])])


def _figure(panels: Lines, file: str) -> None:
    plt = need("matplotlib.pyplot", "plot", "--history")
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = sorted({name for lines in panels.values() for name in lines})
    style = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.6 * columns, 2.7 * rows + 0.4 + 0.2 * len(names)),
        dpi=120,
        squeeze=False,
        layout="constrained",
    )
    for panel, axis in zip(panels, axes.flat, strict=False):
        _panel(axis, panel, panels[panel], style)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = [plt.Line2D([], [], color=colour, marker=marker, label=name) for name, (colour, marker) in style.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=1, fontsize=8, frameon=False)
    figure.savefig(file)
    plt.close(figure)


def _panel(axis: Any, name: str, lines: Mapping[str, Sequence[Point]], style: Mapping[str, tuple[str, str]]) -> None:
    """Draw one row: the results of each code at one place, in the order of time, with the commit below."""
    every = sorted((point for points in lines.values() for point in points), key=lambda point: point.began)
    codes = list(dict.fromkeys(point.code for point in every))
    largest = max(point.median for point in every)
    factor, unit = (1e6, "µs") if largest < 1e-3 else (1e3, "ms") if largest < 1 else (1.0, "s")
    for line, points in lines.items():
        colour, marker = style[line]
        x, y = through(points, codes)
        axis.plot(x, [factor * seconds for seconds in y], color=colour, lw=1.2)
        for at, point in zip(places(points, codes), points, strict=True):
            axis.plot([at], [factor * point.median], color=colour, marker=marker, ms=4)
            if point.interval:
                axis.vlines(at, *(factor * limit for limit in point.interval), color=colour, lw=1.2)
    axis.set_title(name, fontsize=9, loc="left")
    axis.set_ylabel(f"{unit} per {every[-1].per}", fontsize=8)
    axis.set_ylim(0, 1.1 * factor * max(point.interval[1] if point.interval else point.median for point in every))
    axis.set_xlim(-0.5, len(codes) - 0.5)
    step = math.ceil(len(codes) / 8)
    axis.set_xticks(range(0, len(codes), step), [commit for commit, _ in codes[::step]], rotation=30, ha="right")
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", color="0.9")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def through(points: Sequence[Point], codes: Sequence[tuple[str, str]]) -> tuple[list[int], list[float]]:
    """Return the line through some points: for each code that has any, its place and the median of its seconds."""
    x = [i for i, code in enumerate(codes) if any(point.code == code for point in points)]
    return x, [statistics.median(point.median for point in points if point.code == codes[i]) for i in x]


def places(points: Sequence[Point], codes: Sequence[tuple[str, str]]) -> list[float]:
    """Return where each point is drawn: those of one code around its place, so that no bar hides another."""
    found = []
    for i, point in enumerate(points):
        same = [k for k, other in enumerate(points) if other.code == point.code]
        step = min(APART, 0.6 / len(same))
        found.append(codes.index(point.code) + step * (same.index(i) - (len(same) - 1) / 2))
    return found
