"""Large packets as pure functions: cut into the packets that they stand for, and made of consecutive ones.

The kernel hands a large packet to a device that says it can segment, and takes one from it, with a virtio header in front
(struct virtio_net_hdr, include/uapi/linux/virtio_net.h). The same in C is core/cut.c and core/merge.c; the tests compare
the two byte for byte. Nothing here raises for any input of bytes.

A checksum's sum (RFC 1071) is the number that the bytes are, modulo 65535: in Python that is the fastest way by far.
"""

from __future__ import annotations

import struct

from wincey.tunnel.packet import fault

HEADER = 10
"""Bytes of the virtio header."""

_VIRTIO = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; in host byte order
_NEEDS_CSUM = 1
_TCPV4, _UDP_L4, _ECN = 1, 5, 0x80
_TCP, _UDP = 6, 17
_FIN, _PSH, _ACK, _ECE, _CWR = 0x01, 0x08, 0x10, 0x40, 0x80
_LARGEST = 65535  # bytes of a packet
_MERGED = 128  # packets in a large one


def total(data: bytes | bytearray) -> int:
    """The sum of 16-bit words modulo 65535, a last odd byte padded."""
    number = int.from_bytes(data, "big")
    return (number << 8 if len(data) & 1 else number) % 65535


def pieces(data: bytes, size: int) -> list[bytes]:
    """The packets in a datagram. size: of each but the last, as the kernel says that merged them; 0 where it says nothing.

    Where it says nothing, the datagram may still be one that was merged for the socket's owner before us: if the first
    packet's own length divides it into packets of that size, and a last one that is no larger, that is what it is.
    """
    if not size:
        size = data[2] << 8 | data[3] if len(data) >= 20 else 0
        if not 20 <= size < len(data):
            return [data]
        for at in range(0, len(data), size):
            left = len(data) - at
            if left < 20 or data[at] >> 4 != 4 or data[at + 2] << 8 | data[at + 3] != min(left, size):
                return [data]
    if len(data) <= size:
        return [data]
    return [data[at : at + size] for at in range(0, len(data), size)]


def cut(frame: bytes) -> list[bytes] | None:
    """What to send for a frame (virtio header and a whole IPv4 packet): packets with all checksums. None: it is malformed."""
    flags, kind, _, size, start, offset = _VIRTIO.unpack_from(frame)
    packet = frame[HEADER:]
    if fault(packet):
        return None
    if kind:
        return _cut_large(packet, kind, size)
    if not flags & _NEEDS_CSUM:
        return [packet]
    field = start + offset
    if field + 2 > len(packet):
        return None
    value = 65535 - _sum_of(packet, start)
    if not value and packet[9] == _UDP:
        value = 65535  # 0 says "no checksum" (RFC 768)
    return [packet[:field] + value.to_bytes(2, "big") + packet[field + 2 :]]


def _sum_of(packet: bytes, start: int) -> int:
    """The sum from `start` on as the one's complement has it: 65535, not 0, when there is anything but zeros."""
    rest = packet[start:]
    return total(rest) or (65535 if any(rest) else 0)


def _cut_large(packet: bytes, kind: int, size: int) -> list[bytes] | None:
    ip = (packet[0] & 15) * 4
    protocol = packet[9]
    tcp = kind & ~_ECN == _TCPV4
    if not size or (packet[6] << 8 | packet[7]) & 0x3FFF:
        return None
    if tcp:
        if protocol != _TCP or len(packet) < ip + 20:
            return None
        header = ip + (packet[ip + 12] >> 4) * 4
        if header < ip + 20:
            return None
    elif kind == _UDP_L4 and protocol == _UDP:
        header = ip + 8
    else:
        return None
    if len(packet) <= header:
        return None
    return _segments(packet, ip, header, size, tcp=tcp)


def _segments(packet: bytes, ip: int, header: int, size: int, *, tcp: bool) -> list[bytes]:
    """A large packet cut: each segment has the headers with its own length, id, sequence number, flags and checksums."""
    head = bytearray(packet[:header])
    identity = head[4] << 8 | head[5]
    sequence = int.from_bytes(head[ip + 4 : ip + 8], "big") if tcp else 0
    flags = head[ip + 13] if tcp else 0
    check = ip + (16 if tcp else 6)
    head[2:6] = bytes(4)
    head[10:12] = head[check : check + 2] = bytes(2)
    if tcp:
        head[ip + 4 : ip + 8] = bytes(4)
        head[ip + 13] = 0
    else:
        head[ip + 4 : ip + 6] = bytes(2)
    network = total(head[:ip])
    transport = total(head[ip:]) + total(packet[12:20]) + packet[9]
    made = []
    end = len(packet)
    for start in range(header, end, size):
        payload = packet[start : start + size]
        length = header + len(payload)
        below = length - ip
        put = struct.pack_into
        put("!HH", head, 2, length, identity)
        put("!H", head, 10, -(network + length + identity) % 65535)
        if tcp:
            now = flags
            if start + size < end:
                now &= ~(_FIN | _PSH)
            if start != header:
                now &= ~_CWR
            put("!I", head, ip + 4, sequence)
            head[ip + 13] = now
            value = -(transport + below + sequence + now + total(payload)) % 65535
            sequence = (sequence + size) & 0xFFFFFFFF
        else:
            put("!H", head, ip + 4, below)
            value = -(transport + below + below + total(payload)) % 65535 or 65535
        put("!H", head, check, value)
        made.append(bytes(head) + payload)
        identity = (identity + 1) & 0xFFFF
    return made


