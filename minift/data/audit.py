"""What a data set teaches: counts, findings and samples, of the ids and masks that train.

Every conversation is encoded as `finetune` encodes it, and examined (`checks.py`, `duplicates.py`). What is kept of it
are its lengths and some 500 bytes of hashes, so a data set may be larger than memory. Large ones are looked at by two
processes.

    minift data audit data/pairs.jsonl --html audit.html
"""

import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minift.config import TrainConfig
from minift.data.batches import PairBatches
from minift.data.conversations import SHOWN_UNREAD, Reading, scan_conversations
from minift.data.duplicates import Fingerprinter, Fingerprints, contradictions, earlier, near_pairs, on_both_sides
from minift.data.encode import in_workers
from minift.data.examine import Examined, Examiner, reason_of
from minift.data.findings import KINDS, Finding, Found, sentence
from minift.data.records import MAX_SKIPPED_SHARE, scan
from minift.data.samples import Sample, sample
from minift.data.split import held_out_places
from minift.data.survey import Lengths
from minift.data.templates import Representatives, choose_template, unknown_markers
from minift.data.unpack import UnreadableError, is_pipe
from minift.errors import InputError, one_line
from minift.pack import PADDING, Example
from minift.prompts import Conversation
from minift.storage.system import forks, usable_cores
from minift.tokenizer.base import Tokenizer

HEAD = 1_000  # conversations by which the template is chosen; of more, the rest is looked at by WORKERS processes
WORKERS = 2
CHUNK = 100  # conversations that a process is given at once
AHEAD = 8  # chunks that are read ahead for each process
BATCHES = 200  # whose padding is measured
PADDED = 0.3  # of the positions of packed rows; of examples half as long as a row, a quarter of it is usual
REASONS = 5  # why records cannot be used, that are told apart


