"""Look over what Wincey depends on: `.venv/bin/python scripts/audit.py [--online]`. Exit code 1 when something is wrong.

Without a network it checks that the lock files fit pyproject.toml and have a hash for each file, that the installed files
are those that were installed (by the hashes of each package's RECORD), and that every licence is one that goes with ours.
What is known of vulnerabilities is asked for with pip-audit, where that is installed; when its data can't be reached, or it
does not know a package, that is said, and with --online it is an error.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from packaging.utils import canonicalize_name
from supply import LOCKS, ROOT, licence, read_lock, wanted

_LICENCES = re.compile(
    r"(?:MIT(?:-0|-CMU)?(?: License)?|BSD(?:[- ]\S+)*(?: License)?|Apache(?:[- ](?:Software|2\.0|License,?|Version))*(?: License)?|ISC(?: License.*)?"
    r"|PSF-2\.0|Python Software Foundation License|Dual License|MPL-2\.0|3-Clause BSD License)",
    re.IGNORECASE,
)
"""What may be used beside Apache-2.0, in the words that packages have for it."""


def lock_faults() -> list[str]:
    """Where lock files and pyproject.toml disagree."""
    found = []
    for name, extras in LOCKS.items():
        locked = read_lock(name)
        for requirement in wanted(extras):
            have = locked.get(canonicalize_name(requirement.name))
            if have is None:
                found.append(f"{name} lacks {requirement}: run scripts/lock.py")
            elif not requirement.specifier.contains(have.version):
                found.append(
                    f"{name} has {have.name} {have.version}, and pyproject.toml wants {requirement}: run scripts/lock.py"
                )
        found += [f"{name} has no hash for {each.name}" for each in locked.values() if not each.hashes]
    small, large = (read_lock(name) for name in LOCKS)
    found += [
        f"the lock files have different versions of {name}: run scripts/lock.py"
        for name in small
        if name not in large or small[name][1:] != large[name][1:]
    ]
    return found


def changed_files() -> list[str]:
    """Files of the locked packages that are not what was installed."""
    found = []
    for name in read_lock("requirements-all.lock"):
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.hash and file.hash.mode == "sha256":
                path = Path(str(file.locate()))
                digest = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
                if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                    found.append(f"{name}: {path} was {'changed' if digest else 'removed'} since it was installed")
    return found


def licence_faults() -> list[str]:
    """Licences that are not known to go with ours."""
    found = []
    for name in read_lock("requirements-all.lock"):
        told = licence(name)
        parts = [part.strip(" ()") for part in re.split(r"\s+(?:OR|AND)\s+", told)]
        if told and not all(_LICENCES.fullmatch(part) for part in parts):
            found.append(f"{name}: the licence {told!r} is not on the list in scripts/audit.py")
    return found


def differences() -> list[str]:
    """What is installed here in another version than the lock has: no fault, but worth knowing."""
    found = []
    for name, locked in read_lock("requirements-all.lock").items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if installed != locked.version:
            found.append(f"{name} {installed} is installed, the lock has {locked.version}")
    return found


def vulnerabilities() -> tuple[list[str], list[str]]:
    """What is known of the locked versions, and what could not be asked."""
    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    if program is None:
        return [], ["pip-audit is not installed: .venv/bin/pip install pip-audit"]
    command = [
        program,
        "-r",
        "requirements-all.lock",
        "--require-hashes",
        "--disable-pip",
        "--format=json",
        "--progress-spinner=off",
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return [], [f"pip-audit gave no answer ({type(error).__name__}): its data can't be reached from here"]
    known = [f"{each['name']} {each['version']}: {bug['id']}" for each in packages for bug in each.get("vulns", ())]
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    unasked = []
    if skipped:
        unasked = [
            f"pip-audit could not look up {len(skipped)} of {len(packages)} packages: its data can't be reached from here"
        ]
    return known, unasked


def main() -> int:
    """Tell everything."""
    wrong = 0
    for what, faults in (
        ("lock files", lock_faults()), ("installed files", changed_files()), ("licences", licence_faults()),
    ):  # fmt: skip
        print(f"{what}: {'as they should be' if not faults else ''}")
        print("".join(f"  {fault}\n" for fault in faults), end="")
        wrong += len(faults)
    for note in differences():
        print(f"note: {note}")
    known, unasked = vulnerabilities()
    wrong += len(known) + (len(unasked) if "--online" in sys.argv[1:] else 0)
    said = "none known" if not unasked else "NOT CHECKED"
    print(f"vulnerabilities: {f'{len(known)} known' if known else said}")
    print("".join(f"  {each}\n" for each in (*known, *unasked)), end="")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
