"""The image's content, without a registry: the Containerfile's steps on an overlay of this machine's root.

What is not shown: the base image itself, that the stages are apart, and that its packages install there; here they are installed already, and apt is
only asked whether it knows them.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

from support.keys import wait_until
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config

TREE = Path(__file__).parents[2]
FILE = TREE / "Containerfile"

_ROOT = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$0"
mkdir "$0/up" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/up,workdir=$0/work" "$0/root"
mount --rbind /proc "$0/root/proc"
mount --rbind /sys "$0/root/sys"
mount --rbind /dev "$0/root/dev"
mount -t tmpfs -o mode=755 tmpfs "$0/root/run"
rm -rf "$0/root/opt/wincey" "$0/root/opt/bin" "$0/root/src"
echo ready
exec sleep infinity
"""


def instructions():
    """The Containerfile as pairs of instruction and arguments."""
    text = re.sub(r"\\\n", " ", FILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


class Image:
    """A root in a mount namespace of its own, in a host's network."""

    def __init__(self, host, directory):
        argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _ROOT, str(directory)]
        self._keeper = host.popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._keeper.stdout.readline() == "ready\n"
        self.root, self.environment = directory / "root", {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}

    def argv(self, *command):
        # Names are looked up and packages fetched as this machine does: only the file system is the image's.
        return ["nsenter", "--mount", f"--target={self._keeper.pid}", "--", "chroot", self.root, *command]

    def run(self, *command, netns=None, timeout=240):
        enter = ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_")) or "proxy" in name.lower()
        }
        return subprocess.run(
            [*enter, *self.argv(*command)],
            capture_output=True, text=True, timeout=timeout, check=False, env=kept | self.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def sh(self, script):
        done = self.run("sh", "-c", script)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def copy(self, source, target):
        """As COPY: a directory's content, a file as it is."""
        inside = f"/proc/{self._keeper.pid}/root{self.root}{target}"
        if source.is_dir():
            shutil.copytree(source, inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            os.makedirs(inside, exist_ok=True)
            shutil.copy(source, inside)

    def close(self):
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdout.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The image after all steps, and the lab whose host it runs on."""
    if os.geteuid() != 0:
        pytest.skip("needs root: chroot and namespaces")
    lab = Lab(LabSpec(name=f"image-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=1, containers=0))
    image = None
    try:
        lab.up(hosts=[])
        image = Image(lab.hosts[0], tmp_path_factory.mktemp("image"))
        for word, rest in instructions():
            if word == "COPY" and rest.startswith("--from"):
                continue  # the stages share one root here
            if word == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    image.copy(TREE / source, target)
            elif word == "ENV":
                image.environment |= dict([rest.split("=", 1)])
            elif word == "RUN" and "apt-get" in rest:
                packages = re.search(r"--no-install-recommends (.*?) &&", rest)[1]
                image.sh(f"apt-get install --simulate --no-install-recommends {packages}")
            elif word == "RUN":
                image.sh(rest)
        yield image, lab.hosts[0]
    finally:
        if image:
            image.close()
        lab.down()


pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]


def test_programs_are_where_flannels_image_has_them(built):
    image, _ = built
    assert instructions()[-1] == ("ENTRYPOINT", '["/opt/bin/flanneld"]')
    assert image.run("/opt/bin/flanneld", "--version").returncode == 0
    assert "usage" in image.run("/opt/bin/mk-docker-opts.sh", "-h").stderr
    image.sh("for each in nft iptables ip wincey docker-bridge.sh; do command -v $each || exit 1; done")
    assert "Type=notify" in image.sh("cat /opt/wincey/share/wincey/systemd/flanneld.service")
    assert image.sh("ls /opt/wincey/share/wincey/systemd/docker.service.d") == "50-flannel.conf\n"
    assert image.run("test", "-e", "/src").returncode == 1
    image.sh("/opt/wincey/bin/python -c 'from wincey.tunnel.native import load; load()'")


def test_the_entry_point_joins_the_network(built):
    image, host = built
    config = json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
    image.sh(f"echo '{config}' | wincey config set --store sqlite:/run/store.db -")
    entry = json.loads(instructions()[-1][1])
    daemon = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{host.netns}", "--", *image.argv(*entry, "--store=sqlite:/run/store.db", "--iface=eth0", "--ip-masq")],
        env=image.environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: image.run("cat", "/run/flannel/subnet.env").returncode == 0 or daemon.poll() is not None)
        assert "FLANNEL_NETWORK=10.5.0.0/16" in image.sh("cat /run/flannel/subnet.env")
        assert "mtu 1450" in host.exec(["ip", "link", "show", "dev", "flannel.1"]).stdout
    finally:
        daemon.terminate()
        assert daemon.wait(20) == 0
