"""Make the tables of the README from results: for each kind of table, a function from results to rows of cells.

The first row is the head. A kind is a benchmark's name, or "lesson NAME". A result is what `record.read` returns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.cold import MODES
from benchmarks.lessons.estimate import shown
from benchmarks.samples import Samples
from minift.look.report import number
from minift.values import size

Result: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = list[list[str]]


def peers(results: Sequence[Result]) -> Rows:
    """Return the sides of each result; with MFU where a data sheet gives the peak, with ratios where it has peers."""
    mfu = any(result.get("mfu_of_data_sheet") for result in results)
    several = any(len(result["tokens_per_second"]) > 1 for result in results)
    head = ["", "tokens/s", "of the roof", *(["MFU", "MFU, attention whole"] if mfu else []), "peak memory"]
    rows = [head + (["minift, compiled, is"] if several else [])]
    for result in results:
        shape = f"{_config(result)}, {result['batch_size']} x {result['length']:,}: "
        for name, speed in result["tokens_per_second"].items():
            row = [shape + _with_version(name, result)]
            row.append(f"{speed['median']:,.0f}" + ("" if several else f" ({speed['min']:,.0f}-{speed['max']:,.0f})"))
            row.append(f"{result['share_of_roof'][name]['median']:.2f}")
            if mfu:
                reached = result["mfu_of_data_sheet"][name]
                row += [f"{reached:.3f}", f"{reached * result['mfu_factor_if_attention_were_whole']:.3f}"]
            row.append(_megabytes(result["peak_bytes"][name]))
            if several:
                ratio = result["times_as_fast_as"].get("minift, compiled", {}).get(name)
                row.append(f"{ratio:.2f} x" if ratio and name != "minift, compiled" else "")
            rows.append(row)
            shape = ""
    return rows


def ladder(results: Sequence[Result]) -> Rows:
    """Return the rungs."""
    rows = [["rung", "targets/s", "x the one below", "x the first", "peak memory"]]
    for result in results:
        for i, (name, rung) in enumerate(result["rungs"].items()):
            ratios = [f"{rung[key]:.2f}" if i else "" for key in ("times_the_rung_below", "times_the_first")]
            rows.append([name, f"{rung['targets_per_second']['median']:,.0f}", *ratios, _megabytes(rung["peak_bytes"])])
    return rows


def loss(results: Sequence[Result]) -> Rows:
    """Return the ways to the loss."""
    rows = [["", "both", "of roof", "used is", "memory", "off: loss", "∂hidden", "∂weight"]]
    for result in results:
        for name, way in result["ways"].items():
            rows.append(
                [
                    name,
                    f"{way['seconds']['median'] * 1e3:,.0f} ms",
                    f"{way['flops_per_second'] / result['roof_flops']:.2f}",
                    "" if name == "used" else f"{way['used_is_times_as_fast']:.2f} x",
                    _megabytes(way["peak_bytes"]),
                    *(f"{way[key]:.0e}" for key in ("loss_off", "hidden_gradient_off", "weight_gradient_off")),
                ]
            )
    return rows


def generate(results: Sequence[Result]) -> Rows:
    """Return each shape's sides, while decoding."""
    rows = [["shape", "", "decode, tokens/s", "GB/s", "of roof", "minift is"]]
    for result in results:
        for shape, model in result["models"].items():
            for i, (name, side) in enumerate(model["sides"].items()):
                ratio = model["minift_times_as_fast_as"].get(name)
                speed = side["decode_tokens_per_second"]["median"]
                share = side.get("decode_share_of_read_roof", side["decode_share_of_matvec_roof"])["median"]
                rows.append(
                    [
                        "" if i else shape,
                        _with_version(name, result),
                        f"{speed:,.1f}" if speed < 200 else f"{speed:,.0f}",
                        f"{side['decode_bytes_per_second']['median'] / 1e9:.1f}",
                        f"{share:.2f}",
                        f"{ratio['decode']:.2f} x" if ratio and name != "minift" else "",
                    ]
                )
    return rows


def ops(results: Sequence[Result]) -> Rows:
    """Return each operation as training uses it, with warm and with cold caches; its largest cache is the machine's."""
    rows = [["operation", "phase", "MB", "fits the cache", "warm, ms", "cold, ms", "cold / warm"]]
    for result in results:
        cache = max(result["machine"]["caches"].values())
        samples = {row["name"]: Samples.from_dict(row["name"], row) for row in result["rows"]}
        for name, operation in result["operations"].items():
            for phase, values in operation["phases"].items():
                warm, cold = (samples.get(f"{name}/used/{phase}/{mode}") for mode in MODES)
                if warm is None or cold is None or warm.median is None or cold.median is None:
                    continue
                middle, low, high = cold.paired(warm)
                fits = "yes" if values["bytes"] < cache else "no"
                times = [f"{1e3 * one.median:.3g}" for one in (warm, cold) if one.median is not None]
                ratio = f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if math.isfinite(high - low) else "")
                rows.append([name, phase, f"{values['bytes'] / 1e6:,.1f}", fits, *times, ratio])
    return rows


