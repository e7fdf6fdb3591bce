"""The promise that minift opens no connection, starts no other program, and runs no code from data.

A process in which Python reports every attempt (by an audit hook, which cannot be removed) goes through the main paths:
training and resuming both jobs, every use of a model, every conversion, the data commands. Then it is given hostile
files: links and names that lead elsewhere, expressions that never end, text that would be HTML.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minift.checkpoint import load_model, save_model
from minift.cli import main
from minift.errors import InputError
from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.guard import may_match_forever
from minift.tokenizer.load import load_tokenizer
from tests.helpers import ROOT, small_model, soon_done, write_jsonl

# Everything by which Python could reach the network, start a program or run the contents of a file.
FORBIDDEN = """
import sys

NAMES = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request",
    "http.client.connect", "ftplib.connect", "smtplib.connect",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "os.startfile",
    "marshal.loads", "ctypes.dlsym/system", "code.__new__/data",
)
PICKLES = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "UntypedStorage")}


def hook(event, arguments):
    if event in NAMES and not (event == "marshal.loads" and importing()):
        print("FORBIDDEN", event, str(arguments)[:300], file=sys.stderr, flush=True)
        import os
        os._exit(99)
    if event == "pickle.find_class" and arguments[:2] not in PICKLES and not from_a_worker():
        print("FORBIDDEN", event, arguments, file=sys.stderr, flush=True)
        import os
        os._exit(99)
    if event == "compile" and from_minift():
        print("FORBIDDEN", event, str(arguments)[:300], file=sys.stderr, flush=True)
        import os
        os._exit(99)


def from_a_worker():
    # What this process's own forks send to it by a pipe is no data of others.
    frame = sys._getframe(2)
    while frame is not None and "/multiprocessing/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def importing():
    frame = sys._getframe(2)
    return frame.f_code.co_filename.startswith("<frozen importlib")


def from_minift():
    frame = sys._getframe(2)
    return "/minift/" in frame.f_code.co_filename.replace("\\\\", "/") and frame.f_code.co_name != "<module>"


sys.addaudithook(hook)
"""

PATHS = """
import json, sys, warnings
from minift.cli import main

for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        print("FAILED", code, words, file=sys.stderr)
        sys.exit(1)
