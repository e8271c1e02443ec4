"""Inner IPv4 packets as pure functions: header checks and the ICMP error for a destination that nobody has.

Nothing here raises for any input. Header checksums are left to the kernel, which verifies them when the packet comes out
of the TUN; the tunnel is a link, so it changes nothing in a packet, TTL included.
"""

from __future__ import annotations

import struct

from wincey.model.checksum import checksum

ICMP = 1
_ICMP_ERRORS = frozenset((3, 4, 5, 11, 12))  # RFC 1122, section 3.2.2: no error is sent in answer to one of these
_QUOTED = 576 - 20 - 8  # RFC 1812, section 4.3.2.3: as much of the packet as fits in 576 bytes


def fault(packet: bytes) -> str:
    """Why this is not one whole IPv4 packet, as a counter's name; "" when it is."""
    if len(packet) < 20:
        return "short"
    first = packet[0]
    if first >> 4 != 4:
        return "version"
    header = (first & 15) * 4
    if header < 20 or header > len(packet):
        return "header"
    if packet[2] << 8 | packet[3] != len(packet):
        return "length"
    return ""


def may_be_answered(packet: bytes) -> bool:
    """Whether an ICMP error may be sent for this packet (RFC 1122, section 3.2.2). `packet` has no `fault`."""
    source, destination = packet[12], packet[16]
    if destination >= 224 or source >= 224 or source in (0, 127):
        return False  # to or from multicast, broadcast, class E, "this host", loopback
    if (packet[6] << 8 | packet[7]) & 0x1FFF:
        return False  # not the first fragment
    if packet[9] == ICMP:
        header = (packet[0] & 15) * 4
        return len(packet) > header and packet[header] not in _ICMP_ERRORS
    return True


def net_unreachable(packet: bytes, source: bytes) -> bytes:
    """The ICMP destination unreachable, network unreachable (3/0) for `packet`, with its IPv4 header, for a raw socket.

    `source` is four bytes. The kernel fills in the header's id and checksum, and the source when it is 0.0.0.0 (raw(7)).
    """
    body = packet[:_QUOTED]
    head = struct.pack("!BBHI", 3, 0, 0, 0)
    head = struct.pack("!BBHI", 3, 0, checksum(head + body), 0)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0xC0, 28 + len(body), 0, 0, 64, ICMP, 0, source, packet[12:16])
    return header + head + body
