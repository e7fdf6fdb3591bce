"""A file → the bytes of its records: lines, and for a plain text parts of many lines.

No more than one of them is held in memory, and a line that is too long for that is no record.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minift.data.encodings import UTF8
from minift.data.unpack import open_unpacked
from minift.errors import InputError

MAX_LINE = 2**24  # bytes; a longer line is a fault, or one bad file could take all memory
TEXT_PART = 2**20  # bytes of a .txt after which the next line begins another document


def is_plain_text(file: Path) -> bool:
    """Return True for a file of text, False for one of records."""
    return file.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt")  # asked for each record: no Path is made


class Lines:
    """One file, read line by line.

    Attributes:
        number: lines read so far.
        checksum: CRC-32 of their bytes, by which a resumed run knows that it reads the same file.
        failed: True when the file could not be read to its end.
    """

    def __init__(self, path: Path, encoding: str = UTF8):
        self.path = path
        self.encoding = encoding
        self.number = 0
        self.checksum = 0
        self.failed = False

    def items(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield what becomes a record: (the line where it begins, its bytes), None for a line longer than MAX_LINE.

        Blank lines are left out.

        Raises:
            InputError: with `file:line`, when the file cannot be read any further.
        """
        try:
            with open_unpacked(self.path, lambda: f":{self.number + 1}", self.encoding) as file:
                yield from self.items_of(file)
        except InputError:
            self.failed = True
            raise

    def items_of(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """Yield what `items` does, of the file that is open already."""
        return self._parts(file) if is_plain_text(self.path) else self._lines(file)

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """Yield each line that is not blank."""
        for line in self._read(file):
            if line is None or not line.isspace():
                yield self.number, line

    def _parts(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """Yield a plain text in parts of TEXT_PART bytes and the rest of a line."""
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
        """Yield each line, and None for one longer than MAX_LINE. Keep `number` and `checksum` up to date."""
        while line := file.readline(MAX_LINE + 1):
            self.number += 1
            self.checksum = zlib.crc32(line, self.checksum)
            if len(line) <= MAX_LINE or line.endswith(b"\n"):
                yield line
                continue
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                self.checksum = zlib.crc32(line, self.checksum)
            yield None
