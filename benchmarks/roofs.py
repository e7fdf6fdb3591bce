"""Measure how fast this machine computes and moves memory: the roofs that other benchmarks compare with.

* *product*: matrix products in bursts. The shapes of a small grid are tried until `--budget` is spent, and the fastest
  is measured; "in a second" is the same without a pause.
* *read*, *copy*, *matrix-vector*: memory traffic of tensors that no cache holds. Of the ways to read the fastest is the
  roof, for decoding and for all else that only reads.
* `--sustained` multiplies for a minute. A processor begins at its boost clock, and slows down when it is warm: the rate
  of a second is a roof for a short test, that of the minute's last half for training.

Where the device is a GPU whose data sheet is known (`minift/costs/peaks.py`), each roof is given as a share of it.

    python -m benchmarks roofs --dtype float32 --budget 20
    python -m benchmarks roofs --sustained --json roofs.json
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import arguments, record, roof
from minift.config import TrainConfig
from minift.costs.flops import data_sheet_flops
from minift.costs.peaks import peak_of
from minift.runs.machine import choose_device, choose_dtype
from minift.values import check_number

BUDGET = 10.0  # seconds
BOOST, SUSTAINED = 1.0, 60.0  # seconds of the two rates
REST = 10.0  # seconds in which a processor cools down before the minute
LABELS = {"product": "product", "copy": "copy", "matvec": "matrix-vector"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_machine(parser)
    arguments.add_repeats(parser, 15)
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help="seconds for the search of shapes (%(default)g)"
    )
    parser.add_argument("--sustained", action="store_true", help=f"multiply for {SUSTAINED:g} seconds, too")


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    arguments.check_counts(options, "repeats")
    check_number("--budget", options.budget, above=0)
    asked = TrainConfig(dtype=options.dtype, device=options.device)
    device = choose_device(asked)
    dtype = choose_dtype(asked, device)
    found, rows = measure(device.type, getattr(torch, dtype), options.repeats, options.budget, options.sustained)
    result = {
        "benchmark": "roofs",
        **record.environment(),
        "dtype": dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
        **found,
        "data_sheet": data_sheet(device, dtype),
        "rows": rows,
    }
    print(table(result))
    record.write(options.json, result)


def measure(
    device: str, dtype: torch.dtype, repeats: int, budget: float, sustained: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the roofs with what won and the spread of each load, and the rows of all samples for the record."""
    tried = roof.search(device, dtype, budget)
    loads = roof.Loads(device, dtype, tried[0].shape)
    samples = loads.time(repeats)
    rates = {name: [loads.amounts[name] / one.seconds for one in timed.samples] for name, timed in samples.items()}
    flops, multiply = loads.amounts["product"], loads.sides["product"]
    if sustained:
        time.sleep(REST)
    lasting = roof.rates(multiply, flops, SUSTAINED if sustained else BOOST, device)
    reads = [name for name in rates if name.startswith("read/")]
    found = {
        "roof": loads.roof(samples).to_dict(),
        "rates": {name: record.spread(values) for name, values in rates.items()},
        "fastest_reading": max([*reads, "matvec"], key=lambda name: max(rates[name])),
        "tried": [{"shape": one.shape, "flops": one.flops} for one in tried],
        "shapes": len(roof.grid(roof.SIDE[device])),
        "product_in_a_second": lasting[0],
        "sustained": {**roof.boost_and_sustained(lasting), "seconds": SUSTAINED} if sustained else None,
        "product_each_second": lasting,
    }
    units = {name: "flops" if name == "product" else "bytes" for name in samples}
    return found, [
        record.row(f"machine/{name}", timed, work={units[name]: loads.amounts[name]}) for name, timed in samples.items()
    ]


def data_sheet(device: torch.device, dtype: str) -> dict[str, Any] | None:
    """Return what the data sheet promises of the device, and which it is; None where that is not known."""
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    return {
        "flops": data_sheet_flops(device, dtype),
        "bandwidth": peak.bytes_per_second,
        "source": peak.source,
    }


# The table ------------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """Return the roofs as a table."""
    sheet = result["data_sheet"] or {}
    promised = {"product": sheet.get("flops")}
    lines = [
        f"{result['dtype']} on {result['device']}, {result['threads']} threads",
        f"{'':<24}{'highest':>8}{'':<8}{'median':>10}{'lowest':>10}" + (f"{'of the sheet':>14}" if sheet else ""),
    ]
    for name, rate in result["rates"].items():
        unit = "GFLOP/s" if name == "product" else "GB/s"
        most = promised.get(name, sheet.get("bandwidth"))
        lines.append(
            f"{LABELS.get(name, name.replace('/', ', ')):<24}{_rate(rate['max']):>8} {unit:<7}"
            f"{_rate(rate['median']):>10}{_rate(rate['min']):>10}" + (f"{rate['max'] / most:>14.2f}" if most else "")
        )
    M, N, K = result["roof"]["shape"]
    way = result["fastest_reading"].removeprefix("read/").replace("matvec", "matrix-vector product")
    slowest = result["tried"][-1]
    lines += [
        f"product: [{M}, {K}] x [{K}, {N}], the fastest of {len(result['tried'])} of {result['shapes']} shapes; "
        f"the slowest, {' x '.join(map(str, slowest['shape']))} (M x N x K), {_rate(slowest['flops'])} GFLOP/s",
        f"read-only roof: {_rate(result['roof']['read_bandwidth'])} GB/s, by the {way}",
        f"product for a second without a pause: {_rate(result['product_in_a_second'])} GFLOP/s",
    ]
    if lasting := result["sustained"]:
        lines.append(
            f"product for {lasting['seconds']:g} seconds: {_rate(lasting['boost'])} GFLOP/s in the fastest, "
            f"{_rate(lasting['sustained'])} in the last half ({lasting['sustained'] / lasting['boost']:.2f})"
        )
    if sheet:
        lines.append(f"sheet: {sheet['source']}")
    return "\n".join(lines)


def _rate(value: float) -> str:
    """Format a rate in 10^9 a second with three digits."""
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:#.3g}"
