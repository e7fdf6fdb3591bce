"""What the fuzz tests share: random inputs, and a judge of what became of them.

An input is *used*, or it is *refused*: with an InputError, in one line that names the culprit. Anything else fails the
test: another exception, a warning or a word on stderr, a call that does not come back, more than 2 GB of memory.
"""

import copy
import functools
import io
import json
import math
import os
import random
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minift.checkpoint import save_model
from minift.cli import main
from minift.errors import InputError, one_line
from minift.formats.convert import convert
from minift.formats.huggingface import write_huggingface
from minift.formats.opened import open_tensors
from minift.formats.peft import write_peft
from minift.lora import LoRAConfig, adapter_weights, add_lora
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.sentencepiece import train_tokenizer
from tests.helpers import small_model

EXAMPLES = int(os.environ.get("MINIFT_FUZZ_EXAMPLES", "0"))  # inputs of a target; 0: those of the suite
ROUND = min(EXAMPLES, 5_000)  # inputs of one test; hypothesis remembers all that it draws
VARIATIONS = 10 if EXAMPLES else 1  # inputs that are made of one that hypothesis has drawn, which takes it long
MEMORY = 2 * 2**30  # bytes that a target may take
LIMIT = 20.0  # seconds that an input may take on a busy machine; most take a thousandth of one
LONGEST = 1_000  # characters that are still one clear line

tally: Counter[str] = Counter()


