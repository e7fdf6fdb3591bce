"""A file of pages that is being read, from any point on: of lines (`LineShard`) or of columns (`ColumnShard`).

Both give the same to `stream.py`: the next record, a position that can be saved, and the way back to it. What was read
is not saved, it is read again, and checksums tell whether it is still the same. Of lines, all up to the position are
read again: nothing else tells where line 1,000,000 begins. Of columns, the group of the position is found by the
numbers of rows, and only its rows are read again.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from minift.data.columns import ColumnFile, Group, column_texts, is_column_file, named_errors, open_columns
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
    """A file of columns. Its position: records found, rows read, their checksum, that at the beginning of the group
    in which the last of them lies, and the file's layout.

    Raises:
        InputError: when the file can be read, and has no column of texts under `text_field`.
    """

    def __init__(self, index: int, path: Path, text_field: str, encoding: str):
        self.index, self.path, self.records = index, path, 0
        self.checksum, self.failed = 0, False
        self._rows = 0  # read so far
        self._group_checksum = 0  # at the beginning of the group
        self._text_field = text_field
        self._file: ColumnFile | None = None
        self._fault: InputError | None = None
        try:
            self._file = open_columns(path, encoding)
        except UnreadableError as fault:
            self._fault = fault  # raised where the first record is asked for, as for a missing file of lines
        else:
            self._file.check_text(text_field)
        self._contents = self._read_from(0)

    @property
    def total(self) -> int | None:
        """Return the number of rows, where the file tells it."""
        return self._file.rows if self._file is not None else None

    @property
    def position(self) -> tuple[int, ...]:
        """Return it with the index of the file."""
        layout = self._file.layout if self._file is not None else 0
        return self.index, self.records, self._rows, self.checksum, self._group_checksum, layout

    def read(self) -> tuple[Record, int] | None:
        """Return the next record and the checksum of its bytes; None at the end. Raises InputError for a bad one."""
        try:
            item = next(self._contents, None)
        except InputError:
            self.failed = True
            raise
        if item is None:
            return None
        self.records += 1
        return self._record(*item), zlib.crc32(item[1] or b"")

    def restore(self, position: tuple[int, ...], documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read the group of a position again, up to it, and those of `documents`. As `Shard.restore`."""
        self.records, rows, checksum, self.checksum, layout = position
        if self.position[-1] != layout:
            raise InputError(f"{self.path}: {CHANGED}")
        self._contents = self._read_from(rows)
        texts: dict[tuple[int, int], str] = {}
        try:
            while self._rows < rows and (item := next(self._contents, None)) is not None:
                texts |= self._text_of(item, documents)
        except InputError as fault:
            raise InputError(f"{fault}; {CHANGED}") from None
        if (self._rows, self.checksum) != (rows, checksum):
            raise InputError(f"{self.path}: {CHANGED}")
        earlier = {row: found for row, found in documents.items() if (self.index, row) not in texts}
        return texts | (self.read_again(earlier) if earlier else {})

    def read_again(self, documents: dict[int, int]) -> dict[tuple[int, int], str]:
        """Read the groups of `documents`. As `Shard.read_again`."""
        texts: dict[tuple[int, int], str] = {}
        try:
            for group in self._groups():
                last = max((row for row in documents if group.first < row <= group.first + group.rows), default=0)
                for item in self._items_of(group) if last else ():
                    texts |= self._text_of(item, documents)
                    if item[0] == last:
                        break
        except InputError as fault:
            raise InputError(f"{fault}; {CHANGED}") from None
        if len(texts) < len(documents):
            raise InputError(f"{self.path}: {CHANGED}")
        return texts

    def _read_from(self, rows: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield (row, text) from the beginning of the group in which row number `rows` lies; 0 for the first."""
        for group in self._groups():
            if group.first + group.rows < rows:
                continue
            self._rows, self._group_checksum = group.first, self.checksum
            for item in self._items_of(group):
                self._rows = item[0]
                self.checksum = zlib.crc32(zlib.crc32(item[1] or b"").to_bytes(4, "big"), self.checksum)
                yield item

    def _groups(self) -> Iterator[Group]:
        if self._file is None:
            assert self._fault is not None
            raise self._fault
        with named_errors(self.path, lambda: f":{self._rows + 1}"):
            yield from self._file.groups([self._text_field])

    def _items_of(self, group: Group) -> Iterator[tuple[int, bytes | None]]:
        row = group.first
        with named_errors(self.path, lambda: f":{row + 1}"):
            for batch in group.batches():
                for content in column_texts(batch):
                    row += 1
                    yield row, content

    def _text_of(self, item: tuple[int, bytes | None], documents: dict[int, int]) -> dict[tuple[int, int], str]:
        row, content = item
        if documents.get(row) != zlib.crc32(content or b""):
            return {}
        return {(self.index, row): self._record(row, content).text(self._text_field)}

    def _record(self, row: int, content: bytes | None) -> Record:
        try:
            text = None if content is None else content.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}:{row}: {not_text(content or b'')}") from None
        return Record({self._text_field: text}, self.path, row)
