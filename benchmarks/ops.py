"""Time every operation of a training step, forward and backward: as a textbook has it, as minift trains, and compiled.

For each operation it reports the time, the FLOPs, the least memory traffic, and the share of the roof: how much of the
speed that this machine reached in the same run (`roof.py`) was used. The operations and their formulas are in
`operations.py`, the textbook's versions in `textbook.py`.

The last lines add up a step: from the single operations, and with each layer as a whole. Where training installs a
kernel for a whole layer (`minift/kernels/layer.py`), only the second is what a step does.

A variant that does not compute the same values and gradients as the textbook's is refused, not timed.

The forward pass is timed as in training, with everything saved that the backward pass needs. The backward pass cannot
be repeated without a forward pass before it, unless the graph is retained, which compiled code does not allow. So both
are timed together, right after the forward pass alone, and the backward pass is the difference within each turn.

Each is timed with *warm* caches, where a call follows another of the same, and with *cold* ones, which are emptied
before each call (`cold.py`). In a step, an operation has some of each. ± is how far the interval of the median reaches.

    python -m benchmarks ops
    python -m benchmarks ops --only attention swiglu --no-compile --plot roofline.png
    python -m benchmarks ops --add my_norm.py:fast_norm --against norm
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import added, agreement, arguments, cold, contract, floor, rank, record, roof, roofline, timers
from benchmarks.operation import Operation, Setting, Work, make_step
from benchmarks.operations import OPERATIONS
from benchmarks.samples import Samples, median_interval
from benchmarks.timing import FEWEST, in_turns, paired_ratio
from benchmarks.watch import Watch
from minift.config import LlamaConfig
from minift.errors import InputError
from minift.values import check_number

BUDGET = 300.0  # seconds
VARIANTS = ("naive", "used", "compiled")
VAGUE = 0.5  # a median whose interval reaches further than this share of it says nothing about the roof
# The largest relative difference between a variant and `naive`. In low precision both have rounding errors.
AGREE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2, "float64": 1e-10}
Times = dict[str, dict[str, Samples]]  # by phase, by variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser)
    arguments.add_machine(parser)
    parser.add_argument(
        "--caches", default="both", choices=(*cold.MODES, "both"), help="a call after another one, or after emptying"
    )
    parser.add_argument("--timer", choices=timers.NAMES, help="how a GPU's time is read (events)")
    budget = "of measuring, shared by the operations; less where all medians are known within 2 %% (%(default)s)"
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=budget)
    parser.add_argument("--repeats", type=int, metavar="N", help="turns, instead of a budget")
    arguments.add_json(parser)
    parser.add_argument("--no-compile", action="store_true", help="without the compiled variants")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, metavar="NAME", help="of " + ", ".join(OPERATIONS))
    parser.add_argument("--plot", metavar="FILE.png", help="draw the roofline to FILE.png (needs the plot extra)")
    added.add_arguments(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON and draw the plot. Return 1 where a function of the user's is wrong."""
    if options.contract:
        print(contract.describe(options.contract))
        return 0
    setting = _setting(options)
    arguments.check_plot(options.plot)
    limits = AGREE[str(setting.dtype).removeprefix("torch.")], AGREE["float32"]
    own = added.Added(options, limits)
    if options.rank or options.measure:
        rank.run(options, setting, limits)
        return 0
    result = _measure_all(options, setting, own)
    if not options.only and not own.places:
        print(_sums(result))
    record.write(options.json, result)
    if options.plot:
        roofline.draw(result, options.plot)
    return 1 if own.wrong else 0


