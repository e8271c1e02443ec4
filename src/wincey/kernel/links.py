"""Our devices: read, made, changed, removed.

A device is changed in place wherever the kernel can, so that packets keep flowing and everything on it stays. Only another
VNI, port or GBP flag means that a vxlan device must be made anew, and a fixed remote address or another encapsulation an
ipip device, which takes all its routes and entries with it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import msgspec

from wincey.kernel import ethtool, rtnl
from wincey.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Netlink, NetlinkError, Refusal, messages
from wincey.kernel.objects import Names, kind_of, link
from wincey.kernel.reasons import explain
from wincey.kernel.rtnl import IpipMessage, LinkMessage, VxlanMessage
from wincey.model.address import format_address, format_mac
from wincey.model.state import Ipip, Link, Vxlan

_NAME_SIZE = 15  # IFNAMSIZ without its final zero


class LinkRefused(Exception):
    """A link can't be put; the text says why."""


def read_link(netlink: Netlink, name: str) -> LinkMessage | None:
    """The device of that name, None when there is none."""
    try:
        _, data, start, end = netlink.request(rtnl.get_link(name))
    except NetlinkError as error:
        if error.errno not in (errno.ENODEV, errno.ERANGE):  # not there; longer than a name can be
            raise
        return None
    return rtnl.decode_link(data, start, end)


def as_wanted(message: LinkMessage, names: Names, wanted: Link | None) -> Link | None:
    """The device as an object (see objects.link), its checksum offload read if `wanted` cares."""
    checksum = None
    if wanted and wanted.tx_checksum is not None:
        try:
            checksum = ethtool.get_tx_checksum(message.name)
        except OSError:  # gone meanwhile, or not to be asked: not as wanted, and putting it tells why
            checksum = None
    return link(message, names, wanted, checksum)


def put_link(netlink: Netlink, names: Names, wanted: Link) -> str:
    """Make the device as wanted. Raises LinkRefused.

    Returns "" or, when what was on the device may be gone with the change, what happened to it.
    """
    if len(wanted.name) > _NAME_SIZE:
        raise LinkRefused(f"device names have at most {_NAME_SIZE} characters: choose a smaller VNI")
    found = read_link(netlink, wanted.name)
    if found and found.ipip and found.ipip.port and wanted.kind == "tun":  # ours, of another engine of the udp backend
        _do(netlink, wanted, rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=found.index))
        raise LinkRefused(f"device {wanted.name} was of another engine: it is made anew")
    if found and kind_of(found, wanted) != wanted.kind:
        raise LinkRefused(
            f"device {wanted.name} is already there and of kind {found.kind or 'hardware'}, not {wanted.kind}: "
            "rename or remove it"
        )
    if wanted.vxlan:
        loss = _put_vxlan(netlink, names, wanted, wanted.vxlan, found)
    elif wanted.ipip:
        loss = _put_ipip(netlink, wanted, wanted.ipip, found)
    elif found:
        loss = _change(netlink, wanted, found)
    else:
        raise LinkRefused(f"device {wanted.name} is not there (yet)")
    if wanted.tx_checksum is not None:
        try:
            ethtool.set_tx_checksum(wanted.name, wanted.tx_checksum)
        except OSError as error:
            state = "on" if wanted.tx_checksum else "off"
            raise LinkRefused(f"transmit checksum offload of {wanted.name} can't be turned {state}: {error}") from error
    return loss


def _put_vxlan(netlink: Netlink, names: Names, wanted: Link, vxlan: Vxlan, found: LinkMessage | None) -> str:
    underlay = names.index(vxlan.underlay)
    if not underlay:
        raise LinkRefused(f"its underlay {vxlan.underlay} is not there")
    current = found.vxlan if found else None
    if found and current and _changeable(current, vxlan):
        target = VxlanMessage(vxlan.vni, vxlan.port, vxlan.local, underlay, vxlan.learning, vxlan.gbp)
        info = b"" if current == target else rtnl.vxlan_info(vxlan, underlay, current)
        try:
            return _change(netlink, wanted, found, info)
        except LinkRefused:
            if not info:
                raise
    if found:
        _do(netlink, wanted, rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=found.index))
        if wanted.mac is None:  # peers may know the old one
            wanted = msgspec.structs.replace(wanted, mac=found.mac)
    _create(netlink, wanted, vxlan, underlay)
    return f"device {wanted.name} had to be made anew" if found else ""


