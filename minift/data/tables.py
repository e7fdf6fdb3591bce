"""Files that do not have a record on each line: a table (CSV, TSV), and one JSON array of all records.

Instruction sets often come so: Alpaca's `alpaca_data.json` is such an array, others are `{"data": [ … ]}`, and a
spreadsheet is saved as CSV. All are read one record at a time as well: the text of an array is read in blocks, and an
object is yielded as soon as its last brace has been read.

A broken line of JSON Lines says nothing about the next line. A broken array has no next line: a fault in its text ends
the reading. In a table, a row of one line that is faulty leaves the next row as it is; one of several lines does not,
because a quotation mark that is not closed takes the rows after it into its cell. Where the reading ends, the error is
an UnreadableError: it is not known what comes after.

    minift data peek pairs.csv
"""

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from minift.data.encodings import UTF8, not_text
from minift.data.unpack import UnreadableError, rejoined
from minift.errors import InputError

BLOCK = 2**16  # bytes of an array that are read at once
LONGEST = 2**24  # characters of one of its objects, and of a cell of a table
HEAD = 2**12  # bytes in which an array must begin
SEPARATORS = (",", ";", "\t")
_DATA = b'{"data":['
_IN_DATA = re.compile(rb'\{\s*"data"\s*:\s*\[\s*[{\]]')
_DECODER = json.JSONDecoder()
_SPACE = re.compile("[ \\t\\r\\n]*")
_QUOTED = re.compile('"[^"]*"')  # a doubled mark within one only makes two of it
_NAME = re.compile(r'\s*("?)\w[\w .:-]{0,63}\1\s*')  # of a column, where nothing else tells that it is one
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by `surrogateescape`


# Tables ---------------------------------------------------------------------------------------------------------------


def csv_rows(
    file: BinaryIO, name: str, separator: str | None = None, encoding: str = UTF8
) -> Iterator[tuple[int, dict[str, Any]] | InputError]:
    """Yield the rows of a table whose first row names the columns (RFC 4180), each with the line where it begins.

    A faulty row is yielded as an InputError in its place. The first column may have no name: pandas writes the number
    of each row there.

    Args:
        separator: what separates two cells; by default the one of SEPARATORS that the first row holds.
        encoding: the one in which the file is written, for messages. `file` itself is in UTF-8.

    Raises:
        UnreadableError: with `name:line`, when the file cannot be read any further: it has no usable names, or a
            quotation mark is not closed where a cell ends.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))  # the module has one limit for all its readers
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    lines = _Lines(text, name)
    head = lines.read_head()
    if not head:
        return
    rows = csv.reader(lines, delimiter=separator or _separator(head, f"{name}:{lines.start}"), strict=True)
    names: list[str] | None = None
    while True:
        lines.begin_row()
        where = f"{name}:{lines.start}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"{where}: not valid CSV: {error}"
            if names is None or lines.number != lines.start or str(error) == "unexpected end of data":
                hint = "a quotation mark is not closed where its cell ends; the rows after it cannot be read"
                raise UnreadableError(f"{fault}: {hint}") from None
            yield InputError(fault)
            continue
        if not row:
            continue
        undecoded = next((cell for cell in row if _UNDECODED.search(cell)), None)
        if undecoded is not None:
            fault = f"{where}: {not_text(_bytes(undecoded), encoding)}"
            if names is None:
                raise UnreadableError(fault)
            yield InputError(fault)
        elif names is None:
            names = _names(row, where)
        elif len(row) != len(names):
            yield InputError(f"{where}: {len(row)} values in a table of {len(names)} columns")
        else:
            yield lines.start, dict(zip(names, row, strict=True))


def find_table(file: BinaryIO) -> tuple[bytes, bool, BinaryIO]:
    """Return the first line of a file without a name, True if it looks like that of a table, and the file.

    That is a line of at least two names with one kind of separator between them. No more than it is read, and that of
    JSON is not read to its end. The file is returned from its beginning.
    """
    head, start = b"", b""
    while b"\n" not in start and len(head) < HEAD and (block := file.read1(HEAD)):  # type: ignore[attr-defined]
        head += block
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if start[:1] in (b"{", b"["):
            break
    line = start.split(b"\n", 1)[0].strip()
    text = line.decode(errors="replace")
    found = [separator for separator in SEPARATORS if separator in text]
    names = text.split(found[0]) if len(found) == 1 else []
    table = len(names) > 1 and all(_NAME.fullmatch(name) for name in names if name or name is not names[0])
    return line, table, rejoined(head, file)


class _Lines:
    """The lines of a table, for `csv.reader`, which takes as many as a row has.

    Attributes:
        number: lines read so far.
        start: the line where the row begins, counted from 1.
    """

    def __init__(self, text: io.TextIOWrapper, name: str):
        self.number, self.start = 0, 1
        self._text, self._name = text, name
        self._ahead = deque[str]()  # lines of the first row, which have been looked at
        self._length = 0  # characters of the row

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._text.readline(2 * LONGEST)
        if not line:
            raise StopIteration
        self.number += 1
        self._length += len(line)
        if self._length >= 2 * LONGEST:
            reason = f"a row of more than {2 * LONGEST:,} characters; is a quotation mark not closed?"
            raise UnreadableError(f"{self._name}:{self.start}: not valid CSV: {reason}")
        return line

    def begin_row(self) -> None:
        """Note that the next line begins a row."""
        self.start, self._length = self.number + 1, 0

    def read_head(self) -> str:
        """Return the text of the first row, to look at it; "" for a table without rows."""
        while (line := self._text.readline(LONGEST)).isspace():
            self.number += 1
        self.begin_row()
        self._ahead.extend([line] if line else [])
        quotes, length = line.count('"'), len(line)
        while quotes % 2 and length < LONGEST and (line := self._text.readline(LONGEST)):  # within a name
            self._ahead.append(line)
            quotes, length = quotes + line.count('"'), length + len(line)
        return "".join(self._ahead)


def _separator(head: str, where: str) -> str:
    """Return the separator of a table from its first row. Raises UnreadableError where there are two that it may be."""
    unquoted = _QUOTED.sub("", head)
    found = [separator for separator in SEPARATORS if separator in unquoted]
    if len(found) > 1:
        several = " and ".join(map(repr, found))
        raise UnreadableError(
            f"{where}: the first row holds {several}, so it is not sure what separates its names; put each name in "
            "quotation marks"
        )
    return found[0] if found else SEPARATORS[0]


def _names(row: list[str], where: str) -> list[str]:
    """Return the names of a table's columns. Raises UnreadableError when one of them is missing, or there twice."""
    names = [cell.strip() for cell in row]
    if "" in names[1:] or names == [""] or len(set(names)) < len(names):
        raise UnreadableError(f"{where}: the first row must name each column, once: {', '.join(names)}")
    return names


