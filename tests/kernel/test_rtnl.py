"""The codec against another one: what we encode pyroute2 reads, what pyroute2 encodes we read."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from wincey.kernel import rtnl
from wincey.kernel.netlink import (
    BATCH_BYTES,
    BATCH_MESSAGES,
    HEADER,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    attribute,
    attributes,
    batches,
    messages,
)
from wincey.model.address import Address, Subnet, format_address, format_mac
from wincey.model.state import Vxlan

PUT = NLM_F_CREATE | NLM_F_REPLACE
v4 = st.binary(min_size=4, max_size=4)
v6 = st.binary(min_size=16, max_size=16)
address = v4 | v6
mac = st.binary(min_size=6, max_size=6)
index = st.integers(1, 2**31 - 1)
u32 = st.integers(1, 2**32 - 1)
subnet = st.one_of(st.builds(Subnet, v4, st.integers(0, 32)), st.builds(Subnet, v6, st.integers(0, 128)))


def read(message_class: type, data: bytes) -> Any:
    """Decode one whole message with pyroute2, whose messages know their own header."""
    length, _, flags, sequence, port = HEADER.unpack_from(data)
    assert length == len(data)
    assert flags & NLM_F_REQUEST
    assert (sequence, port) == (0, 0), "filled in when sent"
    message = message_class(data)
    message.decode()
    return message


def written(message: Any) -> tuple[bytes, int, int]:
    """Encode with pyroute2; the bytes, and where the body starts and ends."""
    message.encode()
    data = bytes(message.data)
    return data, 16, struct.unpack_from("=I", data)[0]


def family(packed: Address) -> int:
    return socket.AF_INET if len(packed) == 4 else socket.AF_INET6


@given(address, mac, index)
def test_neighbor_is_read_by_pyroute2(packed: Address, lladdr: bytes, device: int) -> None:
    message = read(ndmsg, rtnl.encode_neighbor(rtnl.RTM_NEWNEIGH, PUT, device, packed, lladdr))
    assert message["header"]["type"] == rtnl.RTM_NEWNEIGH
    assert (message["family"], message["ifindex"], message["state"]) == (family(packed), device, 0x80)
    assert message.get_attr("NDA_DST") == format_address(packed)
    assert message.get_attr("NDA_LLADDR") == format_mac(lladdr)


@given(address, mac, index)
def test_fdb_entry_is_read_by_pyroute2(packed: Address, lladdr: bytes, device: int) -> None:
    message = read(ndmsg, rtnl.encode_fdb(rtnl.RTM_DELNEIGH, 0, device, lladdr, packed))
    assert message["header"]["type"] == rtnl.RTM_DELNEIGH
    assert (message["family"], message["ifindex"], message["flags"]) == (socket.AF_BRIDGE, device, 2)
    assert message.get_attr("NDA_LLADDR") == format_mac(lladdr)
    raw = attributes(message.data, 28, len(message.data))
    assert raw[1] == packed


@given(subnet, st.data(), index, st.booleans())
def test_route_is_read_by_pyroute2(destination: Subnet, data: st.DataObject, device: int, onlink: bool) -> None:
    gateway = data.draw(st.none() | (v4 if destination.bits == 32 else v6))
    encoded = rtnl.encode_route(rtnl.RTM_NEWROUTE, PUT, destination, oif=device, gateway=gateway, onlink=onlink)
    message = read(rtmsg, encoded)
    assert (message["family"], message["dst_len"]) == (destination.family, destination.length)
    assert (message["table"], message["proto"], message["scope"], message["type"]) == (254, 87, 0, 1)
    assert message["flags"] == (4 if onlink else 0)
    assert message.get_attr("RTA_DST") == format_address(destination.address)
    assert message.get_attr("RTA_OIF") == device
    assert message.get_attr("RTA_GATEWAY") == (format_address(gateway) if gateway else None)
    assert message.get_attr("RTA_PRIORITY") == (None if destination.bits == 32 else 1024)


@given(subnet)
def test_blackhole_and_deletion_are_read_by_pyroute2(destination: Subnet) -> None:
    message = read(rtmsg, rtnl.encode_route(rtnl.RTM_NEWROUTE, PUT, destination, oif=3, blackhole=True))
    assert (message["type"], message.get_attr("RTA_PRIORITY"), message.get_attr("RTA_OIF")) == (6, 0x7FFFFFFF, None)
    message = read(rtmsg, rtnl.encode_route(rtnl.RTM_DELROUTE, 0, destination, protocol=0))
    assert (message["proto"], message["scope"], message.get_attr("RTA_GATEWAY")) == (0, 255, None)


@given(subnet, index)
def test_address_is_read_by_pyroute2(own: Subnet, device: int) -> None:
    message = read(ifaddrmsg, rtnl.encode_address(rtnl.RTM_NEWADDR, PUT, device, own))
    assert (message["family"], message["prefixlen"], message["scope"]) == (own.family, own.length, 0)
    assert (message["index"], message["flags"]) == (device, 0 if own.bits == 32 else 2)
    assert message.get_attr("IFA_LOCAL") == message.get_attr("IFA_ADDRESS") == format_address(own.address)


vxlans = st.builds(
    Vxlan,
    vni=st.integers(0, 2**24 - 1),
    port=st.integers(1, 65535),
    local=address,
    underlay=st.just("eth0"),
    learning=st.booleans(),
    gbp=st.booleans(),
)


@given(vxlans, st.integers(68, 65535), st.none() | mac, index)
def test_vxlan_link_is_read_by_pyroute2_and_by_us(vxlan: Vxlan, mtu: int, lladdr: bytes | None, underlay: int) -> None:
    encoded = rtnl.encode_link(
        rtnl.RTM_NEWLINK, PUT, name="flannel.1", up=True, mtu=mtu, mac=lladdr, info=rtnl.vxlan_info(vxlan, underlay)
    )
    message = read(ifinfmsg, encoded)
    assert (message["index"], message["flags"], message["change"]) == (0, 1, 1)
    assert (message.get_attr("IFLA_IFNAME"), message.get_attr("IFLA_MTU")) == ("flannel.1", mtu)
    assert message.get_attr("IFLA_ADDRESS") == (format_mac(lladdr) if lladdr else None)
    info = message.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "vxlan"
    data = info.get_attr("IFLA_INFO_DATA")
    assert data.get_attr("IFLA_VXLAN_ID") == vxlan.vni
    assert data.get_attr("IFLA_VXLAN_PORT") == vxlan.port
    assert data.get_attr("IFLA_VXLAN_LINK") == underlay
    assert data.get_attr("IFLA_VXLAN_LEARNING") == int(vxlan.learning)
    assert data.get_attr("IFLA_VXLAN_UDP_CSUM") == 1
    local = "IFLA_VXLAN_LOCAL" if len(vxlan.local) == 4 else "IFLA_VXLAN_LOCAL6"
    assert data.get_attr(local) == format_address(vxlan.local)
    assert ("IFLA_VXLAN_GBP" in dict(data["attrs"])) == vxlan.gbp

    ours = rtnl.decode_link(encoded, 16, len(encoded))
    expected = rtnl.VxlanMessage(vxlan.vni, vxlan.port, vxlan.local, underlay, vxlan.learning, vxlan.gbp)
    assert ours == rtnl.LinkMessage(0, "flannel.1", True, mtu, lladdr or b"", "vxlan", expected)


@given(vxlans, vxlans, index, index)
def test_a_change_of_a_vxlan_link_mentions_only_what_differs(wanted: Vxlan, old: Vxlan, now: int, before: int) -> None:
    current = rtnl.VxlanMessage(old.vni, old.port, old.local, before, old.learning, old.gbp)
    info = rtnl.vxlan_info(wanted, now, current)
    inner = attributes(info, 4, len(info))
    mentioned = set(attributes(inner[2], 0, len(inner[2])))
    local = {4 if len(wanted.local) == 4 else 17} if wanted.local != old.local else set()
    assert mentioned == local | ({3} if now != before else set()) | ({7} if wanted.learning != old.learning else set())


@given(address, mac, index, st.sampled_from([0x02, 0x04, 0x40, 0x80]))
def test_neighbor_of_pyroute2_is_read(packed: Address, lladdr: bytes, device: int, state: int) -> None:
    message = ndmsg()
    message["header"]["type"] = rtnl.RTM_NEWNEIGH
    message["family"], message["ifindex"], message["state"] = family(packed), device, state
    message["attrs"] = [("NDA_DST", format_address(packed)), ("NDA_PROBES", 7), ("NDA_LLADDR", format_mac(lladdr))]
    found = rtnl.decode_neighbor(*written(message))
    assert found == rtnl.NeighborMessage(family(packed), device, state, packed, lladdr, False)


@given(subnet, st.data(), index, u32, st.integers(0, 255))
def test_route_of_pyroute2_is_read(
    destination: Subnet, data: st.DataObject, device: int, metric: int, protocol: int
) -> None:
    gateway = data.draw(st.none() | (v4 if destination.bits == 32 else v6))
    message = rtmsg()
    message["header"]["type"] = rtnl.RTM_NEWROUTE
    message["family"], message["dst_len"], message["tos"] = destination.family, destination.length, 8
    message["table"], message["proto"], message["type"], message["flags"] = 254, protocol, 1, 4
    message["attrs"] = [
        ("RTA_TABLE", 254),
        ("RTA_DST", format_address(destination.address)),
        ("RTA_PRIORITY", metric),
        ("RTA_OIF", device),
        *([("RTA_GATEWAY", format_address(gateway))] if gateway else []),
    ]
    body = written(message)
    hop = rtnl.Hop(device, gateway, True)
    assert rtnl.decode_route(*body) == rtnl.RouteMessage(
        destination.address, destination.length, 8, 254, protocol, 1, False, metric, None, (hop,)
    )
    assert rtnl.route_protocol(body[0], body[1]) == protocol


def test_multipath_and_gateways_of_the_other_family_are_read() -> None:
    def hop(oif: int, flags: int, attrs: bytes) -> bytes:
        return struct.pack("=HBBi", 8 + len(attrs), flags, 0, oif) + attrs

    near, far = bytes([10, 3, 2, 1]), bytes(15) + b"\1"
    via = attribute(18, struct.pack("=H", socket.AF_INET6) + far)
    paths = attribute(9, hop(3, 4, attribute(5, near)) + hop(5, 0, via))
    body = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 87, 0, 1, 0x200)
    data = body + attribute(1, bytes([10, 3, 2, 0])) + paths
    found = rtnl.decode_route(data, 0, len(data))
    assert found.hops == (rtnl.Hop(3, near, True), rtnl.Hop(5, far, False))
    assert found.cloned
    single = body + attribute(4, struct.pack("=I", 7)) + via
    assert rtnl.decode_route(single, 0, len(single)).hops == (rtnl.Hop(7, far, False),)
    encoded = rtnl.encode_route(rtnl.RTM_NEWROUTE, PUT, Subnet(bytes([10, 3, 2, 0]), 24), oif=7, gateway=far)
    assert rtnl.decode_route(encoded, 16, len(encoded)).hops == (rtnl.Hop(7, far, False),)


@given(subnet, index, st.sampled_from([0, 253, 254]), st.integers(0, 0xFFFF))
def test_address_of_pyroute2_is_read(own: Subnet, device: int, scope: int, flags: int) -> None:
    message = ifaddrmsg()
    message["header"]["type"] = rtnl.RTM_NEWADDR
    message["family"], message["prefixlen"], message["scope"], message["index"] = own.family, own.length, scope, device
    peer = bytes(len(own.address))
    message["attrs"] = [
        ("IFA_ADDRESS", format_address(peer)),
        ("IFA_LOCAL", format_address(own.address)),
        ("IFA_FLAGS", flags),
    ]
    found = rtnl.decode_address(*written(message))
    assert found == rtnl.AddressMessage(device, own, scope, flags)


@given(st.binary(max_size=200))
@example(b"\0\0\1\0" * 2)
def test_garbage_never_raises_more_than_a_struct_error(data: bytes) -> None:
    body = bytes(16) + data
    for decode in (rtnl.decode_route, rtnl.decode_neighbor):
        with suppress(struct.error):  # an attribute that claims to hold what isn't there
            decode(body, 0, len(body))
    list(messages([data]))
    attributes(data, 0, len(data))


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40), max_size=8))
def test_attributes_round_trip(values: dict[int, bytes]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in values.items())
    assert attributes(data, 0, len(data)) == values


@given(st.lists(st.integers(16, 200), max_size=60), st.integers(1, 20), st.integers(200, 2000))
def test_batches_hold_everything_in_order_within_their_limits(sizes: list[int], most: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wincey.kernel.netlink.BATCH_MESSAGES", most)
        patch.setattr("wincey.kernel.netlink.BATCH_BYTES", size)
        cut = list(batches([bytes(length) for length in sizes]))
    assert [index for batch in cut for index in batch] == list(range(len(sizes)))
    assert all(0 < len(batch) <= most and sum(sizes[i] for i in batch) <= size for batch in cut)


def test_fifteen_thousand_messages_are_a_handful_of_batches() -> None:
    request = rtnl.encode_route(rtnl.RTM_NEWROUTE, PUT, Subnet(bytes(16), 64), oif=1, gateway=bytes(16))
    assert len(list(batches([request] * 15_000))) <= 5
    assert len(request) * BATCH_MESSAGES <= BATCH_BYTES
