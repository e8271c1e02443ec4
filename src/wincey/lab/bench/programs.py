"""The helpers in C, compiled when they are needed: what loads the paths must cost next to nothing itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from wincey.lab.errors import LabError

_SOURCES = Path(__file__).parent
_PROGRAMS = ("load", "one_packet_proxy")


def compile_programs(directory: Path) -> None:
    """Make the programs in a directory; raises LabError."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LabError("the benchmark needs a C compiler: install one, on Debian with apt-get install gcc libc6-dev")
    for name in _PROGRAMS:
        argv = [compiler, "-O2", "-o", str(directory / name), str(_SOURCES / f"{name}.c")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise LabError(f"{name}.c does not compile: {done.stderr.strip()}; install libc6-dev and linux-libc-dev")
