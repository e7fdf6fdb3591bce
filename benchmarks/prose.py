"""Collect text that every Python installation has: docstrings of the standard library and of installed packages.

None of it is stored here, and none is used twice. With torch and transformers installed there are about 30 MB of it. It
has more words that occur only once (names in code) than web pages have.
"""

import gzip
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

PAGE = 2_200  # characters of a page, about the mean of C4


def pages(megabytes: float) -> Iterator[str]:
    """Yield texts of about PAGE characters, until `megabytes` million characters are reached or no text is left."""
    docstrings = sorted(set(_docstrings()))
    random.Random(0).shuffle(docstrings)
    characters, page = 0, ""
    for docstring in docstrings:
        page += docstring + "\n\n"
        if len(page) >= PAGE:
            yield page
            characters += len(page)
            page = ""
        if characters >= megabytes * 1e6:
            return


def lines(megabytes: float) -> Iterator[bytes]:
    """Yield the pages in C4's format: JSON with a timestamp and a URL."""
    for number, text in enumerate(pages(megabytes)):
        values = {"text": text, "timestamp": "2021-03-04T05:06:07Z", "url": f"https://www.example.com/{number}"}
        yield json.dumps(values, ensure_ascii=False).encode() + b"\n"


def write_shards(folder: Path, megabytes: float, shards: int) -> tuple[list[Path], int]:
    """Write gzipped shards. Return their paths and their number of characters of text."""
    files = [folder / f"prose-{number:05d}-of-{shards:05d}.json.gz" for number in range(shards)]
    characters = 0
    with ExitStack() as stack:
        opened = [stack.enter_context(gzip.open(file, "wb")) for file in files]
        for number, line in enumerate(lines(megabytes)):
            opened[number % shards].write(line)
            characters += len(json.loads(line)["text"])
    return files, characters


def _docstrings() -> Iterator[str]:
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for file in sorted(Path(root).rglob("*.py")):
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for text in re.findall(r'"""(.*?)"""', source, re.DOTALL):
                if 200 <= len(text) < 50_000:
                    yield textwrap.dedent(text).strip()
