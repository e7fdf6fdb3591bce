"""The files that people have: tables of every kind, arrays, other encodings, pipes, links, and files that are cut.

Held here: each gives the same records as JSON Lines; a fault costs the record that has it, or the file is refused; and
what is not UTF-8 is named with the option that reads it.
"""

import csv
import gzip
import io
import itertools
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.data.conversations import read_all_conversations, read_conversations
from minift.data.encodings import check_encoding, not_text
from minift.data.records import Record, Skipped, find_files, read_records, scan
from minift.data.stream import DocumentStream
from minift.data.tables import LONGEST, csv_rows
from minift.data.unpack import UnreadableError
from minift.errors import InputError
from tests.helpers import write_jsonl

PAIRS = [{"question": "Où est l'été; ici?", "answer": 'A "red" one'}, {"question": "B,\nC\t", "answer": "É"}]


def table(separator: str, index: str | None = None) -> str:
    """Return PAIRS as a table, which may have pandas' column of row numbers under the name `index`."""
    rows = [["question", "answer"], *([pair["question"], pair["answer"]] for pair in PAIRS)]
    if index is not None:
        rows = [[index, *rows[0]], *([str(i), *row] for i, row in enumerate(rows[1:]))]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue()


ARRAY = json.dumps(PAIRS, ensure_ascii=False)
FILES = {
    "comma.csv": table(","),
    "semicolon.csv": table(";"),
    "tab.csv": table("\t"),
    "x.tsv": table("\t"),
    "index.csv": table(",", ""),
    "unnamed.csv": table(";", "Unnamed: 0"),
    "quoted names.csv": table(";").replace("question;answer", '"question";"answer"'),
    "array.jsonl": ARRAY,
    "array.json": ARRAY,
    "data.json": f'{{ "data" :\n{json.dumps(PAIRS, indent=1, ensure_ascii=False)}}}\n',
    "one line.json": f'{{"data": {ARRAY}}}',
}


def texts(records: Any) -> list[dict[str, Any]]:
    return [{key: record.values[key] for key in ("question", "answer")} for record in records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("name", FILES)
def test_each_kind_in_each_encoding_gives_the_same_records(tmp_path: Path, name: str, encoding: str) -> None:
    for file, data in ((tmp_path / name, bytes), (tmp_path / f"{name}.gz", gzip.compress)):
        file.write_bytes(data(FILES[name].encode(encoding)))
        assert texts(read_records(file, check_encoding(encoding))) == PAIRS


@pytest.mark.parametrize("name", FILES)
def test_a_fifo_is_read_as_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    os.mkfifo(file)
    writer = threading.Thread(target=lambda: file.write_text(FILES[name], newline=""), daemon=True)
    writer.start()
    assert texts(read_records(file)) == PAIRS
    writer.join(60)
    assert not writer.is_alive()


def test_a_separator_is_sure_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("question;answer,note\n1;2,3\n")
    (fault,) = scan(file)
    assert str(fault).startswith(f"{file}:1: the first row holds ',' and ';', so it is not sure what separates")
    file.write_text('"question;a",answer\n1,2\n')
    assert [record.values for record in read_records(file)] == [{"question;a": "1", "answer": "2"}]


def test_an_array_in_data_is_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"data": [{"question": "Q", "answer": "A"}],\n"version": 1}')
    *_, fault = scan(file)
    assert str(fault).startswith(f"{file}:1: another key follows the array 'data'")
    file.write_text('{"data": ["a"], "text": "b"}\n')  # JSON Lines whose record has a key of this name
    assert [record.values["text"] for record in read_records(file)] == ["b"]


def test_a_first_line_that_holds_a_list_costs_that_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('["a"]\n{"question": "Q", "answer": "A"}\n')
    fault, record = scan(file)
    assert str(fault) == f"{file}:1: holds list, not a JSON object"
    assert isinstance(record, Record)


