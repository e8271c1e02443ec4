"""Baked programs are those of their sources, and every package has them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from wincey.bpf.program import read_baked

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("bake", ROOT / "scripts" / "bake.py")
assert _spec
assert _spec.loader
bake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bake)
SOURCES = sorted(bake.SOURCES.glob("*.c"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_what_is_baked_is_of_its_source(source):
    assert read_baked(source.stem).source == bake.source_digest(source), "run `make bake` and commit the result"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_baking_again_gives_the_same(source):
    """With the same compiler to the byte; another one may choose other instructions for the same programs and maps."""
    if not shutil.which("clang"):
        pytest.skip("needs clang")
    committed, fresh = json.loads((bake.BAKED / f"{source.stem}.json").read_text()), json.loads(bake.bake(source))
    if fresh["compiler"] == committed["compiler"]:
        assert fresh == committed
    assert fresh["maps"] == committed["maps"]
    assert fresh["programs"].keys() == committed["programs"].keys()
    assert fresh["license"] == committed["license"]


def test_every_source_is_baked_and_nothing_else():
    assert {path.stem for path in bake.BAKED.glob("*.json")} == {path.stem for path in SOURCES}
