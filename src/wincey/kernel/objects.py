"""What rtnetlink tells, as the desired-state vocabulary has it: devices by name, and only what could be ours. Pure but for
looking up the names of devices."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Literal, TypeAlias

from wincey.kernel import rtnl
from wincey.kernel.rtnl import LinkMessage, NeighborMessage, RouteMessage
from wincey.model.address import Address, Subnet
from wincey.model.state import FdbEntry, Ipip, Link, Neighbor, Route, Vxlan

Kind: TypeAlias = Literal["vxlan", "ipip", "tun", "wireguard", "ovs"]

_KINDS: dict[str, Kind] = {
    "vxlan": "vxlan",
    "ipip": "ipip",
    "tun": "tun",
    "wireguard": "wireguard",
    "openvswitch": "ovs",
}


def kind_of(message: LinkMessage, wanted: Link | None) -> Kind | None:
    """What we call a device's kind, None for one that we never have.

    The local port of an Open vSwitch bridge is a TAP device where ovs-vswitchd forwards by itself.
    """
    kind = _KINDS.get(message.kind)
    return "ovs" if kind == "tun" and wanted and wanted.kind == "ovs" else kind


class Names:
    """Device names by index and back, remembered until `clear`."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._indices: dict[str, int] = {}

    def clear(self) -> None:
        """Forget all: devices come, go and are renamed."""
        self._names.clear()
        self._indices.clear()

    def name(self, index: int) -> str:
        """The name of a device, "" when there is none of that index."""
        name = self._names.get(index)
        if name is None:
            try:
                name = socket.if_indextoname(index)
            except (OSError, OverflowError):
                name = ""
            self._names[index] = name
        return name

    def index(self, name: str) -> int:
        """The index of a device, 0 when there is none of that name."""
        index = self._indices.get(name)
        if index is None:
            try:
                index = socket.if_nametoindex(name) if name else 0
            except OSError:
                index = 0
            self._indices[name] = index
        return index


class Networks:
    """Tells whether an address or prefix lies inside any of some subnets, quickly."""

    def __init__(self, networks: Sequence[Subnet]) -> None:
        self._prefixes = [(len(net.address), net.length, net.bits - net.length, net.first) for net in networks]

    def __contains__(self, prefix: tuple[Address, int]) -> bool:
        address, length = prefix
        return any(
            size == len(address) and shortest <= length and (int.from_bytes(address, "big") ^ first) >> shift == 0
            for size, shortest, shift, first in self._prefixes
        )


def is_candidate(message: RouteMessage) -> bool:
    """Whether a route could be one that we put: a route with another metric or a TOS is somebody else's on purpose."""
    if message.kind == rtnl.RTN_UNICAST:
        metric = 0 if len(message.destination) == 4 else rtnl.METRIC_V6
    elif message.kind == rtnl.RTN_BLACKHOLE:
        metric = rtnl.METRIC_BLACKHOLE
    else:
        return False
    return (
        message.table == rtnl.TABLE_MAIN and message.metric == metric and not message.tos and not message.cloned
    )  # fmt: skip


def routes(message: RouteMessage, names: Names) -> tuple[Route, ...]:
    """The route, or for IPv6 multipath one for each next hop, as the kernel takes them apart itself.

    An IPv4 multipath route is one thing for the kernel; it is told as a route that no backend wants (onlink and yet without
    a gateway), so that it gets replaced or deleted whole.
    """
    destination = Subnet(message.destination, message.length)
    if message.kind == rtnl.RTN_BLACKHOLE:
        return (Route(destination, "", kind="blackhole"),)
    if len(message.hops) > 1 and len(message.destination) == 4:
        return (Route(destination, names.name(message.hops[0].oif), onlink=True),)
    link_scope = message.link_scope
    return tuple(
        [
            Route(destination, names.name(hop.oif), hop.gateway, hop.onlink, link_scope=link_scope)
            for hop in message.hops
        ]
    )


def neighbor(message: NeighborMessage, device: str) -> Neighbor | FdbEntry | None:
    """A permanent neighbor, or a permanent FDB entry with a remote; None for all others.

    An FDB entry that leads to a port, VNI or device of its own comes with the remote 0.0.0.0, which is nobody's.
    """
    if not message.state & rtnl.NUD_PERMANENT or message.address is None or message.mac is None:
        return None
    if message.family != rtnl.AF_BRIDGE:
        return Neighbor(device, message.address, message.mac)
    return FdbEntry(device, message.mac, bytes(len(message.address)) if message.elsewhere else message.address)


def link(message: LinkMessage, names: Names, wanted: Link | None, tx_checksum: bool | None) -> Link | None:
    """A device of a kind that we have; what `wanted` leaves open comes back open. One that is down comes with MTU 0.

    None when it is of another kind, or of another than wanted: then it is somebody else's.
    """
    kind = kind_of(message, wanted)
    if kind is None or (wanted and wanted.kind != kind):
        return None
    vxlan = None
    if message.vxlan:
        vxlan = Vxlan(
            vni=message.vxlan.vni,
            port=message.vxlan.port,
            local=message.vxlan.local,
            underlay=names.name(message.vxlan.underlay),
            learning=message.vxlan.learning,
            gbp=message.vxlan.gbp,
        )
    ipip = None  # for one that is bound to a device, or leads elsewhere: not as anybody wants it
    if message.ipip and not message.ipip.underlay and not message.ipip.elsewhere:
        ipip = Ipip(message.ipip.local, message.ipip.port)
    return Link(
        message.name,
        kind,
        message.mtu if message.up else 0,
        mac=None if kind != "vxlan" or (wanted and wanted.mac is None) else message.mac,
        vxlan=vxlan,
        ipip=ipip,
        tx_checksum=tx_checksum if wanted and wanted.tx_checksum is not None else None,
    )
