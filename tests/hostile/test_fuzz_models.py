"""The promise that no model and no settings, however spoilt, end in anything but success or one clear line.

Values in a file's JSON are exchanged, left out and renamed, bytes anywhere changed; headers are made of any integers.
See `fuzzing.py` for what is promised, and `hostile/test_fuzz_data.py` for a long run.
"""

import hashlib
import json
import os
import random
import struct
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from hypothesis import example
from hypothesis import strategies as st

from minift.checkpoint import load_model
from minift.config import FINETUNE
from minift.costs.info import info, info_text
from minift.formats.opened import is_finite, open_tensors
from minift.runs.finetune import finetune_job
from minift.runs.folder import read_run
from minift.runs.pretrain import pretrain_job
from minift.runs.steps import check_step
from minift.tokenizer.load import load_tokenizer
from tests.hostile.fuzzing import (
    CHANGES,
    EDITS,
    FEW_EDITS,
    HOSTILE,
    TEXT,
    Changes,
    Edits,
    changed,
    damaged,
    fuzz,
    instead,
    judged_test,  # noqa: F401  # of every test
    outcome,
    pytest_generate_tests,  # noqa: F401
    spoilt_json,
    varied,
    whole_models,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are written, one over the other."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models, in whose files something is changed, and then changed back."""
    return whole_models(tmp_path_factory.mktemp("models"))


# Settings -------------------------------------------------------------------------------------------------------------


def use_model(path: Path) -> None:
    model = load_model(path)
    with torch.no_grad():
        model(torch.zeros(1, min(3, model.config.max_position_embeddings), dtype=torch.int64))


SETTINGS = ("native/config.json", "hf/config.json", "hf/generation_config.json", "meta/params.json")
SETTINGS += ("adapter/adapter_config.json", "sharded/model.safetensors.index.json")


@fuzz(250, name=st.sampled_from(SETTINGS), changes=CHANGES, edits=FEW_EDITS)
def test_the_settings_of_a_model(models: Path, name: str, changes: Changes, edits: Edits) -> None:
    """Its config, in any format, and the index of its shards: the model is used as it says, or refused."""
    file = models / name
    content = spoilt_json(json.loads(file.read_text()), changes, edits)
    instead(file, content, lambda: use_model(file.parent), file.parent)


@fuzz(300, name=st.sampled_from(("native", "hf")), changes=CHANGES, edits=FEW_EDITS)
def test_a_shape_alone(folder: Path, models: Path, name: str, changes: Changes, edits: Edits) -> None:
    """What a config would cost is worked out, whatever its numbers."""
    file = folder / "shape.json"
    file.write_bytes(spoilt_json(json.loads((models / name / "config.json").read_text()), changes, edits))
    outcome(lambda: info_text(info(None, str(file), world=8)), file, "max_length", "batch_size")


@example(job="finetune", changes=[([0], "set", [])], edits=[])
@example(job="finetune", changes=[([1, 1], "set", 7)], edits=[])
@example(job="finetune", changes=[([1, 1], "set", [])], edits=[])
@example(job="pretrain", changes=[([1, 0], "set", "\0")], edits=[])
@fuzz(300, job=st.sampled_from(("finetune", "pretrain")), changes=CHANGES, edits=FEW_EDITS)
def test_the_settings_of_a_run(folder: Path, job: str, changes: Changes, edits: Edits) -> None:
    """Read with its inputs, of which the job can be made."""
    make = {"finetune": finetune_job, "pretrain": pretrain_job}
    inputs = vars(make[job]("bundled", ["x"], "y"))
    run = {"job": job, "inputs": inputs, "train": {**FINETUNE.to_dict(), "dtype": "float32"}}
    (folder / "config.json").write_bytes(spoilt_json(run, changes, edits))
    found = outcome(lambda: read_run(folder), folder / "config.json")
    if found is not None:
        outcome(lambda: make[found[0]](**found[1]), found[1].get("model", ""))


# Weights --------------------------------------------------------------------------------------------------------------


def use_tensors(file: Path) -> None:
    opened = open_tensors(file)
    for name in opened.specs:
        is_finite(opened.read(name).float())


@fuzz(
    300,
    changes=CHANGES,
    edits=FEW_EDITS,
    more=st.sampled_from((0, 0, 0, 0, 1, -1, 8, 2**31, 2**63)),
)
def test_a_header_of_safetensors(folder: Path, models: Path, changes: Changes, edits: Edits, more: int) -> None:
    """Its values, its length, or bytes anywhere."""
    content = (models / "hf" / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.dumps(changed(json.loads(content[8:end]), changes)).encode()
    file = folder / "x.safetensors"
    file.write_bytes(damaged(struct.pack("<Q", len(header) + more) + header + content[end:], edits))
    outcome(lambda: use_tensors(file), file)


PICKLED = (
    b"R",
    b"0",
    b"2",
    b"q\x01",
    b"h\x01",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08\0\0\0\0\0\0\0\x7f",
    b"\x85",
    b"(",
    b"t",
    b"}",
    b"]",
)
PICKLED += (
    b"cbuiltins\nbytearray\n",
    b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n",
    b"X\x01\0\0\0a",
    b"K\xff",
    b"\x88",
    b"N",
    b"Q",
)
INSTRUCTION = ("replace", "insert", "delete")
DRAWN = st.tuples(st.integers(0, 3_000), st.sampled_from(INSTRUCTION), st.sampled_from(PICKLED))


def make_instructions(rng: random.Random) -> Edits:
    return [(rng.randrange(3_000), rng.choice(INSTRUCTION), rng.choice(PICKLED)) for _ in range(rng.randint(0, 3))]


INSTRUCTIONS = varied(st.lists(DRAWN, max_size=3), make_instructions)


@fuzz(150, edits=EDITS, pickled=INSTRUCTIONS, form=st.sampled_from(("as it is", "zip", "bare")))
def test_a_file_of_pytorch(folder: Path, models: Path, edits: Edits, pickled: Edits, form: str) -> None:
    """Its bytes, or the instructions of the pickle in it."""
    file, whole = folder / "x.pt", models / "native" / "model.pt"
    if form == "as it is":
        file.write_bytes(damaged(whole.read_bytes(), edits))
    else:
        with zipfile.ZipFile(whole) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        data = damaged(damaged(records["archive/data.pkl"], pickled), edits)
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {**records, "archive/data.pkl": data}.items():
                archive.writestr(name, content)
        if form == "bare":
            file.write_bytes(data)
    outcome(lambda: use_tensors(file), file)


SIZES = st.tuples(
    st.integers(1, 4).map(lambda n: 4 * n), st.integers(1, 9), st.integers(1, 3), st.sampled_from((1, 2)), st.just(1)
)
INTS = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 300) | st.sampled_from((0, -1, 9_999, 2**31 - 1, -(2**31)))


def make_wrong(rng: random.Random) -> list[tuple[int, int]]:
    ints = (rng.randint(-(2**31), 2**31 - 1), rng.randint(-2, 300), rng.randint(1, 9), 9_999, 2**31 - 1)
    return [(rng.randrange(7), rng.choice(ints)) for _ in range(rng.choice((1, 1, 2, 3)))]


@fuzz(
    300,
    sizes=SIZES,
    vocabulary=st.integers(3, 40),
    positions=st.integers(1, 20),
    tied=st.booleans(),
    version=st.sampled_from((0, 1)),
    wrong=varied(st.lists(st.tuples(st.integers(0, 6), INTS), max_size=2), make_wrong),
    more=st.sampled_from((0, 0, 0, 1, -1, -4, 4, 100)),
    edits=FEW_EDITS,
)
def test_a_header_of_llama2c(
    folder: Path,
    sizes: tuple[int, ...],
    vocabulary: int,
    positions: int,
    tied: bool,
    version: int,
    wrong: list[tuple[int, int]],
    more: int,
    edits: Edits,
) -> None:
    """Any integers, and a file that is as long as they make it, or not."""
    numbers = [*sizes, vocabulary, positions]
    for place, number in wrong:
        numbers[place] = number
    file = folder / "x.bin"
    if version == 1:
        head = struct.pack("<Ii7iB", 0x616B3432, 1, *numbers, tied).ljust(256, b"\0")
    else:
        sign = 1 if tied or numbers[5] == -(2**31) else -1
        head = struct.pack("<7i", *numbers[:5], sign * numbers[5], numbers[6])
    file.write_bytes(damaged(head, edits))
    length = len(head) + 4 * floats(numbers, tied, version) + more
    if length < 2**20:
        os.truncate(file, max(0, length))
    outcome(lambda: use_model(file), file)


def floats(numbers: list[int], tied: bool, version: int) -> int:
    """How many weights llama2.c's programs expect behind a header; 0 where it makes no sense."""
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = numbers
    if min(numbers) < 1:
        return 0
    width = dim // heads
    a_layer = 2 * dim + 2 * dim * heads * width + 2 * dim * kv_heads * width + 3 * dim * hidden
    rope = 0 if version else positions * width
    return vocabulary * dim * (1 if tied else 2) + layers * a_layer + dim + rope


# Tokenizers -----------------------------------------------------------------------------------------------------------


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    for text in ("The first word, and Größe\n", "  <s> a\u0301\0\u2581 \U0001f642 {x}", ""):
        ids = tokenizer.encode(text)
        tokenizer.pieces(ids)
        tokenizer.decode(ids)
        tokenizer.decode_continuation(tokenizer.encode_continuation(text, eos=True, special=False))
    texts = ["What is it?", "The capital of Mexico\n\nis  it", ""]
    alone = [tokenizer.encode(text, eos=True, special=False) for text in texts]
    assert tokenizer.encode_documents(texts)[0].tolist() == list(chain.from_iterable(alone))


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


NUMBER = st.integers(-3, 300) | st.sampled_from((2**31 - 1, -(2**31), 2**63, 2**64 - 1))
PIECE = st.builds(
    lambda text, kind: field(1, field(1, text.encode()) + b"\x15\0\0\0\0" + field(3, kind)), TEXT, st.integers(0, 8)
)
TRAINER = st.builds(lambda number, value: field(2, field(number, value)), st.integers(1, 60), NUMBER)
NORMALIZER = st.builds(
    lambda number, value: field(3, field(number, value)), st.integers(1, 7), NUMBER | st.binary(max_size=40)
)


def make_fields(rng: random.Random) -> bytes:
    numbers = (rng.randint(-3, 300), 2**31 - 1, 2**64 - 1, rng.randbytes(rng.randrange(40)))
    pieces = field(1, field(1, rng.choice(HOSTILE).encode()) + field(3, rng.randrange(9)))
    parts = (pieces, *(field(n, field(rng.randint(1, 60 if n == 2 else 7), rng.choice(numbers))) for n in (2, 3)))
    return b"".join(rng.choice(parts) for _ in range(rng.randrange(3)))


FIELDS_OF_A_MODEL = st.lists(PIECE | TRAINER | NORMALIZER | st.binary(max_size=6), max_size=3).map(b"".join)


@example(edits=[], more=b"\x1d\xff\xff\xff\xff")  # a float where the normaliser's settings should be
@example(edits=[], more=b"\xa3\x06\xa4\x06")  # a group
@fuzz(300, edits=FEW_EDITS, more=varied(FIELDS_OF_A_MODEL, make_fields))
def test_a_model_of_sentencepiece(folder: Path, models: Path, edits: Edits, more: bytes) -> None:
    """Its bytes, and more pieces, or other settings of its training and its normaliser."""
    file = folder / "tokenizer.model"
    file.write_bytes(damaged((models / "native" / "tokenizer.model").read_bytes(), edits) + more)
    outcome(lambda: use_tokenizer(file), file, "this tokenizer", "not Unicode")


BESIDE = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@example(name="tokenizer.json", changes=[([8, 3], "set", "[INST]")], edits=[])  # longer than the pieces it begins
@example(name="tokenizer.json", changes=[([7, 1, 3, 3], "set", 41)], edits=[])  # characters off an empty text
@example(name="tokenizer_config.json", changes=[([1], "set", "\u2581")], edits=[])  # BOS is a piece of many texts
@fuzz(200, name=st.sampled_from(BESIDE), changes=CHANGES, edits=FEW_EDITS)
def test_a_tokenizer_of_hugging_face(models: Path, name: str, changes: Changes, edits: Edits) -> None:
    """The tokenizer itself, or a file beside it that may say the same."""
    file = models / "hf" / name
    there = file.is_file()
    if not there:
        file.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} if "map" in name else {"<pad>": 290}))
    try:
        content = spoilt_json(json.loads(file.read_text()), changes, edits)
        instead(file, content, lambda: use_tokenizer(file.parent), file.parent, "this tokenizer")
    finally:
        if not there:
            file.unlink()


# Checksums ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step's folder, as far as its checksums go."""
    folder = tmp_path_factory.mktemp("step")
    for name in ("config.json", "model.pt", "tokenizer.model", "training.pt"):
        (folder / name).write_bytes(name.encode() * 9)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@fuzz(300, name=st.sampled_from(("SHA256SUMS", "SHA256SUMS", "model.pt", "training.pt")), edits=EDITS)
def test_the_checksums_of_a_step(step: Path, name: str, edits: Edits) -> None:
    """No changed byte of a file is overlooked, and no line of the checksums."""
    whole = (step / name).read_bytes()
    content = damaged(whole, edits)
    used = instead(step / name, content, lambda: check_step(step) or "used", step)
    if name == "SHA256SUMS":
        assert used is None or set(whole.splitlines()) <= set(content.splitlines())
    else:
        assert (used is not None) == (content == whole)
