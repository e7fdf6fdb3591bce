"""The promise that a checkpoint is only data: nothing in it runs, and whatever is wrong with it is said in one line.

Models come from strangers, from broken downloads and from other people's scripts. Each file here is whole at first and
is then spoiled in one way. `load_model` must raise InputError, and `convert`, `info` and `generate` must return 2 with
the same text as their only line on stderr: the file, and the tensor where there is one. That takes a moment, not longer
with larger lies, and leaves nothing behind. Files that could take the interpreter with them are tried in a process of
their own; at the end, a few thousand files are damaged at random.
"""

import copy
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.errors import LONGEST_LINE, InputError, RunError, one_line
from minift.formats import huggingface
from minift.formats.convert import convert
from minift.formats.huggingface import write_huggingface
from minift.formats.open import open_model
from minift.formats.opened import open_tensors
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT, small_model, soon_done, time_limit

MOMENT = 3.0  # seconds that a refusal may compute; most take a hundredth of one
VOCABULARY = 98
PT_FILES = {"native": "model.pt", "bin": "pytorch_model.bin", "meta": "consolidated.01.pth"}
# Folders and files: native, hf (one safetensors file), sharded (two of them), bin (pytorch_model.bin), meta (two
# shards), legacy.bin and v1.bin (llama2.c). Of each format, one matrix of a middle layer:
MATRIX = {
    "native": "layers.1.mlp.up_proj.weight",
    "hf": "model.layers.1.mlp.up_proj.weight",
    "bin": "model.layers.1.mlp.up_proj.weight",
    "meta": "layers.1.feed_forward.w3.weight",
}
NORM = {"native": "norm.weight", "hf": "model.norm.weight", "bin": "model.norm.weight", "meta": "norm.weight"}

Models = dict[str, Path]
Take = Callable[..., Path]
Refuse = Callable[..., str]
Change = Callable[[dict[str, Any]], Any]


def safetensors() -> Any:
    """Hugging Face's own package. Without it, the test is skipped."""
    return pytest.importorskip("safetensors.torch")


def make_models(folder: Path, dtype: torch.dtype = torch.float32) -> Models:
    """The same small model, with a head of its own, in every format."""
    model = small_model(tie_word_embeddings=False, vocab_size=VOCABULARY).to(dtype)
    save_model(folder / "native", model)
    (folder / "native" / "SHA256SUMS").unlink()  # by which damage of any kind would be found first
    convert(folder / "native", folder / "hf", "hf")
    convert(folder / "native", folder / "meta", "meta", shards=2)
    (folder / "meta" / "minift.json").unlink()  # as Meta's own folders are
    (folder / "bin").mkdir()
    weights = model.state_dict()
    named = {name if name.startswith("lm_head") else f"model.{name}": weight for name, weight in weights.items()}
    torch.save(named, folder / "bin" / "pytorch_model.bin")
    shutil.copy(folder / "hf" / "config.json", folder / "bin" / "config.json")
    (folder / "sharded").mkdir()
    specs = open_model(folder / "native").specs
    size = sum(spec.nbytes for spec in specs.values())
    write_huggingface(folder / "sharded", model.config, specs, weights.__getitem__, shard_bytes=size * 2 // 3)
    if dtype == torch.float32:
        for version, name in ((0, "legacy.bin"), (1, "v1.bin")):
            convert(folder / "native", folder / name, "llama2c", version=version)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Whole models of every format, to be copied."""
    return make_models(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def low_precision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """The same in the two dtypes of 16 bits."""
    dtypes = ("bfloat16", "float16")
    return {name: make_models(tmp_path_factory.mktemp(name), getattr(torch, name)) for name in dtypes}


@pytest.fixture
def take(models: Models, tmp_path: Path) -> Take:
    """A copy of one of the models, to be spoiled."""

    def copied(kind: str, source: Models = models) -> Path:
        if kind in ("hf", "sharded"):
            safetensors()
        path = tmp_path / source[kind].name
        return Path((shutil.copytree if source[kind].is_dir() else shutil.copy)(source[kind], path))

    return copied


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Try to use a model that must be refused, in each way; returns the line. See the module's text.

    `info` does not read the weights: `seen_by_info=False` for what only they show.
    """

    def run(path: Path, *culprits: str, seen_by_info: bool = True) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        with soon_done(MOMENT), stderr_of_a_process(), pytest.raises(InputError) as caught:
            load_model(path)
        message = str(caught.value)
        assert "\n" not in message
        for culprit in culprits:
            assert culprit in message
        commands = [["convert", path, tmp_path / "out", "--to", "native"], ["generate", "--model", path, *PROMPT]]
        if seen_by_info:
            commands.append(["info", "--model", path])
        for words in commands:
            with soon_done(MOMENT), stderr_of_a_process():
                assert main([str(word) for word in words]) == 2
            stderr = capfd.readouterr().err
            shown = " ".join(message.split())
            if len(shown) > LONGEST_LINE:
                shown = one_line(shown)
            assert stderr == f"minift: error: {shown}\n".encode(errors="replace").decode()
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


PROMPT = ["--prompt", "Hello", "--device", "cpu"]


@contextmanager
def stderr_of_a_process() -> Iterator[None]:
    """Make a warning that a process of its own would print on stderr an error; pytest hides them otherwise."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", FutureWarning)
        yield


def outcome(path: Path, use: Callable[[Path], object] = load_model) -> str:
    """ "used" or "refused"; any other exception, or one that takes long, fails the test."""
    with soon_done(MOMENT):
        try:
            use(path)
            result = "used"
        except InputError:
            result = "refused"
    return result


def change_pt(file: Path, change: Change) -> None:
    """Change the dict in a file of PyTorch; what `change` returns, if anything, takes its place."""
    values = torch.load(file, weights_only=True)
    changed = change(values)
    torch.save(values if changed is None else changed, file)


def change_safetensors(file: Path, change: Change) -> None:
    values = safetensors().load_file(file)
    change(values)
    safetensors().save_file(values, file, {"format": "pt"})


def change_weights(path: Path, change: Change) -> Path:
    """Change the tensors of a folder; of Meta's two shards, those of the second. Returns the file."""
    file = path / PT_FILES.get(path.name, "model.safetensors")
    (change_pt if path.name in PT_FILES else change_safetensors)(file, change)
    return file


def change_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **changes}))


def put(name: str, value: Any) -> Change:
    def change(values: dict[str, Any]) -> None:
        values[name] = value

    return change


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", ["native", "hf", "sharded", "bin", "meta", "legacy.bin", "v1.bin"])
def test_the_models_are_whole_before_they_are_spoiled(take: Take, models: Models, kind: str) -> None:
    wanted = load_model(models["native"]).state_dict()
    found = load_model(take(kind)).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# Nothing runs ---------------------------------------------------------------------------------------------------------


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def system(marker: Path) -> Call:
    return Call(os.system, f"touch '{marker}'")


def evaluated(marker: Path) -> Call:
    return Call(eval, f"open({str(marker)!r}, 'w')")


def executed(marker: Path) -> Call:
    return Call(exec, f"open({str(marker)!r}, 'w')")


def process(marker: Path) -> Call:
    return Call(subprocess.call, ["touch", str(marker)])


def started(marker: Path) -> Call:
    return Call(subprocess.Popen, ["touch", str(marker)])


def folder_made(marker: Path) -> Call:
    return Call(os.mkdir, str(marker))


def loaded_again(marker: Path) -> Call:
    """A function of torch's own that trusts its input."""
    return Call(torch.storage._load_from_bytes, pickled_for_torch(folder_made(marker)))


