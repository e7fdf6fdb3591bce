"""Draw a run's curves: loss and learning rate over the steps, inside a page and, with the `plot` extra, as a PNG.

A long run has more steps than a picture has columns. Neighbours are then averaged, so that no step is left out.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.errors import need
from minift.look.pages.document import text
from minift.look.report import number
from minift.runs.progress import BEFORE

COLUMNS = 400  # points of a line; more are averaged
WIDTH, HEIGHT = 420, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 12, 44  # margins for the labels
SPAN = 30  # if the largest held-out loss is more than so many times the smallest, the axis is logarithmic

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """One chart: its title, what its axes show, and its lines by name, each from left to right."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    log: bool = False  # whether the vertical axis is logarithmic


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Return the charts of a run's `metrics.jsonl`: the loss, and the learning rate."""

    def line(key: str) -> list[tuple[float, float]]:
        return thinned([(step["step"], step[key]) for step in metrics if key in step])

    before = [(0.0, step[BEFORE]) for step in metrics[:1] if BEFORE in step]
    found = {"training": line("loss"), "held out": [*before, *line("validation_loss")]}
    losses = {name: points for name, points in found.items() if points}
    # Training loss may fall to almost nothing; on a logarithmic axis a rise of the other would not be seen.
    values = [loss for _, loss in losses.get("held out") or losses["training"]]
    positive = all(loss > 0 for points in losses.values() for _, loss in points)
    log = positive and max(values) > SPAN * min(values)
    scale = ", each line of the grid ten times the one below" if log else ""
    return [
        Curves("Loss", "step", f"nats a token{scale}", losses, log),
        Curves("Learning rate", "step", "AdamW's, at each step", {"learning rate": line("lr")}),
    ]


def thinned(points: Line, most: int = COLUMNS) -> list[tuple[float, float]]:
    """Return at most `most` points, each the mean of equally many neighbours (the last of fewer)."""
    group = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + group] for i in range(0, len(points), group)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in groups]


def svg(curves: Curves) -> str:
    """Return a chart as HTML, with its first and last values in words for readers who cannot see it."""
    points = [point for line in curves.lines.values() for point in line]
    xs = ticks(min(x for x, _ in points), max(x for x, _ in points))
    heights = [y for _, y in points]
    ys = powers_of_ten(min(heights), max(heights)) if curves.log else ticks(0.0, max(heights))

    def x_of(value: float) -> float:
        return LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        share = math.log(value / ys[0], ys[-1] / ys[0]) if curves.log else (value - ys[0]) / (ys[-1] - ys[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_label(y)}</text>')
    parts += [f'<text x="{x_of(x):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{x:g}</text>' for x in xs]
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(curves.x)}</text>')
    for place, line in enumerate(curves.lines.values()):
        kind = "line second" if place else "line"
        coordinates = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="{kind}" points="{coordinates}"/>')
        if place or len(line) == 1:
            parts += [f'<circle class="dot" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in line]
    several = len(curves.lines) > 1
    words = "; ".join(
        f"{f'{text(name)} ' if several else ''}from {_amount(line[0])} to {_amount(line[-1])}"
        for name, line in curves.lines.items()
    )
    lines = [f"{text(name)} ({'dashed, with dots' if i else 'solid'})" for i, name in enumerate(curves.lines)]
    legend = f" Lines: {', '.join(lines)}." if several else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(curves.title)}: {words}">'
        f"{''.join(parts)}</svg><figcaption><strong>{text(curves.title)}</strong>, {text(curves.y)}.{legend} "
        f"{words[0].upper()}{words[1:]}.</figcaption></figure>"
    )


def png(metrics: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the same charts as a picture. Raises InputError without the `plot` extra."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length of a home that cannot be written
    figure_module = need("matplotlib.figure", "plot", file.name)
    figure = figure_module.Figure(figsize=(10, 4), dpi=150, layout="constrained")
    charts = curves_of(metrics)
    for axes, curves in zip(figure.subplots(1, len(charts)), charts, strict=True):
        for place, (name, line) in enumerate(curves.lines.items()):
            style = {"color": "#D55E00", "marker": "o", "ls": "--"} if place else {"color": "#0072B2"}
            axes.plot([x for x, _ in line], [y for _, y in line], label=name, markersize=4, **style)
        axes.set(title=curves.title, xlabel=curves.x, ylabel=curves.y.split(",")[0])
        if curves.log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        if len(curves.lines) > 1:
            axes.legend(frameon=False)
    figure.savefig(file, format="png")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers, at distances of 1, 2 or 5 · 10ⁿ, that enclose `low` and `high`."""
    high = high if high > low else low + 1.0
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def powers_of_ten(low: float, high: float) -> list[float]:
    """Return the powers of ten that enclose `low` and `high`, at least two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _label(value: float) -> str:
    """Return a tick's number in at most six characters: there is room for no more."""
    short = f"{value:g}"
    return short if len(short) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _amount(point: tuple[float, float]) -> str:
    """Return a point in words."""
    step, value = point
    return f"{number(value) if value >= 0.01 else f'{value:.3g}'} at step {step:g}"
