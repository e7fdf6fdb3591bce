"""Draw the operations under the machine's roofs: FLOPs a second over arithmetic intensity.

A point on the slope moves its bytes as fast as a copy does; one on the flat top computes as fast as a matrix product.
The distance to the roof is what could still be gained. The dashed slope is memory that is only read, at the highest
speed: what writes little may come near it. All variants of an operation have the same intensity, because its bytes are
the least that it needs, not those that a variant moves.

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
    read = roof.get("read_bandwidth") or 0.0  # 0: a record that is older than this roof
    ridges = [roof["flops"] / rate for rate in (roof["bandwidth"], read) if rate]
    left, right = (f(*ridges, *(p.intensity for p in found)) for f in (min, max))
    left, right = left / 2, right * 4
    bottom, top = min(p.speed for p in found) / 2, max(roof["flops"], *(p.speed for p in found)) * 2.5

    figure, axes = plt.subplots(figsize=(10, 6.5), dpi=150, layout="constrained")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.plot([left, ridges[0], right], [left * roof["bandwidth"], roof["flops"], roof["flops"]], color="black", lw=1.5)
    if read:
        axes.plot([left, ridges[1]], [left * read, roof["flops"]], color="black", lw=1.5, ls=(0, (5, 3)))
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
        f"{result['batch_size']} x {result['length']} tokens, forward and backward in {roof['dtype']} on "
        f"{result['device']}: operations, and the roofs of the same run",
        fontsize=10,
    )
    axes.set_xlabel("arithmetic intensity: FLOPs for each byte of the least traffic")
    axes.set_ylabel("FLOP/s")
    axes.legend(loc="lower right", frameon=False)
    _name_roofs(
        axes, roof["flops"], {"copy": roof["bandwidth"], "read only": read} if read else {"copy": roof["bandwidth"]}
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def _name_roofs(axes: Any, flops: float, slopes: Mapping[str, float]) -> None:
    """Write the name and the rate of each roof along it: of the highest slope above it, of another below it."""
    axes.figure.draw_without_rendering()  # the layout settles the angle of a slope
    left, _ = axes.get_xlim()
    ridge = flops / min(slopes.values())
    near = {"textcoords": "offset points", "fontsize": 9}
    axes.annotate(f"product {flops / 1e9:,.0f} GFLOP/s", (ridge, flops), xytext=(2, 3), va="bottom", **near)
    for name, rate in slopes.items():
        start, end = axes.transData.transform([(left, left * rate), (10 * left, 10 * left * rate)])
        angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
        above = rate == max(slopes.values())
        place = left * (ridge / left) ** 0.3
        axes.annotate(
            f"{name} {rate / 1e9:,.1f} GB/s",
            (place, place * rate),
            xytext=(-4, 4) if above else (4, -4),
            rotation=angle,
            rotation_mode="anchor",
            ha="center",
            va="bottom" if above else "top",
            **near,
        )


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