def pickled_for_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zip_of(file: Path, data_pkl: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> None:
    """PyTorch's container, around a pickle made by hand."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        named = {"data.pkl": data_pkl, "byteorder": b"little", **(records or {}), "version": b"3\n"}
        for name, content in named.items():
            archive.writestr(f"archive/{name}", content)


def as_the_file(file: Path, attack: Call) -> None:
    torch.save(attack, file)


def among_tensors(file: Path, attack: Call) -> None:
    change_pt(file, lambda values: values.update({list(values)[1]: attack}))


def deep_inside(file: Path, attack: Call) -> None:
    change_pt(file, lambda values: values.update(more={"of": [({"this": (attack,)},)]}))


def as_a_key(file: Path, attack: Call) -> None:
    zip_of(file, b"\x80\x02}" + pickle.dumps(attack, 2)[2:-1] + b"K\x01s.")


def on_a_tensor(file: Path, attack: Call) -> None:
    parameter = torch.nn.Parameter(torch.ones(24))
    parameter.attack = attack  # type: ignore[attr-defined]
    change_pt(file, put("more", parameter))


def in_the_old_container(file: Path, attack: Call) -> None:
    torch.save({"a": torch.ones(3), "b": attack}, file, _use_new_zipfile_serialization=False)


def bare(file: Path, attack: Call) -> None:
    file.write_bytes(pickle.dumps(attack, 2))


def bare_and_new(file: Path, attack: Call) -> None:
    file.write_bytes(pickle.dumps({"a": attack}, 5))


def new_in_a_zip(file: Path, attack: Call) -> None:
    zip_of(file, pickle.dumps({"a": attack}, 4))


@pytest.mark.parametrize("attack", [system, evaluated, executed, process, started, folder_made, loaded_again])
def test_the_attacks_work_on_a_reader_that_trusts_its_input(tmp_path: Path, attack: Callable[[Path], Call]) -> None:
    result = pickle.loads(pickle.dumps(attack(tmp_path / "marker")))
    if isinstance(result, subprocess.Popen):
        result.wait(60)
    assert (tmp_path / "marker").exists()


ATTACKS = [system, evaluated, executed, process, started, folder_made, loaded_again]
FORMS = [
    as_the_file,
    among_tensors,
    deep_inside,
    as_a_key,
    on_a_tensor,
    in_the_old_container,
    bare,
    bare_and_new,
    new_in_a_zip,
]


@pytest.mark.parametrize(
    ("kind", "attack", "form"),
    [("native", attack, form) for attack in ATTACKS for form in FORMS]
    + [(kind, folder_made, form) for kind in ("bin", "meta") for form in FORMS],
)
def test_a_pickle_that_calls_a_function_is_refused_and_the_function_is_not_called(
    take: Take,
    refuse: Refuse,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    attack: Callable[[Path], Call],
    form: Callable[[Path, Call], None],
) -> None:
    folder, marker = take(kind), tmp_path_factory.mktemp("attack") / "marker"
    form(folder / PT_FILES[kind], attack(marker))
    refuse(folder, str(folder / PT_FILES[kind]))
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "cos\nsystem\n(S'touch MARKER'\ntR.",  # GLOBAL, REDUCE
        "(S'touch MARKER'\nios\nsystem\n.",  # INST
        "(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        "cposix\nsystem\n(S'touch MARKER'\ntR.",
        'c__builtin__\neval\n(S\'open("MARKER", "w")\'\ntR.',
        "csubprocess\ncall\n((lp0\nS'touch'\naS'MARKER'\natR.",
        "(dp0\nS'a'\ncos\nsystem\n(S'touch MARKER'\ntRs.",
        "ctorch.hub\nload\n(S'MARKER'\nS'model'\nNNNI01\nS'local'\ntR.",
    ],
)
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_a_pickle_made_by_hand_is_refused(
    take: Take, refuse: Refuse, tmp_path_factory: pytest.TempPathFactory, text: str, container: str
) -> None:
    marker = tmp_path_factory.mktemp("attack") / "marker"
    content = text.replace("MARKER", str(marker)).encode()
    folder = take("native")
    if container == "zip":
        zip_of(folder / "model.pt", content)
    else:
        (folder / "model.pt").write_bytes(content)
    refuse(folder, "model.pt")
    assert not marker.exists()


@pytest.mark.parametrize("form", [among_tensors, bare, bare_and_new])
def test_a_refusal_says_what_the_file_wanted_and_never_how_to_let_it(
    take: Take, refuse: Refuse, tmp_path_factory: pytest.TempPathFactory, form: Callable[[Path, Call], None]
) -> None:
    folder = take("native")
    form(folder / "model.pt", system(tmp_path_factory.mktemp("attack") / "marker"))
    line = refuse(folder)
    for advice in ("weights_only", "likely succeed", "safe_globals", "torch.load"):
        assert advice not in line
    if form is not bare_and_new:  # which the reader does not get that far with
        assert "system" in line


def test_a_process_of_its_own_prints_one_line_too(
    take: Take, minift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = take("bin")
    bare_and_new(folder / "pytorch_model.bin", system(tmp_path / "marker"))
    result = minift("convert", folder, tmp_path / "out", "--to", "native")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"minift: error: {folder / 'pytorch_model.bin'}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_no_connection_is_opened_and_no_process_started(
    models: Models,
    take: Take,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    small_checkpoint: Path,
    refuse: Refuse,
) -> None:
    safetensors()
    out = tmp_path_factory.mktemp("out")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model's files made it leave the process")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket.socket, "connect_ex", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    for name in ("system", "posix_spawn", "posix_spawnp", "fork", "forkpty", "execv", "execve", "popen"):
        monkeypatch.setattr(os, name, forbidden)
    for kind, path in models.items():
        load_model(path)
        convert(path, out / kind, "hf")
    load_tokenizer(small_checkpoint)
    for to in ("native", "hf", "meta", "llama2c"):
        convert(small_checkpoint, out / to / "model", to)
    load_tokenizer(out / "hf" / "model")
    folder = take("native")
    among_tensors(folder / "model.pt", folder_made(out / "marker"))
    refuse(folder)
    assert not (out / "marker").exists()


# Pickles that run nothing and are no tensors either -------------------------------------------------------------------


def spoiled_parameter() -> Tensor:
    """Shadows methods of its class. PyTorch's safe reader restores a Parameter's attributes, whatever their names."""
    parameter = torch.nn.Parameter(torch.ones(24))
    for name in ("detach", "numel", "to", "contiguous", "view"):
        setattr(parameter, name, "shadowed")
    return parameter


ODD_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.ones(24).to_sparse(),
    "sparse matrix": lambda: torch.ones(4, 6).to_sparse_csr(),
    "meta": lambda: torch.ones(24, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "int64": lambda: torch.ones(24, dtype=torch.int64),
    "bool": lambda: torch.ones(24, dtype=torch.bool),
    "complex64": lambda: torch.ones(24, dtype=torch.complex64),
    "float8": lambda: torch.ones(24).to(torch.float8_e4m3fn),
    "conjugated": lambda: torch.ones(24, dtype=torch.complex64).conj(),
    "list": lambda: [1.0] * 24,
    "number": lambda: 1.0,
    "dict": lambda: {"weight": torch.ones(24)},
    "nothing": lambda: None,
    "storage": lambda: torch.ones(24).untyped_storage(),
    "size": lambda: torch.Size([24]),
    "dtype": lambda: torch.float32,
    "long": lambda: 10**5_000,
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.parametrize("kind", PT_FILES)
@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:Sparse CSR")
def test_what_is_not_a_plain_tensor_of_weights_is_named(take: Take, refuse: Refuse, kind: str, odd: str) -> None:
    folder, value = take(kind), ODD_TENSORS[odd]()
    file = change_weights(folder, put(NORM[kind], value))
    refuse(folder, str(file), NORM[kind] if odd != "long" else "")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_tensor_is_refused(take: Take, refuse: Refuse) -> None:
    folder = take("native")
    change_weights(folder, put("norm.weight", torch.quantize_per_tensor(torch.ones(24), 0.1, 0, torch.qint8)))
    refuse(folder, str(folder / "model.pt"))


@pytest.mark.parametrize("kind", PT_FILES)
def test_attributes_of_a_parameter_are_never_called(take: Take, models: Models, kind: str, tmp_path: Path) -> None:
    folder = take(kind)
    change_weights(folder, put(NORM[kind], spoiled_parameter()))
    if outcome(folder) == "used":
        assert outcome(folder, lambda path: convert(path, tmp_path / "out", "native")) == "used"
        assert torch.equal(load_model(tmp_path / "out").norm.weight, torch.ones(24))


def test_parameters_count_as_tensors(take: Take, models: Models, tmp_path: Path) -> None:
    safetensors()
    folder = take("native")
    change_weights(folder, lambda values: {name: torch.nn.Parameter(value) for name, value in values.items()})
    for to in ("native", "hf", "meta", "llama2c"):
        convert(folder, tmp_path / f"to-{to}", to)
        assert torch.equal(load_model(tmp_path / f"to-{to}").norm.weight, load_model(models["native"]).norm.weight)


def test_a_negated_view_counts_as_its_values(take: Take, tmp_path: Path) -> None:
    """A tensor may be stored with the word that its sign is to be turned."""
    safetensors()
    folder = take("native")
    change_weights(folder, put("norm.weight", torch._neg_view(torch.full((24,), -2.0))))
    if outcome(folder) == "used":
        assert torch.equal(load_model(folder).norm.weight.detach(), torch.full((24,), 2.0))
        assert outcome(folder, lambda path: convert(path, tmp_path / "out", "hf")) == "used"
        assert torch.equal(load_model(tmp_path / "out").norm.weight, torch.full((24,), 2.0))


@pytest.mark.parametrize("key", [5, None, b"norm.weight", ("norm.weight",), 1.5, torch.float32, (((),),)], ids=repr)
@pytest.mark.parametrize("kind", PT_FILES)
def test_a_name_that_is_no_text_is_refused(take: Take, refuse: Refuse, kind: str, key: Any) -> None:
    folder = take(kind)
    file = change_weights(folder, lambda values: values.update({key: torch.ones(2)}))
    refuse(folder, str(file))


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], "text", 5, None, Counter("text"), {}])
@pytest.mark.parametrize("kind", PT_FILES)
def test_a_file_that_holds_no_named_tensors_is_refused(take: Take, refuse: Refuse, kind: str, value: Any) -> None:
    folder = take(kind)
    torch.save(value, folder / PT_FILES[kind])
    refuse(folder, str(folder if value == {} and kind == "bin" else folder / PT_FILES[kind]))


def test_an_ordered_dict_is_a_dict(take: Take) -> None:
    folder = take("native")
    change_weights(folder, lambda values: OrderedDict(values))
    load_model(folder)


def tensor_pickle(
    name: str, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, elements: int = 24
) -> bytes:
    """One more tensor, in words of our own: of any size, on a storage `1` that is said to have `elements`."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("1") + text("cpu") + number(elements) + b"tQ"
    arguments = storage + number(offset) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


@pytest.mark.parametrize(
    ("size", "stride", "offset", "elements"),
    [
        ((25,), (1,), 0, 24),
        ((24,), (2,), 0, 24),
        ((24,), (1,), 1, 24),
        ((24,), (1,), -1, 24),
        ((24,), (-1,), 23, 24),
        ((-24,), (1,), 0, 24),
        ((24,), (), 0, 24),
        ((2**62, 4), (4, 1), 0, 24),
        ((2**63,), (1,), 0, 24),
        ((24,), (2**62,), 0, 24),
        ((24,), (1,), 2**62, 24),
        ((24,), (1,), 0, 2**40),
        ((2**40,), (1,), 0, 2**40),
        ((24,), (1,), 0, 2**62),
        ((24,), (1,), 0, 2**70),
        ((24,), (1,), 0, -24),
        ((30,), (1,), 0, 30),  # the bytes of the next record would be weights
    ],
)
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_a_tensor_that_reaches_beyond_its_bytes_is_refused(
    take: Take,
    refuse: Refuse,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    elements: int,
    container: str,
) -> None:
    folder = take("native")
    data = tensor_pickle("norm.weight", size, stride, offset, elements)
    if container == "zip":
        zip_of(folder / "model.pt", data, {"data/1": bytes(96), "data/2": bytes(4_096)})
    else:
        (folder / "model.pt").write_bytes(data)
    refuse(folder, "model.pt")


def test_a_record_shorter_than_its_storage_is_noticed(take: Take, refuse: Refuse) -> None:
    """Otherwise a weight's last numbers would be the bytes of whatever follows it in the file."""
    folder = take("native")
    file = folder / "model.pt"
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    cut = next(name for name, content in records.items() if len(content) == 24 * 4)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:-4] if name == cut else content)
    refuse(folder, "model.pt")


