"""The package with and without a C compiler: what is in the wheel, whom it is for, and that it works once installed."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wincey.tunnel.native import NoCore, load

ROOT = Path(__file__).parents[2]

CHECK = """
import socket
from wincey.tunnel.engines import engage
from wincey.tunnel import device
device.set_offloads = lambda tun, choices: choices[0]  # there is no TUN here
tun, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
engine, why = engage("offload", tun.fileno(), udp, lambda packet, now: False, header=True)
print(engine.name, engine.core, why, sep="|")
"""


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(directory, **environment):
    argv = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", directory, ROOT]
    environment = {**os.environ, **environment}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel, done.stdout + done.stderr


def self_check(wheel, directory):
    """Install into a directory of its own, and see which engine there is."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_with_a_compiler_the_wheel_has_the_core_and_is_for_this_machine(tmp_path):
    wheel, _ = built(tmp_path)
    assert "-py3-none-linux_" in wheel.name
    assert self_check(wheel, tmp_path / "site") == "offload|compiled|"


@pytest.mark.parametrize("environment", [{"WINCEY_NO_NATIVE": "1"}, {"CC": "no-such-compiler"}])
def test_without_one_it_is_pure_works_and_says_so(tmp_path, environment):
    wheel, said = built(tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "wincey without its compiled core" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    reason = "no compiled core: this package was built without a C compiler"
    assert self_check(wheel, tmp_path / "site") == f"offload|python|{reason}"


def test_the_core_compiles_without_a_warning(hook, tmp_path):
    assert hook.compile_core(ROOT, tmp_path / "core.so", "-Wall", "-Wextra", "-Werror") == ""
    assert load(tmp_path / "core.so").wincey_abi() == 1


def test_a_failed_compilation_says_why_and_leaves_nothing(hook, tmp_path):
    assert "unrecognized" in hook.compile_core(ROOT, tmp_path / "core.so", "--no-such-flag")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_none_is_told(tmp_path):
    (tmp_path / "core.so").write_bytes(b"\x7fELF")
    with pytest.raises(NoCore, match="can't be loaded"):
        load(tmp_path / "core.so")
