"""Measure `minift data audit`: seconds and memory for a file of conversations, and for one that is larger.

The conversations are made for it: four or six turns of about 60 words, drawn with the frequencies of a natural text
(the word of rank r as often as 1 / r) from the docstrings of Python. A fresh process audits each file, with two more
that encode, and reports its peak resident memory and the largest of theirs.

    python -m benchmarks audit                              # 10,000 and 100,000 conversations: three minutes
    python -m benchmarks audit --conversations 1000 5000 --model DIR
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import arguments, process, prose, record
from minift.values import size

TURNS, WORDS = (4, 4, 6), (40, 80)  # of a conversation, drawn; of a turn: at least, at most
VOCABULARY = 5_000  # words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--conversations", type=int, nargs="+", default=[10_000, 100_000], metavar="N", help="(%(default)s)"
    )
    parser.add_argument("--model", default="bundled", metavar="DIR", help="with this tokenizer (%(default)s)")
    arguments.add_json(parser)
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a line for each file and write the JSON."""
    if options.measure:
        print(json.dumps(_measure(*options.measure)))
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in options.conversations:
            file = _write(Path(scratch) / "chats.jsonl", count)
            runs.append({"bytes": file.stat().st_size, **process.fresh("audit", file, options.model)})
            last = runs[-1]
            print(
                f"{last['conversations']:>9,} conversations ({size(last['bytes'])}): {last['seconds']:,.1f} s, peak "
                f"{size(last['peak_bytes'])}, {last['peak_bytes'] / runs[0]['peak_bytes']:.2f} of the first; of a "
                f"process that encodes {size(last['worker_peak_bytes'])}"
            )
    rows = [record.row(f"{run['conversations']} conversations", [run], per="file") for run in runs]
    result = {"benchmark": "audit", **record.environment(), "model": options.model, "runs": runs, "rows": rows}
    record.write(options.json, result)


def _write(file: Path, count: int) -> Path:
    """Write conversations under the names of ShareGPT."""
    rng = random.Random(0)
    text = " ".join(prose.pages(4))
    words = [word for word, _ in Counter(text.split()).most_common(VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            turns = [
                {
                    "from": ("human", "gpt")[turn % 2],
                    "value": " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(*WORDS))),
                }
                for turn in range(rng.choice(TURNS))
            ]
            lines.write(json.dumps({"conversations": turns}) + "\n")
    return file


def _measure(file: str, model: str) -> dict[str, Any]:
    """Audit one file in a fresh process."""
    from minift.config import FINETUNE
    from minift.data.audit import audit
    from minift.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    start = time.perf_counter()
    result = audit([Path(file)], tokenizer, FINETUNE)
    return {
        "seconds": time.perf_counter() - start,
        "conversations": result.counts["conversations"],
        "tokens": sum(length * count for length, count in result.lengths.items()),
        "peak_bytes": process.peak(),
        "worker_peak_bytes": process.peak_of_children(),
    }
