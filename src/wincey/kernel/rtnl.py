"""The wire form of links, addresses, routes, neighbors and FDB entries (rtnetlink(7); kernel: include/uapi/linux).

Pure: bytes to values and back, devices by index. What travels by the ten thousand (routes, neighbors, FDB entries) is
packed whole by one precompiled structure and read with no object per attribute; links and addresses, of which there are a
few, take the readable way.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys

import msgspec

from wincey.kernel.netlink import NLM_F_REQUEST, attribute, attributes, message
from wincey.model.address import Address, MacAddress, Subnet
from wincey.model.state import Ipip, Vxlan

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

ROUTE_PROTOCOL = 87
"""The rtnetlink protocol number that marks a route as ours: `ip route show proto 87`.

Free in the kernel's list (include/uapi/linux/rtnetlink.h) and in iproute2's rt_protos. Flannel uses 3 (boot).
"""

METRIC_V6 = 1024
"""The metric the kernel gives an IPv6 route that asks for none; that of IPv4 is 0."""

METRIC_BLACKHOLE = 0x7FFFFFFF
"""That of blackhole routes. In IPv4 destination and metric make a route unique, so one with metric 0 would take the place
of the container bridge's own route to the same subnet; a last resort must lose against it."""

NO_ROUTES = frozenset({errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT})
"""What a dump of routes is answered when the table has had no route yet, or the kernel lacks the family."""

AF_BRIDGE = 7
TABLE_MAIN = 254
RTPROT_KERNEL = 2
RTN_UNICAST, RTN_BLACKHOLE = 1, 6
RTM_F_CLONED = 0x200
RTNH_F_ONLINK = 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
NUD_PERMANENT = 0x80
NTF_SELF = 2
IFF_UP = 1
IFA_F_NODAD, IFA_F_DADFAILED = 0x02, 0x08

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_MULTIPATH, _RTA_VIA = 1, 4, 5, 6, 7, 9, 18
_NDA_DST, _NDA_LLADDR, _NDA_PORT, _NDA_VNI, _NDA_IFINDEX = 1, 2, 6, 7, 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_EXT_MASK = 1, 3, 4, 18, 29
_RTEXT_FILTER_SKIP_STATS = 8
_INFO_KIND, _INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_LINK, _VXLAN_LOCAL, _VXLAN_LEARNING, _VXLAN_PORT = 1, 3, 4, 7, 15
_VXLAN_LOCAL6, _VXLAN_UDP_CSUM, _VXLAN_GBP = 17, 18, 23
_IPTUN_LINK, _IPTUN_LOCAL, _IPTUN_REMOTE, _IPTUN_TTL, _IPTUN_PMTUDISC = 1, 2, 3, 4, 10
_IPTUN_ENCAP_TYPE, _IPTUN_ENCAP_FLAGS, _IPTUN_ENCAP_SPORT, _IPTUN_ENCAP_DPORT, _IPTUN_COLLECT_METADATA = (
    15,
    16,
    17,
    18,
    19,
)
_ENCAP_FOU, _ENCAP_CSUM = 1, 1  # linux/if_tunnel.h: enum tunnel_encap_types; with the outer UDP checksum
_NLA_F_NESTED = 0x8000

_ATTRIBUTE = struct.Struct("=HH")
_U16, _U32 = struct.Struct("=H"), struct.Struct("=I")
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change mask
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # family, lengths of destination and source, tos, table, protocol, scope, type, flags
_NEIGHBOR = struct.Struct("=B3xiHBB")  # family, index, state, flags, type
_NEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, index

_NEIGHBOR_REQUEST = {
    size: struct.Struct(f"=IHHII B3xiHBB HH{size}s HH6s2x".replace(" ", "")) for size in (4, 16)
}  # with NDA_DST and NDA_LLADDR
_ROUTE_REQUEST = {
    size: struct.Struct(f"=IHHII BBBBBBBBI HH{size}s".replace(" ", "")) for size in (4, 16)
}  # with RTA_DST


class Hop(msgspec.Struct, frozen=True, gc=False):
    """Where a route leads. A gateway of the other family (RTA_VIA) has that family's length."""

    oif: int
    gateway: Address | None
    onlink: bool


