"""Tells conntrack that it has not seen all of some TCP connections (kernel: net/netfilter/nf_conntrack_netlink.c).

Otherwise it takes their next segments for strays (INVALID), as they are far outside of the window that it knows.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from wincey.kernel.netlink import BATCH_MESSAGES, Netlink, attribute, message
from wincey.model.address import Address

_NETLINK_NETFILTER = 12
_CT_NEW = 1 << 8  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW: without NLM_F_CREATE it changes one that is there
_BODY = struct.pack("=BBH", socket.AF_INET, 0, 0)
_NESTED = 0x8000
_TUPLE, _TUPLE_IP, _TUPLE_PROTOCOL, _INFO, _INFO_TCP = 1, 1, 2, 4, 1
_TCP_FLAGS = (4, 5)  # of the original direction, of the reply's
_BE_LIBERAL = b"\x08\x08"  # the flag, and which flags are meant


class Connection(NamedTuple):
    """A TCP connection by the addresses and ports of either direction's packets."""

    source: Address
    destination: Address
    source_port: int
    destination_port: int


def be_liberal(connections: Iterable[Connection]) -> None:
    """No longer judge these by their windows, until they end; those that conntrack does not know are passed over. Raises OSError."""
    requests = [encode(each) for each in connections]
    if not requests:
        return
    netlink = Netlink(protocol=_NETLINK_NETFILTER)
    try:
        for start in range(0, len(requests), BATCH_MESSAGES):
            netlink.transact(requests[start : start + BATCH_MESSAGES])
    finally:
        netlink.close()


def encode(connection: Connection) -> bytes:
    """The request for one connection."""
    addresses = attribute(1, connection.source) + attribute(2, connection.destination)
    ports = attribute(1, bytes([socket.IPPROTO_TCP]))
    ports += attribute(2, struct.pack(">H", connection.source_port))
    ports += attribute(3, struct.pack(">H", connection.destination_port))
    flags = b"".join(attribute(kind, _BE_LIBERAL) for kind in _TCP_FLAGS)
    return message(
        _CT_NEW,
        0,
        _BODY
        + attribute(
            _TUPLE | _NESTED, attribute(_TUPLE_IP | _NESTED, addresses) + attribute(_TUPLE_PROTOCOL | _NESTED, ports)
        )
        + attribute(_INFO | _NESTED, attribute(_INFO_TCP | _NESTED, flags)),
    )