class Merge:
    """A large packet in the making: consecutive packets of one flow, all alike but for what cutting puts back.

    All checksums are verified when there is a second packet, as the kernel takes a large packet for verified; a packet that
    stays alone is left to the kernel's own verification.
    """

    def __init__(self, *, tcp: bool, udp: bool) -> None:
        self.tcp = tcp
        self.udp = udp
        self.packets: list[bytes] = []

    def start(self, packet: bytes) -> bool:
        """Begin with a whole IPv4 packet; False when it can't be part of a large one."""
        header = self._header(packet)
        if not header:
            return False
        self.packets = [packet]
        self._size = self._payload = len(packet) - header
        self._head = header
        self._is_tcp = packet[9] == _TCP
        self._flags = packet[33] if self._is_tcp else 0
        self._closed = bool(self._flags & (_FIN | _PSH))
        self._verified = False
        return True

    def add(self, packet: bytes) -> bool:
        """Add the next one; False when it is not the next one of this flow."""
        header, first = self._head, self.packets[0]
        payload = len(packet) - header
        count = len(self.packets)
        if (
            self._closed
            or not 0 < payload <= self._size
            or count == _MERGED
            or header + self._payload + payload > _LARGEST
            or self._header(packet) != header
            or not self._alike(first, packet)
        ):
            return False
        step = (packet[4] << 8 | packet[5]) - (first[4] << 8 | first[5]) & 0xFFFF
        if count == 1:
            self._step = 1 if step or not first[6] & 0x40 else 0  # with DF, ids mean nothing, and may be all alike
        if step != self._step * count:
            return False
        if self._is_tcp:
            expected = int.from_bytes(first[24:28], "big") + self._payload & 0xFFFFFFFF
            if int.from_bytes(packet[24:28], "big") != expected:
                return False
        if not self._verified and not _verified(first):
            return False
        self._verified = True
        if not _verified(packet):
            return False
        if self._is_tcp:
            self._flags |= packet[33]
        self.packets.append(packet)
        self._payload += payload
        self._closed = payload < self._size or bool(self._flags & (_FIN | _PSH))
        return True

    def finish(self) -> list[bytes]:
        """What to write to the device at once."""
        header, first = self._head, self.packets[0]
        if len(self.packets) == 1:
            return [bytes(HEADER), first]
        head = bytearray(first[:header])
        length = header + self._payload
        struct.pack_into("!H", head, 2, length)
        struct.pack_into("!H", head, 10, 0)
        struct.pack_into("!H", head, 10, -total(head[:20]) % 65535)
        if self._is_tcp:
            head[33] = self._flags
            kind, field = _TCPV4, 16
        else:
            struct.pack_into("!H", head, 24, length - 20)
            kind, field = _UDP_L4, 6
        partial = (total(head[12:20]) + head[9] + length - 20) % 65535 or 65535
        struct.pack_into("!H", head, 20 + field, partial)
        virtio = _VIRTIO.pack(_NEEDS_CSUM, kind, header, self._size, 20, field)
        return [virtio + head, *[packet[header:] for packet in self.packets]]

    def _header(self, packet: bytes) -> int:
        """The bytes of both headers if a packet may be part of a large one, else 0."""
        if packet[0] != 0x45 or (packet[6] << 8 | packet[7]) & 0xBFFF:  # IP options; a fragment; the reserved bit
            return 0
        length = len(packet)
        if packet[9] == _TCP and self.tcp and length > 40:
            header = 20 + (packet[32] >> 4) * 4
            plain = packet[33] & ~(_FIN | _PSH | _ECE) == _ACK
            return header if 40 <= header < length and plain else 0
        if packet[9] == _UDP and self.udp and length > 28:
            whole = packet[24] << 8 | packet[25] == length - 20
            return 28 if whole and packet[26:28] != b"\0\0" else 0
        return 0

    def _alike(self, a: bytes, b: bytes) -> bool:
        """Whether two packets of the same header length are of one flow and may be in one large packet."""
        if a[:2] != b[:2] or a[6:10] != b[6:10] or a[12:24] != b[12:24]:
            return False  # version, TOS; fragment flags, TTL, protocol; addresses and ports
        if not self._is_tcp:
            return True
        return (  # acknowledgement, offset; flags; window; urgent pointer, options
            a[28:33] == b[28:33]
            and not (a[33] ^ b[33]) & ~(_FIN | _PSH)
            and a[34:36] == b[34:36]
            and a[38 : self._head] == b[38 : self._head]
        )


def _verified(packet: bytes) -> bool:
    if total(packet[:20]):
        return False
    return (total(packet[12:20]) + packet[9] + len(packet) - 20 + total(packet[20:])) % 65535 == 0
