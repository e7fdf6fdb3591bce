"""Records that are there more than once: the same text, nearly the same, or the same question answered in two ways.

The texts themselves are not kept. A record becomes a *fingerprint* of some 500 bytes:

* Hashes of all it says, of its question and of its answer. In those of the *normalised* text, capitals, punctuation and
  white space do not count, while digits do: "What is number 17?" is not "What is number 18?".
* A MinHash signature: for each of PERMUTATIONS hash functions the least hash among the runs of SHINGLE words. Two
  records agree in a place of it with the probability J, the share of runs that both have among those that one has
  (Jaccard's index). So the share of equal places estimates J, with a standard deviation of √(J (1 − J) / 60).

Records are *nearly* the same when their normalised texts are equal, or when they have the same numbers in the same
order, each at least LEAST_SHINGLES runs of words, and J is at least NEAR: of all, of what is asked, and of what is
answered; of the last two, one that is SHORT must be equal. A system's text and a pair's context do not count: many
records may share them. Candidates are those whose signatures are equal in one of BANDS bands (J = 0.85: with a
probability of 0.999).

Source: Broder, "On the resemblance and containment of documents" (1997); the bands: Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3.

    minift data audit data/pairs.jsonl
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minift.prompts import Conversation, Pair

SHINGLE = 5  # words of a run
LEAST_SHINGLES = 20  # runs of a record that may be nearly the same as another
NEAR = 0.85
BANDS, ROWS = 12, 5
PERMUTATIONS = BANDS * ROWS
SIDE_PERMUTATIONS = 36  # of the signatures of what is asked, and of what is answered
SHORT = 10  # runs; of so few, one changed word changes half
TABLE_SIZE = 2**18  # words whose hashes are kept

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
_WIDE = r"\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u00bf\u00a1\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a\u300c\u300d"
_MARKS = rf"[.,;:!?'\"(){_WIDE}]+"
_PUNCTUATION = re.compile(rf"(?<!\d){_MARKS}|{_MARKS}(?!\d)")  # not inside a number
_RANDOM = np.random.Generator(np.random.PCG64(1997))
_FACTORS = _RANDOM.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * 2 + 1  # odd, as multiply-shift wants them
_IN_RUN = _RANDOM.integers(0, 2**63, SHINGLE, dtype=np.uint64) * 2 + 1  # of the words of a run, by place
NONE = np.uint32(2**32 - 1)  # in a signature: there is no run of words

Array = NDArray[Any]


def normalised(text: str) -> str:
    """Return a text without capitals and punctuation, its white space alike; a line of nothing but punctuation stays.

    Signs stay, and so do accents: C is not C++, 3 + 5 not 3 - 5, 1.5 not 15, and in many scripts a mark is a vowel.
    """
    lines = unicodedata.normalize("NFC", text.casefold()).splitlines()
    return " ".join(word for line in lines for word in (_PUNCTUATION.sub(" ", line).split() or line.split()))


def text_hash(*texts: str) -> int:
    """Return a hash of 64 bits of some texts in order; equal ones in another division have another."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of N records, in order.

    Attributes:
        hashes: uint64 [N, 5]: of the record; of it normalised; of all that is asked, and of the answer, both normalised
            (0 where there is none); of the numbers.
        signatures: uint32 [N, PERMUTATIONS], of the record.
        asked, answered: uint32 [N, SIDE_PERMUTATIONS], of the user's texts, and of the assistant's.
        runs: int32 [N, 2], how many runs of words the user's texts have, and the assistant's.
    """

    hashes: Array
    signatures: Array
    asked: Array
    answered: Array
    runs: Array

    @classmethod
    def join(cls, parts: Sequence["Fingerprints"]) -> "Fingerprints":
        """Return the fingerprints of all parts, in order."""
        if not parts:
            return Fingerprinter()([])
        names = ("hashes", "signatures", "asked", "answered", "runs")
        columns = [[getattr(part, name) for part in parts] for name in names]
        return cls(*map(np.concatenate, columns))


class Fingerprinter:
    """Makes fingerprints; it remembers the hashes of words."""

    def __init__(self) -> None:
        self._words = _Words()

    def __call__(self, conversations: Sequence[Conversation]) -> Fingerprints:
        """Return the fingerprints of some conversations."""
        hashes = np.array([_hashes(one) for one in conversations], np.uint64).reshape(-1, 5)
        asked, n_asked = self._signatures([_texts(one, "user") for one in conversations])
        answered, n_answered = self._signatures([_texts(one, "assistant") for one in conversations])
        self._words.limit()
        whole, runs = np.minimum(asked, answered), np.stack([n_asked, n_answered], 1)
        asked, answered = (side[:, :SIDE_PERMUTATIONS].copy() for side in (asked, answered))
        return Fingerprints(hashes, whole, asked, answered, runs)

    def _signatures(self, records: Sequence[Sequence[str]]) -> tuple[Array, Array]:
        """Return the signature of each record's runs of words [N, PERMUTATIONS], and their number [N]."""
        signatures = np.full((len(records), PERMUTATIONS), NONE)
        runs = [self._runs(texts) for texts in records]
        counts = np.array([len(one) for one in runs], np.int32)
        filled = np.flatnonzero(counts)
        if len(filled):
            everything = np.concatenate([runs[place] for place in filled])
            starts = np.cumsum(counts[filled]) - counts[filled]
            for place in range(PERMUTATIONS):
                hashed = (everything * _FACTORS[place]) >> np.uint64(32)
                signatures[filled, place] = np.minimum.reduceat(hashed, starts)
        return signatures, counts

    def _runs(self, texts: Sequence[str]) -> Array:
        """Return a hash, uint64, of each run of SHINGLE words inside one of the texts."""
        found = []
        for text in texts:
            words = np.fromiter(map(self._words.__getitem__, _WORD.findall(text.casefold())), np.uint64)
            count = len(words) - SHINGLE + 1
            if count > 0:
                mixed = sum((words[place : place + count] * _IN_RUN[place] for place in range(SHINGLE)), np.uint64(0))
                found.append(mixed ^ (mixed >> np.uint64(29)))
        return np.concatenate(found) if found else np.empty(0, np.uint64)


