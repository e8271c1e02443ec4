"""What BGP has taught the kernel: the routes in the main table that routing daemons put there."""

from __future__ import annotations

from collections.abc import Sequence

from wincey.kernel import rtnl
from wincey.kernel.netlink import Netlink, NetlinkError, messages
from wincey.model.address import Address, Subnet

BIRD, BGP = 12, 186
"""The protocol numbers of routes by BIRD and by FRR's bgpd (iproute2: rt_protos)."""


def learned_routes(networks: Sequence[Subnet]) -> dict[Subnet, frozenset[Address]]:
    """The next hops by destination inside some networks; one dump for each family and program. Raises OSError."""
    found: dict[Subnet, frozenset[Address]] = {}
    netlink = Netlink()
    try:
        for family in sorted({network.family for network in networks}):
            for protocol in (BIRD, BGP):
                for route in _dump(netlink, family, protocol):
                    subnet = Subnet(route.destination, route.length)
                    if any(network.contains(subnet) for network in networks):
                        hops = {hop.gateway or b"" for hop in route.hops}
                        found[subnet] = found.get(subnet, frozenset()) | hops
    finally:
        netlink.close()
    return found


def _dump(netlink: Netlink, family: int, protocol: int) -> list[rtnl.RouteMessage]:
    try:
        datagrams = netlink.dump(rtnl.RTM_GETROUTE, rtnl.dump_routes(family, protocol=protocol))
    except NetlinkError as error:
        if error.errno not in rtnl.NO_ROUTES:
            raise
        return []
    return [
        rtnl.decode_route(data, start, end)
        for kind, data, start, end in messages(datagrams)
        if kind == rtnl.RTM_NEWROUTE and rtnl.route_protocol(data, start) == protocol
    ]


def is_link_local(address: Address) -> bool:
    """Whether it is an IPv6 link-local address (RFC 4291), which names a neighbour on the link and nobody beyond."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
