"""The offload engine in Python: large packets on the device, trains of datagrams on the socket.

The device hands over large packets and takes them (large.py); the socket sends a train of equal segments by one call
(UDP_SEGMENT, Linux 4.18) and receives merged ones (UDP_GRO). On the wire it is one packet in one datagram, with all its
checksums, as ever. `native` does the same in C; this one needs no compiled code.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable

from wincey.tunnel import device
from wincey.tunnel.large import HEADER, Merge, cut, pieces
from wincey.tunnel.packet import fault
from wincey.tunnel.relay import Relay, Target

_READS = 64  # frames of one batch from the device
_DATAGRAMS = 16  # of one batch from the socket, each up to a whole train
_SIZE = 65535
_DATAGRAM = 65507  # bytes of the largest UDP payload, that of a train included
_TRAIN = 64  # segments (UDP_MAX_SEGMENTS of older kernels)
_UDP_SEGMENT, _UDP_GRO = 103, 104  # linux/udp.h
_ANCILLARY = socket.CMSG_SPACE(4)
_REFUSED = (errno.EIO, errno.EINVAL, errno.EMSGSIZE)


class Offload(Relay):
    """Many packets in one system call, each way."""

    name = "offload"
    core = "python"

    def __init__(
        self, tun: int, udp: socket.socket, refuse: Callable[[bytes, float], bool], *, header: bool = False
    ) -> None:
        super().__init__(tun, udp, refuse, header=header)
        self._trains = self._merge_tcp = self._merge_udp = True
        self._limits: dict[Target, int] = {}  # segments larger than this go one by one to a peer

    def prepare(self) -> None:
        if not self.header:
            raise OSError(errno.EOPNOTSUPP, "the device was made without the virtio header")
        taken = device.set_offloads(self.tun, [device.ALL_OFFLOADS, device.TCP_OFFLOADS])
        self._merge_udp = taken == device.ALL_OFFLOADS
        device.set_merging(self.udp, on=True)

    def rebind(self, udp: socket.socket) -> None:
        super().rebind(udp)
        device.set_merging(udp, on=True)
        self._trains = True

    def update(self, records: bytes) -> None:
        super().update(records)
        self._limits.clear()

    def outbound(self) -> None:
        read, tun, known = os.read, self.tun, self._known.get
        train = _Train(self)
        for _ in range(_READS):
            try:
                frame = read(tun, _SIZE + HEADER)
            except BlockingIOError:
                break
            except OSError:
                train.send()
                raise
            unfinished = len(frame) > HEADER and (frame[1] or frame[0] & 1)
            packet = frame[HEADER:]
            target = known(packet[16:20]) if packet and packet[0] == 0x45 else None
            if target is None or unfinished:
                target = self._route(packet) if target is None or fault(packet) else target
                if target is None:
                    continue
            if not unfinished:
                train.add(packet, target)
                continue
            segments = cut(frame)
            if segments is None:
                self._count("out.drop.offload")
                continue
            for segment in segments:
                train.add(segment, target)
        train.send()

    def inbound(self) -> None:
        receive, known = self.udp.recvmsg, self._known.get
        merge = Merge(tcp=self._merge_tcp, udp=self._merge_udp)
        for _ in range(_DATAGRAMS):
            try:
                data, ancillary, _, sender = receive(_SIZE + 1, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # an error that an earlier send left on the socket
                self._failed("in.error.", error)
                continue
            size = 0
            for level, kind, value in ancillary:
                if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
                    size = struct.unpack_from("=i", value)[0]
            for packet in pieces(data, size):
                # An address that is known has four bytes, so the packet has the ones that are read after it.
                if (
                    known(packet[12:16]) != sender or packet[0] != 0x45 or packet[2] << 8 | packet[3] != len(packet)
                ) and not self._admit(packet, sender[0]):
                    continue
                if merge.packets:
                    if merge.add(packet):
                        continue
                    self._write(merge)
                if not merge.start(packet):
                    self._write_one(packet)
        self._write(merge)

    def _write(self, merge: Merge) -> None:
        """Write the large packet in the making, if there is one; raises OSError when the device is gone."""
        packets, merge.packets = merge.packets, []
        if not packets:
            return
        merge.packets = packets
        buffers = merge.finish()
        merge.packets = []
        try:
            written = os.writev(self.tun, buffers)
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.EBADF):
                raise
            if error.errno != errno.EINVAL or len(packets) == 1:
                self._failed("in.drop.", error, len(packets))
                return
            if packets[0][9] == socket.IPPROTO_TCP:  # a kernel that does not take it: never again
                merge.tcp = self._merge_tcp = False
            else:
                merge.udp = self._merge_udp = False
            for packet in packets:
                self._write_one(packet)
            return
        counters = self._counters
        counters["in.packets"] += len(packets)
        counters["in.bytes"] += sum(map(len, packets)) if len(packets) > 1 else written - HEADER
        self._count("in.writes")

    def _write_one(self, packet: bytes) -> None:
        try:
            os.writev(self.tun, (bytes(HEADER), packet))
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.EBADF):
                raise
            self._failed("in.drop.", error)
            return
        self._counters["in.packets"] += 1
        self._counters["in.bytes"] += len(packet)
        self._count("in.writes")

    def send_train(self, segments: list[bytes], length: int, target: Target) -> None:
        """Send segments of one size, and a last one that is no larger, by one call, or one by one where that is refused."""
        try:
            if len(segments) == 1:
                self.udp.sendto(segments[0], target)
            else:
                size = struct.pack("=H", len(segments[0]))
                self.udp.sendmsg(segments, [(socket.IPPROTO_UDP, _UDP_SEGMENT, size)], 0, target)
        except OSError as error:
            if len(segments) == 1 or error.errno not in _REFUSED:
                self._failed("out.drop.", error, len(segments))
                return
            if error.errno == errno.EIO:
                self._trains = False  # a device, or an IPsec policy, that can't have it at all
            else:
                self._limits[target] = len(segments[0]) - 1  # larger than the way there takes in one piece
            for segment in segments:
                self.send_train([segment], len(segment), target)
            return
        self._counters["out.packets"] += len(segments)
        self._counters["out.bytes"] += length
        self._count("out.sends")

    def alone(self, length: int, target: Target) -> bool:
        """Whether a segment of that length can't be in a train."""
        return not self._trains or length > self._limits.get(target, _DATAGRAM)


class _Train:
    """Segments to send by one call: all of one size but the last, which may be shorter."""

    def __init__(self, engine: Offload) -> None:
        self._engine = engine
        self._segments: list[bytes] = []
        self._bytes = 0
        self._target: Target = ("", 0)
        self._closed = True

    def add(self, segment: bytes, target: Target) -> None:
        """Put one more at the end, or send what is there and begin again."""
        length = len(segment)
        segments = self._segments
        if (
            self._closed
            or length > len(segments[0])
            or target != self._target
            or len(segments) == _TRAIN
            or self._bytes + length > _DATAGRAM
        ):
            self.send()
            self._segments = [segment]
            self._bytes, self._target = length, target
            self._closed = self._engine.alone(length, target)
            return
        self._closed = length < len(segments[0])
        segments.append(segment)
        self._bytes += length

    def send(self) -> None:
        """Send what is there."""
        if self._segments:
            self._engine.send_train(self._segments, self._bytes, self._target)
            self._segments, self._closed = [], True