def test_a_compressed_file_is_refused_for_what_it_is(take: Take, refuse: Refuse) -> None:
    """Tensors are used where they lie, so a zip that somebody has packed again must not be taken at its word."""
    folder = take("native")
    file = folder / "model.pt"
    change_pt(file, lambda values: {name: torch.ones_like(value) for name, value in values.items()})
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    line = refuse(folder, "model.pt")
    assert "NaN" not in line


def repeated(values: dict[str, Any]) -> None:
    values["norm.weight"] = torch.ones(1).expand(24)


def overlapping(values: dict[str, Any]) -> None:
    values["layers.0.mlp.up_proj.weight"] = torch.arange(64.0).as_strided((40, 24), (1, 1))


def shared(values: dict[str, Any]) -> None:
    values["lm_head.weight"] = values["embed_tokens.weight"]


def one_for_all_norms(values: dict[str, Any]) -> None:
    norm = values["norm.weight"]
    values.update({name: norm for name in values if name.endswith("layernorm.weight")})


@pytest.mark.parametrize("change", [repeated, overlapping, shared, one_for_all_norms])
def test_no_two_weights_of_a_loaded_model_are_the_same_bytes(take: Take, change: Change) -> None:
    """Or a step of training that changes one would change the other as well."""
    folder = take("native")
    change_weights(folder, change)
    if outcome(folder) == "refused":
        return
    model = load_model(folder)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name] + 1) for name, value in model.state_dict().items())


def test_a_small_file_cannot_stand_for_a_large_model(take: Take, refuse: Refuse) -> None:
    """Strides of zero let 96 bytes be a matrix of a million million numbers, which the config agrees with."""
    folder = take("native")
    sizes = {"vocab_size": 2**20, "hidden_size": 2**20, "intermediate_size": 2**20, "head_dim": 2**18}
    change_json(folder / "config.json", **sizes)

    def grow(values: dict[str, Any]) -> None:
        for name, value in values.items():
            heads = {"q_proj": (2**20, 2**20), "k_proj": (2**19, 2**20), "v_proj": (2**19, 2**20)}
            matrix = next((shape for part, shape in heads.items() if part in name), (2**20, 2**20))
            values[name] = torch.ones(1).expand(matrix if value.dim() == 2 else (2**20,))

    change_weights(folder, grow)
    with time_limit(5):
        refuse(folder, "model.pt", seen_by_info=False)


def nested_name(depth: int) -> bytes:
    """{((((…)))): 1}: hashing a tuple goes into the tuples in it."""
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."


def doubled(depth: int) -> bytes:
    """A tuple of two tuples, each of which is the same tuple of two tuples, …: 2^depth of them in a few bytes."""
    steps = [b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth)]
    return b")q\x00" + b"".join(steps)


