"""The promise of `tests/README.md`: every test that it names is there, and every room is described."""

import re

import pytest

from tests.helpers import ROOT

TESTS = ROOT / "tests"
PAGE = (TESTS / "README.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([a-z_*/]+\.py)`", PAGE)) - {"helpers.py", "twins.py", "conftest.py"})


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_is_there(name: str) -> None:
    assert "/" in name, "without its room"
    assert list(TESTS.glob(name))


def test_every_promise_names_what_holds_it() -> None:
    table = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    assert len(table) >= 20
    for line in table:
        assert re.search(r"`[a-z]+/test_[a-z_*]+\.py`", line), line


def test_every_room_is_described() -> None:
    rooms = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert rooms == set(re.findall(r"`([a-z]+)/`", PAGE)) - {"minift"}
