"""Files that are not a record a line, as instruction sets often come: a CSV table, and one JSON array of all records.

Alpaca's `alpaca_data.json` is such an array, and a spreadsheet is saved as CSV. Both are read a record at a time, too:
the array's text is taken in pieces, and an object is handed out as soon as its last brace is there.

A line of JSON that is broken says nothing about the next line; a broken array has no next line. So a fault in its text
is the last that is read of it. A CSV row with a value too few or too many leaves the next row as it is.

    minift data peek pairs.csv

Read next: `data/stream.py`.
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
    """The rows of a CSV file under a row of names (RFC 4180), each with the line where it begins.

    Rows that are none come as an InputError in their places.

    Raises:
        InputError: with `name:line`, when the file cannot be read on: it has no usable names, is not UTF-8, or a
            quotation mark is never closed.
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
    """The objects of a JSON array, each with the line where it begins, in the memory of one of them.

    Raises:
        InputError: with `name:line`, where the text stops being that of an array of objects.
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
            text.peek()  # to where the next one begins
    if text.peek():
        raise InputError(f"{name}:{text.line}: not valid JSON: something follows the array")


class _Text:
    """The text of a file from a place in it on, of which no more is held than is needed.

    Attributes:
        line: where the place is; lines count from 1.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.line = 1
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at = "", 0  # the place in it
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space, where the place is moved to; "" at the end."""
        while True:
            space = _SPACE.match(self._held, self._at)
            assert space is not None  # it may be empty
            self._move(space.end())
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._read(BLOCK)

    def take(self, wanted: str) -> None:
        """Move behind `wanted`, which must come next."""
        found = self.peek()
        if found != wanted:
            raise self._fault(
                f"{wanted!r} expected, {found!r} found" if found else f"ends where {wanted!r} is expected"
            )
        self._move(self._at + 1)

    def take_object(self) -> dict[str, Any]:
        """The object that begins here. The place is moved behind it."""
        if (found := self.peek()) != "{":
            raise self._fault(f"an object expected, {found!r} found" if found else "ends where an object is expected")
        while True:
            try:
                values, end = _DECODER.raw_decode(self._held, self._at)
            except RecursionError:
                raise self._fault("nested too deeply") from None
            except ValueError as error:
                # Cut off, or wrong? More of the text will tell. Twice as much each time, or long objects would take
                # time in the square of their length.
                held = len(self._held) - self._at
                if self._ended:
                    raise self._fault(getattr(error, "msg", str(error))) from None
                if held > LONGEST:
                    raise self._fault(f"not an object within {LONGEST:,} characters") from None
                self._read(max(BLOCK, held))
            else:
                self._move(end)
                return values

    def _move(self, place: int) -> None:
        self.line += self._held.count("\n", self._at, place)
        self._at = place

    def _read(self, nbytes: int) -> None:
        block = self._file.read(nbytes)
        self._ended = not block
        try:
            self._held = self._held[self._at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError:
            raise InputError(f"{self._name}:{self.line}: not UTF-8 text") from None
        self._at = 0

    def _fault(self, reason: str) -> InputError:
        return InputError(f"{self._name}:{self.line}: not valid JSON: {reason}")
