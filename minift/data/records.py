"""Files → records, one at a time, so that a corpus larger than memory can be read.

A web corpus such as C4 comes as shards of JSON Lines, gzipped: one object a line, with a `text`, a `timestamp` and a
`url`; The Pile's have a `text` and a `meta`, and are compressed with zstd. Here they are read, and nothing ever holds
more than one line. Plain text (`.txt`) is one document a file, a long one in several parts; `-` is standard input.
Instruction pairs may also come as a table (`data/tables.py`).

Real corpora have bad lines. `scan` gives each of them out as an error that says where and why, between the records,
and whoever reads decides: `read_records` raises the first, `Skipped` counts them and bears a few.

    minift data peek 'data/pages/*.json.gz' -n 3

Read next: `data/tables.py`.
"""

import codecs
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from minift.data.tables import array_items, csv_rows
from minift.data.unpack import STDIN, _readable
from minift.errors import InputError, need, one_line

KINDS = (".jsonl", ".json", ".csv", ".txt")
SUFFIXES = tuple(kind + packing for kind in KINDS for packing in ("", ".gz", ".zst"))
MAX_LINE = 2**24  # bytes; a longer line is a fault, or one bad file could take all memory
TEXT_PART = 2**20  # bytes after which a .txt goes on as another document, behind the end of a line
BEARABLE = 0.01  # the share of unusable records above which a corpus is refused …
FEW = 100  # … before its end only if there are more than these, or a bad start would tell too much
NOT_UNICODE = "not Unicode text: holds half of a surrogate pair"
SHOWN = 5  # faults that are reported one by one; the others are counted

# JSON can write half of a UTF-16 pair ("\\ud83d" alone); no text encoding can, and no tokenizer can read it.
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One JSON object of a file (or a text, as `{"text": …}`), and where it began; lines count from 1."""

    values: dict[str, Any]
    file: Path
    line: int

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"

    def text(self, field: str) -> str:
        """The document of a record.

        Raises:
            InputError: with `file:line`, when there is no text under `field`, or nothing but white space.
        """
        text = self.values.get(field if not is_plain_text(self.file) else "text")
        if not isinstance(text, str):
            raise InputError(f"{self.where}: no text under {field!r}; its keys: {', '.join(self.values) or 'none'}")
        if not text or text.isspace():
            raise InputError(f"{self.where}: the text is empty")
        return text


def find_files(sources: Iterable[str | Path]) -> list[Path]:
    """The data files that `sources` name: files, globs, and folders (everything in them with a known suffix).

    The order is that of `sources`, and sorted by name within a glob or a folder, so it does not depend on the disk.
    `-` is standard input.

    Raises:
        InputError: for a source that names nothing, a file with an unknown suffix, one that needs the `zstd` extra,
            or standard input twice.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path == STDIN:
            found = [path]
        elif path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES))
        else:
            names = [] if path.exists() else map(Path, glob(str(source), recursive=True))
            found = [path] if path.exists() else sorted(name for name in names if not name.is_dir())
        if not found:
            raise InputError(f"{source}: no such file, or no data file in it ({', '.join(SUFFIXES)})")
        files += found
    for file in files:
        if file != STDIN and not file.name.endswith(SUFFIXES):
            raise InputError(f"{file}: unknown kind of data file; known: {', '.join(SUFFIXES)}")
        if file.suffix == ".zst":
            need("zstandard", "zstd", str(file))
    if files.count(STDIN) > 1:
        raise InputError("-: standard input can be read only once")
    return files


def is_plain_text(file: Path) -> bool:
    """Whether a file is text, not JSON Lines."""
    return file.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt")  # asked for each record: no Path is made


def is_table(file: Path) -> bool:
    """Whether a file is a table of pairs (`data/tables.py`), not a record a line: CSV, or JSON that begins as an array.

    Raises:
        InputError: when the file cannot be read.
    """
    return _kind(file) == ".csv" or (_kind(file) == ".json" and file.is_file() and _begins_as_array(file))


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


