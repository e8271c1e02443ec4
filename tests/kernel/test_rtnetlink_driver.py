"""The rtnetlink driver against the real kernel: what `ip -j` and `bridge -j` show is the judge."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
import pytest

from support.netns import Netns, joined
from wincey.kernel import rtnl
from wincey.kernel.diff import diff
from wincey.kernel.netlink import Netlink
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.model.address import Subnet, parse_address, parse_mac, single
from wincey.model.state import (
    Changes,
    Failure,
    FdbEntry,
    InterfaceAddress,
    Key,
    Link,
    Neighbor,
    Object,
    Route,
    Scope,
    Vxlan,
)

pytestmark = pytest.mark.root

V4, V6 = "flannel.1", "flannel-v6.1"
MAC = parse_mac("0e:00:00:00:00:01")
SCOPE = Scope((V4, V6), (Subnet.parse("10.3.0.0/16"), Subnet.parse("fd03::/48")))
LINK = Link(V4, "vxlan", 1450, mac=MAC, vxlan=Vxlan(1, 8472, parse_address("10.99.0.1"), "eth0"))
LINK_V6 = Link(V6, "vxlan", 1430, mac=MAC, vxlan=Vxlan(1, 8472, parse_address("fd99::1"), "eth0"))
State = dict[Key, Object]


@pytest.fixture
def host() -> Iterator[Netns]:
    with joined() as (left, _):
        yield left


def state(*objects: Object) -> State:
    return {item.key: item for item in objects}


def peer(number: int, device: str = V4) -> list[Object]:
    mac = b"\x0e\x01" + number.to_bytes(4, "big")
    if device == V4:
        subnet, remote = Subnet.parse(f"10.3.{number}.0/24"), parse_address(f"10.99.0.{number}")
    else:
        subnet, remote = Subnet.parse(f"fd03:0:0:{number:x}::/64"), parse_address(f"fd99::{number:x}")
    return [
        Neighbor(device, subnet.address, mac),
        FdbEntry(device, mac, remote),
        Route(subnet, device, subnet.address, onlink=True),
    ]


def own(device: str = V4) -> list[Object]:
    if device == V4:
        return [LINK, InterfaceAddress(V4, Subnet.parse("10.3.1.0/32"))]
    return [LINK_V6, InterfaceAddress(V6, Subnet.parse("fd03:0:0:1::/128"))]


def whole() -> State:
    return state(*own(), *own(V6), *peer(2), *peer(3), *peer(2, V6), *peer(3, V6))


class Settled:
    """What one observe, diff, apply did."""

    def __init__(self, changes: Changes, failures: Sequence[Failure]) -> None:
        self.changes = changes
        self.failures = failures


async def settle(driver: RtnetlinkDriver, desired: State, scope: Scope = SCOPE) -> Settled:
    changes = diff(desired, await driver.observe(desired, scope))
    return Settled(changes, await driver.apply(changes))


def drive(host: Netns, steps: Callable[[RtnetlinkDriver], Awaitable[None]]) -> None:
    """Run steps with a driver inside the namespace."""

    async def main() -> None:
        driver = RtnetlinkDriver()
        try:
            await steps(driver)
        finally:
            await driver.close()

    host.run_async(main)


def make(host: Netns, desired: State, scope: Scope = SCOPE) -> Settled:
    """One settle with a driver of its own, and none of its objects may fail."""
    done: list[Settled] = []

    async def steps(driver: RtnetlinkDriver) -> None:
        done.append(await settle(driver, desired, scope))
        assert not done[0].failures
        assert not diff(desired, await driver.observe(desired, scope)), "not stable"

    drive(host, steps)
    return done[0]


def observed(host: Netns, desired: State, scope: Scope = SCOPE) -> State:
    found: State = {}

    async def steps(driver: RtnetlinkDriver) -> None:
        found.update(await driver.observe(desired, scope))

    drive(host, steps)
    return found


def refused(host: Netns, desired: State, scope: Scope = SCOPE) -> dict[Key, str]:
    reasons: dict[Key, str] = {}

    async def steps(driver: RtnetlinkDriver) -> None:
        done = await settle(driver, desired, scope)
        reasons.update({failure.object.key: failure.reason for failure in done.failures})

    drive(host, steps)
    return reasons


def index_of(host: Netns, device: str) -> int:
    return int(host.json(f"ip -j link show {device}")[0]["ifindex"])


def test_everything_appears_as_iproute2_sees_it(host: Netns) -> None:
    make(host, whole())
    link = host.json(f"ip -j -d link show {V4}")[0]
    data = link["linkinfo"]["info_data"]
    assert (link["mtu"], link["address"], "UP" in link["flags"]) == (1450, "0e:00:00:00:00:01", True)
    assert link["inet6_addr_gen_mode"] == "eui64"
    expected = {"id": 1, "link": "eth0", "local": "10.99.0.1", "port": 8472, "learning": False, "udp_csum": True}
    assert data | expected == data
    assert data["ageing"] == 300
    assert host.json(f"ip -j -d link show {V6}")[0]["linkinfo"]["info_data"]["local6"] == "fd99::1"
    addresses = host.json(f"ip -j -4 address show {V4}")[0]["addr_info"]
    assert [(entry["local"], entry["prefixlen"], entry["scope"]) for entry in addresses] == [("10.3.1.0", 32, "global")]
    v6 = [entry for entry in host.json(f"ip -j -6 address show {V6}")[0]["addr_info"] if entry["scope"] == "global"]
    assert [(entry["local"], entry["prefixlen"], entry.get("tentative")) for entry in v6] == [
        ("fd03:0:0:1::", 128, None)
    ]
    route = next(r for r in host.json(f"ip -j -d route show dev {V4}") if r["dst"] == "10.3.2.0/24")
    assert (route["gateway"], route["protocol"], route["scope"], route["flags"]) == (
        "10.3.2.0",
        "87",
        "global",
        ["onlink"],
    )
    neighbors = host.json(f"ip -j neighbor show dev {V4} nud permanent")
    assert {(n["dst"], n["lladdr"]) for n in neighbors} == {
        ("10.3.2.0", "0e:01:00:00:00:02"),
        ("10.3.3.0", "0e:01:00:00:00:03"),
    }
    fdb = [e for e in host.json(f"bridge -j fdb show dev {V6}") if "dst" in e]
    assert {(e["mac"], e["dst"], e["state"]) for e in fdb} == {
        ("0e:01:00:00:00:02", "fd99::2", "permanent"),
        ("0e:01:00:00:00:03", "fd99::3", "permanent"),
    }


def test_observation_returns_exactly_the_desired(host: Netns) -> None:
    make(host, whole())
    assert observed(host, whole()) == whole()


def test_all_goes_when_nothing_is_desired(host: Netns) -> None:
    make(host, whole())
    before = host.json("ip -j route")
    make(host, {})
    assert V4 not in host.run("ip link")
    assert [r for r in before if r.get("dev") == "eth0"] == host.json("ip -j route")


REPAIRS = {
    "link": f"ip link delete {V4}",
    "link down": f"ip link set {V4} down",
    "mtu": f"ip link set {V4} mtu 1000",
    "mac": f"ip link set {V4} address 0e:00:00:00:00:99",
    "address": f"ip address delete 10.3.1.0/32 dev {V4}",
    "another address": f"ip address add 10.3.77.0/32 dev {V4}",
    "another v6 address": f"ip address add fd03:0:0:77::/128 dev {V6} nodad",
    "v6 address of another length": f"ip address add fd03:0:0:78::1/64 dev {V6} nodad",
    "route": "ip route delete 10.3.2.0/24",
    "v6 route": "ip -6 route delete fd03:0:0:2::/64",
    "neighbor": f"ip neighbor delete 10.3.2.0 dev {V4}",
    "neighbor's mac": f"ip neighbor replace 10.3.2.0 lladdr 0e:99:00:00:00:01 dev {V4} nud permanent",
    "neighbor not permanent": f"ip neighbor replace 10.3.2.0 lladdr 0e:01:00:00:00:02 dev {V4} nud reachable",
    "v6 neighbor": f"ip neighbor delete fd03:0:0:2:: dev {V6}",
    "stale neighbor": f"ip neighbor add 10.3.88.0 lladdr 0e:01:00:00:00:88 dev {V4} nud permanent",
    "fdb entry": f"bridge fdb delete 0e:01:00:00:00:02 dev {V4}",
    "fdb remote": f"bridge fdb replace 0e:01:00:00:00:02 dev {V4} dst 10.99.0.77 self permanent",
    "default fdb remote": f"bridge fdb append 00:00:00:00:00:00 dev {V4} dst 10.99.0.77 self permanent",
    "fdb port": f"bridge fdb replace 0e:01:00:00:00:02 dev {V4} dst 10.99.0.2 port 9999 self permanent",
    "stale fdb entry": f"bridge fdb add 0e:01:00:00:00:88 dev {V4} dst 10.99.0.88 self permanent",
    "v6 fdb entry": f"bridge fdb delete 0e:01:00:00:00:02 dev {V6}",
    "stale route of flannel": f"ip route add 10.3.9.0/24 via 10.3.9.0 dev {V4} onlink proto boot",
    "stale v6 route of flannel": f"ip -6 route add fd03:0:0:9::/64 via fd03:0:0:9:: dev {V6} onlink proto boot",
    "route with our number elsewhere": "ip route add 10.3.9.0/24 via 10.99.0.2 dev eth0 proto 87",
    "gateway": f"ip route replace 10.3.2.0/24 via 10.3.3.0 dev {V4} onlink proto 87",
    "v6 gateway": f"ip -6 route replace fd03:0:0:2::/64 via fd03:0:0:3:: dev {V6} onlink proto 87",
    "route's device": "ip route replace 10.3.2.0/24 via 10.99.0.2 dev eth0 proto boot",
    "v6 route's device": "ip -6 route replace fd03:0:0:2::/64 via fd99::2 dev eth0 proto boot",
    "route taken over": f"ip route replace 10.3.2.0/24 via 10.3.2.0 dev {V4} onlink proto boot",
    "v6 route taken over": f"ip -6 route replace fd03:0:0:2::/64 via fd03:0:0:2:: dev {V6} onlink proto boot",
    "not onlink": "ip route replace 10.3.2.0/24 dev eth0 proto 87",
    "second v6 next hop": f"ip -6 route append fd03:0:0:2::/64 via fd03:0:0:3:: dev {V6} onlink proto 87",
    "multipath": f"ip route replace 10.3.2.0/24 proto 87 nexthop via 10.3.2.0 dev {V4} onlink "
    f"nexthop via 10.3.3.0 dev {V4} onlink",
    "learning": f"ip link set {V4} type vxlan learning",
    "local address": f"ip link set {V4} type vxlan local 10.99.0.77",
}


# With its device, its last IPv4 address or its MAC address the kernel takes more away.
COSTLY = {REPAIRS[what] for what in ("link", "link down", "mac", "address")}


@pytest.mark.parametrize("damage", REPAIRS.values(), ids=REPAIRS)
def test_damage_is_repaired_and_costs_only_its_object(host: Netns, damage: str) -> None:
    make(host, whole())
    before = _shown(host)
    host.run(damage)
    assert _shown(host) != before
    done = make(host, whole())
    assert _shown(host) == before
    if damage not in COSTLY:
        assert len(done.changes.put) + len(done.changes.delete) == 1


def _shown(host: Netns) -> list[str]:
    """All that is ours as iproute2 shows it, without the devices' numbers and what goes on by itself."""
    commands = (
        "ip -d link",
        "ip address",
        "ip -d route",
        "ip -6 -d route",
        "ip neighbor show nud permanent",
        "bridge fdb",
    )
    marks = ("flannel", "link/ether", "inet", "10.3.", "fd03:", "0e:01:", "vxlan")
    lines = [line for command in commands for line in host.run(command).splitlines() if any(m in line for m in marks)]
    return sorted(
        re.sub(r"^\d+: ", "", line.strip()) for line in lines if "fe80" not in line and "multicast" not in line
    )


