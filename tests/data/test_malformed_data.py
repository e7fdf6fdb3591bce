"""The promise that bad data is skipped, counted, named, and ends a run only past 1 %.

Good records are written with bad ones among them, whose places are known because they were put there: what is read
must be the good ones, and what is counted the bad ones. When a corpus is refused is worked out here once more, in whole
numbers. Files are cut off, taken away and filled with noise; counts are followed through stops and resumptions, and up
to the last line that a command prints.
"""

import copy
import gzip
import json
import random
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.data.conversations import read_all_conversations
from minift.data.lines import MAX_LINE, TEXT_PART
from minift.data.records import SHOWN, SKIPPED_BEFORE_CHECK, Skipped, read_records, scan
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from tests.helpers import PACKINGS, SMALL, pack, write_jsonl

BAD = b"{oops"
# Each with what the report must say. Nothing here is a document, whatever the field.
BAD_LINES = {
    "cut": (b'{"text": "cut', "not valid JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "not valid JSON"),
    "latin-1": (b'{"text": "caf\xe9"}', "not UTF-8 text"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "not "),
    "surrogate bytes": (b'{"text": "\xed\xa0\xbd"}', "not UTF-8 text"),
    "half surrogate": (b'{"text": "half \\ud83d of a pair"}', "half of a surrogate pair"),
    "other half": (b'{"text": "good", "meta": {"\\uDE42": 1}}', "half of a surrogate pair"),
    "list": (b'[{"text": "a"}]', "holds list, not a JSON object"),
    "number": (b"7", "holds int, not a JSON object"),
    "null": (b"null", "holds NoneType, not a JSON object"),
    "missing": (b'{"url": "https://example.com", "Text": "a"}', "no text under 'text'; its keys: url, Text"),
    "not text": (b'{"text": 7}', "no text under 'text'"),
    "list of texts": (b'{"text": ["a"]}', "no text under 'text'"),
    "no value": (b'{"text": null}', "no text under 'text'"),
    "empty": (b'{"text": ""}', "the text is empty"),
    "blank": (b'{"text": " \\n\\t\\u3000"}', "the text is empty"),
    "deep": (b'{"text": ' + b"[" * 100_000, "not valid JSON"),
    "huge number": (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}", "not valid JSON"),
}


def texts(*numbers: int) -> list[dict[str, str]]:
    return [{"text": f"document {number}"} for number in numbers]


def counts(skipped: Skipped) -> tuple[int, int]:
    """Return (records that could not be used, of how many)."""
    return skipped.skipped, skipped.records


def reports(stderr: str) -> list[str]:
    return [line.removeprefix("skipped: ") for line in stderr.splitlines() if line.startswith("skipped: ")]


# A bad record ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, packing: str
) -> None:
    """It is the 17th of 120 records. The blank line before it is no record, but counts as a line."""
    bad, reason = BAD_LINES[name]
    lines = [*texts(*range(16)), b" ", bad, *texts(*range(16, 119))]
    file = write_jsonl(tmp_path / f"x.jsonl{packing}", lines)
    for shuffle_buffer in (0, 9):
        skipped = Skipped()
        given = list(DocumentStream([file], epochs=1, shuffle_buffer=shuffle_buffer, skipped=skipped))
        assert sorted(given) == sorted(f"document {i}" for i in range(119))
        assert shuffle_buffer or given == [f"document {i}" for i in range(119)]
        assert counts(skipped) == (1, 120)
        assert len(skipped.first) == 1
        (report,) = reports(capsys.readouterr().err)
        assert report == skipped.first[0]
        assert report.startswith(f"{file}:18: ")
        assert reason in report
    strict = DocumentStream([file], epochs=1, skipped=Skipped(strict=True))
    stream = iter(strict)
    assert list(islice(stream, 16)) == [f"document {i}" for i in range(16)]
    with pytest.raises(InputError) as error:
        next(stream)
    assert str(error.value) == report
    assert reports(capsys.readouterr().err) == []


def test_by_default_nothing_is_borne(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [*texts(*range(500)), BAD])
    with pytest.raises(InputError, match=r"x\.jsonl:501: not valid JSON"):
        list(DocumentStream([file], epochs=1))
    with pytest.raises(InputError, match=r"x\.jsonl:501: not valid JSON"):
        list(read_records(file))


def test_every_bad_line_is_found_between_the_good_ones(tmp_path: Path) -> None:
    lines = [line for line, _ in list(BAD_LINES.values())[:10]]
    file = write_jsonl(tmp_path / "x.jsonl", [line for bad in lines for line in (*texts(1), bad)])
    found = list(scan(file))
    assert [isinstance(item, InputError) for item in found] == [False, True] * 10
    assert [str(item).split(" ")[0] for item in found[1::2]] == [f"{file}:{2 * i + 2}:" for i in range(10)]


