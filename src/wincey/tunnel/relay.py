"""The data path: packets between the TUN and the UDP socket. This module is the plain engine, and what engines share.

An engine has the methods of `Relay`. The plain one needs nothing of the kernel and of the host but a TUN and a socket: one
system call each way for each packet. `offload` and `native` move many packets at once; which one runs, engines.py decides.

A common packet is one whose addresses were seen before: one dictionary probe decides it, and nothing is called but read
and send. Everything else (new destinations, bad packets, unknown senders) takes a slow path of its own. Packets arrive
and leave as `bytes`: copying into a shared buffer saves one allocation and costs two views, which is slower.

What is dropped is counted by direction and reason. No error of a send ends the loop; the tunnel is a link, and links drop.

Engines take each other's place at any time, also beside one of an earlier release, so each understands what its predecessor
left in the device and in the socket: packets that the kernel did not finish, and datagrams that it merged.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable

from wincey.tunnel import device
from wincey.tunnel.large import HEADER, cut, pieces
from wincey.tunnel.packet import fault
from wincey.tunnel.sources import SourceCheck
from wincey.tunnel.table import PeerTable

Target = tuple[str, int]

_BATCH = 64  # packets
_SIZE = 65535  # the largest IPv4 packet: an MTU that someone raised truncates nothing
_REMEMBERED = 8192  # addresses


class Relay:
    """Forwards between a TUN descriptor and a UDP socket, both non-blocking, by a table of peers.

    refuse: told of each whole IPv4 packet that no peer is for, with the time in seconds of the monotonic clock; answers
    whether it sent an ICMP error. header: whether packets on the device have the virtio header (large.HEADER bytes).
    counters: by name, `out` is from the TUN to the underlay; see the code for the reasons.
    """

    name = "plain"
    core = ""  # what does an engine's work where there is a choice: "compiled" or "python"

    def __init__(
        self, tun: int, udp: socket.socket, refuse: Callable[[bytes, float], bool], *, header: bool = False
    ) -> None:
        self.tun = tun
        self.udp = udp
        self.header = header
        self.table = PeerTable()
        self.check = SourceCheck()
        self._counters = dict.fromkeys(("in.packets", "in.bytes", "out.packets", "out.bytes"), 0)
        self._port: int = udp.getsockname()[1]
        self._refuse = refuse
        self._known: dict[bytes, Target] = {}  # inner address -> UDP address of the peer that has it
        self._poll: select.epoll | None = None

    @property
    def counters(self) -> dict[str, int]:
        """By name, since the tunnel was first made."""
        return self._counters

    def prepare(self) -> None:
        """Have device and socket work as this engine needs it. Raises OSError when the kernel has it not."""
        if self.header:
            device.set_offloads(self.tun, [device.NO_OFFLOADS])
        device.set_merging(self.udp, on=False)

    def follow(self, other: Relay) -> None:
        """Take peers, rules and counters of another engine."""
        self.update(other.table.records())
        self.restrict(other.check)
        self.restore(other.counters)

    def restore(self, counters: dict[str, int]) -> None:
        """Count on from here."""
        self._counters.update(counters)

    def restrict(self, check: SourceCheck) -> None:
        """Change which inner sources may enter."""
        self.check = check
        self._known.clear()

    def rebind(self, udp: socket.socket) -> None:
        """Go on with another UDP socket; the caller closes the old one."""
        self.udp = udp
        self._port = udp.getsockname()[1]
        self._known.clear()
        self._unpoll()

    def update(self, records: bytes) -> None:
        """Change the peers; raises ValueError (see table.PeerTable)."""
        self.table.update(records)
        self._known.clear()

    def forward(self, control: int) -> None:
        """Move packets until the descriptor `control` is readable; raises OSError when the device is gone."""
        tun = self.tun
        wait = self._epoll(control).poll
        told = False
        while not told:
            for descriptor, _ in wait():
                if descriptor == tun:
                    self.outbound()
                elif descriptor == control:
                    told = True
                else:
                    self.inbound()

    def close(self) -> None:
        """Release what is the engine's own; device and socket are the keeper's."""
        self._unpoll()

    def outbound(self) -> None:
        """Send what the TUN has, at most a batch; raises OSError when the device is gone."""
        read, tun, known, send = os.read, self.tun, self._known.get, self.udp.sendto
        skip = HEADER if self.header else 0
        packets = octets = 0
        for _ in range(_BATCH):
            try:
                frame = read(tun, _SIZE + skip)
            except BlockingIOError:
                break
            packet = frame[skip:]
            # With a known destination and no options nothing more is looked at: the kernel's IP output made the rest.
            target = known(packet[16:20]) if packet and packet[0] == 0x45 else None
            if target is None:
                target = self._route(packet)
                if target is None:
                    continue
            if skip and (
                frame[1] or frame[0] & 1
            ):  # read after another engine, which lets the kernel leave it unfinished
                self._send_all(cut(frame), target)
                continue
            try:
                send(packet, target)
            except OSError as error:
                self._failed("out.drop.", error)
                continue
            packets += 1
            octets += len(packet)
        self._counters["out.packets"] += packets
        self._counters["out.bytes"] += octets

    def inbound(self) -> None:
        """Write to the TUN what the UDP socket has, at most a batch; raises OSError when the device is gone."""
        receive, write, tun, known = self.udp.recvfrom, os.writev, self.tun, self._known.get
        prefix = bytes(HEADER if self.header else 0)
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
            if known(packet[12:16]) != sender or packet[0] != 0x45 or packet[2] << 8 | packet[3] != len(packet):
                entering = [piece for piece in pieces(packet, 0) if self._admit(piece, sender[0])]
            else:
                entering = [packet]
            for piece in entering:
                try:
                    write(tun, (prefix, piece))
                except OSError as error:
                    if error.errno in (errno.EBADFD, errno.EBADF):
                        raise
                    self._failed("in.drop.", error)
                    continue
                packets += 1
                octets += len(piece)
        self._counters["in.packets"] += packets
        self._counters["in.bytes"] += octets

    def _send_all(self, segments: list[bytes] | None, target: Target) -> None:
        """Send what one large packet was cut into."""
        if segments is None:
            self._count("out.drop.offload")
            return
        for segment in segments:
            try:
                self.udp.sendto(segment, target)
            except OSError as error:
                self._failed("out.drop.", error)
                continue
            self._count("out.packets")
            self._count("out.bytes", len(segment))

    def _route(self, packet: bytes) -> Target | None:
        """Where a packet from the TUN goes that no address is known for; None when it was dropped."""
        reason = fault(packet)
        if reason:  # version: IPv6 router solicitations, which every device sends when it comes up
            self._count("out.drop." + reason)
            return None
        target = self._find(packet[16:20])
        if target is None:
            self._count("out.drop.no-peer")
            self._answer(packet)
        return target

    def _answer(self, packet: bytes) -> None:
        """Tell the sender of a packet that nobody has."""
        if self._refuse(packet, time.monotonic()):
            self._count("out.unreachable")

    def _admit(self, packet: bytes, host: str) -> bool:
        """Whether an uncommon packet from the underlay host `host` may enter; counts why not."""
        reason = fault(packet)
        if reason:
            self._count("in.drop." + reason)
            return False
        # An unknown host is only counted, as flannel checks nothing here: a new host's packets may be faster than its
        # lease, and a peer behind NAT sends from another address than it publishes.
        if socket.inet_aton(host) not in self.table.endpoints:
            self._count("in.unknown-source")
            return True
        source = packet[12:16]
        owner = self._find(source)
        if owner is not None and owner[0] == host:
            return True
        # What a peer's host forwards without masquerading has foreign inner sources for good reasons; a source that
        # another host has leased has none.
        if self.check.mode != "off" and (owner is not None or self.check.refuses(source)):
            self._count("in.drop.source")
            return False
        self._count("in.foreign-source")
        return True

    def _find(self, address: bytes) -> Target | None:
        endpoint = self.table.lookup(address)
        if endpoint is None:
            return None
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        target = self._known[address] = (socket.inet_ntoa(endpoint), self._port)
        return target

    def _failed(self, prefix: str, error: OSError, count: int = 1) -> None:
        self._count(prefix + errno.errorcode.get(error.errno or 0, "error"), count)

    def _count(self, name: str, count: int = 1) -> None:
        self._counters[name] = self._counters.get(name, 0) + count

    def _epoll(self, control: int) -> select.epoll:
        """What waits for device, socket and `control`; made anew after one of them has changed."""
        if self._poll is None:
            self._poll = select.epoll()
            for descriptor in (self.tun, self.udp.fileno(), control):
                self._poll.register(descriptor, select.EPOLLIN)
        return self._poll

    def _unpoll(self) -> None:
        if self._poll is not None:
            self._poll.close()
            self._poll = None
