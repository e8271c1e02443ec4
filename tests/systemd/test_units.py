"""The unit and Docker's drop-in as systemd reads them, without a boot."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def units(tmp_path):
    """Copies in which our programs are those of this environment, as systemd looks whether they are there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    dockerd = tmp_path / "dockerd"
    dockerd.write_text("#!/bin/sh\n")
    dockerd.chmod(0o755)
    for path in UNITS.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(UNITS)
            target.parent.mkdir(exist_ok=True)
            text = path.read_text().replace("/opt/wincey/bin", str(PROGRAMS))
            target.write_text(text.replace("ExecStart=dockerd", f"ExecStart={dockerd}"))
    (tmp_path / "docker.service").write_text(f"[Service]\nType=notify\nExecStart={dockerd} -H fd://\n")
    return tmp_path


def analyze(*arguments):
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("unit", ["flanneld.service", "docker.service", "wincey-docker-plugin.service"])
def test_systemd_finds_no_fault(units, unit):
    assert analyze("verify", units / unit) == (0, "")


def test_a_fault_would_be_found(units):
    unit = units / "flanneld.service"
    unit.write_text(unit.read_text().replace("RestartSec=2", "RestartSecs=2\nProtectSystem=very"))
    _, said = analyze("verify", unit)
    assert "RestartSecs" in said
    assert "protect system value" in said


@pytest.mark.parametrize(("name", "tenths"), [("flanneld.service", 27), ("wincey-docker-plugin.service", 24)])
def test_the_unit_is_hardened(units, name, tenths):
    """2.7 of 10, where 9.6 is no hardening: what is left is what the daemon is for, and root."""
    unit = units / name
    code, said = analyze("security", "--offline=true", f"--threshold={tenths}", unit)
    assert code == 0, said
    for line in ("CapabilityBoundingSet=", "ProtectSystem=", "RestrictAddressFamilies="):
        text = unit.read_text()
        assert f"\n{line}" in text
        unit.write_text(text.replace(f"\n{line}", "\n#"))
        assert analyze("security", "--offline=true", f"--threshold={tenths}", unit)[0] == 1, line
        unit.write_text(text)


def test_the_example_of_flags_is_read_by_flanneld():
    """Every variable, commented out or not, is a flag's."""
    names = {
        line.lstrip("#").partition("=")[0]
        for line in (UNITS / "flanneld.env").read_text().splitlines()
        if line.lstrip("#").startswith("FLANNELD_")
    }
    done = subprocess.run([PROGRAMS / "flanneld", "--help"], capture_output=True, text=True, check=True)
    assert names
    for name in names:
        assert f"--{name.removeprefix('FLANNELD_').lower().replace('_', '-')}" in done.stderr.split()