BOMBS = {
    "a name nested 1,000 times": nested_name(1_000),
    "a name nested 300,000 times": nested_name(300_000),
    "a name of 2^60 tuples": b"\x80\x02}" + doubled(60) + b"K\x01s.",
    "a value of 2^60 tuples": b"\x80\x02}X\x01\x00\x00\x00a" + doubled(60) + b"s.",
    "lists nested 300,000 times": b"\x80\x02}X\x01\x00\x00\x00a]" + b"]" * 300_000 + b"a" * 300_000 + b"s.",
    "a set of 2^60 tuples": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nset\n(" + doubled(60) + b"\x85tRs.",
    "64 GiB of zeros": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x08"
    + struct.pack("<q", 2**36)
    + b"\x85Rs.",
    "300,000 marks": b"\x80\x02" + b"(" * 300_000 + b".",
    "an end without a start": b"\x80\x02.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a dict that holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_a_pickle_bomb_is_refused_in_one_line(take: Take, tmp_path: Path, bomb: str, container: str) -> None:
    """In a process of its own, because some of these would take the interpreter with them."""
    folder = take("native")
    if container == "zip":
        zip_of(folder / "model.pt", BOMBS[bomb])
    else:
        (folder / "model.pt").write_bytes(BOMBS[bomb])
    pid = os.fork()  # which has torch loaded already
    if pid == 0:
        code = 99
        try:
            signal.alarm(20)
            with (tmp_path / "stderr").open("w") as sys.stderr:
                code = main(["info", "--model", str(folder)])
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    stderr = (tmp_path / "stderr").read_text()
    assert os.waitstatus_to_exitcode(status) == 2, stderr
    assert len(stderr.splitlines()) == 1
    assert f"{folder / 'model.pt'}: " in stderr
    assert len(stderr) < 2_000


# Safetensors ----------------------------------------------------------------------------------------------------------


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def moved(first: int, last: int) -> Change:
    def change(entry: dict[str, Any]) -> None:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + first, end + last]

    return change


def set_to(**values: Any) -> Change:
    return lambda entry: entry.update(values)


def without(key: str) -> Change:
    return lambda entry: entry.pop(key)


def swapped(entry: dict[str, Any]) -> None:
    entry["data_offsets"].reverse()


ENTRIES: dict[str, Change] = {
    "longer than its shape": moved(0, 4),
    "shorter than its shape": moved(0, -4),
    "begins before the end of another": moved(-4, 0),
    "overlaps": moved(-4, -4),
    "leaves a gap": moved(4, 4),
    "begins behind its end": swapped,
    "far outside": moved(2**40, 2**40),
    "below zero": set_to(data_offsets=[-3840, 0]),
    "from 2^63": set_to(data_offsets=[2**63, 2**63 + 3840]),
    "to 2^64": set_to(data_offsets=[0, 2**64]),
    "offsets are text": set_to(data_offsets=["0", "3840"]),
    "offsets are letters": set_to(data_offsets="ab"),
    "offsets are fractions": set_to(data_offsets=[0.5, 3840.5]),
    "offsets are null": set_to(data_offsets=None),
    "offsets are nulls": set_to(data_offsets=[None, None]),
    "offsets are lists": set_to(data_offsets=[[0], [3840]]),
    "three offsets": set_to(data_offsets=[0, 3840, 7680]),
    "no offsets": without("data_offsets"),
    "unknown dtype": set_to(dtype="F99"),
    "wider dtype": set_to(dtype="F64"),
    "narrower dtype": set_to(dtype="BF16"),
    "narrow float": set_to(dtype="F8_E4M3"),
    "narrow floats": set_to(dtype="F8_E5M2", shape=[40, 96]),
    "half bytes": set_to(dtype="F4", shape=[40, 192]),
    "integers": set_to(dtype="I64", shape=[40, 12]),
    "integers of the same size": set_to(dtype="I32"),
    "booleans": set_to(dtype="BOOL", shape=[40, 96]),
    "complex": set_to(dtype="C64", shape=[40, 12]),
    "dtype is a number": set_to(dtype=5),
    "dtype is a list": set_to(dtype=["F32"]),
    "dtype is an object": set_to(dtype={}),
    "no dtype": without("dtype"),
    "negative shape": set_to(shape=[-40, -24]),
    "shape beyond 2^64": set_to(shape=[2**62, 4]),
    "shape of 2^70": set_to(shape=[2**70]),
    "transposed": set_to(shape=[24, 40]),
    "flat": set_to(shape=[960]),
    "one axis more": set_to(shape=[40, 24, 1]),
    "no shape": without("shape"),
    "shape is empty": set_to(shape=[]),
    "shape is text": set_to(shape="4024"),
    "shape is a number": set_to(shape=960),
    "shape is null": set_to(shape=None),
    "shape is fractions": set_to(shape=[40.0, 24.0]),
    "shape is nested": set_to(shape=[[40], [24]]),
    "shape is booleans": set_to(shape=[True, True]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry_of_a_header_is_named(take: Take, refuse: Refuse, entry: str) -> None:
    folder = take("hf")
    file = folder / "model.safetensors"
    header, data = header_and_data(file)
    ENTRIES[entry](header[MATRIX["hf"]])
    write_header(file, header, data)
    refuse(folder, str(file), MATRIX["hf"])


@pytest.mark.parametrize("entry", [None, 5, "F32", [], {}, True], ids=repr)
def test_an_entry_that_is_no_entry_is_named(take: Take, refuse: Refuse, entry: Any) -> None:
    folder = take("hf")
    file = folder / "model.safetensors"
    header, data = header_and_data(file)
    header[MATRIX["hf"]] = entry
    write_header(file, header, data)
    refuse(folder, str(file), MATRIX["hf"])


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F8_E4M3"])
def test_a_cut_file_is_not_blamed_on_a_tensor_of_another_dtype(take: Take, refuse: Refuse, dtype: str) -> None:
    """Some files carry a few integers beside the weights; what is at fault is the tensor whose bytes are missing."""
    folder = take("hf")
    file = folder / "model.safetensors"
    header, data = header_and_data(file)
    width = {"I64": 8, "BOOL": 1, "F8_E4M3": 1}[dtype]
    header["a.buffer"] = {"dtype": dtype, "shape": [8 // width], "data_offsets": [len(data), len(data) + 8]}
    header["the.last"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data) + 8, len(data) + 16]}
    write_header(file, header, data + bytes(12))
    assert "the.last" in refuse(folder, str(file))


@pytest.mark.parametrize("length", [0, 1, 7, -1, 100, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(take: Take, refuse: Refuse, length: int) -> None:
    folder = take("hf")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (right,) = struct.unpack_from("<Q", content)
    file.write_bytes(struct.pack("<Q", right - 1 if length == -1 else length) + content[8:])
    refuse(folder, str(file))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"true",
        b"NaN",
        b"not JSON",
        b'{"a": }',
        b'{"\xff": 1}',
        b"\xff\xfe{\x00}\x00",
        b"{}",
        b'{"__metadata__": 5}',
        b'{"__metadata__": {"format": 5}}',
        b'{"__metadata__": {"format": "tf"}}',
        b'{"a":' * 10_000,
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_header_that_is_none_is_refused(take: Take, refuse: Refuse, header: bytes) -> None:
    folder = take("hf")
    write_header(folder / "model.safetensors", header)
    refuse(folder, str(folder / "model.safetensors"))


def test_a_name_that_is_there_twice_is_refused(take: Take, refuse: Refuse) -> None:
    folder = take("hf")
    file = folder / "model.safetensors"
    header, data = header_and_data(file)
    begin = len(data)
    twice = json.dumps({"dtype": "F32", "shape": [24], "data_offsets": [begin, begin + 96]})
    text = json.dumps(header)[:-1] + f', "model.norm.weight": {twice}}}'
    write_header(file, text.encode(), data + bytes(96))
    refuse(folder, str(file))


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, b"x" * 4_096])
def test_bytes_behind_the_last_tensor_are_refused(take: Take, refuse: Refuse, extra: bytes) -> None:
    folder = take("hf")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(extra)
    refuse(folder, str(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", ["native", "hf", "sharded", "bin", "meta"])
def test_a_file_that_ends_anywhere_is_refused(models: Models, take: Take, refuse: Refuse, kind: str) -> None:
    folder = take(kind)
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    file = max(path for path in folder.iterdir() if path.suffix in suffixes)
    content = file.read_bytes()
    header = 8 + struct.unpack_from("<Q", content)[0] if file.suffix == ".safetensors" else 0
    ends = {0, 1, 7, 8, 9, header - 1, header, header + 1, *range(0, len(content), 2_311)}
    ends |= {len(content) - n for n in (1, 2, 21, 22, 23, 100, 1_000)}
    for end in sorted(end for end in ends if 0 <= end < len(content)):
        file.write_bytes(content[:end])
        line = refuse(folder, str(file)) if end % 7 == 0 else refused(folder, str(file))
        if header and end >= header:
            assert "tensor model." in line or "tensor lm_head." in line


def refused(path: Path, *culprits: str) -> str:
    """`refuse`, without the command line."""
    with stderr_of_a_process(), pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert "\n" not in line
    for culprit in culprits:
        assert culprit in line
    return line


# Shards and their index -----------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> tuple[Path, Path]:
    first, second = sorted(folder.glob("*.safetensors"))
    return first, second


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_missing_shard_is_named(take: Take, refuse: Refuse) -> None:
    folder = take("sharded")
    second = shards(folder)[1]
    second.unlink()
    refuse(folder, str(second), "missing")


def test_a_shard_that_is_a_folder_is_refused(take: Take, refuse: Refuse) -> None:
    folder = take("sharded")
    second = shards(folder)[1]
    second.unlink()
    second.mkdir()
    refuse(folder, str(second))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        "null",
        "5",
        '"text"',
        "{}",
        '{"a":' * 100_000,
        "[" * 100_000,
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": "x"}',
        '{"weight_map": 5}',
    ],
)
def test_an_index_that_is_none_is_named(take: Take, refuse: Refuse, text: str) -> None:
    folder = take("sharded")
    (folder / INDEX).write_text(text)
    refuse(folder, str(folder / INDEX))


def test_an_index_that_is_not_text_is_named(take: Take, refuse: Refuse) -> None:
    folder = take("sharded")
    (folder / INDEX).write_bytes(b'{"weight_map": {"\xff": 1}}')
    refuse(folder, str(folder / INDEX))


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "{tmp}/outside.safetensors",
        "inside/outside.safetensors",
        "./../outside.safetensors",
        "inside/../../outside.safetensors",
        "",
        ".",
        "..",
        "/",
        "//",
        "inside",
        "inside/",
        5,
        None,
        True,
        1.5,
        [],
        {},
        ["x"],
        "nowhere.safetensors",
        "a" * 300,
        "a" * 5_000,
        "\0",
        "\ud800",
        "\n",
        " ",
        "~",
        "config.json",
        INDEX,
        "model-00001-of-00002.safetensors/",
        "./model-00001-of-00002.safetensors",
        "file:model-00001-of-00002",
    ],
    ids=lambda place: repr(place)[:40],
)
def test_an_index_that_points_elsewhere_is_refused(take: Take, refuse: Refuse, tmp_path: Path, place: Any) -> None:
    """Not even where a shard that would do lies there."""
    folder = take("sharded")
    first, _ = shards(folder)
    (folder / "inside").mkdir()
    shutil.copy(first, tmp_path / "outside.safetensors")
    shutil.copy(first, folder / "inside" / "outside.safetensors")
    names = weight_map(folder)
    place = place.replace("{tmp}", str(tmp_path)) if isinstance(place, str) else place
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {n: place if s == first.name else s for n, s in names.items()}})
    )
    first.unlink()
    refuse(folder, str(folder))


