"""Parquet, Arrow and folders that `datasets` has saved give what JSON Lines give: the same records, in the same order.

Held here, against pyarrow's own reading and against JSON Lines of the same records: values, the order over shards,
workers, ranks and kills, resuming from any document, bounded memory, a quick start after a million rows, and refusals
in one line.
"""

import base64
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minift.cli import main
from minift.data import columns, stream
from minift.data.batches import PageBatches
from minift.data.conversations import read_conversations
from minift.data.records import Record, Skipped, find_files, read_records, scan
from minift.data.stream import DocumentStream
from minift.data.unpack import UnreadableError
from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from tests.helpers import ROOT, SMALL, completed, soon_done, write_jsonl

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_columns(path: Path, table: Any, rows: int = 7, **options: Any) -> Path:
    """Write a table in groups of that many rows, as Parquet, or Arrow with an index if the name says so."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows, **options)
        return path
    new = pa.ipc.new_file if "index" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, max_chunksize=rows)
    return path


KINDS = ("x.parquet", "x.arrow", "index.arrow")
each_kind = pytest.mark.parametrize("name", KINDS)
PACKED = [(name, packing) for name in KINDS for packing in (None, "zstd", "lz4")] + [("x.parquet", "snappy")]
RECORDS = [
    {
        "question": f"Où {i}?\n",
        "answer": "A" * i,
        "system": None if i % 3 else "S",
        "id": i,
        "parts": [{"role": "user", "content": "é" * i}, {"role": "assistant", "content": None}][: i % 3],
    }
    for i in range(20)
]


def values(path: Path) -> list[dict[str, Any]]:
    return [record.values for record in read_records(path)]


# Records --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "packing"), PACKED)
def test_records_are_those_of_json_lines(tmp_path: Path, name: str, packing: str | None) -> None:
    table = pa.Table.from_pylist(RECORDS)
    file = write_columns(tmp_path / name, table, compression=packing or ("none" if "parquet" in name else None))
    assert values(file) == table.to_pylist() == values(write_jsonl(tmp_path / "x.jsonl", RECORDS))
    assert [record.where for record in read_records(file)] == [f"{file}:{i}" for i in range(1, 21)]
    pairs = read_conversations(file)
    assert [pair.answer for pair in pairs[:3]] == ["", "A", "AA"]
    assert list(map(vars_without_place, pairs)) == list(
        map(vars_without_place, read_conversations(tmp_path / "x.jsonl"))
    )


def vars_without_place(pair: Any) -> dict[str, Any]:
    return {**vars(pair), "where": ""}


TEXTS = ["one", "", None, "É" * 30, "a text too long for a view"]


@each_kind
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_texts_may_be_stored_in_any_way(tmp_path: Path, name: str, kind: str) -> None:
    column = pa.array(TEXTS)
    try:
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
        nested = pa.StructArray.from_arrays([column], "t")
        file = write_columns(tmp_path / name, pa.table({"text": column, "nested": nested}))
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"pyarrow {pa.__version__}: {error}")
    assert [value["text"] for value in values(file)] == TEXTS
    assert [value["nested"]["t"] for value in values(file)] == TEXTS
    skipped = Skipped()
    with pytest.raises(InputError, match=r"2 of 5 records cannot be used"):
        list(DocumentStream([file], epochs=1, skipped=skipped))
    assert skipped.first == [f"{file}:2: the text is empty", f"{file}:3: no text under 'text'; its keys: text"]


@each_kind
def test_types_that_json_does_not_have_are_shown(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table(
        {
            "question": ["Q"],
            "answer": pa.array([b"\xff\xd8\0"]),
            "when": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
            "took": pa.array([5], pa.duration("ns")),
            "price": pa.array(["1.25"]).cast(pa.decimal128(5, 2)),
            "scan": [{"bytes": b"\x89PNG", "at": [1, None]}],
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "nothing": pa.nulls(1),
            "half": pa.array([np.float16(0.5)]),
        }
    )
    file = write_columns(tmp_path / name, table)
    (record,) = values(file)
    assert json.loads(json.dumps(record)) == record
    assert record["when"].startswith("2023-11-14 22:13:20.123456789")
    assert (record["price"], record["half"], record["nothing"]) == (1.25, 0.5, None)
    assert record["scan"] == {"bytes": {"bytes": 4}, "at": [1, None]}
    with pytest.raises(InputError, match=rf"{name}:1: 'answer' is Bytes, not a text"):
        read_conversations(file)
    assert main(["data", "peek", str(file)]) == 0
    assert '  answer: {"bytes": 3}\n' in capsys.readouterr().out


@each_kind
def test_a_text_that_is_not_unicode_costs_its_record(tmp_path: Path, name: str) -> None:
    contents = [b"one", b"caf\xe9", "é".encode(), b"four"]
    offsets = [0]
    for content in contents:
        offsets.append(offsets[-1] + len(content))
    buffers = [None, pa.array(offsets, pa.int32()).buffers()[1], pa.py_buffer(b"".join(contents))]
    file = write_columns(tmp_path / name, pa.table({"text": pa.StringArray.from_buffers(4, *buffers[1:])}))
    first, fault, third, _ = scan(file)
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    assert third.values == {"text": "é"}
    assert str(fault).startswith(f"{file}:2: 'text': not UTF-8 text")
    assert not isinstance(fault, UnreadableError)
    skipped = Skipped(quiet=True)
    documents = DocumentStream([file], epochs=1, skipped=skipped)
    with pytest.raises(InputError, match=rf"{name}:2: not UTF-8 text.* \(1 of 4 records cannot be used"):
        list(documents)


# One order ------------------------------------------------------------------------------------------------------------


PAGES = [f"No. {i} " + "word " * (i * 7 % 23) for i in range(60)]
SHARDS = [PAGES[:25], PAGES[25:28], PAGES[28:57], PAGES[57:]]


def write_pages(folder: Path, kind: str, rows: int = 4, shards: Sequence[Sequence[str]] = SHARDS) -> list[Path]:
    """Write the pages as shards of one kind; with other columns, where it has columns."""
    folder.mkdir(exist_ok=True)
    files = []
    for i, texts in enumerate(shards):
        path = folder / f"{i:02d}-{kind}"
        if kind == "x.jsonl":
            files.append(write_jsonl(path, [{"text": text} for text in texts]))
        else:
            files.append(write_columns(path, pa.table({"id": range(len(texts)), "text": texts}), rows))
    return files


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read three rows at once, and three shards at a time."""
    monkeypatch.setattr(columns, "BATCH_ROWS", 3)
    monkeypatch.setattr(stream, "OPEN_SHARDS", 3)