# Encodings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("encoding", "seen"), [("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252")])
def test_the_error_names_the_encoding_that_reads_it(tmp_path: Path, name: str, encoding: str, seen: str) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[name].encode(encoding))
    fault = next(item for item in scan(file) if isinstance(item, InputError))
    assert f": not UTF-8 text; it looks like {seen}: --encoding {seen} would read it" in str(fault)
    assert texts(read_records(file, seen)) == PAIRS


@pytest.mark.parametrize(
    "content", [b"caf\xc3", b"ab\xff", "é".encode() + b"\xe9", "Привет".encode("cp1251"), b"\x81 a", b"\xed\xa0\xbd"]
)
def test_what_does_not_look_like_another_encoding_is_not_guessed(content: bytes) -> None:
    assert not_text(content) == "not UTF-8 text"


def test_bytes_outside_the_encoding_cost_one_record(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(b"question,answer\n1,\xe9\n2,\x81\n3,c\n")
    first, fault, last = scan(file, "cp1252")
    assert isinstance(first, Record)
    assert first.values["answer"] == "é"
    assert str(fault) == f"{file}:3: not cp1252 text"
    assert isinstance(last, Record)
    file.write_text("question,answer\n1,é\n", encoding="utf-8")
    assert str(next(iter(scan(file, "ascii")))) == f"{file}:2: not ascii text"
    file.write_bytes("question,answer\n1,2\n".encode("utf-16")[:-1])
    *_, cut = scan(file, "utf-16")
    assert isinstance(cut, UnreadableError)
    assert ": not utf-16 text" in str(cut)


def test_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "Où?", "answer": "Là"}\n', encoding="cp1252")
    assert main(["data", "peek", str(file)]) == 2
    assert capsys.readouterr().err.rstrip().endswith("--encoding cp1252 would read it")
    assert main(["data", "peek", str(file), "--encoding", "Windows-1252"]) == 0
    assert "question: Où?" in capsys.readouterr().out
    for name in ("no-such", "hex", "a\0b"):
        assert main(["data", "peek", str(file), "--encoding", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not an encoding that Python knows; try utf-8, utf-16 or cp1252" in line


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_pages_in_another_encoding_go_on_after_any_document(tmp_path: Path, shuffle_buffer: int) -> None:
    lines = "".join(json.dumps({"text": f"{i} é"}, ensure_ascii=False) + "\n" for i in range(12))
    for name, encoding in (("a.jsonl", "utf-8"), ("b.jsonl", "utf-16"), ("c.jsonl.gz", "utf-16")):
        data = lines.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    def stream(name: str, encoding: str) -> DocumentStream:
        return DocumentStream([tmp_path / name], epochs=2, shuffle_buffer=shuffle_buffer, encoding=encoding)

    expected = list(stream("a.jsonl", "utf-8"))
    for name in ("b.jsonl", "c.jsonl.gz"):
        for taken in range(len(expected)):
            begun, resumed = stream(name, "utf-16"), stream(name, "utf-16")
            assert list(itertools.islice(begun, taken)) == expected[:taken]
            resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
            assert list(resumed) == expected[taken:]
    with pytest.raises(InputError, match="saved with encoding utf-16, and now it is utf-8"):
        stream("b.jsonl", "utf-8").load_state_dict(stream("b.jsonl", "utf-16").state_dict())


# Loss -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_bad_byte_costs_its_record_alone(tmp_path: Path, kind: str) -> None:
    rows = [{"question": f"Question {i}?", "answer": "x" * 100} for i in range(200)]
    file = tmp_path / f"x.{kind}"
    lines = [json.dumps(row) for row in rows] if kind == "json" else [f"{r['question']},{r['answer']}" for r in rows]
    lines[149] = lines[149].replace("150", "").replace("149", "\udcff")
    text = "[" + ",\n".join(lines) + "]" if kind == "json" else "question,answer\n" + "\n".join(lines) + "\n"
    file.write_bytes(text.encode(errors="surrogateescape"))
    skipped = Skipped(quiet=True)
    assert len(read_conversations(file, skipped)) == 199
    assert (skipped.skipped, skipped.records) == (1, 200)
    assert skipped.first == [f"{file}:{150 + (kind == 'csv')}: not UTF-8 text"]


def _unclosed(file: Path) -> None:
    rows = [f"Q{i},A" for i in range(300)]
    rows[200] = '"Q,A'
    file.write_text("question,answer\n" + "\n".join(rows) + "\n")


def _closed_later(file: Path) -> None:
    rows = [f"Q{i},A" for i in range(300)]
    rows[200], rows[220] = '"Q,A', '"Q",A'
    file.write_text("question,answer\n" + "\n".join(rows) + "\n")


def _cut(file: Path) -> None:
    lines = b"".join(b'{"question": "%d", "answer": "A"}\n' % i for i in range(100_000))
    packed = gzip.compress(lines)
    file.write_bytes(packed[: len(packed) // 2])


def _broken(file: Path) -> None:
    items = [json.dumps({"question": str(i), "answer": "A"}) for i in range(300)]
    items[200] = '{"question": "Q",\n "answer": tru}'
    file.write_text("[" + ",\n".join(items) + "]")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.csv", _unclosed, "202: not valid CSV: unexpected end of data: a quotation mark is not closed"),
        ("x.csv", _closed_later, "202: not valid CSV: ',' expected after '\"': a quotation mark is not closed"),
        ("x.jsonl.gz", _cut, ""),
        ("x.json", _broken, "202: not valid JSON: Expecting value; the records after it cannot be read"),
    ],
)
def test_pairs_that_cannot_be_read_to_their_end_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, write: Callable[[Path], None], message: str
) -> None:
    """However few of the records that could be read are bad: how many are lost is not known."""
    file = tmp_path / name
    write(file)
    with pytest.raises(UnreadableError) as caught:
        read_all_conversations([file], Skipped(quiet=True))
    assert str(caught.value).startswith(f"{file}:{message}")
    assert "damaged gzip data" in str(caught.value) or message
    assert main(["data", "stats", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_rest_of_a_cut_file_of_pages_is_no_single_record(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(500)])
    bad = tmp_path / "b.jsonl.gz"
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100_000)))
    bad.write_bytes(packed[: len(packed) // 2])
    skipped = Skipped(quiet=True)
    stream = DocumentStream([good, bad], epochs=2, skipped=skipped)
    begun = iter(stream)
    read = sum(1 for _ in begun)
    assert str(skipped).splitlines()[0] == (
        f"2 of {read + 2:,} records skipped, and the rest of 1 file that cannot be read to the end:"
    )
    assert skipped.first[0].endswith("; the rest of the file is not read, and how much it is not known")
    assert Skipped(**json.loads(json.dumps(stream.state_dict()))["skipped"]) == Skipped(
        records=skipped.records, skipped=2, first=skipped.first, unread=[str(bad)]
    )


def test_a_faulty_row_of_one_line_costs_that_row(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('question,answer\n\n"a\nb\n\nc",1\n"x"y,2\n\nlast,3\n')
    items = list(scan(file))
    assert [item.line if isinstance(item, Record) else str(item) for item in items] == [
        3,
        f"{file}:7: not valid CSV: ',' expected after '\"'",
        9,
    ]


def test_cells_are_as_long_as_lines_of_json_may_be() -> None:
    def rows(cell: bytes) -> list[Any]:
        return list(csv_rows(io.BytesIO(b"a,b\n1," + cell + b"\n2,y\n"), "x.csv"))

    assert [len(values["b"]) for _, values in rows(b"x" * LONGEST)] == [LONGEST, 1]
    fault, last = rows(b"x" * (LONGEST + 1))
    assert str(fault).startswith("x.csv:2: not valid CSV: field larger than field limit")
    assert last == (3, {"a": "2", "b": "y"})


def test_an_unclosed_quotation_mark_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minift.data.tables.LONGEST", 100_000)
    file = io.BytesIO(b'a,b\n1,"' + b"x\n" * 10_000_000)
    tracemalloc.start()
    with pytest.raises(UnreadableError, match=r"^x\.csv:2: not valid CSV: a row of more than 200,000 characters"):
        list(csv_rows(file, "x.csv"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


# Files that are reached twice, and pipes ------------------------------------------------------------------------------


def test_a_file_reached_twice_is_read_once_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q", "answer": "A"}])
    (tmp_path / "b.jsonl").symlink_to(a)
    os.link(a, tmp_path / "c.jsonl")
    other = write_jsonl(tmp_path / "d.jsonl", [{"question": "Q", "answer": "A"}])  # equal, but another file
    said: list[str] = []
    assert find_files([tmp_path, a], said.append) == [a, other]
    assert said == [f"read once: {tmp_path / 'b.jsonl'} is the same file as {a}, and 2 more like it"]
    assert main(["data", "stats", str(a), str(a)]) == 0
    assert capsys.readouterr().err == f"read once: {a} is named twice\n"
    assert find_files([a, other], said.append) == [a, other]
    assert len(said) == 1


def test_a_fifo_of_pages(tmp_path: Path) -> None:
    """It needs no known suffix, may be packed, and is read once: as standard input is."""
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    pages = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    writer = threading.Thread(target=lambda: fifo.write_bytes(pages), daemon=True)
    writer.start()
    stream = iter(DocumentStream([fifo]))
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(InputError, match=rf"^{fifo} ended after 2 documents, and cannot be read again$"):
        next(stream)
    writer.join(60)
    assert not writer.is_alive()
    with pytest.raises(InputError, match=rf"^{fifo}: a pipe can be read only once$"):
        find_files([fifo, fifo])


# Standard input, which has no name ------------------------------------------------------------------------------------


def stdin_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))  # type: ignore[type-var]


@pytest.mark.parametrize("packing", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"], ids=["", "mark", "blank lines"])
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("data", "one line"))])
def test_standard_input_is_read_as_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, name: str, start: str, packing: Callable[[bytes], bytes]
) -> None:
    stdin_of(packing((start + FILES[name]).encode()), monkeypatch)
    assert texts(read_records("-")) == PAIRS


