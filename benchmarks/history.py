"""Draw how each row of a folder's results changed from one commit to the next.

One panel a row, of the results of one benchmark; each line is one machine and one setting, as times of two machines
are no history. A point is the median of a result, its bar the interval of that median. `compare --history` calls it.

    python -m benchmarks compare --history results --plot history.png
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.samples import median_interval
from minift.errors import InputError, did_you_mean, need

MOST = 60  # panels: more cannot be read
COLUMNS = 3
# Okabe and Ito's colours, which colour-blind readers can distinguish; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"), ("#56B4E9", "^"), ("#000000", "x"))


@dataclass(frozen=True)
class Point:
    """One row of one result: when, which commit, the median in seconds, and its interval (None: without samples)."""

    began: float
    commit: str
    median: float
    interval: tuple[float, float] | None


Lines = dict[str, dict[str, list[Point]]]  # by panel, by machine and setting: in the order of time


def draw(folder: Path, file: str, names: Sequence[str] | None = None) -> str:
    """Draw the history of a folder's results to a PNG file. Return what was drawn, in one line.

    Raises:
        InputError: for a folder without results with rows, unknown `names`, too many rows, and without matplotlib.
    """
    if not folder.is_dir():
        raise InputError(f"--history {folder}: not a folder")
    panels, without = _collect(sorted(folder.rglob("*.json")))
    for name in names or ():
        if name not in {panel.split(": ", 1)[1] for panel in panels}:
            known = [panel.split(": ", 1)[1] for panel in panels]
            raise InputError(f"--rows {name}: in no result of {folder}{did_you_mean(name, known)}")
    panels = {panel: lines for panel, lines in panels.items() if not names or panel.split(": ", 1)[1] in names}
    if not panels:
        said = f"{without} results there have no samples" if without else "there are none"
        raise InputError(f"--history {folder}: no result of `python -m benchmarks … --json` with rows; {said}")
    if len(panels) > MOST:
        raise InputError(f"--history {folder}: {len(panels)} rows are more than the {MOST} of a figure; give --rows")
    _figure(panels, file)
    results = {(point.began, point.commit) for lines in panels.values() for line in lines.values() for point in line}
    more = f"; {without} results without samples are left out" if without else ""
    return f"{file}: {len(panels)} rows of {len(results)} results{more}"


def _collect(files: Sequence[Path]) -> tuple[Lines, int]:
    """Return the points of all results, and how many have no rows."""
    panels: Lines = {}
    without = 0
    for file in files:
        result = record.read(file)
        rows = [row for row in result["rows"] if row["unit"] == "s"]
        without += not rows
        for row in rows:
            values = [sample[1] for sample in row["samples"] if not sample[4]]
            if values and statistics.median(values) > 0:
                interval = median_interval(values)
                bar = interval if all(map(math.isfinite, interval)) else None
                point = Point(result["began"], result["commit"], statistics.median(values), bar)
                lines = panels.setdefault(f"{result['benchmark']}: {row['name']}", {})
                lines.setdefault(_line_of(result), []).append(point)
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: point.began)
    return panels, without


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
    """Draw one row: its results side by side in the order of time, each with its commit below."""
    every = sorted({(point.began, point.commit) for points in lines.values() for point in points})
    place = {key: i for i, key in enumerate(every)}
    largest = max(point.median for points in lines.values() for point in points)
    factor, unit = (1e6, "µs") if largest < 1e-3 else (1e3, "ms") if largest < 1 else (1.0, "s")
    for line, points in lines.items():
        colour, marker = style[line]
        x = [place[point.began, point.commit] for point in points]
        y = [factor * point.median for point in points]
        axis.plot(x, y, color=colour, marker=marker, ms=5, lw=1.2)
        for at, point in zip(x, points, strict=True):
            if point.interval:
                axis.vlines(at, *(factor * limit for limit in point.interval), color=colour, lw=1.2)
    axis.set_title(name, fontsize=9, loc="left")
    axis.set_ylabel(unit, fontsize=8)
    axis.set_ylim(0, 1.15 * factor * largest)
    axis.set_xlim(-0.5, len(every) - 0.5)
    step = math.ceil(len(every) / 8)
    axis.set_xticks(range(0, len(every), step), [commit for _, commit in every[::step]], rotation=30, ha="right")
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", color="0.9")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
