"""Records → documents in a training run's order: shuffled, epoch after epoch, from any point on.

A corpus does not fit into memory, so it cannot be shuffled as a whole. Two things together come close to it, and need
little memory: several shards, drawn by lot, are read at the same time; and what is read goes into a buffer of some
thousand documents, from which each next one is drawn. (So a document comes earlier than it stands in its file by no
more than the buffer's length, and later by about as much on average.) Every epoch draws anew. The order depends on the
seed and the data, and on nothing else.

The place in all this can be saved and found again (`state_dict`): how far each open shard was read, where in the files
the documents of the buffer stand, the state of the lot. Documents themselves are not saved. They are read again, and
a checksum of all that was read before tells whether the files are still the same.

    minift pretrain --config stories15m --data 'c4/*.json.gz' --shuffle-buffer 10000 …

Read next: `prompts.py` for instruction pairs, `pack.py` for pages.
"""

import hashlib
import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minift.data.records import Lines, Record, Skipped, find_files, parse
from minift.data.unpack import STDIN
from minift.errors import InputError

OPEN_SHARDS = 8  # shards that are read at the same time when shuffling
BUFFER_CHARACTERS = 2**26  # of the shuffle buffer: it is full then, however few documents these are
_SAMPLE = 2**16  # bytes at both ends of a file that tell it from others