class _Words(dict[str, int]):
    """The hash of each word, kept for those that were met before."""

    def __missing__(self, word: str) -> int:
        self[word] = value = text_hash(word)
        return value

    def limit(self) -> None:
        """Forget all when there are too many."""
        if len(self) > TABLE_SIZE:
            self.clear()


def _texts(conversation: Conversation, role: str) -> list[str]:
    """Return the texts of a role, without a pair's context."""
    if isinstance(conversation, Pair):
        return [conversation.question if role == "user" else conversation.answer]
    return [turn.text for turn in conversation.turns if turn.role == role]


def _turns_before_answer(conversation: Conversation) -> int:
    """Return how many turns come before the last answer."""
    return len(conversation.turns) - 1 if isinstance(conversation, Pair) else len(conversation.until_answer())


def question_hash(conversation: Conversation) -> int:
    """Return a hash of all that is asked, normalised; 0 where nothing is."""
    asked = [turn.text for turn in conversation.turns[: _turns_before_answer(conversation)]]
    return text_hash(*map(normalised, asked)) if any(map(str.strip, asked)) else 0


def _hashes(conversation: Conversation) -> tuple[int, ...]:
    turns, place = conversation.turns, _turns_before_answer(conversation)
    texts = [normalised(turn.text) for turn in turns]
    has_question = any(turn.text.strip() for turn in turns[:place])
    has_answer = place < len(turns) and turns[place].text.strip()
    return (
        text_hash(*(part for turn in turns for part in (turn.role, turn.text))),
        text_hash(*(part for turn, text in zip(turns, texts, strict=True) for part in (turn.role, text))),
        text_hash(*texts[:place]) if has_question else 0,
        text_hash(texts[place]) if has_answer else 0,
        text_hash(*_NUMBER.findall(" ".join(turn.text for turn in turns))),
    )


