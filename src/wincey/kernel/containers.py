"""Which addresses of our own subnets this host has spoken with, by its neighbor tables: the containers, whatever runs them.

The kernel forgets quiet ones only when its table grows (net.ipv4.neigh.default.gc_thresh1, 128 entries). Read when asked.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

import msgspec

from wincey.kernel import rtnl
from wincey.kernel.interfaces import read_interfaces
from wincey.kernel.netlink import Netlink, messages
from wincey.model.address import Address, MacAddress, Subnet

_NOBODY = 0x01 | 0x20  # NUD_INCOMPLETE, NUD_FAILED: it was asked for, and did not answer


class Spoken(msgspec.Struct, frozen=True, order=True):
    """An address, the device that leads to it, and its MAC address, b"" where there is none."""

    address: Address
    device: str
    mac: MacAddress


def spoken_with(subnets: Iterable[Subnet]) -> list[Spoken]:
    """The neighbors inside some subnets, in order; raises OSError when the kernel does not answer."""
    wanted = list(subnets)
    netlink = Netlink()
    try:
        found = [
            rtnl.decode_neighbor(data, start, end)
            for family in (socket.AF_INET, socket.AF_INET6)
            for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETNEIGH, rtnl.dump_family_neighbors(family)))
            if kind == rtnl.RTM_NEWNEIGH
        ]
    finally:
        netlink.close()
    names = {each.index: each.name for each in read_interfaces()} if found else {}
    return sorted(
        Spoken(each.address, names.get(each.index, "?"), each.mac or b"")
        for each in found
        if each.address and not each.state & _NOBODY and any(subnet.contains(each.address) for subnet in wanted)
    )
