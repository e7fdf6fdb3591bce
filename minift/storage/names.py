"""Models by their names on Hugging Face's hub, if they are in its cache on this machine: nothing is downloaded.

`hf download meta-llama/Llama-2-7b-hf` puts a repository's files into `models--meta-llama--Llama-2-7b-hf/snapshots/`, in
a folder named by a commit; `refs/main` beside it says which commit is the newest that was fetched.

Source: "Understand caching", in the documentation of `huggingface_hub`. Read next: `storage/links.py`.
"""

import os
import re
from pathlib import Path

from minift.errors import InputError

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