def _begins_as_array(file: Path) -> bool:
    with _readable(file, lambda: ":1") as opened:
        head = opened.read(4_096)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of one file in order, in the memory of one line. Blank lines are passed over.

    Raises:
        InputError: at the first fault that `scan` finds.
    """
    for item in scan(path):
        if isinstance(item, InputError):
            raise item
        yield item


def scan(path: str | Path) -> Iterator[Record | InputError]:
    """The records of one file in order and, in the places of those that are none, what is wrong with them.

    The file may also be a table (`data/tables.py`). Otherwise, a line is faulty that is not a JSON object, not UTF-8 or
    longer than MAX_LINE; the next one may be good. A fault of the file itself (it cannot be read, its compressed data
    is damaged) is the last item.
    """
    path = Path(path)
    try:
        if is_table(path):
            yield from _scan_table(path)
            return
    except InputError as fault:
        yield fault
        return
    lines = Lines(path)
    items = lines.items()
    while True:
        try:
            start, content = next(items)
            yield parse(content, lines.path, start)
        except StopIteration:
            return
        except InputError as fault:
            yield fault


def _scan_table(path: Path) -> Iterator[Record | InputError]:
    with _readable(path) as file:
        for item in (csv_rows if _kind(path) == ".csv" else array_items)(file, str(path)):
            if isinstance(item, InputError):
                yield item
            else:
                line, values = item
                half = _HALF_PAIR.search(json.dumps(values, ensure_ascii=False))
                yield InputError(f"{path}:{line}: {NOT_UNICODE}") if half else Record(values, path, line)


class Lines:
    """One file, read line by line.

    Attributes:
        number: lines read so far.
        checksum: CRC-32 of their bytes, by which a resumed run knows that it reads the same file.
        failed: whether the file could not be read to its end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.number = 0
        self.checksum = 0
        self.failed = False

    def items(self) -> Iterator[tuple[int, bytes | None]]:
        """What becomes a record: (the line where it begins, its bytes), None for a line longer than MAX_LINE.

        Blank lines are left out. Raises InputError with `file:line` when the file cannot be read on.
        """
        try:
            with _readable(self.path, lambda: f":{self.number + 1}") as file:
                yield from self._parts(file) if is_plain_text(self.path) else self._lines(file)
        except InputError:
            self.failed = True
            raise

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        for line in self._read(file):
            if line is None or not line.isspace():
                yield self.number, line

    def _parts(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        start, size, part = 1, 0, list[bytes]()
        for line in self._read(file):
            if line is not None:
                part.append(line)
                size += len(line)
            if line is None or size >= TEXT_PART:
                if not all(map(bytes.isspace, part)):
                    yield start, b"".join(part)
                if line is None:
                    yield self.number, None
                start, size, part = self.number + 1, 0, []
        if not all(map(bytes.isspace, part)):
            yield start, b"".join(part)

    def _read(self, file: BinaryIO) -> Iterator[bytes | None]:
        while line := file.readline(MAX_LINE + 1):
            self.number += 1
            self.checksum = zlib.crc32(line, self.checksum)
            if len(line) <= MAX_LINE or line.endswith(b"\n"):
                yield line
                continue
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                self.checksum = zlib.crc32(line, self.checksum)
            yield None


def parse(content: bytes | None, file: Path, line: int) -> Record:
    """The record that begins at `file:line`. Raises InputError, with that place, when it is none."""
    where = f"{file}:{line}"
    if content is None:
        raise InputError(f"{where}: a line longer than {MAX_LINE // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
        if is_plain_text(file):
            return Record({"text": text}, file, line)
        values = json.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        hint = " (each line must be an object; only a .json of pairs may be an array)" if text[:1] == "[" else ""
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds {type(values).__name__}, not a JSON object")
    if (b"\\ud" in content or b"\\uD" in content) and _HALF_PAIR.search(json.dumps(values, ensure_ascii=False)):
        raise InputError(f"{where}: {NOT_UNICODE}")
    return Record(values, file, line)


@dataclass
class Skipped:
    """Counts the records that cannot be used, reports the first of them, and ends what is past bearing.

    Attributes:
        strict: bear none.
        quiet: report none.
        records: how many were read, usable or not.
        skipped: how many were not usable.
        first: what was wrong with the first of those.
    """

    strict: bool = False
    quiet: bool = False
    records: int = 0
    skipped: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: InputError, lost: int = 0) -> None:
        """Count an unusable record, and `lost` more that went with it.

        Raises:
            InputError: the fault itself if strict; and when more than FEW, and more than 1 % of all, are unusable.
        """
        self.records += lost
        self.skipped += 1 + lost
        shown = len(self.first) < SHOWN
        if shown:
            self.first.append(one_line(fault))
        if self.strict:
            raise fault
        if shown and not self.quiet:
            tqdm.write(f"skipped: {self.first[-1]}", file=sys.stderr)
        if self.skipped > FEW:
            self.check()

    def check(self) -> None:
        """At the end of a corpus, when all has been counted. Raises InputError above 1 %."""
        if self.skipped > BEARABLE * self.records:
            share = f"{self.skipped:,} of {self.records:,} records cannot be used, more than {BEARABLE:.0%}"
            raise InputError(f"{self.first[0]} ({share})")

    def __str__(self) -> str:
        """The count, and the first faults, each on its line."""
        return "\n  ".join((f"{self.skipped:,} of {self.records:,} records skipped:", *self.first))
