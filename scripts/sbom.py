"""Write what Wincey is made of as CycloneDX 1.6 JSON: `.venv/bin/python scripts/sbom.py [FILE]`, standard output by default.

It is made from requirements-all.lock; licences and who needs whom are told by the packages, as far as they are installed
here. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from supply import ROOT, Locked, licence, read_lock, wanted

_EXTRAS = ("aws", "gce")
_REF = "pkg:pypi/{}@{}"


def bill() -> dict[str, Any]:
    """The document."""
    locked = read_lock("requirements-all.lock")
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "src/wincey/__init__.py").read_text())
    assert version, "src/wincey/__init__.py tells the version"
    own = _REF.format("wincey", version[1])
    needs = {own: sorted({canonicalize_name(each.name) for each in wanted(_EXTRAS)})}
    components = []
    for each in locked.values():
        components.append(_component(each))
        needs[_ref(each)] = _needs(each.name)
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application", "bom-ref": own, "name": "wincey", "version": version[1], "purl": own,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": [_ref(locked[name]) for name in names if name in locked]}
            for ref, names in needs.items()
        ],
    }  # fmt: skip
    digest = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return {**document, "serialNumber": f"urn:uuid:{digest}"}


def _ref(locked: Locked) -> str:
    return _REF.format(locked.name, locked.version)


def _component(locked: Locked) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": _ref(locked),
        "name": locked.name,
        "version": locked.version,
        "purl": _ref(locked),
        "properties": [{"name": "wincey:file:sha256", "value": digest} for digest in locked.hashes],
    }
    if told := licence(locked.name):
        component["licenses"] = [{"license": {"name": told}}]
    return component


def _needs(name: str) -> list[str]:
    try:
        asked = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in asked]
    return sorted(
        {canonicalize_name(each.name) for each in requirements if not each.marker or "extra" not in str(each.marker)}
    )


def main() -> int:
    """Write it."""
    text = json.dumps(bill(), indent=2) + "\n"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path}: {text.count(chr(34) + 'purl' + chr(34)) - 1} packages")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