def test_of_several_remotes_and_next_hops_only_the_surplus_goes(host: Netns) -> None:
    make(host, whole())
    before = _shown(host)
    for number in (66, 67):
        host.run(f"bridge fdb append 00:00:00:00:00:00 dev {V4} dst 10.99.0.{number} self permanent")
    host.run(f"ip -6 route append fd03:0:0:2::/64 via fd03:0:0:3:: dev {V6} onlink proto 87")
    done = make(host, whole())
    assert not done.changes.put
    assert len(done.changes.delete) == 3
    assert _shown(host) == before


def test_ipv6_host_gw_and_vxlan_change_into_each_other(host: Netns) -> None:
    """The kernel wants no onlink gateway that another device's route covers: even that of the route to be replaced."""
    direct = Route(Subnet.parse("fd03:0:0:2::/64"), "eth0", parse_address("fd99::2"))
    vxlan = state(*own(V6), *peer(2, V6))
    make(host, state(direct))
    for desired in (vxlan, state(direct), vxlan):
        make(host, desired)
        assert len(host.json("ip -j -6 route show fd03:0:0:2::/64")) == 1


def test_mtu_mac_and_state_change_in_place(host: Netns) -> None:
    make(host, whole())
    index = index_of(host, V4)
    told: list[str] = []
    other = state(
        *whole().values(),
        msgspec.structs.replace(LINK, mtu=1400, mac=parse_mac("0e:00:00:00:00:55")),
    )

    async def steps(driver: RtnetlinkDriver) -> None:
        driver.watch(told.append)
        done = await settle(driver, other)
        assert (len(done.changes.put), done.failures) == (1, [])
        assert told == [f"device {V4} was given the MAC address 0e:00:00:00:00:55"]
        again = await settle(driver, other)
        assert {type(item) for item in again.changes.put} == {Neighbor}
        assert not diff(other, await driver.observe(other, SCOPE))

    drive(host, steps)
    assert index_of(host, V4) == index
    link = host.json(f"ip -j link show {V4}")[0]
    assert (link["mtu"], link["address"]) == (1400, "0e:00:00:00:00:55")
    assert len(host.json(f"ip -j route show dev {V4}")) == 2


