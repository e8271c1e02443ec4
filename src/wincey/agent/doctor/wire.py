"""Two looks at the wire itself: who answers to an IPv4 address (ARP, RFC 826), and where encapsulated packets come from.

Raw packet sockets; nothing is sent but ARP requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterable, Mapping

from wincey.model.address import Address, MacAddress, format_mac

_ETH_P_IP, _ETH_P_ARP = 0x0800, 0x0806
_OUTGOING = 4
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_REQUEST, _REPLY = 1, 2


class ArpWatch:
    """Collects who answers. Use it as a context manager; raises OSError where packet sockets can't be had."""

    def __init__(self, device: str, mac: MacAddress) -> None:
        self._mac = mac
        self.answers: dict[Address, set[str]] = {}
        self._socket = socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ARP)
        )
        self._device = device
        try:
            self._socket.bind((device, _ETH_P_ARP))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> ArpWatch:
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def ask(self, source: Address, targets: Iterable[Address]) -> None:
        """Ask for each; for our own address as RFC 5227 probes do, so that nobody takes it for news."""
        broadcast = (self._device, _ETH_P_ARP, 0, 1, b"\xff" * 6)
        for target in targets:
            sender = bytes(4) if target == source else source
            packet = _ARP.pack(1, _ETH_P_IP, 6, 4, _REQUEST, self._mac, sender, bytes(6), target)
            with contextlib.suppress(OSError):
                self._socket.sendto(packet, broadcast)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while True:
                data, _ = self._socket.recvfrom(256)
                if len(data) >= _ARP.size:
                    *_, operation, mac, sender, _, _ = _ARP.unpack_from(data)
                    if operation == _REPLY and mac != self._mac:
                        self.answers.setdefault(sender, set()).add(format_mac(mac))


class Sources:
    """Collects the outer source addresses of encapsulated IPv4 packets, by the inner source. Likewise a context manager.

    header: bytes between the UDP header and the inner IP header.
    """

    def __init__(self, device: str, port: int, header: int, wanted: Iterable[Address]) -> None:
        self._port, self._header, self._wanted = port, header, set(wanted)
        self._found: dict[Address, set[Address]] = {}
        self._socket = socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_IP)
        )
        try:
            self._socket.bind((device, _ETH_P_IP))
        except BaseException:
            self._socket.close()
            raise

    @property
    def found(self) -> Mapping[Address, set[Address]]:
        """Outer addresses by inner ones."""
        return self._found

    def __enter__(self) -> Sources:
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            for _ in range(256):  # then others have their turn
                data, sender = self._socket.recvfrom(128)
                if sender[2] != _OUTGOING:
                    self._take(data)

    def _take(self, data: bytes) -> None:
        start = (data[0] & 0x0F) * 4 if data else 0
        inner = start + 8 + self._header
        if len(data) < inner + 20 or data[9] != socket.IPPROTO_UDP:
            return
        if int.from_bytes(data[start + 2 : start + 4], "big") == self._port:
            source = data[inner + 12 : inner + 16]
            if source in self._wanted:
                self._found.setdefault(source, set()).add(data[12:16])
