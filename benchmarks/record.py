"""Write and read results: every sample, and what a time means nothing without: machine, versions, code and command.

A result is a JSON object. Its head is the same for all benchmarks (`environment`), its `rows` hold every sample in the
order in which it was taken (`row`), and the other keys are the benchmark's own: medians, ratios, what the table shows.

    {"schema": 2, "benchmark": "ops", "command": …, "date": …, "began": …, "ended": …, "commit": …, "code": …,
     "machine": {…}, "load": {"before": […], "during": […], "after": […]}, "files": {…}, "versions": {…},
     "settings": {"dtype": "bfloat16", "shape": "stories15m", "batch_size": 16, …}, "rows": [{"name": …, …}, …], …}

Results of schema 1 have medians and ranges only. `read` reads both.
"""

import hashlib
import json
import math
import platform
import re
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import benchmarks
import minift
from benchmarks import hardware
from minift.data.stream import fingerprint
from minift.errors import InputError, RunError
from minift.storage.system import command_line
from minift.values import LARGEST_JSON, read_json, size

SCHEMA = 2
PACKAGES = ("minift", "torch", "numpy", "sentencepiece", "safetensors", "tokenizers", "transformers", "datasets")
INPUTS = ("--data", "--tokenizer", "--pairs", "--model", "--config", "--add", "--rank", "--history")
OUTPUTS = ("--json", "--plot", "--trace", "--folder")  # where these go changes nothing that is measured
SETTINGS = (  # a benchmark's own keys that say what was measured, by their names in "settings"
    *("device", "dtype", "compile", "batch_size", "grad_accum", "length", "documents", "prompt", "heads", "width"),
    *("vocabulary", "pieces", "loss_chunk", "lr", "apart", "model", "prompt_length", "new_tokens", "seed", "text"),
)
HEAD: dict[str, tuple[type, str, int]] = {  # what each result has: its type, its name, and the first schema with it
    **dict.fromkeys(("benchmark", "command", "date", "commit"), (str, "text", 1)),
    **dict.fromkeys(("machine", "versions"), (dict, "an object", 1)),
    "code": (str, "text", 2),
    **dict.fromkeys(("load", "files", "settings"), (dict, "an object", 2)),
}
LARGEST = 2**30  # bytes of a file that is read as a whole for its checksum: a second or two
OLD_KEYS = {"defaults": "sweeps", "lesson leakage": "pages"}  # of schema 1, where "rows" was the benchmark's own key


class Sampled(Protocol):
    """What `row` takes: `samples.Samples`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the timer, the caches, and all samples in order."""


@dataclass(frozen=True)
class Start:
    """The moment in which a process began to measure: what the machine was doing, and which code was there to run."""

    at: float
    load: list[float | None]
    ticks: hardware.Ticks | None
    commit: str
    code: str


@cache
def begin() -> Start:
    """Note when this process begins to measure. The first call counts; later ones return the same."""
    return Start(time.time(), hardware.load(), hardware.Ticks.now(), _commit(), code_digest())


