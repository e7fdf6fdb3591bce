"""The promise of the README: its tables are those of the kept results, and each result is listed with its machine."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import columns, record, tables
from minift.errors import InputError
from tests.helpers import ROOT

FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
MARKS = re.findall(r"^<!-- table: (.*) -->$", PAGE, re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page and the results, which a test may change."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    shutil.copy(FOLDER / "README.md", tmp_path / "benchmarks")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


def test_the_readme_has_what_its_results_say() -> None:
    assert len(MARKS) >= 17
    assert tables.with_tables(PAGE, RESULTS) == PAGE, "run python -m benchmarks tables"
    assert tables.list_results(RESULTS) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_no_table_is_typed() -> None:
    """Every table of the page is between marks, and every result that is kept is named on the page."""
    rest = tables.MARKED.sub("", PAGE)
    assert not re.search(r"^\|", rest, re.MULTILINE)
    named = {word for mark in MARKS for word in mark.split()}
    for file in RESULTS.glob("*.json"):
        cited = [re.fullmatch(name.replace("*", ".*"), file.name) for name in re.findall(r"`results/(\S+?)`", rest)]
        assert file.stem in named or any(cited), file.name


@pytest.mark.parametrize("mark", MARKS)
def test_a_table_follows_each_number_of_its_results(mark: str, copy: Path) -> None:
    """With every measured number of its results doubled, no row of the table stays as it was."""
    before = tables.make_table(mark.split(), copy / "results")

    def doubled(value: object) -> object:
        if isinstance(value, dict):
            return {key: doubled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [doubled(one) for one in value]
        return value * 2 if isinstance(value, float) else value

    if mark.startswith("defaults"):
        pytest.skip("its numbers find its columns")
    for name in mark.split():
        if (file := copy / "results" / f"{name}.json").exists():
            file.write_text(json.dumps(doubled(json.loads(file.read_text()))))
    after = tables.make_table(mark.split(), copy / "results")
    lines = [(one, other) for one, other in zip(before.splitlines()[2:], after.splitlines()[2:], strict=True)]
    assert all(one != other for one, other in lines)


def test_numbers_are_those_of_the_record() -> None:
    """Computed here by hand, from the raw file, for two rows of the page."""
    raw = json.loads((RESULTS / "peers-stories15m-epyc-cpu.json").read_text())
    side = "transformers, compiled"
    version = ".".join(raw["versions"]["transformers"].split(".")[:2])
    speed, share = raw["tokens_per_second"][side]["median"], raw["share_of_roof"][side]["median"]
    peak, ratio = raw["peak_bytes"][side] / 1e6, raw["times_as_fast_as"]["minift, compiled"][side]
    row = f"| transformers {version}, compiled | {speed:,.0f} | {share:.2f} | {peak:,.0f} MB | {ratio:.2f} x |"
    assert row in PAGE.splitlines()
    rung = json.loads((RESULTS / "ladder-cpu.json").read_text())["rungs"]["+ layer"]
    values = (rung["targets_per_second"]["median"], rung["times_the_rung_below"], rung["times_the_first"])
    assert "| + layer | {:,.0f} | {:.2f} | {:.2f} |".format(*values) in PAGE


def test_a_number_that_is_typed_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check, write = argparse.Namespace(check=True), argparse.Namespace(check=False)
    tables.run(check)
    assert capsys.readouterr().out.count("as the results say") == 2
    page = copy / "README.md"
    text = page.read_text()
    page.write_text(text.replace("| textbook | 264 |", "| textbook | 254 |"))
    line = next(n for n, words in enumerate(page.read_text().splitlines(), start=1) if "textbook | 254" in words)
    with pytest.raises(InputError, match=rf"README.md:{line}: it says '\| textbook \| 254 .*the results '.*264"):
        tables.run(check)
    assert "254" in page.read_text()  # checking writes nothing
    tables.run(write)
    assert page.read_text() == text
    (copy / "results" / "soak-cpu.json").unlink()
    with pytest.raises(InputError, match=r"results/README.md:\d+: it says '\| \[soak-cpu"):
        tables.run(check)


REFUSED = {
    "peer peers-stories15m-cpu": r"no table is of the kind 'peer' \(did you mean peers\?\)",
    "peers ladder-cpu": "a result of ladder, in a table of peers",
    "peers nonesuch": "nonesuch.json: cannot be read",
    "peers peers-stories15m-cpu peers-stories15m-epyc-cpu": "mixes machines .AMD EPYC, 2 cores, Intel Xeon, 2 cores.",
}


@pytest.mark.parametrize(("mark", "said"), REFUSED.items(), ids=REFUSED)
def test_a_wrong_mark_is_refused(mark: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tables.with_tables(f"<!-- table: {mark} -->\n<!-- end -->\n", RESULTS)


def test_a_mark_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="has no `<!-- end -->`"):
        tables.with_tables("<!-- table: ladder ladder-cpu -->\n| 1 |\n", RESULTS)


def test_machines_are_named() -> None:
    names = {file.stem: tables.machine_name(record.read(file)) for file in RESULTS.glob("*.json")}
    assert (names["peers-llama2-7b-h200"], names["soak-cpu"]) == ("NVIDIA H200", "AMD EPYC, 1 core")
    amx = {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU", "cores": 2, "flags": ["avx2", "amx_bf16"]}
    assert tables.machine_name({"machine": amx}) == "Intel Xeon Platinum 8481C with AMX, 2 cores"


def test_every_kind_is_shown() -> None:
    shown = {" ".join(mark.split()[:2]) if mark.startswith("lesson") else mark.split()[0] for mark in MARKS}
    assert shown == set(columns.KINDS)


def test_a_cell_keeps_its_bars() -> None:
    assert tables.as_markdown([["a", ""], ["x", "y"]]) == "| a | |\n|---|---|\n| x | y |"
