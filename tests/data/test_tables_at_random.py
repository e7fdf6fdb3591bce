"""A table or an array of any values gives what Python's own readers find in it, however its bytes are cut into pieces.

Held here for random values, with `hypothesis`: arrays against `json.loads`, and tables against `csv.DictReader`. What
is known to be difficult is in `data/test_tables.py`.
"""

import csv
import io
import json
from typing import Any

import pytest

from minift.data.tables import array_items, csv_rows
from minift.errors import InputError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(TEXT | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3))


class Dripping(io.BytesIO):
    """A file that gives at most a few bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 3) if size != -1 else -1)


@hypothesis.given(
    st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5),
    st.sampled_from([None, 1, 4]),
    st.sampled_from(["", " \n", "\ufeff"]),
    st.booleans(),
)
def test_an_array(records: list[dict[str, Any]], indent: int | None, before: str, ascii: bool) -> None:
    text = before + json.dumps(records, indent=indent, ensure_ascii=ascii)
    for file in (io.BytesIO(text.encode()), Dripping(text.encode())):
        found = list(array_items(file, "x.json"))
        assert [values for _, values in found] == records
        lines = text.split("\n")
        for line, _ in found:
            assert "{" in lines[line - 1]


@hypothesis.given(
    st.lists(TEXT.map(str.strip).filter(bool), min_size=1, max_size=4, unique=True),
    st.data(),
)
def test_a_table(names: list[str], data: Any) -> None:
    """Whatever is in its cells: commas, quotation marks, line breaks."""
    cells = st.lists(TEXT.map(lambda text: text.replace("\0", "")), min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(cells.filter(any), max_size=5))
    names = [name.replace("\0", "0") for name in names]
    if len({name.strip() for name in names}) < len(names):
        return
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    found = list(csv_rows(io.BytesIO(written.getvalue().encode()), "x.csv"))
    expected = list(csv.DictReader(io.StringIO(written.getvalue(), newline="")))
    assert [item[1] for item in found if not isinstance(item, InputError)] == expected
    assert len(found) == len(rows)