def test_a_shard_outside_the_folder_is_not_even_opened(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = take("sharded")
    first, _ = shards(folder)
    outside = first.rename(tmp_path / "outside.safetensors")
    names = weight_map(folder)
    opened: list[Path] = []
    monkeypatch.setattr(huggingface, "open_tensors", lambda path: opened.append(path) or open_tensors(path))
    for place in (f"../{outside.name}", str(outside)):
        changed = {name: place if shard == first.name else shard for name, shard in names.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(folder, INDEX)
    assert outside.name not in {path.name for path in opened}


def in_the_wrong_shard(names: dict[str, str]) -> None:
    names[MATRIX["hf"]] = next(shard for shard in names.values() if shard != names[MATRIX["hf"]])


def not_in_the_index(names: dict[str, str]) -> None:
    del names[MATRIX["hf"]]


def only_in_the_index(names: dict[str, str]) -> None:
    names["model.layers.7.mlp.up_proj.weight"] = next(iter(names.values()))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (in_the_wrong_shard, MATRIX["hf"]),
        (not_in_the_index, MATRIX["hf"]),
        (only_in_the_index, "model.layers.7.mlp.up_proj.weight"),
    ],
)
def test_an_index_that_differs_from_its_shards_is_refused(
    take: Take, refuse: Refuse, change: Change, culprit: str
) -> None:
    folder = take("sharded")
    names = weight_map(folder)
    change(names)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    refuse(folder, str(folder), culprit)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "something.else"])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_tensor_that_is_in_a_shard_too_many_is_refused(take: Take, refuse: Refuse, name: str, shard: int) -> None:
    folder = take("sharded")
    file = shards(folder)[shard]
    if name in safetensors().load_file(file):
        return
    change_safetensors(file, put(name, torch.ones(24)))
    refuse(folder, str(file), name)


