"""Column files → rows: Parquet, Arrow (streams and files of record batches), and folders that `datasets` has saved.

A column file stores all values of a column one after the other, in groups of rows: Parquet's row groups, Arrow's record
batches. A group may hold a million rows, so it is read in batches of some hundred kilobytes, and only the columns that
are needed. Parquet is unpacked page by page. An Arrow file is mapped into memory, and what has been read is given back
to the system, or all of it would count as memory of this process. (Record batches that are compressed are unpacked one
at a time, as a whole.)

The place of a row in a message is its number, from 1: `pages.parquet:12`.

    minift data peek pages.parquet -n 3

Source: https://parquet.apache.org/docs/file-format, https://arrow.apache.org/docs/format/Columnar.html
"""

import datetime
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.data.encodings import UTF8, not_text
from minift.data.unpack import UnreadableError, is_pipe, pipe_in_words
from minift.errors import InputError, need, one_line

COLUMN_SUFFIXES = (".parquet", ".arrow")
BATCH_BYTES = 2**18  # of the rows that are taken out of a group at once, on average …
BATCH_ROWS = 2**10  # … and never more of them
_BATCHES_BEFORE_RELEASE = 16
_PROBE = 16  # rows that are read to know how large a row is
_STREAM_BUFFER = 2**18  # bytes of a packed column that are read at once
_TEXTS = {f"{size}{kind}" for kind in ("string", "binary") for size in ("", "large_")} | {"string_view", "binary_view"}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class Bytes(dict[str, int]):
    """A value of bytes that are not text, an image perhaps: only their number is kept, as `{"bytes": 10}`."""


@dataclass(frozen=True)
class Group:
    """A group of rows of a file.

    Attributes:
        first: rows of the file before it.
        rows: rows that it has.
        batches: reads it, and yields record batches of pyarrow, of about BATCH_BYTES.
    """

    first: int
    rows: int
    batches: Callable[[], Iterator[Any]]


def is_column_file(file: Path) -> bool:
    """Return True for a file that is Parquet or Arrow by its name."""
    return file.name.endswith(COLUMN_SUFFIXES)


def saved_shards(folder: Path) -> list[Path] | None:
    """Return the files of a folder that `Dataset.save_to_disk` wrote, in their order; None for any other folder.

    Raises:
        InputError: for a folder of several splits, or one whose description cannot be used.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json").get("splits")
        names = list(map(str, splits)) if isinstance(splits, list) else []
        example = f", as {folder / names[0]}" if names else ""
        raise InputError(f"{folder}: holds the splits {', '.join(names) or 'of no name'}; give one of them{example}")
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    described = _described(state)
    if described.get("_indices_data_files"):
        raise InputError(f"{state}: a selection of rows by `_indices_data_files`; save it with a newer `datasets`")
    entries = described.get("_data_files")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{state}: no list of files under `_data_files`")
    return [_shard_of(folder, entry) for entry in entries]


def _shard_of(folder: Path, entry: Any) -> Path:
    """Return the file that an entry of `_data_files` names."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow"):
        raise InputError(f"{folder / 'state.json'}: {name!r} is not the name of an .arrow file of this folder")
    if not (folder / name).is_file():
        raise InputError(f"{folder / name}: no such file, but {folder / 'state.json'} names it")
    return folder / name


