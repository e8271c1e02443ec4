"""The udp tunnel: packets from the underlay and from containers, its table, and the frames of its control socket."""

from __future__ import annotations

import json
import os
import socket
import struct

from fuzz.target import Cut, target
from wincey.tunnel.control import PEER, decode, encode
from wincey.tunnel.packet import fault, may_be_answered, net_unreachable
from wincey.tunnel.relay import Relay
from wincey.tunnel.table import PeerTable

_PEERS = PEER.pack(b"\x0a\3\5\0", 24, b"\xc0\0\2\2") + PEER.pack(b"\x0a\3\6\0", 24, b"\xc0\0\2\3")
_OUTER = ("192.0.2.2", "192.0.2.3", "203.0.113.9")


def _packet(
    source: bytes = b"\x0a\3\5\1",
    destination: bytes = b"\x0a\3\1\1",
    *,
    ttl: int = 64,
    fragment: int = 0,
    options: bytes = b"",
    body: bytes = b"\x08\0\0\0ping",
) -> bytes:
    length = 20 + len(options) + len(body)
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | (20 + len(options)) // 4, 0, length, 1, fragment, ttl, 1, 0, source, destination
    )
    return head + options + body


_PACKETS = (
    _packet(),
    _packet(source=b"\x0a\3\6\1"),  # another peer's
    _packet(source=b"\x08\x08\x08\x08"),
    _packet(ttl=0),
    _packet(fragment=0x2000),
    _packet(fragment=0x00B9),
    _packet(options=b"\x83\x07\x04\x0a\0\0\1\0"),
    _packet()[:19],
    _packet()[:-1],
    b"\x60" + bytes(39),
    b"",
)


class _Underlay:
    """A UDP socket that has some datagrams, and keeps what is sent."""

    def __init__(self, arriving: list[tuple[bytes, tuple[str, int]]]) -> None:
        self._arriving, self.sent = arriving, list[tuple[bytes, tuple[str, int]]]()

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int]]:
        if not self._arriving:
            raise BlockingIOError
        return self._arriving.pop(0)

    def sendto(self, packet: bytes, to: tuple[str, int]) -> int:
        self.sent.append((packet, to))
        return len(packet)

    def getsockname(self) -> tuple[str, int]:
        return ("192.0.2.1", 8285)

    def fileno(self) -> int:
        return -1


@target("tunnel-packets", seeds=[bytes([sender]) + struct.pack("!H", len(packet)) + packet for packet in _PACKETS for sender in (0, 2)]
        + [b"".join(bytes([0]) + struct.pack("!H", len(packet)) + packet for packet in _PACKETS)])  # fmt: skip
def packets(data: bytes) -> None:
    """Datagrams from peers and strangers, good ones between: only whole IPv4 packets get in, unchanged and in order, good
    ones always do, the table stays as it was, and every packet is counted once."""
    cut, arriving = Cut(data), list[tuple[bytes, tuple[str, int]]]()
    while cut.left and len(arriving) < 60:
        arriving.append(_of(cut))
    good = (_packet(), ("192.0.2.2", 8285))
    arriving = [good, *arriving, good]
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        near.setblocking(False)
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        relay = Relay(far.fileno(), _Underlay(list(arriving)), lambda packet, now: False)  # type: ignore[arg-type]  # as a socket
        relay.update(_PEERS)
        before = relay.table.records()
        relay.inbound()
        assert relay.table.records() == before
        delivered = _read(near)
        offered = [packet for packet, _ in arriving]
        assert delivered.count(good[0]) == offered.count(good[0]) or _refused(relay) > 0
        assert delivered[0] == good[0]
        assert delivered[-1] == good[0]
        for packet in delivered:
            assert fault(packet) == ""
            offered = offered[offered.index(packet) + 1 :]  # in order, and no more often than it came
        counted = sum(count for name, count in relay.counters.items() if name.startswith(("in.drop.", "in.error.")))
        assert relay.counters["in.packets"] == len(delivered)
        assert counted + len(delivered) == len(arriving)
    finally:
        near.close()
        far.close()


