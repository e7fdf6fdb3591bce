"""Draw the operations under the machine's roofs: FLOPs a second over arithmetic intensity.

A point on the slope moves its bytes as fast as a copy does; one on the flat top computes as fast as a matrix product.
The distance to the roof is what could still be gained. All variants of an operation have the same intensity, because
its bytes are the least that it needs, not those that a variant moves.

    python -m benchmarks ops --plot roofline.png

Source: Williams et al., "Roofline" (Communications of the ACM 52, 2009).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.errors import need

# Okabe and Ito's colours, which colour-blind readers can distinguish; the markers differ as well.
STYLES = {"naive": ("#D55E00", "v"), "used": ("#0072B2", "o"), "compiled": ("#009E73", "s")}
NEAR = 0.09  # share of the plot's width that a name needs
LINE = 0.024  # share of the plot's height that a name needs


@dataclass(frozen=True)
class Point:
    """What one variant of an operation reached: FLOPs for each byte, and FLOPs a second."""

    operation: str
    variant: str
    intensity: float
    speed: float


def points(operations: Mapping[str, Any]) -> list[Point]:
    """Return the points of all operations in all variants, forward and backward pass together."""
    found = []
    for name, operation in operations.items():
        whole = operation["phases"].get("both") or operation["phases"]["step"]
        for variant, values in whole["variants"].items():
            found.append(Point(name, variant, whole["intensity"], whole["flops"] / values["seconds"]["median"]))
    return found


def draw(result: Mapping[str, Any], file: str) -> None:
    """Draw a result of `ops` to a PNG file."""
    plt = need("matplotlib.pyplot", "plot", "--plot")
    found, roof = points(result["operations"]), result["roof"]
    ridge = roof["flops"] / roof["bandwidth"]
    left, right = min(ridge, *(p.intensity for p in found)) / 2, max(ridge, *(p.intensity for p in found)) * 4
    bottom, top = min(p.speed for p in found) / 2, max(roof["flops"], *(p.speed for p in found)) * 2

    figure, axes = plt.subplots(figsize=(10, 6.5), dpi=150, layout="constrained")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.plot([left, ridge, right], [left * roof["bandwidth"], roof["flops"], roof["flops"]], color="black", lw=1.5)
    axes.grid(which="major", color="0.9")
    for variant, (colour, marker) in STYLES.items():
        reached = [(p.intensity, p.speed) for p in found if p.variant == variant]
        if reached:
            axes.scatter(
                *zip(*reached, strict=True),
                color=colour,
                marker=marker,
                s=40,
                ec="white",
                lw=0.5,
                label=variant,
                zorder=3,
            )
    for group in _groups(found, math.log(right / left) * NEAR):
        _label(axes, group)
    axes.set_title(
        f"{result['batch_size']} x {result['length']} tokens, forward and backward on {result['device']}; the roof: "
        f"{roof['dtype']} product {roof['flops'] / 1e9:,.0f} GFLOP/s, copy {roof['bandwidth'] / 1e9:,.1f} GB/s",
        fontsize=10,
    )
    axes.set_xlabel("arithmetic intensity: FLOPs for each byte of the least traffic")
    axes.set_ylabel("FLOP/s")
    axes.legend(loc="upper left", frameon=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places, moved just enough that each is about `gap` away from the next."""
    apart = list(places)
    for _ in range(200):
        for i in range(len(apart) - 1):
            missing = gap - (apart[i + 1] - apart[i])
            if missing > 0:
                apart[i] -= missing / 2
                apart[i + 1] += missing / 2
    return apart


def _groups(found: Sequence[Point], near: float) -> list[list[Point]]:
    """Group points from left to right that are so near to each other that a name could cover another point."""
    groups: list[list[Point]] = []
    for point in sorted(found, key=lambda p: p.intensity):
        if groups and math.log(point.intensity / groups[-1][0].intensity) < near:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _label(axes: Any, group: Sequence[Point]) -> None:
    """Write the names of a group's points in a column to their right, in the variants' colours, with a line to each."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = math.log(right / left), math.log(top / bottom)
    ordered = sorted(group, key=lambda p: p.speed)
    places = spread_out([math.log(p.speed / bottom) / height for p in ordered], LINE)
    column = math.log(max(p.intensity for p in group) / left) / width + LINE
    for point, place in zip(ordered, places, strict=True):
        axes.annotate(
            point.operation,
            (point.intensity, point.speed),
            xytext=(column, place),
            textcoords="axes fraction",
            color=STYLES[point.variant][0],
            fontsize=8,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6, "shrinkA": 1, "shrinkB": 0},
        )
