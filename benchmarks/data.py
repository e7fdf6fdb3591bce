"""Measure how fast text becomes batches: minift compared with its own parts alone and with Hugging Face `datasets`.

The same shards of `.json.gz` are read in turns, each time by a fresh process:

* *parts alone*: one loop of gunzip, JSON parsing and SentencePiece, and nothing else: what any pipeline has to do;
* *minift*: from the files to `Batch`, through shuffle buffer and packing, by one process;
* *minift, 2 workers*: the same, with two processes that encode;
* *datasets, loop* and *datasets, map*: streaming, with the same vocabulary as a fast tokenizer, called for each
  document, and by a batched `map` (1,000 at a time). They produce ids only and pack nothing. Skipped where not
  installed.

"One process" also means one core: all runs but that of the workers are pinned to one, and `tokenizers` uses no threads.

The vocabulary is trained on some of the text and has 32,000 pieces, as Llama 2's has; or it is given.

    python -m benchmarks data
    python -m benchmarks data --tokenizer bundled                                # with its 2,048 pieces
    python -m benchmarks data --tokenizer path/to/tokenizer.model --data "c4/*.json.gz" --json FILE
"""

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import arguments, process, prose, record
from minift.data.records import find_files, read_records
from minift.errors import InputError
from minift.storage.names import model_path

