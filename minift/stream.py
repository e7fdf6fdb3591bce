"""Files → records and documents, one at a time, so that a corpus larger than memory can be read.

A web corpus such as C4 comes as shards of JSON Lines, gzipped: one object a line, with a `text`, a `timestamp` and a
`url`. Nothing here ever holds more than one line. `DocumentStream` adds what a training run needs on top: it goes
round the shards epoch after epoch and can say where it is (`state_dict`) and go back there (`load_state_dict`).

    minift data peek 'data/pages/*.json.gz' -n 3

Read next: `prompts.py` for instruction pairs, `pack.py` for pages.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

from minift.errors import InputError

# JSON can write half of a UTF-16 pair ("\\ud83d" alone); no text encoding can, and no tokenizer can read it.
_HALF_PAIR = re.compile("[\ud800-\udfff]")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Record:
    """One JSON object of a file, and where it stood; lines count from 1."""

    values: dict[str, Any]
    file: Path
    line: int

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


def find_files(sources: Iterable[str | Path]) -> list[Path]:
    """The data files that `sources` name: files, globs, and folders (everything in them with a known suffix).

    The order is that of `sources`, and sorted by name within a glob or a folder, so it does not depend on the disk.

    Raises:
        InputError: for a source that names nothing, or a file with an unknown suffix.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES))
        else:
            found = [path] if path.exists() else sorted(Path(name) for name in glob(str(source)))
        if not found:
            raise InputError(f"{source}: no such file, or no data file in it ({', '.join(SUFFIXES)})")
        files += found
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file}: unknown kind of data file; known: {', '.join(SUFFIXES)}")
    return files


def read_records(path: str | Path, skip: int = 0) -> Iterator[Record]:
    """The JSON objects of one file, plain or gzipped, in order, in the memory of one line. Blank lines are passed over.

    Args:
        skip: lines at the start that are read but not parsed; a resumed run has seen them.

    Raises:
        InputError: with `file:line` for a line that is not a JSON object or not UTF-8; with the file when it
            cannot be read or its gzip data is damaged.
    """
    path = Path(path)
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if number > skip and line.strip():
                    yield Record(_parse(line, f"{path}:{number}"), path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: damaged gzip data: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds {type(values).__name__}, not a JSON object")
    if b"\\u" in line and _HALF_PAIR.search(json.dumps(values, ensure_ascii=False)):
        raise InputError(f"{where}: not Unicode text: holds half of a surrogate pair")
    return values


class DocumentStream:
    """The documents of a corpus, epoch after epoch, from any point on.

    Args:
        sources: files, globs or folders, see `find_files`.
        text_field: the key whose value is a document's text.
        epochs: passes over the corpus; None goes on for ever.

    Iterating yields texts. `state_dict()` taken between two documents, given to `load_state_dict()` of a stream over
    the same sources, continues with the next document.

    Raises:
        InputError: from iterating, for a record without text under `text_field` or a corpus without documents.
    """

    def __init__(self, sources: Sequence[str | Path], text_field: str = "text", epochs: int | None = None):
        self.files = find_files(sources)
        self.text_field = text_field
        self.epochs = epochs
        self.epoch = 0  # passes completed
        self._file = 0  # index of the file being read
        self._line = 0  # lines of it that have been given out

    def __iter__(self) -> Iterator[str]:
        while self.epochs is None or self.epoch < self.epochs:
            nothing = (self._file, self._line) == (0, 0)
            while self._file < len(self.files):
                for record in read_records(self.files[self._file], skip=self._line):
                    self._line = record.line
                    nothing = False
                    yield self._text(record)
                self._file, self._line = self._file + 1, 0
            if nothing:
                raise InputError(f"{self.files[0]}: the corpus holds no documents")
            self.epoch, self._file = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and in which files."""
        names = [file.name for file in self.files]
        return {"epoch": self.epoch, "file": self._file, "line": self._line, "files": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the document that was last given out when `state` was taken.

        Raises:
            InputError: when the corpus has other files now.
        """
        names = [file.name for file in self.files]
        if state["files"] != names:
            raise InputError(
                f"the run was saved with {len(state['files'])} data files, now there are {len(names)}, or others"
            )
        self.epoch, self._file, self._line = state["epoch"], state["file"], state["line"]

    def _text(self, record: Record) -> str:
        text = record.values.get(self.text_field)
        if not isinstance(text, str):
            keys = ", ".join(record.values) or "none"
            raise InputError(f"{record.where}: no text under {self.text_field!r}; its keys: {keys}")
        return text
