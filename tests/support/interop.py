"""Mixed clusters: hosts with the stand-in for flannel beside hosts with our flanneld, and what to compare between them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from wincey.lab.node import own_flanneld
from wincey.lab.plan import STORE
from wincey.lab.process import clean_environment

_PROGRAM = Path(__file__).with_name("flannel_standin.py")

PROBE = """
import select, socket, sys, time
address, end, asked, lost = sys.argv[1], time.monotonic() + 120, 0, 0
print("probing", flush=True)
# Not before some have been asked: what is watched may take less time than it takes to ask them.
while (not select.select([sys.stdin], [], [], 0.02)[0] or asked < 25) and time.monotonic() < end:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        asked += 1
        try:
            s.sendto(b"?", (address, 7))
            s.recv(100)
        except OSError:
            lost += 1
print(asked, lost)
"""

ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 7))
    print("listening", flush=True)
    while True:
        data, peer = s.recvfrom(100)
        try:
            s.sendto(peer[0].encode(), peer)
        except OSError:
            pass  # a sender that was not masqueraded: there is no way back to it
"""


def standin(store="etcd3", iptables=None):
    """The stand-in's command for `--daemon`. iptables: the program that is to be its `iptables`, such as iptables-legacy."""
    command = shlex.join([sys.executable, str(_PROGRAM), f"--etcd-api={'v2' if store == 'etcd2' else 'v3'}"])
    return with_iptables(iptables, command) if iptables else command


def with_iptables(program, command):
    """A command for which `iptables` is that program, by a directory before all others on PATH."""
    links = "; ".join(
        f"ln -sf $(command -v {program.replace('iptables', name)}{end}) $d/{name}{end}"
        for name in ("iptables", "ip6tables")
        for end in ("", "-save", "-restore")
    )
    return f"sh -c 'd=$(mktemp -d); {links}; PATH=$d:$PATH exec {command} \"$@\"' sh"


def ours(lab):
    """Our flanneld's command, for a host that has the stand-in as its own."""
    return shlex.join([*own_flanneld(), f"--etcd-api={'v2' if lab.spec.store == 'etcd2' else 'v3'}"])


def etcdctl(lab, *words):
    """What etcdctl of the lab's API prints, asked beside the store."""
    api = "2" if lab.spec.store == "etcd2" else "3"
    return (
        lab.node(STORE)
        .exec(
            ["etcdctl", "--endpoints", lab.store.url, *words],
            check=True,
            env=clean_environment(os.environ) | {"ETCDCTL_API": api},
        )
        .stdout
    )


def raw_lease(lab, key):
    """A lease's value and the revision of its last change, as the store has them."""
    if lab.spec.store == "etcd2":
        node = json.loads(etcdctl(lab, "-o", "json", "get", key))["node"]
        return node["value"], node["modifiedIndex"]
    found = json.loads(etcdctl(lab, "get", key, "-w", "json"))["kvs"][0]
    return etcdctl(lab, "get", key, "--print-value-only").removesuffix("\n"), found["mod_revision"]


def sh(node, command):
    """Run a shell command, which must succeed; its output."""
    done = node.exec(["sh", "-c", command])
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def said(host):
    """All of a host's log."""
    return "\n".join(host.log())


class Probe:
    """New connections from a container to the world outside, 50 a second, each answered only when it was masqueraded."""

    def __init__(self, lab, source):
        self._echo = lab.node(STORE).popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        assert self._echo.stdout.readline() == "listening\n"
        address = str(lab.spec.underlay(STORE, 4).ip)
        self._probe = source.popen(
            [sys.executable, "-c", PROBE, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._probe.stdout.readline() == "probing\n"

    def asked_and_lost(self):
        """End it; how many there were, and how many without an answer."""
        output, _ = self._probe.communicate("\n", timeout=10)
        self.end()
        asked, lost = map(int, output.split())
        return asked, lost

    def end(self):
        for process in (self._probe, self._echo):
            process.kill()
            process.wait()
            process.stdout.close()
        self._probe.stdin.close()