@each_kind
@pytest.mark.usefixtures("small_batches")
def test_the_order_is_that_of_json_lines(tmp_path: Path, name: str) -> None:
    lines = write_pages(tmp_path / "lines", "x.jsonl")
    files = write_pages(tmp_path / "columns", name)
    for seed in range(3):
        for buffer in (0, 1, 5, 1_000):
            ours, theirs = (DocumentStream(f, "text", 3, seed, buffer) for f in (files, lines))
            assert list(ours) == list(theirs)


@each_kind
@pytest.mark.parametrize(("workers", "world"), [(0, 2), (2, 1), (1, 4)])
@pytest.mark.usefixtures("small_batches")
def test_workers_and_ranks_change_no_batch(
    tmp_path: Path, tokenizer: Tokenizer, name: str, workers: int, world: int
) -> None:
    lines, files = write_pages(tmp_path / "lines", "x.jsonl"), write_pages(tmp_path / "columns", name)

    def batches(files: list[Path], workers: int, rank: int, world: int) -> list[torch.Tensor]:
        documents = DocumentStream(files, seed=2, shuffle_buffer=7)
        made = PageBatches(documents, tokenizer, 4, 13, False, workers, rank, world)
        return [batch.tokens for batch in islice(made, 12)]

    expected = batches(lines, 0, 0, 1)
    ranks = [batches(files, workers, rank, world) for rank in range(world)]
    for whole, *parts in zip(expected, *ranks, strict=True):
        assert torch.equal(whole, torch.cat(parts))