print("ALL DONE")
"""


def guarded(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script under the hook, which is set before anything is imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FORBIDDEN + script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import pickle; pickle.loads(b'cposix\\nsystem\\n.')",
    ],
)
def test_the_hook_sees_what_it_is_for(deed: str) -> None:
    done = guarded(deed)
    assert done.returncode == 99
    assert done.stderr.startswith("FORBIDDEN")


@pytest.mark.slow
def test_no_main_path_connects_starts_a_program_or_runs_data(small_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    pairs = [{"question": f"What comes after {i}?", "answer": f"The number {i + 1}."} for i in range(12)]
    data = str(write_jsonl(tmp_path / "pairs.jsonl.gz", pairs))
    pages = str(write_jsonl(tmp_path / "pages.jsonl", [{"text": f"Page {i} says {i * i}. " * 9} for i in range(80)]))
    choices = [{"question": "What is a noun?", "choices": ["A word", "A fish"], "answer": 0} for _ in range(3)]
    choice = str(write_jsonl(tmp_path / "choices.jsonl", choices))
    (tmp_path / "shape.json").write_text(json.dumps({**small_model(vocab_size=2_048).config.to_dict()}))
    model, out = str(small_checkpoint), str(tmp_path)
    small = ["--batch-size", "2", "--device", "cpu", "--no-compile"]
    finetune = ["finetune", "--model", model, "--data", data, *small]
    pretrain = ["pretrain", "--config", f"{out}/shape.json", "--data", pages, "--tokenizer", model, *small]
    rows = ["--max-length", "32", "--shuffle-buffer", "8", "--workers", "1"]
    commands = [
        [*finetune, "--steps", "3", "--save-every", "1", "--out", f"{out}/f"],
        ["finetune", "--resume", "--out", f"{out}/f"],
        [*finetune, "--steps", "2", "--lora-rank", "2", "--out", f"{out}/l"],
        [*pretrain, "--steps", "3", "--save-every", "1", *rows, "--out", f"{out}/p"],
        ["pretrain", "--resume", "--out", f"{out}/p"],
        ["generate", "--model", f"{out}/f/final", "--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "1"],
        ["generate", "--model", f"{out}/l/adapter", "--prompt", "Hello", "--max-new-tokens", "4"],
        ["compare", model, f"{out}/f/final", "--data", data, "--html", f"{out}/c.html", "--json", f"{out}/c.json"],
        ["evaluate", "--model", model, "--data", data],
        ["evaluate", "--model", model, "--data", pages],
        ["evaluate", "--model", model, "--data", choice],
        ["explain", "What is a noun?", "--answer", "A word", "--model", model, "--html", f"{out}/x.html"],
        ["convert", model, f"{out}/hf", "--to", "hf"],
        ["convert", f"{out}/hf", f"{out}/meta", "--to", "meta"],
        ["convert", f"{out}/meta", f"{out}/model.bin", "--to", "llama2c"],
        ["convert", f"{out}/model.bin", f"{out}/back", "--to", "native"],
        ["info", "--model", f"{out}/hf"],
        ["tokenizer", "show", "Hello", "--model", f"{out}/hf"],
        ["tokenizer", "train", "--data", pages, "--vocab-size", "280", "--out", f"{out}/t.model"],
        ["data", "peek", pages],
        ["data", "stats", pages, "--tokenizer", model],
        ["data", "format", data],
        ["data", "audit", data, "--model", model, "--html", f"{out}/audit.html"],
    ]
    done = guarded(PATHS, json.dumps(commands))
    assert "FORBIDDEN" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ALL DONE\n")


def test_the_code_asks_for_none_of_it() -> None:
    """The source has no eval, no exec, no shell, no socket, and unpickles in two restricted ways only."""
    functions, methods = (
        {"eval", "exec", "compile", "__import__", "breakpoint"},
        {"system", "popen", "Popen", "urlopen"},
    )
    modules = {
        "subprocess",
        "socket",
        "urllib",
        "http",
        "ftplib",
        "requests",
        "shelve",
        "marshal",
        "pty",
        "ssl",
        "yaml",
    }
    found = set()
    for file in sorted((ROOT / "minift").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found |= {f"{file.name}: import {root}" for root in roots if root.split(".")[0] in modules}
            elif isinstance(node, ast.Call):
                plain = isinstance(node.func, ast.Name)
                called = getattr(node.func, "id" if plain else "attr", "")
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if called in (functions if plain else methods):
                    found.add(f"{file.name}: {called}")
                if called in ("load", "loads") and owner == "pickle":
                    found.add(f"{file.name}: pickle.{called}")
                if called == "load" and owner == "torch":
                    safe = [word for word in node.keywords if word.arg == "weights_only"]
                    assert [word.value.value for word in safe if isinstance(word.value, ast.Constant)] == [True], file
    assert found == set()


# A folder that leads elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Make a file of the user's that is no part of a model."""
    file = tmp_path / "home" / "secret"
    file.parent.mkdir()
    file.write_text('{"password": "swordfish"}')
    return file


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
)
@pytest.mark.parametrize("format", ["native", "hf", "meta"])
def test_a_link_out_of_a_models_folder_is_refused_and_not_read(
    small_checkpoint: Path, tmp_path: Path, secret: Path, name: str, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if format == "hf":
        pytest.importorskip("tokenizers")
    model = tmp_path / "model"
    assert main(["convert", str(small_checkpoint), str(model), "--to", format]) == 0
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    capfd.readouterr()
    for words in (["info", "--model", model], ["convert", model, tmp_path / "out", "--to", "native"]):
        assert main([str(word) for word in words]) == 2
        line = (
            f"minift: error: {model / name}: is a link that leads out of its folder, to {secret}; copy the file there\n"
        )
        assert capfd.readouterr().err == line
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="leads out"):
        load_tokenizer(model)


def test_weights_may_be_links_within_the_folder_and_in_the_hubs_cache(small_checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(small_checkpoint.iterdir())):
        (blobs / f"{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{i}")
    load_model(snapshot)
    load_tokenizer(snapshot)
    (snapshot / "model.pt").unlink()
    (snapshot / "model.pt").symlink_to(small_checkpoint / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: is a link that leads out"):
        load_model(snapshot)


@pytest.mark.parametrize("there", ["mdl-evil", "mdl.bak/deep", "md", "mdl/../mdl2", "."])
def test_a_folder_whose_name_begins_alike_is_another_one(small_checkpoint: Path, tmp_path: Path, there: str) -> None:
    model, other = tmp_path / "mdl", tmp_path / there
    shutil.copytree(small_checkpoint, model)
    other.mkdir(parents=True, exist_ok=True)
    (other / "config.json").write_bytes((model / "config.json").read_bytes())
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(Path("..") / there / "config.json")
    with pytest.raises(InputError, match=r"mdl/config\.json: is a link that leads out of its folder"):
        load_model(model)
    with pytest.raises(InputError, match=r"mdl/config\.json: is a link that leads out of its folder"):
        load_tokenizer(model)


@pytest.mark.parametrize("there", ["models--a--b/blobs-evil", "models--a--b-evil/blobs", "models--a--b"])
def test_blobs_of_another_repository_are_out_of_the_folder(small_checkpoint: Path, tmp_path: Path, there: str) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / there
    shutil.copytree(small_checkpoint, snapshot)
    blobs.mkdir(parents=True, exist_ok=True)
    (snapshot / "model.pt").rename(blobs / "0")
    (snapshot / "model.pt").symlink_to(blobs / "0")
    with pytest.raises(InputError, match=r"model\.pt: is a link that leads out"):
        load_model(snapshot)


def test_a_step_folder_with_a_link_out_is_passed_over(small_checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"question": f"{i}?", "answer": f"{i}."} for i in range(8)])
    words = [
        "finetune",
        "--model",
        small_checkpoint,
        "--data",
        data,
        "--steps",
        2,
        "--save-every",
        1,
        "--keep",
        0,
        "--device",
        "cpu",
    ]
    out = tmp_path / "run"
    assert main([str(word) for word in (*words, "--out", out)]) == 0
    moved = (out / "step_000002" / "training.pt").rename(tmp_path / "training.pt")
    (out / "step_000002" / "training.pt").symlink_to(moved)
    from minift.runs.steps import check_step

    with pytest.raises(InputError, match=r"training\.pt: is a link that leads out"):
        check_step(out / "step_000002")


