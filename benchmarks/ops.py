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

    python -m benchmarks ops
    python -m benchmarks ops --only attention swiglu --no-compile --plot roofline.png
    python -m benchmarks ops --add my_norm.py:fast_norm --against norm
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import added, agreement, arguments, contract, rank, record, roof, roofline
from benchmarks.operation import Operation, Setting, Work, make_step
from benchmarks.operations import OPERATIONS
from benchmarks.timing import in_turns, paired_ratio
from minift.config import LlamaConfig
from minift.errors import InputError

VARIANTS = ("naive", "used", "compiled")
# The largest relative difference between a variant and `naive`. In low precision both have rounding errors.
AGREE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2, "float64": 1e-10}
Times = dict[str, dict[str, list[float]]]  # by phase, by variant: seconds in each turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    arguments.add_shape(parser)
    arguments.add_machine(parser)
    arguments.add_repeats(parser, 9)
    parser.add_argument("--no-compile", action="store_true", help="without the compiled variants")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, metavar="NAME", help="of " + ", ".join(OPERATIONS))
    parser.add_argument("--plot", metavar="FILE.png", help="draw the roofline to FILE.png (needs the plot extra)")
    added.add_arguments(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, write the JSON and draw the plot."""
    if options.contract:
        print(contract.describe(options.contract))
        return
    setting = _setting(options)
    arguments.check_plot(options.plot)
    limits = AGREE[str(setting.dtype).removeprefix("torch.")], AGREE["float32"]
    own = added.Added(options, limits)
    if options.rank or options.measure:
        rank.run(options, setting, limits)
        return
    roofs = roof.meter(setting.device, setting.dtype)
    around = [roofs(roof.REPEATS)]  # before each operation, and after the last: the clock rate may change in between
    heading = _heading(options.config, setting, around[0])
    print(heading.partition("\n")[0] if own.places else heading)
    step = make_step(setting)
    operations = {}
    for name in own.operations or options.only or OPERATIONS:
        operation = OPERATIONS[name](step)
        check(name, operation, setting.dtype)
        operation = own.beside(name, operation, step)
        if own.places and not own.trials:
            continue
        times = own.still_right(measure(operation, options.repeats, setting.device))
        around.append(roofs(roof.REPEATS_A_TURN))
        operations[name] = summary(operation, times, roof.best(around[-2:]))
        del operation  # release its tensors before the next operation makes its own
        rows = own.table(operations[name]["phases"], times) if own.places else _rows(name, operations[name])
        print(rows, flush=True)
    measured = roof.best(around)
    result: dict[str, Any] = {
        "benchmark": "ops",
        **record.environment(),
        "config": arguments.recorded_shape(options.config),
        "dtype": measured.dtype,
        "device": setting.device,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "roof": measured.to_dict(),
        "operations": operations,
        **({"added": own.to_dict()} if own.places else {}),
    }
    if not options.only and not own.places:
        result["step_seconds"] = step_seconds(operations)
        result["step_seconds_of_whole_layers"] = step_seconds(operations, whole_layers=True)
        print("All, each as often as a step does it (ms)")
        for name, key in (("one by one", "step_seconds"), ("layers as a whole", "step_seconds_of_whole_layers")):
            together = ", ".join(f"{variant} {_milliseconds(s)}" for variant, s in result[key].items())
            print(f"  {name + ':':<19}{together}")
    record.write(options.json, result)
    if options.plot:
        roofline.draw(result, options.plot)
    if own.wrong:
        raise SystemExit(1)


def _setting(options: argparse.Namespace) -> Setting:
    arguments.check_counts(options, "repeats")
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


def measure(operation: Operation, repeats: int, device: str) -> Times:
    """Return the seconds of each phase and variant by turn; "backward" is "both" minus the same turn's "forward"."""
    if not operation.leaves:
        return {"step": in_turns(operation.variants, repeats, device=device)}
    sides: dict[str, Callable[[], object]] = {}
    for name, call in operation.variants.items():
        sides[f"{name} forward"] = call
        sides[f"{name} both"] = partial(operation.both, name)
    seconds = in_turns(sides, repeats, device=device)
    forward, both = ({name: seconds[f"{name} {phase}"] for name in operation.variants} for phase in ("forward", "both"))
    backward = {name: [b - f for b, f in zip(both[name], forward[name], strict=True)] for name in both}
    return {"forward": forward, "backward": backward, "both": both}


def summary(operation: Operation, times: Times, measured: roof.Roof) -> dict[str, Any]:
    """Return an operation's record: for each phase the work, and for each variant the time and the share."""
    work = dict(operation.work)
    if operation.leaves:
        work["both"] = work["forward"] + work["backward"]
    phases = {}
    for phase, seconds in times.items():
        unlike = operation.early if phase in ("forward", "backward") else ()
        phases[phase] = _phase(work[phase], seconds, measured, unlike)
    return {"calls": operation.calls, "inside": operation.inside, "roof": measured.to_dict(), "phases": phases}


def _phase(
    work: Work, seconds: Mapping[str, list[float]], measured: roof.Roof, unlike: tuple[str, ...]
) -> dict[str, Any]:
    least = measured.seconds(work.flops, work.nbytes)
    variants: dict[str, Any] = {}
    for name, times in seconds.items():
        spread = record.spread(times)
        comparable = name not in unlike and spread["min"] > 0  # a difference may be below 0 by chance
        variants[name] = {"seconds": spread, "share_of_roof": least / spread["median"] if comparable else None}
        if name != "naive" and comparable:
            variants[name]["times_as_fast_as_naive"] = paired_ratio(seconds["naive"], times)
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


def _heading(config: str, setting: Setting, measured: roof.Roof) -> str:
    flops, bandwidth = measured.flops / 1e9, measured.bandwidth / 1e9
    columns = f"{'':<10}{'':<9}{'calls':>5}{'MFLOP':>10}{'MB':>9}{'FLOP/B':>8}{'roof ms':>9}"
    variants = VARIANTS if setting.compile else VARIANTS[:2]
    return (
        f"{setting.batch_size} x {setting.length} tokens of {config}, {measured.dtype} on {setting.device}; "
        f"the roof: {flops:,.0f} GFLOP/s, {bandwidth:,.1f} GB/s\n"
        f"{columns}" + "".join(f"{name + ' ms':>12}{'±':>5}{'share':>6}" for name in variants)
    )


def _rows(name: str, operation: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for phase, values in operation["phases"].items():
        first = not lines
        line = f"{name if first else '':<10}{phase:<9}{operation['calls'] if first else '':>5}"
        line += f"{_short(values['flops'] / 1e6):>10}{_short(values['bytes'] / 1e6):>9}{_short(values['intensity']):>8}"
        line += f"{_milliseconds(values['roof_seconds']):>9}"
        lines.append(line + "".join(_cells(variant) for variant in values["variants"].values()))
    return "\n".join(lines)


def _cells(variant: Mapping[str, Any]) -> str:
    """Format the median, half the range as a share of the median, and the share of the roof."""
    seconds, share = variant["seconds"], variant["share_of_roof"]
    around = (seconds["max"] - seconds["min"]) / 2 / abs(seconds["median"] or 1)
    return f"{_milliseconds(seconds['median']):>12}{around:>5.0%}{'-' if share is None else f'{share:.2f}':>6}"


def _milliseconds(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(number: float) -> str:
    """Format a number with three digits, without an exponent."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:#.3g}" if abs(number) >= 1e-3 else f"{number:.2g}"