def test_the_first_are_reported_and_all_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Any] = [BAD if i % 200 == 7 else {"text": str(i)} for i in range(2000)]
    file = write_jsonl(tmp_path / "x.jsonl", lines)
    skipped = Skipped()
    assert len(list(DocumentStream([file], epochs=3, skipped=skipped))) == 3 * 1990
    assert counts(skipped) == (30, 6000)
    stderr = capsys.readouterr().err
    assert [report.split(": ")[0] for report in reports(stderr)] == [f"{file}:8"]  # each reason once
    assert len(stderr.splitlines()) == 1
    assert str(skipped).splitlines()[0] == "30 of 6,000 records skipped:"
    assert [line.strip() for line in str(skipped).splitlines()[1:]] == [*reports(stderr), "and 29 more like it"]

    quiet = Skipped(quiet=True)
    list(DocumentStream([file], epochs=1, skipped=quiet))
    assert (quiet.first, counts(quiet)) == (skipped.first, (10, 2000))
    assert capsys.readouterr().err == ""


def test_each_reason_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is; of more reasons than SHOWN, the first ones."""
    keys = "abcdefg"
    bad = [{key: i} for i, key in enumerate(keys)]
    lines: list[Any] = [*texts(*range(2_000)), *[BAD] * 3, {"text": ""}, *bad, {"text": ""}, BAD]
    file = write_jsonl(tmp_path / "x.jsonl", lines)
    skipped = Skipped()
    assert len(list(DocumentStream([file], epochs=2, skipped=skipped))) == 4_000
    found = reports(capsys.readouterr().err)
    assert len(found) == SHOWN
    assert [int(line.split(":")[1]) for line in found] == [2001, 2004, 2005, 2006, 2007]
    assert str(skipped).endswith(f"\n  and {2 * 13 - SHOWN} more like them")


def test_a_report_is_one_line_whatever_the_record_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key may hold line breaks, and control characters of a terminal."""
    hostile = {"a\nskipped: b\x1b[2J": "c"}
    file = write_jsonl(tmp_path / "x.jsonl", [hostile, *texts(*range(200))])
    list(DocumentStream([file], epochs=1, skipped=Skipped()))
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "\x1b" not in stderr


# Past 1 % -------------------------------------------------------------------------------------------------------------


def refused_after(bad: Sequence[bool]) -> int | None:
    """Return how many records are read before this corpus is refused; None if it is not. In whole numbers."""
    count = 0
    for read, is_bad in enumerate(bad, 1):
        count += is_bad
        if is_bad and count > SKIPPED_BEFORE_CHECK and 100 * count > read:
            return read
    return len(bad) if 100 * count > len(bad) else None


def cases() -> dict[str, list[bool]]:
    rng = random.Random(5)

    def spread(records: int, bad: int) -> list[bool]:
        return rng.sample([True] * bad + [False] * (records - bad), records)

    cases = {f"{bad} of {n}": spread(n, bad) for n, bad in ((100, 1), (99, 1), (200, 2), (199, 2), (1, 1), (700, 7))}
    cases |= {f"{bad} of {n}": spread(n, bad) for n, bad in ((1100, 11), (1099, 11), (10_100, 101), (10_099, 101))}
    few = [True] * SKIPPED_BEFORE_CHECK
    cases["few at the beginning"] = few + [False] * 9_900
    cases["few at the beginning, too many"] = few + [False] * 9_899
    cases["more at the beginning"] = [True, *few] + [False] * 11_000
    cases["one more, later, below"] = few + [False] * 10_000 + [True] + [False]
    cases["one more, too early"] = few + [False] * 9_998 + [True] + [False] * 3_000
    cases["one more, just in time"] = few + [False] * 9_999 + [True]
    return cases


CASES = cases()


def test_the_cases_are_not_all_alike() -> None:
    ends = {name: refused_after(bad) for name, bad in CASES.items()}
    assert ends["more at the beginning"] == SKIPPED_BEFORE_CHECK + 1
    assert ends["few at the beginning"] is None
    assert ends["1 of 100"] is None
    assert ends["1 of 99"] == 99
    assert ends["one more, too early"] == 10_099
    assert ends["one more, just in time"] is None
    assert sum(end is None for end in ends.values()) == 7