def _of(cut: Cut) -> tuple[bytes, tuple[str, int]]:
    sender = _OUTER[cut.number(3)]
    return cut.piece(), (sender, 8285)


def _refused(relay: Relay) -> int:
    return sum(count for name, count in relay.counters.items() if name.startswith("in.drop."))


def _read(sock: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(sock.recv(1 << 16))
        except BlockingIOError:
            return found


@target("tunnel-outbound", seeds=[struct.pack("!H", len(packet)) + packet for packet in _PACKETS])
def outbound(data: bytes) -> None:
    """What containers send: it goes to the peer that has the destination, unchanged, or nowhere; ICMP errors are well formed."""
    cut, given, refused = Cut(data), list[bytes](), list[bytes]()
    while cut.left and len(given) < 60:
        if piece := cut.piece():
            given.append(piece)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        near.setblocking(False)
        far.setblocking(False)
        underlay = _Underlay([])

        def refuse(packet: bytes, now: float) -> bool:
            refused.append(packet)
            return may_be_answered(packet)

        relay = Relay(far.fileno(), underlay, refuse)  # type: ignore[arg-type]  # as a socket
        relay.update(_PEERS)
        for packet in given:
            near.send(packet)
        relay.outbound()
        for packet, (host, port) in underlay.sent:
            assert packet in given
            assert (packet[16:19], host, port) in {(b"\x0a\3\5", "192.0.2.2", 8285), (b"\x0a\3\6", "192.0.2.3", 8285)}
        for packet in refused:
            assert fault(packet) == ""
            answer = net_unreachable(packet, bytes(4))
            assert fault(answer) in {"", "length"}
            assert answer[16:20] == packet[12:16]
            assert len(answer) <= 576
    finally:
        near.close()
        far.close()


@target(
    "tunnel-table",
    ValueError,
    seeds=(_PEERS, _PEERS + PEER.pack(b"\x0a\3\5\0", 24, bytes(4)), PEER.pack(bytes(4), 0, b"\1\2\3\4")),
)
def table(data: bytes) -> None:
    """Records: refused as a whole or taken; what is written reads the same, and look-ups agree with a plain search."""
    known = PeerTable()
    known.update(_PEERS)
    before = known.records()
    try:
        known.update(data)
    except ValueError:
        assert known.records() == before
        raise
    again = PeerTable()
    again.update(known.records())
    assert sorted(PEER.iter_unpack(again.records())) == sorted(PEER.iter_unpack(known.records()))
    rows = list(PEER.iter_unpack(known.records()))
    for address, _, _ in PEER.iter_unpack(_PEERS + data):
        number = int.from_bytes(address, "big")
        fits = [(length, endpoint) for net, length, endpoint in rows
                if length == 0 or number >> (32 - length) == int.from_bytes(net, "big") >> (32 - length)]  # fmt: skip
        assert known.lookup(address) == (max(fits)[1] if fits else None)


@target(
    "tunnel-control",
    ValueError,
    seeds=(encode({"do": "show", "peers": True}), encode({"do": "peers"}, _PEERS), encode({"do": "stop"}) * 2),
)
def control(data: bytes) -> None:
    """Frames: whole ones come out in order, a bad one is a ValueError, and the buffer never grows."""
    buffer, size = bytearray(data), len(data)
    while (frame := decode(buffer)) is not None:
        assert len(buffer) < size
        size = len(buffer)
        header, body = frame
        assert decode(bytearray(encode(header, body))) == (json.loads(json.dumps(header)), body) or _is_odd(header)


def _is_odd(header: object) -> bool:
    """Whether JSON has no way to write it: NaN, which is not equal to itself."""
    return "NaN" in json.dumps(header)


assert os.sep == "/"
