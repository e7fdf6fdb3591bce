"""A file of pages that is being read, from any point on: of lines (`LineShard`) or of columns (`ColumnShard`).

Both give the same to `stream.py`: the next record, a position that can be saved, and the way back to it. What was read
is not saved, it is read again, and checksums tell whether it is still the same. Of lines, all up to the position are
read again: nothing else tells where line 1,000,000 begins. Of columns, the group of the position is found by the
numbers of rows. Of its rows, only those of the batch in which the position lies, and the documents that are asked for,
are compared; for the rest, the sizes and places in the file's own description must be the same.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from minift.data.columns import ColumnFile, Group, is_column_file, named_errors, open_columns, text_column
from minift.data.encodings import UTF8, not_text
from minift.data.lines import Lines
from minift.data.records import Record, parse
from minift.data.unpack import UnreadableError
from minift.errors import InputError

CHANGED = "the data has changed since the run was saved"


class Shard(Protocol):
    """A file that is being read.

    Attributes:
        index: its number among the files of a stream.
        path: where it is.
        records: how many were found in it so far, usable or not.
        total: how many it holds, where that is known before its end.
        checksum: of all that was read, by which a later epoch knows that it has read the same.
        failed: True when the file could not be read to its end.
    """

    index: int
    path: Path
    records: int

    @property
    def total(self) -> int | None: ...

    @property
    def checksum(self) -> int: ...

    @property
    def failed(self) -> bool: ...

    @property
    def position(self) -> tuple[int, ...]:
        """Return the index, and the numbers that `restore` takes."""

    def read(self) -> tuple[Record, int] | None:
        """Return the next record and the checksum of its bytes; None at the end. Raises InputError for a bad one."""

    def restore(self, position: tuple[int, ...], documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Go to a position, and return the texts of earlier `documents`, by (index of the file, line).

        Args:
            position: as saved, without the index.
            documents: the lines where they begin, and the checksum of each.

        Raises:
            InputError: when what was read up to the position, or a document, is not there any more.
        """

    def read_again(self, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Return the texts of `documents` of a file that has been read to its end. As `restore`."""


def open_shard(index: int, path: Path, text_field: str, encoding: str = UTF8) -> Shard:
    """Return the shard of a file, to be read from its beginning.

    Raises:
        InputError: when a column file has no column of texts under `text_field`.
    """
    kind = ColumnShard if is_column_file(path) else LineShard
    return kind(index, path, text_field, encoding)


class LineShard:
    """A file of lines. Its position: records found, lines read, their checksum."""

    total = None

    def __init__(self, index: int, path: Path, text_field: str, encoding: str):
        self.index, self.path, self.records = index, path, 0
        self._text_field = text_field
        self._lines = Lines(path, encoding)
        self._items = self._lines.items()

    @property
    def checksum(self) -> int:
        """Return that of all lines."""
        return self._lines.checksum

    @property
    def failed(self) -> bool:
        """Return True when the file could not be read to its end."""
        return self._lines.failed

    @property
    def position(self) -> tuple[int, ...]:
        """Return it with the index of the file."""
        return self.index, self.records, self._lines.number, self._lines.checksum

    def read(self) -> tuple[Record, int] | None:
        """Return the next record and the checksum of its bytes; None at the end. Raises InputError for a bad one."""
        item = next(self._items, None)
        if item is None:
            return None
        self.records += 1
        return self._parse(item), zlib.crc32(item[1] or b"")

    def restore(self, position: tuple[int, ...], documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read all lines up to a position again. As `Shard.restore`."""
        records, number, checksum = position
        texts = self._read_to(number, documents)
        if self._lines.checksum != checksum:
            raise InputError(f"{self.path}: {CHANGED}")
        self.records = records
        return texts

    def read_again(self, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read all lines up to the last of `documents`. As `Shard.read_again`."""
        return self._read_to(max(documents), documents)

    def _read_to(self, number: int, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        texts = {}
        while self._lines.number < number:
            try:
                item = next(self._items, None)
                if item is None:
                    break
                if documents.get(item[0]) == zlib.crc32(item[1] or b""):
                    texts[self.index, item[0]] = self._parse(item).text(self._text_field)
            except InputError as fault:
                raise InputError(f"{fault}; {CHANGED}") from None
        if len(texts) < len(documents):
            raise InputError(f"{self.path}: {CHANGED}")
        return texts

    def _parse(self, item: tuple[int, bytes | None]) -> Record:
        return parse(item[1], self.path, item[0], self._lines.encoding)


class ColumnShard:
    """A file of columns. Its position: records found, rows read, their checksum; the rows before the batch in which
    the last of them lies, and their checksum; the file's layout.

    Raises:
        InputError: when the file can be read, and has no column of texts under `text_field`.
    """

    def __init__(self, index: int, path: Path, text_field: str, encoding: str):
        self.index, self.path, self.records = index, path, 0
        self.checksum, self.failed = 0, False
        self._rows = 0  # read so far
        self._mark = 0, 0  # the rows before the batch that is being read, and their checksum
        self._text_field = text_field
        self._file: ColumnFile | None = None
        self._fault: InputError | None = None
        try:
            self._file = open_columns(path, encoding)
        except UnreadableError as fault:
            self._fault = fault  # raised where the first record is asked for, as for a missing file of lines
        else:
            self._file.check_text(text_field)
        self._items = self._items_of(self._columns(lambda group: True))

    @property
    def total(self) -> int | None:
        """Return the number of rows, where the file tells it."""
        return self._file.rows if self._file is not None else None

    @property
    def position(self) -> tuple[int, ...]:
        """Return it with the index of the file."""
        layout = self._file.layout if self._file is not None else 0
        return self.index, self.records, self._rows, self.checksum, *self._mark, layout

    def read(self) -> tuple[Record, int] | None:
        """Return the next record and the checksum of its bytes; None at the end. Raises InputError for a bad one."""
        try:
            item = next(self._items, None)
        except InputError:
            self.failed = True
            raise
        if item is None:
            return None
        self.records += 1
        row, content, checksum = item
        return self._record(row, content), checksum

    def restore(self, position: tuple[int, ...], documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read the batch of a position again, up to it, and those of `documents`. As `Shard.restore`."""
        self.records, rows, checksum, start, self.checksum, layout = position
        if self.position[-1] != layout:
            raise InputError(f"{self.path}: {CHANGED}")
        self._rows, self._items = start, iter(())
        earlier = {row: found for row, found in documents.items() if row <= start}
        columns = self._columns(lambda group: group.first + group.rows > start or _holds(group, earlier))
        texts: dict[tuple[int, int], str] = {}
        try:
            for first, column in columns:
                texts |= self._texts_of(first, column, earlier)
                if first + len(column) > start:
                    self._items = self._items_of(chain([(first, column)], columns), start)
                    break
            while self._rows < rows and (item := next(self._items, None)) is not None:
                if documents.get(item[0]) == item[2]:
                    texts[self.index, item[0]] = self._record(*item[:2]).text(self._text_field)
        except InputError as fault:
            raise InputError(f"{fault}; {CHANGED}") from None
        if (self._rows, self.checksum, len(texts)) != (rows, checksum, len(documents)):
            raise InputError(f"{self.path}: {CHANGED}")
        return texts

    def read_again(self, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read the groups of `documents`. As `Shard.read_again`."""
        texts: dict[tuple[int, int], str] = {}
        try:
            for first, column in self._columns(lambda group: _holds(group, documents)):
                texts |= self._texts_of(first, column, documents)
                if len(texts) == len(documents):
                    return texts
        except InputError as fault:
            raise InputError(f"{fault}; {CHANGED}") from None
        raise InputError(f"{self.path}: {CHANGED}")

    def _columns(self, needed: Callable[[Group], bool]) -> Iterator[tuple[int, Any]]:
        """Yield the texts of the groups that are `needed`, in batches, each with the number of rows before it."""
        if self._file is None:
            assert self._fault is not None
            raise self._fault
        rows = 0
        with named_errors(self.path, lambda: f":{rows + 1}"):
            for group in self._file.groups([self._text_field]):
                rows = group.first
                for batch in group.batches() if needed(group) else ():
                    yield rows, text_column(batch)
                    rows += len(batch)

    def _items_of(self, columns: Iterable[tuple[int, Any]], start: int = 0) -> Iterator[tuple[int, bytes | None, int]]:
        """Yield (row, text, its checksum) of all rows after row number `start`, and keep the position up to date."""
        for first, column in columns:
            begin = max(first, start)
            self._mark = begin, self.checksum
            for value in column[begin - first :]:  # a list of all would leave holes between texts that are kept
                content = value.as_py()
                checksum = zlib.crc32(content or b"")
                self._rows += 1
                self.checksum = zlib.crc32(checksum.to_bytes(4, "big"), self.checksum)
                yield self._rows, content, checksum

    def _texts_of(self, first: int, column: Any, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Return the texts of those `documents` that are in a batch and have not changed."""
        texts = {}
        for row in documents.keys() & range(first + 1, first + len(column) + 1):
            content = column[row - first - 1].as_py()
            if documents[row] == zlib.crc32(content or b""):
                texts[self.index, row] = self._record(row, content).text(self._text_field)
        return texts

    def _record(self, row: int, content: bytes | None) -> Record:
        try:
            text = None if content is None else content.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}:{row}: {not_text(content or b'')}") from None
        return Record({self._text_field: text}, self.path, row)


def _holds(group: Group, documents: Iterable[int]) -> bool:
    """Return True if one of these rows is in a group."""
    return any(group.first < row <= group.first + group.rows for row in documents)
