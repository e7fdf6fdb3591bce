"""Files → records, one at a time, so that a corpus larger than memory can be read.

A web corpus such as C4 comes as shards of JSON Lines, gzipped: one object a line, with a `text`, a `timestamp` and a
`url`. The Pile's objects have a `text` and a `meta`, and its shards are compressed with zstd. Both are read here, and
no more than one line is held in memory. Plain text (`.txt`) is one document a file, a long one in several parts; `-` is
standard input. Instruction pairs may also come as a table or an array (`data/tables.py`).

Real corpora have bad lines. Between the records, `scan` yields an error for each of them, with its place and the
reason. Its callers decide what to do: `read_records` raises the first; `Skipped` counts them and tolerates a few.

    minift data peek "data/pages/*.json.gz" -n 3
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from minift.data.columns import COLUMN_SUFFIXES, column_rows, is_column_file, saved_shards
from minift.data.encodings import UTF8, not_text
from minift.data.lines import MAX_LINE, Lines, is_plain_text
from minift.data.tables import array_items, csv_rows, find_array, find_table
from minift.data.unpack import STDIN, UnreadableError, is_pipe, open_unpacked, pipe_in_words
from minift.errors import InputError, need, one_line
from minift.storage.names import similar_path

SEPARATORS = {".csv": None, ".tsv": "\t"}  # of the kinds that are tables; None where its first row tells it
KINDS = (".jsonl", ".json", *SEPARATORS, ".txt")
SUFFIXES = (*(kind + packing for kind in KINDS for packing in ("", ".gz", ".zst")), *COLUMN_SUFFIXES)
MAX_SKIPPED_SHARE = 0.01  # a corpus is refused when a larger share of its records is unusable …
SKIPPED_BEFORE_CHECK = 100  # … before its end only after more unusable ones than these: a bad start says little
SHOWN = 5  # faults that are reported one by one; the others are counted
NOT_UNICODE = "not Unicode text: holds half of a surrogate pair"

_NAMELESS = (
    "what has no name with a suffix is read as JSON Lines, an array, or a table whose first line names its columns"
)

# JSON can write half of a UTF-16 pair ("\\ud83d" alone); no text encoding can, and no tokenizer can read it.
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One JSON object of a file, or a text as `{"text": …}`.

    Attributes:
        values: the object.
        file: where it was read.
        line: the line where it begins, counted from 1.
    """

    values: dict[str, Any]
    file: Path
    line: int

    @property
    def where(self) -> str:
        """Return `file:line`, for messages."""
        return f"{self.file}:{self.line}"

    def text(self, field: str) -> str:
        """Return the document under the key `field` (that of a plain text file is its text, whatever the key).

        Raises:
            InputError: with `file:line`, when there is no text under `field`, or only white space.
        """
        text = self.values.get(field if not is_plain_text(self.file) else "text")
        if not isinstance(text, str):
            raise InputError(f"{self.where}: no text under {field!r}; its keys: {', '.join(self.values) or 'none'}")
        if not text or text.isspace():
            raise InputError(f"{self.where}: the text is empty")
        return text


# Files ----------------------------------------------------------------------------------------------------------------


def warn(text: str) -> None:
    """Print a line on standard error."""
    tqdm.write(text, file=sys.stderr)