@each_kind
@pytest.mark.parametrize("buffer", [0, 1, 6, 1_000])
@pytest.mark.usefixtures("small_batches")
def test_a_run_goes_on_from_any_document(tmp_path: Path, name: str, buffer: int) -> None:
    files = write_pages(tmp_path / "columns", name)
    documents = DocumentStream(files, epochs=2, seed=1, shuffle_buffer=buffer)
    states = [documents.state_dict()]
    order = []
    for text in documents:
        order.append(text)
        states.append(json.loads(json.dumps(documents.state_dict())))
    assert sorted(order) == sorted(PAGES * 2)
    for taken, state in enumerate(states):
        resumed = DocumentStream(files, epochs=2, seed=1, shuffle_buffer=buffer)
        resumed.load_state_dict(state)
        assert list(islice(resumed, 12)) == order[taken : taken + 12]
        again = json.loads(json.dumps(resumed.state_dict()))
        assert taken + 12 > len(order) or again["buffer"] == states[taken + 12]["buffer"]


def test_a_state_does_not_depend_on_the_size_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_pages(tmp_path / "columns", "x.parquet", rows=20)
    for saved, now in ((3, 8), (8, 3)):
        monkeypatch.setattr(columns, "BATCH_ROWS", saved)
        documents = DocumentStream(files, epochs=1, shuffle_buffer=5)
        list(islice(documents, 17))
        state, rest = documents.state_dict(), list(documents)
        monkeypatch.setattr(columns, "BATCH_ROWS", now)
        resumed = DocumentStream(files, epochs=1, shuffle_buffer=5)
        resumed.load_state_dict(state)
        assert list(resumed) == rest


READER = """
import json, sys
from minift.data.stream import DocumentStream
documents = DocumentStream(sys.argv[1].split(","), epochs=2, seed=4, shuffle_buffer=6)
if len(sys.argv) > 2:
    documents.load_state_dict(json.loads(sys.argv[2]))
for text in documents:
    print(json.dumps([text, documents.state_dict()]), flush=True)
"""


@each_kind
def test_a_killed_process_is_continued_by_another(tmp_path: Path, name: str) -> None:
    files = write_pages(tmp_path / "columns", name)
    words = [sys.executable, "-c", READER, ",".join(map(str, files))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    expected = list(DocumentStream(files, epochs=2, seed=4, shuffle_buffer=6))
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(41)]
        process.send_signal(signal.SIGKILL)
    rest = completed([*words, json.dumps(lines[-1][1])], env=env, check=True)
    given = [text for text, _ in lines] + [json.loads(line)[0] for line in rest.stdout.splitlines()]
    assert given == expected


