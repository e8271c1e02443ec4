"""What the lock files say, for the scripts and tests that ask: names, versions and hashes; and licences as packages tell them."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS: dict[str, tuple[str, ...]] = {"requirements.lock": (), "requirements-all.lock": ("aws", "gce")}
"""The lock files, and the extras of pyproject.toml that each one is for."""

_LINE = re.compile(r"(?P<requirement>[A-Za-z0-9][^\\]*?)\s*\\?$")
_HASH = re.compile(r"\s+--hash=sha256:(?P<digest>[0-9a-f]{64})(?: \\)?$")


class Locked(NamedTuple):
    """One package of a lock file. hashes: SHA-256 of every file that the index has of this version."""

    requirement: Requirement
    version: str
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name, in the form that compares."""
        return canonicalize_name(self.requirement.name)


def read_lock(name: str) -> dict[str, Locked]:
    """A lock file by package name; raises ValueError with file and line for what should not be in one."""
    found: dict[str, Locked] = {}
    current: tuple[Requirement, str] | None = None
    hashes: list[str] = []

    def end() -> None:
        if current:
            locked = Locked(current[0], current[1], tuple(hashes))
            found[locked.name] = locked

    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if match := _HASH.match(line):
            hashes.append(match["digest"])
            continue
        match = _LINE.match(line)
        if not match or line.startswith("-"):
            raise ValueError(f"{name}, line {number}: neither a package nor a hash: {line}")
        end()
        requirement = Requirement(match["requirement"])
        versions = list(requirement.specifier)
        if requirement.url or len(versions) != 1 or versions[0].operator != "==":
            raise ValueError(f"{name}, line {number}: not one version: {line}")
        current, hashes = (requirement, versions[0].version), []
    end()
    return found


def wanted(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for, with some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


def licence(name: str) -> str:
    """The licence that an installed package tells, "" for one that is not installed or tells none."""
    try:
        told = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ""
    if expression := told.get("License-Expression"):
        return str(expression)
    classified = [
        each.rpartition(" :: ")[2] for each in told.get_all("Classifier", []) if each.startswith("License ::")
    ]
    text = (told.get("License") or "").strip()
    return " OR ".join(classified) or (text.splitlines()[0] if text else "")