@pytest.mark.parametrize("name", CASES)
def test_a_corpus_is_refused_past_one_per_cent_and_not_before(tmp_path: Path, name: str) -> None:
    bad = CASES[name]
    file = write_jsonl(tmp_path / "x.jsonl", [BAD if is_bad else {"text": str(i)} for i, is_bad in enumerate(bad)])
    skipped = Skipped(quiet=True)
    given: list[str] = []
    message = ""
    try:
        for text in DocumentStream([file], epochs=1, skipped=skipped):
            given.append(text)
    except InputError as error:
        message = str(error)
    end = refused_after(bad)
    read = len(bad) if end is None else end
    assert given == [str(i) for i in range(read) if not bad[i]]
    assert counts(skipped) == (sum(bad[:read]), read)
    assert bool(message) == (end is not None)
    if message:
        assert message.startswith(f"{file}:{bad.index(True) + 1}: not valid JSON")
        assert f"({sum(bad[:read]):,} of {read:,} records cannot be used, more than 1%)" in message

    pairs = [BAD if is_bad else {"question": f"{i}?", "answer": "a"} for i, is_bad in enumerate(bad)]
    write_jsonl(file, pairs)
    skipped = Skipped(quiet=True)
    if end is None:
        found = read_all_conversations([file], skipped)
        assert [pair.question for pair in found] == [f"{i}?" for i in range(read) if not bad[i]]
    else:
        with pytest.raises(InputError) as refused:
            read_all_conversations([file], skipped)
        assert str(refused.value) == message
    assert counts(skipped) == (sum(bad[:read]), read)


def test_a_share_is_that_of_all_files(tmp_path: Path) -> None:
    """Of documents and of pairs: all of one file may be bad if the others are many."""
    write_jsonl(tmp_path / "a.jsonl", texts(*range(300)))
    write_jsonl(tmp_path / "b.jsonl", [BAD, BAD, BAD])
    skipped = Skipped(quiet=True)
    assert len(list(DocumentStream([tmp_path], epochs=1, skipped=skipped))) == 300
    assert counts(skipped) == (3, 303)


def test_a_share_is_that_of_all_files_of_pairs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "a"} for i in range(300)])
    write_jsonl(tmp_path / "b.jsonl", [BAD, BAD, BAD])
    skipped = Skipped(quiet=True)
    assert len(read_all_conversations([tmp_path], skipped)) == 300
    assert counts(skipped) == (3, 303)


def test_bad_pairs_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"question": f"{i}?", "answer": "a"} for i in range(1000)]
    bad: list[Any] = [
        BAD,
        b"\xff",
        {"question": "what?"},
        {"question": " ", "answer": "a"},
        {"question": 1, "answer": 2},
    ]
    bad += [["question", "answer"], {"question": "half \ud83d", "answer": "a"}, {"text": "a page"}]
    file = write_jsonl(tmp_path / "x.jsonl.gz", [*bad[:3], *good, *bad[3:]])
    skipped = Skipped()
    assert [pair.question for pair in read_all_conversations([file], skipped)] == [pair["question"] for pair in good]
    assert counts(skipped) == (8, 1008)
    found = reports(capsys.readouterr().err)
    assert [report.split(": ")[0] for report in found] == [f"{file}:{line}" for line in (1, 2, 3, 1004, 1005)]
    with pytest.raises(InputError, match=rf"^{file}:1: not valid JSON"):
        read_all_conversations([file])


