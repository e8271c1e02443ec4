"""Commands and labs on another kernel: one boot for what a guest is like, one for a lab in it."""

import os
import platform
import subprocess
import sys

import pytest

from support.vm import ROOT, require_vm, run_in_guest
from wincey.lab.errors import LabError
from wincey.lab.vm import check_machine, run_in_vm
from wincey.lab.vm_kernel import prepare_kernel

WINCEY = [sys.executable, "-m", "wincey.cli.wincey"]


@pytest.mark.vm
def test_a_guest_has_our_files_and_keeps_nothing(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("from outside\n")
    guest = run_in_guest(
        f"""
        uname -r; id -u; pwd; cat {mine}; ls /run
        echo changed > {mine}; mkdir {tmp_path}/new; cat {mine}
        modprobe ipip; ip -br link show tunl0
        flanneld --version 2>&1
        printf 'to the error stream\\n' >&2
        exit 42
        """
    )
    assert guest.code == 42, guest.output
    kernel, user, directory, *rest = guest.output.splitlines()
    assert "amd64" in kernel
    assert kernel != platform.release()
    assert (user, directory) == ("0", str(ROOT))
    text = "\n".join(rest)
    assert "from outside" in text
    assert "changed" in text
    assert "tunl0" in text
    assert "to the error stream" in text
    assert mine.read_text() == "from outside\n"
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.vm
def test_a_lab_in_a_guest_is_as_outside():
    require_vm()
    words = ["lab", "run", "--vm", "--hosts", "2", "--seconds=0"]
    done = subprocess.run([*WINCEY, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 of 2 pairs reachable"
    assert "hosts ready: 2 of 2" in done.stderr


@pytest.mark.vm
def test_a_command_that_takes_too_long_is_ended():
    require_vm()
    with pytest.raises(LabError, match="did not end within 1 s"):
        run_in_vm(["sleep", "1000"], lambda piece, err: None, timeout=1)


def test_another_processor_is_told(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(LabError, match=r"those here are for aarch64: use a machine with an x86-64 processor"):
        check_machine()


def test_missing_programs_are_told_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"needs qemu-system-x86_64, .*apt-get install qemu-system-x86 cpio kmod"):
        check_machine()


def test_without_apt_it_says_how_to_get_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"needs Debian's kernel, and apt-get.* is not here: .*linux-image-amd64"):
        prepare_kernel(tmp_path / "cache")
