"""The examples of cloud-config are YAML of the right shape, and the units in them are units."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples" / "cloud-config"
PROGRAMS = Path(sys.executable).parent


@pytest.fixture(params=["wincey.yaml", "coreos.yaml"])
def example(request):
    text = (EXAMPLES / request.param).read_text()
    assert text.startswith("#cloud-config\n")  # without this line cloud-init takes it for something else
    return yaml.safe_load(text)


def test_it_is_a_mapping_of_known_keys(example):
    assert set(example) <= {"package_update", "packages", "write_files", "runcmd", "coreos"}
    assert all(isinstance(command, (str, list)) for command in example.get("runcmd", []))
    assert all({"path", "content"} <= set(file) for file in example.get("write_files", []))


def test_files_that_are_copied_are_in_the_package(example):
    copied = [
        word
        for command in example.get("runcmd", [])
        if isinstance(command, str)
        for word in command.split()
        if word.startswith("/opt/wincey/share/wincey/systemd/")
    ]
    assert len(copied) == (2 if "runcmd" in example else 0)
    for path in copied:
        shipped = EXAMPLES.parents[1] / "packaging" / "systemd" / path.removeprefix("/opt/wincey/share/wincey/systemd/")
        assert shipped.is_file()


def test_coreos_units_are_units(tmp_path):
    """With the variables that its cloud-init filled in, and programs that are here."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    units = yaml.safe_load((EXAMPLES / "coreos.yaml").read_text())["coreos"]["units"]
    assert [unit["name"] for unit in units] == ["etcd2.service", "flanneld.service", "docker.service"]

    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        text = text.replace("$private_ipv4", "10.99.0.1").replace("/opt/wincey/bin", str(PROGRAMS))
        path.write_text(text.replace("/usr/bin/etcdctl", "/bin/true").replace("/usr/bin/dockerd", "/bin/true"))

    for unit in units:
        write(tmp_path / unit["name"], unit.get("content", "[Service]\nExecStart=/bin/true\n"))
        for drop_in in unit.get("drop-ins", []):
            write(tmp_path / f"{unit['name']}.d" / drop_in["name"], drop_in["content"])
    for unit in units:
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / unit["name"]], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