# Expressions that never end -------------------------------------------------------------------------------------------

ENDLESS = [
    "(a+)+$",
    "(a|aa)+$",
    "(?:.*a){20}",
    "((a)|b)*",
    "((a+))*",
    "(?>a+)*",
    r"(\w+\s?)*$",
    "(a{2,})+?",
    "(?i:a|A)*+b",
]
PUBLISHED = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    "digits by threes": r"\d{1,3}(?=(?:\d{3})*\b)",
}


def test_expressions_of_published_tokenizers_are_let_through() -> None:
    assert not [name for name, pattern in PUBLISHED.items() if may_match_forever(pattern)]
    assert all(may_match_forever(pattern) for pattern in ENDLESS)


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer", "decoder"])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_tokenizer_with_an_expression_that_never_ends_is_refused(
    small_checkpoint: Path, tmp_path: Path, pattern: str, place: str
) -> None:
    pytest.importorskip("tokenizers")
    model = tmp_path / "model"
    assert main(["convert", str(small_checkpoint), str(model), "--to", "hf"]) == 0
    values = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if place == "pre_tokenizer":
        values[place] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    else:
        replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": " "}
        values[place] = {"type": "Sequence", {"normalizer": "normalizers", "decoder": "decoders"}[place]: [replace]}
    (model / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with soon_done(5), pytest.raises(InputError, match=r"tokenizer\.json: the expression .* may never end"):
        load_tokenizer(model)


# Text that would be HTML ----------------------------------------------------------------------------------------------

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;<!--\x00{question}%s"


class Elements(HTMLParser):
    """The elements of a page, their event handlers, and the addresses from which they would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.suspicious: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href") and value and not value.startswith("#")):
                self.suspicious.append((name, value))

    def handle_data(self, data: str) -> None:
        self.text += data


def elements(file: Path) -> Elements:
    page = Elements()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def test_no_text_of_a_user_or_a_model_becomes_html(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A page of hostile words has the same kinds of elements as one of plain words."""
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    pages: dict[str, list[Elements]] = {}
    for kind, words in (("plain", "plain words"), ("hostile", HOSTILE)):
        place = tmp_path / f"{kind}"
        place.mkdir()
        folder = place / ("model" if kind == "plain" else "<b onclick=1>&amp;")
        save_model(folder, model, tokenizer)
        pairs = [{"question": f"{words} {i}?", "answer": f"{words} {i}!"} for i in range(12)]
        data, out = write_jsonl(place / "pairs.jsonl", pairs), place / "run"
        run = ["finetune", "--model", folder, "--data", data, "--steps", "2", "--device", "cpu", "--out", out]
        assert main([str(word) for word in run]) == 0
        assert main(["compare", *map(str, [folder, folder, "--data", data, "--html", place / "compare.html"])]) == 0
        explain = ["explain", words, "--answer", words, "--model", folder, "--html", place / "explain.html"]
        assert main([str(word) for word in explain]) == 0
        pages[kind] = [
            elements(out / "report.html"),
            *(elements(place / f"{name}.html") for name in ("compare", "explain")),
        ]
    for plain, hostile in zip(pages["plain"], pages["hostile"], strict=True):
        assert hostile.names <= plain.names
        assert hostile.suspicious == plain.suspicious
        assert "alert(1)" in hostile.text  # as text


def test_the_bundled_model_is_plain_files() -> None:
    assert not [path for path in Path(bundled("base")).iterdir() if path.is_symlink()]