SHARDS = 4
BATCH_SIZE, LENGTH = 16, 1_024
TRAINED_ON = 8_000_000  # characters
SHUFFLE_BUFFER = 1_000  # smaller than the corpus, as in real use: workers wait while it is filled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", nargs="+", metavar="GLOB", help="pages, .json.gz (default: docstrings of Python)")
    parser.add_argument("--tokenizer", metavar="DIR|FILE", help="with SentencePiece (default: trained on the text)")
    parser.add_argument("--pieces", type=int, default=32_000, metavar="N", help="… of so many pieces (%(default)s)")
    parser.add_argument("--megabytes", type=float, default=24, metavar="N", help="of default text (%(default)s)")
    arguments.add_repeats(parser, 5, "runs of each")
    arguments.add_measure(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON."""
    if options.measure:
        print(json.dumps(_measure(*options.measure)))
        return
    arguments.check_counts(options, "repeats")
    sides = {"parts alone": 1, "minift": 1, "minift, 2 workers": None}  # the cores of each; None: all
    if importlib.util.find_spec("datasets") and importlib.util.find_spec("transformers"):
        sides |= {"datasets, loop": 1, "datasets, map": 1}
    else:
        print("datasets and transformers are not both installed: skipped")
    with tempfile.TemporaryDirectory() as scratch:
        if options.data:
            files = find_files(options.data)
            characters = sum(len(page.text("text")) for file in files for page in read_records(file))
        else:
            files, characters = prose.write_shards(Path(scratch), options.megabytes, SHARDS)
        tokenizer = options.tokenizer or _train_tokenizer(files, options.pieces, Path(scratch))
        pieces = _write_fast_tokenizer(tokenizer, Path(scratch))
        print(f"{pieces:,} pieces, {'given' if options.tokenizer else 'trained on some of the text'}")
        print(f"{characters / 1e6:,.1f} million characters in {len(files)} shards; {options.repeats} runs of each")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(options.repeats + 1):
            for name in sides if turn % 2 else reversed(sides):
                measured = process.fresh("data", name, tokenizer, scratch, *files, cores=sides[name])
                if turn:  # the first turn warms the page cache
                    runs[name].append(measured)
    result = {
        "benchmark": "data",
        **record.environment(),
        "text": "given" if options.data else "docstrings",
        "pieces": pieces,
        "vocabulary": "given" if options.tokenizer else "trained on some of the text",
        "characters": characters,
        "tokens": int(runs["parts alone"][0]["tokens"]),
        "characters_per_second": {
            name: record.spread([characters / run["seconds"] for run in measured]) for name, measured in runs.items()
        },
        "times_as_fast_as": {  # medians over the turns: another load on the machine slowed both sides of a turn
            name: {other: _ratio(runs[other], runs[name]) for other in runs} for name in runs
        },
        "rows": [record.row(name, measured, per="corpus") for name, measured in runs.items()],
    }
    print(_table(result))
    record.write(options.json, result)


def _train_tokenizer(files: list[Path], pieces: int, folder: Path) -> str:
    """Train a vocabulary on the first TRAINED_ON characters of the first shards. Return its file."""
    from minift.tokenizer.sentencepiece import train_tokenizer

    def texts() -> Iterator[str]:
        characters = 0
        for page in chain.from_iterable(map(read_records, files)):
            yield page.text("text")
            characters += len(page.text("text"))
            if characters >= TRAINED_ON:
                return

    train_tokenizer(texts(), pieces).save(folder)
    return str(folder / "tokenizer.model")


def _write_fast_tokenizer(name: str, folder: Path) -> int:
    """Write the same vocabulary as a fast tokenizer's file. Return its number of pieces."""
    from minift.tokenizer.load import load_tokenizer
    from minift.tokenizer.save import json_file
    from minift.tokenizer.sentencepiece import SentencePieceTokenizer

    tokenizer = load_tokenizer(model_path(name))
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise InputError(f"{name}: not a SentencePiece model, which this benchmark compares with")
    (folder / "tokenizer.json").write_text(json_file(tokenizer)["tokenizer.json"], encoding="utf-8")
    return tokenizer.vocab_size


def _measure(name: str, tokenizer: str, scratch: str, *files: str) -> dict[str, float]:
    """Measure in a fresh process the seconds from the first file to the last token, after all imports and loading."""
    if name.startswith("datasets"):
        return _measure_datasets(name, scratch, files)
    from minift.data.batches import PageBatches
    from minift.data.stream import DocumentStream
    from minift.tokenizer.load import load_tokenizer
    from minift.tokenizer.sentencepiece import SentencePieceTokenizer

    loaded = load_tokenizer(model_path(tokenizer))
    assert isinstance(loaded, SentencePieceTokenizer)
    tokens = 0
    start = time.perf_counter()
    if name == "parts alone":
        for file in files:
            with gzip.open(file, "rb") as lines:
                for line in lines:
                    tokens += len(loaded.processor.encode(json.loads(line)["text"]))
    else:
        stream = DocumentStream(files, epochs=1, shuffle_buffer=SHUFFLE_BUFFER)
        for batch in PageBatches(stream, loaded, BATCH_SIZE, LENGTH, workers=2 if "workers" in name else 0):
            tokens += batch.n_targets
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def _measure_datasets(name: str, scratch: str, files: tuple[str, ...]) -> dict[str, float]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "TOKENIZERS_PARALLELISM": "false"}
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{scratch}/tokenizer.json")

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(rows["text"])["input_ids"]}

    tokens = 0
    start = time.perf_counter()
    rows = load_dataset("json", data_files=list(files), streaming=True)["train"]
    if name == "datasets, map":
        for row in rows.map(encode, batched=True, batch_size=1_000, remove_columns=["text", "timestamp", "url"]):
            tokens += len(row["input_ids"])
    else:
        for row in rows:
            tokens += len(tokenizer(row["text"])["input_ids"])
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def _ratio(slower: list[dict[str, float]], faster: list[dict[str, float]]) -> float:
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(slower, faster, strict=True))


def _table(result: dict[str, Any]) -> str:
    speeds = result["characters_per_second"]
    others = [name for name in ("parts alone", "minift", "datasets, loop", "datasets, map") if name in speeds]
    lines = [f"{'':<20}{'million characters/s':>24}" + "".join(f"{f'x {name}':>18}" for name in others)]
    for name, speed in speeds.items():
        cell = "{:.2f} ({:.2f}-{:.2f})".format(*(speed[key] / 1e6 for key in ("median", "min", "max")))
        ratios = (result["times_as_fast_as"][name][other] for other in others)
        lines.append(f"{name:<20}{cell:>24}" + "".join(f"{ratio:>18.2f}" for ratio in ratios))
    return "\n".join(lines)