@pytest.mark.parametrize(
    "change",
    [{"learning": True}, {"local": parse_address("10.99.0.9")}, {"underlay": "lo"}],
    ids=["learning", "local", "underlay"],
)
def test_changeable_vxlan_attributes_change_in_place(host: Netns, change: dict[str, object]) -> None:
    make(host, whole())
    index = index_of(host, V4)
    assert LINK.vxlan
    make(
        host,
        state(*whole().values(), msgspec.structs.replace(LINK, vxlan=msgspec.structs.replace(LINK.vxlan, **change))),
    )
    assert index_of(host, V4) == index


@pytest.mark.parametrize("change", [{"vni": 7}, {"port": 4789}, {"gbp": True}], ids=["vni", "port", "gbp"])
def test_other_attributes_need_a_new_device_and_the_watcher_is_told(host: Netns, change: dict[str, object]) -> None:
    make(host, whole())
    assert LINK.vxlan
    link = msgspec.structs.replace(LINK, mac=None, vxlan=msgspec.structs.replace(LINK.vxlan, **change))
    desired = state(*whole().values(), link)
    told: list[str] = []

    async def steps(driver: RtnetlinkDriver) -> None:
        driver.watch(told.append)
        assert not (await settle(driver, desired)).failures
        assert told == [f"device {V4} had to be made anew"]
        assert not (await settle(driver, desired)).failures
        assert not diff(desired, await driver.observe(desired, SCOPE))

    drive(host, steps)
    assert host.json(f"ip -j link show {V4}")[0]["address"] == "0e:00:00:00:00:01", "peers know the old MAC"