class DocumentStream:
    """The documents of a corpus, epoch after epoch, from any point on.

    Args:
        sources: files, globs or folders, see `find_files`.
        text_field: the key whose value is a document's text.
        epochs: passes over the corpus; None goes on for ever.
        seed: of the order.
        shuffle_buffer: documents to draw the next one from; 0 reads all in the order in which it stands.
        skipped: counts what cannot be used; by default the first such record is raised.

    Iterating yields texts. `state_dict()` taken between two documents, given to `load_state_dict()` of a stream over
    the same sources, continues with the next document.

    Attributes:
        epoch: passes completed.

    Raises:
        InputError: from iterating, when `skipped` bears no more, or for a corpus without documents.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        text_field: str = "text",
        epochs: int | None = None,
        seed: int = 0,
        shuffle_buffer: int = 0,
        skipped: Skipped | None = None,
    ):
        self.files = find_files(sources)
        if tables := [file for file in self.files if ".csv" in file.suffixes]:
            raise InputError(f"{tables[0]}: a table, of pairs perhaps; pages are JSON Lines or text")
        self.text_field = text_field
        self.epochs = epochs
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skipped = skipped or Skipped(strict=True)
        self.epoch = 0
        self._whole: dict[int, tuple[int, int]] = {}  # of each file read to its end: records, checksum of its lines
        self._restored: dict[str, Any] | None = None  # a state whose files are yet to be read
        self._begin()

    def _begin(self) -> None:
        """Be at the beginning of an epoch."""
        self._random = random.Random(f"{self.seed}, epoch {self.epoch}")
        self._order = list(range(len(self.files)))
        if self.shuffle_buffer:
            self._random.shuffle(self._order)
        self._opened = 0  # shards of the order that have been opened
        self._shards: list[_Shard] = []
        self._places: list[tuple[int, int, int]] = []  # of the buffer's documents: file, line in it, checksum
        self._texts: list[str] = []  # … and they themselves
        self._characters = 0
        self._given = 0  # documents of this epoch

    def __iter__(self) -> Iterator[str]:
        if self._restored is not None:
            self._reopen(self._restored)
        while self.epochs is None or self.epoch < self.epochs:
            while (text := self._draw()) is not None:
                self._given += 1
                yield text
            self.skipped.check()
            if not self._given:
                raise InputError(f"{self.files[0]}: the corpus holds no documents")
            if STDIN in self.files and self.epochs != self.epoch + 1:
                raise InputError(f"standard input ended after {self._given:,} documents, and cannot be read again")
            self.epoch += 1
            self._begin()

    def _draw(self) -> str | None:
        """The next document; None at the end of an epoch, when the buffer is empty."""
        size = max(1, self.shuffle_buffer)
        while len(self._texts) < size and self._characters < BUFFER_CHARACTERS and self._read():
            pass
        if not self._texts:
            return None
        chosen = self._random.randrange(len(self._texts)) if len(self._texts) > 1 else 0
        text = self._texts[chosen]
        self._texts[chosen], self._places[chosen] = self._texts[-1], self._places[-1]
        self._texts.pop(), self._places.pop()
        self._characters -= len(text)
        return text

    def _read(self) -> bool:
        """Put one more document into the buffer. False when the epoch's last one is in it."""
        while True:
            while self._opened < len(self.files) and len(self._shards) < (OPEN_SHARDS if self.shuffle_buffer else 1):
                index = self._order[self._opened]
                self._check_same(index)
                self._shards.append(_Shard(index, self.files[index]))
                self._opened += 1
            if not self._shards:
                return False
            shard = self._shards[self._random.randrange(len(self._shards)) if len(self._shards) > 1 else 0]
            try:
                item = shard.read()
                if item is not None:
                    record, checksum = item
                    text = record.text(self.text_field)
            except InputError as fault:
                self.skipped.records += 1
                # Of a file that can be read no further, all is lost that was in it in an earlier epoch: the record of
                # this fault, and the others.
                others = self._whole.get(shard.index, (0, 0))[0] - shard.records - 1
                lost = max(0, others) if shard.lines.failed else 0
                if shard.lines.failed:
                    self._shards.remove(shard)
                self.skipped.add(fault, lost)
                continue
            if item is None:
                self._shards.remove(shard)
                self._check_same(shard.index)
                read = shard.records, shard.lines.checksum
                if self._whole.setdefault(shard.index, read) != read:
                    raise InputError(f"{self.files[shard.index]}: {_REPLACED}")
                continue
            self.skipped.records += 1
            self._places.append((shard.index, record.line, checksum))
            self._texts.append(text)
            self._characters += len(text)
            return True

    def _check_same(self, index: int) -> None:
        """Raise InputError when a file is another one than when the run began. (A lost one is a fault of the data.)"""
        file = self.files[index]
        if file.is_file() and fingerprint(file) != self._fingerprints[index]:
            raise InputError(f"{file}: {_REPLACED}")

    # What a checkpoint holds --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in which files, and by which settings it came there. Plain values."""
        if self._restored is not None:
            return self._restored
        skipped = self.skipped
        return {
            "settings": {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer, "text_field": self.text_field},
            "files": self._fingerprints,
            "epoch": self.epoch,
            "given": self._given,
            "opened": self._opened,
            "shards": [
                (shard.index, shard.records, shard.lines.number, shard.lines.checksum) for shard in self._shards
            ],
            "buffer": list(self._places),
            "random": self._random.getstate(),
            "whole": dict(self._whole),
            "skipped": {"records": skipped.records, "skipped": skipped.skipped, "first": list(skipped.first)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the document that was last given out when `state` was taken.

        The files are read when the next document is asked for.

        Raises:
            InputError: when the corpus has other files now, or the order is another; it says which.
        """
        check_settings(state["settings"], self.state_dict()["settings"])
        if state["files"] != self._fingerprints:
            raise InputError(_difference(state["files"], self._fingerprints))
        self._restored = state
        self.epoch = state["epoch"]

    def _reopen(self, state: dict[str, Any]) -> None:
        """Read the open shards up to where they were, and the buffer's documents wherever they stand."""
        self._begin()  # draws the epoch's order
        self._restored = None
        self._given, self._opened = state["given"], state["opened"]
        self._whole = {int(index): (records, checksum) for index, (records, checksum) in state["whole"].items()}
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        vars(self.skipped).update(state["skipped"] | {"first": list(state["skipped"]["first"])})
        if self.skipped.strict and self.skipped.first:  # it ended the run, or would have
            raise InputError(self.skipped.first[0])
        self._places = [(file, line, checksum) for file, line, checksum in state["buffer"]]
        wanted: dict[int, dict[int, int]] = defaultdict(dict)
        for file, line, checksum in self._places:
            wanted[file][line] = checksum
        texts: dict[tuple[int, int], str] = {}
        for index, records, number, checksum in state["shards"]:
            shard = _Shard(index, self.files[index])
            texts |= shard.skip(number, wanted.pop(index, {}), self.text_field)
            if shard.lines.checksum != checksum:
                raise InputError(f"{shard.lines.path}: {_CHANGED}")
            shard.records = records
            self._shards.append(shard)
        for index, lines in wanted.items():
            texts |= _Shard(index, self.files[index]).skip(max(lines), lines, self.text_field)
        self._texts = [texts[file, line] for file, line, _ in self._places]
        self._characters = sum(map(len, self._texts))

    @cached_property
    def _fingerprints(self) -> list[dict[str, Any]]:
        return [fingerprint(file) for file in self.files]


class _Shard:
    """A file that is being read. `records` counts what was found in it, usable or not."""

    def __init__(self, index: int, path: Path):
        self.index = index
        self.records = 0
        self.lines = Lines(path)
        self._items = self.lines.items()

    def read(self) -> tuple[Record, int] | None:
        """The next record, and the checksum of its bytes; None at the end. Raises InputError for one that is none."""
        item = next(self._items, None)
        if item is None:
            return None
        self.records += 1
        return parse(item[1], self.lines.path, item[0]), zlib.crc32(item[1] or b"")

    @property
    def place(self) -> tuple[int, int, int, int]:
        """(index of the file, records found in it, lines read, their checksum)."""
        return self.index, self.records, self.lines.number, self.lines.checksum

    def skip(self, number: int, wanted: dict[int, int], text_field: str) -> dict[tuple[int, int], str]:
        """Read the first `number` lines again; return the documents that begin at the lines `wanted`, by place.

        Args:
            wanted: the checksum of each.

        Raises:
            InputError: when they are not there any more.
        """
        texts = {}
        while self.lines.number < number:
            try:
                item = next(self._items, None)
                if item is None:
                    break
                if wanted.get(item[0]) == zlib.crc32(item[1] or b""):
                    texts[self.index, item[0]] = parse(item[1], self.lines.path, item[0]).text(text_field)
            except InputError as fault:
                raise InputError(f"{fault}; {_CHANGED}") from None
        if len(texts) < len(wanted):
            raise InputError(f"{self.lines.path}: {_CHANGED}")
        return texts


_CHANGED = "the data has changed since the run was saved"
_REPLACED = "the file has been changed during the run, whose epochs would not be the same"


def fingerprint(file: Path) -> dict[str, Any]:
    """What tells a file from others without reading all of it: name, bytes, and a checksum of both of its ends.

    (The end of a gzip file is a checksum of the whole.) Of a pipe there is only the name.
    """
    if not file.is_file():
        return {"name": file.name}
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            ends = opened.read(_SAMPLE)
            opened.seek(max(0, size - _SAMPLE))
            ends += opened.read(_SAMPLE)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    return {"name": file.name, "bytes": size, "ends": hashlib.sha256(ends).hexdigest()[:16]}


def check_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError, by name, when a run was saved with other settings than it has now."""
    for name, value in now.items():
        if saved[name] != value:
            raise InputError(f"the run was saved with {name} {saved[name]}, and now it is {value}")


def _difference(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Which file is not what it was."""
    before, after = [file["name"] for file in saved], [file["name"] for file in now]
    if before != after:
        other = next((name for name in before if name not in after), None) or next(
            (name for name in after if name not in before), "their order"
        )
        return f"the run was saved with {len(before)} data files, now there are {len(after)}, or others: {other}"
    changed = next(was["name"] for was, is_now in zip(saved, now, strict=True) if was != is_now)
    return f"{changed}: {_CHANGED}"
