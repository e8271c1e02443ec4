"""The pages about security say what is: each test that they name is there, and each target of the fuzzer is told."""

import re
import subprocess
from pathlib import Path

import fuzz.targets  # noqa: F401  # registers them
import pytest
from fuzz.target import TARGETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("threat-model.md", "security.md", "fuzzing.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_that_is_named_is_there(page):
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text())
    assert named or page.name == "fuzzing.md"
    for file, test in named:
        text = (ROOT / file).read_text()
        assert not test or re.search(rf"def {test}\(", text), f"{page.name}: {file}::{test}"


def test_every_target_is_told():
    told = (ROOT / "docs" / "fuzzing.md").read_text()
    assert [name for name in TARGETS if f"`{name}`" not in told] == []


def test_the_figures_of_the_units_are_those_that_are_tested():
    tested = re.findall(r'"([\w-]+\.service)", (\d+)\)', (ROOT / "tests/systemd/test_units.py").read_text())
    told = (ROOT / "docs/security.md").read_text()
    assert len(tested) == 2
    for _, tenths in tested:
        assert f"{int(tenths) / 10:.1f}" in told


def test_the_commands_of_the_page_exist():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY:.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    for page in PAGES:
        for name in re.findall(r"^make (\w+)", page.read_text(), re.MULTILINE):
            assert f"make {name} " in told
            assert f" {name} " in phony, "a directory of that name would be taken for what is to be made"
