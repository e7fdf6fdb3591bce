"""The promise of `data/stream.py`: every document of a corpus once an epoch, in order, from any point on.

Files are written here, in every form that is known, and read back; a resumed stream is compared with one that was
never stopped, at every document; an endless file shows that nothing is read that is not asked for. Standard input is
that of a process of its own. Compressed files are cut off and spoiled everywhere, and never read as if they were whole.
"""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.data.lines import TEXT_PART
from minift.data.records import find_files, read_records
from minift.data.stream import DocumentStream
from minift.errors import InputError
from minift.tokenizer.base import Tokenizer
from tests.helpers import PACKINGS, ROOT, SMALL, pack, write_jsonl


def documents(*texts: str) -> list[dict[str, str]]:
    return [{"text": text, "timestamp": "2021-03-04T05:06:07Z", "url": "https://www.example.com/1"} for text in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Write four files: plain, gzipped, empty, and one with blank lines and no line break at its end."""
    files = [
        write_jsonl(tmp_path / "a.jsonl", documents("a1", "a2", "a3")),
        write_jsonl(tmp_path / "b.json.gz", documents("b1", "b2 \u00e9\u4e2d\U0001f642\n\nnext")),
        write_jsonl(tmp_path / "c.jsonl", []),
        write_jsonl(tmp_path / "d.json", [b"", documents("d1")[0], b"  ", b"", documents("d2")[0]]),
    ]
    files[3].write_bytes(files[3].read_bytes().rstrip(b"\n"))
    return files


IN_ORDER = ["a1", "a2", "a3", "b1", "b2 \u00e9\u4e2d\U0001f642\n\nnext", "d1", "d2"]


@pytest.mark.parametrize("suffix", [kind + packing for kind in (".jsonl", ".json") for packing in PACKINGS])
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
    assert list(DocumentStream([last, tmp_path / "sub", last], epochs=1)) == ["b", "a", "m", "z"]  # each once
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
        data[-6] ^= 0xFF  # in the checksum after the data
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
    writer.join(timeout=240)
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


# Sources --------------------------------------------------------------------------------------------------------------


def test_globs_go_down_into_folders(tmp_path: Path) -> None:
    (tmp_path / "c4" / "en" / "part").mkdir(parents=True)
    names = [
        "c4/a.json.gz",
        "c4/b.jsonl.zst",
        "c4/en/c.json",
        "c4/en/d.txt",
        "c4/en/part/e.txt.gz",
        "c4/en/part/f.json",
    ]
    for name in names:
        text = Path(name).name
        line = text if ".txt" in name else json.dumps({"text": text})
        (tmp_path / name).write_bytes(pack(line.encode(), Path(name).suffix))

    def found(pattern: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_files([f"{tmp_path}/{pattern}"])]

    assert found("c4/**/*.*") == names
    assert found("**/*.json*") == [names[i] for i in (0, 1, 2, 5)]
    assert found("**/*.txt") == [names[3]]
    assert found("c4/*.json.gz") == [names[0]]
    assert found("c4") == names[:2]  # a folder is not searched further down
    assert list(DocumentStream([f"{tmp_path}/c4/**/*.*"], epochs=1)) == [Path(name).name for name in names]


def test_a_folder_gives_what_has_a_known_suffix(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    names = sorted(f"{i}{kind}{packing}" for i, kind in enumerate((".json", ".jsonl", ".txt")) for packing in PACKINGS)
    for name in [*names, "README.md", "SHA256SUMS", "x.json.bz2", "x.gz", "x.parquet.gz", "x.txt.partial"]:
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in find_files([tmp_path])] == names


C4 = {"text": "from C4", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com/a"}
PILE = {"text": "from the Pile", "meta": {"pile_set_name": "Pile-CC"}}


def test_the_fields_of_c4_and_the_pile(tmp_path: Path) -> None:
    c4, pile = write_jsonl(tmp_path / "c4-train.00000-of-01024.json.gz", [C4]), tmp_path / "00.jsonl.zst"
    assert list(DocumentStream([c4, write_jsonl(pile, [PILE])], epochs=1)) == ["from C4", "from the Pile"]
    assert [record.values for file in (c4, pile) for record in read_records(file)] == [C4, PILE]
    assert list(DocumentStream([c4], text_field="url", epochs=1)) == ["https://example.com/a"]


def test_the_text_field_is_no_matter_to_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    sources = [tmp_path / "a.txt", write_jsonl(tmp_path / "b.json", [{"content": "field"}])]
    assert list(DocumentStream(sources, text_field="content", epochs=1)) == ["plain", "field"]


# Plain text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("text", ["one line", "two\n\n lines\n", "\r\nWindows\r\n", "\n\u00e9\u4e2d\U0001f642 {}\n"])
def test_a_text_file_is_one_document(tmp_path: Path, text: str, packing: str) -> None:
    file = tmp_path / f"x.txt{packing}"
    file.write_bytes(pack(text.encode(), packing))
    assert list(DocumentStream([file], epochs=2)) == [text, text]
    assert [(record.values, record.where) for record in read_records(file)] == [({"text": text}, f"{file}:1")]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_long_text_file_is_cut_behind_line_ends(tmp_path: Path, packing: str) -> None:
    rng = random.Random(1)
    lines = ["\u00e9" * rng.randrange(1, 4000) + "\n" * rng.randrange(1, 4) for _ in range(900)]
    whole = "".join(lines) + "no line end"
    file = tmp_path / f"x.txt{packing}"
    file.write_bytes(pack(whole.encode(), packing))
    records = list(read_records(file))
    parts = [record.values["text"] for record in records]
    assert "".join(parts) == whole
    assert len(parts) == 4
    longest = max(len(line.encode()) for line in lines)
    for part in parts[:-1]:
        assert part.endswith("\n")
        assert TEXT_PART <= len(part.encode()) < TEXT_PART + longest
    begins = [1 + "".join(parts[:i]).count("\n") for i in range(len(parts))]
    assert [record.line for record in records] == begins
    assert list(DocumentStream([file], epochs=2)) == parts * 2


def test_a_text_file_without_text_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\n\t\n")
    (tmp_path / "c.txt").write_bytes(b"c")
    assert list(DocumentStream([tmp_path], epochs=1)) == ["c"]


def test_a_long_text_file_is_read_in_the_memory_of_a_part(tmp_path: Path) -> None:
    lines = (b"All work and no play makes Jack a dull boy. " * 100 + b"\n") * 50
    with gzip.open(tmp_path / "x.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(160):
            file.write(lines)
    tracemalloc.start()
    try:
        assert sum(len(text) for text in DocumentStream([tmp_path], epochs=1)) == 160 * len(lines)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * TEXT_PART


@pytest.mark.parametrize("shuffle_buffer", [0, 2])
@pytest.mark.parametrize("taken", range(7))
def test_a_stream_of_texts_and_parts_goes_on(tmp_path: Path, taken: int, shuffle_buffer: int) -> None:
    line = "x" * (TEXT_PART // 2) + "\n"
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("".join(f"{i} {line}" for i in range(5)))
    write_jsonl(tmp_path / "c.jsonl.zst", documents("c1", "c2"))

    def stream() -> DocumentStream:
        return DocumentStream([tmp_path], epochs=1, shuffle_buffer=shuffle_buffer)

    whole = list(stream())
    assert len(whole) == 6
    assert sorted(text[:8] for text in whole) == sorted(["short", "0 xxxxxx", "2 xxxxxx", "4 xxxxxx", "c1", "c2"])
    before = stream()
    head = list(islice(before, taken))
    after = stream()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert head + list(after) == whole


# zstd -----------------------------------------------------------------------------------------------------------------


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    lines = [json.dumps(record).encode() + b"\n" for record in documents("one", "two", "three", "four")]
    frames = [pack(part, ".zst") for part in (lines[0], b"", lines[1][:20], lines[1][20:] + lines[2], lines[3])]
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"  # as parallel compressors write them
    (tmp_path / "x.jsonl.zst").write_bytes(skippable + frames[0] + b"".join(frames[1:3]) + skippable + frames[3])
    (tmp_path / "y.jsonl.zst").write_bytes(frames[4] + skippable)
    assert list(DocumentStream([tmp_path], epochs=1)) == ["one", "two", "three", "four"]


def test_a_zstd_window_that_is_too_large_is_no_damage(tmp_path: Path) -> None:
    """As `zstd --long=30` writes it, of data whose size it does not know; with --long=27 it is read."""
    zstandard = pytest.importorskip("zstandard")
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in documents("one", "two"))
    for window, fault in ((27, ""), (30, "packed with a window of more than 128 MiB")):
        settings = zstandard.ZstdCompressionParameters(window_log=window, enable_ldm=True)
        packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        file = tmp_path / "x.jsonl.zst"
        file.write_bytes(packer.compress(lines) + packer.flush())
        texts, said = read_to_the_end(file)
        assert texts == (["one", "two"] if not fault else [])
        assert said.startswith(f"{file}:1: {fault}" if fault else "")
        assert "damaged" not in said
        assert ("pack it again without: zstd -d --long=31" in said) == bool(fault)


def read_to_the_end(file: Path) -> tuple[list[str], str]:
    """Return the documents of a file up to the first fault, and its message ("" for none)."""
    texts: list[str] = []
    try:
        for text in DocumentStream([file], epochs=1):
            texts.append(text)
    except InputError as error:
        return texts, str(error)
    return texts, ""


def read_cut_off(file: Path, data: bytes, whole: list[str]) -> int:
    """Read a file of which only `data` is left: a beginning of `whole`, then a fault. Return how many texts it has."""
    file.write_bytes(data)
    texts, fault = read_to_the_end(file)
    kind = {".gz": "gzip", ".zst": "zstd"}[file.suffix]
    assert fault.startswith(f"{file}:{len(texts) + 1}: damaged {kind} data: ")
    assert "\n" not in fault
    assert texts == whole[: len(texts)]
    return len(texts)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_cut_off_anywhere_is_not_a_shorter_file(tmp_path: Path, packing: str) -> None:
    rng = random.Random(2)
    whole = [f"{i} {rng.randbytes(8).hex()}" for i in range(12)]
    file = write_jsonl(tmp_path / f"x.jsonl{packing}", [{"text": text} for text in whole])
    data = file.read_bytes()
    for end in range(1, len(data)):
        read_cut_off(file, data[:end], whole)
    file.write_bytes(data)
    assert read_to_the_end(file) == (whole, "")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_what_comes_before_the_damage_is_given(tmp_path: Path, packing: str) -> None:
    """Of a file of several blocks (zstd's hold 128 KiB) about as many documents as bytes are left."""
    rng = random.Random(3)
    whole = [f"{i} {rng.randbytes(1000).hex()}" for i in range(600)]
    file = write_jsonl(tmp_path / f"x.jsonl{packing}", [{"text": text} for text in whole])
    data = file.read_bytes()
    for share in (0.3, 0.5, 0.8):
        given = read_cut_off(file, data[: int(share * len(data))], whole)
        assert (share - 0.3) * len(whole) < given <= share * len(whole) + 1


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_flipped_bit_is_no_other_exception(tmp_path: Path, packing: str) -> None:
    """Both formats hold a checksum here, so a spoiled text cannot pass; a bit of the header may not matter."""
    rng = random.Random(4)
    whole = [f"{i} {rng.randbytes(20).hex()}" for i in range(60)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in whole)
    if packing == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    else:
        data = gzip.compress(data)
    file = tmp_path / f"x.jsonl{packing}"
    for _ in range(600):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        texts, fault = read_to_the_end(file)
        assert fault.startswith(f"{file}:") or (texts, fault) == (whole, "")


@pytest.mark.parametrize("command", ["peek", "stats", "stdin"])
def test_zstd_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl.zst", documents("one"))
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    if command == "stdin":
        stdin_of(file.read_bytes(), monkeypatch)
    words = ["data", "peek", "-"] if command == "stdin" else ["data", command, str(file)]
    assert main(words) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("minift: error: " + ("standard input" if command == "stdin" else str(file)))
    assert "zstandard" in stderr
    assert "minift[zstd]" in stderr
    write_jsonl(tmp_path / "y.jsonl.gz", documents("one"))
    assert main(["data", "peek", f"{tmp_path}/*.gz"]) == 0


# Standard input -------------------------------------------------------------------------------------------------------


def piped(words: list[Any], data: bytes, folder: Path) -> "subprocess.CompletedProcess[bytes]":
    """Run `minift …` with bytes on its standard input."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minift", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=env, input=data, capture_output=True, timeout=120)


@pytest.mark.parametrize("packing", PACKINGS)
def test_standard_input_is_read(tmp_path: Path, packing: str) -> None:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in documents("one", "zwei \u00fc", "three"))
    done = piped(["data", "peek", "-", "-n", "2"], pack(lines, packing), tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode().splitlines()
    assert [line for line in printed if not line.startswith("  ")] == ["-:1", "-:2"]
    assert [line for line in printed if line.startswith("  text")] == ["  text: one", "  text: zwei \u00fc"]


def test_peeking_into_a_pipe_does_not_wait_for_its_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minift", "data", "peek", "-", "-n", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for record in documents("one", "two"):
            process.stdin.write(json.dumps(record).encode() + b"\n")
        process.stdin.flush()  # and it stays open
        assert process.wait(timeout=240) == 0
        assert process.stdout.read().count(b"  text: ") == 2
        process.stdin.close()


def stdin_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))  # type: ignore[type-var]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shuffle_buffer", [0, 3])
def test_a_stream_of_standard_input(monkeypatch: pytest.MonkeyPatch, packing: str, shuffle_buffer: int) -> None:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in documents("one", "two", "three"))
    stdin_of(pack(lines, packing), monkeypatch)
    texts = list(DocumentStream(["-"], epochs=1, shuffle_buffer=shuffle_buffer))
    assert sorted(texts) == ["one", "three", "two"]
    assert shuffle_buffer or texts == ["one", "two", "three"]


@pytest.mark.parametrize("epochs", [None, 2])
def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch, epochs: int | None) -> None:
    stdin_of(b'{"text": "one"}\n{"text": "two"}\n', monkeypatch)
    stream = iter(DocumentStream(["-"], epochs=epochs))
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(InputError, match=r"standard input ended after 2 documents, and cannot be read again"):
        next(stream)


def test_empty_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin_of(b"", monkeypatch)
    with pytest.raises(InputError, match="no documents"):
        next(iter(DocumentStream(["-"], epochs=1)))


def test_standard_input_twice_is_refused(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "x.jsonl", documents("one"))
    assert find_files([other, "-"]) == [other, Path("-")]
    with pytest.raises(InputError, match=r"^-: standard input can be read only once$"):
        find_files(["-", other, "-"])


@pytest.fixture
def pretrain(tmp_path: Path, tokenizer: Tokenizer) -> list[str]:
    """Return a command that trains on standard input, without the number of steps."""
    (tmp_path / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer.vocab_size}))
    tokenizer.save(tmp_path)
    words = ["pretrain", "--config", tmp_path / "shape.json", "--tokenizer", tmp_path, "--out", tmp_path / "out"]
    words += ["--data", "-", "--device", "cpu", "--batch-size", "1", "--max-length", "16", "--shuffle-buffer", "0"]
    return [str(word) for word in words]


PAGES = b"".join(json.dumps({"text": f"Page {i} says {i}."}).encode() + b"\n" for i in range(100))


def test_pretraining_on_standard_input(
    tmp_path: Path, pretrain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the same steps as on a file of the same bytes."""
    (tmp_path / "pages.jsonl").write_bytes(PAGES)
    assert main([*pretrain, "--steps", "4", "--data", str(tmp_path / "pages.jsonl"), "--out", f"{tmp_path}/file"]) == 0
    stdin_of(pack(PAGES, ".zst"), monkeypatch)
    assert main([*pretrain, "--steps", "4"]) == 0
    capsys.readouterr()
    mine, others = (
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("out", "file")
    )
    assert len(mine) == 4
    assert mine == others


def test_epochs_of_standard_input_are_refused(
    tmp_path: Path, pretrain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin_of(PAGES, monkeypatch)
    assert main([*pretrain, "--epochs", "1"]) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "standard input" in stderr
    assert "--steps" in stderr
    assert not (tmp_path / "out").exists()


def test_standard_input_that_ends_before_the_steps(
    tmp_path: Path, pretrain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps up to there are saved."""
    stdin_of(PAGES, monkeypatch)
    assert main([*pretrain, "--steps", "10000"]) == 2
    assert "standard input ended after 100 documents" in capsys.readouterr().err.splitlines()[-1]
    taken = (tmp_path / "out" / "metrics.jsonl").read_text().count("\n")
    assert taken > 10
    assert (tmp_path / "out" / f"step_{taken:06d}").is_dir()


@pytest.mark.slow
def test_pretraining_on_a_pipe(tmp_path: Path, pretrain: list[str]) -> None:
    done = piped([*pretrain, "--steps", "2"], pack(PAGES, ".gz"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final" / "model.pt").is_file()


@pytest.mark.parametrize("command", ["finetune", "pretrain", "evaluate"])
def test_standard_input_under_two_flags_is_refused(
    pretrain: list[str],
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """`evaluate` has only one, but looks at the first record to see what it is; then it may also be allowed."""
    pairs = b"".join(b'{"question": "What is %d?", "answer": "It is."}\n' % i for i in range(9))
    stdin_of(pairs if command == "finetune" else PAGES, monkeypatch)
    words = {
        "finetune": ["finetune", "--data", "-", "--test", "-", "--steps", "1", "--out", str(tmp_path / "out")],
        "pretrain": [*pretrain, "--validation", "-", "--steps", "1"],
        "evaluate": ["evaluate", "--data", "-", "--device", "cpu"],
    }[command]
    if command != "pretrain":
        words += ["--model", str(small_checkpoint)]
    if main(words) == 2:
        stderr = capsys.readouterr().err
        assert len(stderr.splitlines()) == 1
        assert "standard input" in stderr
    else:
        assert command == "evaluate"
        assert "bits_per_byte" in capsys.readouterr().out


def test_a_closed_standard_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it for `minift data peek - <&-`
    assert main(["data", "peek", "-"]) == 2
    assert "standard input" in capsys.readouterr().err


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_pipe_that_gives_one_byte_first(monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:1])

    data = pack(json.dumps({"text": "one"}).encode() + b"\n", packing)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Slow(data))))  # type: ignore[type-var]
    assert list(DocumentStream(["-"], epochs=1)) == ["one"]