def environment() -> dict[str, Any]:
    """Return the head of a result: schema, command, date, commit, code, machine, load, files and versions.

    A commit with "+" had changed files; `code` is a checksum of all files of minift and of the benchmarks. Both are of
    the moment in which the process began: what is changed later is not what ran.
    """
    start = begin()
    during = hardware.shares(start.ticks, hardware.Ticks.now())
    after = hardware.load()
    return {
        "schema": SCHEMA,
        "command": "python -m benchmarks " + command_line(named_command(sys.argv[1:])),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "began": start.at,
        "ended": time.time(),
        "commit": start.commit,
        "code": start.code,
        "machine": hardware.describe(),
        "load": {
            "before": start.load,
            "during": [after[0], *during],
            "after": after,
        },
        "files": named_files(sys.argv[1:]),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum, maximum and number of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def row(
    name: str,
    samples: Sampled | Sequence[float] | Sequence[Mapping[str, Any]],
    unit: str = "s",
    per: str = "call",
    **more: Any,
) -> dict[str, Any]:
    """Return a row of a result: all samples of one thing, in order.

    Args:
        name: what it is, with its parts separated by "/": "norm/used/both/warm".
        samples: `samples.Samples`; or, one a turn, the values alone, or what a process answers: {"seconds": …, "at":
            …, "calls": …}.
        unit: of a value.
        per: what a value is for: "call", "step", "token".
        more: other values of the row, such as `work={"flops": …, "bytes": …}`.
    """
    if isinstance(samples, Sequence):
        found: dict[str, Any] = {"timer": "wall", "caches": "warm", "stopped": "repeats", "floor_seconds": 0.0}
        answers = [one if isinstance(one, Mapping) else {"seconds": one} for one in samples]
        lists: list[Any] = [
            [one.get("at"), one["seconds"], one.get("calls", 1), turn, []] for turn, one in enumerate(answers)
        ]
        found |= {"left_out": {}, "samples": lists}
    else:
        found = samples.to_dict()
    return {"name": name, "unit": unit, "per": per, **more, **found}


def control(roofs: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the rows that tell machines apart: what a product, a copy and a read took in each turn's `roof.Roof`.

    A roof that was not measured has no row.
    """
    works = (
        ("machine/product", "flops", 1e12, "TFLOP"),
        ("machine/copy", "bandwidth", 1e9, "GB"),
        ("machine/read", "read_bandwidth", 1e9, "GB"),
    )
    measured = [one for one in works if all(getattr(turn, one[1], 0) for turn in roofs)]
    return [row(name, [work / getattr(turn, key) for turn in roofs], per=per) for name, key, work, per in measured]


def write(file: str | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if a file is given; what it says of shapes and dtypes is collected in "settings".

    Raises:
        RunError: when it cannot be written: the disk is full.
    """
    if file is None:
        return
    settings = {"shape": result["config"]} if "config" in result else {}
    settings |= {key: result[key] for key in SETTINGS if key in result}
    whole = {**result, "settings": {**settings, **result.get("settings", {})}}
    text = _json(whole, whole.pop("rows", [])) + "\n"
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{file}: the result cannot be written: {error.strerror or error}") from None


def _json(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a result as JSON, with a row a line, so that a hundred samples are not a thousand lines."""
    head = json.dumps(result, indent=2).removesuffix("\n}")
    return f'{head},\n  "rows": [\n    ' + ",\n    ".join(map(json.dumps, rows)) + "\n  ]\n}"


# Reading --------------------------------------------------------------------------------------------------------------


def read(file: str | Path) -> dict[str, Any]:
    """Read a result, of schema 1 or 2. One of schema 1 gets `"schema": 1` and no rows.

    Raises:
        InputError: for what is missing, is no regular file, is too large, is no result, is damaged, or is of another
            schema.
    """
    _check_file(Path(file))
    result = read_json(file)
    schema = result.get("schema", 1)
    if schema not in (1, SCHEMA) or isinstance(schema, bool):
        raise InputError(f"{file}: schema is {schema!r}; this version of minift reads 1 and {SCHEMA}")
    for key, (kind, called, since) in HEAD.items():
        if since <= schema and not isinstance(result.get(key), kind):
            found = f"{key} is {result[key]!r:.40}, not {called}" if key in result else f"it has no {key}"
            raise InputError(f"{file}: not a result of `python -m benchmarks … --json`: {found}")
    if schema == 1:
        own = {OLD_KEYS.get(result["benchmark"], "old_rows"): result.pop("rows")} if "rows" in result else {}
        return {**result, **own, "schema": 1, "settings": result.get("settings", {}), "rows": []}
    _check_rows(file, result.get("rows"))
    return result


def _check_file(file: Path) -> None:
    """Raise InputError for a device, a pipe, a folder and a file that is too large, before any of it is read."""
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file}: not a regular file; give the file of --json")
    if found.st_size > LARGEST_JSON:
        raise InputError(f"{file}: {size(found.st_size)} are more than the {size(LARGEST_JSON)} of a result")


def _check_rows(file: str | Path, rows: Any) -> None:
    """Raise InputError unless these are rows with different names, and samples as `Samples.to_dict` has them."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: damaged: rows is not a list of objects")
    seen = set[str]()
    for number, one in enumerate(rows):
        name = one.get("name")
        if not isinstance(name, str) or name in seen:
            raise InputError(f"{file}: damaged: name of row {number} is {name!r:.40}; it must be a text of its own")
        seen.add(name)
        samples = one.get("samples")
        if not isinstance(samples, list) or not all(map(_is_sample, samples)):
            raise InputError(f"{file}: damaged: samples of {name} are not all [time, value, calls, turn, [marks]]")


def _is_sample(values: Any) -> bool:
    if not isinstance(values, list) or len(values) != 5 or any(isinstance(value, bool) for value in values):
        return False
    at, value, calls, turn, marks = values
    numbers = isinstance(at, int | float | None) and isinstance(value, int | float) and math.isfinite(value)
    return numbers and isinstance(calls, int) and isinstance(turn, int) and isinstance(marks, list)


# The command, its files and the code ----------------------------------------------------------------------------------


def named_command(words: Sequence[str]) -> list[str]:
    """Return a command with its input files by name, without their folders, and without the files that it writes."""
    kept, option = [], ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            word = f"{option}={Path(value).name}" if equals and option in INPUTS else word
        elif option in INPUTS:
            word = Path(word).name
        if option not in OUTPUTS:
            kept.append(word)
    return kept


def named_files(words: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the input files of a command by option: name, bytes and SHA-256 of each.

    A preset's name is no file. Of a folder all files are listed, of a pattern all that it matches. A file of more than
    LARGEST bytes has the checksum of its two ends (`minift.data.stream.fingerprint`) in place of that of all of it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option, _, word = word.partition("=")
        if word and option in INPUTS and (files := _files(word)):
            found.setdefault(option, []).extend(map(_file, files))
    return found


def _files(word: str) -> list[Path]:
    path = Path(word.rpartition(":")[0] if re.search(r"\.py:\w+$", word) else word)  # a function in a file
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob(word, recursive=True))]
    inside = [sorted(one.iterdir()) if one.is_dir() else [one] for one in paths]
    return [one for files in inside for one in files if one.is_file()]


def _file(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > LARGEST:
        return fingerprint(file)
    with file.open("rb") as opened:
        return {"name": file.name, "bytes": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def code_digest() -> str:
    """Return the SHA-256 of the names and contents of all Python files of the minift and the benchmarks that run here.

    A commit does not say what was timed: files may be changed, and another minift may be installed than that of the
    folder.
    """
    digest = hashlib.sha256()
    for package in (minift, benchmarks):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder.parent).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