def test_shards_of_pytorch_files_are_checked_alike(take: Take, refuse: Refuse, tmp_path: Path) -> None:
    folder = take("bin")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(names.values()):
        torch.save({name: weights[name].clone() for name in weights if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    load_model(folder)
    index.write_text(json.dumps({"weight_map": {**names, MATRIX["bin"]: "../pytorch_model.bin"}}))
    refuse(folder, str(index), MATRIX["bin"])
    index.write_text(json.dumps({"weight_map": names}))
    as_the_file(folder / names[MATRIX["bin"]], folder_made(tmp_path / "marker"))
    refuse(folder, names[MATRIX["bin"]])
    assert not (tmp_path / "marker").exists()


# Meta's shards --------------------------------------------------------------------------------------------------------


def test_a_missing_shard_of_meta_is_named(take: Take, refuse: Refuse) -> None:
    folder = take("meta")
    (folder / "consolidated.00.pth").unlink()
    refuse(folder, "consolidated.00.pth")


def test_one_shard_too_few_or_too_many_is_refused(take: Take, refuse: Refuse) -> None:
    folder = take("meta")
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.02.pth")
    refuse(folder, "consolidated.0")
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.01.pth").unlink()
    refuse(folder, "consolidated.00.pth")


@pytest.mark.parametrize("name", ["consolidated.1.pth", "consolidated.x.pth", "consolidated.00.copy.pth"])
def test_a_shard_of_another_name_is_refused(take: Take, refuse: Refuse, name: str) -> None:
    folder = take("meta")
    shutil.copy(folder / "consolidated.01.pth", folder / name)
    refuse(folder, str(folder), name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.wq.weight", (12, 23)),
        ("layers.0.attention.wq.weight", (12, 48)),
        ("layers.0.attention.wo.weight", (23, 12)),
        ("layers.1.feed_forward.w2.weight", (12, 24)),
        ("tok_embeddings.weight", (97, 12)),
        ("output.weight", (49, 25)),
        ("norm.weight", (12,)),
        ("layers.1.ffn_norm.weight", (25,)),
        ("layers.1.ffn_norm.weight", (24, 1)),
    ],
)
def test_a_piece_of_another_shape_than_the_first_is_named(
    take: Take, refuse: Refuse, name: str, shape: tuple[int, ...]
) -> None:
    folder = take("meta")
    file = change_weights(folder, put(name, torch.ones(shape)))
    refuse(folder, file.name, name, seen_by_info=False)


def test_norms_that_differ_between_shards_are_refused(take: Take, refuse: Refuse) -> None:
    folder = take("meta")
    file = change_weights(folder, put("norm.weight", torch.zeros(24)))
    refuse(folder, str(file), "norm.weight", seen_by_info=False)


@pytest.mark.parametrize("name", ["layers.0.attention.wq.weight", "norm.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("shard", [0, 1])
def test_pieces_of_two_dtypes_are_joined_or_refused(take: Take, tmp_path: Path, name: str, shard: int) -> None:
    folder = take("meta")
    change_pt(folder / f"consolidated.0{shard}.pth", lambda values: values.update({name: values[name].half()}))
    found = outcome(folder)
    for to in ("native", "hf", "meta", "llama2c"):
        assert outcome(folder, lambda path, to=to: convert(path, tmp_path / f"to-{to}", to)) == found


# Tensors --------------------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(take: Take, refuse: Refuse) -> None:
    for kind, name in MATRIX.items():
        folder = take(kind)
        file = change_weights(folder, lambda values, name=name: values.__delitem__(name))
        refuse(folder, str(file), name)


def test_a_tensor_too_many_is_named(take: Take, refuse: Refuse) -> None:
    for kind, name in MATRIX.items():
        folder, extra = take(kind), name.replace("1", "2")
        file = change_weights(folder, put(extra, torch.ones(40, 24)))
        refuse(folder, str(file), extra)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda matrix: matrix.T.contiguous(),
    "flat": lambda matrix: matrix.flatten(),
    "a number": lambda matrix: matrix[0, 0].clone(),
    "empty": lambda matrix: matrix[:0].clone(),
    "one axis more": lambda matrix: matrix[None].clone(),
    "a row less": lambda matrix: matrix[:-1].clone(),
    "a column more": lambda matrix: torch.cat((matrix, matrix[:, :1]), 1),
    "integers": lambda matrix: matrix.long(),
    "booleans": lambda matrix: matrix.bool(),
    "of 8 bits": lambda matrix: matrix.to(torch.float8_e5m2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MATRIX)
def test_a_tensor_of_another_shape_or_dtype_is_named(take: Take, refuse: Refuse, kind: str, shape: str) -> None:
    folder, name = take(kind), MATRIX[kind]
    file = change_weights(folder, lambda values: values.update({name: SHAPES[shape](values[name])}))
    refuse(folder, file.name if kind != "meta" else "consolidated.0", name)


BAD_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [*MATRIX, "sharded"])
def test_a_weight_that_is_no_number_is_named(
    take: Take,
    refuse: Refuse,
    models: Models,
    low_precision: dict[str, Models],
    kind: str,
    dtype: str,
    value: float,
) -> None:
    folder = take(kind, low_precision.get(dtype, models))
    name = MATRIX["hf" if kind == "sharded" else kind]

    def spoil(values: dict[str, Any]) -> None:
        values[name][-1, -1] = value

    if kind == "sharded":
        file = folder / weight_map(folder)[name]
        change_safetensors(file, spoil)
    else:
        file = change_weights(folder, spoil)
    refuse(folder, str(file) if kind != "meta" else "consolidated.0", name, seen_by_info=False)


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("version", ["legacy.bin", "v1.bin"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_weight_of_llama2c_that_is_no_number_is_named(
    take: Take, refuse: Refuse, version: str, place: str, value: float
) -> None:
    file = take(version)
    content = bytearray(file.read_bytes())
    start = 28 if version == "legacy.bin" else 256
    struct.pack_into("<f", content, start if place == "first" else len(content) - 4, value)
    file.write_bytes(content)
    first = "embed_tokens.weight" if version == "legacy.bin" else "layers.0.input_layernorm.weight"
    refuse(file, str(file), first if place == "first" else "lm_head.weight", seen_by_info=False)


@pytest.mark.parametrize("to", ["native", "hf", "meta"])
def test_a_weight_beyond_the_range_of_the_dtype_asked_for_is_named(
    take: Take, tmp_path: Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    folder = take("native")

    def grow(values: dict[str, Any]) -> None:
        values[MATRIX["native"]][3, 3] = -1e30

    file = change_weights(folder, grow)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", to, "--dtype", "float16"]) == 2
    stderr = capfd.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert f"{file}: tensor {MATRIX['native']}" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]


# llama2.c -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["legacy.bin", "v1.bin"])
def test_a_llama2c_file_of_another_length_is_refused(take: Take, refuse: Refuse, version: str) -> None:
    file = take(version)
    content = file.read_bytes()
    for end in sorted({0, 1, 4, 27, 28, 29, 255, 256, 257, *range(0, len(content), 1_999), len(content) - 1}):
        file.write_bytes(content[:end])
        line = refuse(file, str(file)) if end % 5 == 0 else refused(file, str(file))
        if end > 256:
            assert "tensor " in line
    for extra in (1, 4, 28, 4_096):
        file.write_bytes(content + bytes(extra))
        refuse(file, str(file))


HUGE = 2**31 - 1
HEADERS = [
    (HUGE,) * 7,
    (0,) * 7,
    (-1,) * 7,
    (-(2**31),) * 7,
    (1,) * 7,
    (2,) * 7,
    (HUGE - 1, HUGE, 1, 2**30 - 1, 2**30 - 1, HUGE, HUGE),
    (HUGE - 1, HUGE, 9_999, 1, 1, HUGE, HUGE),
    (2**30, 2**30, 9_999, 2**15, 2**15, 2**30, 2**30),
    *(tuple(bad if i == place else n for i, n in enumerate((24, 40, 2, 4, 2, -98, 64))) for place in range(7)
      for bad in (0, -1, 1, -(2**31), HUGE, HUGE - 1, 10**9, 2**30)),
]  # fmt: skip


@pytest.mark.parametrize("version", ["legacy.bin", "v1.bin"])
def test_a_header_with_other_numbers_is_refused(take: Take, refuse: Refuse, version: str) -> None:
    file = take(version)
    whole = file.read_bytes()
    for i, numbers in enumerate(HEADERS):
        for content in (whole, whole[:400]):
            if version == "v1.bin":  # whose vocabulary has no sign, and whose length is nowhere in the file's size
                numbers = (*numbers[:5], min(abs(numbers[5]), HUGE), min(numbers[6], 0))
            head = struct.pack("<7i", *numbers)
            changed = head + content[28:] if version == "legacy.bin" else content[:8] + head + content[36:]
            file.write_bytes(changed)
            refuse(file, str(file)) if i < 9 else refused(file, str(file))


@pytest.mark.parametrize("version", [-1, 0, 2, 3, 99, HUGE, -(2**31)])
def test_another_version_of_llama2c_is_refused(take: Take, refuse: Refuse, version: int) -> None:
    file = take("v1.bin")
    content = bytearray(file.read_bytes())
    struct.pack_into("<i", content, 4, version)
    file.write_bytes(content)
    refuse(file, str(file), f"version {version}")


@pytest.mark.parametrize(
    "magic", [b"ak42", b"34ka", b"GGUF", b"\0\0\0\0", b"\x7fELF", b"PK\x03\x04", b"\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("version", ["legacy.bin", "v1.bin"])
def test_another_magic_is_refused(take: Take, refuse: Refuse, version: str, magic: bytes) -> None:
    file = take(version)
    file.write_bytes(magic + file.read_bytes()[4:])
    refuse(file, str(file))


@pytest.mark.parametrize("place", [36, 37, 100, 255])
@pytest.mark.parametrize("value", [2, 255])
def test_padding_that_is_not_zero_is_refused(take: Take, refuse: Refuse, place: int, value: int) -> None:
    file = take("v1.bin")
    content = bytearray(file.read_bytes())
    content[place] = value
    file.write_bytes(content)
    refuse(file, str(file), "padded")


@pytest.mark.parametrize("name", ["x.bin", "notes.txt", "model.safetensors", "model.pt", "config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text\n" * 99,
        b"{}",
        b"\0" * 4_096,
        b"\xff" * 4_096,
        random.Random(0).randbytes(4_096),
        b"PK\x03\x04" + b"x" * 99,
    ],
    ids=["empty", "text", "JSON", "zeros", "ones", "random", "zip"],
)
def test_a_file_of_something_else_is_refused(refuse: Refuse, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, str(tmp_path / name))


@pytest.mark.parametrize("kind", ["native", "bin", "meta"])
def test_a_file_of_pytorch_given_by_its_name_says_what_to_name(take: Take, refuse: Refuse, kind: str) -> None:
    file = take(kind) / PT_FILES[kind]
    refuse(file, str(file), "folder")


def test_a_folder_called_bin_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "x.bin").mkdir()
    refuse(tmp_path / "x.bin", str(tmp_path / "x.bin"), "no model")


# JSON -----------------------------------------------------------------------------------------------------------------

CONFIGS = {"native": "config.json", "hf": "config.json", "bin": "config.json", "meta": "params.json"}


@pytest.mark.parametrize(
    "text", ["", "not JSON", "[]", "null", "5", '"text"', "{}", "{", '{"a":' * 100_000, "[" * 10**6]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_none_is_named(take: Take, refuse: Refuse, kind: str, text: str) -> None:
    folder = take(kind)
    (folder / CONFIGS[kind]).write_text(text)
    refuse(folder, str(folder / CONFIGS[kind]))


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b'{"\xff": 1}', b"\0" * 99, b"\x80\x02}."])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_not_text_is_named(take: Take, refuse: Refuse, kind: str, content: bytes) -> None:
    folder = take(kind)
    (folder / CONFIGS[kind]).write_bytes(content)
    refuse(folder, str(folder / CONFIGS[kind]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_config_is_named(take: Take, refuse: Refuse, kind: str) -> None:
    folder = take(kind)
    (folder / CONFIGS[kind]).unlink()
    refuse(folder, str(folder), CONFIGS[kind])


WRONG_VALUES: list[Any] = [
    "24", "", [], {}, [[24]], {"a": 1}, [None], True, -5, 0, 0.5, 1e300, math.nan, math.inf, 2**31 - 1, 2**63, 10**400,
    [2**70], [0.5], {"rope_type": "default", "rope_theta": []}, ["LlamaForCausalLM", 5],
    {"rope_type": "llama3", "factor": [], "low_freq_factor": {}, "high_freq_factor": None,
     "original_max_position_embeddings": "x"},
]  # fmt: skip
MORE_KEYS = {
    "native": {"architectures": [], "model_type": "llama", "rope_scaling": None, "eos_token_id": 2, "head_dim": 6},
    "hf": {"rope_parameters": None, "sliding_window": None, "architectures": [], "torch_dtype": "float32", "new": 1}
    | {"mlp_bias": None, "partial_rotary_factor": 1, "quantization_config": None, "num_key_value_heads": 2},
    "meta": {"vocab_size": -1, "n_kv_heads": 2, "multiple_of": 1, "ffn_dim_multiplier": 1.0, "max_seq_len": 64}
    | {"use_scaled_rope": False, "rope_theta": 1e4, "max_batch_size": 1, "norm_eps": 1e-5, "new": 1},
}


@pytest.mark.parametrize("kind", MORE_KEYS)
def test_any_value_of_any_key_is_used_or_refused(take: Take, kind: str) -> None:
    """A wrong kind of value, or a huge number, ends in a line at once; so does a list where none can be."""
    folder = take(kind)
    file = folder / CONFIGS[kind]
    values = json.loads(file.read_text())
    failed = {}
    for key in {**values, **MORE_KEYS[kind]}:
        for value in WRONG_VALUES:
            file.write_text(json.dumps({**values, key: value}))
            try:
                with stderr_of_a_process():
                    outcome(folder, open_model)
            except Exception as error:
                failed[f"{key}: {value!r:.30}"] = repr(error)
    assert not failed


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in ("native", "hf") for key in ("hidden_size", "num_hidden_layers", "vocab_size")]
    + [("native", "num_attention_heads"), ("hf", "intermediate_size"), ("meta", "dim"), ("meta", "n_layers")]
    + [("meta", "n_heads"), ("meta", "vocab_size")],
)
def test_a_size_that_is_none_is_refused_by_its_key(take: Take, refuse: Refuse, kind: str, key: str) -> None:
    folder = take(kind)
    file = folder / CONFIGS[kind]
    values = json.loads(file.read_text())
    config_key = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}.get(key, key)
    for value in ("24", None, [], {}, True, -5, 0, 0.5, math.nan, math.inf, 10**9, 2**63, 10**400):
        file.write_text(json.dumps({**values, key: value}))
        line = (refuse if value in ("24", 10**9) else refused)(folder, str(folder))
        assert key in line or config_key in line or "tensor" in line
        assert len(line) < 1_000


LARGE = {"vocab_size": HUGE, "hidden_size": HUGE - 1, "intermediate_size": HUGE, "num_attention_heads": 1}
LARGE |= {"num_key_value_heads": 1, "head_dim": HUGE - 1}


@pytest.mark.parametrize("layers", [1, 2, 9_999, 10_000, 10**9])
@pytest.mark.parametrize("kind", ["native", "hf"])
def test_a_config_of_a_huge_model_costs_nothing(take: Take, refuse: Refuse, kind: str, layers: int) -> None:
    folder = take(kind)
    for sizes in (LARGE, {name: LARGE[name] for name in ("vocab_size", "intermediate_size")}, {}):
        change_json(folder / "config.json", num_hidden_layers=layers, **sizes)
        if sizes or layers != 2:
            refuse(folder, str(folder))


@pytest.mark.parametrize("layers", [2, 9_999, 10_000, 10**9])
def test_a_meta_config_of_a_huge_model_costs_nothing(take: Take, refuse: Refuse, layers: int) -> None:
    folder = take("meta")
    for sizes in ({"dim": HUGE - 1}, {"ffn_dim_multiplier": 1e308}, {"multiple_of": HUGE}, {"vocab_size": HUGE}):
        change_json(folder / "params.json", n_layers=layers, **sizes)
        refuse(folder, str(folder))


@pytest.mark.parametrize("multiplier", [1e9, 1e300, 1.7e308])
def test_a_feed_forward_width_beyond_all_numbers_is_refused(take: Take, refuse: Refuse, multiplier: float) -> None:
    folder = take("meta")
    change_json(folder / "params.json", ffn_dim_multiplier=multiplier)
    assert len(refuse(folder, "params.json")) < 1_000


def test_an_unknown_key_of_meta_is_named(take: Take, refuse: Refuse) -> None:
    folder = take("meta")
    change_json(folder / "params.json", n_experts=8)
    refuse(folder, str(folder / "params.json"), "n_experts")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "bos_token"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("special_tokens_map.json", "eos_token"),
        ("added_tokens.json", "<|new|>"),
    ],
)
def test_the_files_beside_the_weights_are_used_or_refused(
    with_tokenizer: Path, tmp_path: Path, file: str, key: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_tokenizer, folder)
    (folder / "tokenizer.json").unlink()
    before = (folder / file).read_text() if (folder / file).is_file() else "{}"
    failed = {}
    for value in WRONG_VALUES:
        (folder / file).write_text(json.dumps({**json.loads(before), key: value}))
        try:
            outcome(folder, open_model if file == "generation_config.json" else load_tokenizer)
        except Exception as error:
            failed[repr(value)[:30]] = repr(error)
    assert not failed


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_any_special_token_of_a_tokenizer_json_is_used_or_refused(
    with_tokenizer: Path, tmp_path: Path, file: str, key: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_tokenizer, folder)
    assert outcome(folder, load_tokenizer) == "used"
    failed = {}
    for value in WRONG_VALUES:
        change_json(folder / file, **{key: value})
        try:
            outcome(folder, load_tokenizer)
        except Exception as error:
            failed[repr(value)[:30]] = repr(error)
    assert not failed


@pytest.mark.parametrize("token", ["\ud800", "\0", "<s>\ud83d", "x" * 100_000, "\U0010ffff"], ids=ascii)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_token_of_any_text_is_used_or_refused(with_tokenizer: Path, tmp_path: Path, file: str, token: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_tokenizer, folder)
    change_json(folder / file, **({token: 2_048} if file == "added_tokens.json" else {"bos_token": token}))
    outcome(folder, load_tokenizer)
    (folder / "tokenizer.json").unlink()
    outcome(folder, load_tokenizer)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder that has the bundled tokenizer, in both forms."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("with tokenizer") / "model"
    model = small_model(vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    save_model(folder, model, tokenizer, format="hf")
    return folder


TOKENIZER_JSONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text": lambda values: "text",
    "a list": lambda values: [],
    "nothing": lambda values: {},
    "no model": lambda values: values.pop("model") and None,
    "a model of another kind": lambda values: values["model"].update(type="None"),
    "words without one for the rest": lambda values: values.update(
        model={"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2}, "unk_token": "<unk>"}
    ),
    "WordPiece without one for the rest": lambda values: values.update(
        model={"type": "WordPiece", "vocab": {"<s>": 1, "</s>": 2}, "unk_token": "[UNK]"}
        | {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    ),
    "an empty vocabulary": lambda values: values["model"].update(vocab={}, merges=[]),
    "merges of what is not there": lambda values: values["model"].update(merges=[["no", "thing"]]),
    "huge ids": lambda values: values["model"]["vocab"].update({"zzz": 2**32 - 1}),
    "ids beyond 2^32": lambda values: values["model"]["vocab"].update({"zzz": 2**32}),
    "negative ids": lambda values: values["model"]["vocab"].update({"zzz": -1}),
    "one id twice": lambda values: values["model"]["vocab"].update({"zzz": 5}),
    "no unknown piece": lambda values: values["model"].update(unk_token="nowhere"),
    "no fallback": lambda values: values["model"].update(byte_fallback=False, unk_token=None),
    "a pattern that is none": lambda values: values.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "a decoder of another kind": lambda values: values.update(decoder={"type": "Nothing"}),
    "no decoder": lambda values: values.update(decoder=None),
    "an empty sequence": lambda values: values.update(decoder={"type": "Sequence", "decoders": []}),
    "a decoder that cuts more than there is": lambda values: values.update(
        decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    ),
    "added tokens with huge ids": lambda values: values.update(
        added_tokens=[*values["added_tokens"], {**values["added_tokens"][0], "id": 2**32 - 1, "content": "<|x|>"}]
    ),
    "no added tokens": lambda values: values.update(added_tokens=[]),
    "a normaliser that cuts everything": lambda values: values.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(?s)."}, "content": ""}
    ),
    "a truncation": lambda values: values.update(
        truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}
    ),
}


@pytest.mark.parametrize("change", TOKENIZER_JSONS)
def test_a_spoiled_tokenizer_json_is_used_or_refused(with_tokenizer: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_tokenizer, folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    changed = TOKENIZER_JSONS[change](values)
    file.write_text(json.dumps(values if changed is None else changed))
    outcome(folder, use_tokenizer)
    outcome(folder, lambda path: convert(path, tmp_path / "out", "hf"))


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("The first word, and Größe\n")
    tokenizer.decode(ids)
    tokenizer.pieces(ids)


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 99, b"\xff" * 99, b"\x0a\xff\xff\xff\xff\x0f", b"IQ== 0\n"])
def test_a_sentencepiece_model_that_is_none_is_named(with_tokenizer: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(with_tokenizer, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model: "):
        load_tokenizer(tmp_path / "model")


# What reaches the terminal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b[1;1Hall is well", "a\nminift: saved", "a\rminift", "\x9b2J", "\x07", "\u202e"]
)
@pytest.mark.parametrize("place", ["tensor", "key", "note", "shard", "global"])
def test_a_name_from_a_file_cannot_steer_the_terminal(
    take: Take, capfd: pytest.CaptureFixture[str], tmp_path: Path, place: str, text: str
) -> None:
    folder = take("sharded" if place == "shard" else "hf" if place == "note" else "native")
    if place == "tensor":
        change_weights(folder, put(f"x{text}", torch.ones(2)))
    elif place == "key":
        change_json(folder / "config.json", **{f"x{text}": 1})
    elif place == "note":
        change_json(folder / "config.json", **{f"unused {text}": 1})
    elif place == "shard":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": f"x{text}"}}))
    else:
        zip_of(folder / "model.pt", f"cos\nx{text.splitlines()[0]}\n)R.".encode())
    code = main(["convert", str(folder), str(tmp_path / "out"), "--to", "native"])
    stderr = capfd.readouterr().err
    assert code == (0 if place == "note" else 2)
    lines = stderr.split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith(("minift: error: ", "note: ")) for line in lines if line)


