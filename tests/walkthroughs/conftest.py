"""Hosts for the pages in docs/walkthroughs: each booted with its own systemd, Docker, containerd and etcd.

A page's commands are run as they are printed: `<!-- on: every host -->` or `<!-- on: h1 -->` before a block says where.
"""

import re
import secrets
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.dockerd import DAEMON_JSON, busybox_image, daemon_json, require_docker
from support.nspawn import Booted, require_nspawn
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config

PAGES = Path(__file__).parents[2] / "docs" / "walkthroughs"
UNITS = ("docker.service", "docker.socket", "containerd.service", "etcd.service")


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/walkthroughs/" in str(item.path):
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.etcd)
            item.add_marker(pytest.mark.timeout(300))


class Hosts(dict):
    """Booted hosts by name, and how to run a page on them."""

    def follow(self, page, start="", until=""):
        """Run a page's blocks in their order, or those of a part; what they printed, by host."""
        printed = dict.fromkeys(self, "")
        text = (PAGES / page).read_text()
        text = text[text.index(start) : text.index(until) if until else None]
        blocks = re.findall(r"<!-- on: ([\w ]+) -->\n```sh\n(.*?)```", text, re.DOTALL)
        assert blocks
        for where, script in blocks:
            for name in self if where == "every host" else [where]:
                printed[name] += self[name].sh(script)
        return printed

    def container(self, name, container):
        """A container's address."""
        return self[name].sh("docker inspect -f '{{.NetworkSettings.IPAddress}}' " + container).strip()

    def env(self, name):
        """A host's subnet.env."""
        return dict(line.split("=", 1) for line in self[name].sh("cat /run/flannel/subnet.env").splitlines())


@pytest.fixture
def make_hosts(tmp_path):
    """Boot hosts, with Docker running as it does after its installation; they go when the test ends."""
    require_nspawn()
    require_docker()
    if not shutil.which("etcd"):
        pytest.skip("etcd is not installed: apt-get install etcd-server etcd-client")
    hosts = Hosts()
    image = tmp_path / "busybox.tar"

    def make(count):
        spec = LabSpec(name=f"walk-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=count, containers=0)
        lab = Lab(spec)
        stack.callback(lab.down)
        lab.up(hosts=[])
        subprocess.run(["tar", "-C", busybox_image(tmp_path), "-cf", image, "."], check=True)
        for host in lab.hosts:
            images = tmp_path / host.name / "images"
            images.mkdir(parents=True)
            shutil.copy(image, images)
            units = {f"/etc/systemd/system/{unit}": Path(f"/lib/systemd/system/{unit}").read_text() for unit in UNITS}
            # Addresses on the way out are how flanneld finds its interface.
            host.exec(["ip", "route", "add", "default", "via", "10.99.0.254"], check=True)
            hosts[host.name] = Booted(
                host,
                tmp_path / host.name / "boot",
                files=units | {DAEMON_JSON: daemon_json(host.netns)},
                wants=["docker.service"],
                shared={images: "/var/lib/docker"},
            )
            stack.callback(hosts[host.name].close)
            stack.callback(end_containers, hosts[host.name])
        for booted in hosts.values():
            booted.wait_state("docker")
            booted.sh("docker import /var/lib/docker/busybox.tar busybox")
        return hosts

    with ExitStack() as stack:
        yield make


def end_containers(booted):
    """`sleep` as the first process of a container does not end by itself."""
    if "true" in booted.run("sh", "-c", "pgrep -x dockerd >/dev/null && echo true").stdout:
        booted.run("sh", "-c", "docker ps -q | timeout 20 xargs -r docker kill")