class RouteMessage(msgspec.Struct, frozen=True, gc=False):
    """A route as the kernel tells it. metric: 0 when it has none. hops: more than one for a multipath route."""

    destination: Address
    length: int
    tos: int
    table: int
    protocol: int
    kind: int
    cloned: bool
    metric: int
    source: Address | None
    hops: tuple[Hop, ...]
    link_scope: bool = False


class NeighborMessage(msgspec.Struct, frozen=True, gc=False):
    """A neighbor, or (family AF_BRIDGE) an FDB entry. elsewhere: an FDB entry with a port, VNI or device of its own."""

    family: int
    index: int
    state: int
    address: Address | None
    mac: MacAddress | None
    elsewhere: bool


class AddressMessage(msgspec.Struct, frozen=True, gc=False):
    """An address of a device. flags: IFA_F_*."""

    index: int
    subnet: Subnet
    scope: int
    flags: int


class VxlanMessage(msgspec.Struct, frozen=True, gc=False):
    """As state.Vxlan, with the underlay's index (0: none); local is empty when the kernel may choose."""

    vni: int
    port: int
    local: Address
    underlay: int
    learning: bool
    gbp: bool


class IpipMessage(msgspec.Struct, frozen=True, gc=False):
    """As state.Ipip, with the device that it is bound to (0: none). port: 0 without a UDP header.

    elsewhere: it has a fixed remote address, another header around it, or is external (told by each route where to send):
    the kernel can't take that from a device.
    """

    local: Address
    underlay: int
    elsewhere: bool
    port: int = 0


class LinkMessage(msgspec.Struct, frozen=True, gc=False):
    """A device. kind: "" for hardware, loopback and the like."""

    index: int
    name: str
    up: bool
    mtu: int
    mac: MacAddress
    kind: str
    vxlan: VxlanMessage | None
    ipip: IpipMessage | None = None


def encode_neighbor(kind: int, flags: int, index: int, address: Address, mac: MacAddress) -> bytes:
    """Put or delete a permanent ARP or ND entry."""
    size = len(address)
    request = _NEIGHBOR_REQUEST[size]
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    return request.pack(
        request.size, kind, flags | NLM_F_REQUEST, 0, 0,
        family, index, NUD_PERMANENT, 0, 0,
        size + 4, _NDA_DST, address, 10, _NDA_LLADDR, mac,
    )  # fmt: skip


def encode_fdb(kind: int, flags: int, index: int, mac: MacAddress, remote: Address) -> bytes:
    """Put or delete a permanent FDB entry of a vxlan device. Deleting with remote 0.0.0.0 deletes all remotes of `mac`."""
    size = len(remote)
    request = _NEIGHBOR_REQUEST[size]
    return request.pack(
        request.size, kind, flags | NLM_F_REQUEST, 0, 0,
        AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, 0,
        size + 4, _NDA_DST, remote, 10, _NDA_LLADDR, mac,
    )  # fmt: skip


def encode_route(
    kind: int,
    flags: int,
    destination: Subnet,
    *,
    oif: int = 0,
    gateway: Address | None = None,
    onlink: bool = False,
    blackhole: bool = False,
    link_scope: bool = False,
    protocol: int = ROUTE_PROTOCOL,
) -> bytes:
    """Put a route of the main table, or delete the one that has all of these. protocol 0 deletes that of any protocol.

    oif 0 and gateway None leave these open when deleting.
    """
    address = destination.address
    size = len(address)
    rest = b""
    if gateway is not None and not blackhole:
        if len(gateway) == size:
            rest = _ATTRIBUTE.pack(size + 4, _RTA_GATEWAY) + gateway
        else:
            family = socket.AF_INET if len(gateway) == 4 else socket.AF_INET6
            rest = attribute(_RTA_VIA, struct.pack("=H", family) + gateway)
    if oif and not blackhole:
        rest += _ATTRIBUTE.pack(8, _RTA_OIF) + _U32.pack(oif)
    if blackhole or size == 16:
        rest += _ATTRIBUTE.pack(8, _RTA_PRIORITY) + _U32.pack(METRIC_BLACKHOLE if blackhole else METRIC_V6)
    request = _ROUTE_REQUEST[size]
    return (
        request.pack(
            request.size + len(rest), kind, flags | NLM_F_REQUEST, 0, 0,
            socket.AF_INET if size == 4 else socket.AF_INET6, destination.length, 0, 0, TABLE_MAIN, protocol,
            RT_SCOPE_NOWHERE if kind == RTM_DELROUTE else RT_SCOPE_LINK if link_scope else RT_SCOPE_UNIVERSE,
            RTN_BLACKHOLE if blackhole else RTN_UNICAST,
            RTNH_F_ONLINK if onlink else 0,
            size + 4, _RTA_DST, address,
        )
        + rest
    )  # fmt: skip


