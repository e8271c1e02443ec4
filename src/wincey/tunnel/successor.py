"""Notices that flannel wants to take over a tunnel that no daemon of ours looks after any more.

Flannel opens a device `flannelN` of its own, gives it the address that ours has, and fails because the UDP port is ours; its
supervisor starts it again. So a device of that name that had our address and has gone means: make room. Without this, the
way back to flannel would need a clean-up by hand. (A tunnel can't end with its daemon, which may be restarted any moment.)
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator

_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR = 0x1, 0x10  # linux/rtnetlink.h
_RTM_DELLINK, _RTM_NEWADDR = 17, 20
_IFA_LOCAL = 2  # linux/if_addr.h
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_READ = 1 << 16


class Successor:
    """Watches the network namespace that it is made in. `socket` is readable when there is something to look at."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        self.socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR))
        self._rivals: set[int] = set()

    def came_and_went(self, device: str, address: bytes) -> bool:
        """Whether, by what was told since the last call, flannel tried. device, address: the tunnel's own (IPv4)."""
        gone = False
        for kind, data in self._messages():
            index = struct.unpack_from("=i", data, 4)[0]  # in struct ifaddrmsg as in struct ifinfomsg
            if kind == _RTM_NEWADDR and _local_address(data) == address and _is_rival(index, device):
                self._rivals.add(index)
            elif kind == _RTM_DELLINK and index in self._rivals:
                self._rivals.discard(index)
                gone = True
        return gone

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while True:
            try:
                data = self.socket.recv(_READ)
            except OSError:  # nothing more; or more than the buffer holds, and then the next attempt of flannel tells
                return
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                yield kind, data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def _local_address(message: bytes) -> bytes:
    attributes = message[8:]
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _IFA_LOCAL:
            return attributes[4:length]
        attributes = attributes[max(4, (length + 3) & ~3) :]
    return b""


def _is_rival(index: int, device: str) -> bool:
    try:
        name = socket.if_indextoname(index)
    except OSError:  # gone already: nobody else gives a device this address
        return True
    return name != device and re.fullmatch(r"flannel\d+", name) is not None