# Long lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "kind", "megabytes", "bound"),
    [
        (".gz", "text", 100, 5 * MAX_LINE),
        (".gz", "spaces", 100, 5 * MAX_LINE),
        # Here 2 KiB that are unpacked at once may be 30 MB of text, and so the limit is higher, but one.
        (".zst", "text", 300, 10 * MAX_LINE),
    ],
)
def test_a_line_of_100_megabytes_is_skipped_in_little_memory(
    tmp_path: Path, packing: str, kind: str, megabytes: int, bound: int
) -> None:
    filler = {"text": b"x", "spaces": b" "}[kind] * 1_000_000
    file = tmp_path / f"x.jsonl{packing}"
    with open_packed(file) as packed:
        packed.write(b"".join(json.dumps(text).encode() + b"\n" for text in texts(*range(150))))
        packed.write(b'{"text": "' if kind == "text" else b"")
        for _ in range(megabytes):
            packed.write(filler)
        packed.write(b'"}\n' if kind == "text" else b"\n")
        packed.write(b"".join(json.dumps(text).encode() + b"\n" for text in texts(*range(150, 250))) + BAD)
    skipped = Skipped(quiet=True)
    tracemalloc.start()
    try:
        assert list(DocumentStream([file], epochs=1, skipped=skipped)) == [f"document {i}" for i in range(250)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound < megabytes * 1_000_000
    assert counts(skipped) == (2, 252)
    assert skipped.first[0] == f"{file}:151: a line longer than 16 MiB"
    assert skipped.first[1].startswith(f"{file}:252: not valid JSON")


def open_packed(file: Path) -> Any:
    """Open a compressed file to write to, little by little."""
    if file.suffix == ".gz":
        return gzip.open(file, "wb", compresslevel=1)
    return pytest.importorskip("zstandard").open(file, "wb")


def test_the_longest_line_is_read_and_the_next_longer_is_not(tmp_path: Path) -> None:
    frame = len(b'{"text": ""}')
    longest = b'{"text": "' + b"x" * (MAX_LINE - frame) + b'"}'
    for end in (b"\n", b""):
        (tmp_path / "x.jsonl").write_bytes(longest + end)
        assert len(next(iter(DocumentStream([tmp_path], epochs=1)))) == MAX_LINE - frame
        (tmp_path / "x.jsonl").write_bytes(longest.replace(b"xx", b"xxx", 1) + end)
        (fault,) = scan(tmp_path / "x.jsonl")
        assert str(fault) == f"{tmp_path / 'x.jsonl'}:1: a line longer than 16 MiB"


def test_a_long_line_of_a_text_takes_nothing_with_it(tmp_path: Path) -> None:
    before, after = "before\n" * 1000, "after\n" * 1000
    (tmp_path / "x.txt").write_text(before + "x" * (MAX_LINE + 1) + "\n" + after)
    items = list(scan(tmp_path / "x.txt"))
    faults = [str(item) for item in items if isinstance(item, InputError)]
    assert faults == [f"{tmp_path / 'x.txt'}:1001: a line longer than 16 MiB"]
    assert [item.values["text"] for item in items if not isinstance(item, InputError)] == [before, after]


def test_a_bad_part_of_a_text_is_one_record(tmp_path: Path) -> None:
    good = b"x" * (TEXT_PART - 1) + b"\n"
    (tmp_path / "x.txt").write_bytes(good + b"\xff" + good + good)
    items = list(scan(tmp_path / "x.txt"))
    assert [isinstance(item, InputError) for item in items] == [False, True, False]
    assert str(items[1]) == f"{tmp_path / 'x.txt'}:2: not UTF-8 text"


# Damaged and missing files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_the_documents_before_the_damage_are_used(tmp_path: Path, share: float, shuffle_buffer: int) -> None:
    rng = random.Random(6)
    rows = [{"text": f"a{i} {rng.randbytes(60).hex()}"} for i in range(400)]
    a, b = write_jsonl(tmp_path / "a.jsonl.gz", rows), write_jsonl(tmp_path / "b.jsonl", texts(*range(200)))
    data = a.read_bytes()[: int(share * a.stat().st_size)]
    a.write_bytes(data)
    left = zlib.decompressobj(wbits=31).decompress(data).count(b"\n")  # whole lines, by another way
    skipped = Skipped(quiet=True)
    given = list(DocumentStream([tmp_path], epochs=2, shuffle_buffer=shuffle_buffer, skipped=skipped))
    expected = [row["text"] for row in rows[:left]] + [f"document {i}" for i in range(200)]
    assert sorted(given) == sorted(2 * expected)
    assert shuffle_buffer or given == 2 * expected
    assert counts(skipped) == (2, 2 * (left + 201))  # how many were lost cannot be known: the place counts as one
    assert skipped.first[0].startswith(f"{a}:{left + 1}: damaged gzip data: ")
    assert b.exists()


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
def test_a_file_that_was_never_there_to_read_is_one_bad_record(tmp_path: Path, shuffle_buffer: int) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(100)])
    skipped = Skipped(quiet=True)
    stream = DocumentStream([tmp_path], epochs=1, shuffle_buffer=shuffle_buffer, skipped=skipped)
    (tmp_path / "b.jsonl").unlink()
    assert sorted(stream) == sorted(f"{name}{i}" for name in "ac" for i in range(100))
    assert counts(skipped) == (1, 201)
    assert skipped.first[0].startswith(f"{tmp_path / 'b.jsonl'}: cannot be read: ")


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
def test_a_file_that_is_lost_between_epochs_counts_what_it_had(tmp_path: Path, shuffle_buffer: int) -> None:
    """An epoch has 1,000 records, whether or not they can still be read."""
    a, _ = (
        write_jsonl(tmp_path / "a.jsonl.gz", texts(*range(10))),
        write_jsonl(tmp_path / "b.jsonl", texts(*range(990))),
    )
    skipped = Skipped(quiet=True)
    documents = iter(DocumentStream([tmp_path], epochs=3, shuffle_buffer=shuffle_buffer, skipped=skipped))
    assert len(list(islice(documents, 1000))) == 1000
    assert counts(skipped) == (0, 1000)
    a.unlink()
    assert sorted(documents) == sorted(2 * [f"document {i}" for i in range(990)])
    assert skipped.first[0].startswith(f"{a}: cannot be read")
    assert counts(skipped) == (20, 3000)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "replaced": lambda data: b'{"text": "other"}\n',
    "cut off": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + data,
    "another byte at its end": lambda data: data[:-4] + b'!"}\n',
    "another byte in its middle": lambda data: data[: len(data) // 2] + b"#" + data[len(data) // 2 + 1 :],
}


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_epochs_ends_the_run(tmp_path: Path, shuffle_buffer: int, change: str) -> None:
    """Of the bytes in the middle of a large file it is known when they have been read again; of new ones, too."""
    rows = [{"text": f"{i} " + "x" * 500} for i in range(1000)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    stream = DocumentStream([tmp_path], shuffle_buffer=shuffle_buffer, skipped=Skipped(quiet=True))
    documents = iter(stream)
    assert len(list(islice(documents, 1000))) == 1000
    data = file.read_bytes()
    file.write_bytes(CHANGES[change](data))
    assert file.read_bytes() != data
    with pytest.raises(InputError, match=rf"^{file}: the file has been changed during the run"):
        list(islice(documents, 2001 if change in ("another byte in its middle", "longer") else 1))
    file.write_bytes(data)  # and nothing is remembered of it where it was put back
    again = DocumentStream([tmp_path], epochs=2, shuffle_buffer=shuffle_buffer, skipped=Skipped(quiet=True))
    assert len(list(again)) == 2000


def test_a_large_file_that_vanishes_between_epochs_ends_the_run(tmp_path: Path) -> None:
    """More than 1 %, and more than a few: it is noticed at once, not at the end of the epoch."""
    for name, count in (("a", 100), ("b", 300), ("c", 300)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
    documents = iter(DocumentStream([tmp_path], skipped=Skipped(quiet=True)))
    assert len(list(islice(documents, 700))) == 700
    (tmp_path / "b.jsonl").unlink()
    assert list(islice(documents, 100)) == [f"a{i}" for i in range(100)]
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/b\.jsonl: cannot be read: .* records cannot be used, more than 1%"
    ):
        next(documents)


# Noise ----------------------------------------------------------------------------------------------------------------


def noise(rng: random.Random) -> bytes:
    """Return a line that might be found in a corpus, or not."""
    good = json.dumps({"text": f"{rng.random()} \u00e9 \U0001f642", "meta": {"n": [1, None, True]}}).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(60))
    if kind == 1:
        return good[: rng.randrange(len(good))]
    if kind == 2:
        changed = bytearray(good)
        changed[rng.randrange(len(good))] = rng.randrange(256)
        return bytes(changed)
    if kind == 3:
        return bytes(rng.choice(b'{}[]",:\\ud83tex0. \r\t') for _ in range(rng.randrange(40)))
    if kind == 4:
        value = rng.choice(["null", "[]", "{}", "1e999", "NaN", '"\\udc00"', '"\\ud83d\\ude42"', '""', "-0", "truex"])
        return f'{{"text": {value}}}'.encode()
    return good


