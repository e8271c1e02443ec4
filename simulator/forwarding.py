"""What becomes of a packet between two hosts: followed through the objects in both kernels, and nothing that a lease says.

A route of the sender must lead into a device, the device must know the receiver's, the receiver's host must have a device that
takes it, with that very MAC address, VNI and port, and must not send the packet on to elsewhere. Strict reverse-path filtering
counts too: a packet must come in by the device that the answer goes out by, unless that device's filter is loose.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from simulator.kernel import UNDERLAY, Kernel
from wincey.model.address import Address, Subnet, format_address, format_mac
from wincey.model.state import FdbEntry, Link, Neighbor, Route, RuleSet, Sysctl, Tunnel, TunnelPeer


class Station(msgspec.Struct, frozen=True):
    """A host as the underlay and its containers know it. subnet: what its containers were told, None before that."""

    name: str
    address: Address
    kernel: Kernel
    subnet: Subnet | None


class _Lost(Exception):
    """The packet does not get there; the text says where it ended."""


def obstacle(sender: Station, receiver: Station, underlay: Mapping[Address, Station]) -> str:
    """Why a container of one host can't send to one of the other; "" if it can."""
    if sender.subnet is None or receiver.subnet is None:
        return "one of them has no subnet"
    try:
        for packet in (receiver.subnet.host(2), receiver.subnet.host(receiver.subnet.size - 2)):
            reached, device = _across(sender, packet, underlay)
            if reached is not receiver:
                raise _Lost(f"{format_address(packet)} leads to {reached.name}")
            _taken(receiver, packet, sender.subnet.host(2), device)
        for station in (sender, receiver):
            if (RuleSet.tag, receiver.subnet.family) not in station.kernel.objects:
                raise _Lost(f"{station.name} has no rules that let packets pass")
    except _Lost as lost:
        return str(lost)
    return ""


def _across(sender: Station, packet: Address, underlay: Mapping[Address, Station]) -> tuple[Station, str]:
    """The host at which a packet comes out, and the device that it comes in by there."""
    kernel, name = sender.kernel, sender.name
    route = kernel.route(packet)
    if route is None or route.kind == "blackhole":
        raise _Lost(f"{name} has no route to {format_address(packet)}")
    if route.device == UNDERLAY:
        return _host(route.gateway or packet, underlay), UNDERLAY
    link = kernel.objects.get((Link.tag, route.device))
    if not isinstance(link, Link):
        raise _Lost(f"{name} has no device {route.device}")
    if link.vxlan:
        return _through_vxlan(sender, link, route, underlay)
    if link.ipip:
        assert route.gateway
        if link.ipip.local != sender.address:
            raise _Lost(f"{link.name} of {name} sends from {format_address(link.ipip.local)}")
        host = _host(route.gateway, underlay)
        device = next((each for each in host.kernel.links() if each.ipip and each.ipip.local == route.gateway), None)
        if not device:
            raise _Lost(f"{host.name} has no ipip device at {format_address(route.gateway)}")
        return host, device.name
    return _through_tunnel(sender, link, packet, underlay)


def _through_vxlan(
    sender: Station, link: Link, route: Route, underlay: Mapping[Address, Station]
) -> tuple[Station, str]:
    kernel, vxlan = sender.kernel, link.vxlan
    assert vxlan
    if vxlan.local != sender.address:
        raise _Lost(f"{link.name} of {sender.name} sends from {format_address(vxlan.local)}")
    neighbor = kernel.objects.get((Neighbor.tag, link.name, route.gateway))
    if not isinstance(neighbor, Neighbor):
        raise _Lost(f"{sender.name} knows no MAC address of {format_address(route.gateway or b'')}")
    entry = kernel.objects.get((FdbEntry.tag, link.name, neighbor.mac))
    if not isinstance(entry, FdbEntry):
        raise _Lost(f"{sender.name} does not know where {format_mac(neighbor.mac)} lives")
    host = _host(entry.remote, underlay)
    for device in host.kernel.links():
        if device.vxlan and (device.vxlan.vni, device.vxlan.port) == (vxlan.vni, vxlan.port):
            if host.kernel.mac(device) != neighbor.mac:
                raise _Lost(
                    f"{device.name} of {host.name} is {format_mac(host.kernel.mac(device))}, not {format_mac(neighbor.mac)}"
                )
            return host, device.name
    raise _Lost(f"{host.name} has no vxlan device with VNI {vxlan.vni} at port {vxlan.port}")


def _through_tunnel(
    sender: Station, link: Link, packet: Address, underlay: Mapping[Address, Station]
) -> tuple[Station, str]:
    own = sender.kernel.objects.get((Tunnel.tag, link.name))
    peers = [
        item
        for item in sender.kernel.objects.values()
        if isinstance(item, TunnelPeer) and item.device == link.name and item.subnet.contains(packet)
    ]
    if not isinstance(own, Tunnel) or not peers:
        raise _Lost(f"the tunnel of {sender.name} has no peer for {format_address(packet)}")
    peer = max(peers, key=lambda item: item.subnet.length)
    host = _host(peer.endpoint, underlay)
    for item in host.kernel.objects.values():
        if isinstance(item, Tunnel) and (item.local, item.port) == (peer.endpoint, own.port):
            return host, item.device
    raise _Lost(f"no tunnel listens at {format_address(peer.endpoint)}:{own.port}")


def _host(address: Address, underlay: Mapping[Address, Station]) -> Station:
    if address not in underlay:
        raise _Lost(f"nobody has the address {format_address(address)}")
    return underlay[address]


def _taken(receiver: Station, packet: Address, source: Address, device: str) -> None:
    """The packet is let in and handed to a container; raises _Lost."""
    kernel, subnet = receiver.kernel, receiver.subnet
    assert subnet
    onward = kernel.route(packet)
    if onward and onward.destination.length >= subnet.length:
        raise _Lost(f"{receiver.name} sends {format_address(packet)} on, by {onward}")
    if device == UNDERLAY:
        return  # its filter is the administrator's
    back = kernel.route(source)
    filtering = kernel.objects.get((Sysctl.tag, f"net/ipv4/conf/{device}/rp_filter"))
    loose = isinstance(filtering, Sysctl) and filtering.value == "2"
    if not loose and (back is None or back.device != device):
        raise _Lost(f"the reverse-path filter of {device} of {receiver.name} drops it: the way back is {back}")
