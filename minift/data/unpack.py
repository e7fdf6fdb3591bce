"""Files, packed or not, as bytes."""

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
_ZSTD_BLOCK = 2**11  # bytes that are unpacked at once: few, because a hostile file may hold 16,000 times as many


@contextmanager
def _readable(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[BinaryIO]:
    """The unpacked bytes of a file. Raises InputError, with the place where we are, when they cannot be had."""
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
    """Standard input, unpacked if its first bytes are those of gzip or zstd: there is no name that says it."""
    if sys.stdin is None or sys.stdin.buffer.closed:
        raise InputError("-: standard input is closed, or was read already")
    head = sys.stdin.buffer.read(4)
    file = cast(BinaryIO, io.BufferedReader(_Rejoined(head, cast(io.BufferedReader, sys.stdin.buffer))))
    if head[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.open(file, "rb"))
    return _unpack_zstd(file, "standard input") if head == b"\x28\xb5\x2f\xfd" else file


class _Rejoined(io.RawIOBase):
    """The first bytes of a stream, which were looked at, and then the rest."""

    def __init__(self, head: bytes, rest: io.BufferedReader):
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head or self._rest.read1(len(buffer))  # what is there: a pipe may give more only much later
        count = min(len(buffer), len(found))
        buffer[:count], self._head = found[:count], found[count:]
        return count

    def close(self) -> None:
        self._rest.close()
        super().close()


def _unpack_zstd(file: BinaryIO, what: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Zstd(file, what), 2**16))


class _DamagedError(Exception):
    """Compressed data that cannot be unpacked."""


class _Zstd(io.RawIOBase):
    """The bytes of zstd frames. (The package's own reader takes a file that was cut off for one that ends there.)"""

    def __init__(self, file: BinaryIO, what: str):
        self._package = need("zstandard", "zstd", what)
        self._file = file
        self._frame: Any = None  # unpacks the frame in which we are, if we are in one
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
            self._frame = self._package.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._package.ZstdError as error:
            raise _DamagedError(error) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()