def test_a_device_of_another_kind_is_left_alone(host: Netns) -> None:
    host.ip(f"link add {V4} type bridge")
    host.ip(f"link set {V4} up")
    host.ip(f"address add 10.3.5.1/24 dev {V4}")
    host.ip(f"route add 10.3.6.0/24 via 10.3.5.9 dev {V4}")
    before = host.json(f"ip -j route show dev {V4}")
    reasons = refused(host, state(LINK))
    assert "of kind bridge, not vxlan" in reasons[LINK.key]
    assert host.json(f"ip -j route show dev {V4}") == before
    assert not observed(host, {})


def test_an_occupied_vni_names_the_occupant(host: Netns) -> None:
    host.ip("link add other type vxlan id 1 dstport 8472 local 10.99.0.1 dev eth0")
    assert "taken by device other" in refused(host, state(LINK))[LINK.key]
    assert host.json("ip -j link show other")


def test_failures_say_why_and_keep_nothing_else_back(host: Netns) -> None:
    far = Route(Subnet.parse("10.3.4.0/24"), "eth0", parse_address("192.0.2.1"))
    far_v6 = Route(Subnet.parse("fd03:0:0:4::/64"), "eth0", parse_address("2001:db8::1"))
    lost = Neighbor("flannel.9", parse_address("10.3.4.0"), MAC)
    tun = Link("flannel0", "tun", 1472)
    rootless = Link("flannel.5", "vxlan", 1450, vxlan=Vxlan(5, 8472, parse_address("10.99.0.1"), "eth7"))
    long = Link("flannel.16777215", "vxlan", 1450, vxlan=Vxlan(16777215, 8472, parse_address("10.99.0.1"), "eth0"))
    scope = Scope((*SCOPE.devices, "flannel0", "flannel.5", long.name), SCOPE.networks)
    reasons = refused(host, state(*own(), far, far_v6, lost, tun, rootless, long, *peer(2)), scope)
    assert set(reasons) == {far.key, far_v6.key, lost.key, tun.key, rootless.key, long.key}
    assert "at most 15 characters" in reasons[long.key]
    for route, gateway in ((far, "192.0.2.1"), (far_v6, "2001:db8::1")):
        assert f"gateway {gateway} is not on a network that is directly connected on eth0" in reasons[route.key]
        assert "\n" not in reasons[route.key]
    assert reasons[lost.key] == "device flannel.9 is not there"
    assert reasons[tun.key] == "device flannel0 is not there (yet)"
    assert "underlay eth7" in reasons[rootless.key]
    assert len(host.json(f"ip -j route show dev {V4}")) == 1


