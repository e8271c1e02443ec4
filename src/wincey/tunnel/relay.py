"""The data path: packets between the TUN and the UDP socket, one system call each way for each packet.

This module is the engine. The keeper calls `outbound` when the TUN is readable and `inbound` when the UDP socket is; each
moves at most a batch, so that neither direction, nor the control socket, waits for the other under load. A faster engine
has the same few methods.

A common packet is one whose addresses were seen before: one dictionary probe decides it, and nothing is called but read
and send. Everything else (new destinations, bad packets, unknown senders) takes a slow path of its own. Packets arrive
and leave as `bytes`: copying into a shared buffer saves one allocation and costs two views, which is slower.

What is dropped is counted by direction and reason. No error of a send ends the loop; the tunnel is a link, and links drop.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable

from wincey.tunnel.packet import fault
from wincey.tunnel.table import PeerTable

_BATCH = 64  # packets
_SIZE = 65535  # the largest IPv4 packet: an MTU that someone raised truncates nothing
_REMEMBERED = 8192  # addresses


class Relay:
    """Forwards between a TUN descriptor and a UDP socket, both non-blocking, by a table of peers.

    refuse: told of each whole IPv4 packet that no peer is for, with the time in seconds of the monotonic clock; answers
    whether it sent an ICMP error. counters: by name, `out` is from the TUN to the underlay; see the code for the reasons.
    """

    def __init__(self, tun: int, udp: socket.socket, refuse: Callable[[bytes, float], bool]) -> None:
        self.tun = tun
        self.udp = udp
        self.table = PeerTable()
        self.counters = dict.fromkeys(("in.packets", "in.bytes", "out.packets", "out.bytes"), 0)
        self._port: int = udp.getsockname()[1]
        self._refuse = refuse
        self._known: dict[bytes, tuple[str, int]] = {}  # inner address -> UDP address of the peer that has it

    def rebind(self, udp: socket.socket) -> None:
        """Go on with another UDP socket; the caller closes the old one."""
        self.udp = udp
        self._port = udp.getsockname()[1]
        self._known.clear()

    def update(self, records: bytes) -> None:
        """Change the peers; raises ValueError (see table.PeerTable)."""
        self.table.update(records)
        self._known.clear()

    def outbound(self) -> None:
        """Send what the TUN has, at most a batch; raises OSError when the device is gone."""
        read, tun, known, send = os.read, self.tun, self._known.get, self.udp.sendto
        packets = octets = 0
        for _ in range(_BATCH):
            try:
                packet = read(tun, _SIZE)
            except BlockingIOError:
                break
            # Of a known destination only the version is looked at: the rest was made by the kernel's IP output.
            target = known(packet[16:20]) if packet and packet[0] >> 4 == 4 else None
            if target is None:
                target = self._route(packet)
                if target is None:
                    continue
            try:
                send(packet, target)
            except OSError as error:
                self._failed("out.drop.", error)
                continue
            packets += 1
            octets += len(packet)
        self.counters["out.packets"] += packets
        self.counters["out.bytes"] += octets

    def inbound(self) -> None:
        """Write to the TUN what the UDP socket has, at most a batch; raises OSError when the device is gone."""
        receive, write, tun, known = self.udp.recvfrom, os.write, self.tun, self._known.get
        packets = octets = 0
        for _ in range(_BATCH):
            try:
                packet, sender = receive(_SIZE)
            except BlockingIOError:
                break
            except OSError as error:  # an error that an earlier send left on the socket
                self._failed("in.error.", error)
                continue
            # An address that is known has four bytes, so the packet has the ones that are read after it.
            if (
                known(packet[12:16]) != sender or packet[0] != 0x45 or packet[2] << 8 | packet[3] != len(packet)
            ) and not self._admit(packet, sender[0]):
                continue
            try:
                write(tun, packet)
            except OSError as error:
                if error.errno == errno.EBADFD:
                    raise
                self._failed("in.drop.", error)
                continue
            packets += 1
            octets += len(packet)
        self.counters["in.packets"] += packets
        self.counters["in.bytes"] += octets

    def _route(self, packet: bytes) -> tuple[str, int] | None:
        """Where a packet from the TUN goes that no address is known for; None when it was dropped."""
        reason = fault(packet)
        if reason:  # version: IPv6 router solicitations, which every device sends when it comes up
            self._count("out.drop." + reason)
            return None
        target = self._find(packet[16:20])
        if target is None:
            self._count("out.drop.no-peer")
            if self._refuse(packet, time.monotonic()):
                self._count("out.unreachable")
        return target

    def _admit(self, packet: bytes, host: str) -> bool:
        """Whether an uncommon packet from the underlay host `host` may enter; counts why not."""
        reason = fault(packet)
        if reason:
            self._count("in.drop." + reason)
            return False
        # Who sends is only counted: flannel checks nothing here. A new host's packets may be faster than its lease, a peer
        # behind NAT sends from another address than it publishes, and what a peer's host forwards without masquerading has
        # foreign inner sources for good reasons.
        if socket.inet_aton(host) not in self.table.endpoints:
            self._count("in.unknown-source")
            return True
        owner = self._find(packet[12:16])
        if owner is None or owner[0] != host:
            self._count("in.foreign-source")
        return True

    def _find(self, address: bytes) -> tuple[str, int] | None:
        endpoint = self.table.lookup(address)
        if endpoint is None:
            return None
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        target = self._known[address] = (socket.inet_ntoa(endpoint), self._port)
        return target

    def _failed(self, prefix: str, error: OSError) -> None:
        self._count(prefix + errno.errorcode.get(error.errno or 0, "error"))

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
