"""What BGP has taught the kernel: the routes in the main table that routing daemons put there, and notice of changes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence

from wincey.kernel import rtnl
from wincey.kernel.monitor import irrelevant
from wincey.kernel.netlink import Netlink, NetlinkError, messages
from wincey.model.address import Address, Subnet

BIRD, BGP = 12, 186
"""The protocol numbers of routes by BIRD and by FRR's bgpd (iproute2: rt_protos)."""


_GROUPS = (7, 11)  # RTNLGRP_: IPV4_ROUTE, IPV6_ROUTE


class Notices:
    """Calls `changed` whenever a route inside some networks comes, goes or changes, until closed."""

    def __init__(self, networks: Sequence[Subnet], changed: Callable[[], None]) -> None:
        self.networks = networks
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._netlink = Netlink(_GROUPS)
        self._netlink.attach_filter(irrelevant(self._netlink.port, {}, tuple(networks)))
        self._loop.add_reader(self._netlink.fileno(), self._read)

    def close(self) -> None:
        """Stop reading."""
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()

    def _read(self) -> None:
        try:
            while self._netlink.receive() is not None:
                pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
        self._changed()


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