def test_deleting_what_is_gone_is_no_failure(host: Netns) -> None:
    async def steps(driver: RtnetlinkDriver) -> None:
        await driver.observe(whole(), SCOPE)
        gone = [Route(Subnet.parse("10.3.9.0/24"), "eth0", parse_address("10.99.0.2")), *whole().values()]
        assert not await driver.apply(Changes(delete=gone))
        await settle(driver, whole())
        extra = [*peer(9), *peer(9, V6), InterfaceAddress(V4, Subnet.parse("10.3.9.0/32"))]
        assert not await driver.apply(Changes(delete=[*extra, InterfaceAddress(V6, Subnet.parse("fd03::9/128"))]))

    drive(host, steps)


FOREIGN = (
    "ip route add 10.3.100.0/24 via 10.99.0.2 dev eth0",  # inside our networks, but neither ours nor on our device
    "ip route add 10.3.2.0/24 via 10.99.0.2 dev eth0 metric 50",  # another metric than ours
    "ip route add 192.0.2.0/24 via 10.99.0.2 dev eth0 proto 87",  # our number, outside our networks
    "ip route add 10.3.101.0/24 via 10.99.0.2 dev eth0 proto 87 table 100",  # another table
    "ip route add blackhole 10.3.102.0/24",
    "ip -6 route add fd03:0:0:100::/64 via fd99::2 dev eth0",
    "ip -6 route add fd03:0:0:2::/64 via fd99::2 dev eth0 metric 50",
    "ip neighbor add 10.99.0.7 lladdr 0e:01:00:00:00:88 dev eth0 nud permanent",
    "ip address add 10.3.200.1/32 dev eth0",
    f"ip address add 192.0.2.7/32 dev {V4}",
    f"ip address add fe80::77/64 dev {V4} nodad",
    f"ip route add 192.0.2.128/25 via 10.3.2.0 dev {V4} onlink",  # outside our networks
)


def test_what_is_foreign_stays(host: Netns) -> None:
    make(host, whole())
    for command in FOREIGN:
        host.run(command)
    before = [
        host.run(show)
        for show in ("ip route show table all", "ip -6 route show table all", "ip address", "ip neighbor")
    ]
    assert not make(host, whole()).changes
    after = [
        host.run(show)
        for show in ("ip route show table all", "ip -6 route show table all", "ip address", "ip neighbor")
    ]
    assert before == after


