"""Files that do not have a record on each line: a CSV table, and one JSON array of all records.

Instruction sets often come so: Alpaca's `alpaca_data.json` is such an array, and a spreadsheet is saved as CSV. Both
are read one record at a time as well: the text of an array is read in blocks, and an object is yielded as soon as its
last brace has been read.

A broken line of JSON Lines says nothing about the next line. A broken array has no next line: a fault in its text ends
the reading. A CSV row with a value too few or too many leaves the next row as it is.

    minift data peek pairs.csv
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from minift.errors import InputError

BLOCK = 2**16  # bytes of an array that are read at once
LONGEST = 2**24  # characters of one of its objects
_DECODER = json.JSONDecoder()
_SPACE = re.compile("[ \\t\\r\\n]*")


def csv_rows(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]] | InputError]:
    """Yield the rows of a CSV file whose first row names the columns (RFC 4180), each with the line where it begins.

    A faulty row is yielded as an InputError in its place.

    Raises:
        InputError: with `name:line`, when the file cannot be read any further: it has no usable names, is not UTF-8, or
            a quotation mark is never closed.
    """
    rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    names: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise InputError(f"{name}:{line}: not UTF-8 text") from None
        except csv.Error as error:
            raise InputError(f"{name}:{line}: not valid CSV: {error}") from None
        if not row:
            continue
        if names is None:
            names = [cell.strip() for cell in row]
            if "" in names or len(set(names)) < len(names):
                raise InputError(f"{name}:{line}: the first row must name each column, once: {', '.join(names)}")
        elif len(row) != len(names):
            yield InputError(f"{name}:{line}: {len(row)} values in a table of {len(names)} columns")
        else:
            yield line, dict(zip(names, row, strict=True))


def array_items(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON array, each with the line where it begins, in the memory of one of them.

    Raises:
        InputError: with `name:line`, where the text stops being an array of objects.
    """
    text = _Text(file, name)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        while True:
            yield text.line, text.take_object()
            if text.peek() == "]":
                text.take("]")
                break
            text.take(",")
            text.peek()  # moves to where the next object begins
    if text.peek():
        raise InputError(f"{name}:{text.line}: not valid JSON: something follows the array")


class _Text:
    """A position in the text of a file, which is read in blocks; what lies before the position is dropped.

    Attributes:
        line: the line of the position, counted from 1.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.line = 1
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._block, self._at = "", 0  # text that has been read, and the position in it
        self._ended = False

    def peek(self) -> str:
        """Move to the next character that is not white space, and return it; "" at the end."""
        while True:
            space = _SPACE.match(self._block, self._at)
            assert space is not None  # it may be empty
            self._move(space.end())
            if self._at < len(self._block) or self._ended:
                return self._block[self._at : self._at + 1]
            self._read(BLOCK)

    def take(self, character: str) -> None:
        """Move past `character`, which must come next."""
        found = self.peek()
        if found != character:
            raise self._fault(
                f"{character!r} expected, {found!r} found" if found else f"ends where {character!r} is expected"
            )
        self._move(self._at + 1)

    def take_object(self) -> dict[str, Any]:
        """Move past the object that must come next, and return it."""
        if (found := self.peek()) != "{":
            raise self._fault(f"an object expected, {found!r} found" if found else "ends where an object is expected")
        while True:
            try:
                values, end = _DECODER.raw_decode(self._block, self._at)
            except RecursionError:
                raise self._fault("nested too deeply") from None
            except ValueError as error:
                # Either the object is wrong, or its end has not been read yet: more text will tell. Twice as much is
                # read each time; with blocks of one size, a long object would take time in the square of its length.
                length = len(self._block) - self._at
                if self._ended:
                    raise self._fault(getattr(error, "msg", str(error))) from None
                if length > LONGEST:
                    raise self._fault(f"not an object within {LONGEST:,} characters") from None
                self._read(max(BLOCK, length))
            else:
                self._move(end)
                return values

    def _move(self, position: int) -> None:
        self.line += self._block.count("\n", self._at, position)
        self._at = position

    def _read(self, nbytes: int) -> None:
        block = self._file.read(nbytes)
        self._ended = not block
        try:
            self._block = self._block[self._at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError:
            raise InputError(f"{self._name}:{self.line}: not UTF-8 text") from None
        self._at = 0

    def _fault(self, reason: str) -> InputError:
        return InputError(f"{self._name}:{self.line}: not valid JSON: {reason}")