def encode_address(kind: int, flags: int, index: int, subnet: Subnet) -> bytes:
    """Put or delete a global address. IPv6 without duplicate address detection, so that it works at once."""
    ifa_flags = IFA_F_NODAD if subnet.bits == 128 else 0
    body = _ADDRESS.pack(subnet.family, subnet.length, ifa_flags, RT_SCOPE_UNIVERSE, index)
    body += attribute(_IFA_LOCAL, subnet.address) + attribute(_IFA_ADDRESS, subnet.address)
    return message(kind, flags, body)


def encode_link(
    kind: int,
    flags: int,
    *,
    index: int = 0,
    name: str = "",
    up: bool = False,
    mtu: int = 0,
    mac: MacAddress | None = None,
    info: bytes = b"",
) -> bytes:
    """Make (by name), change or delete (by index) a link; what isn't given stays as it is. info: see `vxlan_info`."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, IFF_UP if up else 0, IFF_UP if up else 0)
    if name:
        body += attribute(_IFLA_IFNAME, name.encode() + b"\0")
    if mtu:
        body += attribute(_IFLA_MTU, _U32.pack(mtu))
    if mac:
        body += attribute(_IFLA_ADDRESS, mac)
    return message(kind, flags, body + info)


def vxlan_info(vxlan: Vxlan, underlay: int, current: VxlanMessage | None = None) -> bytes:
    """The attribute that makes a link a vxlan device, or changes `current` into it.

    The kernel can change local address, underlay and learning of a device in place, and refuses a change that mentions
    most of the others even with their present values; so a change holds only what differs.
    """
    data = b""
    if current is None:
        data += attribute(_VXLAN_ID, _U32.pack(vxlan.vni))
        data += attribute(_VXLAN_PORT, struct.pack(">H", vxlan.port))
        data += attribute(_VXLAN_UDP_CSUM, b"\1")
        if vxlan.gbp:
            data += attribute(_VXLAN_GBP, b"")
    if current is None or current.underlay != underlay:
        data += attribute(_VXLAN_LINK, _U32.pack(underlay))
    if current is None or current.local != vxlan.local:
        data += attribute(_VXLAN_LOCAL if len(vxlan.local) == 4 else _VXLAN_LOCAL6, vxlan.local)
    if current is None or current.learning != vxlan.learning:
        data += attribute(_VXLAN_LEARNING, bytes([vxlan.learning]))
    return attribute(
        _IFLA_LINKINFO | _NLA_F_NESTED, attribute(_INFO_KIND, b"vxlan") + attribute(_INFO_DATA | _NLA_F_NESTED, data)
    )


def ipip_info(ipip: Ipip) -> bytes:
    """The attribute that makes a link an ipip device, or changes one: what is left out goes back to its default.

    Without PMTUDISC the outer packet may be fragmented on its way just if the inner one may; the default forbids it for all.
    """
    data = attribute(_IPTUN_LINK, _U32.pack(0)) + attribute(_IPTUN_LOCAL, ipip.local)
    data += attribute(_IPTUN_REMOTE, bytes(4)) + attribute(_IPTUN_TTL, b"\0") + attribute(_IPTUN_PMTUDISC, b"\0")
    if ipip.port:
        port = ipip.port.to_bytes(2, "big")
        data += attribute(_IPTUN_ENCAP_TYPE, _U16.pack(_ENCAP_FOU)) + attribute(
            _IPTUN_ENCAP_FLAGS, _U16.pack(_ENCAP_CSUM)
        )
        data += attribute(_IPTUN_ENCAP_SPORT, port) + attribute(_IPTUN_ENCAP_DPORT, port)
    return attribute(
        _IFLA_LINKINFO | _NLA_F_NESTED, attribute(_INFO_KIND, b"ipip") + attribute(_INFO_DATA | _NLA_F_NESTED, data)
    )


def get_link(name: str) -> bytes:
    """Ask for one link by name."""
    return message(
        RTM_GETLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0") + _NO_STATS
    )


def get_route(address: Address) -> bytes:
    """Ask which way a packet to `address` would take."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
    return message(RTM_GETROUTE, 0, body + attribute(_RTA_DST, address))


