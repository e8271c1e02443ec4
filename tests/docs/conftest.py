"""The documents: what is made from the code is current, the site builds, and what pages show is what happens."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def script():
    """Load a script of scripts/ by name; its functions by theirs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield lambda name: runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))
    finally:
        sys.path.remove(str(ROOT / "scripts"))
