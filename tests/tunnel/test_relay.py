"""What every engine does, without a kernel device: a socket pair stands for the TUN, loopback for the underlay."""

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tunnel import ENGINES, Bench, drain
from wincey.tunnel.control import PEER
from wincey.tunnel.sources import SourceCheck


@pytest.fixture(params=ENGINES)
def bench(request):
    bench = Bench(request.param)
    yield bench
    bench.close()


def inner(source, destination, payload=b"hello", ttl=9, first=0x45):
    return (
        struct.pack(
            "!BBHHHBBH4s4s", first, 0, 20 + len(payload), 1, 0, ttl, 17, 0x1234, bytes(source), bytes(destination)
        )
        + payload
    )


OURS, THEIRS, NOBODYS = (10, 3, 1, 2), (10, 3, 2, 2), (10, 3, 9, 9)


def test_packets_pass_unchanged_both_ways(bench):
    out, back = inner(OURS, THEIRS), inner(THEIRS, OURS)
    for _ in range(2):  # the second time the address is a known one
        assert bench.from_tun(out, out) == [out, out]
        assert bench.from_underlay(back, back) == [back, back]
    assert bench.counted() == {
        "out.packets": 4, "out.bytes": 4 * len(out), "in.packets": 4, "in.bytes": 4 * len(back),
    }  # fmt: skip


def test_packets_with_options_pass(bench):
    packet = inner(THEIRS, OURS, bytes((148, 4, 0, 0)) + b"data", first=0x46)
    assert bench.from_underlay(packet, packet) == [packet, packet]


def test_the_largest_packet_passes(bench):
    packet = inner(OURS, THEIRS, bytes(65507 - 20))
    assert bench.from_tun(packet) == [packet]
    assert bench.from_underlay(inner(THEIRS, OURS, bytes(65507 - 20))) == [inner(THEIRS, OURS, bytes(65507 - 20))]


def test_a_packet_too_big_for_a_datagram_is_counted(bench):
    assert bench.from_tun(inner(OURS, THEIRS, bytes(65535 - 20)), inner(OURS, THEIRS)) == [inner(OURS, THEIRS)]
    assert bench.relay.counters["out.drop.EMSGSIZE"] == 1


def test_nobodys_packet_is_refused(bench):
    packet = inner(OURS, NOBODYS)
    assert bench.from_tun(packet, packet) == []
    assert bench.refused == [packet, packet]
    assert bench.relay.counters["out.drop.no-peer"] == bench.relay.counters["out.unreachable"] == 2


def test_what_is_no_ipv4_packet_does_not_leave(bench):
    v6 = bytes([0x60]) + bytes(15) + bytes(THEIRS) + bytes(20)  # with a known address where IPv4 has its destination
    bench.from_tun(inner(OURS, THEIRS))
    assert bench.from_tun(v6, b"\x45", inner(OURS, NOBODYS)[:-1]) == []
    assert bench.refused == []
    assert bench.relay.counters["out.drop.version"] == 1
    assert bench.relay.counters["out.drop.short"] == 1
    assert bench.relay.counters["out.drop.length"] == 1


def test_what_is_no_ipv4_packet_does_not_enter(bench):
    good = inner(THEIRS, OURS)
    assert bench.from_underlay(good) == [good]
    assert bench.from_underlay(good[:19], good[:-1], good + b"!", b"\x60" + good[1:], b"\x44" + good[1:], b"") == []
    assert {name: count for name, count in bench.relay.counters.items() if "drop" in name} == {
        "in.drop.short": 2, "in.drop.length": 2, "in.drop.version": 1, "in.drop.header": 1,
    }  # fmt: skip


def test_unknown_hosts_are_heard_as_by_flannel_and_counted(bench):
    """A peer behind NAT sends from another address than it publishes, and a new one before its lease is known."""
    good, other = inner(THEIRS, OURS), inner(NOBODYS, OURS)
    assert bench.from_underlay(good) == [good]
    assert bench.from_underlay(other, by=bench.stranger) == [other]
    assert bench.relay.counters["in.unknown-source"] == 1


def test_a_peers_foreign_source_enters_and_is_counted(bench):
    foreign = inner(NOBODYS, OURS)
    assert bench.from_underlay(foreign, inner(THEIRS, OURS)) == [foreign, inner(THEIRS, OURS)]
    assert bench.relay.counters["in.foreign-source"] == 1


def test_a_peer_behind_another_port_is_heard(bench):
    with bench.bound("127.0.0.2") as other:
        assert bench.from_underlay(inner(THEIRS, OURS), by=other) == [inner(THEIRS, OURS)]
    assert "in.foreign-source" not in bench.relay.counters