def _described(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds {type(values).__name__}, not a JSON object")
    return values


# Rows -----------------------------------------------------------------------------------------------------------------


def column_rows(path: Path, encoding: str = UTF8) -> Iterator[tuple[int, dict[str, Any]] | InputError]:
    """Yield the rows of a file, each with its number from 1, as values that JSON has.

    A text may be stored as such, in a dictionary or as bytes. Times become texts, other bytes `Bytes`. A row with a
    value that cannot be read is yielded as an InputError in its place.

    Raises:
        UnreadableError: with `path:row`, when the file cannot be read any further.
    """
    number = 0
    with named_errors(path, lambda: f":{number + 1}"):
        for group in open_columns(path, encoding).groups(None):
            for batch in group.batches():
                columns = [_values(batch.column(i)) for i in range(batch.num_columns)]
                for values in zip(*columns, strict=True):
                    number += 1
                    row = dict(zip(batch.schema.names, values, strict=True))
                    fault = next((name for name in row if isinstance(row[name], _Fault)), None)
                    if fault is None:
                        yield number, row
                    else:
                        yield InputError(f"{path}:{number}: {fault!r}: {row[fault].reason}")


def text_column(batch: Any) -> Any:
    """Return the only column of a batch as an array of bytes of pyarrow, the texts before they are decoded."""
    pa = need("pyarrow", "arrow", "a column file")
    column = batch.column(0)
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    column = column.cast(pa.binary_view() if "view" in str(column.type) else pa.large_binary())
    column.validate(full=True)  # or a damaged file could lead out of its memory
    return column


@dataclass(frozen=True)
class _Fault:
    """A fault of a value, in its place."""

    reason: str


def _values(column: Any) -> list[Any]:
    """Return the values of a column; a _Fault in the place of one that cannot be read."""
    pa = need("pyarrow", "arrow", "a column file")
    try:
        column.validate(full=True)
        readable = _without_times(pa, column.type)
        column = column if readable == column.type else column.cast(readable)
        return [_json_value(value) for value in column.to_pylist()]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(column) == 1:
            return [_Fault(not_text(b"\xff\xff\xff") if "UTF8" in str(error) else one_line(error))]
        return [value for i in range(len(column)) for value in _values(column.slice(i, 1))]


def _without_times(pa: Any, kind: Any) -> Any:
    """Return a type of columns with texts for times (which may be finer than Python's)."""
    types = pa.types
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.string()
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([field.with_type(_without_times(pa, field.type)) for field in fields])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pa.list_ if types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_without_times(pa, kind.value_type)))
    return kind


