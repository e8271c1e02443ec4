"""What we depend on: lock files that fit pyproject.toml, the bill of materials, and the audit that finds what is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import audit
import msgspec
import pytest
import sbom
import supply
from packaging.markers import Marker
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def test_the_lock_files_fit_the_project():
    assert audit.lock_faults() == []


@pytest.mark.parametrize("name", supply.LOCKS)
def test_a_lock_file_names_packages_and_hashes_and_no_host(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|://|--index|--find-links|@ ", text)
    for locked in supply.read_lock(name).values():
        assert len(set(locked.hashes)) == len(locked.hashes) >= 1


def test_compiled_packages_are_locked_for_every_python_and_processor():
    """A wheel for each of 3.11 to 3.14 on two processors, and the source: there are at least so many files."""
    locked = supply.read_lock("requirements.lock")
    assert len(locked["msgspec"].hashes) >= 9
    for each in locked.values():
        marker = str(each.requirement.marker or "")
        assert "python_version" not in marker, each.name
        assert "machine" not in marker, each.name


def test_what_the_locked_packages_need_is_locked_too():
    locked = supply.read_lock("requirements-all.lock")
    for ref, names in ((name, sbom._needs(name)) for name in locked):
        missing = [each for each in names if each not in locked]
        assert [each for each in missing if not _is_for_others(ref, each)] == []


def _is_for_others(name, needed):
    """Whether a need is of another system or an older Python than ours."""
    texts = [
        text
        for text in importlib.metadata.requires(name) or []
        if canonicalize_name(re.split(r"[^A-Za-z0-9._-]", text)[0]) == needed
    ]
    markers = [text.partition(";")[2].strip() for text in texts]
    environments = [
        {"python_version": version, "python_full_version": f"{version}.0", "extra": ""} for version in ("3.11", "3.14")
    ]
    return all(marker and not any(Marker(marker).evaluate(each) for each in environments) for marker in markers)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evil @ https://example.com/evil.tar.gz", "not one version"),
        ("--extra-index-url=x", "neither a package nor a hash"),
        ("loose>=1", "not one version"),
    ],
)
def test_what_should_not_be_in_a_lock_file_is_refused(tmp_path, monkeypatch, line, words):
    monkeypatch.setattr(supply, "ROOT", tmp_path)
    (tmp_path / "x.lock").write_text(f"fine==1 \\\n    --hash=sha256:{'0' * 64}\n{line}\n")
    with pytest.raises(ValueError, match=f"x.lock, line 3: {words}"):
        supply.read_lock("x.lock")


def test_a_project_that_moved_on_is_found(monkeypatch):
    real = supply.wanted
    monkeypatch.setattr(
        audit,
        "wanted",
        lambda extras: [*real(extras), supply.Requirement("newcomer>=1"), supply.Requirement("h11>=99")],
    )
    found = audit.lock_faults()
    assert any("lacks newcomer>=1" in fault for fault in found)
    assert any("has h11" in fault and "h11>=99" in fault for fault in found)


def test_a_changed_file_of_a_package_is_found(tmp_path, monkeypatch):
    """A copy of an installed package with one more byte."""

    site = Path(msgspec.__file__).parents[1]
    info = next(site.glob("h11-*.dist-info"))
    shutil.copytree(site / "h11", tmp_path / "h11", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(info, tmp_path / info.name)
    monkeypatch.setattr(audit, "read_lock", lambda name: {"h11": None})
    only_there = importlib.metadata.PathDistribution(tmp_path / info.name)
    monkeypatch.setattr(audit.metadata, "distribution", lambda name: only_there)
    assert audit.changed_files() == []
    with (tmp_path / "h11" / "_util.py").open("ab") as file:
        file.write(b"#")
    assert [fault.partition(": ")[0] for fault in audit.changed_files()] == ["h11"]
    assert "was changed since it was installed" in audit.changed_files()[0]


def test_an_unknown_licence_is_found(monkeypatch):
    assert audit.licence_faults() == []
    monkeypatch.setattr(audit, "licence", lambda name: "Proprietary" if name == "h11" else "MIT")
    assert audit.licence_faults() == ["h11: the licence 'Proprietary' is not on the list in scripts/audit.py"]


def test_what_could_not_be_asked_is_said(monkeypatch, tmp_path):
    """A pip-audit that knows none of the packages is no all-clear."""
    program = tmp_path / "pip-audit"
    program.write_text('#!/bin/sh\necho \'{"dependencies": [{"name": "h11", "skip_reason": "not found"}]}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(audit.shutil, "which", lambda name, path=None: str(program))
    known, unasked = audit.vulnerabilities()
    assert known == []
    assert unasked == ["pip-audit could not look up 1 of 1 packages: its data can't be reached from here"]
    program.write_text(
        '#!/bin/sh\necho \'{"dependencies": [{"name": "h11", "version": "0.1", "vulns": [{"id": "CVE-1"}]}]}\'\n'
    )
    assert audit.vulnerabilities() == (["h11 0.1: CVE-1"], [])


def test_the_bill_of_materials_is_whole_and_consistent():
    """The rules of CycloneDX 1.6 that a reader relies on: known fields, unique references, every dependency there."""
    bill = json.loads(json.dumps(sbom.bill()))
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert bill.keys() == {
        "bomFormat", "specVersion", "version", "serialNumber", "metadata", "components", "dependencies",
    }  # fmt: skip
    locked = supply.read_lock("requirements-all.lock")
    assert {each["name"]: each["version"] for each in bill["components"]} == {
        each.name: each.version for each in locked.values()
    }
    refs = [bill["metadata"]["component"]["bom-ref"], *(each["bom-ref"] for each in bill["components"])]
    assert len(set(refs)) == len(refs)
    for each in bill["components"]:
        assert each["type"] == "library"
        assert each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}"
        assert {each["value"] for each in each["properties"]} == set(locked[each["name"]].hashes)
        assert each["licenses"][0]["license"]["name"]
    assert {each["ref"] for each in bill["dependencies"]} == set(refs)
    assert all(set(each["dependsOn"]) <= set(refs) for each in bill["dependencies"])
    reached, waiting = set(), [refs[0]]
    edges = {each["ref"]: each["dependsOn"] for each in bill["dependencies"]}
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting += edges[ref]
    assert reached == set(refs), "a package that nobody needs"
    assert sbom.bill() == bill, "the same inputs give the same document"


def test_the_commands():
    for script, words in (("audit.py", "lock files: as they should be"), ("sbom.py", '"bomFormat": "CycloneDX"')):
        done = subprocess.run([sys.executable, ROOT / "scripts" / script], capture_output=True, text=True, check=True)
        assert words in done.stdout
