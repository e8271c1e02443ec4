"""Pages that scripts make from the code: docs/reference/ and man/."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wincey.cli.options import FLAGS
from wincey.observe.localapi import ENDPOINTS

ROOT = Path(__file__).parents[2]
MADE = [
    *(("reference", ROOT / "docs" / "reference" / name) for name in ("api.md", "errors.md", "wincey.md")),
    *(("man", ROOT / "man" / name) for name in ("flanneld.8", "wincey.1")),
]
MANUALS = sorted((ROOT / "man").iterdir())


@pytest.mark.parametrize(("maker", "path"), MADE, ids=lambda value: getattr(value, "name", None))
def test_page_is_current(script, maker, path):
    assert path.read_text() == script(maker)["PAGES"][path.name](), f"run .venv/bin/python scripts/{maker}.py"


def test_every_endpoint_and_every_error_is_there(script):
    api = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert [name for name in ENDPOINTS if f"### GET /v1/{name}\n" not in api] == []
    errors = (ROOT / "docs" / "reference" / "errors.md").read_text()
    classes = re.findall(r"^class (\w+)", (ROOT / "src/wincey/model/errors.py").read_text(), re.MULTILINE)
    assert [name for name in classes if name != "WinceyError" and f"| `{name}` |" not in errors] == []


def test_every_link_within_the_reference_has_its_heading():
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        text = path.read_text()
        headings = {
            re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def rendered(path):
    """A manual page as a terminal without colours shows it, with its words put on one line each entry."""
    shown = subprocess.run(
        ["mandoc", "-T", "ascii", "-O", "width=200", path], capture_output=True, text=True, check=True
    )
    return re.sub(r".\x08", "", shown.stdout)


@pytest.mark.parametrize("path", MANUALS, ids=lambda path: path.name)
def test_manual_page_is_sound(path):
    if not shutil.which("mandoc") or not shutil.which("groff"):
        pytest.skip("mandoc and groff are not installed: apt-get install mandoc groff-base")
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", path], capture_output=True, text=True, check=False
    ).stdout
    # The version stands in place of a date.
    assert [line for line in lint.splitlines() if "missing date" not in line] == []
    groff = subprocess.run(["groff", "-man", "-Tascii", "-ww", "-z", path], capture_output=True, text=True, check=True)
    assert groff.stderr == ""


def test_every_flag_and_command_is_in_its_manual_page(script):
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed: apt-get install mandoc")
    daemon = rendered(ROOT / "man" / "flanneld.8")
    assert [flag.name for flag in FLAGS if f"--{flag.name}" not in daemon] == []
    paths = [context.command_path for context in script("reference")["commands"]()]
    assert {"wincey status", "wincey leases move", "wincey lab up"} <= set(paths)
    operator = rendered(ROOT / "man" / "wincey.1")
    assert [path for path in paths if path not in operator] == []


def test_the_wheel_brings_the_manual_pages():
    text = (ROOT / "pyproject.toml").read_text()
    for path in MANUALS:
        section = path.suffix.removeprefix(".")
        assert f'"man/{path.name}" = "share/man/man{section}/{path.name}"' in text
        assert os.access(path, os.R_OK)