def _bytes(text: str) -> bytes:
    """Return the bytes from which a text was read."""
    return text.encode(errors="surrogateescape")


# Arrays ---------------------------------------------------------------------------------------------------------------


def find_array(file: BinaryIO, in_object: bool) -> tuple[str | None, BinaryIO]:
    """Return what comes before the records of an array, and the file, from its beginning.

    No more is read than is needed to know it: the file may be a pipe.

    Args:
        in_object: look for `{"data": [ … ]}`, too, and for an array of any values. Without it the file is one of JSON
            Lines by its name: it is an array only if that begins with an object, for a line may hold a list by mistake.

    Returns:
        "" for an array, "data" for one in an object; None for a file that begins as neither.
    """
    head, found, decided = b"", None, False
    while not decided and len(head) < HEAD and (block := file.read1(HEAD)):  # type: ignore[attr-defined]
        head += block
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"[") and (in_object or start[1:].lstrip().startswith(b"{")):
            found = ""
        elif in_object and _IN_DATA.match(start):
            found = "data"
        compact = b"".join(start.split())[: len(_DATA)]
        may_follow = _DATA.startswith(compact) if in_object else compact == b"["
        decided = bool(start) and (found is not None or not may_follow)
    return found, rejoined(head, file)


def array_items(
    file: BinaryIO, name: str, key: str = "", encoding: str = UTF8
) -> Iterator[tuple[int, dict[str, Any]] | InputError]:
    """Yield the objects of a JSON array, each with the line where it begins, in the memory of one of them.

    An object whose text is not in `encoding` is yielded as an InputError in its place.

    Args:
        key: that of the array, for one in an object that holds nothing else; "" for an array alone.
        encoding: the one in which the file is written, for messages. `file` itself is in UTF-8.

    Raises:
        UnreadableError: with `name:line`, where the text stops being an array of objects.
    """
    text = _Text(file, name, encoding)
    if key:
        for token in ("{", *f'"{key}"', ":"):
            text.take(token)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        while True:
            yield text.take_object()
            if text.peek() == "]":
                text.take("]")
                break
            text.take(",")
            text.peek()  # moves to where the next object begins
    if key and text.peek() == ",":
        remedy = f'either {{"{key}": [ … ]}} alone, or JSON Lines in a file called .jsonl'
        raise UnreadableError(f"{name}:{text.line}: another key follows the array {key!r}; give {remedy}")
    if key:
        text.take("}")
    if text.peek():
        what = "object" if key else "array"
        raise UnreadableError(f"{name}:{text.line}: not valid JSON: something follows the {what}")


class _Text:
    """A position in the text of a file, which is read in blocks; what lies before the position is dropped.

    Attributes:
        line: the line of the position, counted from 1.
    """

    def __init__(self, file: BinaryIO, name: str, encoding: str):
        self.line = 1
        self._file, self._name, self._encoding = file, name, encoding
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
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

    def take_object(self) -> tuple[int, dict[str, Any]] | InputError:
        """Move past the object that must come next; return the line where it begins, and the object, or its fault."""
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
                    raise self._fault(getattr(error, "msg", str(error)), getattr(error, "pos", self._at)) from None
                if length > LONGEST:
                    raise self._fault(f"not an object within {LONGEST:,} characters") from None
                self._read(max(BLOCK, length))
            else:
                line, source = self.line, self._block[self._at : end]
                self._move(end)
                if _UNDECODED.search(source):
                    return InputError(f"{self._name}:{line}: {not_text(_bytes(source), self._encoding)}")
                return line, values

    def _move(self, position: int) -> None:
        self.line += self._block.count("\n", self._at, position)
        self._at = position

    def _read(self, nbytes: int) -> None:
        block = self._file.read(nbytes)
        self._ended = not block
        self._block = self._block[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0

    def _fault(self, reason: str, at: int | None = None) -> UnreadableError:
        """Return the error of a fault in the text, by default at the position."""
        line = self.line + self._block.count("\n", self._at, at or self._at)
        return UnreadableError(f"{self._name}:{line}: not valid JSON: {reason}; the records after it cannot be read")
