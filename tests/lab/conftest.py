"""Labs with the stand-in daemon, under names and a directory of their own, gone at the end whatever happens."""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wincey.lab import Lab, LabSpec, network_config
from wincey.lab.lab import lab_names
from wincey.lab.needs import extend_path

STANDIN = shlex.join([sys.executable, str(Path(__file__).parents[1] / "support" / "flannel_standin.py")])
WINCEY = [sys.executable, "-m", "wincey.cli.wincey"]


def mentions(word):
    """Namespaces and processes (other than we) that have `word` in their name or command line."""
    namespaces = [each for each in os.listdir("/run/netns") if word in each] if os.path.isdir("/run/netns") else []
    commands = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command and int(pid) != os.getpid():
            commands.append(f"{pid} {command}")
    return namespaces + commands


class Sandbox:
    """Names and a state directory for the labs of one test."""

    def __init__(self, root):
        self.root = root
        self.word = f"t{secrets.token_hex(3)}"

    def name(self, suffix="a"):
        return f"{self.word}-{suffix}"

    def spec(self, **more):
        config = network_config(more.pop("backend", "vxlan"))
        values = {"name": self.name(), "config": config, "hosts": 2, "store": "etcd3", "daemons": {"*": STANDIN}}
        return LabSpec(**(values | more))

    def lab(self, **more):
        return Lab(self.spec(**more), root=self.root)

    def argv(self, *words):
        return [*WINCEY, "lab", "--directory", str(self.root), *words]

    def wincey(self, *words, timeout=90):
        return subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=timeout, check=False)

    def json(self, *words):
        done = self.wincey(words[0], "--json", *words[1:])
        return json.loads(done.stdout.splitlines()[-1])

    def leftovers(self):
        return mentions(self.word) + (sorted(map(str, self.root.glob("*"))) if self.root.exists() else [])


@pytest.fixture
def sandbox(tmp_path):
    extend_path()
    if os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "ping", "etcd", "etcdctl"))):
        pytest.skip("needs root, iproute2, util-linux, iputils-ping, etcd-server and etcd-client")
    box = Sandbox(tmp_path / "labs")
    yield box
    for name in lab_names(box.root):
        Lab.open(name, root=box.root).down()


@pytest.fixture
def standin():
    return STANDIN
