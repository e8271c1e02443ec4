"""What the kernel has counted on a device (rtnetlink IFLA_STATS64; linux/if_link.h, struct rtnl_link_stats64)."""

from __future__ import annotations

import struct

import msgspec

from wincey.kernel.netlink import Netlink, NetlinkError, attribute, attributes, message
from wincey.kernel.rtnl import RTM_GETLINK

_IFINFO = struct.Struct("=BxHiII")
_IFLA_IFNAME, _IFLA_STATS64 = 3, 23
_COUNTED = struct.Struct("=8Q")


class DeviceTraffic(msgspec.Struct, frozen=True):
    """Packets, bytes, errors and drops of both directions, in the kernel's order."""

    receive_packets: int
    transmit_packets: int
    receive_bytes: int
    transmit_bytes: int
    receive_errors: int
    transmit_errors: int
    receive_dropped: int
    transmit_dropped: int


def device_traffic(name: str) -> DeviceTraffic | None:
    """The counters of a device, None when there is none of that name; raises OSError when the kernel does not answer."""
    netlink = Netlink()
    try:
        body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
        _, data, start, end = netlink.request(message(RTM_GETLINK, 0, body))
    except NetlinkError:
        return None
    finally:
        netlink.close()
    counted = attributes(data, start + _IFINFO.size, end).get(_IFLA_STATS64)
    return DeviceTraffic(*_COUNTED.unpack_from(counted)) if counted else None