def alike(results: Sequence[Result]) -> Rows:
    """Return the verdicts of each case."""
    words = ("faster", "slower", "same", "undecided")
    rows = [["the new side is slower by", "comparisons", *words, "seconds of one"]]
    for result in results:
        for name, case in result["table"].items():
            cells = [f"{case[word]} ({100 * case[word] / case['comparisons']:.1f} %)" for word in words]
            rows.append([name, f"{case['comparisons']}", *cells, f"{case['seconds']:.1f}"])
    return rows


def lora(results: Sequence[Result]) -> Rows:
    """Return full finetuning and each rank of adapters."""
    rows = [["", "learning rate", "trained", "gradients and moments", "ms a step", "exact match", "perplexity"]]
    for result in results:
        for name, side in result["sides"].items():
            scores = side["scores"]
            low, high = scores["intervals"]["exact_match"]
            interval = f" [{number(low)}, {number(high)}]"
            part = side["trained"] / side["parameters"]
            rows.append(
                [
                    name,
                    _exponent(side["lr"]),
                    f"{side['trained']:,}" + (f" ({100 * part:.1f} %)" if part < 1 else ""),
                    size(side["gradient_and_moment_bytes"]),
                    f"{side['step_seconds']['median'] * 1e3:,.0f}",
                    number(scores["exact_match"]) + interval,
                    f"{scores['perplexity']:.3f}",
                ]
            )
    return rows


def defaults(results: Sequence[Result]) -> Rows:
    """Return each sweep, small models and few pairs first; the loss of the rule's rate is bold."""
    sizes = ("small", "bundled", "large")
    sweeps = [sweep for result in results for sweep in result["sweeps"]]
    sweeps.sort(key=lambda sweep: (sizes.index(sweep["size"]), sweep["pairs"]))
    factors = sorted({round(run["factor"], 6) for sweep in sweeps for run in sweep["runs"]})
    names = [f"{factor:.0f}" if factor >= 1 else f"1/{1 / factor:.0f}" for factor in factors]
    rows = [["model", "pairs", "steps", "learning rate", "base's loss", f"loss at {names[0]}", *names[1:], "right"]]
    for sweep in sweeps:
        runs = {round(run["factor"], 6): run for run in sweep["runs"]}
        best, rule = max(run["right"] for run in sweep["runs"]), runs[1.0]
        losses = [f"{runs[factor]['best']:.3f}" if factor in runs else "-" for factor in factors]
        losses[factors.index(1.0)] = f"**{rule['best']:.3f}**"
        words = [sweep["size"], f"{sweep['pairs']:,}", str(sweep["steps"]), _exponent(rule["lr"], 1)]
        right = f"{100 * rule['right']:.0f} %, {100 * best:.0f} %"
        rows.append([*words, f"{rule['losses'][0]:.2f}", *losses, right])
    return rows


def scale(results: Sequence[Result]) -> Rows:
    """Return one process, and several that share a step."""
    rows = [["", "tokens/s", "of one process", "peak of each"]]
    for result in results:
        for name, speed in result["tokens_per_second"].items():
            several = result["processes"][name]
            cell = "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**speed)
            label = f"one process, {result['threads']} threads" if several == 1 else f"{several} processes, {name}"
            ratio = "1" if several == 1 else f"{result['of_one_process'][name]:.2f}"
            rows.append([label, cell, ratio, _megabytes(max(result["peak_bytes"][name]))])
    return rows


def load(results: Sequence[Result]) -> Rows:
    """Return the loaders of each checkpoint."""
    rows = [["shape", "", "load", "to first logits", "peak memory / weights"]]
    for result in results:
        shape = f"{_config(result)} in {result['dtype']}, {size(result['weights_bytes'])}"
        for name, loader in result["load"].items():
            times = [f"{loader[key]['median']:.2f} s" for key in ("load_seconds", "ready_seconds")]
            peak = loader["ready_peak_bytes"]["max"] / result["weights_bytes"]
            rows.append([shape, _with_version(name, result), *times, f"{peak:.2f}"])
            shape = ""
    return rows


def data(results: Sequence[Result]) -> Rows:
    """Return the sides, with what each is times others."""
    others = ("parts alone", "datasets, loop", "datasets, map")
    rows = [["", "million characters/s", *(f"x {name}" for name in others)]]
    for result in results:
        for name, speed in result["characters_per_second"].items():
            if not name.startswith("datasets"):
                ratios = [result["times_as_fast_as"][name][other] for other in others]
                cells = ["1" if ratio == 1 else f"{ratio:.2f}" for ratio in ratios]
                rows.append([name, f"{speed['median'] / 1e6:.1f}", *cells])
    return rows


