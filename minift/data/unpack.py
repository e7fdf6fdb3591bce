"""A file → its bytes, unpacked where its name ends in .gz or .zst, in UTF-8. `-` is standard input.

A pipe that has a name (a FIFO, `<(…)` of a shell) is read as standard input is: once, and its first bytes tell whether
it is packed.

Nothing is unpacked further than it is read, so a small file that unpacks to a very large one takes no memory. Damaged
data and data that ends too early raise an error: a corpus is never cut short in silence.

Source: RFC 1952 (gzip), RFC 8878 (zstd).
"""

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from minift.data.encodings import UTF8, other_unicode, recoded
from minift.errors import InputError, need

STDIN = Path("-")
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of such data
_ZSTD_BLOCK = 2**11  # bytes that are unpacked at once: few, because a hostile file may hold 16,000 times as many


class UnreadableError(InputError):
    """A file that cannot be read to its end. How many records come after the place is not known."""


def is_pipe(path: Path) -> bool:
    """Return True for what can be read only once: standard input, and a pipe that has a name."""
    return path == STDIN or (path.exists() and not path.is_file() and not path.is_dir())


def pipe_in_words(pipe: Path) -> str:
    """Return the beginning of a message about what can be read only once: where it is, and what."""
    return f"{pipe}: {'standard input' if pipe == STDIN else 'a pipe'}"


@contextmanager
def open_unpacked(path: Path, place: Callable[[], str] = lambda: "", encoding: str = UTF8) -> Iterator[BinaryIO]:
    """Open a file for reading its unpacked bytes in UTF-8.

    Args:
        place: returns the place reached so far (":12"), for messages.
        encoding: that of the file.

    Raises:
        UnreadableError: when the file cannot be read, its compressed data is damaged, or it is not in `encoding`.
    """
    try:
        with _open(path) as file:
            if encoding == UTF8:
                _check_unicode(file, path)
            yield file if encoding == UTF8 else recoded(file, encoding)
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
        packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix, "compressed")
        raise UnreadableError(f"{path}{place()}: damaged {packing} data: {error}") from None
    except _WindowError:
        remedy = "zstd -d --long=31 -c OLD | zstd -o NEW"
        why = "packed with a window of more than 128 MiB (zstd --long=28 or more), which would take as much memory"
        raise UnreadableError(f"{path}{place()}: {why}; pack it again without: {remedy}") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path}{place()}: not {encoding} text: {error.reason}") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_unicode(file: BinaryIO, path: Path) -> None:
    """Raise UnreadableError for a file in UTF-16 or UTF-32: no line of it could be read."""
    head = cast(io.BufferedReader, file).peek(4)[:4]
    if reason := other_unicode(head):
        raise UnreadableError(f"{path}:1: {reason}")


def _open(path: Path) -> BinaryIO:
    if path == STDIN:
        return _open_stdin()
    if path.suffix not in (".gz", ".zst") and is_pipe(path):
        return _unpack_pipe(path.open("rb"), str(path))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return _unpack_zstd(path.open("rb"), str(path)) if path.suffix == ".zst" else path.open("rb")


def _open_stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.buffer.closed:
        raise UnreadableError("-: standard input is closed, or was read already")
    return _unpack_pipe(sys.stdin.buffer, "standard input")


def _unpack_pipe(pipe: BinaryIO, name: str) -> BinaryIO:
    """Unpack a pipe if its first bytes are those of gzip or zstd: it has no name to tell."""
    head = pipe.read(len(_ZSTD_MAGIC))
    file = rejoined(head, pipe)
    if head.startswith(_GZIP_MAGIC):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return _unpack_zstd(file, name) if head == _ZSTD_MAGIC else file


def rejoined(head: bytes, rest: BinaryIO) -> BinaryIO:
    """Return a file that gives `head`, which has been read from `rest`, and then what is left of it."""
    return cast(BinaryIO, io.BufferedReader(_Rejoined(head, cast(io.BufferedReader, rest))))


class _Rejoined(io.RawIOBase):
    """The first bytes of a stream, which were read to look at them, and then the rest."""

    def __init__(self, head: bytes, rest: io.BufferedReader):
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head or self._rest.read1(len(buffer))  # no more than is there: a pipe may be slow to give more
        count = min(len(buffer), len(found))
        buffer[:count], self._head = found[:count], found[count:]
        return count

    def close(self) -> None:
        self._rest.close()
        super().close()


def _unpack_zstd(file: BinaryIO, name: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Zstd(file, name), 2**16))


class _WindowError(Exception):
    """zstd data that need more memory than the decompressor is willing to take."""


class _DamagedError(Exception):
    """Compressed data that cannot be unpacked."""


class _Zstd(io.RawIOBase):
    """The unpacked bytes of zstd frames.

    (The zstandard package has a reader, too, but it takes a file that was cut off for one that ends there.)
    """

    def __init__(self, file: BinaryIO, name: str):
        self._zstandard = need("zstandard", "zstd", name)
        self._file = file
        self._frame: Any = None  # unpacks the current frame; None between two frames
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_ZSTD_BLOCK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its end-of-frame mark")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise _WindowError from None
            raise _DamagedError(error) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()