def _measure_all(options: argparse.Namespace, setting: Setting, own: added.Added) -> dict[str, Any]:
    """Measure one operation after another, and print its rows. Return the result."""
    names = own.operations or options.only or list(OPERATIONS)
    modes = cold.MODES if options.caches == "both" else (options.caches,)
    timer = options.timer or timers.usual(setting.device)
    floors = {mode: floor.measure(timer, setting.device, mode) for mode in modes}
    watch = Watch(setting.device)
    if watch.missing:
        print(f"the GPU's clock, temperature and power are not watched: {watch.missing}")
    left = options.budget
    roofs = roof.meter(setting.device, setting.dtype)
    around = [roofs(roof.REPEATS)]  # before each operation, and after the last: the clock rate may change in between
    heading = _heading(options.config, setting, around[0], floors)
    print(heading.rpartition("\n")[0] if own.places else heading)
    step = make_step(setting)
    operations: dict[str, dict[str, Any]] = {mode: {} for mode in modes}
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        operation = OPERATIONS[name](step)
        check(name, operation, setting.dtype)
        operation = own.beside(name, operation, step)
        if own.wrong and not own.trials:
            continue
        start, budget = time.perf_counter(), max(left, 0) / (len(names) - i)  # with what the others have not used
        how = {"repeats": options.repeats, "budget": budget, "timer": timer, "watch": watch}
        times = own.still_right(measure(operation, setting.device, modes, **how))
        left -= time.perf_counter() - start
        around.append(roofs(roof.REPEATS_A_TURN))
        for mode in modes:
            operations[mode][name] = summary(operation, times[mode], roof.best(around[-2:]))
        rows += sample_rows(name, times)
        del operation  # release its tensors before the next operation makes its own
        of_mode = {mode: operations[mode][name] for mode in modes}
        lines = own.table(of_mode, times) if own.places else _rows(name, of_mode)
        print(lines + _how_it_ended(times[modes[0]], timer), flush=True)
    measured, warm = roof.best(around), operations[modes[0]]
    sums = {} if options.only or own.places else {"step_seconds": step_seconds(warm)}
    if sums:
        sums["step_seconds_of_whole_layers"] = step_seconds(warm, whole_layers=True)
    return {
        "benchmark": "ops",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": measured.dtype,
        "device": setting.device,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "roof": measured.to_dict(),
        "caches": list(modes),
        "floors": {mode: asdict(one) for mode, one in floors.items()},
        "operations": warm,
        **({"operations_cold": operations["cold"]} if len(modes) > 1 else {}),
        **sums,
        **({"added": own.to_dict()} if own.places else {}),
        "rows": [*rows, *record.control(around)],
    }


def _setting(options: argparse.Namespace) -> Setting:
    if options.repeats is not None:
        arguments.check_counts(options, "repeats")
    check_number("--budget", options.budget, above=0)
    config, shape = arguments.train_config(options), LlamaConfig.named(options.config)
    arguments.check_compiler(config, not options.no_compile, "give --no-compile")
    dtype = getattr(torch, config.dtype)
    return Setting(shape, config.batch_size, config.max_length, dtype, config.device, not options.no_compile)


def check(name: str, operation: Operation, dtype: torch.dtype) -> None:
    """Raise InputError unless every variant computes what `naive` does: its values, and the gradients of its leaves.

    The speed of a wrong variant means nothing, so it is neither timed nor recorded.
    """
    limit = AGREE[str(dtype).removeprefix("torch.")]

    def results(variant: str) -> list[tuple[str, torch.Tensor]]:
        values = [("value", value.detach()) for value in operation.variants[variant]()]
        return values + [("gradient", grad) for grad in (operation.both(variant) if operation.leaves else ())]

    expected = results("naive")
    for variant in operation.variants:
        found = results(variant) if variant != "naive" else expected
        if len(found) != len(expected):
            raise InputError(f"{name}: {variant} gives {len(found)} results, naive {len(expected)}; it is not timed")
        for i, ((kind, one), (_, other)) in enumerate(zip(found, expected, strict=True)):
            if one.shape != other.shape:
                raise InputError(f"{name}: {kind} {i} of {variant} is {list(one.shape)}, of naive {list(other.shape)}")
            off = agreement.off(one, other.double())
            if not off <= limit and not torch.equal(one, other):
                raise InputError(f"{name}: {kind} {i} of {variant} is {off:.1e} off naive's; it is not timed")


