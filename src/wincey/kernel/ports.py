"""The host's ends of containers' cables: veth devices whose other end is in another network namespace, and that belong to a subnet.

A subnet's containers are those at a bridge that has an address of it (cni0, docker0), or at a cable that has one itself (the ptp
plugin). So nobody has to tell which containers there are, whatever runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from typing import NamedTuple

from wincey.kernel import rtnl
from wincey.kernel.netlink import Netlink, attributes, messages
from wincey.model.address import Subnet

_GROUPS = (1, 5)  # RTNLGRP_: LINK, IPV4_IFADDR
_SETTLE = 0.01
"""Seconds after a notification before the next look: a new container makes several."""

_INDEX, _TYPE = struct.Struct("=i"), struct.Struct("=H")
_ARPHRD_ETHER = 1
_IFNAME, _MASTER, _LINKINFO, _NETNS = 3, 10, 18, 37
_KIND = 1


class Cable(NamedTuple):
    """A veth device: its index (number), name, and the index of its bridge, 0 for none. away: the other end is in another namespace."""

    number: int
    name: str
    master: int
    away: bool


def container_ports(subnet: Subnet) -> list[str]:
    """The names of the host's ends of all cables to containers of a subnet, in order; raises OSError."""
    netlink = Netlink()
    try:
        cables = [
            cable
            for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETLINK, rtnl.dump_links()))
            if kind == rtnl.RTM_NEWLINK and (cable := read_cable(data, start, end))
        ]
        addressed = {
            message.index
            for kind, data, start, end in messages(netlink.dump(rtnl.RTM_GETADDR, rtnl.dump_addresses()))
            if kind == rtnl.RTM_NEWADDR
            and subnet.contains((message := rtnl.decode_address(data, start, end)).subnet.address)
        }
    finally:
        netlink.close()
    return sorted(each.name for each in cables if each.away and (each.number in addressed or each.master in addressed))


def is_ethernet(name: str) -> bool:
    """Whether packets of a device begin with an Ethernet header, as those of cards, bridges, bonds and VLANs do; raises OSError."""
    netlink = Netlink()
    try:
        _, data, start, _ = netlink.request(rtnl.get_link(name))
    finally:
        netlink.close()
    return bool(_TYPE.unpack_from(data, start + 2)[0] == _ARPHRD_ETHER)


def read_cable(data: bytes, offset: int, end: int) -> Cable | None:
    """Read the body of RTM_NEWLINK; None for what is no veth device."""
    index = _INDEX.unpack_from(data, offset + 4)[0]
    found = attributes(data, offset + 16, end)
    info = found.get(_LINKINFO, b"")
    if attributes(info, 0, len(info)).get(_KIND, b"").rstrip(b"\0") != b"veth":
        return None
    name = found.get(_IFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape")
    master = struct.unpack("=I", found[_MASTER])[0] if _MASTER in found else 0
    return Cable(index, name, master, _NETNS in found)


class PortWatch:
    """Calls `changed()` soon after a device or an IPv4 address came, changed or went, until closed. Needs a running loop."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._netlink = Netlink(_GROUPS)
        self._loop.add_reader(self._netlink.fileno(), self._read)

    def close(self) -> None:
        """Stop watching."""
        if self._timer:
            self._timer.cancel()
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # ENOBUFS: some were lost, and a look finds everything
            while self._netlink.receive():
                pass
        if self._timer is None:
            self._timer = self._loop.call_later(_SETTLE, self._look)

    def _look(self) -> None:
        self._timer = None
        self._changed()
