"""A host, a container on it, a remote container and the outside, each a network namespace of its own, joined by veth.

The test's thread enters the host's namespace, so drivers under test work there; sockets of the others are opened by
entering theirs for a moment. Addresses: host 172.31.0.1 (outside), 172.31.1.1 (remote), 10.3.1.1 (container, own subnet
10.3.1.0/24); outside 172.31.0.2; container 10.3.1.2; remote container 10.3.2.2; and the same in fd00::/16.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from wincey.kernel.driver import Driver
from wincey.model.state import Changes, Failure, Key, Object, Scope

CLONE_NEWNET = 0x40000000

ADDRESSES: dict[int, dict[str, str]] = {
    socket.AF_INET: {
        "outside": "172.31.0.2",
        "container": "10.3.1.2",
        "remote": "10.3.2.2",
        "host-outside": "172.31.0.1",
        "host-remote": "172.31.1.1",
    },
    socket.AF_INET6: {
        "outside": "fd31::2",
        "container": "fd00:3:0:1::2",
        "remote": "fd00:3:0:2::2",
        "host-outside": "fd31::1",
        "host-remote": "fd31:1::1",
    },
}


def run(*command: str, check: bool = True, text: str | None = None) -> str:
    """Run a program in the namespace of this thread; its output."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _setns(path: str) -> None:
    with open(path) as handle:  # os.setns only came with Python 3.12
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), path)


@contextmanager
def entered(name: str) -> Iterator[None]:
    """Be in a named network namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _setns(f"/run/netns/{name}")
        yield
    finally:
        _setns(f"/proc/self/fd/{before}")
        os.close(before)


class Hosts:
    """The namespaces; removed by `close`."""

    def __init__(self) -> None:
        self.tag = f"wr{os.getpid() % 10000}{secrets.token_hex(2)}"
        self.made: list[str] = []

    def name(self, of: str) -> str:
        return f"{self.tag}-{of}"

    def make(self, *, peers: bool) -> None:
        """Make the host's namespace and, if asked, the three others."""
        for one in ("host", *(("container", "remote", "outside") if peers else ())):
            run("ip", "netns", "add", self.name(one))
            self.made.append(self.name(one))
            run("ip", "-n", self.name(one), "link", "set", "lo", "up")
            with entered(self.name(one)):  # else link-local addresses can't be used for a second or two
                run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        if not peers:
            return
        host = self.name("host")
        for one, here, there, gateway in (
            ("container", "10.3.1.1/24", "10.3.1.2/24", "10.3.1.1"),
            ("remote", "172.31.1.1/24", "10.3.2.2/32", "172.31.1.1"),
            ("outside", "172.31.0.1/24", "172.31.0.2/24", "172.31.0.1"),
        ):
            self._join(host, one, here, there, gateway)
        for one, here, there, gateway in (
            ("container", "fd00:3:0:1::1/64", "fd00:3:0:1::2/64", "fd00:3:0:1::1"),
            ("remote", "fd31:1::1/64", "fd00:3:0:2::2/128", "fd31:1::1"),
            ("outside", "fd31::1/64", "fd31::2/64", "fd31::1"),
        ):
            self._address(host, one, here, there, gateway)
        run("ip", "-n", host, "route", "add", "10.3.2.0/24", "dev", "remote", "src", "172.31.1.1")
        run("ip", "-n", host, "route", "add", "fd00:3:0:2::/64", "dev", "remote", "src", "fd31:1::1")
        with entered(host):
            run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def _join(self, host: str, one: str, here: str, there: str, gateway: str) -> None:
        peer = self.name(one)
        run("ip", "-n", host, "link", "add", one, "type", "veth", "peer", "name", "eth0", "netns", peer)
        run("ip", "-n", host, "link", "set", one, "up")
        run("ip", "-n", peer, "link", "set", "eth0", "up")
        self._address(host, one, here, there, gateway)

    def _address(self, host: str, one: str, here: str, there: str, gateway: str) -> None:
        peer, nodad = self.name(one), (["nodad"] if ":" in here else [])
        run("ip", "-n", host, "address", "add", here, "dev", one, *nodad)
        run("ip", "-n", peer, "address", "add", there, "dev", "eth0", *nodad)
        run("ip", "-n", peer, "route", "add", "default", "via", gateway, "dev", "eth0", "onlink")

    def udp(self, where: str, family: int, *, bind: str = "", mark: int = 0, port: int = 0) -> socket.socket:
        """A UDP socket in a namespace, bound to all of its addresses or to any one, be it its own or not."""
        with entered(self.name(where if where in {"container", "remote", "outside"} else "host")):
            one = socket.socket(family, socket.SOCK_DGRAM)
        level, transparent = (socket.SOL_IP, 19) if family == socket.AF_INET else (socket.IPPROTO_IPV6, 75)
        one.setsockopt(level, transparent, 1)
        one.bind((bind, port))
        one.settimeout(5)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        return one

    def source(self, sender: str, receiver: str, family: int, *, bind: str = "", mark: int = 0) -> str:
        """The address that a packet from one to another arrives with; raises TimeoutError if it does not arrive."""
        with self.udp(sender, family, bind=bind, mark=mark) as out, self.udp(receiver, family) as into:
            out.sendto(b"?", (ADDRESSES[family][receiver], into.getsockname()[1]))
            return str(into.recvfrom(16)[1][0])

    def passes(self, sender: str, receiver: str, family: int) -> bool:
        """Whether a packet arrives; does not wait long for one that doesn't."""
        with self.udp(sender, family) as out, self.udp(receiver, family) as into:
            into.settimeout(1)
            out.sendto(b"?", (ADDRESSES[family][receiver], into.getsockname()[1]))
            try:
                into.recvfrom(16)
            except TimeoutError:
                return False
            return True

    def close(self) -> None:
        for name in self.made:
            run("ip", "netns", "delete", name, check=False)


@contextmanager
def on_a_host(*, peers: bool = False) -> Iterator[Hosts]:
    """Be on a fresh host with no rules at all."""
    hosts = Hosts()
    try:
        hosts.make(peers=peers)
        with entered(hosts.name("host")):
            yield hosts
    finally:
        hosts.close()


class Reconciled:
    """Keeps a driver's part of the desired state as the reconciler would: observe, apply the difference, on each notice."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.desired: dict[Key, Object] = {}
        self.reasons: list[str] = []
        self.failures: list[Failure] = []
        self.notice = asyncio.Event()

    def want(self, *objects: Object) -> None:
        self.desired = {one.key: one for one in objects}

    async def difference(self) -> Changes:
        found = await self.driver.observe(self.desired, Scope())
        return Changes(
            put=[one for key, one in self.desired.items() if found.get(key) != one],
            delete=[one for key, one in found.items() if key not in self.desired],
        )

    async def once(self) -> bool:
        """Whether anything had to be done."""
        changes = await self.difference()
        if changes:
            self.failures = list(await self.driver.apply(changes))
        return bool(changes)

    def changed(self, why: str) -> None:
        self.reasons.append(why)
        self.notice.set()

    async def repaired(self, intact: Callable[[], bool]) -> None:
        """Reconcile on notices alone until the host is as it should be."""
        async with asyncio.timeout(20):
            while not intact():
                await self.notice.wait()
                self.notice.clear()
                await self.once()


@asynccontextmanager
async def reconciled(driver: Driver, *, watched: bool = False) -> AsyncIterator[Reconciled]:
    """A driver that is closed at the end, whatever happens."""
    kept = Reconciled(driver)
    try:
        if watched:
            driver.watch(kept.changed)
        yield kept
    finally:
        await driver.close()
