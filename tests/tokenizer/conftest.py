"""Tokenizers of every kind in turn, and folders to change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minift.storage.names import bundled
from minift.tokenizer.base import Tokenizer
from minift.tokenizer.load import load_tokenizer
from minift.tokenizer.make_json import make_json
from minift.tokenizer.sentencepiece import SentencePieceTokenizer, train_tokenizer
from tests.tokenizer.kinds import CHAT_TOKENS, KINDS, NAMES, byte_level, read_by_transformers, write_config


@pytest.fixture(scope="module")
def small_vocabulary() -> Tokenizer:
    """Return a vocabulary of 300 pieces, trained on a little English."""
    return train_tokenizer(["The capital of Mexico is Mexico City.\nThe capital of Peru is Lima. " * 3, "12 34\n"], 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    """Make a folder of each kind with a `tokenizer.json` and a `tokenizer_config.json`."""
    tokenizers = pytest.importorskip("tokenizers")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    llama_2 = json.loads(make_json(tokenizer))
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    metaspace = {**llama_2, "normalizer": None, "pre_tokenizer": first}
    made = {
        "llama 3": byte_level("llama 3"),
        "smollm": byte_level("smollm"),
        "llama 2": tokenizers.Tokenizer.from_str(json.dumps(llama_2)),
        "metaspace": tokenizers.Tokenizer.from_str(json.dumps(metaspace)),
    }
    found = {}
    for kind in KINDS:
        made[kind].add_special_tokens(list(CHAT_TOKENS))
        found[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        made[kind].save(str(found[kind] / "tokenizer.json"))
        write_config(found[kind], *NAMES[kind])
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path], kind: str) -> Path:
    return folders[kind]


@pytest.fixture(scope="module")
def each(folder: Path) -> Tokenizer:
    """Return the tokenizer of each kind's `tokenizer.json` in turn."""
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """Return what `transformers` reads from the same folder."""
    return read_by_transformers(folder)


@pytest.fixture(scope="module", params=["bundled", "real"])
def model_file(request: pytest.FixtureRequest) -> Path:
    """Return a `tokenizer.model`, the bundled one and Llama 2's own in turn."""
    bundled_file = bundled("base") / "tokenizer.model"
    return bundled_file if request.param == "bundled" else request.getfixturevalue("real_data") / "tokenizer.model"


@pytest.fixture(scope="module", params=[*KINDS, "bundled", "real"])
def any_kind(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """Return a tokenizer of every kind in turn."""
    if request.param == "real":
        return load_tokenizer(request.getfixturevalue("real_data") / "tokenizer.model")
    return load_tokenizer(bundled("base") if request.param == "bundled" else folders[request.param])


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder, to change."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture
def llama_3(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llama 3"], tmp_path / "llama-3"))


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """Make a folder of the bundled `tokenizer.model`, with a `tokenizer_config.json` as Llama 2's folders have it."""
    folder = tmp_path / "sentencepiece"
    folder.mkdir()
    shutil.copy(bundled("base") / "tokenizer.model", folder)
    write_config(folder, "<s>", "</s>")
    return folder
