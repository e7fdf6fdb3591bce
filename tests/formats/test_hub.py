"""A name on Hugging Face's hub is a folder in its cache, or one line that says how to fetch it."""

import shutil
import sys
from pathlib import Path

import pytest

from minift import bundled, load_model
from minift.errors import InputError
from minift.storage.names import cache_folder, cached, is_hub_name, model_path
from tests.helpers import completed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as `hf download` leaves it: files are links to blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--a-model"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    for number, file in enumerate(bundled("base").iterdir()):
        shutil.copy(file, folder / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return tmp_path


def test_a_name_in_the_cache(cache: Path) -> None:
    assert model_path("someone/a-model") == cache / "models--someone--a-model" / "snapshots" / "0123abcd"
    assert load_model(model_path("someone/a-model")).config == load_model(bundled("base")).config


def test_a_name_that_is_not_there(cache: Path) -> None:
    with pytest.raises(InputError, match=r"meta-llama/Llama-2-7b-hf: .*hf download meta-llama/Llama-2-7b-hf"):
        model_path("meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("commit", ["../../..", "", "9999", "0123abcd/config.json"])
def test_a_cache_that_leads_elsewhere(cache: Path, commit: str) -> None:
    (cache / "models--someone--a-model" / "refs" / "main").write_text(commit)
    with pytest.raises(InputError, match="not in Hugging Face's cache"):
        cached("someone/a-model")


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_name("someone/a-model")
    for other in ("runs/mine", "model", "/a/b", "./a", "../a", "a/b/c", "a/", "~/a", "someone/a model"):
        assert not is_hub_name(other), other
    (tmp_path / "someone").mkdir()
    assert not is_hub_name("someone/a-model")  # a mistyped place on this disk


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(wanted)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_huggingfaces_own_tools_look_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """`huggingface_hub`, in a process of its own: it reads the variables when it is imported."""
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = completed([sys.executable, "-c", code], check=True).stdout.strip()
    assert cache_folder() == Path(theirs)