def measure(operation: Operation, device: str, modes: Sequence[str] = ("warm",), **how: Any) -> dict[str, Times]:
    """Return the samples by caches, phase and variant; "backward" is "both" minus the same turn's "forward".

    Args:
        modes: of `cold.MODES`.
        how: other arguments of `in_turns`.
    """
    phases = ("forward", "both") if operation.leaves else ("step",)
    sides: dict[str, Callable[[], object]] = {}
    caches: dict[str, str] = {}
    for name, call in operation.variants.items():
        for mode, phase in itertools.product(modes, phases):
            sides[f"{name} {phase} {mode}"] = partial(operation.both, name) if phase == "both" else call
            caches[f"{name} {phase} {mode}"] = mode
    measured = in_turns(sides, device=device, caches=caches, **how)
    found: dict[str, Times] = {}
    for mode in modes:
        of = {phase: {name: measured[f"{name} {phase} {mode}"] for name in operation.variants} for phase in phases}
        if operation.leaves:
            rest = {name: both.minus(of["forward"][name]) for name, both in of["both"].items()}
            of = {"forward": of["forward"], "backward": rest, "both": of["both"]}
        found[mode] = of
    return found


def sample_rows(name: str, times: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Return the rows of an operation's record; not of the backward pass, which is a difference of two of them."""
    return [
        record.row(f"{name}/{variant}/{phase}/{mode}", samples)
        for mode, phases in times.items()
        for phase, variants in phases.items()
        if phase != "backward"
        for variant, samples in variants.items()
    ]


def summary(operation: Operation, times: Times, measured: roof.Roof) -> dict[str, Any]:
    """Return an operation's record: for each phase the work, and for each variant the time and the share."""
    work = dict(operation.work)
    if operation.leaves:
        work["both"] = work["forward"] + work["backward"]
    phases = {}
    for phase, of_variant in times.items():
        unlike = operation.early if phase in ("forward", "backward") else ()
        phases[phase] = _phase(work[phase], of_variant, measured, unlike)
    return {"calls": operation.calls, "inside": operation.inside, "roof": measured.to_dict(), "phases": phases}


def _phase(
    work: Work, of_variant: Mapping[str, Samples], measured: roof.Roof, unlike: tuple[str, ...]
) -> dict[str, Any]:
    least = measured.seconds(work.flops, work.nbytes)
    variants: dict[str, Any] = {}
    for name, samples in of_variant.items():
        spread = record.spread(samples.seconds)
        long = samples.median is not None
        comparable = long and name not in unlike and spread["min"] > 0  # a difference may be below 0 by chance
        variants[name] = {
            "seconds": spread,
            "interval": median_interval(samples.seconds) if spread["n"] >= FEWEST else None,
            "least_seconds": None if long else samples.floor,  # the median is below what can be measured
            "share_of_roof": least / spread["median"] if comparable else None,
        }
        if name != "naive" and comparable and of_variant["naive"].median is not None:
            variants[name]["times_as_fast_as_naive"] = paired_ratio(of_variant["naive"].seconds, samples.seconds)
    return {
        "flops": work.flops,
        "bytes": work.nbytes,
        "intensity": work.flops / work.nbytes,
        "roof_seconds": least,
        "variants": variants,
    }


def step_seconds(operations: Mapping[str, Any], whole_layers: bool = False) -> dict[str, float]:
    """Return the seconds of all operations, each as often as a step does it; without a compiled variant, `used` counts.

    Args:
        whole_layers: count `layer` in place of the operations inside a layer; otherwise, count those and not `layer`.
    """
    total = {"at the roof": 0.0, **dict.fromkeys(VARIANTS, 0.0)}
    for label, operation in operations.items():
        if label == "layer" and not whole_layers:
            continue
        calls = operation["calls"] - (operation["inside"] if whole_layers else 0)
        whole = operation["phases"].get("both") or operation["phases"]["step"]
        total["at the roof"] += calls * whole["roof_seconds"]
        for name in VARIANTS:
            variant = whole["variants"].get(name) or whole["variants"]["used"]
            total[name] += calls * variant["seconds"]["median"]
    if not any("compiled" in phase["variants"] for op in operations.values() for phase in op["phases"].values()):
        del total["compiled"]
    return total


# The table ------------------------------------------------------------------------------------------------------------


def _heading(config: str, setting: Setting, measured: roof.Roof, floors: Mapping[str, floor.Floor]) -> str:
    flops, bandwidth = measured.flops / 1e9, measured.bandwidth / 1e9
    columns = f"{'':<10}{'':<9}{'calls':>5}{'MFLOP':>10}{'MB':>9}{'FLOP/B':>8}{'roof ms':>9} {'':<4}"
    costs = [f"{mode}: {one.sentence()}; shorter than {floor.TIMES} x: no number" for mode, one in floors.items()]
    if "cold" in floors:
        costs.append(cold.cache(setting.device).sentence())
    variants = VARIANTS if setting.compile else VARIANTS[:2]
    return (
        f"{setting.batch_size} x {setting.length} tokens of {config}, {measured.dtype} on {setting.device}; "
        f"the roof: {flops:,.0f} GFLOP/s, {bandwidth:,.1f} GB/s\n"
        + "".join(line + "\n" for line in costs)
        + f"{columns}"
        + "".join(f"{name + ' ms':>12}{'±':>6}{'share':>6}" for name in variants)
    )


def _rows(name: str, of_mode: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[str] = []
    operation, *_ = of_mode.values()
    for phase, values in operation["phases"].items():
        first = not lines
        line = f"{name if first else '':<10}{phase:<9}{operation['calls'] if first else '':>5}"
        line += f"{_short(values['flops'] / 1e6):>10}{_short(values['bytes'] / 1e6):>9}{_short(values['intensity']):>8}"
        line += f"{_milliseconds(values['roof_seconds']):>9}"
        for mode, one in of_mode.items():
            cells = "".join(_cells(variant) for variant in one["phases"][phase]["variants"].values())
            lines.append(f"{line} {mode}{cells}")
            line = " " * len(line)
    return "\n".join(lines)


def _cells(variant: Mapping[str, Any]) -> str:
    """Format the median, how far its interval reaches as a share of it, and the share of the roof."""
    middle, share, interval = variant["seconds"]["median"], variant["share_of_roof"], variant["interval"]
    if variant["least_seconds"] is not None and middle >= 0:  # a difference may be below 0 by chance
        return f"{'< ' + _milliseconds(variant['least_seconds']):>12}{'-':>6}{'-':>6}"
    reach = max(interval[1] - middle, middle - interval[0]) / abs(middle) if interval and middle else None
    vague = reach is not None and reach > VAGUE
    cells = "-" if reach is None else f"{min(reach, 9.99):.0%}", "-" if share is None or vague else f"{share:.2f}"
    return f"{_milliseconds(middle):>12}{cells[0]:>6}{cells[1]:>6}"


def _how_it_ended(times: Times, timer: str = "wall") -> str:
    """Say in a line if the budget was gone, turns were left out, or the timer that was asked for could not be used."""
    samples = next(iter(next(iter(times.values())).values()))
    said = ["the budget is gone"] if samples.stopped == "budget" else []
    said += [f"{number} left out: {mark}" for mark, number in samples.left_out.items()]
    sides = [(phase, name, one.timer) for phase, variants in times.items() for name, one in variants.items()]
    said += [f"{name} {phase} by {used}" for phase, name, used in sides if used != timer]
    return f"\n{'':<10}turns: {len(samples.samples)}; {', '.join(said)}" if said else ""


def _sums(result: Mapping[str, Any]) -> str:
    lines = [f"All, each as often as a step does it ({result['caches'][0]}, ms)"]
    for name, key in (("one by one", "step_seconds"), ("layers as a whole", "step_seconds_of_whole_layers")):
        together = ", ".join(f"{variant} {_milliseconds(s)}" for variant, s in result[key].items())
        lines.append(f"  {name + ':':<19}{together}")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(number: float) -> str:
    """Format a number with three digits, without an exponent."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:#.3g}" if abs(number) >= 1e-3 else f"{number:.2g}"