# Nothing is left behind -----------------------------------------------------------------------------------------------


def bad_number(values: dict[str, Any]) -> None:
    matrices = [name for name, value in values.items() if value.dim() == 2]
    values[matrices[-2]][-1, -1] = math.nan


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
@pytest.mark.parametrize("kind", MATRIX)
def test_a_refused_conversion_leaves_no_output(take: Take, tmp_path: Path, kind: str, to: str) -> None:
    """The fault is in one of the last tensors, so that most has been written when it is found."""
    folder = take(kind)
    change_weights(folder, bad_number)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="NaN"):
        convert(folder, tmp_path / "out", to)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", ["native", "llama2c"])
def test_a_refused_conversion_leaves_no_folders_on_the_way(take: Take, tmp_path: Path, to: str) -> None:
    folder = take("native")
    change_weights(folder, bad_number)
    with pytest.raises(InputError, match="NaN"):
        convert(folder, tmp_path / "new" / "folders" / "out", to)
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("to", ["native", "hf", "meta", "llama2c"])
@pytest.mark.parametrize("kind", MATRIX)
def test_a_refused_conversion_leaves_the_older_output(
    take: Take, models: Models, tmp_path: Path, kind: str, to: str, small_checkpoint: Path
) -> None:
    target = tmp_path / "out" / "model"
    convert(models["native"], target, to)
    (tmp_path / "out" / "beside").write_text("something else")
    before = contents(tmp_path / "out")
    folder = take(kind)
    change_weights(folder, bad_number)
    for path in small_checkpoint.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert main(["convert", str(folder), str(target), "--to", to, "--force"]) == 2
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["beside", "model"]


