"""A file → its bytes, unpacked where its name ends in .gz or .zst. `-` is standard input.

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

from minift.errors import InputError, need

STDIN = Path("-")
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of such data
_ZSTD_BLOCK = 2**11  # bytes that are unpacked at once: few, because a hostile file may hold 16,000 times as many


@contextmanager
def open_unpacked(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[BinaryIO]:
    """Open a file for reading its unpacked bytes.

    Args:
        place: returns the place reached so far (":12"), for messages.

    Raises:
        InputError: when the file cannot be read, or its compressed data is damaged.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
        packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix, "compressed")
        raise InputError(f"{path}{place()}: damaged {packing} data: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    if path == STDIN:
        return _open_stdin()
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return _unpack_zstd(path.open("rb"), str(path)) if path.suffix == ".zst" else path.open("rb")


def _open_stdin() -> BinaryIO:
    """Open standard input, and unpack it if its first bytes are those of gzip or zstd: it has no name to tell."""
    if sys.stdin is None or sys.stdin.buffer.closed:
        raise InputError("-: standard input is closed, or was read already")
    head = sys.stdin.buffer.read(len(_ZSTD_MAGIC))
    file = cast(BinaryIO, io.BufferedReader(_Rejoined(head, cast(io.BufferedReader, sys.stdin.buffer))))
    if head.startswith(_GZIP_MAGIC):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return _unpack_zstd(file, "standard input") if head == _ZSTD_MAGIC else file


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
            raise _DamagedError(error) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()