def _put_ipip(netlink: Netlink, wanted: Link, ipip: Ipip, found: LinkMessage | None) -> str:
    info, target = rtnl.ipip_info(ipip), IpipMessage(ipip.local, 0, elsewhere=False, port=ipip.port)
    if found and found.ipip and not found.ipip.elsewhere and found.ipip.port == ipip.port:
        return _change(netlink, wanted, found, b"" if found.ipip == target else info)
    if found:
        _do(netlink, wanted, rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=found.index))
    refusal = _make(netlink, wanted, info)
    if refusal and refusal.errno == errno.EEXIST:
        for other in _links(netlink):
            if other.ipip == target:
                raise LinkRefused(
                    f"device {other.name} is an ipip tunnel from {format_address(ipip.local)} to any address already, and"
                    f" the kernel allows one: remove it (`ip link delete {other.name}`)"
                )
    if refusal:
        raise LinkRefused(explain(wanted, refusal))
    return f"device {wanted.name} had to be made anew" if found else ""


def _changeable(current: VxlanMessage, vxlan: Vxlan) -> bool:
    fixed = (current.vni, current.port, current.gbp) == (vxlan.vni, vxlan.port, vxlan.gbp)
    return fixed and len(current.local) == len(vxlan.local)


def _create(netlink: Netlink, wanted: Link, vxlan: Vxlan, underlay: int) -> None:
    refusal = _make(netlink, wanted, rtnl.vxlan_info(vxlan, underlay))
    if not refusal:
        return
    if refusal.errno == errno.EEXIST and (other := _occupant(netlink, vxlan)):
        raise LinkRefused(
            f"VNI {vxlan.vni} with UDP port {vxlan.port} is taken by device {other}: "
            f"remove that (`ip link delete {other}`) or choose another VNI or Port"
        )
    if refusal.errno == errno.EADDRINUSE:
        refusal = Refusal(refusal.errno, f"UDP port {vxlan.port} is taken by another program")
    raise LinkRefused(explain(wanted, refusal))


def _occupant(netlink: Netlink, vxlan: Vxlan) -> str:
    """The name of the vxlan device that has this VNI and port."""
    for found in _links(netlink):
        if found.vxlan and (found.vxlan.vni, found.vxlan.port) == (vxlan.vni, vxlan.port):
            return found.name
    return ""


def _links(netlink: Netlink) -> Iterator[LinkMessage]:
    for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETLINK, rtnl.dump_links())):
        if kind == rtnl.RTM_NEWLINK:
            yield rtnl.decode_link(data, start, end)


def _make(netlink: Netlink, wanted: Link, info: bytes) -> Refusal | None:
    """Make a device, up, that is not there."""
    request = rtnl.encode_link(
        rtnl.RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        name=wanted.name,
        up=True,
        mtu=wanted.mtu,
        mac=wanted.mac,
        info=info,
    )
    return netlink.transact([request]).get(0)


def _change(netlink: Netlink, wanted: Link, found: LinkMessage, info: bytes = b"") -> str:
    """Change what differs; nothing else of the device is touched. Returns what `put_link` does."""
    mac = wanted.mac if wanted.mac and wanted.mac != found.mac else None
    request = rtnl.encode_link(
        rtnl.RTM_NEWLINK,
        0,
        index=found.index,
        up=not found.up,
        mtu=wanted.mtu if wanted.mtu != found.mtu else 0,
        mac=mac,
        info=info,
    )
    _do(netlink, wanted, request)
    # With the address the kernel flushes the device's neighbors, permanent ones included.
    return f"device {wanted.name} was given the MAC address {format_mac(mac)}" if mac else ""


def _do(netlink: Netlink, wanted: Link, request: bytes) -> None:
    if refusal := netlink.transact([request]).get(0):
        raise LinkRefused(explain(wanted, refusal))