_NO_STATS = attribute(_IFLA_EXT_MASK, _U32.pack(_RTEXT_FILTER_SKIP_STATS))


def dump_links() -> bytes:
    """The body of a dump of all links."""
    return _LINK.pack(0, 0, 0, 0, 0) + _NO_STATS


def dump_addresses(index: int = 0) -> bytes:
    """The body of a dump of addresses of both families, of one device if given."""
    return _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, index)


def dump_routes(family: int, *, protocol: int = 0, oif: int = 0) -> bytes:
    """The body of a dump of the main table, of one protocol or device if given."""
    body = _ROUTE.pack(family, 0, 0, 0, TABLE_MAIN, protocol, 0, 0, 0)
    return body + (attribute(_RTA_OIF, _U32.pack(oif)) if oif else b"")


def dump_neighbors(family: int, index: int) -> bytes:
    """The body of a dump of one device's neighbors."""
    return _NEIGHBOR.pack(family, 0, 0, 0, 0) + attribute(_NDA_IFINDEX, _U32.pack(index))


def dump_family_neighbors(family: int) -> bytes:
    """The body of a dump of all devices' neighbors."""
    return _NEIGHBOR.pack(family, 0, 0, 0, 0)


def dump_fdb(index: int) -> bytes:
    """The body of a dump of one device's forwarding database."""
    return _NEIGHBOR.pack(AF_BRIDGE, index, 0, 0, 0)


def decode_neighbor(data: bytes, offset: int, end: int) -> NeighborMessage:
    """Read the body of RTM_NEWNEIGH or RTM_DELNEIGH."""
    family, index, state, _, _ = _NEIGHBOR.unpack_from(data, offset)
    offset += 12
    address = mac = None
    elsewhere = False
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        if kind == _NDA_DST:
            address = data[offset + 4 : offset + length]
        elif kind == _NDA_LLADDR:
            mac = data[offset + 4 : offset + length]
        elif kind in (_NDA_PORT, _NDA_VNI, _NDA_IFINDEX):
            elsewhere = True
        offset += (length + 3) & ~3
    return NeighborMessage(family, index, state, address, mac, elsewhere)


def route_protocol(data: bytes, offset: int) -> int:
    """The protocol number in the body of a route message."""
    return data[offset + 5]


def decode_route(data: bytes, offset: int, end: int) -> RouteMessage:
    """Read the body of RTM_NEWROUTE or RTM_DELROUTE."""
    family, size, _, tos, table, protocol, scope, kind, flags = _ROUTE.unpack_from(data, offset)
    offset += 12
    destination = gateway = source = None
    oif = metric = 0
    hops: tuple[Hop, ...] = ()
    while offset + 4 <= end:
        length, attr = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        if attr == _RTA_DST:
            destination = data[offset + 4 : offset + length]
        elif attr == _RTA_GATEWAY:
            gateway = data[offset + 4 : offset + length]
        elif attr == _RTA_OIF:
            oif = _U32.unpack_from(data, offset + 4)[0]
        elif attr == _RTA_PRIORITY:
            metric = _U32.unpack_from(data, offset + 4)[0]
        elif attr == _RTA_VIA:
            gateway = data[offset + 6 : offset + length]
        elif attr == _RTA_PREFSRC:
            source = data[offset + 4 : offset + length]
        elif attr == _RTA_MULTIPATH:
            hops = _decode_hops(data, offset + 4, offset + length)
        offset += (length + 3) & ~3
    if destination is None:
        destination = bytes(4 if family == socket.AF_INET else 16)
    hops = hops or (Hop(oif, gateway, bool(flags & RTNH_F_ONLINK)),)
    cloned, link_scope = bool(flags & RTM_F_CLONED), scope == RT_SCOPE_LINK
    return RouteMessage(destination, size, tos, table, protocol, kind, cloned, metric, source, hops, link_scope)