def _json_value(value: Any) -> Any:
    """Return a value as JSON has it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Bytes(bytes=len(value))
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    return float(value) if hasattr(value, "__float__") else str(value)  # a decimal, a number of numpy; anything else


# Files ----------------------------------------------------------------------------------------------------------------


def open_columns(path: Path, encoding: str = UTF8) -> "ColumnFile":
    """Open a file.

    Raises:
        InputError: without pyarrow, for a pipe, or for an encoding (texts in such files are in UTF-8).
        UnreadableError: when it cannot be read, or its columns do not have each a name of its own.
    """
    need("pyarrow", "arrow", str(path))
    if is_pipe(path):
        raise InputError(f"{pipe_in_words(path)}; Parquet and Arrow are read from files")
    if encoding != UTF8:
        raise InputError(f"{path}: texts of Parquet and Arrow are always in UTF-8; leave out --encoding {encoding}")
    with named_errors(path):
        file: ColumnFile = Parquet(path) if path.suffix == ".parquet" else Arrow(path)
    if len(set(file.names)) < len(file.names):
        twice = next(name for name in file.names if file.names.count(name) > 1)
        raise UnreadableError(f"{path}: {file.names.count(twice)} columns have the name {twice!r}")
    return file


@contextmanager
def named_errors(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Raise UnreadableError in the place of pyarrow's errors.

    Args:
        place: returns the place reached so far (":12"), for the message.
    """
    pa = need("pyarrow", "arrow", str(path))
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path}{place()}: cannot be read: {error.strerror or _first_line(error)}") from None
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise UnreadableError(f"{path}{place()}: cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error)
    if "encrypt" in text or "decrypt" in text:
        return "it is encrypted; write it without encryption"
    return one_line(text.splitlines()[0] if text else type(error).__name__)


def batch_rows(nbytes: int, rows: int) -> int:
    """Return how many of a group's `rows` to take at once, when they have `nbytes`."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, nbytes)))


class ColumnFile:
    """An open file.

    Attributes:
        path: where it is.
        names: of its columns.
        rows: that it has; None where only the reading tells it.
        layout: a checksum of its description, by which a resumed run knows it.
    """

    def __init__(self, path: Path, schema: Any, rows: int | None, layout: bytes):
        self.path, self.rows, self.layout = path, rows, zlib.crc32(layout)
        self.names: list[str] = schema.names
        self._types = dict(zip(schema.names, schema.types, strict=True))

    def groups(self, columns: list[str] | None) -> Iterator[Group]:
        """Yield the groups, to be read without the columns that are not named (None for all)."""
        raise NotImplementedError

    def check_text(self, column: str) -> None:
        """Raise InputError unless `column` is there and holds texts (in a dictionary perhaps, or as bytes)."""
        there = ", ".join(self.names) or "none"
        if column not in self._types:
            raise InputError(f"{self.path}: no column {column!r}; its columns: {there} (--text-field names another)")
        kind = self._types[column]
        kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
        if str(kind) not in _TEXTS:
            raise InputError(f"{self.path}: the column {column!r} is {kind}, not text; its columns: {there}")


class Parquet(ColumnFile):
    """An open Parquet file; its groups are its row groups."""

    def __init__(self, path: Path):
        self._memory = need("pyarrow", "arrow", str(path)).default_memory_pool()
        from pyarrow import parquet

        # A buffered stream reads a column page by page, `pre_buffer` all of it.
        options = {"buffer_size": _STREAM_BUFFER, "pre_buffer": False, "page_checksum_verification": True}
        footer = _footer(path)
        self._file = parquet.ParquetFile(str(path), **options)
        metadata = self._file.metadata
        # (The sizes of their columns are not asked for: in damaged metadata that ends the process.)
        self._groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        super().__init__(path, self._file.schema_arrow, metadata.num_rows, footer)

    def groups(self, columns: list[str] | None) -> Iterator[Group]:
        """Yield the row groups. As `ColumnFile.groups`."""
        first = 0
        for i, rows in enumerate(self._groups):

            def batches(i: int = i, rows: int = rows) -> Iterator[Any]:
                found = 0
                for taken, batch in enumerate(self._file.iter_batches(self._size(i, columns), [i], columns, False)):
                    if taken % _BATCHES_BEFORE_RELEASE == 0:
                        self._memory.release_unused()  # pyarrow's allocator would keep up to as much again
                    found += batch.num_rows
                    yield batch
                if found != rows:
                    raise UnreadableError(f"{self.path}: {found:,} rows in a group of which it says {rows:,}")

            yield Group(first, rows, batches)
            first += rows

    def _size(self, i: int, columns: list[str] | None) -> int:
        """Return how many rows of a row group to read at once."""
        head = next(self._file.iter_batches(_PROBE, [i], columns, use_threads=False), None)
        return BATCH_ROWS if head is None else batch_rows(head.nbytes, head.num_rows)


def _footer(path: Path) -> bytes:
    """Return the bytes with which a Parquet file ends: its columns, and the sizes, places and extremes of its groups.

    Raises:
        UnreadableError: for a file that is encrypted.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length, magic = int.from_bytes(file.read(4), "little"), file.read()
        if magic == b"PARE":
            raise UnreadableError(f"{path}: cannot be read: it is encrypted; write it without encryption")
        file.seek(max(0, size - 8 - length))
        return file.read(length)


class Arrow(ColumnFile):
    """An open Arrow file: record batches as a stream (so `datasets` saves them), or with an index at the end."""

    def __init__(self, path: Path):
        self._pyarrow = need("pyarrow", "arrow", str(path))
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._has_index = self._map[:6] == b"ARROW1"
        schema = self._open([])[0].schema
        super().__init__(path, schema, None, str(schema).encode())

    def groups(self, columns: list[str] | None) -> Iterator[Group]:
        """Yield the record batches. As `ColumnFile.groups`."""
        first = 0
        for batch in self._record_batches(columns):
            batch.validate()
            size = batch_rows(batch.get_total_buffer_size(), batch.num_rows)

            def batches(batch: Any = batch, size: int = size) -> Iterator[Any]:
                for start in range(0, batch.num_rows, size):
                    if self._map.size() < len(self._map):  # reading what is gone would end the process
                        raise UnreadableError(f"{self.path}: has become shorter while it was read")
                    yield batch.slice(start, size)
                    self._give_back()

            yield Group(first, batch.num_rows, batches)
            first += batch.num_rows

    def _open(self, fields: list[int]) -> tuple[Any, Any]:
        """Return a reader of the columns with these numbers, or of all, and the file that it reads."""
        ipc = self._pyarrow.ipc
        options = ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        file = self._pyarrow.BufferReader(self._pyarrow.py_buffer(self._map))
        return (ipc.open_file if self._has_index else ipc.open_stream)(file, options=options), file

    def _record_batches(self, columns: list[str] | None) -> Iterator[Any]:
        if self._has_index:  # `included_fields` would copy what it reads out of such a file
            reader, _ = self._open([])
            for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)):
                yield batch if columns is None else batch.select(columns)
            return
        reader, file = self._open([self.names.index(name) for name in columns or ()])
        yield from reader
        end = file.tell()
        if self._map[max(0, end - 8) : end] != _END_OF_STREAM:
            raise UnreadableError(f"{self.path}: has no end mark: it was cut, or not closed by what wrote it")
        if end < len(self._map):
            raise UnreadableError(f"{self.path}: {len(self._map) - end:,} bytes come after the end of its stream")

    def _give_back(self) -> None:
        """Take what has been read out of this process's memory; the system reads it again if it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
