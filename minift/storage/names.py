"""The place on this disk that a name stands for: "bundled", a model on Hugging Face's hub, an adapter's base.

Nothing is downloaded. A name on the hub is looked up in the cache that Hugging Face's own tools fill:
`hf download meta-llama/Llama-2-7b-hf` puts a repository's files into `models--meta-llama--Llama-2-7b-hf/snapshots/`, in
a folder whose name is a commit; `refs/main` next to `snapshots/` holds the newest commit that was fetched.

Source: "Understand caching", in the documentation of `huggingface_hub`.
"""

import os
import re
from pathlib import Path

from minift.errors import InputError, did_you_mean
from minift.values import read_json

ADAPTER_FILE = "adapter_config.json"  # as `peft` calls it
_REVISION = re.compile(r"\w[\w-]*(?:[./][\w-]+)*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_path(name: str | Path) -> Path:
    """Return the folder or file of a model.

    Args:
        name: a path. A string may also be "bundled", for the base that comes with minift, or a name on Hugging Face's
            hub. (`./bundled`, or a `Path`, is a place on this disk.)

    Raises:
        InputError: for a name on the hub that is not in the cache of this machine.
    """
    if isinstance(name, Path):
        return name
    if name == "bundled":
        return bundled("base")
    if is_hub_name(name):
        return cached(name)
    return Path(name).absolute() if Path(name) == Path("bundled") else Path(name)  # its text must not mean the base


def similar_path(path: Path) -> str:
    """Return " (did you mean X?)" for a path that is not there, with one of its folder that has a similar name; or "".

    For a name without a folder, X may be "bundled".
    """
    names = {str(path.parent / name) for name in names_in(path.parent)}
    return did_you_mean(str(path), names | ({"bundled"} if path.parent == Path() else set()))


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, in their order; none of a folder that cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


# What comes with minift -----------------------------------------------------------------------------------------------


def bundled(name: str) -> Path:
    """Return the path of something that comes with minift: `base`, `pairs.jsonl` or `test.jsonl`.

    An installed wheel has them inside the package, a checkout in `data/`.

    Raises:
        InputError: when neither has it.
    """
    package = Path(__file__).resolve().parent.parent  # minift/
    for folder in (package / "bundled", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise InputError(f"the bundled {name} is not installed; give --model and --data, or reinstall minift")


# Hugging Face's hub ---------------------------------------------------------------------------------------------------


def is_hub_name(name: str) -> bool:
    """Return True for the name of a repository, `owner/model`; False for a place on this disk."""
    return bool(_HUB_NAME.fullmatch(name)) and not os.path.exists(name) and not os.path.exists(os.path.dirname(name))


def cached(name: str, revision: str = "main") -> Path:
    """Return the folder of a repository's files in the cache.

    Args:
        revision: a branch, a tag or a commit.

    Raises:
        InputError: when it is not there, with the command that would fetch it.
    """
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    if not _REVISION.fullmatch(revision):
        raise InputError(f"{name}: {revision!r} is no revision on Hugging Face's hub")
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision if revision != "main" else ""
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"\w+", commit) or not snapshot.is_dir():
        option = "" if revision == "main" else f" --revision {revision}"
        others = (other.removeprefix("models--").replace("--", "/") for other in names_in(cache_folder()))
        near = similar_path(Path(name)) or did_you_mean(name, others)
        raise InputError(
            f"{name}: no such folder{near}, and not in Hugging Face's cache ({cache_folder()}); "
            f"to fetch it: pip install huggingface_hub && hf download {name}{option}"
        )
    return snapshot


def cache_folder() -> Path:
    """Return the folder in which Hugging Face's tools keep downloads, by the environment variables that they follow."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(caches) / "huggingface").expanduser() / "hub"


# Adapters -------------------------------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """Return True for a folder that holds an adapter, and no model."""
    return (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file()


def base_of(folder: Path) -> Path:
    """Return the place of the model that an adapter is for; it may be an adapter, too.

    Raises:
        InputError: when the adapter's config does not name it, when it is not on this disk, or when an adapter is, by
            way of others, its own base.
    """
    base, seen = _named_base(folder), {folder.resolve()}
    other = base
    while is_adapter(other):
        if other.resolve() in seen:
            raise InputError(f"{folder / ADAPTER_FILE}: base_model_name_or_path leads back to {other}")
        seen.add(other.resolve())
        other = _named_base(other)
    return base


def _named_base(folder: Path) -> Path:
    where = folder / ADAPTER_FILE
    values = read_json(where)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: base_model_name_or_path does not name the adapter's model")
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"{where}: revision is {revision!r}; it must be the base's branch, tag or commit, or null")
    try:
        path = cached(base, revision) if revision and is_hub_name(base) else model_path(base)
    except InputError as error:
        raise InputError(f"{where}: base_model_name_or_path: {error}") from None
    if not os.path.exists(path):  # unlike Path.exists, it takes any text: a name that is too long, half a character
        raise InputError(f"{where}: base_model_name_or_path: {path}: no such file or folder")
    if not path.is_dir() and path.suffix != ".bin":  # it is the adapter that says what is opened, not its user
        raise InputError(f"{where}: base_model_name_or_path: {path}: is no folder, and no .bin file of a model")
    return path
