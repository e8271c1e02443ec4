"""The build hook: compiles the core of the udp tunnel (src/wincey/tunnel/core) where there is a C compiler.

Without one, or with WINCEY_NO_NATIVE set, the package is pure Python and the tunnel uses its engine in Python. A wheel with
the library is for one kind of machine, and for every Python: the library includes nothing of Python's. CC, CFLAGS and LDFLAGS
are honoured.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fvisibility=hidden")
LIBRARY = "src/wincey/tunnel/core.so"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # it has a type parameter only for type checkers
    """Runs for wheels, those of editable installs included; a source package has the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say in the wheel's name whom it is for."""
        if self.target_name != "wheel":
            return
        root, editable = Path(self.root), version == "editable"
        self._scratch = tempfile.TemporaryDirectory()
        library = root / LIBRARY if editable else Path(self._scratch.name, "core.so")
        if reason := compile_core(root, library):
            if editable:
                library.unlink(missing_ok=True)  # of an earlier build, from other sources
            self.app.display_warning(f"wincey without its compiled core: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if not editable:
            build_data["force_include"][str(library)] = "wincey/tunnel/core.so"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel has its copy."""
        if self.target_name == "wheel":
            self._scratch.cleanup()


def compile_core(root: Path, library: Path, *flags: str) -> str:
    """Compile the core; returns why it is not, "" when it is."""
    if os.environ.get("WINCEY_NO_NATIVE"):
        return "WINCEY_NO_NATIVE is set"
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not shutil.which(compiler[0]):
        return "there is no C compiler (cc): install one, on Debian with `apt-get install gcc libc6-dev`"
    made = library.with_suffix(".new")  # a process that has loaded the old one keeps it
    more = [*shlex.split(os.environ.get("CFLAGS", "")), *flags]
    sources = sorted(map(str, (root / "src/wincey/tunnel/core").glob("*.c")))
    argv = [*compiler, *FLAGS, *more, "-o", str(made), *sources, *shlex.split(os.environ.get("LDFLAGS", ""))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        made.unlink(missing_ok=True)
        return f"{shlex.join(argv)} failed: {done.stderr.strip()}"
    made.rename(library)
    return ""