def test_a_changed_peer_is_followed_at_once(bench):
    packet = inner(OURS, THEIRS)
    assert bench.from_tun(packet) == [packet]
    bench.relay.update(PEER.pack(bytes((10, 3, 2, 0)), 24, bytes((127, 0, 0, 3))))
    assert bench.from_tun(packet) == []
    assert drain(bench.stranger) == [packet]
    bench.relay.update(PEER.pack(bytes((10, 3, 2, 0)), 24, bytes(4)))
    assert bench.from_tun(packet) == []
    assert bench.refused == [packet]


def test_another_socket_sends_to_its_own_port(bench):
    packet = inner(OURS, THEIRS)
    assert bench.from_tun(packet) == [packet]
    with bench.bound("127.0.0.1") as udp, bench.bound("127.0.0.2", udp.getsockname()[1]) as peer:
        bench.relay.rebind(udp)
        assert bench.from_tun(packet) == []
        assert drain(peer) == [packet]


def test_one_call_moves_a_batch_at_most(bench):
    packet = inner(THEIRS, OURS)
    for _ in range(100):
        bench.peer.sendto(packet, bench.udp.getsockname())
    moved = []
    while sum(moved) < 100:
        bench.relay.inbound()
        moved.append(len(drain(bench.host)))
    assert 0 not in moved
    assert max(moved) < 100


def test_a_full_device_drops_and_goes_on(bench):
    packet = inner(THEIRS, OURS, bytes(1400))
    for _ in range(2000):
        bench.peer.sendto(packet, bench.udp.getsockname())
        bench.relay.inbound()
    moved = len(drain(bench.host))
    assert moved == bench.relay.counters["in.packets"] < 2000
    assert bench.relay.counters["in.drop.EAGAIN"] == 2000 - moved
    assert bench.from_underlay(packet) == [packet]


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([b"", inner(OURS, THEIRS)[:20], inner(THEIRS, OURS), bytes([0x45]), bytes([0x60])]),
            st.binary(max_size=80),
        ),
        max_size=20,
    )
)
def test_no_bytes_end_an_engine(engine, packets):
    bench = Bench(engine)
    try:
        for outwards, start, rest in packets:
            if outwards and start + rest:
                bench.from_tun(start + rest)
            else:
                bench.from_underlay(start + rest)
        good = inner(OURS, THEIRS)
        assert bench.from_tun(good) == [good]
        counters = bench.relay.counters
        dropped = sum(count for name, count in counters.items() if ".drop." in name)
        assert counters["in.packets"] + counters["out.packets"] + dropped == len(packets) + 1
    finally:
        bench.close()


def test_a_relay_without_its_device_says_so(bench):
    descriptor = os.dup(bench.tun.fileno())
    os.close(descriptor)
    bench.relay.tun = descriptor
    with pytest.raises(OSError, match="Bad file"):
        bench.relay.outbound()


CASES = [  # check, inner source, whether it enters from the peer that has 10.3.2.0/24
    ("off", NOBODYS, True),
    ("off", (192, 168, 1, 1), True),
    ("network", THEIRS, True),
    ("network", NOBODYS, False),
    ("network", (192, 168, 1, 1), True),
    ("network", (172, 16, 0, 1), False),
    ("strict", THEIRS, True),
    ("strict", NOBODYS, False),
    ("strict", (192, 168, 1, 1), False),
]


@pytest.mark.parametrize(("mode", "source", "enters"), CASES)
def test_inner_sources_are_checked(bench, mode, source, enters):
    bench.relay.update(
        PEER.pack(bytes((172, 16, 0, 0)), 16, bytes((127, 0, 0, 9)))
    )  # another host's, outside the network
    packet = inner(source, OURS)
    assert bench.from_underlay(inner(THEIRS, OURS)) != []
    bench.relay.restrict(SourceCheck(mode, bytes((10, 3, 0, 0)), 16))
    assert bench.from_underlay(packet, packet) == [packet, packet] * enters
    assert bench.counted().get("in.drop.source", 0) == (0 if enters else 2)
    assert bench.from_underlay(packet, by=bench.stranger) == [packet]  # not judged: no peer of ours, so far


def test_a_check_that_there_is_not_is_refused():
    for wrong in (("lax",), ("strict", b"abc"), ("network", bytes(4), 33)):
        with pytest.raises(ValueError, match="check of sources"):
            SourceCheck(*wrong)