def test_noise_ends_in_documents_or_a_named_refusal(tmp_path: Path) -> None:
    """Whatever the bytes of a file are, packed or not, whole or not; and what is given is text that can be encoded."""
    rng = random.Random(8)
    endings = {"documents": 0, "refused": 0}
    for round in range(400):
        kind, packing = rng.choice((".jsonl", ".json", ".txt")), rng.choice(PACKINGS)
        lines = [noise(rng) for _ in range(rng.randrange(30))]
        if round % 2:  # most of them good, or all would be refused
            lines = [json.dumps({"text": str(i)}).encode() for i in range(300)] + lines[:2]
        data = pack(rng.choice((b"\n", b"\n", b"\r\n")).join(lines), packing)
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            at = rng.randrange(len(data) + 1)
            data = rng.choice((data[:at], data[:at] + rng.randbytes(3) + data[at:], data[at:]))
        file = tmp_path / f"{round}{kind}{packing}"
        file.write_bytes(data)
        skipped = Skipped(quiet=True)
        given = 0
        try:
            stream = DocumentStream([file], epochs=1, shuffle_buffer=rng.choice((0, 4)), skipped=skipped)
            for text in stream:
                assert text.encode().strip()
                given += 1
            endings["documents"] += 1
            assert given
        except InputError as error:
            endings["refused"] += 1
            message = str(error)  # of the first fault, with its place, or of a corpus without documents
            assert message.startswith(str(file)), message
        assert skipped.records - skipped.skipped >= given
        assert all(fault.startswith(f"{file}") for fault in skipped.first)
        file.unlink()
    assert min(endings.values()) > 100