def fuzz(suite: int, **inputs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a test random inputs: in the suite so many and always the same, in a long run others each time.

    Args:
        inputs: by the test's arguments, the strategies from which they are drawn, or `varied` ones.
    """
    makers = {name: strategy[1] for name, strategy in inputs.items() if isinstance(strategy, tuple)}
    strategies = {name: inputs[name][0] if name in makers else inputs[name] for name in inputs}
    variations = VARIATIONS if makers else 1
    plan = settings(
        max_examples=ROUND // variations or suite,
        phases=(Phase.explicit, Phase.generate) if EXAMPLES else (Phase.explicit, Phase.generate, Phase.shrink),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def each(*args: Any, **kwargs: Any) -> None:
            tally["inputs"] += 1
            test(*args, **kwargs)
            rng = random.Random(repr({name: kwargs[name] for name in strategies}))
            for _ in range(variations - 1):
                others = {name: make(rng) for name, make in makers.items()}
                tally["inputs"] += 1
                try:
                    test(*args, **{**kwargs, **others})
                except BaseException as error:
                    error.add_note(f"with {others}")
                    raise

        return plan(given(**strategies)(each))

    return fuzzed


def varied(strategy: st.SearchStrategy[Any], make: Callable[[random.Random], Any]) -> tuple[Any, Any]:
    """A strategy, and what makes more values of its kind in a long run."""
    return strategy, make


# The judge ------------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A call did not come back in time. No `except Exception` of the code under test takes it for something else."""


@contextmanager
def judged(limit: float = LIMIT) -> Iterator[list[str]]:
    """Run a call that must come back in time. Gives the lines that Python, or a library below it, wrote to stderr."""
    rang, said = [], list[str]()

    def ring(*_: Any) -> None:
        rang.append(True)
        raise Hang(f"not done in {limit} s")

    before, saved = signal.signal(signal.SIGALRM, ring), os.dup(2)
    spoken = os.memfd_create("stderr")
    os.dup2(spoken, 2)
    python = io.TextIOWrapper(os.fdopen(spoken, "wb", buffering=0), "utf-8", write_through=True)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with redirect_stderr(python):
            yield said
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.dup2(saved, 2)
        os.close(saved)
        if size := os.lseek(spoken, 0, os.SEEK_END):
            said += os.pread(spoken, size, 0).decode(errors="replace").splitlines()
        python.close()
    assert not rang, f"not done in {limit} s, and the call went on"


def outcome(use: Callable[[], Any], *culprits: str | Path, limit: float = LIMIT) -> Any:
    """What `use` returns; None when it refuses its input. Anything else fails.

    Args:
        culprits: of which the refusal must name one.
    """
    result = None
    with judged(limit) as said:
        try:
            result = use()
            tally["used"] += 1
        except InputError as error:
            check_line(str(error), *culprits)
            tally["refused"] += 1
    assert not [line for line in said if not line.startswith(("skipped: ", "note: "))], said
    return result


def instead(file: Path, content: bytes, use: Callable[[], Any], *culprits: str | Path) -> Any:
    """The outcome of `use` while a file has another content."""
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        return outcome(use, *(culprits or (file,)))
    finally:
        file.write_bytes(whole)


def check_line(message: str, *culprits: str | Path) -> None:
    """Hold a refusal against what is promised of it."""
    line = one_line(message)
    assert any(str(culprit) in line for culprit in culprits), f"names none of {culprits}: {line}"
    assert 0 < len(line) <= LONGEST, f"{len(line)} characters are no clear line: {line[:200]}"
    assert line.isprintable()


def command(words: list[str], room: Path, may_fail: tuple[str, ...] = ()) -> int:
    """The exit code of `minift WORDS`, run in the folder `room`, which stays as it was unless the code is 0.

    Args:
        may_fail: what a line that comes with code 1 may say; by default, no command may end so.
    """
    before, here, stdin = snapshot(room), Path.cwd(), sys.stdin
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    os.chdir(room)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""), "utf-8")
    try:
        with judged() as said, redirect_stdout(stdout):
            try:
                code = main(words)
            except SystemExit as end:  # --help, --version
                code = int(end.code or 0)
    finally:
        os.chdir(here)
        sys.stdin = stdin
    errors = [line for line in said if line.startswith("minift: error: ")]
    noted = [line for line in said if line.startswith(("note: ", "skipped: ", "training: "))]  # that: how far it is
    assert [line for line in said if line] == noted + errors, said
    assert code in ((0, 1, 2) if may_fail else (0, 2)), (code, said)
    assert len(errors) == (code != 0), said
    if code:
        check_line(errors[0], "minift: error: ")
        assert code == 2 or any(words in errors[0] for words in may_fail), errors
        assert code == 1 or snapshot(room) == before, "it was refused, and left something behind"
    tally["refused" if code else "used"] += 1
    return code


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder, with the files' contents."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def judged_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limit a test's memory, make warnings errors, and say how many inputs were used and refused.

    A target that refuses all inputs, or none, is one whose inputs are not what they were meant to be.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    tally.clear()
    try:
        with warnings.catch_warnings():
            for kind in (UserWarning, FutureWarning, RuntimeWarning):
                warnings.simplefilter("error", kind)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if tally["inputs"]:
        print(f"{request.node.name}: {tally['inputs']} inputs; calls: {tally['used']} used, {tally['refused']} refused")
        assert min(tally["used"], tally["refused"]) > 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In a long run, each target is several tests."""
    if EXAMPLES and hasattr(metafunc.function, "hypothesis"):
        metafunc.fixturenames.append("round")
        metafunc.parametrize("round", range(-(-EXAMPLES // ROUND)))


# Random inputs --------------------------------------------------------------------------------------------------------

ANY = st.characters()  # halves of surrogate pairs, control characters and all
PLAIN = st.characters(exclude_categories=["Cs"])
# fmt: off
HOSTILE = (
    "", " ", "\n", "\r\n", "\t\u3000", "\0", "\x1b[2J", "\u2028", "\ufeff", "\u202e", "\u2581", "\u2581\u2581 \u2581",
    "e\u0301", "<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>", "<<SYS>>", "[INST]", "### Answer:", "### Response:",
    "\U0001f642", "{question}", "{answer}", "{system}", "{", "%s", "\\1", "\\g<0>", "\u0130\u00df",
    "a" * 400, " a  b " * 9,
)
PATCHES = (
    b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\xff\xff\xff\x7f", b"9999", b"null", b'"', b"[[[[", b"]", b"}",
    b"-", b"\n", b",",
)
# fmt: on
TEXT = st.text(PLAIN, max_size=12) | st.sampled_from(HOSTILE)
HUGE = (2**31 - 1, 2**31, -(2**31), 2**63, 2**64 - 1, 10**30, -(10**400))
NUMBERS = (0, -0.0, 1, -1, 2, 3, 8, 0.5, 1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf, *HUGE)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-3, 300) | st.sampled_from(NUMBERS),
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.floats(),
    st.text(ANY, max_size=12) | st.sampled_from(HOSTILE),
    st.sampled_from(([], {}, [[]], [1, 2], [None], {"": {}}, {"a": [1]}, ["\ud83d"]))
    | st.builds(nested, st.integers(1, 60)),
    st.lists(st.integers(-3, 300) | st.floats() | st.text(ANY, max_size=4), max_size=4),
)

# Lines of data, which may be records
KEYS = st.sampled_from(("text", "question", "answer", "instruction", "input", "output", "response", "system", "metric"))
RECORD = st.dictionaries(KEYS | KEYS | TEXT, TEXT | TEXT | VALUES, max_size=5)
PHRASE = st.builds("{} {}".format, st.sampled_from(("What", "Mexico?", "1 + 1", "é")), TEXT)
PAIR = st.fixed_dictionaries({"question": PHRASE, "answer": TEXT}, optional={"system": TEXT})
PAGE = st.fixed_dictionaries({"text": PHRASE}, optional={"url": VALUES})
CHOICE = st.fixed_dictionaries(
    {"question": PHRASE, "choices": st.lists(PHRASE, max_size=4), "answer": st.integers(-1, 4)}
)
LINE = st.one_of(
    st.one_of(RECORD, PAIR, CHOICE, VALUES).map(json.dumps).map(str.encode),
    RECORD.map(lambda values: repr(values).encode(errors="replace")),
    st.binary(max_size=20),
)
ALIKE = st.one_of(*(st.lists(kind, max_size=6) for kind in (RECORD, PAIR, PAGE, CHOICE)))
LINES = st.lists(LINE, max_size=6).map(b"\n".join) | ALIKE.map(
    lambda records: "\n".join(map(json.dumps, records)).encode()
)
# Of JSON: where (a step for each level, down from the top), what is done there, and with which value.
Changes = list[tuple[list[int], str, Any]]
# Of bytes: where (from the start or the end), what is done there, and with which bytes.
Edits = list[tuple[int, str, bytes]]
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *HOSTILE,
    *range(-3, 70),
    None,
    True,
    False,
    [],
    {},
    [[]],
    [1, 2],
    ["\ud83d"],
    nested(60),
)
CHANGE = ("set", "set", "set", "drop", "rename", "add", "move")
EDIT = ("replace", "replace", "insert", "delete", "cut", "flip", "repeat")


def make_changes(rng: random.Random) -> Changes:
    return [
        ([rng.randrange(300) for _ in range(rng.randint(1, 4))], rng.choice(CHANGE), rng.choice(ODD))
        for _ in range(rng.choice((1, 1, 1, 2)))
    ]


def make_edits(rng: random.Random) -> Edits:
    return [
        (
            rng.choice((rng.randrange(400), -rng.randrange(400), rng.randrange(2**20))),
            rng.choice(EDIT),
            rng.choice((rng.randbytes(rng.randint(1, 8)), rng.choice(PATCHES))),
        )
        for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]


def make_few_edits(rng: random.Random) -> Edits:
    return make_edits(rng) if rng.random() < 0.2 else []


DRAWN_EDITS = st.lists(
    st.tuples(
        st.integers(0, 400) | st.integers(-400, -1) | st.integers(0, 2**20),
        st.sampled_from(EDIT),
        st.binary(min_size=1, max_size=8) | st.sampled_from(PATCHES),
    ),
    max_size=4,
)
FEW_DRAWN_EDITS = st.one_of(st.just([]), st.just([]), st.just([]), DRAWN_EDITS)
DRAWN_CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from(CHANGE), VALUES), max_size=2
)
EDITS = varied(DRAWN_EDITS, make_edits)
SOME_EDITS = varied(FEW_DRAWN_EDITS, make_edits)  # of files that are odd already
FEW_EDITS = varied(FEW_DRAWN_EDITS, make_few_edits)  # of files in which something else is changed
CHANGES = varied(DRAWN_CHANGES, make_changes)


def changed(values: Any, changes: Changes) -> Any:
    """Plain values, with some of them exchanged, left out or renamed."""
    values = {"": copy.deepcopy(values)}
    for path, action, value in changes:
        owner, key, new = values, "", copy.deepcopy(value)
        for step in path:
            inner = owner[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            owner, key = inner, (list(inner) if isinstance(inner, dict) else range(len(inner)))[step % len(inner)]
        if action == "set" or owner is values:
            owner[key] = new
        elif action == "drop":
            del owner[key]
        elif action == "add":
            owner[key] = [owner[key], new]
        elif isinstance(owner, dict):
            name = new if action == "rename" and isinstance(new, str) else f"{key}s"
            owner[name] = owner.pop(key)
        else:
            owner.append(owner.pop(0))
    return values[""]


def damaged(content: bytes, edits: Edits) -> bytes:
    """A file's bytes, some of them others, gone or doubled."""
    data = bytearray(content)
    for place, action, patch in edits:
        at = place % (len(data) + 1)
        if action == "replace":
            data[at : at + len(patch)] = patch
        elif action == "insert":
            data[at:at] = patch
        elif action == "delete":
            del data[at : at + 1 + patch[0]]
        elif action == "cut":
            del data[at:]
        elif action == "flip" and at < len(data):
            data[at] ^= 1 << patch[0] % 8
        elif action == "repeat":
            data[at:at] = data[at : at + 64] * (1 + patch[0] % 8)
    return bytes(data)


