"""One picture of a lesson's numbers, drawn twice: as bars of text for the terminal, and as a PNG to show.

Read next: `estimate.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.errors import need

# Of Okabe and Ito's colours, which the colour-blind can tell apart; the shapes differ, too.
STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "^"), ("#56B4E9", "P"))
WIDTH = 40  # characters of the longest bar


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        x: where it stands: a number, or the name of what was measured.
        y: the value.
        low, high: the ends of its interval; None without one.
    """

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        title: one line above it.
        x, y: what the axes show, with units.
        series: points from left to right, by the name of their line.
        log_x, log_y: axes that go by factors; what stands on a logarithmic axis is above 0.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    log_x: bool = False
    log_y: bool = False

    def text(self) -> str:
        """A bar for each point, with the value and its interval. Bars begin at 0, or below the least of a log axis."""
        points = [point for line in self.series.values() for point in line]
        scale = self._scale([point.y for point in points])
        width = max(len(_name(point.x)) for point in points)
        lines = [f"{self.title}", f"({self.y}, by {self.x})"]
        for name, line in self.series.items():
            lines += [name] if len(self.series) > 1 else []
            for point in line:
                ends = "" if point.low is None or point.high is None else f" [{point.low:.3g}, {point.high:.3g}]"
                bar = "█" * round(WIDTH * scale(point.y))
                lines.append(f"  {_name(point.x):>{width}} │{bar:<{WIDTH}} {point.y:.3g}{ends}")
        return "\n".join(lines)

    def draw(self, file: str) -> None:
        """Draw it to a PNG: a line for each series, or groups of bars from top to bottom where `x` are names."""
        plt = need("matplotlib.pyplot", "plot", "--plot")
        figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
        names = list(dict.fromkeys(point.x for line in self.series.values() for point in line))
        named = any(isinstance(name, str) for name in names)
        for number, (name, line) in enumerate(self.series.items()):
            colour, marker = STYLES[number % len(STYLES)]
            y, errors = [point.y for point in line], _errors(line)
            if named:
                bar = 0.8 / len(self.series)
                places = [names.index(point.x) + (number - (len(self.series) - 1) / 2) * bar for point in line]
                axes.barh(places, y, bar, color=colour, label=name, xerr=errors, capsize=3)
            else:
                x = [float(point.x) for point in line]
                axes.errorbar(x, y, errors, color=colour, marker=marker, label=name, capsize=3)
        if named:
            axes.set_yticks(range(len(names)), [_name(name) for name in names])
            axes.invert_yaxis()
        axes.set(title=self.title, xlabel=self.y if named else self.x, ylabel="" if named else self.y)
        if self.log_y if named else self.log_x:
            axes.set_xscale("log")
            _label_by_factors(axes.xaxis)
        if self.log_y and not named:
            axes.set_yscale("log")
            _label_by_factors(axes.yaxis)
        axes.grid(axis="x" if named else "y", color="0.9")
        axes.set_axisbelow(True)
        if len(self.series) > 1:
            axes.legend(frameon=False)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        plt.close(figure)

    def _scale(self, values: Sequence[float]) -> Callable[[float], float]:
        """From a value to the share of the longest bar."""
        most = max(values)
        if not self.log_y:
            return lambda value: max(0.0, value / most) if most > 0 else 0.0
        least = min(values) / 2
        return lambda value: math.log(value / least) / math.log(most / least)


def _label_by_factors(axis: Any) -> None:
    """1, 2, 5, 10, 20, … as plain numbers."""
    axis.set_major_locator(need("matplotlib.ticker", "plot", "--plot").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _name(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:,g}"


def _errors(line: Sequence[Point]) -> list[list[float]] | None:
    """How far the intervals reach down and up; None where there are none."""
    if any(point.low is None or point.high is None for point in line):
        return None
    pairs: list[Any] = [(point.y - (point.low or 0.0), (point.high or 0.0) - point.y) for point in line]
    return [[max(0.0, down) for down, _ in pairs], [max(0.0, up) for _, up in pairs]]