# All of them ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """All that is known of what a data set teaches.

    Attributes:
        counts: by what is counted, in the order in which they are shown.
        lengths: how many examples have how many tokens before they are cut.
        findings: those that change something first.
    """

    files: list[str]
    template: str
    max_length: int
    counts: dict[str, float]
    lengths: dict[int, int]
    findings: list[Finding]
    samples: list[Sample]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def audit(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    config: TrainConfig,
    reading: Reading | None = None,
    test: Sequence[Path] = (),
    samples: int = 3,
    positions: int = 0,
    batch_size: Callable[[int], int] | None = None,
) -> Audit:
    """Look at all records of some files.

    Args:
        config: its `template`, `max_length`, `learn`, `rendered`, `seed`, `batch_size` and `pack` are read.
        test: the files that are held out; by default the tenth that `finetune` holds out.
        samples: how many records are shown, besides those of the findings.
        positions: those of the model, to which the advice about lengths is held; 0 for an unknown number.
        batch_size: chooses the examples of a step by the number of all (default: that of `config`).

    Raises:
        InputError: for files without a usable record, or which cannot be read to their end; as `choose_template`.
    """
    return _Auditor(files, tokenizer, config, reading or Reading(), test, samples, positions, batch_size).audit()


@dataclass
class _Auditor:
    """The state of an audit."""

    files: Sequence[Path]
    tokenizer: Tokenizer
    config: TrainConfig
    reading: Reading
    test: Sequence[Path]
    n_samples: int
    positions: int = 0
    batch_size: Callable[[int], int] | None = None
    found: dict[str, Found] = field(default_factory=dict)
    reasons: dict[str, Found] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # key → the first record that has it
    where: list[str] = field(default_factory=list)
    prints: list[Fingerprints] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    uncut: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    sampled: list[tuple[int, Conversation]] = field(default_factory=list)
    seen: Representatives = field(default_factory=Representatives)

    def audit(self) -> Audit:
        """Return the audit."""
        test_where, test_prints, test_seen = self._read_test()
        conversations = self._usable()
        head = list(islice(conversations, HEAD))
        if not head:
            reasons = list(self.reasons.values())
            raise InputError(f"{reasons[0].where}: {reasons[0].detail}" if reasons else f"{self.files[0]}: no records")
        name = self._choose([*head, *test_seen])
        examiner = Examiner(name, self.tokenizer, self.config)
        self._look_at_all(chain(head, conversations), examiner, large=len(head) == HEAD)
        final = self._choose([*self.seen, *test_seen])
        if final != name:
            return self._again(final)
        prints = Fingerprints.join(self.prints)
        held_out = self._compare(prints, test_where, test_prints)
        self._measure_padding(held_out)
        if self.unread:
            of = ", ".join(f"{key!r} of {count:,}" for key, count in self.reading.unread.most_common(SHOWN_UNREAD))
            where = next(iter(self.unread.values()))
            self.found["keys not read"] = Found(len(self.unread), where, f"records: {of}")
        for marker in unknown_markers(examiner.template, self.tokenizer):
            self._add("unknown markers", "", marker)
        return Audit(
            files=list(map(str, self.files)),
            template=name,
            max_length=self.config.max_length,
            counts=self._counts(held_out, len(test_where)),
            lengths=dict(sorted(self.uncut.items())),
            findings=self._findings(),
            samples=self._samples(examiner),
        )

    def _choose(self, conversations: Sequence[Conversation]) -> str:
        """Return the template of the conversations; plain, with a finding, where none fits them all."""
        try:
            return choose_template(self.config.template, conversations, self.tokenizer, self.config.rendered)
        except InputError as fault:
            if self.config.template != "auto":
                raise
            place = re.match(r"^.*?:\d+(?=: )", str(fault))
            self.found["no template fits all"] = Found(1, place.group() if place else "", reason_of(fault))
            return "plain"

    def _again(self, template: str) -> Audit:
        """Look at the files once more, in the template that all of them need, not only the first records."""
        if any(map(is_pipe, self.files)) or any(map(is_pipe, self.test)):
            raise InputError(f"{self.files[0]}: all records together need --template {template}; give it")
        reading = Reading(self.reading.encoding, self.reading.fields)
        options = self.config.replace(template=template), reading, self.test, self.n_samples, self.positions
        return audit(self.files, self.tokenizer, *options, self.batch_size)

    # Reading ----------------------------------------------------------------------------------------------------------

    def _usable(self) -> Iterator[Conversation]:
        """Yield the usable conversations of all files; count the others, and the keys that are not read."""
        for item in _scan(self.files, self.reading):
            self.counts["records"] += 1
            if isinstance(item, InputError):
                where = re.match(r"^.*?:\d+", str(item))
                reason = reason_of(item)
                found = self.reasons.setdefault(re.sub(r"\[\d+\]| at column \d+", "", reason), Found())
                found.add(where.group() if where else "", reason)
                continue
            for key in self.reading.unread.keys() - self.unread.keys():
                self.unread[key] = item.where
            self.seen.add(item)
            yield item

    def _read_test(self) -> tuple[list[str], Fingerprints, Representatives]:
        """Return the places of the held-out records, their fingerprints, and one of each kind of them."""
        where, prints, seen, fingerprint = list[str](), list[Fingerprints](), Representatives(), Fingerprinter()
        usable = _all_usable(_scan(self.test, Reading(self.reading.encoding, self.reading.fields)))
        while chunk := list(islice(usable, CHUNK)):
            where += [one.where for one in chunk]
            prints.append(fingerprint(chunk))
            for one in chunk:
                seen.add(one)
        if self.test and not where:
            raise InputError(f"{self.test[0]}: holds no records")
        return where, Fingerprints.join(prints), seen

    def _look_at_all(self, conversations: Iterator[Conversation], examiner: Examiner, large: bool) -> None:
        workers = min(WORKERS, usable_cores()) if large and forks() else 0
        started: deque[tuple[Callable[[], Examined], list[Conversation]]] = deque()
        rng = random.Random(self.config.seed)
        with in_workers(examiner, workers if workers > 1 else 0) as start:
            while chunk := list(islice(conversations, CHUNK)):
                started.append((start(chunk), chunk))
                if len(started) > AHEAD * workers:
                    self._take(*started.popleft(), rng)
            while started:
                self._take(*started.popleft(), rng)

    def _take(self, wait: Callable[[], Examined], conversations: list[Conversation], rng: random.Random) -> None:
        """Add what was seen in some conversations; draw the samples, each record with the same probability."""
        examined = wait()
        for conversation, faults in zip(conversations, examined.faults, strict=True):
            for name, detail in faults:
                self._add(name, conversation.where, detail, conversation)
            place = len(self.where)
            self.where.append(conversation.where)
            if len(self.sampled) < self.n_samples:
                self.sampled.append((place, conversation))
            elif self.n_samples and (slot := rng.randrange(place + 1)) < self.n_samples:
                self.sampled[slot] = (place, conversation)
        self.prints.append(examined.prints)
        self.lengths += examined.lengths
        self.uncut.update(examined.uncut)
        self.counts.update(examined.counts)

    def _add(self, name: str, where: str, detail: str, conversation: Conversation | None = None) -> None:
        self.found.setdefault(name, Found()).add(where, detail, conversation)

    # Records together -------------------------------------------------------------------------------------------------

    def _compare(self, prints: Fingerprints, test_where: list[str], test_prints: Fingerprints) -> set[int]:
        """Find the records that are there more than once; return the places of the held-out ones among all."""
        count = len(self.where)
        same = earlier(prints.hashes[:, 0])
        for place in np.flatnonzero(same != np.arange(count)).tolist():
            self._add("duplicates", self.where[place], f"as {self.where[same[place]]}")
        near = list(near_pairs(prints))
        for first, later in near:
            self._add("near-duplicates", self.where[later], f"as {self.where[first]}")
        for first, later in contradictions(prints):
            self._add("contradictions", self.where[later], f"and {self.where[first]}")
        if self.test:
            prints, held_out = Fingerprints.join([prints, test_prints]), set(range(count, count + len(test_where)))
            near = list(near_pairs(prints))
        else:
            held_out = set(held_out_places(count, self.config.seed)) if count > 1 else set()
        for place, first in on_both_sides(prints, held_out, near):
            where = [*self.where, *test_where]
            self._add("held-out records trained on", where[place], f"as {where[first]}")
        return held_out

    def _measure_padding(self, held_out: set[int]) -> None:
        """Measure how much of the rows of some batches is padding, with and without packing."""
        lengths = self._trained_lengths(held_out)
        if self.batch_size:
            self.config = self.config.replace(batch_size=self.batch_size(len(lengths)))
        for pack in (True, False):
            share = padding_share(lengths, self.config, self.tokenizer.eos_id, pack)
            self.counts[f"padding {'packed' if pack else 'not packed'}"] = share  # type: ignore[assignment]
        share = self.counts["padding packed"]
        if self.config.pack and share > PADDED and len(lengths) >= self.config.batch_size:
            longest, median = max(lengths), sorted(lengths)[len(lengths) // 2]
            place = next(place for place, own in enumerate(self.lengths) if longest in own)
            self._add("packs badly", self.where[place], f"{longest:,} tokens set the row; half have {median:,} or less")
            self.found["packs badly"].count = round(100 * share)

    def _trained_lengths(self, held_out: set[int]) -> list[int]:
        return [length for place, own in enumerate(self.lengths) if place not in held_out for length in own]

    # Results ----------------------------------------------------------------------------------------------------------

    def _counts(self, held_out: set[int], n_test: int) -> dict[str, float]:
        counts, examples = self.counts, len(self._trained_lengths(held_out))
        return {
            "records": counts["records"],
            "conversations": len(self.where),
            **{f"{role} turns": counts[f"{role} turns"] for role in ("system", "user", "assistant")},
            "tokens learned": counts["learned"],
            "tokens given": counts["given"],
            "tokens cut": counts["cut"],
            "examples": counts["examples"],
            "examples cut": counts["cut examples"],
            "examples dropped": counts["dropped"],
            "held-out records": n_test or len(held_out),
            "examples to train on": examples,
            "steps an epoch": -(-examples // self.config.batch_size),
            "padding packed": counts["padding packed"],
            "padding not packed": counts["padding not packed"],
        }

    def _findings(self) -> list[Finding]:
        findings = [self._unusable()] if self.reasons else []
        findings += [self._finding(name, self.found[name]) for name in KINDS if name in self.found]
        order = list(KINDS)
        return sorted(findings, key=lambda finding: (not finding.changes, order.index(finding.name)))

    def _unusable(self) -> Finding:
        """Return the finding about all records that cannot be used, with the commonest reasons."""
        reasons = sorted(self.reasons.values(), key=lambda found: -found.count)
        count, others = sum(found.count for found in reasons), len(reasons) - REASONS
        words = [f"{found.detail} ({found.count:,} times)" if found.count > 1 else found.detail for found in reasons]
        detail = "; ".join(words[:REASONS]) + (f"; and {others:,} more reasons" if others > 0 else "")
        finding = self._finding("unusable records", Found(count, next(iter(self.reasons.values())).where, detail))
        if count > MAX_SKIPPED_SHARE * self.counts["records"]:
            return replace(finding, remedy=f"{finding.remedy}; finetune refuses more than {MAX_SKIPPED_SHARE:.0%}")
        return finding

    def _finding(self, name: str, found: Found) -> Finding:
        kind, remedy, count = KINDS[name], KINDS[name].remedy, found.count
        if name == "answers cut":
            count = self.counts["cut examples"]
        elif name == "records dropped":
            count = self.counts["dropped"]
        if name in ("answers cut", "records dropped"):
            remedy = f"{remedy}: {self._enough()}"
        elif name == "packs badly" and self.counts["padding not packed"] < self.counts["padding packed"]:
            remedy = f"give --no-pack: {self.counts['padding not packed']:.0%} would be padding"
        return Finding(name, kind.changes, count, sentence(name, count), found.where, one_line(found.detail), remedy)

    def _enough(self) -> str:
        """Return the lengths that would keep all examples, and 99 of 100."""
        lengths = Lengths()
        lengths.counts = self.uncut
        numbers = lengths.summary()
        limit = f" (the model has {self.positions:,} positions)" * (0 < self.positions < numbers["max"])
        return f"{numbers['max']:,} keeps all, {numbers['p99']:,} keeps 99 %{limit}"

    def _samples(self, examiner: Examiner) -> list[Sample]:
        """Return the records to show: the first of each finding, then those that were drawn."""
        chosen: dict[str, tuple[Conversation, list[str]]] = {}
        for name in KINDS:
            found = self.found.get(name)
            if found is not None and found.conversation is not None:
                chosen.setdefault(found.where, (found.conversation, []))[1].append(name)
        for _, conversation in sorted(self.sampled, key=lambda drawn: drawn[0]):
            chosen.setdefault(conversation.where, (conversation, []))
        chosen |= self._read_again(chosen)
        template, tokenizer = examiner.template, examiner.tokenizer
        return [sample(one, tuple(names), template, tokenizer, self.config) for one, names in chosen.values()]

    def _read_again(
        self, chosen: dict[str, tuple[Conversation, list[str]]]
    ) -> dict[str, tuple[Conversation, list[str]]]:
        """Return the first records of the findings that only all records together show, by their places."""
        if any(map(is_pipe, self.files)):
            return {}
        missing = dict[str, list[str]]()
        for name, found in self.found.items():
            if found.where and found.conversation is None:
                missing.setdefault(found.where, []).append(name)
        known = {where: (one, [*names, *missing.pop(where, [])]) for where, (one, names) in chosen.items()}
        if missing:
            for item in _scan(self.files, Reading(self.reading.encoding, self.reading.fields)):
                if not isinstance(item, InputError) and item.where in missing:
                    known[item.where] = (item, missing.pop(item.where))
                    if not missing:
                        break
        return known


def _scan(files: Iterable[Path], reading: Reading) -> Iterator[Conversation | InputError]:
    for file in files:
        for item in scan_conversations(scan(file, reading.encoding), reading):
            if isinstance(item, UnreadableError):  # the counts would be those of a part
                raise item
            yield item


def _all_usable(items: Iterable[Conversation | InputError]) -> Iterator[Conversation]:
    """Yield conversations. Raise the first fault: of held-out files, finetune tolerates none."""
    for item in items:
        if isinstance(item, InputError):
            raise item
        yield item


def padding_share(lengths: Sequence[int], config: TrainConfig, pad_id: int, pack: bool) -> float:
    """Return the share of the positions of an epoch's first batches that is padding."""
    if not lengths:
        return 0.0
    of_length = {length: Example([pad_id], [pad_id] * length) for length in set(lengths)}
    batches = PairBatches([of_length[length] for length in lengths], config.batch_size, pad_id, config.seed, pack)
    padding = positions = 0
    for batch in islice(batches, min(len(batches), BATCHES)):
        padding += int((batch.document_ids == PADDING).sum())
        positions += batch.document_ids.numel()
    return padding / positions
