"""Bytes in another encoding → UTF-8, and the encoding that bytes look like.

All that comes after reads UTF-8. A file in another encoding is named so (`--encoding`) and recoded while it is read, in
blocks. A byte that the encoding does not have becomes one that UTF-8 does not have: its record is found to be faulty,
and the next record may be good.

The encoding is never guessed in silence: text in the wrong one can be read, as other words.

    minift data peek words.csv --encoding cp1252
"""

import codecs
import io
import re
from typing import Any, BinaryIO, cast

from minift.errors import InputError

UTF8 = "utf-8"
_BLOCK = 2**16  # bytes that are recoded at once
_SURROGATE = re.compile("[\ud800-\udfff]")  # what the decoders write for bytes that are not in an encoding
_IN_NO_UTF8 = "\udcff"  # it is encoded as the byte 0xFF, which no UTF-8 text holds
# What Western texts are written with in cp1252: ASCII, letters, the Euro sign, dashes and quotation marks. Not of them
# are the letters that a cut UTF-8 character shows.
_WESTERN = re.compile(
    "[\0-\x7f\xa0\xa1\xa3\xa7-\xab\xad\xae\xb0-\xbf\xc0\xc1\xc4-\xfe"
    "\u20ac\u201a\u201e\u2026\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u2122\u0152\u0153\u0160\u0161\u017d\u017e]*"
)


def check_encoding(name: str) -> str:
    """Return Python's name of an encoding of text.

    Raises:
        InputError: when there is none of that name.
    """
    try:
        found = codecs.lookup(name).name
        codecs.getincrementaldecoder(found)
        "a".encode(found)  # this refuses those that are not of text: hex, zip
    except (LookupError, ValueError):
        raise InputError(f"{name!r} is not an encoding that Python knows; try utf-8, utf-16 or cp1252") from None
    return UTF8 if found == "utf-8-sig" else found


def not_text(content: bytes, encoding: str = UTF8) -> str:
    """Return the reason why bytes are not text in `encoding`, and the encoding that they look like, if they do."""
    if encoding != UTF8:
        return f"not {encoding} text"
    has_utf8 = not content.decode(errors="ignore").isascii()
    if has_utf8 or re.search(rb"[\x80-\xff]{3}", content):  # a damaged text, or letters of another alphabet
        return "not UTF-8 text"
    try:
        western = _WESTERN.fullmatch(content.decode("cp1252"))
    except UnicodeDecodeError:
        western = None
    return _looks_like("cp1252") if western else "not UTF-8 text"


def other_unicode(head: bytes) -> str:
    """Return the reason why a file that begins with `head` (4 bytes) is not UTF-8 but UTF-16 or UTF-32, or ""."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return _looks_like("utf-32")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _looks_like("utf-16")
    zeros = [byte == 0 for byte in head]
    if zeros in ([False, True, False, True], [True, False, True, False]):
        return _looks_like("utf-16-be" if zeros[0] else "utf-16-le")
    return ""


def _looks_like(encoding: str) -> str:
    return f"not UTF-8 text; it looks like {encoding}: --encoding {encoding} would read it"


def recoded(file: BinaryIO, encoding: str) -> BinaryIO:
    """Return a file that gives the text of `file` in UTF-8. Reading raises UnicodeDecodeError where it cannot go on."""
    return cast(BinaryIO, io.BufferedReader(_Recoded(file, encoding), _BLOCK))


class _Recoded(io.RawIOBase):
    """The text of a file in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
        self._file: Any = file
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._file.read1(_BLOCK)
            self._ended = not block
            text = _SURROGATE.sub(_IN_NO_UTF8, self._decoder.decode(block, self._ended))
            self._ready = memoryview(text.encode(errors="surrogateescape"))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


# Text that was read in the wrong encoding -----------------------------------------------------------------------------

# The characters that bytes 0x80 to 0xFF become when UTF-8 is read as cp1252 (as Latin-1, where cp1252 has none).
_CHARACTER_OF_BYTE = [bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0x100)]
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in range(0x80, 0x100)}
_BYTE_OF_CHARACTER |= {character: 0x80 + place for place, character in enumerate(_CHARACTER_OF_BYTE)}
_NEXT = f"[\x80-\xbf{re.escape(''.join(_CHARACTER_OF_BYTE[:0x20]))}]"
_MOJIBAKE = re.compile(f"[\xc2-\xdf]{_NEXT}|[\xe0-\xef]{_NEXT}{{2}}|[\xf0-\xf4]{_NEXT}{{3}}")
_AFTER_WORDS = frozenset("\u201c\u201d\u2018\u2019\u201e\u201a\xbb\xab\u203a\u2039\u2026\u2013\u2014\xa0\xa1\xbf")
_AFTER_NAMES = frozenset("\xae\u2122\xa9\xb0\xb2\xb3\xb9\xa7\xaa\xba\u20ac\xb7")


def mojibake(text: str) -> str:
    """Return a stretch of a text that is UTF-8 once read as cp1252 ("cafÃ©"), or "".

    The characters of such a stretch become UTF-8 again when they are written in cp1252. Real text can hold two or
    three characters that happen to do so: a letter and what may follow a word („JÄ“, CAFÉ®). Those do not count.
    """
    if text.isascii():
        return ""
    rare = set[str]()
    for match in _MOJIBAKE.finditer(text):
        found = match.group()
        try:
            bytes(map(_BYTE_OF_CHARACTER.__getitem__, found)).decode()
        except UnicodeDecodeError:
            continue
        if all(character in _AFTER_WORDS for character in found[1:]) and not text[match.end() :][:1].isalpha():
            continue
        if len(found) > 2 or found[0] in "\xc2\xc3":
            return found
        if found[1] not in _AFTER_WORDS | _AFTER_NAMES:
            rare.add(found)
    return min(rare) if len(rare) > 1 else ""
