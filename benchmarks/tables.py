"""Write the tables of the README from the results, and the list of all results: no number in them is typed.

A table of the README is between two marks. The first says of which kind it is (`columns.py`) and from which files of
`results/`, all of which are from the same kind of machine:

    <!-- table: ladder ladder-cpu -->
    <!-- end -->

    python -m benchmarks tables                # write benchmarks/README.md and benchmarks/results/README.md
    python -m benchmarks tables --check        # write nothing; fail where a table is not that of its results

A new result goes into `results/` under a name of its own, and a mark for it into the README.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import columns, record
from benchmarks.words import meant
from minift.errors import InputError

FOLDER = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEAD = """# Results

What each file is, and from which machine. `python -m benchmarks tables` writes this list.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something differs")


def run(options: argparse.Namespace) -> None:
    """Write both pages, or check them. Raises InputError, with `--check` for a page that is not that of the results."""
    readme, listed = FOLDER / "README.md", FOLDER / "results" / "README.md"
    pages = {readme: with_tables(readme.read_text(encoding="utf-8"), FOLDER / "results")}
    pages[listed] = list_results(FOLDER / "results")
    for file, text in pages.items():
        there = file.read_text(encoding="utf-8") if file.exists() else ""
        if there == text:
            print(f"{file.relative_to(FOLDER.parent)}: as the results say")
        elif options.check:
            line, old, new = first_difference(there, text)
            raise InputError(f"{file}:{line}: it says {old!r}, the results {new!r}; run python -m benchmarks tables")
        else:
            file.write_text(text, encoding="utf-8")
            print(f"{file.relative_to(FOLDER.parent)}: written")


def with_tables(text: str, folder: Path) -> str:
    """Return a page with each table between marks made from its results in a folder.

    Raises:
        InputError: for a kind of table that is not known, a result that is missing, damaged or of another benchmark,
            results of different machines in one table, and a mark that does not end.
    """
    if text.count("<!-- table: ") != len(MARKED.findall(text)):
        raise InputError("benchmarks/README.md: a `<!-- table: … -->` has no `<!-- end -->`")
    return MARKED.sub(lambda found: f"{found[1]}{make_table(found[2].split(), folder)}\n{found[4]}", text)


def make_table(words: Sequence[str], folder: Path) -> str:
    """Return the table of a mark's words: a kind, and the names of results."""
    kind, names = (" ".join(words[:2]), words[2:]) if words[:1] == ["lesson"] else (words[0], words[1:])
    if kind not in columns.KINDS:
        near = meant(kind, columns.KINDS)
        raise InputError(f"no table is of the kind {kind!r}{near}; known: {', '.join(columns.KINDS)}")
    results = {name: record.read(folder / f"{name}.json") for name in names}
    for name, result in results.items():
        if result["benchmark"] != kind:
            raise InputError(f"{folder / name}.json: a result of {result['benchmark']}, in a table of {kind}")
    machines = {machine_name(result) for result in results.values()}
    if len(machines) != 1:
        raise InputError(f"a table of {kind} mixes machines ({', '.join(sorted(machines))}): make one for each")
    return as_markdown(columns.KINDS[kind](list(results.values())))


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table of Markdown; the first row is the head."""
    lines = ["|" + "".join(f" {cell} |".replace("  ", " ") for cell in row) for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine_name(result: Mapping[str, Any]) -> str:
    """Return the kind of machine of a result: its GPU, or its processor and the number of cores."""
    machine = result["machine"]
    cpu = re.sub(r"\(R\)|\(TM\)| Processor| CPU", "", machine["cpu"]).strip()
    cores = machine["cores"]
    amx = " with AMX" if "amx_bf16" in machine.get("flags", ()) else ""
    return machine["gpu"]["name"] if "gpu" in machine else f"{cpu}{amx}, {cores} core{'s' if cores > 1 else ''}"


def list_results(folder: Path) -> str:
    """Return the page that says of each result what it is and from which machine."""
    rows = [["file", "benchmark", "machine", "date", "commit", "command"]]
    for file in sorted(folder.glob("*.json")):
        one = record.read(file)
        named = f"[{file.stem}]({file.name})"
        values = (one["benchmark"], machine_name(one), one["date"], one["commit"], f"`{one['command']}`")
        rows.append([named, *values])
    return HEAD + as_markdown(rows) + "\n"


def first_difference(one: str, other: str) -> tuple[int, str, str]:
    """Return the number of the first line in which two texts differ, and that line of each."""
    lines, others = one.splitlines(), other.splitlines()
    longest = max(len(lines), len(others))
    for number in range(longest):
        pair = [text[number] if number < len(text) else "" for text in (lines, others)]
        if pair[0] != pair[1]:
            return number + 1, pair[0], pair[1]
    return longest, "", ""