# Counts and resumption ------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Write four small files with 5 unusable records, one of the files cut off. Tolerate more here."""
    monkeypatch.setattr("minift.data.records.MAX_SKIPPED_SHARE", 0.5)
    rng = random.Random(9)
    a = write_jsonl(tmp_path / "a.jsonl", [BAD, *texts(*range(10)), b"", b'{"text": ""}', *texts(*range(10, 15))])
    b = write_jsonl(tmp_path / "b.jsonl.zst", [*texts(*range(20, 35)), b"\xff"])
    c = write_jsonl(tmp_path / "c.jsonl.gz", [{"text": f"{i} {rng.randbytes(30).hex()}"} for i in range(40, 70)])
    c.write_bytes(c.read_bytes()[: c.stat().st_size // 2])
    d = write_jsonl(tmp_path / "d.jsonl", [BAD, *texts(*range(80, 90))])
    return [a, b, c, d]


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_counts_survive_a_resumption_at_every_document(spoiled: list[Path], shuffle_buffer: int) -> None:
    """A stop may come between any two documents, those of a second epoch included."""

    def stream() -> DocumentStream:
        return DocumentStream(spoiled, epochs=2, shuffle_buffer=shuffle_buffer, skipped=Skipped(quiet=True))

    whole = stream()
    expected, states = [], [json.dumps(whole.state_dict())]
    for text in whole:
        expected.append(text)
        states.append(json.dumps(whole.state_dict()))
    assert counts(whole.skipped) == (10, len(expected) + 10)
    assert len(expected) > 2 * 45
    assert len(whole.skipped.first) == 4  # two of the five are the same fault
    for taken, state in enumerate(states):
        resumed = stream()
        resumed.load_state_dict(json.loads(state))
        assert list(resumed) == expected[taken:]
        assert counts(resumed.skipped) == counts(whole.skipped)
        assert resumed.skipped.first == whole.skipped.first


def test_what_a_file_had_is_not_forgotten(tmp_path: Path) -> None:
    """A run that is resumed knows from its state how many records an earlier epoch found."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(300)])
    before = DocumentStream([tmp_path], skipped=Skipped(quiet=True))
    assert len(list(islice(before, 700))) == 700
    state = json.loads(json.dumps(before.state_dict()))
    after = DocumentStream([tmp_path], skipped=Skipped(quiet=True))
    after.load_state_dict(state)
    documents = iter(after)
    assert next(documents) == "a100"
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"b\.jsonl: cannot be read.*\(30[01] of 1,20[01] records"):
        list(islice(documents, 2000))


def test_a_state_is_not_changed_by_its_use(spoiled: list[Path]) -> None:
    stream = DocumentStream(spoiled, epochs=1, skipped=Skipped(quiet=True))
    assert len(list(islice(stream, 5))) == 5
    state = stream.state_dict()
    kept = copy.deepcopy(state)
    firsts = []
    for _ in range(2):
        resumed = DocumentStream(spoiled, epochs=1, skipped=Skipped(quiet=True))
        resumed.load_state_dict(state)
        list(resumed)
        firsts.append(resumed.skipped.first)
    assert state == kept
    assert firsts[0] == firsts[1]


# Commands -------------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command. Return its exit code, and what it printed to both streams."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return run


@pytest.fixture
def finetune(small_checkpoint: Path, tmp_path: Path) -> list[str | Path]:
    """Return a command without its pairs."""
    test = write_jsonl(tmp_path / "test.jsonl", [{"question": "What is 1?", "answer": "One."}])
    words: list[str | Path] = ["finetune", "--model", small_checkpoint, "--test", test, "--out", tmp_path / "out"]
    return [*words, "--device", "cpu", "--steps", "1", "--batch-size", "2"]


@pytest.fixture
def pretrain(tmp_path: Path, tokenizer: Tokenizer) -> list[str | Path]:
    """Return a command without its pages and its length."""
    (tmp_path / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(tmp_path)
    words: list[str | Path] = ["pretrain", "--config", tmp_path / "shape.json", "--tokenizer", tmp_path]
    words += ["--out", tmp_path / "out", "--device", "cpu", "--shuffle-buffer", "0"]
    return [*words, "--batch-size", "8", "--max-length", "64"]


def pairs(count: int) -> list[Any]:
    return [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(count)]


def test_finetuning_bears_one_per_cent(run: Run, finetune: list[str | Path], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [*pairs(50), BAD, *pairs(147), b'{"question": "What?"}'])
    code, _, err = run(*finetune, "--data", file)
    assert code == 2
    assert "(2 of 199 records cannot be used, more than 1%)" in err
    file = write_jsonl(tmp_path / "x.jsonl", [*pairs(50), BAD, *pairs(150), b'{"question": "What?"}'])
    code, out, err = run(*finetune, "--data", file)
    assert code == 0, err
    lines = out.splitlines()
    at = lines.index("2 of 202 records skipped:")
    assert lines[at + 1].startswith(f"  {file}:51: not valid JSON")
    assert lines[at + 2] == f"  {file}:202: 'answer' is missing; its keys: question"
    assert "200 pairs to train on" in out
    assert (tmp_path / "out" / "final" / "model.pt").is_file()


@pytest.mark.parametrize(("good", "bad", "more"), [(98, 1, []), (300, 1, ["--strict"]), (3, 60, []), (0, 1, [])])
def test_finetuning_refuses_more(
    run: Run, finetune: list[str | Path], tmp_path: Path, good: int, bad: int, more: list[str]
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl.gz", [*pairs(good), *[BAD] * bad])
    code, out, err = run(*finetune, "--data", file, *more)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"minift: error: {file}:{good + 1}: not valid JSON")
    assert more or f"({bad} of {good + bad} records cannot be used, more than 1%)" in err
    assert not (tmp_path / "out").exists()


def test_no_bad_pair_is_borne_among_the_held_out(run: Run, finetune: list[str | Path], tmp_path: Path) -> None:
    data, test = write_jsonl(tmp_path / "x.jsonl", pairs(9)), write_jsonl(tmp_path / "y.jsonl", [*pairs(300), BAD])
    code, _, err = run(*finetune, "--data", data, "--test", test)
    assert code == 2
    assert err.startswith(f"minift: error: {test}:301: not valid JSON")


def pages(count: int) -> list[Any]:
    """Return pages: 200 of them have about 70 KB, more than the stream is read ahead."""
    return [{"text": f"Page {i} says that {i} comes after {i - 1}. " * 8} for i in range(count)]


@pytest.mark.parametrize("length", ["--epochs", "--steps"])
def test_pretraining_tolerates_one_per_cent(run: Run, pretrain: list[str | Path], tmp_path: Path, length: str) -> None:
    """How far the corpus is read ahead is not known here; but then so many must be bad that were put there so far."""
    bad = {3, 260}
    lines = [BAD if i in bad else page for i, page in enumerate(pages(300))]
    file = write_jsonl(tmp_path / "x.jsonl", lines)
    code, out, err = run(*pretrain, "--data", file, length, "1")
    assert code == 0, err
    printed = re.search(r"^([\d,]+) of ([\d,]+) records skipped:\n  (.*)$", out, re.MULTILINE)
    assert printed is not None, out
    skipped, records = (int(number.replace(",", "")) for number in printed.groups()[:2])
    assert skipped == sum(i % 300 in bad for i in range(records))
    assert records < 300 if length == "--steps" else 300 <= records < 600
    assert printed[3].startswith(f"{file}:4: not valid JSON")
    first = min(i for i in bad if i < records)  # both have the same fault, which is reported once
    assert [report.split(": ")[0] for report in reports(err.replace("\r", "\n"))] == [f"{file}:{first + 1}"]
    assert (tmp_path / "out" / "final" / "model.pt").is_file()


@pytest.mark.parametrize(("bad", "more"), [([3, 50, 280], []), ([280], ["--strict"])], ids=["too many", "strict"])
def test_pretraining_for_epochs_refuses_more_before_it_begins(
    run: Run, pretrain: list[str | Path], tmp_path: Path, bad: list[int], more: list[str]
) -> None:
    lines = [BAD if i in bad else page for i, page in enumerate(pages(290))]
    file = write_jsonl(tmp_path / "x.jsonl.zst", lines)
    code, _, err = run(*pretrain, "--data", file, "--epochs", "1", *more)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"minift: error: {file}:{bad[0] + 1}: not valid JSON")
    assert more or "(3 of 290 records cannot be used, more than 1%)" in err
    assert not (tmp_path / "out").exists()


def test_pretraining_for_steps_refuses_more_at_the_end_of_an_epoch(
    run: Run, pretrain: list[str | Path], tmp_path: Path
) -> None:
    lines = [BAD if i in (3, 50, 280) else page for i, page in enumerate(pages(290))]
    file = write_jsonl(tmp_path / "x.jsonl", lines)
    code, _, err = run(*pretrain, "--data", file, "--steps", "1000")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"minift: error: {file}:4: not valid JSON")
    assert "(3 of 290 records cannot be used, more than 1%)" in last
    taken = (tmp_path / "out" / "metrics.jsonl").read_text().count("\n")
    assert taken > 2
    assert (tmp_path / "out" / f"step_{taken:06d}").is_dir()


@pytest.mark.slow
def test_a_resumed_run_prints_the_same_count(run: Run, pretrain: list[str | Path], tmp_path: Path) -> None:
    lines = [BAD if i in (3, 150, 280) else page for i, page in enumerate(pages(300))]
    words = [
        *pretrain,
        "--data",
        write_jsonl(tmp_path / "x.jsonl", lines),
        "--steps",
        "80",
        "--save-every",
        "32",
        "--keep",
        "0",
    ]

    def count(out: str) -> list[str]:
        """Return the line with the number, and those of the first faults."""
        return out[out.rindex("\n", 0, out.index(" records skipped:")) :].split("saved:")[0].splitlines()[1:]

    code, whole, _ = run(*words)
    assert code == 0
    number = int(count(whole)[0].split()[0])
    assert number > 3  # it goes on into another epoch
    assert count(whole)[1:] == [count(whole)[1], f"  and {number - 1} more like it"]  # one reason, said once
    shutil.rmtree(tmp_path / "out" / "final")  # as if the run had been killed after its 32nd step
    shutil.rmtree(tmp_path / "out" / "step_000064")
    code, resumed, err = run("pretrain", "--resume", "--out", tmp_path / "out")
    assert code == 0, err
    assert "continues after step 32 of 80" in resumed
    assert count(resumed) == count(whole)


def test_the_commands_that_look_at_data(run: Run, tmp_path: Path) -> None:
    """`stats` reports all that is bad, however much; `peek` shows what comes before; `format` is as finetuning."""
    bad = [line for line, _ in BAD_LINES.values()]
    file = write_jsonl(tmp_path / "x.jsonl.gz", [*texts(*range(30)), *bad])
    code, out, _ = run("data", "stats", file, "--json", tmp_path / "stats.json")
    assert code == 0
    result = json.loads((tmp_path / "stats.json").read_text())
    assert (result["documents"], result["malformed"]) == (30, len(bad))
    assert [fault.split(": ")[0] for fault in result["first_malformed"]] == [f"{file}:{31 + i}" for i in range(SHOWN)]
    assert re.search(rf"^malformed +{len(bad)}$", out, re.MULTILINE)
    for fault in result["first_malformed"]:
        assert f"\n  {fault}\n" in out

    code, out, err = run("data", "peek", file, "-n", "40")
    assert code == 2
    assert out.count("  text: document ") == 30
    assert err.startswith(f"minift: error: {file}:31: not valid JSON")

    code, out, err = run("data", "format", write_jsonl(file, [*pairs(120), BAD]), "--template", "plain")
    assert code == 0
    assert reports(err)[0].startswith(f"{file}:121: not valid JSON")
    assert run("data", "format", write_jsonl(file, [*pairs(90), BAD]))[0] == 2


def test_statistics_of_nothing_but_faults(run: Run, tmp_path: Path) -> None:
    code, _, err = run("data", "stats", write_jsonl(tmp_path / "x.jsonl", [BAD, b"\xff"]))
    assert code == 2
    assert err.startswith(f"minift: error: {tmp_path / 'x.jsonl'}:1: not valid JSON")
    code, _, err = run("data", "stats", write_jsonl(tmp_path / "x.jsonl", [{"url": "a"}, {"text": " "}]))
    assert code == 2
    assert err.startswith(f"minift: error: {tmp_path / 'x.jsonl'}:1: no usable fields in ['url']")


def test_statistics_print_a_fault_on_one_line(run: Run, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"a\n\x1b[2J": "b"}, *texts(1, 2)])
    code, out, _ = run("data", "stats", file)
    assert code == 0
    assert "\x1b" not in out


def test_a_tokenizer_is_made_of_the_good_pages(run: Run, tmp_path: Path) -> None:
    words = ["tokenizer", "train", "--vocab-size", "290", "--out", tmp_path / "t.model", "--data"]
    code, _, err = run(*words, write_jsonl(tmp_path / "x.jsonl", [*pages(98), BAD]))
    assert code == 2
    assert "(1 of 99 records cannot be used, more than 1%)" in err.splitlines()[-1]
    assert not (tmp_path / "t.model").exists()
    code, _, err = run(*words, write_jsonl(tmp_path / "x.jsonl", [*pages(99), BAD]))
    assert code == 0
    assert reports(err)[0].startswith(f"{tmp_path / 'x.jsonl'}:100: ")