# Groups ---------------------------------------------------------------------------------------------------------------


def earlier(values: Array) -> Array:
    """Return for each value the place of the first that equals it: its own where it is the first; int64 [N]."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    found: Array = first[inverse.reshape(-1)]
    return found


def near_pairs(prints: Fingerprints) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) for records that are nearly the same and not the same, in the order of the later ones.

    Of records with the same normalised text each is compared with the first of them.
    """
    same, alike = earlier(prints.hashes[:, 0]), earlier(prints.hashes[:, 1])
    places = np.arange(len(same))
    firsts = places[(alike == places)]
    found = {int(later): int(first) for later, first in enumerate(alike) if first != later and same[later] == later}
    for first, later in _similar(prints, firsts):
        found.setdefault(later, first)
    for later in sorted(found):
        yield found[later], later


def _similar(prints: Fingerprints, places: Array) -> list[tuple[int, int]]:
    """Return pairs of the records at `places` (no two of the same text) whose signatures are nearly the same."""
    long = places[prints.runs[places].sum(1) >= LEAST_SHINGLES]
    found: dict[int, int] = {}
    for band in range(BANDS):
        part = prints.signatures[long, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        key = (part * _FACTORS[:ROWS]).sum(1, dtype=np.uint64) ^ prints.hashes[long, 4]  # and the same numbers
        order = np.argsort(key, kind="stable")
        equal = np.flatnonzero(key[order][1:] == key[order][:-1])  # neighbours in a bucket
        first = earlier(key)[order[equal + 1]]
        candidates = long[np.stack([np.r_[first, order[equal]], np.r_[order[equal + 1], order[equal + 1]]], 1)]
        for block in np.array_split(candidates, len(candidates) // 10_000 + 1):
            for a, b in block[_are_near(prints, block)].tolist():
                found.setdefault(b, a)
    return [(first, later) for later, first in found.items()]


def _are_near(prints: Fingerprints, pairs: Array) -> Array:
    """Return for each pair whether it is nearly the same by all that the fingerprints say; bool [M]."""
    a, b = pairs[:, 0], pairs[:, 1]
    found: Array = prints.hashes[a, 4] == prints.hashes[b, 4]  # the numbers
    found &= (prints.signatures[a] == prints.signatures[b]).mean(1) >= NEAR
    for side, (signatures, column) in enumerate(((prints.asked, 2), (prints.answered, 3))):
        short = np.minimum(prints.runs[a, side], prints.runs[b, side]) < SHORT
        same = prints.hashes[a, column] == prints.hashes[b, column]
        found &= np.where(short, same, (signatures[a] == signatures[b]).mean(1) >= NEAR)
    return found


def contradictions(prints: Fingerprints) -> list[tuple[int, int]]:
    """Return (earlier, later) for records that ask the same, all turns before the answer, and answer otherwise."""
    question, answer = prints.hashes[:, 2], prints.hashes[:, 3]
    first = earlier(question)
    places = np.flatnonzero((question != 0) & (answer != 0) & (answer[first] != 0) & (answer != answer[first]))
    return [(int(first[place]), int(place)) for place in places]


def on_both_sides(prints: Fingerprints, held_out: set[int], near: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (held-out record, record to train on) where the two are the same, nearly so, or ask the same."""
    is_held = np.zeros(len(prints.hashes), bool)
    is_held[sorted(held_out)] = True
    found: dict[int, int] = {}
    for first, later in near:
        if is_held[first] != is_held[later]:
            held, trained = (first, later) if is_held[first] else (later, first)
            found.setdefault(held, trained)
    for column in (2, 1, 0):  # what is the same word for word is named, if anything
        known: dict[int, int] = {}
        hashes: Array = prints.hashes[:, column]
        for place in np.flatnonzero(~is_held & (hashes != 0)).tolist():
            known.setdefault(int(hashes[place]), place)
        for place in np.flatnonzero(is_held).tolist():
            if int(hashes[place]) in known:
                found[place] = known[int(hashes[place])]
    return sorted(found.items())