def _decode_hops(data: bytes, offset: int, end: int) -> tuple[Hop, ...]:
    hops = []
    while offset + 8 <= end:
        length, flags, _, index = _NEXTHOP.unpack_from(data, offset)
        if length < 8:
            break
        inner = attributes(data, offset + 8, offset + length)
        gateway = inner.get(_RTA_GATEWAY) or (inner[_RTA_VIA][2:] if _RTA_VIA in inner else None)
        hops.append(Hop(index, gateway, bool(flags & RTNH_F_ONLINK)))
        offset += (length + 3) & ~3
    return tuple(hops)


def decode_address(data: bytes, offset: int, end: int) -> AddressMessage:
    """Read the body of RTM_NEWADDR or RTM_DELADDR. Of a point-to-point address it is the own end."""
    _, length, flags, scope, index = _ADDRESS.unpack_from(data, offset)
    found = attributes(data, offset + 8, end)
    address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS) or b""
    if _IFA_FLAGS in found:
        flags = _U32.unpack(found[_IFA_FLAGS])[0]
    return AddressMessage(index, Subnet(address, length), scope, flags)


def decode_link(data: bytes, offset: int, end: int) -> LinkMessage:
    """Read the body of RTM_NEWLINK or RTM_DELLINK."""
    _, _, index, flags, _ = _LINK.unpack_from(data, offset)
    found = attributes(data, offset + 16, end)
    mtu = found.get(_IFLA_MTU)
    info = found.get(_IFLA_LINKINFO, b"")
    inner = attributes(info, 0, len(info))
    kind = inner.get(_INFO_KIND, b"").rstrip(b"\0").decode()
    vxlan = _decode_vxlan(inner[_INFO_DATA]) if kind == "vxlan" and _INFO_DATA in inner else None
    ipip = _decode_ipip(inner[_INFO_DATA]) if kind == "ipip" and _INFO_DATA in inner else None
    return LinkMessage(
        index,
        found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape"),
        bool(flags & IFF_UP),
        _U32.unpack(mtu)[0] if mtu else 0,
        found.get(_IFLA_ADDRESS, b""),
        kind,
        vxlan,
        ipip,
    )


def _decode_vxlan(data: bytes) -> VxlanMessage:
    found = attributes(data, 0, len(data))
    return VxlanMessage(
        vni=_U32.unpack(found[_VXLAN_ID])[0] if _VXLAN_ID in found else 0,
        port=int.from_bytes(found.get(_VXLAN_PORT, b""), "big"),
        local=found.get(_VXLAN_LOCAL) or found.get(_VXLAN_LOCAL6) or b"",
        underlay=_U32.unpack(found[_VXLAN_LINK])[0] if _VXLAN_LINK in found else 0,
        learning=found.get(_VXLAN_LEARNING) == b"\1",
        gbp=_VXLAN_GBP in found,
    )


def _decode_ipip(data: bytes) -> IpipMessage:
    found = attributes(data, 0, len(data))
    elsewhere, port = found.get(_IPTUN_REMOTE, b""), 0
    if encapsulation := int.from_bytes(found.get(_IPTUN_ENCAP_TYPE, b""), sys.byteorder):
        port = int.from_bytes(found.get(_IPTUN_ENCAP_DPORT, b""), "big")
        if encapsulation != _ENCAP_FOU or found.get(_IPTUN_ENCAP_SPORT) != found.get(_IPTUN_ENCAP_DPORT):
            elsewhere = b"\1"
    return IpipMessage(
        local=found.get(_IPTUN_LOCAL, bytes(4)),
        underlay=_U32.unpack(found[_IPTUN_LINK])[0] if _IPTUN_LINK in found else 0,
        elsewhere=any(elsewhere) or _IPTUN_COLLECT_METADATA in found,
        port=port,
    )