def find_files(sources: Iterable[str | Path], say: Callable[[str], object] | None = warn) -> list[Path]:
    """Return the data files that `sources` name: files, globs, and folders (all files in them with a known suffix; of
    one that `datasets` saved, those that it names).

    The order is that of `sources`, and by name within a glob or a folder: it does not depend on the disk. `-` is
    standard input. A file that is reached twice (its name is given twice, or it has a link) is read once, where it is
    reached first.

    Args:
        say: gets a line about files that are reached twice; None for no such line.

    Raises:
        InputError: for a source that names nothing, a file with an unknown suffix, one that needs an extra, a saved
            folder of several splits, or a pipe or standard input twice.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path == STDIN:
            found = [path]
        elif path.is_dir():
            found = saved_shards(path) or sorted(entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES))
        else:
            names = [] if path.exists() else map(Path, glob(str(source), recursive=True))
            found = [path] if path.exists() else sorted(name for name in names if not name.is_dir())
        if not found:
            near = "" if path.exists() else similar_path(path)
            raise InputError(f"{source}: no such file{near}, or no data file in it ({', '.join(SUFFIXES)})")
        files += found
    for file in files:
        if not file.name.endswith(SUFFIXES) and not is_pipe(file):
            raise InputError(f"{file}: unknown kind of data file; known: {', '.join(SUFFIXES)}")
        if file.suffix == ".zst":
            need("zstandard", "zstd", str(file))
        if is_column_file(file):
            need("pyarrow", "arrow", str(file))
    return _without_repeated(files, say)


def _without_repeated(files: list[Path], say: Callable[[str], object] | None) -> list[Path]:
    """Return each file once. Raises InputError for a pipe that is there twice."""
    first: dict[object, Path] = {}
    repeated: list[tuple[Path, Path]] = []
    for file in files:
        identity = _identity(file)
        if identity not in first:
            first[identity] = file
        elif is_pipe(file):
            raise InputError(f"{pipe_in_words(file)} can be read only once")
        else:
            repeated.append((file, first[identity]))
    if repeated and say is not None:
        file, same = repeated[0]
        others = f", and {len(repeated) - 1:,} more like it" if len(repeated) > 1 else ""
        state = "is named twice" if file == same else f"is the same file as {same}"
        say(f"read once: {one_line(file)} {one_line(state)}{others}")
    return list(first.values())


def _identity(file: Path) -> object:
    """Return what two names of one file have in common."""
    try:
        found = file.stat()
    except OSError:
        return file
    return (found.st_dev, found.st_ino) if file != STDIN and found.st_ino else file


def is_table(file: Path) -> bool:
    """Return True for a table of pairs (`data/tables.py`)."""
    return _kind(file) in SEPARATORS


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


# Records --------------------------------------------------------------------------------------------------------------


def read_records(path: str | Path, encoding: str = UTF8) -> Iterator[Record]:
    """Yield the records of one file in order, in the memory of one line. Blank lines are left out.

    Raises:
        InputError: at the first fault that `scan` finds.
    """
    for item in scan(path, encoding):
        if isinstance(item, InputError):
            raise item
        yield item


def scan(path: str | Path, encoding: str = UTF8) -> Iterator[Record | InputError]:
    """Yield the records of one file in order and, in the place of each unusable one, what is wrong with it.

    A line is faulty when it is not a JSON object, not text in `encoding` or longer than MAX_LINE; the next one may be
    good. The file may also be a table or an array (`data/tables.py`). The last item is an UnreadableError when the file
    cannot be read to its end.
    """
    lines = Lines(Path(path), encoding)
    try:
        if is_column_file(lines.path):
            for item in column_rows(lines.path, encoding):
                yield item if isinstance(item, InputError) else Record(item[1], lines.path, item[0])
            return
        with open_unpacked(lines.path, lambda: f":{lines.number + 1}", encoding) as file:
            table, hint = is_table(lines.path), ""
            if not lines.path.name.endswith(SUFFIXES):  # of a pipe, only what it holds tells what it is
                table, hint, file = _look_at(file, lines.path)
            if table:
                rows = csv_rows(file, str(path), SEPARATORS.get(_kind(lines.path)), encoding)
                yield from _scan_table(rows, lines)
                return
            key = None
            if not is_plain_text(lines.path):
                key, file = find_array(file, in_object=_kind(lines.path) == ".json")
            if key is None:
                yield from _scan_lines(file, lines, hint)
            else:
                yield from _scan_table(array_items(file, str(path), key, encoding), lines)
    except InputError as fault:
        yield fault


def _look_at(file: BinaryIO, path: Path) -> tuple[bool, str, BinaryIO]:
    """Return True if a file without a suffix begins as a table, a hint for the error if it is none, and the file.

    Raises:
        UnreadableError: when it holds columns.
    """
    line, table, file = find_table(file)
    if line.startswith((b"PAR1", b"ARROW1")):
        raise UnreadableError(f"{path}: holds Parquet or Arrow, which is read from files: {', '.join(COLUMN_SUFFIXES)}")
    hint = "" if line[:1] in (b"{", b"[") else f" ({_NAMELESS})"
    return table, hint, file


def _scan_lines(file: BinaryIO, lines: Lines, hint: str = "") -> Iterator[Record | InputError]:
    """Yield the record of each line. The first fault has a `hint`."""
    for start, content in lines.items_of(file):
        try:
            record = parse(content, lines.path, start, lines.encoding)
        except InputError as fault:
            yield InputError(f"{fault}{hint}")
            hint = ""
        else:
            yield record


def _scan_table(
    items: Iterable[tuple[int, dict[str, Any]] | InputError], lines: Lines
) -> Iterator[Record | InputError]:
    for item in items:
        if isinstance(item, InputError):
            yield item
            continue
        line, values = item
        lines.number = line - 1  # where the last record begins, for the message of a file that is damaged after it
        half = _HALF_PAIR.search(json.dumps(values, ensure_ascii=False))
        yield InputError(f"{lines.path}:{line}: {NOT_UNICODE}") if half else Record(values, lines.path, line)


def parse(content: bytes | None, file: Path, line: int, encoding: str = UTF8) -> Record:
    """Return the record that begins at `file:line`, from what `Lines.items` yields.

    Args:
        encoding: that of the file, for messages. `content` is in UTF-8.

    Raises:
        InputError: with `file:line`, when it is no record.
    """
    where = f"{file}:{line}"
    if content is None:
        raise InputError(f"{where}: a line longer than {MAX_LINE // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
        if is_plain_text(file):
            return Record({"text": text}, file, line)
        values = json.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{where}: {not_text(content, encoding)}") from None
    except json.JSONDecodeError as error:
        hint = " (each line must be an object; only a file of pairs may be an array)" if text[:1] == "[" else ""
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds {type(values).__name__}, not a JSON object")
    if (b"\\ud" in content or b"\\uD" in content) and _HALF_PAIR.search(json.dumps(values, ensure_ascii=False)):
        raise InputError(f"{where}: {NOT_UNICODE}")
    return Record(values, file, line)


# Records that cannot be used ------------------------------------------------------------------------------------------


@dataclass
class Skipped:
    """Counts the records that cannot be used, reports the first of them, and raises an error when there are too many.

    Attributes:
        strict: raise an error at the first.
        quiet: report none.
        records: how many were read, usable or not.
        skipped: how many were not usable.
        first: what was wrong with the first of those, each reason once.
        unread: the files of pages that cannot be read to their end. The place counts as one record, but more are lost.
    """

    strict: bool = False
    quiet: bool = False
    records: int = 0
    skipped: int = 0
    first: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, fault: InputError, lost: int | None = None) -> None:
        """Count an unusable record, and `lost` more that cannot be read because of it.

        Raises:
            InputError: the fault itself if strict, or if a file cannot be read to its end and `lost` is not given; and
                when too many records are unusable (`check`), as soon as there are more than SKIPPED_BEFORE_CHECK.
        """
        if lost is None and isinstance(fault, UnreadableError):
            raise fault
        self.records += lost or 0
        self.skipped += 1 + (lost or 0)
        shown = len(self.first) < SHOWN and kind_of(fault) not in map(kind_of, self.first)
        if shown:
            self.first.append(one_line(fault))
        if self.strict:
            raise fault
        if shown and not self.quiet:
            warn(f"skipped: {self.first[-1]}")
        if self.skipped > SKIPPED_BEFORE_CHECK:
            self.check()

    def check(self) -> None:
        """Raise InputError when more than MAX_SKIPPED_SHARE of the records are unusable. Call it at a corpus's end."""
        if self.skipped > MAX_SKIPPED_SHARE * self.records:
            share = f"{self.skipped:,} of {self.records:,} records cannot be used, more than {MAX_SKIPPED_SHARE:.0%}"
            raise InputError(f"{self.first[0]} ({share})")

    def __str__(self) -> str:
        """Return the count and the first faults, each on a line of its own."""
        files = "1 file" if len(self.unread) == 1 else f"{len(self.unread):,} files"
        rest = f", and the rest of {files} that cannot be read to the end" if self.unread else ""
        more = self.skipped - len(self.first)
        lines = [*self.first, *([f"and {more:,} more like {'it' if len(self.first) == 1 else 'them'}"] * (more > 0))]
        return "\n  ".join((f"{self.skipped:,} of {self.records:,} records skipped{rest}:", *lines))


def kind_of(fault: object) -> str:
    """Return what is wrong, without the place: two records with the same fault give the same."""
    return re.sub(r"\d+", "#", re.sub(r"^.*?:\d+(?=\D|$)", "", one_line(fault), count=1))
