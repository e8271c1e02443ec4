"""Notifications: what damages ours is told, what other programs do elsewhere and our own changes are not."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest

from support.netns import Netns, joined
from wincey.kernel import monitor as monitor_module
from wincey.kernel.diff import diff
from wincey.kernel.monitor import irrelevant
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.model.address import Subnet, parse_address, parse_mac
from wincey.model.state import Changes, FdbEntry, InterfaceAddress, Key, Link, Neighbor, Object, Route, Scope, Vxlan

pytestmark = pytest.mark.root

MAC = parse_mac("0e:00:00:00:00:01")
SCOPE = Scope(("flannel.1", "flannel-v6.1"), (Subnet.parse("10.3.0.0/16"), Subnet.parse("fd03::/48")))
PEER = [
    Neighbor("flannel.1", parse_address("10.3.2.0"), MAC),
    FdbEntry("flannel.1", MAC, parse_address("10.99.0.2")),
    Route(Subnet.parse("10.3.2.0/24"), "flannel.1", parse_address("10.3.2.0"), onlink=True),
    Neighbor("flannel-v6.1", parse_address("fd03:0:0:2::"), MAC),
    FdbEntry("flannel-v6.1", MAC, parse_address("fd99::2")),
    Route(Subnet.parse("fd03:0:0:2::/64"), "flannel-v6.1", parse_address("fd03:0:0:2::"), onlink=True),
]
OBJECTS: list[Object] = [
    Link("flannel.1", "vxlan", 1450, mac=MAC, vxlan=Vxlan(1, 8472, parse_address("10.99.0.1"), "eth0")),
    Link("flannel-v6.1", "vxlan", 1430, mac=MAC, vxlan=Vxlan(1, 8472, parse_address("fd99::1"), "eth0")),
    InterfaceAddress("flannel.1", Subnet.parse("10.3.1.0/32")),
    InterfaceAddress("flannel-v6.1", Subnet.parse("fd03:0:0:1::/128")),
    Route(Subnet.parse("10.3.7.0/24"), "eth0", parse_address("10.99.0.2")),
    *PEER,
]
DESIRED: dict[Key, Object] = {item.key: item for item in OBJECTS}


@pytest.fixture
def host() -> Iterator[Netns]:
    with joined() as (left, _):
        yield left


class Watched:
    """A settled driver and what it has told."""

    def __init__(self, host: Netns, driver: RtnetlinkDriver) -> None:
        self.driver, self.told, self.hosts = driver, list[str](), list[str]()
        self._host = host

    async def settle(self, desired: dict[Key, Object] = DESIRED) -> None:
        assert not await self.driver.apply(diff(desired, await self.driver.observe(desired, SCOPE)))

    async def run(self, *commands: str) -> None:
        """Run commands inside, without blocking the event loop that the monitor reads in."""
        for command in commands:
            await asyncio.to_thread(self._host.run, command)

    async def quiet(self) -> None:
        """Wait until everything that has happened so far must have been read: a marker is noticed."""
        marked = len(self.hosts)
        await self.run("ip address add 192.0.2.99/32 dev lo", "ip address delete 192.0.2.99/32 dev lo")
        async with asyncio.timeout(60):
            while len(self.hosts) < marked + 2:
                await asyncio.sleep(0.005)


def watch(host: Netns, steps: Callable[[Watched], Awaitable[None]]) -> None:
    async def main() -> None:
        driver = RtnetlinkDriver()
        try:
            watched = Watched(host, driver)
            driver.watch(watched.told.append)
            driver.watch_hosts(watched.hosts.append)
            await watched.settle()
            await watched.quiet()
            assert not watched.told, "told of our own making"
            await steps(watched)
        finally:
            await driver.close()

    host.run_async(main)


DAMAGE = {
    "link": "ip link delete flannel.1",
    "down": "ip link set flannel.1 down",
    "renamed": "ip link set flannel.1 down name other",
    "mtu": "ip link set flannel.1 mtu 1000",
    "mac": "ip link set flannel.1 address 0e:00:00:00:00:99",
    "learning": "ip link set flannel.1 type vxlan learning",
    "address": "ip address delete 10.3.1.0/32 dev flannel.1",
    "v6 address": "ip address delete fd03:0:0:1::/128 dev flannel-v6.1",
    "another address": "ip address add 10.3.77.0/32 dev flannel.1",
    "route": "ip route delete 10.3.2.0/24",
    "v6 route": "ip -6 route delete fd03:0:0:2::/64",
    "replaced route": "ip route replace 10.3.2.0/24 via 10.99.0.2 dev eth0",
    "taken over": "ip route replace 10.3.2.0/24 via 10.3.2.0 dev flannel.1 onlink proto boot",
    "replaced v6 route": "ip -6 route replace fd03:0:0:2::/64 via fd99::2 dev eth0",
    "host-gw route": "ip route delete 10.3.7.0/24",
    "stale route": "ip route add 10.3.9.0/24 via 10.3.9.0 dev flannel.1 onlink",
    "neighbor": "ip neighbor delete 10.3.2.0 dev flannel.1",
    "v6 neighbor": "ip neighbor delete fd03:0:0:2:: dev flannel-v6.1",
    "neighbor's mac": "ip neighbor replace 10.3.2.0 lladdr 0e:99:00:00:00:01 dev flannel.1 nud permanent",
    "neighbor no longer permanent": "ip neighbor replace 10.3.2.0 lladdr 0e:00:00:00:00:01 dev flannel.1 nud reachable",
    "stale neighbor": "ip neighbor add 10.3.88.0 lladdr 0e:00:00:00:00:88 dev flannel.1 nud permanent",
    "fdb": "bridge fdb delete 0e:00:00:00:00:01 dev flannel.1",
    "v6 fdb": "bridge fdb delete 0e:00:00:00:00:01 dev flannel-v6.1",
    "fdb remote": "bridge fdb replace 0e:00:00:00:00:01 dev flannel.1 dst 10.99.0.77 self permanent",
    "stale fdb": "bridge fdb add 0e:00:00:00:00:88 dev flannel.1 dst 10.99.0.88 self permanent",
    "underlay down": "ip link set eth0 down",
    "underlay address": "ip address delete 10.99.0.1/24 dev eth0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told(host: Netns, damage: str) -> None:
    async def steps(watched: Watched) -> None:
        await watched.run(damage)
        await watched.quiet()
        assert watched.told

    watch(host, steps)


FOREIGN = {
    "route elsewhere": ("ip route add 192.0.2.0/24 via 10.99.0.2", "ip route delete 192.0.2.0/24"),
    "route inside": ("ip route add 10.3.100.0/24 via 10.99.0.2", "ip route delete 10.3.100.0/24"),
    "route of another metric": (
        "ip route add 10.3.2.0/24 via 10.99.0.2 metric 9",
        "ip route delete 10.3.2.0/24 metric 9",
    ),
    "route in another table": ("ip route add 10.3.2.0/24 via 10.99.0.2 table 100", "ip route flush table 100"),
    "default route": ("ip route add default via 10.99.0.2", "ip route delete default"),
    "v6 route": ("ip -6 route add fd03:0:0:100::/64 via fd99::2", "ip -6 route delete fd03:0:0:100::/64"),
    "neighbor": (
        "ip neighbor add 10.99.0.9 lladdr 0e:00:00:00:00:09 dev eth0 nud permanent",
        "ip neighbor delete 10.99.0.9 dev eth0",
    ),
    "neighbor of ours, not permanent": (
        "ip neighbor add 10.3.44.0 lladdr 0e:00:00:00:00:09 dev flannel.1 nud reachable",
        "ip neighbor delete 10.3.44.0 dev flannel.1",
    ),
    "device": ("ip link add br0 type bridge", "ip link set br0 up", "ip link delete br0"),
    "address outside": ("ip address add 192.0.2.7/32 dev flannel.1", "ip address delete 192.0.2.7/32 dev flannel.1"),
    "address elsewhere": ("ip address add 10.3.200.1/32 dev lo", "ip address delete 10.3.200.1/32 dev lo"),
}


@pytest.mark.parametrize("commands", FOREIGN.values(), ids=FOREIGN)
def test_what_is_foreign_is_not_told(host: Netns, commands: tuple[str, ...]) -> None:
    async def steps(watched: Watched) -> None:
        await watched.run(*commands)
        await watched.quiet()
        assert not watched.told

    watch(host, steps)


def test_our_own_changes_are_not_told(host: Netns) -> None:
    """Increments without an observation between, replacements and deletions."""
    mac = parse_mac("0e:00:00:00:00:05")
    more: list[Object] = [
        Neighbor("flannel.1", parse_address("10.3.5.0"), mac),
        FdbEntry("flannel.1", mac, parse_address("10.99.0.5")),
        Route(Subnet.parse("10.3.5.0/24"), "flannel.1", parse_address("10.3.5.0"), onlink=True),
        InterfaceAddress("flannel-v6.1", Subnet.parse("fd03:0:0:1::5/128")),
    ]
    moved = [FdbEntry("flannel.1", mac, parse_address("10.99.0.55")), msgspec.structs.replace(OBJECTS[0], mtu=1400)]

    async def steps(watched: Watched) -> None:
        for changes in (Changes(put=more), Changes(put=moved), Changes(delete=[*more[:1], moved[0], *more[2:]])):
            assert not await watched.driver.apply(changes)
            await watched.quiet()
        assert not watched.told
        await watched.settle({})
        await watched.quiet()
        assert not watched.told

    watch(host, steps)


def test_ten_thousand_changes_of_our_own_are_not_told(host: Netns) -> None:
    """Of those that the kernel does not mark as ours, all must find room until the event loop turns again."""
    desired = dict(DESIRED)
    for number in range(10_000):
        mac = b"\x0e\x07" + number.to_bytes(4, "big")
        remote = (0x0A630000 + number).to_bytes(4, "big")
        for item in (
            Neighbor("flannel.1", (0x0A030000 + number).to_bytes(4, "big"), mac),
            FdbEntry("flannel.1", mac, remote),
        ):
            desired[item.key] = item

    async def steps(watched: Watched) -> None:
        await watched.settle(desired)
        await watched.quiet()
        assert not watched.told

    watch(host, steps)


def test_what_was_applied_since_the_observation_is_watched_too(host: Netns) -> None:
    route = Route(Subnet.parse("10.3.5.0/24"), "flannel.1", parse_address("10.3.5.0"), onlink=True)

    async def steps(watched: Watched) -> None:
        await watched.driver.apply(Changes(put=[route]))
        await watched.run("ip route delete 10.3.5.0/24")
        await watched.quiet()
        assert watched.told == ["route 10.3.5.0/24 via 10.3.5.0 dev flannel.1 was deleted"]

    watch(host, steps)


def test_host_changes_are_told_apart_from_ours(host: Netns) -> None:
    async def steps(watched: Watched) -> None:
        watched.hosts.clear()
        await watched.run("ip link set flannel.1 mtu 1000", "ip address add 10.3.55.0/32 dev flannel.1")
        await watched.quiet()
        assert all("flannel" not in why for why in watched.hosts)
        watched.hosts.clear()
        await watched.run("ip address add 10.99.0.44/24 dev eth0")
        await watched.quiet()
        assert "addresses of eth0 changed" in watched.hosts
        await watched.run("ip link set eth0 mtu 1300")
        await watched.quiet()
        assert "device eth0 changed" in watched.hosts

    watch(host, steps)


def test_lost_notifications_are_told(host: Netns) -> None:
    async def flood(watched: Watched) -> None:
        monitor = watched.driver._monitor
        assert monitor
        monitor._netlink._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # This blocks the event loop, so that nobody reads meanwhile.
        lines = "".join(f"address add 192.0.2.{number}/32 dev lo\n" for number in range(1, 99))
        argv = ["ip", "-netns", host.name, "-batch", "-"]
        subprocess.run(argv, input=lines, text=True, check=True, timeout=30)
        async with asyncio.timeout(10):
            while "notifications were lost" not in watched.told:
                await asyncio.sleep(0.005)
        assert "notifications were lost" in watched.hosts

    watch(host, flood)


def test_churn_elsewhere_is_not_even_copied_to_us(host: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    received = 0
    plain = monitor_module.Netlink.receive

    def counted(netlink: monitor_module.Netlink) -> bytes | None:
        nonlocal received
        data = plain(netlink)
        received += data is not None
        return data

    monkeypatch.setattr(monitor_module.Netlink, "receive", counted)

    async def steps(watched: Watched) -> None:
        nonlocal received
        lines = [f"route add 198.18.{n}.0/24 via 10.99.0.2" for n in range(200)]
        lines += [f"route add 2001:db8:{n:x}::/48 via fd99::2" for n in range(200)]
        lines += [f"neighbor add 10.99.0.{n} lladdr 0e:00:00:00:00:09 dev eth0 nud permanent" for n in range(3, 200)]
        received = 0
        argv = ["ip", "-netns", host.name, "-batch", "-"]
        await asyncio.to_thread(subprocess.run, argv, input="\n".join(lines), text=True, check=True, timeout=30)
        await watched.quiet()
        # The marker, and now and then a notification of the kernel's own about a device.
        assert received < 20
        assert not watched.told

    watch(host, steps)


def test_the_kernel_takes_the_filter_of_many_networks() -> None:
    """Jumps of classic BPF reach 255 instructions; what skips a whole part must not need more."""
    networks = tuple(Subnet((10 << 24 | n << 16).to_bytes(4, "big"), 16) for n in range(100))
    program = irrelevant(7, {n: f"flannel.{n}" for n in range(1, 200)}, networks)
    assert len(program) < 4096
    netlink = monitor_module.Netlink()
    try:
        netlink.attach_filter(program)
    finally:
        netlink.close()


def test_closing_stops_watching(host: Netns) -> None:
    async def main() -> None:
        told: list[str] = []
        driver = RtnetlinkDriver()
        driver.watch(told.append)
        before = len(os.listdir("/proc/self/fd"))
        await driver.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2
        await asyncio.to_thread(host.run, "ip link set lo down")
        assert not told

    host.run_async(main)
