"""docs/rough-edges.md: all forty-two are there, and each test that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rough-edges.md").read_text()
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = {int(number): cells for number, *cells in ROW.findall(PAGE)}


def test_all_of_them_are_there():
    assert list(ROWS) == list(range(1, 43))
    assert len(re.findall(r"^\| \d+", PAGE, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize("number", ROWS)
def test_each_names_tests_that_there_are(number):
    theirs, ours, shown = ROWS[number]
    assert theirs.strip()
    assert ours.strip()
    named = TEST.findall(shown)
    assert named, f"{number}: no test"
    assert TEST.sub("", shown).strip(" ,") == "", f"{number}: something else than tests"
    for path, name in named:
        functions = re.findall(r"^ *(?:async )?def (\w+)\(", (ROOT / path).read_text(), re.MULTILINE)
        assert name in functions, f"{number}: {path} has no {name}"