def test_force_replaces_nothing_but_a_model(take: Take, tmp_path: Path) -> None:
    folder = take("native")
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    for to in ("native", "hf", "meta", "llama2c"):
        for target in (tmp_path / "thesis.txt", tmp_path / "work", folder / "config.json"):
            with pytest.raises((InputError, RunError)):
                convert(folder, target, to, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert contents(tmp_path / "work") == {"thesis.txt": b"years of work"}


# Folders that are no model --------------------------------------------------------------------------------------------


def test_what_is_no_model_is_answered_with_what_to_do(refuse: Refuse, take: Take, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such file or folder")
    (tmp_path / "empty").mkdir()
    line = refuse(tmp_path / "empty", str(tmp_path / "empty"))
    for name in ("model.pt", "model.safetensors", "pytorch_model.bin", "consolidated.00.pth"):
        assert name in line
    (tmp_path / "text.md").write_text("# Notes\n\nNot a model at all.\n")
    refuse(tmp_path / "text.md", "text.md", "not a llama2.c file")
    folder = take("native")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    folder.rename(tmp_path / "run" / "final")
    refuse(tmp_path / "run", "run's folder", str(tmp_path / "run" / "final"))
    load_model(tmp_path / "run" / "final")


@pytest.mark.parametrize("other", ["hf", "bin", "meta"])
def test_a_folder_of_two_models_is_refused(take: Take, refuse: Refuse, models: Models, other: str) -> None:
    folder = take("native")
    for path in models[other].iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    refuse(folder, str(folder), "native", "meta" if other == "meta" else "hf")


@pytest.mark.parametrize("kind", MATRIX)
def test_weights_that_are_folders_or_missing_are_refused(take: Take, refuse: Refuse, kind: str) -> None:
    folder = take(kind)
    file = folder / (PT_FILES.get(kind) or "model.safetensors")
    file.unlink()
    file.mkdir()
    refuse(folder, str(folder))


def test_a_link_to_nowhere_and_a_link_to_itself_are_refused(take: Take, refuse: Refuse, tmp_path: Path) -> None:
    for kind, name in {**PT_FILES, "hf": "model.safetensors"}.items():
        folder = take(kind)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "nowhere")
        refuse(folder, str(folder))
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)
        refuse(folder, str(folder))


# Without the hf extra -------------------------------------------------------------------------------------------------

WITHOUT_EXTRA = """
import contextlib, importlib.abc, io, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("safetensors", "tokenizers", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
from minift.cli import main
results = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        results.append((main(words), stderr.getvalue()))
print(json.dumps(results))
"""


def test_without_the_extra_its_formats_name_it_and_the_others_work(
    models: Models, small_checkpoint: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) + "\n" for i in range(9))
    )
    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").write_text("{}")
    work, refused = [], []
    for kind, path in models.items():
        commands = [["info", "--model", path], ["convert", path, tmp_path / f"from-{kind}", "--to", "native"]]
        (refused if kind in ("hf", "sharded") else work).extend(commands)
    work += [["convert", models["native"], tmp_path / to, "--to", to] for to in ("meta", "llama2c", "hf")]
    work += [["generate", "--model", small_checkpoint, *PROMPT, "--max-new-tokens", "2"]]
    refused += [["generate", "--model", models["hf"], *PROMPT]]
    refused += [["convert", small_checkpoint, tmp_path / "spm-to-hf", "--to", "hf"]]
    refused += [["tokenizer", "show", "text", "--model", path] for path in (named, named / "tokenizer.json")]
    train = ["finetune", "--model", small_checkpoint, "--data", pairs, "--device", "cpu", "--steps", "1", "--out"]
    work += [[*train, tmp_path / "adapted", "--lora-rank", "2"]]
    refused += [[*train, tmp_path / "run", "--save-format", "hf"]]
    words = json.dumps([[str(word) for word in command] for command in (*work, *refused)])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRA, words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    for command, (code, stderr) in zip(work, results[: len(work)], strict=True):
        assert code == 0, (command, stderr)
    for command, (code, stderr) in zip(refused, results[len(work) :], strict=True):
        assert code == 2, (command, stderr)
        assert len(stderr.splitlines()) == 1
        assert "minift[hf]" in stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"run", "spm-to-hf", "from-hf", "from-sharded"}
    assert not [name for name in names if name.startswith(".")]


# At random ------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bits, bytes or stretches changed, mostly where a file's structure is: at its start and its end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(data)
        if not size:
            break
        edge = min(size, 1_024)
        place = rng.choice((rng.randrange(edge), size - 1 - rng.randrange(edge), rng.randrange(size)))
        kind = rng.randrange(7)
        if kind <= 1:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[place] = rng.randrange(256)
        elif kind == 3:
            data[place : place + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"9999", b"null")
            )
        elif kind == 4:
            del data[place : place + rng.choice((1, 2, 8, 100))]
        elif kind == 5:
            data[place:place] = rng.choice((rng.randbytes(4), b"-", b"]", b"}", b"\x85" * 9, b"(", b'"', b"[[[["))
        else:
            del data[place:]
    return bytes(data)


FUZZED = {
    "native": ["model.pt", "config.json"],
    "hf": ["model.safetensors", "config.json", "generation_config.json"],
    "sharded": [INDEX],
    "bin": ["pytorch_model.bin"],
    "meta": ["consolidated.00.pth", "params.json"],
    "legacy.bin": [""],
    "v1.bin": [""],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FUZZED.items() for name in names])
def test_a_file_damaged_at_random_is_used_or_refused(
    take: Take, request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    use: Callable[[Path], object] = load_model
    count = 100
    if kind == "tokenizer":
        use, count = use_tokenizer, 20
        path = Path(shutil.copytree(request.getfixturevalue("with_tokenizer"), tmp_path / "model"))
        if name == "tokenizer.model":
            (path / "tokenizer.json").unlink()
    else:
        path = take(kind)
    file = path / name if name else path
    content = file.read_bytes()
    failed = {}
    for seed in range(count):
        file.write_bytes(damaged(content, random.Random(f"{kind}/{name}/{seed}")))
        try:
            with time_limit(5):
                outcome(path, use)
        except Exception as error:
            failed[seed] = repr(error)
    assert not failed