def spoilt_json(values: Any, changes: Changes, edits: Edits) -> bytes:
    """The text of a JSON file whose values, and then whose bytes, were changed."""
    return damaged(json.dumps(changed(values, changes)).encode(), edits)


# Files that are whole -------------------------------------------------------------------------------------------------


def little_tokenizer() -> Tokenizer:
    """A tokenizer of few pieces, quick to read."""
    return train_tokenizer(["What is the capital of Mexico? Mexico City"] * 20, 290)


def whole_models(folder: Path) -> Path:
    """A folder of small models: native, hf (with a tokenizer.json), sharded, meta, and an adapter of hf."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = small_model(tie_word_embeddings=False, vocab_size=290, **sizes, num_key_value_heads=1)
    save_model(folder / "native", model, little_tokenizer())
    (folder / "native" / "SHA256SUMS").unlink()  # by which damage of any kind would be found first
    convert(folder / "native", folder / "hf", "hf")
    convert(folder / "native", folder / "meta", "meta", shards=1)
    (folder / "meta" / "minift.json").unlink()
    weights, specs = model.state_dict(), open_tensors(folder / "native" / "model.pt").specs
    (folder / "sharded").mkdir()
    write_huggingface(folder / "sharded", model.config, specs, weights.__getitem__, shard_bytes=12_000)
    (folder / "adapter").mkdir()
    add_lora(model, LoRAConfig(2, 4.0, ("q_proj", "up_proj")), torch.Generator().manual_seed(0))
    write_peft(
        folder / "adapter", adapter_weights(model), LoRAConfig(2, 4.0, ("q_proj", "up_proj")), str(folder / "hf")
    )
    return folder
