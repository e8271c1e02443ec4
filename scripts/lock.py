"""Write the lock files anew: each version that an installation gets, with the hashes of all its files.

    .venv/bin/python scripts/lock.py            keep the versions that still fit pyproject.toml
    .venv/bin/python scripts/lock.py --upgrade  take the newest of all

requirements.lock is what `wincey` and `flanneld` need, requirements-all.lock that with every extra but the documents' and the
developers'. One file serves every Python from 3.11 on and every processor, because it holds the hashes of all files of a
version, wheels and source. Needs uv (`pip install uv`), and asks the index that uv is configured for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS: dict[str, tuple[str, ...]] = {"requirements.lock": (), "requirements-all.lock": ("aws", "gce")}
_HEAD = (
    "# Made by scripts/lock.py from pyproject.toml: do not edit. Install with\n"
    "#   pip install --require-hashes -r {name} && pip install --no-deps .\n"
)


def main() -> int:
    """Make them all."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin") or shutil.which("uv")
    if uv is None:
        print("lock: uv is not installed: .venv/bin/pip install uv", file=sys.stderr)
        return 1
    for name, extras in LOCKS.items():
        path = ROOT / name
        command = [
            uv,
            "pip",
            "compile",
            "--universal",
            "--python-version=3.11",
            "--generate-hashes",
            "--no-header",
            "--quiet",
        ]
        command += [
            "--no-emit-index-url",
            "--no-emit-find-links",
            "--no-annotate",
            "--output-file",
            str(path),
            "pyproject.toml",
        ]
        command += [f"--extra={extra}" for extra in extras] + (["--upgrade"] if "--upgrade" in sys.argv[1:] else [])
        subprocess.run(command, cwd=ROOT, check=True)
        text = path.read_text()
        if re.search(r"https?://|--(extra-)?index-url|--find-links", text):
            print(f"lock: {name} names a host; it must name packages and hashes alone", file=sys.stderr)
            return 1
        path.write_text(
            _HEAD.format(name=name) + "".join(line for line in text.splitlines(True) if not line.startswith("#"))
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
