"""The promise of `stream.py`: every document of a corpus, once an epoch, in order, from any point on, in little memory.

Files are written here, in every form that is known, and read back; a resumed stream is compared with one that was
never stopped, at every document; an endless file shows that nothing is read that is not asked for.
"""

import gzip
import json
import os
import threading
import tracemalloc
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.errors import InputError
from minift.records import find_files, read_records
from minift.stream import DocumentStream


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write records (or lines, where they are bytes) as JSON Lines, gzipped if the name says so."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def documents(*texts: str) -> list[dict[str, str]]:
    return [{"text": text, "timestamp": "2021-03-04T05:06:07Z", "url": "https://www.example.com/1"} for text in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Four files: plain, gzipped, empty, and one with blank lines and no line break at its end."""
    files = [
        write_jsonl(tmp_path / "a.jsonl", documents("a1", "a2", "a3")),
        write_jsonl(tmp_path / "b.json.gz", documents("b1", "b2 \u00e9\u4e2d\U0001f642\n\nnext")),
        write_jsonl(tmp_path / "c.jsonl", []),
        write_jsonl(tmp_path / "d.json", [b"", documents("d1")[0], b"  ", b"", documents("d2")[0]]),
    ]
    files[3].write_bytes(files[3].read_bytes().rstrip(b"\n"))
    return files


IN_ORDER = ["a1", "a2", "a3", "b1", "b2 \u00e9\u4e2d\U0001f642\n\nnext", "d1", "d2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    records = [{"text": "one", "n": 1}, {"text": "zwei \u00fc"}, {}]
    file = write_jsonl(tmp_path / f"x{suffix}", records)
    found = list(read_records(file))
    assert [record.values for record in found] == records
    assert [record.where for record in found] == [f"{file}:{line}" for line in (1, 2, 3)]


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    parts = [gzip.compress(json.dumps(record).encode() + b"\n") for record in documents("one", "two")]
    (tmp_path / "x.json.gz").write_bytes(b"".join(parts))
    assert list(DocumentStream([tmp_path / "x.json.gz"], epochs=1)) == ["one", "two"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [b"\xef\xbb\xbf" + json.dumps(documents("one")[0]).encode()])
    assert list(DocumentStream([file], epochs=1)) == ["one"]


@pytest.mark.parametrize("form", ["files", "folder", "glob"])
def test_sources_are_read_in_order(tmp_path: Path, corpus: list[Path], form: str) -> None:
    (tmp_path / "notes.md").write_text("not data")
    sources: list[str | Path] = {"files": corpus, "folder": [tmp_path], "glob": [f"{tmp_path}/*.js*"]}[form]
    assert find_files(sources) == corpus
    assert list(DocumentStream(sources, epochs=1)) == IN_ORDER


def test_the_order_is_that_of_the_sources_and_then_of_the_names(tmp_path: Path) -> None:
    for name in ("z", "m", "a"):  # the disk may list them in this order
        (tmp_path / "sub").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "sub" / f"{name}.jsonl", documents(name))
    last = write_jsonl(tmp_path / "b.jsonl", documents("b"))
    assert list(DocumentStream([last, tmp_path / "sub", last], epochs=1)) == ["b", "a", "m", "z", "b"]
    assert list(DocumentStream([f"{tmp_path}/sub/[mz].jsonl", last], epochs=1)) == ["m", "z", "b"]


def test_epochs_follow_each_other(corpus: list[Path]) -> None:
    assert list(DocumentStream(corpus, epochs=3)) == IN_ORDER * 3
    assert list(islice(DocumentStream(corpus), 25)) == (IN_ORDER * 4)[:25]


@pytest.mark.parametrize("taken", range(2 * len(IN_ORDER) + 1))
def test_a_resumed_stream_goes_on_with_the_next_document(corpus: list[Path], taken: int) -> None:
    stream = DocumentStream(corpus, epochs=2)
    before = list(islice(stream, taken))
    state = json.loads(json.dumps(stream.state_dict()))  # as a checkpoint keeps it
    resumed = DocumentStream(corpus, epochs=2)
    resumed.load_state_dict(state)
    assert before + list(resumed) == IN_ORDER * 2


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "no", "content": "yes"}])
    assert list(DocumentStream([file], text_field="content", epochs=1)) == ["yes"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b"{'text': 'a'}", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'["text"]', "holds list, not a JSON object"),
        (b'"text"', "holds str, not a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"title": "a", "url": "b"}', "no text under 'text'; its keys: title, url"),
        (b'{"text": null}', "no text under 'text'"),
        (b'{"text": 5}', "no text under 'text'"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": " \\n\\u3000"}', "the text is empty"),
        (b"{}", "no text under 'text'; its keys: none"),
        # Half of a surrogate pair is valid JSON, but no character, and no tokenizer can encode it.
        (b'{"text": "half \\ud83d of a pair"}', "surrogate"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
def test_a_bad_line_is_named(tmp_path: Path, suffix: str, line: bytes, reason: str) -> None:
    file = write_jsonl(tmp_path / f"x{suffix}", [*documents("good"), b"", line])
    stream = iter(DocumentStream([file], epochs=1))
    assert next(stream) == "good"
    with pytest.raises(InputError) as error:
        next(stream)
    assert str(error.value).startswith(f"{file}:3: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [b'{"text": "\\ud83d\\ude42"}'])
    assert list(DocumentStream([file], epochs=1)) == ["\U0001f642"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: str) -> None:
    rows = documents(*(f"text {i} {os.urandom(20).hex()}" for i in range(200)))
    file = write_jsonl(tmp_path / "x.json.gz", rows)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-6] ^= 0xFF  # in the checksum behind the data
    else:
        data = bytearray(b"plain text\n")
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"^{file}:\d+: damaged gzip data"):
        list(DocumentStream([file], epochs=1))


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/folder", "*.nothing"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_files([tmp_path / name])


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}: "):
        find_files([tmp_path])


def test_an_unknown_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("text")
    with pytest.raises(InputError, match=r"x\.md: unknown kind"):
        find_files([tmp_path / "x.md"])


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
@pytest.mark.parametrize("epochs", [1, None])
def test_an_empty_corpus_is_refused_and_not_read_for_ever(tmp_path: Path, content: bytes, epochs: int | None) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.jsonl: the corpus holds no documents"):
        next(iter(DocumentStream([tmp_path / "x.jsonl"], epochs=epochs)))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", documents("a"))
    stream = DocumentStream([file])
    file.unlink()
    with pytest.raises(InputError, match=r"x\.jsonl: cannot be read"):
        next(iter(stream))


def test_a_corpus_is_read_in_the_memory_of_one_line(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 500_000}).encode() + b"\n"
    with gzip.open(tmp_path / "x.json.gz", "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(line)
    tracemalloc.start()
    try:
        assert sum(len(text) for text in DocumentStream([tmp_path], epochs=1)) == 30_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(line)


@pytest.mark.parametrize("count", [1, 3])
def test_peeking_into_an_endless_file_returns(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    written = 0

    def write() -> None:
        nonlocal written
        try:
            with pipe.open("wb") as file:
                while written < 1_000_000:
                    file.write(json.dumps(documents(f"text {written}")[0]).encode() + b"\n")
                    written += 1
        except BrokenPipeError:
            pass

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert main(["data", "peek", str(pipe), "-n", str(count)]) == 0
    writer.join(timeout=30)
    assert not writer.is_alive()
    assert written < 10_000  # what the pipe and two buffers hold, and no more
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  text: ")]
    assert shown == [f"  text: text {i}" for i in range(count)]


def test_peeking_does_not_parse_what_it_does_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [*documents("one"), b"{broken"])
    assert main(["data", "peek", str(file), "-n", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}:1\n")
    assert main(["data", "peek", str(file), "-n", "2"]) == 2
    assert f"{file}:2" in capsys.readouterr().err
