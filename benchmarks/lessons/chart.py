"""Draw a chart of a lesson's numbers: as bars of text for the terminal, and as a PNG."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.errors import need

# Okabe and Ito's colours, which colour-blind readers can distinguish; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "^"), ("#56B4E9", "P"))
WIDTH = 40  # characters of the longest bar


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        x: its position: a number, or the name of what was measured.
        y: the value.
        low, high: the ends of its interval; None without one.
    """

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """The contents of a chart.

    Attributes:
        title: one line above it.
        x, y: the labels of the axes, with units.
        series: points from left to right, by the name of their line.
        log_x, log_y: whether an axis is logarithmic; its values must be above 0.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    log_x: bool = False
    log_y: bool = False

    def text(self) -> str:
        """Return a bar for each point with its value and interval. Bars begin at 0, on log axes at half the least."""
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
        """Draw a PNG: a line for each series, or groups of horizontal bars where `x` are names."""
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
        """Return a function from a value to its share of the longest bar."""
        most = max(values)
        if not self.log_y:
            return lambda value: max(0.0, value / most) if most > 0 else 0.0
        least = min(values) / 2
        return lambda value: math.log(value / least) / math.log(most / least)


def _label_by_factors(axis: Any) -> None:
    """Label an axis with 1, 2, 5, 10, 20, … as plain numbers."""
    axis.set_major_locator(need("matplotlib.ticker", "plot", "--plot").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _name(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:,g}"


def _errors(line: Sequence[Point]) -> list[list[float]] | None:
    """Return the distances from the values to the lower and upper ends of their intervals; None without intervals."""
    if any(point.low is None or point.high is None for point in line):
        return None
    pairs: list[Any] = [(point.y - (point.low or 0.0), (point.high or 0.0) - point.y) for point in line]
    return [[max(0.0, down) for down, _ in pairs], [max(0.0, up) for _, up in pairs]]