def test_a_pipe_without_a_suffix_is_read_as_standard_input_is(tmp_path: Path) -> None:
    file = tmp_path / "63"  # as <(…) of a shell makes them
    os.mkfifo(file)
    writer = threading.Thread(target=lambda: file.write_text(FILES["semicolon.csv"], newline=""), daemon=True)
    writer.start()
    assert texts(read_records(file)) == PAIRS
    writer.join(60)
    assert not writer.is_alive()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Hello there\n", "not valid JSON: Expecting value at column 1 (what has no name with a suffix"),
        ("question;a,b\nq;a,b\n", "not valid JSON: Expecting value at column 1 (what has no name with a suffix"),
        ('{"question": \n', "not valid JSON: Expecting value at column 1"),
        ("PAR1\0\0", "holds Parquet or Arrow, which is read from files: .parquet, .arrow"),
    ],
)
def test_what_standard_input_may_hold_is_said(monkeypatch: pytest.MonkeyPatch, content: str, reason: str) -> None:
    stdin_of(content.encode(), monkeypatch)
    fault = next(iter(scan("-")))
    assert reason in str(fault)
    assert ("what has no name" in str(fault)) == ("what has no name" in reason)


def test_pairs_of_a_table_on_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin_of(FILES["comma.csv"].encode(), monkeypatch)
    assert main(["data", "format", "-", "--template", "qa", "-n", "2"]) == 0
    assert capsys.readouterr().out.count("### Answer:") == 2