# Files that are others ------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("buffer", [0, 9])
def test_a_changed_file_is_noticed(tmp_path: Path, name: str, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where size and both ends are the same: here, in the batch that was read last."""
    monkeypatch.setattr(stream, "_SAMPLE", 8)
    texts = [f"text {i:04d}" for i in range(40)]
    options = {"use_dictionary": False, "write_statistics": False, "compression": "none"} if "parquet" in name else {}

    def write(changed: int | None = None) -> Path:
        column = ["TEXT" + text[4:] if i == changed else text for i, text in enumerate(texts)]
        return write_columns(tmp_path / name, pa.table({"text": column}), 20, **options)

    def resumed(state: dict[str, Any]) -> list[str]:
        documents = DocumentStream([tmp_path / name], epochs=1, shuffle_buffer=buffer)
        documents.load_state_dict(state)
        return list(documents)

    documents = DocumentStream([write()], epochs=1, shuffle_buffer=buffer)
    given = list(islice(documents, 27))
    state = documents.state_dict()
    assert sorted(given + resumed(state)) == texts
    write(25)  # in the batch
    with pytest.raises(InputError, match=rf"{name}.*: the data has changed since the run was saved"):
        resumed(state)
    texts.append("text more")
    write()
    with pytest.raises(InputError, match=rf"{name}: the data has changed since the run was saved"):
        resumed(state)


def test_an_epoch_that_is_another_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fingerprint", lambda file: {"name": file.name})
    file = write_columns(tmp_path / "x.arrow", pa.table({"text": ["a", "b", "c"]}))
    documents = iter(DocumentStream([file], epochs=None))
    assert list(islice(documents, 3)) == ["a", "b", "c"]
    write_columns(tmp_path / "other.arrow", pa.table({"text": ["a", "B", "c"]})).replace(file)
    with pytest.raises(InputError, match=r"x\.arrow: the file has been changed during the run"):
        list(islice(documents, 4))


# Refusals -------------------------------------------------------------------------------------------------------------


@each_kind
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    content = write_columns(tmp_path / name, pa.table({"text": PAGES}), 20).read_bytes()
    cut = tmp_path / f"cut-{name}"
    for size in (0, 1, 5, 9, len(content) // 3, len(content) // 2, len(content) - 8, len(content) - 1):
        cut.write_bytes(content[:size])
        *_, fault = scan(cut)
        assert isinstance(fault, UnreadableError)
        assert str(fault).startswith(f"{cut}:")
        assert "\n" not in str(fault)
    for tail in (b"\0", content) if name == "x.arrow" else ():  # two streams, one after the other
        cut.write_bytes(content + tail)
        *records, fault = scan(cut)
        assert len(records) == 60
        assert f"{len(tail):,} bytes come after the end of its stream" in str(fault)


SCANNER = """
import sys
from pathlib import Path
from minift.data.records import Record, Skipped, scan
from minift.data.stream import DocumentStream
from minift.errors import InputError
for path in sorted(Path(sys.argv[1]).iterdir()):
    items = list(scan(path))
    assert all(isinstance(item, Record) or "\\n" not in str(item) for item in items)
    try:
        list(DocumentStream([path], epochs=1, skipped=Skipped(quiet=True)))
    except InputError as error:
        assert str(path) in str(error), error
    print(path.name)
"""


@each_kind
def test_damage_ends_in_a_fault_and_never_the_process(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    table = pa.Table.from_pylist([{**row, "text": f"é {i}", "packed": "abc"[i % 3]} for i, row in enumerate(RECORDS)])
    table = table.set_column(6, "packed", table["packed"].dictionary_encode())
    good = write_columns(tmp_path / name, table).read_bytes()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for i in range(150):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):  # most of them in the descriptions, at both ends
            place = rng.choice((rng.randrange(len(good)), rng.randrange(900), len(good) - 1 - rng.randrange(2_500)))
            content[place] = rng.choice((rng.randrange(256), 0, 255, content[place] ^ 1 << rng.randrange(8)))
        (folder / f"{i:03d}-{name}").write_bytes(content)
    words = [sys.executable, "-c", SCANNER, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = completed(words, env=env)
    assert (found.returncode, found.stderr) == (0, "")
    assert len(found.stdout.split()) == 150


def test_records_after_a_damaged_group_are_counted_as_lost(tmp_path: Path) -> None:
    """Parquet tells how many it holds, so the share of records that cannot be used is known, and is too large."""
    options = {"compression": "zstd", "use_dictionary": False}
    good = write_columns(
        tmp_path / "a.parquet", pa.table({"text": [f"page {i}" for i in range(3_000)]}), 300, **options
    )
    content = bytearray(good.read_bytes())
    place = pq.ParquetFile(good).metadata.row_group(5).column(0).data_page_offset + 40
    content[place : place + 20] = b"\xaa" * 20
    (tmp_path / "b.parquet").write_bytes(content)
    skipped = Skipped(quiet=True)
    with pytest.raises(InputError, match=r"b\.parquet:1501: cannot be read: .*1,500 of 6,000 records"):
        list(DocumentStream([tmp_path], epochs=1, skipped=skipped))
    assert skipped.unread == []


@each_kind
def test_a_column_that_is_no_text_is_refused_with_the_names(tmp_path: Path, name: str) -> None:
    file = write_columns(tmp_path / name, pa.table({"id": [1], "body": ["b"]}))
    with pytest.raises(InputError, match=rf"{name}: no column 'text'; its columns: id, body \(--text-field names"):
        next(iter(DocumentStream([file], skipped=Skipped())))
    with pytest.raises(InputError, match=rf"{name}: the column 'id' is int64, not text; its columns: id, body"):
        next(iter(DocumentStream([file], "id", skipped=Skipped())))
    assert list(DocumentStream([file], "body", epochs=1)) == ["b"]


@each_kind
def test_other_refusals(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_columns(tmp_path / name, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]))
    assert str(*scan(file)) == f"{file}: 2 columns have the name 'text'"
    write_columns(file, pa.table({"text": ["a"]}))
    (fault,) = scan(file, "cp1252")
    assert "always in UTF-8; leave out --encoding cp1252" in str(fault)
    fifo = tmp_path / f"fifo-{name}"
    os.mkfifo(fifo)
    (fault,) = scan(fifo)
    assert str(fault) == f"{fifo}: a pipe; Parquet and Arrow are read from files"
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(InputError, match=rf"{name} needs the package pyarrow: pip install pyarrow .*minift\[arrow\]"):
        find_files([file])


@pytest.mark.parametrize("name", ["x.arrow", "index.arrow"])
def test_a_file_that_is_cut_while_it_is_read_ends_no_process(tmp_path: Path, name: str) -> None:
    """It is mapped into memory, so reading what is gone would be a signal, not an error."""
    file = write_columns(tmp_path / name, pa.table({"text": ["x" * 10**5] * 100}), 50)
    items = scan(file)
    next(items)
    os.truncate(file, 10**6)
    *_, fault = items
    assert str(fault).startswith(f"{file}:")
    assert str(fault).endswith(": has become shorter while it was read")


@pytest.mark.parametrize("hidden", [False, True], ids=["columns only", "all"])
def test_an_encrypted_file_is_called_so(tmp_path: Path, hidden: bool) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[misc, name-defined]
        def wrap_key(self, key: bytes, master: str) -> bytes:
            return base64.b64encode(key)

        def unwrap_key(self, wrapped: bytes, master: str) -> bytes:
            return base64.b64decode(wrapped)

    names = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=not hidden)
    factory = encryption.CryptoFactory(lambda connection: Keys())
    options = factory.file_encryption_properties(encryption.KmsConnectionConfig(), names)
    table = pa.table({"text": ["a", "b"]})
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema, encryption_properties=options) as out:
        out.write_table(table)
    (fault,) = scan(tmp_path / "x.parquet")
    assert str(fault).endswith(": cannot be read: it is encrypted; write it without encryption")


def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    code = "import sys; from minift.data.stream import DocumentStream; from minift.data.survey import survey\n"
    code += "print(list(DocumentStream([sys.argv[1]], epochs=1)), 'pyarrow' in sys.modules)"
    words = [sys.executable, "-c", code, str(file)]
    found = completed(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert found.stdout == "['a'] False\n"


# Saved data sets ------------------------------------------------------------------------------------------------------


def save(folder: Path, parts: Sequence[Sequence[str]] = (["a", "b"], ["c"]), **state: Any) -> Path:
    """Write the layout of `Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        write_columns(folder / name, pa.table({"text": texts}))
    (folder / "dataset_info.json").write_text("{}")
    entries = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": entries, "_split": "train", **state}))
    return folder


def test_a_saved_folder_is_read_in_its_order(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    write_columns(folder / "cache-1.arrow", pa.table({"text": ["not of the data set"]}))
    assert list(DocumentStream([folder], epochs=1)) == ["a", "b", "c"]
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"][::-1]}))
    assert list(DocumentStream([folder], epochs=1)) == ["c", "a", "b"]


def test_a_saved_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    both = tmp_path / "both"
    for split in ("train", "test"):
        save(both / split)
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"both: holds the splits train, test; give one of them, as .*both/train$"):
        find_files([both])
    (tmp_path / "outside.arrow").write_bytes(b"")
    for filename in ("../outside.arrow", "state.json", None, "data-9.arrow"):
        folder = save(tmp_path / f"wrong-{str(filename)[-8:-5]}", _data_files=[{"filename": filename}])
        with pytest.raises(InputError, match=r"is not the name of an \.arrow file of this folder|no such file, but"):
            find_files([folder])
    with pytest.raises(InputError, match=r"state\.json: a selection of rows"):
        find_files([save(tmp_path / "selected", _indices_data_files=[{"filename": "indices.arrow"}])])
    with pytest.raises(InputError, match=r"state\.json: no list of files"):
        find_files([save(tmp_path / "none", _data_files=[])])


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list([{"parts": row["parts"], "text": f"t{row['id']}"} for row in RECORDS])
    made.select(range(18, 2, -1)).save_to_disk(tmp_path / "one", num_shards=3)
    files = find_files([tmp_path / "one"])
    assert len(files) == 3
    assert [value for file in files for value in values(file)] == datasets.load_from_disk(tmp_path / "one").to_list()
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match=r"two: holds the splits train, test; give one of them"):
        find_files([tmp_path / "two"])
    assert len(list(DocumentStream([tmp_path / "two" / "test"], epochs=1))) == 20


# Commands -------------------------------------------------------------------------------------------------------------


@each_kind
def test_the_commands_take_them(
    tmp_path: Path, tokenizer: Tokenizer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pages"
    write_pages(folder, name)
    assert main(["data", "stats", str(folder)]) == 0
    assert f"{'documents':<16}{60:>16}" in capsys.readouterr().out
    pairs = write_columns(tmp_path / name, pa.Table.from_pylist(RECORDS[1:]))
    assert main(["data", "format", str(pairs), "--template", "qa"]) == 0
    assert capsys.readouterr().out.startswith(f"--- {pairs}:1, qa")
    vocabulary = tmp_path / "v.model"
    words = ["tokenizer", "train", "--data", str(folder), "--vocab-size", "280", "--out", str(vocabulary)]
    assert main(words) == 0
    (tmp_path / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(tmp_path)
    shape = ["--config", str(tmp_path / "shape.json"), "--tokenizer", str(tmp_path), "--device", "cpu"]
    losses = []
    for kind in (name, "x.jsonl"):
        files, out = write_pages(tmp_path / f"train {kind}", kind), tmp_path / f"run {kind}"
        words = [
            "pretrain",
            *shape,
            "--data",
            *map(str, files),
            "--steps",
            "2",
            "--max-length",
            "16",
            "--out",
            str(out),
        ]
        assert main([*words, "--batch-size", "2"]) == 0
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


# Bounded memory and a quick start -------------------------------------------------------------------------------------

MEMORY = """
import sys
from minift.data.stream import DocumentStream
n = sum(1 for _ in DocumentStream([sys.argv[1]], epochs=1, shuffle_buffer=100))
print(n, next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM:')))
"""


def write_large(path: Path, rows: int, group: int) -> Path:
    """Write random texts of 4,000 characters, which cannot be packed, without having them all in memory."""
    schema = pa.schema([("text", pa.large_string()), ("id", pa.int64())])

    def batches() -> Any:
        for start in range(0, rows, group):
            count = min(group, rows - start)
            content = os.urandom(count * 2_000).hex().encode()
            offsets = pa.array(range(0, (count + 1) * 4_000, 4_000), pa.int64()).buffers()[1]
            texts = pa.LargeStringArray.from_buffers(count, offsets, pa.py_buffer(content))
            yield pa.record_batch([texts, pa.array(range(count))], schema=schema)

    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, schema) as out:
            for batch in batches():
                out.write_table(pa.Table.from_batches([batch]), row_group_size=group)
    else:
        new = pa.ipc.new_file if "index" in path.name else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, schema) as out:
            for batch in batches():
                out.write_batch(batch)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads a peak in /proc")
@each_kind
@pytest.mark.parametrize("group", [1_000, 50_000], ids=["many groups", "one group"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str, group: int) -> None:
    peaks = []
    for rows in (5_000, 50_000):  # 20 MB, 200 MB
        file = write_large(tmp_path / f"{rows}-{name}", rows, group)
        words = [sys.executable, "-c", MEMORY, str(file)]
        found = completed(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        count, peak = map(int, found.stdout.split())
        assert count == rows
        peaks.append(peak)
        file.unlink()
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.slow  # to be there takes a million documents
@pytest.mark.parametrize(
    ("name", "group"), [("x.parquet", 1_000), ("x.parquet", 2_000_000), ("x.arrow", 1_000), ("index.arrow", 2_000_000)]
)
def test_a_run_goes_on_after_a_million_rows_at_once(tmp_path: Path, name: str, group: int) -> None:
    count = 1_010_000
    texts = pa.concat_arrays(
        [pa.array([f"{part}, {i}: a page of some words" for i in range(1_010)]) for part in range(1_000)]
    )
    file = write_columns(tmp_path / name, pa.table({"text": texts}), group)

    def started() -> DocumentStream:
        return DocumentStream([file], epochs=1, seed=1, shuffle_buffer=1_000)

    documents = started()
    assert len(list(islice(documents, 1_000_000))) == 1_000_000
    state, rest = json.loads(json.dumps(documents.state_dict())), list(documents)
    assert len(rest) == count - 1_000_000
    resumed = started()
    with soon_done(2):
        resumed.load_state_dict(state)
        first = next(iter(resumed))
    assert [first, *resumed] == rest
