"""Netlink: what the kernel sends, cut short and turned around. The codecs may refuse a message, with the errors named here."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace

from fuzz.target import Cut, target
from wincey.kernel import netlink, nfmonitor, rtnl
from wincey.kernel.monitor import Expectation
from wincey.kernel.netlink import HEADER, MALFORMED
from wincey.kernel.objects import Names
from wincey.kernel.wireguard import genl
from wincey.model.address import Subnet
from wincey.model.state import FdbEntry, InterfaceAddress, Link, Neighbor, Route, Scope, Vxlan

_V4 = Subnet.parse("10.3.5.0/24")
_LINK = Link("flannel.1", "vxlan", 1450, mac=b"\x0e*\0\0\0\1", vxlan=Vxlan(1, 8472, b"\xc0\0\2\1", "eth0"))


def _sent(request: bytes) -> bytes:
    """A request as a notification: the same layout."""
    return request


_SEEDS = (
    _sent(rtnl.encode_neighbor(rtnl.RTM_NEWNEIGH, 0, 7, _V4.address, b"\x0e*\0\0\0\2")),
    _sent(rtnl.encode_fdb(rtnl.RTM_NEWNEIGH, 0, 7, b"\x0e*\0\0\0\2", b"\xc0\0\2\2")),
    _sent(rtnl.encode_address(rtnl.RTM_NEWADDR, 0, 7, Subnet.parse("10.3.1.0/32"))),
    _sent(rtnl.get_link("flannel.1")),
    _sent(rtnl.get_route(b"\x0a\3\5\1")),
    HEADER.pack(16 + 12 + 8 + 8 + 8, rtnl.RTM_NEWROUTE, 0, 0, 0)
    + struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 0x8B, 0, 1, 0)
    + netlink.attribute(1, _V4.address) + netlink.attribute(5, b"\x0a\3\5\0") + netlink.attribute(4, struct.pack("=I", 7)),
    HEADER.pack(16 + 12 + 8 + 20, rtnl.RTM_NEWROUTE, 0, 0, 0)
    + struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 0x8B, 0, 1, 0)
    + netlink.attribute(1, _V4.address) + netlink.attribute(9, struct.pack("=HBBI", 16, 0, 0, 7) + netlink.attribute(5, b"\x0a\3\5\0")),
    HEADER.pack(16 + 16 + 16 + 8 + 40, rtnl.RTM_NEWLINK, 0, 0, 0) + struct.pack("=BxHiII", 0, 1, 7, 1, 0)
    + netlink.attribute(3, b"flannel.1\0") + netlink.attribute(4, struct.pack("=I", 1450))
    + netlink.attribute(18, netlink.attribute(1, b"vxlan\0") + netlink.attribute(2, netlink.attribute(1, struct.pack("=I", 1)))),
    HEADER.pack(36, 2, 0x200, 0, 0) + struct.pack("=i", -22) + HEADER.pack(16, 24, 0, 0, 0) + netlink.attribute(1, b"no\0"),
)  # fmt: skip


class _Names(Names):
    """Devices by number, without a kernel."""

    def __init__(self) -> None:
        self._names = {7: "flannel.1", 2: "eth0"}

    def name(self, index: int) -> str:
        return self._names.get(index, "")

    def clear(self) -> None:
        return


def _expectation() -> Expectation:
    objects = [
        _LINK,
        Route(_V4, "flannel.1", gateway=_V4.address, onlink=True),
        Neighbor("flannel.1", _V4.address, b"\x0e*\0\0\0\2"),
        FdbEntry("flannel.1", b"\x0e*\0\0\0\2", b"\xc0\0\2\2"),
        InterfaceAddress("flannel.1", Subnet.parse("10.3.1.0/32")),
    ]
    expectation = Expectation(_Names(), lambda link: link)
    scope = Scope(devices=frozenset({"flannel.1"}), networks=(Subnet.parse("10.3.0.0/16"),))
    expectation.expect({item.key: item for item in objects}, scope, {7: "flannel.1"})
    return expectation


@target("netlink", *MALFORMED, seeds=_SEEDS)
def notifications(data: bytes) -> None:
    """Datagrams of several messages through every decoder, and what they mean to the monitor."""
    for _, buffer, start, end in netlink.messages([data]):
        for decode in (rtnl.decode_route, rtnl.decode_neighbor, rtnl.decode_link, rtnl.decode_address):
            try:
                assert repr(decode(buffer, start, end))
            except MALFORMED:
                continue
    if len(data) >= HEADER.size:
        length, kind, *_ = HEADER.unpack_from(data)
        expectation = _expectation()
        for judge in (expectation.about_host, expectation.contradicted):
            try:
                why = judge(kind, data, 16, length)
            except MALFORMED:
                continue
            assert why is None or isinstance(why, str)
        assert (_LINK.tag, "flannel.1") in expectation._objects


@target("netlink-answers", netlink.NetlinkError, *MALFORMED, seeds=_SEEDS)
def answers(data: bytes) -> None:
    """What a request, a dump and a batch make of an answer; the socket is a pretended one that gives pieces of the input."""
    cut = Cut(data)
    parts = []
    while cut.left and len(parts) < 20:
        parts.append(cut.bytes(16 + cut.number(200)))
    for act in (
        lambda link: link.request(netlink.message(18, 0, b"\0" * 16)),
        lambda link: link.dump(26, b"\0" * 12),
        lambda link: link.transact([netlink.message(24, 0, b"\0" * 12)] * 3),
    ):
        link = netlink.Netlink.__new__(netlink.Netlink)
        queue = list(parts)

        def receive(_size: int, queue: list[bytes] = queue) -> bytes:
            if not queue:
                raise BlockingIOError
            return queue.pop(0)

        link._socket = SimpleNamespace(  # type: ignore[assignment]  # what is asked of it, it has
            recv=receive, sendmsg=lambda _: 0, setsockopt=lambda *_: None
        )
        link._sequence = 0
        try:
            act(link)
        except (netlink.NetlinkError, *MALFORMED):
            continue


@target("nftables-notices", seeds=(
    HEADER.pack(60, 10 << 8 | 6, 0, 0, 0) + struct.pack("=BBH", 2, 0, 0) + netlink.attribute(1, b"flannel-ipv4\0") + netlink.attribute(2, b"x\0"),
))  # fmt: skip
def nftables_notices(data: bytes) -> None:
    """Any buffer: an answer in words or none, and never an error."""
    assert isinstance(
        nfmonitor.concerns(data, lambda family, table, chain: family == socket.AF_INET or bool(chain)), str
    )
    assert isinstance(nfmonitor.concerns(data, lambda family, table, chain: False), str)


@target("wireguard-netlink", *MALFORMED, seeds=(
    HEADER.pack(120, 30, 0, 0, 0) + struct.pack("=BBH", 0, 1, 0) + netlink.attribute(3, b"k" * 32) + netlink.attribute(6, struct.pack("=H", 51820))
    + netlink.attribute(8 | 0x8000, netlink.attribute(0x8000, netlink.attribute(1, b"p" * 32)
    + netlink.attribute(4, struct.pack("=H2s4s8x", 2, b"\xca\x6c", b"\xc0\0\2\2")) + netlink.attribute(6, bytes(16))
    + netlink.attribute(9 | 0x8000, netlink.attribute(0x8000, netlink.attribute(1, b"\2\0") + netlink.attribute(2, b"\x0a\3\5\0") + netlink.attribute(3, b"\x18"))))),
    HEADER.pack(40, 16, 0, 0, 0) + struct.pack("=BBH", 1, 2, 0) + netlink.attribute(1, b"\x1e\0"),
))  # fmt: skip
def wireguard(data: bytes) -> None:
    """A dump of a WireGuard device."""
    parts = list(netlink.messages([data]))
    try:
        state = genl.decode_device(parts, parts[0][0] if parts else 0)
        assert len(state.peers) <= len(data)
    except MALFORMED:
        pass
    for part in parts:
        genl.read_family(part)