def test_host_gw_takes_over_what_flannel_left_and_leaves_what_is_not_ours(host: Netns) -> None:
    host.ip("route add 10.3.2.0/24 via 10.99.0.7 dev eth0 proto boot")
    host.ip("route add 10.3.3.0/24 via 10.99.0.2 dev eth0 proto boot")
    host.ip("-6 route add fd03:0:0:2::/64 via fd99::7 dev eth0 proto boot")
    host.ip("route add 10.3.9.0/24 via 10.99.0.2 dev eth0 proto boot")
    scope = Scope((), SCOPE.networks)
    desired = state(
        Route(Subnet.parse("10.3.2.0/24"), "eth0", parse_address("10.99.0.2")),
        Route(Subnet.parse("10.3.3.0/24"), "eth0", parse_address("10.99.0.2")),
        Route(Subnet.parse("fd03:0:0:2::/64"), "eth0", parse_address("fd99::2")),
    )
    make(host, desired, scope)
    shown = {(r["dst"], r["gateway"], r["protocol"]) for r in host.json("ip -j -d route show root 10.3.0.0/16")}
    assert shown == {
        ("10.3.2.0/24", "10.99.0.2", "87"),
        ("10.3.3.0/24", "10.99.0.2", "87"),
        ("10.3.9.0/24", "10.99.0.2", "boot"),
    }
    v6 = [(r["gateway"], r["protocol"]) for r in host.json("ip -j -d -6 route show fd03:0:0:2::/64")]
    assert v6 == [("fd99::2", "87")]
    make(host, {}, scope)
    assert [r["dst"] for r in host.json("ip -j route show root 10.3.0.0/16")] == ["10.3.9.0/24"]


def test_a_route_of_another_program_is_not_deleted_in_our_stead(host: Netns) -> None:
    """Between observation and deletion another program may have taken the destination."""
    host.ip("route add 10.3.2.0/24 via 10.99.0.2 dev eth0 proto boot")
    ours = Route(Subnet.parse("10.3.2.0/24"), "eth0", parse_address("10.99.0.2"))

    async def steps(driver: RtnetlinkDriver) -> None:
        await driver.observe(state(ours), Scope((), SCOPE.networks))
        assert not await driver.apply(Changes(delete=[ours]))

    drive(host, steps)
    assert host.json("ip -j route show 10.3.2.0/24")


def test_a_blackhole_is_a_last_resort(host: Netns) -> None:
    host.ip("link add cni0 type bridge")
    host.ip("link set cni0 up")
    host.ip("address add 10.3.1.1/24 dev cni0")
    blackholes = [Route(Subnet.parse(text), "", kind="blackhole") for text in ("10.3.1.0/24", "fd03:0:0:1::/64")]
    make(host, state(*own(), *blackholes))
    shown = host.json("ip -j -d route show 10.3.1.0/24")
    assert [(r["type"], r.get("dev"), r["protocol"]) for r in shown] == [
        ("unicast", "cni0", "kernel"),
        ("blackhole", None, "87"),
    ]
    host.ip("link delete cni0")
    assert host.json("ip -j -d route show 10.3.1.0/24")[0]["type"] == "blackhole"
    make(host, state(*own()))
    assert not host.json("ip -j route show type blackhole")
    assert not host.json("ip -j -6 route show type blackhole")


def test_a_changed_subnet_keeps_the_routes(host: Netns) -> None:
    """A device that loses its last IPv4 address loses its IPv4 routes too: the new one has to be there first."""
    make(host, whole())
    old = InterfaceAddress(V4, Subnet.parse("10.3.1.0/32"))
    old_v6 = InterfaceAddress(V6, Subnet.parse("fd03:0:0:1::/128"))
    new = InterfaceAddress(V4, single(parse_address("10.3.50.0")))
    new_v6 = InterfaceAddress(V6, Subnet.parse("fd03:0:0:1::/64"))  # only its length differs
    desired = {key: item for key, item in whole().items() if item not in (old, old_v6)} | state(new, new_v6)
    done = make(host, desired)
    assert sorted(map(str, done.changes.put)) == sorted(map(str, (new, new_v6)))
    assert len(host.json(f"ip -j route show dev {V4}")) == 2


def test_tx_checksum_offload(host: Netns) -> None:
    def offload() -> bool:
        return "tx-checksumming: on" in host.run(f"ethtool -k {V4}")

    make(host, state(LINK))
    assert offload()
    make(host, state(msgspec.structs.replace(LINK, tx_checksum=False)))
    assert not offload()
    assert not make(host, state(LINK)).changes, "not asked for: left as it is"
    assert not offload()
    make(host, state(msgspec.structs.replace(LINK, tx_checksum=True)))
    assert offload()


