"""Measure the memory of streaming: the peak for a small corpus and for one a hundred times as large.

A fresh process reads JSON Lines from standard input, shuffles, encodes and packs them, and reports its peak resident
memory. The lines are generated while it reads (docstrings of Python, repeated); nothing is stored.

    python -m benchmarks stream                       # 40 MB and 4 GB: a quarter of an hour
    python -m benchmarks stream --megabytes 40 400
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from benchmarks import arguments, process, prose, record
from minift.values import size

UNIQUE = 24  # megabytes of text before it repeats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--megabytes", type=float, nargs="+", default=[40, 4_000], metavar="N", help="(%(default)s)")
    arguments.add_json(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    if options.measure:
        print(json.dumps(_measure()))
        return
    text = list(prose.lines(UNIQUE))
    runs = []
    for megabytes in options.megabytes:
        runs.append(
            {"bytes": megabytes * 1e6, **process.fresh("stream", "stdin", stdin=_endless(text, megabytes * 1e6))}
        )
        last = runs[-1]
        print(
            f"{size(last['bytes']):>8} of JSON Lines: peak {size(last['peak_bytes'])}, "
            f"{last['peak_bytes'] / runs[0]['peak_bytes']:.3f} of the first; "
            f"{last['documents']:,} documents, {last['tokens']:,} tokens in {last['seconds']:,.0f} s"
        )
    rows = [record.row(size(run["bytes"]), [run], per="corpus") for run in runs]
    record.write(options.json, {"benchmark": "stream", **record.environment(), "runs": runs, "rows": rows})


def _endless(lines: list[bytes], nbytes: float) -> Iterator[bytes]:
    for line in cycle(lines):
        if nbytes <= 0:
            return
        yield line
        nbytes -= len(line)


def _measure() -> dict[str, Any]:
    """Measure in a fresh process the peak memory of making batches from standard input."""
    from minift.data.batches import PageBatches
    from minift.data.stream import DocumentStream
    from minift.storage.names import bundled
    from minift.tokenizer.load import load_tokenizer

    stream = DocumentStream(["-"], epochs=1, shuffle_buffer=10_000)
    tokens, start = 0, time.perf_counter()
    for batch in PageBatches(stream, load_tokenizer(bundled("base")), batch_size=16, length=1_024):
        tokens += batch.n_targets
    seconds = time.perf_counter() - start
    return {"peak_bytes": process.peak(), "documents": stream.skipped.records, "tokens": tokens, "seconds": seconds}
