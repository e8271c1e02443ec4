"""Two hosts on a veth, each with a container behind a bridge, in namespaces of this run alone.

container a 10.3.1.2 - bridge 10.3.1.1 | host a 10.99.0.1 ===== 10.99.0.2 host b | bridge 10.3.2.1 - 10.3.2.2 container b
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wincey.model.address import Subnet, parse_address
from wincey.model.state import Changes, Scope, Tunnel, TunnelPeer
from wincey.tunnel.driver import TunnelDriver

MTU = 1472
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    def __init__(self, name):
        self.name = name
        run("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *words):
        return run("ip", "-n", self.name, *words)

    @contextlib.contextmanager
    def started(self, *command):
        """A program whose output is read; killed at the end if it still runs."""
        command = ["ip", "netns", "exec", self.name, *command]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *command, check=True):
        return run("ip", "netns", "exec", self.name, *command, check=check)

    def python(self, code, *arguments, check=True):
        return self.run(sys.executable, "-c", code, *arguments, check=check)

    def ping(self, target, *options, count=3):
        return self.run("ping", "-n", "-i", "0.01", "-W", "2", "-c", str(count), *options, target, check=False).stdout

    def pids(self, title="flannel-udp"):
        found = run("ip", "netns", "pids", self.name).stdout.split()
        return [int(pid) for pid in found if _title(pid) == title]

    @contextlib.contextmanager
    def inside(self):
        """This process in the namespace, so that a driver works there."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            assert _libc.setns(there, 0) == 0
            yield
        finally:
            assert _libc.setns(home, 0) == 0
            os.close(there)
            os.close(home)

    def remove(self):
        for pid in run("ip", "netns", "pids", self.name).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "del", self.name)


class Host(Namespace):
    def __init__(self, name, number, directory):
        super().__init__(name)
        self.number = number
        self.directory = directory
        self.local = f"10.99.0.{number}"
        self.container = Namespace(name + "c")

    def wire(self):
        subnet = f"10.3.{self.number}"
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.ip("link", "add", "cni0", "type", "bridge")
        self.ip("addr", "add", f"{subnet}.1/24", "dev", "cni0")
        self.ip("link", "add", "c0", "type", "veth", "peer", "name", "eth0", "netns", self.container.name)
        self.ip("link", "set", "c0", "master", "cni0", "up")
        self.ip("link", "set", "cni0", "up")
        self.container.ip("addr", "add", f"{subnet}.2/24", "dev", "eth0")
        self.container.ip("link", "set", "eth0", "up")
        self.container.ip("route", "add", "default", "via", f"{subnet}.1")

    def bring_up(self, mtu=None):
        """What the kernel layer does once the tunnel is there."""
        self.ip("link", "set", "flannel0", "up")
        if mtu:
            self.ip("link", "set", "flannel0", "mtu", str(mtu))
        self.ip("addr", "add", f"10.3.{self.number}.0/32", "dev", "flannel0")
        self.ip("route", "add", "10.3.0.0/16", "dev", "flannel0")

    def objects(self, port=8285, mtu=MTU):
        other = 3 - self.number
        tunnel = Tunnel("flannel0", mtu, parse_address(self.local), port)
        peer = TunnelPeer("flannel0", Subnet.parse(f"10.3.{other}.0/24"), parse_address(f"10.99.0.{other}"))
        return [tunnel, peer]

    async def apply(self, put=(), delete=()):
        """Apply through a driver of a daemon that leaves at once."""
        with self.inside():
            driver = TunnelDriver(self.directory)
            try:
                return await driver.apply(Changes(list(put), list(delete)))
            finally:
                await driver.close()

    async def observe(self, desired=(), scope=Scope(("flannel0",))):  # noqa: B008  # frozen
        with self.inside():
            driver = TunnelDriver(self.directory)
            try:
                return await driver.observe({thing.key: thing for thing in desired}, scope)
            finally:
                await driver.close()

    async def counters(self):
        with self.inside():
            driver = TunnelDriver(self.directory)
            try:
                return await driver.counters("flannel0")
            finally:
                await driver.close()

    def remove(self):
        self.container.remove()
        super().remove()


def run(*command, check=True):
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done


def _title(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture
def host(tmp_path) -> Iterator[Host]:
    """One host with a container, and an underlay without neighbours."""
    with contextlib.ExitStack() as stack:
        host = Host(f"wt{secrets.token_hex(4)}a", 1, tmp_path / "a")
        stack.callback(host.remove)
        host.ip("link", "add", "eth0", "type", "bridge")
        host.ip("addr", "add", "10.99.0.1/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.wire()
        yield host


@pytest.fixture
def hosts(tmp_path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, without tunnels."""
    prefix = f"wt{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        a = Host(prefix + "a", 1, tmp_path)
        stack.callback(a.remove)
        b = Host(prefix + "b", 2, tmp_path)  # the same directory: hosts in namespaces may share a file system
        stack.callback(b.remove)
        a.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.name)
        for host in (a, b):
            host.ip("addr", "add", f"{host.local}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.wire()
        yield a, b


@pytest.fixture
async def joined(hosts) -> tuple[Host, Host]:
    """Two hosts joined by tunnels, the daemons gone."""
    for host in hosts:
        assert await host.apply(host.objects()) == []
        host.bring_up()
    return hosts
