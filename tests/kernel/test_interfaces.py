"""The host's interfaces and routes, read from the real kernel."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from support.netns import Netns, joined
from wincey.kernel.interfaces import (
    Interface,
    RouteLookup,
    connected_subnets,
    default_route_interface,
    read_interfaces,
    route_to,
)
from wincey.model.address import Subnet, parse_address, parse_mac

pytestmark = pytest.mark.root


@pytest.fixture
def host() -> Iterator[Netns]:
    with joined() as (left, _):
        yield left


def by_name(host: Netns) -> dict[str, Interface]:
    return {interface.name: interface for interface in host.call(read_interfaces)}


def test_interfaces_are_as_iproute2_shows_them(host: Netns) -> None:
    host.ip("link set eth0 address 0e:00:00:00:00:77 mtu 1400")
    host.ip("address add 10.99.0.5/24 dev eth0")
    host.ip("address add 172.16.0.1/32 dev eth0 scope link")
    host.ip("address add fd99::7/64 dev eth0 nodad valid_lft 1000 preferred_lft 500")
    host.ip("address add fd99::8/64 dev eth0 nodad valid_lft 1000 preferred_lft 0")
    host.ip("link add br0 type bridge")
    found = by_name(host)
    shown = {entry["ifname"]: entry for entry in host.json("ip -j address")}
    assert set(found) == set(shown) == {"lo", "eth0", "br0"}
    eth0 = found["eth0"]
    assert (eth0.index, eth0.mtu, eth0.up, eth0.kind) == (shown["eth0"]["ifindex"], 1400, True, "veth")
    assert eth0.mac == parse_mac("0e:00:00:00:00:77")
    assert (found["br0"].up, found["br0"].kind, found["lo"].kind) == (False, "bridge", "")
    addresses = {entry.address: entry for entry in eth0.addresses}
    assert {(entry["local"], entry["prefixlen"]) for entry in shown["eth0"]["addr_info"]} == {
        (socket.inet_ntop(socket.AF_INET if len(a) == 4 else socket.AF_INET6, a), entry.length)
        for a, entry in addresses.items()
    }
    first, second = addresses[parse_address("10.99.0.1")], addresses[parse_address("10.99.0.5")]
    assert (first.secondary, first.permanent, first.scope) == (False, True, 0)
    assert (second.secondary, second.temporary) == (True, False)
    assert addresses[parse_address("172.16.0.1")].scope == 253
    assert not addresses[parse_address("fd99::7")].permanent
    assert not addresses[parse_address("fd99::8")].usable
    assert eth0.preferred(socket.AF_INET) == [*map(parse_address, ("10.99.0.1", "10.99.0.5", "172.16.0.1"))]
    assert eth0.preferred(socket.AF_INET6)[:2] == [*map(parse_address, ("fd99::1", "fd99::7"))]


def test_default_route(host: Netns) -> None:
    assert host.call(lambda: default_route_interface(socket.AF_INET)) is None
    assert host.call(lambda: default_route_interface(socket.AF_INET6)) is None
    host.ip("link add br0 type bridge")
    host.ip("address add 10.98.0.1/24 dev br0")
    host.ip("link set br0 up")
    host.ip("route add default via 10.98.0.2 metric 200")
    host.ip("route add default via 10.99.0.2 metric 100")
    host.ip("-6 route add default via fd99::2")
    host.ip("route add default via 10.98.0.2 table 100")
    index = by_name(host)["eth0"].index
    assert host.call(lambda: default_route_interface(socket.AF_INET)) == index
    assert host.call(lambda: default_route_interface(socket.AF_INET6)) == index


def test_the_way_to_an_address(host: Netns) -> None:
    host.ip("route add 192.0.2.0/24 via 10.99.0.2")
    host.ip("-6 route add 2001:db8::/32 via fd99::2")
    index = by_name(host)["eth0"].index
    ours, theirs, ours_v6, theirs_v6 = map(parse_address, ("10.99.0.1", "10.99.0.2", "fd99::1", "fd99::2"))
    assert host.call(lambda: route_to(parse_address("192.0.2.9"))) == RouteLookup(index, ours, theirs)
    assert host.call(lambda: route_to(theirs)) == RouteLookup(index, ours, None)
    assert host.call(lambda: route_to(parse_address("2001:db8::9"))) == RouteLookup(index, ours_v6, theirs_v6)
    with pytest.raises(OSError, match="unreachable"):
        host.call(lambda: route_to(parse_address("198.51.100.1")))


def test_connected_subnets(host: Netns) -> None:
    host.ip("route add 192.0.2.0/24 via 10.99.0.2")
    host.ip("route add 198.51.100.0/24 dev eth0")
    host.ip("route add 10.3.0.0/16 dev eth0 proto 87")
    host.ip("route add blackhole 10.4.0.0/16")
    host.ip("route add 10.5.0.0/16 dev eth0 table 100")
    found = host.call(connected_subnets)
    v4 = {(str(subnet), device) for subnet, device in found if subnet.family == socket.AF_INET}
    assert v4 == {("10.99.0.0/24", "eth0"), ("198.51.100.0/24", "eth0")}
    assert (Subnet.parse("fd99::/64"), "eth0") in found
