"""Everything that fuzzing has found worth keeping, tried again: the seeds, the corpus, and each input that once failed."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import fuzz.targets  # noqa: F401  # registers them
import pytest
from fuzz.__main__ import CORPUS, CRASHES, inputs
from fuzz.target import TARGETS, Cut, Target, pieces

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet():
    """What is logged about bad input is not looked at here, and there is much of it."""
    before = logging.getLogger("wincey").level
    logging.getLogger("wincey").setLevel(logging.ERROR)
    yield
    logging.getLogger("wincey").setLevel(before)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_stays_mended(name, capfd):
    target = TARGETS[name]
    for which, data in inputs(target):
        try:
            target.check(data)
        except BaseException as error:
            raise AssertionError(f"{name}, {which}: {data!r}") from error
    capfd.readouterr()


def test_corpus_and_crashes_are_of_targets_and_small():
    directories = [path for base in (CORPUS, CRASHES) if base.is_dir() for path in base.iterdir()]
    assert {path.name for path in directories} <= TARGETS.keys()
    files = [file for path in directories for file in path.iterdir()]
    assert sum(file.stat().st_size for file in files) < 2 << 20
    assert any(path.parent == CORPUS for path in directories)


def test_a_target_tells_an_unexpected_error_from_a_documented_one():
    def run(data: bytes) -> None:
        raise (KeyError if data == b"key" else ValueError)("why")

    target = Target("x", run, (ValueError,), (b"",))
    target.check(b"")
    with pytest.raises(KeyError):
        target.check(b"key")


def test_an_error_without_words_is_a_find():
    def run(data: bytes) -> None:
        raise ValueError

    with pytest.raises(AssertionError, match="tells nothing"):
        Target("x", run, (ValueError,), (b"",)).check(b"")


def test_cutting_and_joining_agree():
    cut = Cut(pieces("one", b"two", ""))
    assert (cut.piece(), cut.piece(), cut.piece(), cut.left) == (b"one", b"two", b"", 0)


@pytest.mark.parametrize("engine", ["auto", "hypothesis"])
def test_a_planted_bug_is_found_and_kept(engine, tmp_path):
    """The runner with each engine, on a target of the tests that fails for inputs that begin with `{!`."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import fuzz.__main__ as runner
from fuzz.target import target
runner.CRASHES, runner.WORK = Path({str(tmp_path)!r}) / "crashes", Path({str(tmp_path)!r}) / "work"
runner._load = lambda: None

@target("planted", ValueError, seeds=("{{x}}",))
def planted(data: bytes) -> None:
    if data[:2] == b"{{!":
        raise KeyError("planted")
    raise ValueError("no")

if "--inside" not in sys.argv:
    (runner.CRASHES / "planted").mkdir(parents=True)
    (runner.WORK / "planted").mkdir(parents=True)
    (runner.WORK / "planted" / "a").write_bytes(b"{{x}}")
    sys.argv += ["--inside", "planted"]
sys.exit(runner.main())
""")
    done = subprocess.run(
        [sys.executable, script, f"--engine={engine}", "--seconds=60"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    crashes = list((tmp_path / "crashes" / "planted").iterdir())
    assert len(crashes) == 1, done.stdout + done.stderr
    assert crashes[0].read_bytes()[:2] == b"{!"
    assert "planted" in done.stdout + done.stderr


def test_an_unknown_target_is_a_wrong_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "no-such"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fuzz: there is no target no-such; there are ")