def test_a_tunnel_device_is_kept_up_and_sized_but_never_removed(host: Netns) -> None:
    host.ip("tuntap add flannel0 mode tun")
    scope = Scope(("flannel0",), SCOPE.networks)
    desired = state(
        Link("flannel0", "tun", 1472),
        InterfaceAddress("flannel0", Subnet.parse("10.3.1.0/32")),
        Route(Subnet.parse("10.3.0.0/16"), "flannel0"),
    )
    make(host, desired, scope)
    assert observed(host, desired, scope) == desired
    assert host.json("ip -j link show flannel0")[0]["mtu"] == 1472
    make(host, {}, scope)
    assert host.json("ip -j link show flannel0")
    assert not host.json("ip -j route show dev flannel0")


def many(number: int) -> State:
    objects: list[Object] = own()
    for index in range(2, number + 2):
        subnet = Subnet((0x0A040000 + (index << 8)).to_bytes(4, "big"), 24)
        mac = b"\x0e\x02" + index.to_bytes(4, "big")
        objects += [
            Neighbor(V4, subnet.address, mac),
            FdbEntry(V4, mac, (0x0A640000 + index).to_bytes(4, "big")),
            Route(subnet, V4, subnet.address, onlink=True),
        ]
    return state(*objects)


def test_five_thousand_leases_in_a_handful_of_sends(host: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    sends: list[int] = []
    plain = Netlink._send

    def counted(netlink: Netlink, requests: Sequence[bytes]) -> int:
        sends.append(len(requests))
        return plain(netlink, requests)

    monkeypatch.setattr(Netlink, "_send", counted)
    desired = many(5000)
    scope = Scope((V4,), (Subnet.parse("10.0.0.0/8"),))
    bad = Route(Subnet.parse("10.255.0.0/24"), "eth0", parse_address("192.0.2.1"))

    async def steps(driver: RtnetlinkDriver) -> None:
        changes = diff(desired | {bad.key: bad}, await driver.observe(desired, scope))
        sends.clear()
        failures = await driver.apply(changes)
        assert [failure.object for failure in failures] == [bad], "found among 15,000 by its sequence number"
        assert len(sends) <= 8
        assert sum(sends) >= 15_000
        sends.clear()
        assert await driver.observe(desired, scope) == desired
        assert len(sends) <= 16
        sends.clear()
        assert not (await settle(driver, {}, scope)).failures

    drive(host, steps)
    assert "10.4." not in host.run("ip route")


def test_lost_replies_only_cost_another_send(host: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    """More errors than the receive buffer holds: each is still told to its object."""
    monkeypatch.setattr("wincey.kernel.netlink._BUFFER", 1 << 16)
    bad = [Route(Subnet.parse(f"10.3.{n}.0/24"), "eth0", parse_address("192.0.2.1")) for n in range(256)]
    good = peer(2)[:2]
    reasons = refused(host, state(*own(), *bad, *good))
    assert set(reasons) == {route.key for route in bad}


def test_a_kernel_without_strict_checking_gives_the_same(host: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    make(host, whole())
    strict = observed(host, whole())
    plain = Netlink.__init__
    monkeypatch.setattr(Netlink, "__init__", lambda self, groups=(): plain(self, groups, strict=False))
    assert observed(host, whole()) == strict == whole()


def test_the_event_loop_turns_while_much_is_applied(host: Netns) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def steps(driver: RtnetlinkDriver) -> None:
        desired = many(2000)
        changes = diff(desired, await driver.observe(desired, SCOPE))
        counting = asyncio.create_task(count())
        await driver.apply(changes)
        assert turns >= 2
        counting.cancel()

    drive(host, steps)


DUMPS = [rtnl.RTM_GETADDR, rtnl.RTM_GETNEIGH, rtnl.RTM_GETROUTE]


@pytest.mark.parametrize("asked", DUMPS, ids=["addresses", "neighbors", "routes"])
def test_a_device_that_goes_while_it_is_looked_at_is_no_failure(
    host: Netns, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """The kernel answers ENODEV to questions about it."""
    make(host, whole())
    dump = Netlink.dump
    went: list[int] = []

    def dump_late(netlink: Netlink, kind: int, body: bytes) -> list[bytes]:
        if kind == asked and not went:
            went.append(kind)
            host.ip(f"link delete {V4}")
        return dump(netlink, kind, body)

    monkeypatch.setattr(Netlink, "dump", dump_late)
    found = observed(host, whole())
    assert went
    assert {item.key for item in own(V6)} <= found.keys()
    monkeypatch.undo()
    make(host, whole())
