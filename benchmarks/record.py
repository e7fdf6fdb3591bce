"""Record what every result contains in addition to its numbers: the machine, the versions, the commit, the command.

Times without these cannot be compared.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minift.storage.system import command_line, usable_cores

PACKAGES = ("minift", "torch", "numpy", "sentencepiece", "safetensors", "tokenizers", "transformers", "datasets")


def environment() -> dict[str, Any]:
    """Return the machine, the packages' versions, the commit (with "+" if files were changed), date and command."""
    return {
        "command": "python -m benchmarks " + command_line(_without_places(sys.argv[1:])),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": usable_cores(),
            "memory_bytes": _memory(),
            "system": platform.platform(),
            **({"gpu": _gpu()} if torch.cuda.is_available() else {}),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum, maximum and number of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def write(file: str | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if a file is given."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _without_places(words: Sequence[str]) -> list[str]:
    """Return a command without the options that only name files."""
    kept, place = [], False
    for word in words:
        if word.startswith("--"):
            place = word in ("--json", "--plot", "--folder", "--data", "--tokenizer", "--pairs", "--trace")
        if not place:
            kept.append(word)
    return kept


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


def _gpu() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _memory() -> int | None:
    """Return the bytes of the machine's memory; None on Windows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
