"""The host's own interfaces, addresses and routes, as needed to choose the interface that joins the hosts.

Read anew at each call, through a socket of the call's own: it happens at the start and when something changed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec

from wincey.kernel import rtnl
from wincey.kernel.netlink import Netlink, NetlinkError, messages
from wincey.kernel.objects import Names
from wincey.model.address import Address, MacAddress, Subnet, family_of, format_address

_SECONDARY_OR_TEMPORARY = 0x01  # one bit: IPv4 secondary, IPv6 temporary (privacy extensions)
_NOT_USABLE = 0x08 | 0x20 | 0x40  # duplicate address detection failed, deprecated, detection not finished
_PERMANENT = 0x80


class LocalAddress(msgspec.Struct, frozen=True):
    """An address of an interface. scope: RT_SCOPE_*, 0 is global, 253 link. usable: neither deprecated nor tentative.

    permanent: without a lifetime. temporary: IPv6 privacy address. secondary: a further IPv4 address of a subnet.
    """

    address: Address
    length: int
    scope: int = 0
    permanent: bool = True
    temporary: bool = False
    secondary: bool = False
    usable: bool = True


class Interface(msgspec.Struct, frozen=True):
    """A network device of the host, with its addresses in the kernel's order. kind: "" for hardware and loopback."""

    name: str
    index: int
    mtu: int
    mac: MacAddress = b""
    up: bool = True
    kind: str = ""
    addresses: tuple[LocalAddress, ...] = ()

    def preferred(self, family: int) -> list[Address]:
        """The usable addresses of a family, the best first.

        Global before link-local, permanent before dynamic, non-temporary before temporary (compatibility reference,
        section 9); then the kernel's order.
        """
        candidates = [entry for entry in self.addresses if entry.usable and family_of(entry.address) == family]
        candidates.sort(key=lambda entry: (entry.scope, not entry.permanent, entry.temporary, entry.secondary))
        return [entry.address for entry in candidates]

    def __str__(self) -> str:
        addresses = ", ".join(format_address(entry.address) for entry in self.addresses)
        return f"{self.name} ({addresses or 'no address'})"


class RouteLookup(msgspec.Struct, frozen=True):
    """The way that packets to an address take: by which device, from which of our addresses, through which gateway."""

    index: int
    source: Address | None
    gateway: Address | None


def read_interfaces() -> list[Interface]:
    """All interfaces, by index; raises OSError."""
    netlink = Netlink()
    try:
        links = [
            rtnl.decode_link(data, start, end)
            for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETLINK, rtnl.dump_links()))
            if kind == rtnl.RTM_NEWLINK
        ]
        addresses: dict[int, list[LocalAddress]] = {}
        for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETADDR, rtnl.dump_addresses())):
            if kind == rtnl.RTM_NEWADDR:
                message = rtnl.decode_address(data, start, end)
                addresses.setdefault(message.index, []).append(_local_address(message))
    finally:
        netlink.close()
    return [
        Interface(link.name, link.index, link.mtu, link.mac, link.up, link.kind, tuple(addresses.get(link.index, ())))
        for link in sorted(links, key=lambda link: link.index)
    ]


def _local_address(message: rtnl.AddressMessage) -> LocalAddress:
    first_bit = bool(message.flags & _SECONDARY_OR_TEMPORARY)
    v4 = message.subnet.family == socket.AF_INET
    return LocalAddress(
        message.subnet.address,
        message.subnet.length,
        message.scope,
        permanent=bool(message.flags & _PERMANENT),
        temporary=first_bit and not v4,
        secondary=first_bit and v4,
        usable=not message.flags & _NOT_USABLE,
    )


def default_route_interface(family: int) -> int | None:
    """The index of the device of the main table's best default route, None when there is none; raises OSError."""
    found = [
        (route.metric, route.hops[0].oif) for route in _main_routes(family) if not route.length and route.hops[0].oif
    ]
    return min(found)[1] if found else None


def connected_subnets() -> list[tuple[Subnet, str]]:
    """Subnets that the main table reaches without a gateway, each with its device; both families; raises OSError."""
    names = Names()
    return [
        (Subnet(route.destination, route.length), names.name(route.hops[0].oif))
        for family in (socket.AF_INET, socket.AF_INET6)
        for route in _main_routes(family)
        if len(route.hops) == 1 and route.hops[0].gateway is None and route.hops[0].oif
    ]


def route_to(address: Address) -> RouteLookup:
    """Ask the kernel for the way to an address; raises OSError when there is none."""
    netlink = Netlink()
    try:
        _, data, start, end = netlink.request(rtnl.get_route(address))
    finally:
        netlink.close()
    route = rtnl.decode_route(data, start, end)
    return RouteLookup(route.hops[0].oif, route.source, route.hops[0].gateway)


def _main_routes(family: int) -> Iterator[rtnl.RouteMessage]:
    """Unicast routes of the main table but ours, of which there may be ten thousand."""
    netlink = Netlink()
    try:
        datagrams = netlink.dump(rtnl.RTM_GETROUTE, rtnl.dump_routes(family))
    except NetlinkError as error:
        if error.errno not in rtnl.NO_ROUTES:
            raise
        return
    finally:
        netlink.close()
    for kind, data, start, end in messages(datagrams):
        if kind == rtnl.RTM_NEWROUTE and rtnl.route_protocol(data, start) != rtnl.ROUTE_PROTOCOL:
            route = rtnl.decode_route(data, start, end)
            if route.table == rtnl.TABLE_MAIN and route.kind == rtnl.RTN_UNICAST and not route.cloned:
                yield route
