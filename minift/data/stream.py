"""Records → documents in the order of a training run: shuffled, epoch after epoch, from any point on.

A corpus does not fit into memory, so it cannot be shuffled at once. Two measures together come close to it and need
little memory: several shards, drawn at random, are read at the same time; and what is read goes into a buffer of some
thousand documents, from which the next one is drawn. (So a document comes earlier than in its file by no more than the
buffer's length, and later by about as much on average.) Every epoch draws anew. The order depends on the seed and the
data, and on nothing else.

The position in this order can be saved and found again (`state_dict`): how far each open shard was read, in which lines
of the files the documents of the buffer begin, and the state of the random generator. Documents themselves are not
saved. They are read again, and checksums tell whether the files are still the same (`shards.py`).

    minift pretrain --config stories15m --data "c4/*.json.gz" --shuffle-buffer 10000 …
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minift.data.encodings import UTF8
from minift.data.records import Skipped, find_files, is_table
from minift.data.shards import CHANGED, Shard, open_shard
from minift.data.unpack import STDIN, is_pipe
from minift.errors import InputError, one_line

OPEN_SHARDS = 8  # shards that are read at the same time when shuffling
BUFFER_CHARACTERS = 2**26  # at which the shuffle buffer is full, even if it holds few documents
_SAMPLE = 2**16  # bytes at each end of a file by which it is recognised

_REPLACED = "the file has been changed during the run; its epochs would not be the same"


class DocumentStream:
    """The documents of a corpus, epoch after epoch, from any point on.

    Args:
        sources: files, globs or folders, see `find_files`.
        text_field: the key whose value is a document's text.
        epochs: passes over the corpus; None goes on without end.
        seed: of the order.
        shuffle_buffer: documents from which the next one is drawn; 0 keeps the order of the files.
        skipped: counts what cannot be used; by default the first such record is raised.
        encoding: that of the files.
        limit: documents of an epoch: the first ones of the files, in their order. None takes all, and `shuffle_buffer`
            then also draws the order of the files.

    Iterating yields texts. `state_dict()` taken between two documents, given to `load_state_dict()` of a stream over
    the same sources, continues with the next document.

    Attributes:
        epoch: passes completed.

    Raises:
        InputError: for sources that are not pages; from iterating, for an unusable record that `skipped` does not
            tolerate, or a corpus without documents.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        text_field: str = "text",
        epochs: int | None = None,
        seed: int = 0,
        shuffle_buffer: int = 0,
        skipped: Skipped | None = None,
        encoding: str = UTF8,
        limit: int | None = None,
    ):
        self.files = find_files(sources, say=None)
        if tables := [file for file in self.files if is_table(file)]:
            raise InputError(f"{tables[0]}: a table, of pairs perhaps; pages are JSON Lines, text, Parquet or Arrow")
        self.text_field = text_field
        self.encoding = encoding
        self.epochs = epochs
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skipped = skipped or Skipped(strict=True)
        self.limit = limit
        self.epoch = 0
        self._complete: dict[int, tuple[int, int]] = {}  # of each file read to its end: records, their checksum
        self._loaded_state: dict[str, Any] | None = None  # a state whose files have not been read yet
        self._start_epoch()

    @cached_property
    def pipe(self) -> Path | None:
        """The first of the files that can be read only once: standard input, or a pipe with a name."""
        return next(filter(is_pipe, self.files), None)

    @property
    def _draws_shards(self) -> bool:
        """Return whether several shards are read at the same time, in an order that is drawn."""
        return self.shuffle_buffer > 0 and self.limit is None

    def _start_epoch(self) -> None:
        self._random = random.Random(f"{self.seed}, epoch {self.epoch}")
        self._order = list(range(len(self.files)))
        if self._draws_shards:
            self._random.shuffle(self._order)
        self._opened = 0  # shards of the order that have been opened
        self._shards: list[Shard] = []  # those that are being read
        self._texts: list[str] = []  # the buffer …
        self._places: list[tuple[int, int, int]] = []  # … and where its documents begin: file, line, checksum
        self._characters = 0  # in the buffer
        self._yielded = 0  # documents of this epoch

    def __iter__(self) -> Iterator[str]:
        if self._loaded_state is not None:
            self._restore(self._loaded_state)
        while self.epochs is None or self.epoch < self.epochs:
            while (text := self._draw()) is not None:
                self._yielded += 1
                yield text
            self.skipped.check()
            if not self._yielded:
                raise InputError(f"{self.files[0]}: the corpus holds no documents")
            if (pipe := self.pipe) is not None and self.epochs != self.epoch + 1:
                name = "standard input" if pipe == STDIN else str(pipe)
                how = "was read to --limit" if self._yielded == self.limit else "ended"
                raise InputError(f"{name} {how} after {self._yielded:,} documents, and cannot be read again")
            self.epoch += 1
            self._start_epoch()

    def _draw(self) -> str | None:
        """Fill the buffer and take a document out of it. Return None at the end of an epoch, when it stays empty."""
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
        """Read one more document into the buffer. Return False when the epoch has no more."""
        while self.limit is None or self._yielded + len(self._texts) < self.limit:
            self._open_shards()
            if not self._shards:
                return False
            shard = self._shards[self._random.randrange(len(self._shards)) if len(self._shards) > 1 else 0]
            try:
                item = shard.read()
                if item is not None:
                    record, checksum = item
                    text = record.text(self.text_field)
            except InputError as fault:
                self._skip(fault, shard)
                continue
            if item is None:
                self._close(shard)
                continue
            self.skipped.records += 1
            self._places.append((shard.index, record.line, checksum))
            self._texts.append(text)
            self._characters += len(text)
            return True
        return False

    def _open_shards(self) -> None:
        while self._opened < len(self.files) and len(self._shards) < (OPEN_SHARDS if self._draws_shards else 1):
            index = self._order[self._opened]
            self._check_same(index)
            self._shards.append(self._open(index))
            self._opened += 1

    def _open(self, index: int) -> Shard:
        return open_shard(index, self.files[index], self.text_field, self.encoding)

    def _skip(self, fault: InputError, shard: Shard) -> None:
        """Count an unusable record. Raises InputError when `skipped` does not tolerate it."""
        self.skipped.records += 1
        lost = 0
        if shard.failed:  # the file cannot be read any further
            self._shards.remove(shard)
            # It may tell how many records it has, or an earlier epoch has counted them: all after this one are lost.
            in_file = shard.total or self._complete.get(shard.index, (0, 0))[0]
            lost = max(0, in_file - shard.records - 1)
            if not in_file:  # how many are lost is not known, and that is said
                if (name := str(shard.path)) not in self.skipped.unread:
                    self.skipped.unread.append(name)
                fault = InputError(f"{one_line(fault)}; the rest of the file is not read, and how much it is not known")
        self.skipped.add(fault, lost)

    def _close(self, shard: Shard) -> None:
        """Close a shard at its end. Raises InputError when it was not the same in an earlier epoch."""
        self._shards.remove(shard)
        self._check_same(shard.index)
        found = shard.records, shard.checksum
        if self._complete.setdefault(shard.index, found) != found:
            raise InputError(f"{self.files[shard.index]}: {_REPLACED}")

    def _check_same(self, index: int) -> None:
        """Raise InputError when a file is not the one with which the run began. (A missing one is a fault to count.)"""
        file = self.files[index]
        if file.is_file() and fingerprint(file) != self._fingerprints[index]:
            raise InputError(f"{file}: {_REPLACED}")

    # What a checkpoint holds --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, with the files and settings that it depends on. Plain values."""
        if self._loaded_state is not None:
            return self._loaded_state
        skipped = self.skipped
        names = ("seed", "shuffle_buffer", "text_field", "encoding", "limit")
        return {
            "settings": {name: getattr(self, name) for name in names},
            "files": self._fingerprints,
            "epoch": self.epoch,
            "given": self._yielded,
            "opened": self._opened,
            "shards": [shard.position for shard in self._shards],
            "buffer": list(self._places),
            "random": self._random.getstate(),
            "whole": dict(self._complete),
            "skipped": {
                "records": skipped.records,
                "skipped": skipped.skipped,
                "first": list(skipped.first),
                "unread": list(skipped.unread),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the document after the last one that was yielded when `state` was taken.

        The files are read when the next document is asked for.

        Raises:
            InputError: when the files or a setting have changed; it names what differs.
        """
        saved = {"encoding": UTF8, "limit": None, **state["settings"]}  # all that there was in earlier versions
        check_settings(saved, self.state_dict()["settings"])
        if state["files"] != self._fingerprints:
            raise InputError(_difference(state["files"], self._fingerprints))
        self._loaded_state = state
        self.epoch = state["epoch"]

    def _restore(self, state: dict[str, Any]) -> None:
        """Read the open shards up to where they were, and the documents of the buffer."""
        self._start_epoch()  # draws the epoch's order again
        self._loaded_state = None
        self._yielded, self._opened = state["given"], state["opened"]
        self._complete = {int(index): (records, checksum) for index, (records, checksum) in state["whole"].items()}
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        lists = {name: list(state["skipped"].get(name, ())) for name in ("first", "unread")}
        vars(self.skipped).update(state["skipped"] | lists)
        if self.skipped.strict and self.skipped.first:  # it ended the run, or would have
            raise InputError(self.skipped.first[0])
        self._places = [(file, line, checksum) for file, line, checksum in state["buffer"]]
        buffered: dict[int, dict[int, int]] = defaultdict(dict)  # file → line → checksum
        for file, line, checksum in self._places:
            buffered[file][line] = checksum
        texts: dict[tuple[int, int], str] = {}
        for index, *position in state["shards"]:
            shard = self._open(index)
            texts |= shard.restore(tuple(position), buffered.pop(index, {}))
            self._shards.append(shard)
        for index, documents in buffered.items():  # of shards that have been read to their end
            texts |= self._open(index).read_again(documents)
        self._texts = [texts[file, line] for file, line, _ in self._places]
        self._characters = sum(map(len, self._texts))

    @cached_property
    def _fingerprints(self) -> list[dict[str, Any]]:
        return [fingerprint(file) for file in self.files]


# How a file or a setting is recognised --------------------------------------------------------------------------------


def fingerprint(file: Path) -> dict[str, Any]:
    """Return what tells a file from others without reading all of it: name, bytes, and a checksum of both its ends.

    (A gzip file ends in a checksum of all that it holds.) A pipe has only its name.

    Raises:
        InputError: when the file cannot be read.
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
    """Raise InputError, by name, when a run was saved with a setting that has another value now."""
    for name, value in now.items():
        if saved[name] != value:
            raise InputError(f"the run was saved with {name} {saved[name]}, and now it is {value}")


def _difference(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return the message that names the file that has changed."""
    before, after = [file["name"] for file in saved], [file["name"] for file in now]
    if before != after:
        other = next((name for name in before if name not in after), None) or next(
            (name for name in after if name not in before), "their order"
        )
        return f"the run was saved with {len(before)} data files, now there are {len(after)}, or others: {other}"
    changed = next(was["name"] for was, is_now in zip(saved, now, strict=True) if was != is_now)
    return f"{changed}: {CHANGED}"
