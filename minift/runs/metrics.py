"""Read a run's `metrics.jsonl`, and mend it before the run is resumed.

The file is a record: no step depends on it. So a run that has lost lines of it goes on, and says which steps have none.
Lines that cannot be used are moved to `metrics.jsonl.damaged`.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minift.errors import InputError, one_line
from minift.storage.atomic import write_file

OF_STEP = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds")  # numbers in the line of each step
# Numbers that some lines have; one of step 0 has no others.
OTHERS = ("validation_loss", "validation_loss_before", "loss_scale", "mfu")
DAMAGED = ".damaged"  # the end of the name of the file for lines that cannot be used
SHOWN = 3  # stretches of steps without a line that are named


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, by step; none where there is no such file.

    Raises:
        InputError: with file and line, for one that is not the line of a step; when the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(file), 1):
        try:
            records.append(_record(line, records[-1]["step"] if records else -1))
        except ValueError as error:
            raise InputError(
                f"{file}:{number}: not the line of a step: {one_line(error)}; --resume moves it out of the way"
            ) from None
    return records


def cut_metrics(file: Path, step: int | None) -> str:
    """Drop the lines after step `step`, which a resumed run takes again, and move out the damaged ones before it.

    A file in which all is right stays as it is.

    Args:
        step: that of the folder from which a run is resumed; -1 where it begins again, None where it is done.

    Returns:
        What was lost, in one line; "" for nothing.

    Raises:
        InputError: when the file cannot be read.
        RunError: when the disk refuses.
    """
    lines = _lines(file)
    kept, steps, damaged = list[bytes](), list[int](), dict[int, str]()  # damaged: by the number of the line, why
    for number, line in enumerate(lines, 1):
        try:
            found = int(_record(line, steps[-1] if steps else -1)["step"])
        except ValueError as error:
            damaged[number] = one_line(error)
            continue
        if step is not None and found > step:
            break
        kept.append(line)
        steps.append(found)
    last = max(steps, default=min(0, step or 0))
    if last == step:  # each damaged line after that of `step` is of a later one, which is taken again
        end = lines.index(kept[-1]) + 1 if kept else 0
        damaged = {number: reason for number, reason in damaged.items() if number <= end}
    if damaged:
        _append(file.with_name(file.name + DAMAGED), [lines[number - 1] for number in damaged])
    content = b"".join(line + b"\n" for line in kept)
    if lines and content != file.read_bytes():
        write_file(file, lambda partial: partial.write_bytes(content))
    if step is None and not lines:
        return f"{file}: missing or empty; the report shows no steps"
    missing = sorted(set(range(1, 1 + (last if step is None else step))) - set(steps))
    return _loss_in_words(file, damaged, missing)


def _lines(file: Path) -> list[bytes]:
    """Return the lines of a file, which need not be there. Raises InputError when it cannot be read."""
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):  # a pipe would be waited for, a link be written through
            raise InputError(f"{file}: is a link, a folder or a pipe, not the file of a run's metrics; move it away")
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _record(line: bytes, before: int) -> dict[str, Any]:
    """Return the object of a line. Raises ValueError unless it is that of a step after step `before`."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg}" if line.strip() else "it is empty") from None
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object")
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"its step is {step!r}")
    for name in (*(OF_STEP if step else ()), *OTHERS):
        value = record.get(name, None if name in OF_STEP else 0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"its {name} is {value!r}, not a number")
    if step <= before:
        raise ValueError(f"its step is {step}, and that of a line before it {before}")
    return record


def _append(file: Path, lines: Sequence[bytes]) -> None:
    """Add lines to a file. Raises RunError when the disk refuses."""
    content = b"".join(line + b"\n" for line in (*_lines(file), *lines))
    write_file(file, lambda partial: partial.write_bytes(content))


def _loss_in_words(file: Path, damaged: dict[int, str], missing: Sequence[int]) -> str:
    """Return what was lost: `damaged` lines, by their number, and the steps that have no line."""
    if not damaged and not missing:
        return ""
    found = "missing" if not file.exists() else "incomplete"
    if damaged:
        number, reason = next(iter(damaged.items()))
        others = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
        found = f"line {number}{others} moved to {file.name}{DAMAGED}: {reason}"
    stretches = _stretches(missing)
    words = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in stretches[:SHOWN])
    more = f" and {len(stretches) - SHOWN:,} stretches more" if len(stretches) > SHOWN else ""
    without = f"; steps without a line: {words}{more} (the report and the lowest validation loss lack them)"
    return f"{file}: {found}{without if missing else ''}"


def _stretches(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last step of each stretch without a gap."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and found[-1][1] == step - 1:
            found[-1] = found[-1][0], step
        else:
            found.append((step, step))
    return found
