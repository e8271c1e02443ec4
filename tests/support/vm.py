"""Tests on Debian's stock kernel, for what this machine's lacks: in a virtual machine that sees this tree (docs/vm-lab.md).

A boot costs 3 seconds and everything in it is slow: put all that a module wants to see into one boot, as a command, a shell
script, or a file of tests of its own that `pytest_in_guest` runs (called `*_guest.py`, so that it is not collected here).
Kernel modules are loaded by `modprobe`, most by themselves; /run is empty, and there is no network but what you make.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from wincey.lab.errors import LabError
from wincey.lab.needs import extend_path
from wincey.lab.vm import MEMORY, check_machine, run_in_vm

ROOT = Path(__file__).parents[2]

# Only what tests in a guest use: to import the other plugins that are installed takes ten seconds there.
_ENVIRONMENT = {"CI": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider")


class Guest(NamedTuple):
    """How a command in the guest ended. output: of stdout and stderr as they came, mixed."""

    code: int
    output: str


def require_vm() -> None:
    """Skip the test where no guest can run."""
    extend_path()
    try:
        check_machine()
    except LabError as error:
        pytest.skip(str(error))


def run_in_guest(command: str | Sequence[str], *, timeout: float = 300, memory: int = MEMORY) -> Guest:
    """Run a shell script (a string; it ends at the first failure) or a command (a list) as root in a fresh guest.

    It starts in the tree's directory, with the programs of the tree's virtual environment on PATH. memory: MiB. timeout:
    seconds, after which LabError is raised.
    """
    require_vm()
    compileall.compile_dir(str(ROOT / "src"), quiet=2)  # each process in the guest would do it again
    pieces: list[bytes] = []
    argv = ["sh", "-euc", command] if isinstance(command, str) else list(command)
    code = run_in_vm(argv, lambda piece, err: pieces.append(piece), directory=str(ROOT), timeout=timeout, memory=memory)
    return Guest(code, b"".join(pieces).decode(errors="replace"))


def pytest_in_guest(*paths: str | os.PathLike[str], timeout: float = 300, memory: int = MEMORY) -> None:
    """Run files of tests in one fresh guest; fails with pytest's own output when one of them fails, or is skipped."""
    argv = [sys.executable, "-m", "pytest", "-q", *_PLUGINS, "--color=no", *map(str, paths)]
    # Files of tests are compiled when they are collected: here a second, there ten.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    } | _ENVIRONMENT
    found = subprocess.run(
        [*argv, "--collect-only"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    guest = run_in_guest(
        ["env", *(f"{name}={value}" for name, value in _ENVIRONMENT.items()), *argv], timeout=timeout, memory=memory
    )
    assert guest.code == 0, guest.output
