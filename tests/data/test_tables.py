"""A CSV table and a JSON array give the records that Python's own readers find in them, in bounded memory.

Held here: the line of each record; every broken text ends in one error that says where; and pages are not tables. That
any values come out as `json.loads` and `csv.DictReader` find them is held in `data/test_tables_at_random.py`.
"""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest

from minift.data import tables
from minift.data.conversations import read_conversations
from minift.data.records import Record, read_records, scan
from minift.data.stream import DocumentStream
from minift.data.tables import array_items
from minift.errors import InputError

PAIRS = [{"question": "Name a fruit.", "answer": "Apple."}, {"question": "A colour, please:\n", "answer": 'Say "red".'}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "1: not valid JSON: ends where an object is expected"),
        ('[\n{"a": 1},\n', "3: not valid JSON: ends where an object is expected"),
        ('[{"a": 1}', "1: not valid JSON: ends where ',' is expected"),
        ('[{"a": 1} {"b": 2}]', "1: not valid JSON: ',' expected, '{' found"),
        ('[{"a": 1},]', "1: not valid JSON: an object expected, ']' found"),
        ('[\n{"a": 1},\n\n7]', "4: not valid JSON: an object expected, '7' found"),
        ('[{"a": 1},\n{"b": tru}]', "2: not valid JSON: Expecting value"),
        ('[{"a": 1}]\n[]', "2: not valid JSON: something follows the array"),
        ("[" + '{"a":' * 100_000, "1: not valid JSON: nested too deeply"),
    ],
)
def test_a_broken_array(tmp_path: Path, text: str, message: str) -> None:
    """The message is one line, with the place; complete objects before it have been yielded."""
    file = tmp_path / "x.json"
    file.write_text(text)
    *whole, fault = scan(file)
    assert isinstance(fault, InputError)
    assert str(fault).startswith(f"{file}:{message}")
    assert all(isinstance(record, Record) and record.values == {"a": 1} for record in whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2,3\n4,5\n", "2: 3 values in a table of 2 columns"),
        (b"a,b\n1\n", "2: 1 values in a table of 2 columns"),
        (b"a,a\n1,2\n", "1: the first row must name each column, once: a, a"),
        (b"a,\n1,2\n", "1: the first row must name each column, once: a, "),
        (
            b'a,b\n"1,2\n',
            "2: not valid CSV: unexpected end of data: a quotation mark is not closed where its cell ends; "
            "the rows after it cannot be read",
        ),
        (b'a,b\n"1"x,2\n', "2: not valid CSV: ',' expected after '\"'"),
        (b"a,b\n\xff,2\n", "2: not UTF-8 text"),
    ],
)
def test_a_broken_table(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_records(file))
    assert str(caught.value) == f"{file}:{message}"


def test_a_row_after_a_bad_one_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('question,answer\nonly one\n"two\nlines",yes\n')
    fault, record = scan(file)
    assert isinstance(fault, InputError)
    assert isinstance(record, Record)
    assert (record.values, record.where) == ({"question": "two\nlines", "answer": "yes"}, f"{file}:3")


def test_pairs_are_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (tmp_path / "b.json").write_text(json.dumps(PAIRS, indent=4))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(PAIRS).encode()))
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet saves it
        table = csv.DictWriter(file, ["question", "answer"])
        table.writeheader()
        table.writerows(PAIRS)
    found = {
        name: [(pair.question, pair.answer) for pair in read_conversations(tmp_path / name)]
        for name in ("a.jsonl", "b.json", "c.json.gz", "d.csv")
    }
    assert set(map(tuple, found.values())) == {(("Name a fruit.", "Apple."), (PAIRS[1]["question"], 'Say "red".'))}


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    """As C4's shards are."""
    file = tmp_path / "x.json"
    file.write_text('{"question": "Q", "answer": "A"}\n')
    assert len(read_conversations(file)) == 1


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('[{"question": "\\ud83d", "answer": "A"}]')
    with pytest.raises(InputError, match=r"x\.json:1: not Unicode text"):
        list(read_records(file))


def test_an_array_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is an object and a block, not the file; and an object that never ends is given up."""
    text = json.dumps([{"question": "Q" * 1_000, "answer": "A"}] * 5_000).encode()  # 5 MB
    file = io.BytesIO(text)
    tracemalloc.start()
    count = sum(1 for _ in array_items(file, "x.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 1_000_000
    monkeypatch.setattr(tables, "LONGEST", 100_000)
    endless = io.BytesIO(b'[{"a": "' + b"x" * 10_000_000)
    with pytest.raises(InputError, match="1: not valid JSON: not an object within 100,000 characters"):
        list(array_items(endless, "x.json"))
    assert endless.tell() < 1_000_000


def test_pages_are_not_tables(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\nA page.\n")
    with pytest.raises(
        InputError, match=r"x\.csv: a table, of pairs perhaps; pages are JSON Lines, text, Parquet or Arrow"
    ):
        DocumentStream([tmp_path / "x.csv"])
    (tmp_path / "x.json").write_text('[\n{"text": "A page."}]')
    with pytest.raises(InputError, match=r"only a file of pairs may be an array"):
        next(iter(DocumentStream([tmp_path / "x.json"])))
