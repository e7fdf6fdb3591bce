"""Models by their names on Hugging Face's hub, if they are in its cache on this machine: nothing is downloaded.

`hf download meta-llama/Llama-2-7b-hf` puts a repository's files into `models--meta-llama--Llama-2-7b-hf/snapshots/`, in
a folder named by a commit; `refs/main` beside it says which commit is the newest that was fetched.

Source: "Understand caching", in the documentation of `huggingface_hub`. Read next: `storage/links.py`.
"""

import os
import re
from pathlib import Path

from minift.errors import InputError
from minift.values import read_json

ADAPTER_FILE = "adapter_config.json"  # as `peft` calls it


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a repository, `owner/model`, rather than a place on this disk."""
    return bool(_NAME.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


def cached(name: str) -> Path:
    """The folder of a repository's files in the cache.

    Raises:
        InputError: with the command that would fetch it, when it is not there.
    """
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"\w+", commit) or not snapshot.is_dir():
        raise InputError(
            f"{name}: no such folder, and not in Hugging Face's cache ({cache_folder()}); "
            f"to fetch it: pip install huggingface_hub && hf download {name}"
        )
    return snapshot


def cache_folder() -> Path:
    """Where Hugging Face's tools keep what they have downloaded, by the environment variables that they follow."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(caches) / "huggingface").expanduser() / "hub"


def bundled(name: str) -> Path:
    """The path of something that comes with minift: `base`, `pairs.jsonl` or `test.jsonl`.

    An installed wheel has them inside the package, a checkout in `data/`. Raises InputError when neither does.
    """
    package = Path(__file__).resolve().parent.parent  # minift/
    for folder in (package / "bundled", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise InputError(f"the bundled {name} is not installed; give --model and --data, or reinstall minift")


def model_path(name: str | Path) -> Path:
    """A model's folder or file: `name` itself; for "bundled" the base that comes with minift; for a name on Hugging
    Face's hub its folder in the cache of this machine.

    Raises:
        InputError: for a name on the hub that is not in the cache.
    """
    if str(name) == "bundled":
        return bundled("base")
    return cached(str(name)) if is_hub_name(str(name)) else Path(name)


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's, and no model's."""
    return (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file()


def base_of(folder: Path) -> Path:
    """Where the model of an adapter is; it may be one with an adapter itself.

    Raises:
        InputError: when the config does not say, or an adapter is, by way of others, its own base.
    """
    base, seen = _base(folder), {folder.resolve()}
    other = base
    while is_adapter(other):
        if other.resolve() in seen:
            raise InputError(f"{folder / ADAPTER_FILE}: base_model_name_or_path leads back to {other}")
        seen.add(other.resolve())
        other = _base(other)
    return base


def _base(folder: Path) -> Path:
    where = folder / ADAPTER_FILE
    base = read_json(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: base_model_name_or_path does not name the adapter's model")
    path = model_path(base)
    if not os.path.exists(path):  # unlike Path.exists, it takes any text: a name that is too long, half a character
        raise InputError(f"{where}: base_model_name_or_path: {path}: no such file or folder")
    return path