# Lessons --------------------------------------------------------------------------------------------------------------


def accumulation(results: Sequence[Result]) -> Rows:
    """Return each split of a window into micro-batches."""
    rows = [["pairs of the micro-batches", "largest share", "cosine", "norm ratio"]]
    for level in (level for result in results for level in result["levels"]):
        split = " + ".join(map(str, level["sizes"]))
        rows.append([split, f"{level['share']:.0%}", shown(level["cosine"], 3), shown(level["norm_ratio"], 3)])
    return rows


def leakage(results: Sequence[Result]) -> Rows:
    """Return the loss of a page by position, after other pages."""
    sides = {"alone": "alone, or isolated", "stranger": "after an unrelated page"}
    sides["same"] = "after a page about the same thing"
    rows = [["token of B", *sides.values()]]
    for result in results:
        for place in result["places"]:
            first, last = place["place"]
            name = f"{first}" if first == last else f"{first} to {last}"
            rows.append([name, *(shown(place[side]) for side in sides)])
        rows.append(["all", *(shown(result["whole"][side]) for side in sides)])
    return rows


def precision(results: Sequence[Result]) -> Rows:
    """Return the share of updates that each dtype loses."""
    dtypes = ("float32", "bfloat16", "float16")
    updates = [update for result in results for update in result["updates"]]
    rows = [["learning rate", *dtypes]]
    return rows + [[f"{one['lr']:g}", *(f"{one[dtype]:.1%}" for dtype in dtypes)] for one in updates]


def knowledge(results: Sequence[Result]) -> Rows:
    """Return what each corpus taught, of the kinds of question that the text discusses."""
    (result,) = results
    names = {"in order": "many, unshuffled"}
    rows = [["", *(names.get(name, name) for name in result["corpora"])]]
    keys = {"by_heart": "facts known by heart", "asked": "asked: right to the letter"}
    keys["own"] = "… values of an entity's own"
    for key, label in keys.items():
        rows.append([label, *(shown(corpus[key]) for corpus in result["corpora"].values())])
    for kind in ("country/capital", "element/symbol", "country/continent"):
        rows.append([f"… … {kind}", *(shown(corpus["relations"][kind]) for corpus in result["corpora"].values())])
    return rows


def how_many(results: Sequence[Result]) -> Rows:
    """Return each number of pairs."""
    rows = [["pairs", "each read", "exact match", "of other kinds"]]
    for result in results:
        read = result["settings"]["steps"] * result["settings"]["batch_size"]
        for one in result["counts"]:
            others = f"{one['right_of_others']} of {one['others']}" if one["others"] else ""
            rows.append([f"{one['count']:,}", f"{read / one['count']:.1f} times", shown(one), others])
    return rows


def forgetting(results: Sequence[Result]) -> Rows:
    """Return the base, and each rate and rank."""
    rows = [["", "learning rate", "exact match", "pages that tell", "pages that ask"]]
    for result in results:
        for side in (result["base"], *result["sides"]):
            name = f"adapters, rank {side['rank']}" if side["rank"] else "all weights"
            plain = side is result["base"]  # one model has no range
            right, tell = (f"{side[key]['value']:.2f}" if plain else shown(side[key]) for key in ("right", "tell"))
            rate, ask = "" if plain else f"{side['lr']:.0e}", f"{side['ask']['value']:.1f}"
            rows.append(["the base" if plain else name, rate, right, tell, ask])
    return rows


KINDS: dict[str, Callable[[Sequence[Result]], Rows]] = {
    "peers": peers,
    "ladder": ladder,
    "loss": loss,
    "generate": generate,
    "ops": ops,
    "alike": alike,
    "lora": lora,
    "defaults": defaults,
    "scale": scale,
    "load": load,
    "data": data,
    "lesson accumulation": accumulation,
    "lesson leakage": leakage,
    "lesson precision": precision,
    "lesson knowledge": knowledge,
    "lesson how-many": how_many,
    "lesson forgetting": forgetting,
}


def _config(result: Result) -> str:
    return result["config"] if isinstance(result["config"], str) else "a config.json"


def _with_version(name: str, result: Result) -> str:
    """Return a side's name; that of `transformers` with its version."""
    version = ".".join(result["versions"].get("transformers", "").split(".")[:2])
    return name.replace("transformers", f"transformers {version}".strip(), 1)


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB" if nbytes < 1e10 else f"{nbytes / 1e9:,.1f} GB"


def _exponent(value: float, digits: int = 0) -> str:
    """Return 0.00018 as "1.8e-4"."""
    return f"{value:.{digits}e}".replace("e-0", "e-")
