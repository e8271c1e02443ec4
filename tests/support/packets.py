"""IPv4 packets made and read by hand: frames for programs to run on, captures in which every checksum is verified."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path
from typing import NamedTuple

TCP, UDP = 6, 17
VXLAN_PORT, UDP_PORT = 8472, 8285
MAC_A, MAC_B = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


class BadPacket(Exception):
    """A checksum or a length that is wrong."""


def ones_sum(data: bytes) -> int:
    """RFC 1071: the ones' complement sum of 16-bit words."""
    data += b"\0" * (len(data) & 1)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def address(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def ether(payload: bytes, source: bytes = MAC_A, destination: bytes = bytes(6), kind: int = 0x0800) -> bytes:
    """A frame. The usual destination is what the kernel takes for "to this host" in a test run."""
    return destination + source + struct.pack(">H", kind) + payload


def ip(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    tos: int = 0,
    fragment: int = 0,
    options: bytes = b"",
    length: int | None = None,
) -> bytes:
    """An IPv4 packet; `fragment` is the whole field with its flags. length: told instead of the real one."""
    size = 20 + len(options) + len(payload)
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45 + len(options) // 4, tos, size if length is None else length, 7, fragment, ttl, protocol, 0,
        address(source), address(destination),
    ) + options  # fmt: skip
    return header[:10] + struct.pack(">H", 0xFFFF - ones_sum(header)) + header[12:] + payload


def _transport(source: str, destination: str, protocol: int, header: bytes, at: int, payload: bytes) -> bytes:
    pseudo = address(source) + address(destination) + struct.pack(">BBH", 0, protocol, len(header) + len(payload))
    value = 0xFFFF - ones_sum(pseudo + header + payload)
    return header[:at] + struct.pack(">H", value or 0xFFFF) + header[at + 2 :] + payload


def tcp(
    source: str, destination: str, ports: tuple[int, int], payload: bytes = b"", *, flags: int = 0x10, **rest: object
) -> bytes:
    """A TCP segment in an IPv4 packet. `rest` goes to `ip`."""
    header = struct.pack(">HHIIBBHHH", *ports, 1, 1, 0x50, flags, 1000, 0, 0)
    return ip(source, destination, TCP, _transport(source, destination, TCP, header, 16, payload), **rest)  # type: ignore[arg-type]  # what ip takes


def udp(
    source: str, destination: str, ports: tuple[int, int], payload: bytes = b"", *, check: bool = True, **rest: object
) -> bytes:
    """A datagram in an IPv4 packet. check: with a checksum. `rest` goes to `ip`."""
    header = struct.pack(">HHHH", *ports, 8 + len(payload), 0)
    datagram = _transport(source, destination, UDP, header, 6, payload) if check else header + payload
    return ip(source, destination, UDP, datagram, **rest)  # type: ignore[arg-type]  # likewise


def vxlan(inner: bytes, source: str, destination: str, vni: int = 1, *, flags: int = 0x08, **rest: object) -> bytes:
    """A frame in VXLAN in an IPv4 packet."""
    return udp(
        source, destination, (50000, VXLAN_PORT), bytes([flags, 0, 0, 0]) + struct.pack(">I", vni << 8) + inner,
        check=False, **rest,
    )  # fmt: skip


class Seen(NamedTuple):
    """One packet of a capture. wrapped: inside a tunnel's packet, whose source is `outer`."""

    source: str
    destination: str
    protocol: int
    ttl: int
    size: int
    wrapped: bool = False
    outer: str = ""


def verify(packet: bytes) -> Seen:
    """Check every length and checksum of an IPv4 packet, of a packet in it too; raises BadPacket. Tells the innermost."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        raise BadPacket(f"no IPv4 packet: {packet[:20].hex()}")
    header = (packet[0] & 15) * 4
    (size,) = struct.unpack_from(">H", packet, 2)
    if size > len(packet):
        raise BadPacket(f"{size} bytes are told, {len(packet)} are there")
    if ones_sum(packet[:header]) != 0xFFFF:
        raise BadPacket(f"IP header checksum: {packet[:header].hex()}")
    source, destination = (str(ipaddress.IPv4Address(packet[at : at + 4])) for at in (12, 16))
    protocol, payload = packet[9], packet[header:size]
    seen = Seen(source, destination, protocol, packet[8], size)
    (fragment,) = struct.unpack_from(">H", packet, 6)
    if fragment & 0x3FFF:
        return seen
    pseudo = packet[12:20] + struct.pack(">BBH", 0, protocol, len(payload))
    if protocol == TCP and ones_sum(pseudo + payload) != 0xFFFF:
        raise BadPacket(f"TCP checksum: {source} to {destination}, {len(payload)} bytes")
    if protocol == 1 and ones_sum(payload) != 0xFFFF:
        raise BadPacket(f"ICMP checksum: {source} to {destination}")
    if protocol != UDP:
        return seen
    _, port, length, check = struct.unpack_from(">HHHH", payload)
    if length != len(payload):
        raise BadPacket(f"UDP length {length} of {len(payload)} bytes: {source} to {destination}")
    if check and ones_sum(pseudo + payload) != 0xFFFF:
        raise BadPacket(f"UDP checksum: {source} to {destination}, {length} bytes")
    if port == VXLAN_PORT and payload[28:30] == b"\x08\x00":
        return verify(payload[30:])._replace(wrapped=True, outer=source)
    if port == UDP_PORT and payload[8:9] and payload[8] >> 4 == 4:
        return verify(payload[8:])._replace(wrapped=True, outer=source)
    return seen


def read_capture(path: Path) -> list[bytes]:
    """The IPv4 packets of a capture of Ethernet frames (pcap, as tcpdump writes it)."""
    data = path.read_bytes()
    order = "<" if data[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    found, at = [], 24
    while at + 16 <= len(data):
        kept, size = struct.unpack_from(f"{order}II", data, at + 8)
        frame = data[at + 16 : at + 16 + kept]
        at += 16 + kept
        if frame[12:14] == b"\x08\x00":
            if kept < size:
                raise BadPacket(f"captured {kept} bytes of {size}")
            found.append(frame[14:])
    return found
