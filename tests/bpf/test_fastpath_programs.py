"""The fast path's programs on crafted packets: what they take, and all that they must leave to the ordinary path."""

from __future__ import annotations

import ctypes
import struct
import time

import pytest

from support.netns import netns
from support.packets import MAC_A, MAC_B, address, ether, tcp, udp, verify, vxlan
from support.packets import ip as ip_packet
from wincey.bpf import program, syscall
from wincey.bpf.fastpath import COUNTERS, conf
from wincey.bpf.maps import Map
from wincey.bpf.program import read_baked
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath

pytestmark = pytest.mark.root

NEXT, REDIRECT = -1, 7
HERE, THERE, LOCAL, PEER = "10.5.1.2", "10.5.2.2", "10.99.0.1", "10.99.0.2"
PORTS = (4000, 80)
PATH = FastPath(
    Subnet.parse("10.5.0.0/16"),
    Subnet.parse("10.5.1.0/24"),
    "eth0",
    address(LOCAL),
    0x1000,
    "vxlan",
    "flannel.1",
    8472,
    1,
)
VTEP, PEER_VTEP, ROUTER = (bytes.fromhex(f"0e000000000{n}") for n in (1, 2, 3))
OUTER = ether(vxlan(ether(b"", VTEP, PEER_VTEP), LOCAL, PEER), MAC_A, MAC_B)  # what a learned packet had in front
OVER_UDP = FastPath(PATH.network, PATH.subnet, "eth0", address(LOCAL), 0x1000, "udp", "", 8285)
WRAPPED, PLAIN, UDP = 64, 14, 42
_MONOTONIC_COARSE = 6  # linux/time.h: the clock of the programs
HEADS = {WRAPPED: OUTER, PLAIN: MAC_B + MAC_A + b"\x08\x00", UDP: ether(udp(LOCAL, PEER, (8285, 8285)), MAC_A, MAC_B)}


class Programs:
    """All of them with maps of their own, in a namespace where every index that is used is a device."""

    def __init__(self, ns):
        baked = read_baked("fastpath")
        self._ns = ns
        self.maps = {name: Map.create(name, layout) for name, layout in baked.maps.items()}
        self.loaded = program.load(baked, self.maps)
        self.reset()

    def reset(self):
        """As if loaded anew."""
        self.configure()
        self.maps["flows"].make_equal({})
        self._before = dict.fromkeys(COUNTERS, 0)
        self._before = self.counted()

    def configure(self, path=PATH):
        self.maps["conf"].put(bytes(4), conf(path))

    def run(self, name, frame, *, mark=0, device=1, gso=0, vlan=0):
        """The verdict and the frame as the program left it."""
        context = bytearray(192)
        struct.pack_into("=I", context, 8, mark)
        struct.pack_into("=I", context, 40, device)
        if gso:
            struct.pack_into("=I", context, 164, 3)
            struct.pack_into("=I", context, 176, gso)
        verdict, data, _ = self._ns.call(
            lambda: syscall.prog_test_run(self.loaded[name], frame, context=bytes(context))
        )
        return ctypes.c_int(verdict).value, data

    def flow(self, *, form=WRAPPED, protocol=6, age=0.0, most=1400, device=1, remote=THERE, **parts):
        """Put a flow as the ordinary path would have taught it `age` seconds ago."""
        seen = time.clock_gettime_ns(_MONOTONIC_COARSE) - int(age * 1e9)
        head = bytearray(parts.get("head", HEADS[form]).ljust(64, b"\0")[:64])
        if form != PLAIN:
            for at, size in ((16, 4), (24, 2), (38, 4)):
                head[at : at + size] = bytes(size)
        key = address(HERE) + address(remote) + struct.pack(">HH", *PORTS) + struct.pack("=I", protocol)
        self.maps["flows"].put(
            key,
            bytes(head)
            + struct.pack(
                "=QQIIHHH6s6s6x",
                parts.get("out_seen", seen), parts.get("in_seen", seen), 1, device, most, most, form, MAC_A, ROUTER,
            ),
        )  # fmt: skip

    def counted(self):
        return {name: self.maps["counters"].total(number) - self._before[name] for number, name in enumerate(COUNTERS)}

    def flows(self):
        return self.maps["flows"].items()

    def close(self):
        program.close(self.loaded)
        for each in self.maps.values():
            each.close()


@pytest.fixture(scope="module")
def loaded():
    with netns() as namespace:
        made = Programs(namespace)
        yield made
        made.close()


@pytest.fixture
def programs(loaded):
    loaded.reset()
    return loaded


def from_container(payload, destination=ROUTER):
    return ether(payload, MAC_A, destination)


def segment(**rest):
    return tcp(HERE, THERE, PORTS, b"x" * 100, **rest)


def answer(**rest):
    return tcp(THERE, HERE, PORTS[::-1], b"y" * 100, **rest)


def wrapped(inner, source=PEER, destination=LOCAL, mac=VTEP, **rest):
    return ether(vxlan(ether(inner, PEER_VTEP, mac), source, destination, **rest))


def test_out_wraps_as_it_was_taught(programs):
    programs.flow()
    verdict, data = programs.run("fast_out", from_container(segment(tos=1)))
    assert verdict == REDIRECT
    assert data[:14] == OUTER[:14]
    assert data[14 + 28 : 64] == OUTER[14 + 28 : 64]  # VXLAN and inner Ethernet headers
    seen = verify(data[14:])
    assert (seen.source, seen.destination, seen.ttl, seen.wrapped, seen.outer) == (HERE, THERE, 63, True, LOCAL)
    assert data[15] & 3 == 1  # ECN: as inside
    assert data[64:][20:] == segment()[20:]
    assert programs.counted()["out"] == 1


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize("form", [PLAIN, UDP, WRAPPED])
@pytest.mark.parametrize("size", [0, 1, 17, 1000, 1360])
def test_sizes_out_and_in(programs, form, size, protocol):
    """What one host sends out, another one takes in: the same packet, two hops on."""
    programs.flow(form=form, protocol=protocol)
    if form == UDP:
        programs.configure(OVER_UDP)
    make = tcp if protocol == 6 else udp
    body = bytes(range(256)) * 6
    verdict, data = programs.run("fast_out", from_container(make(HERE, THERE, PORTS, body[:size])))
    assert verdict == REDIRECT
    seen = verify(data[14:])
    assert (seen.ttl, seen.wrapped) == (63, form != PLAIN)
    answered = make(THERE, HERE, PORTS[::-1], body[:size])
    frame = {
        PLAIN: ether(answered),
        UDP: ether(udp(PEER, LOCAL, (8285, 8285), answered, check=False)),
        WRAPPED: wrapped(answered),
    }[form]
    if form == UDP and protocol == 6 and size > 128 - 40:  # to be merged first
        assert programs.run("fast_in", frame) == (NEXT, frame)
        verdict, data = programs.run("fast_merged", ether(answered))
    else:
        verdict, data = programs.run("fast_in", frame)
    assert verdict == REDIRECT
    assert data[:14] == MAC_A + ROUTER + b"\x08\x00"
    seen = verify(data[14:])
    assert (seen.source, seen.destination, seen.ttl, seen.wrapped) == (THERE, HERE, 63, False)
    assert data[34:] == answered[20:]


def over_udp(body, protocol=tcp):
    return ether(udp(PEER, LOCAL, (8285, 8285), protocol(THERE, HERE, PORTS[::-1], bytes(body)), check=False))


def test_small_segments_do_not_overtake_what_is_merged(programs):
    """For some 40 ms after a larger one of their flow they go the same way; what is merged already has nothing to wait for."""
    programs.configure(OVER_UDP)
    programs.flow(form=UDP)
    programs.flow(form=UDP, protocol=17)
    assert programs.run("fast_in", over_udp(1))[0] == REDIRECT
    assert programs.run("fast_in", over_udp(1000)) == (NEXT, over_udp(1000))
    assert programs.run("fast_in", over_udp(1)) == (NEXT, over_udp(1))
    assert programs.run("fast_in", over_udp(1000, udp))[0] == REDIRECT
    assert programs.run("fast_merged", ether(answer()))[0] == REDIRECT
    time.sleep(0.06)
    assert programs.run("fast_in", over_udp(1))[0] == REDIRECT


def test_only_what_the_pair_has_merged_comes_without_headers(programs):
    """A host beside us can send a bare packet to the underlay's device too."""
    programs.configure(OVER_UDP)
    programs.flow(form=UDP)
    bare = ether(answer())
    assert programs.run("fast_in", bare) == (NEXT, bare)
    assert programs.counted()["wrong-source"] == 1
    assert programs.run("fast_merged", bare)[0] == REDIRECT
    for form in (PLAIN, WRAPPED):
        programs.flow(form=form)
        assert programs.run("fast_merged", bare) == (NEXT, bare)
    other = ether(tcp(THERE, "10.5.9.9", PORTS[::-1], b"y"))
    assert programs.run("fast_merged", other) == (NEXT, other)


INTO_TUNNEL = ether(b"", VTEP, PEER_VTEP)


@pytest.mark.parametrize("body", [0, 100, 1360])
def test_what_the_tunnels_device_wraps_is_unwrapped_all_the_same(programs, body):
    programs.flow(form=PLAIN, head=INTO_TUNNEL)
    verdict, data = programs.run("fast_out", from_container(tcp(HERE, THERE, PORTS, b"x" * body)))
    assert (verdict, data[:14]) == (REDIRECT, INTO_TUNNEL)
    answered = tcp(THERE, HERE, PORTS[::-1], b"y" * body)
    verdict, data = programs.run("fast_in", wrapped(answered))
    assert (verdict, data[:14]) == (REDIRECT, MAC_A + ROUTER + b"\x08\x00")
    assert verify(data[14:]).ttl == 63
    assert data[34:] == answered[20:]
    unwrapped = ether(answered)  # by the device
    assert programs.run("fast_in", unwrapped)[0] == REDIRECT
    assert programs.counted()["in"] == 2


@pytest.mark.parametrize("what", ["another peer's", "for another", "with a group policy"])
def test_what_the_tunnels_device_has_to_judge(programs, what):
    programs.flow(form=PLAIN, head=INTO_TUNNEL)
    frame = {
        "another peer's": ether(vxlan(ether(answer(), ROUTER, VTEP), PEER, LOCAL)),
        "for another": wrapped(answer(), mac=ROUTER),
        "with a group policy": wrapped(answer(), flags=0x88),
    }[what]
    assert programs.run("fast_in", frame) == (NEXT, frame)
    assert programs.counted()["wrong-source"] == (what != "with a group policy")


def test_padding_from_the_wire_is_no_harm(programs):
    """Cards pad frames to 60 bytes."""
    programs.flow(form=PLAIN)
    frame = ether(tcp(THERE, HERE, PORTS[::-1]))
    assert len(frame) < 60
    assert programs.run("fast_in", frame.ljust(60, b"\0"))[0] == REDIRECT


ODD = {
    "no flow": {"ports": (4001, 80)},
    "SYN": {"flags": 0x02},
    "SYN and ACK": {"flags": 0x12},
    "FIN": {"flags": 0x11},
    "RST": {"flags": 0x04},
    "IP options": {"options": b"\x01\x01\x01\x01"},
    "first fragment": {"fragment": 0x2000},
    "later fragment": {"fragment": 0x0010},
    "TTL 1": {"ttl": 1},
    "TTL 0": {"ttl": 0},
    "larger than told": {"length": 60},
    "smaller than told": {"length": 1000},
    "larger than seen": {"body": 1361},
}


@pytest.mark.parametrize("what", ODD)
def test_out_leaves_alone(programs, what):
    rest = dict(ODD[what])
    programs.flow()
    frame = from_container(tcp(HERE, THERE, rest.pop("ports", PORTS), b"x" * rest.pop("body", 100), **rest))
    assert programs.run("fast_out", frame) == (NEXT, frame)
    assert programs.counted()["out"] == 0
    ended = what in ("SYN", "SYN and ACK", "FIN", "RST")
    assert bool(programs.flows()) != ended  # what follows has to be let pass anew


@pytest.mark.parametrize("what", sorted(set(ODD) - {"larger than told"}))
@pytest.mark.parametrize("form", [PLAIN, WRAPPED])
def test_in_leaves_alone(programs, form, what):
    rest = dict(ODD[what])
    programs.flow(form=form)
    ports = rest.pop("ports", PORTS)[::-1]
    inner = tcp(THERE, HERE, ports, b"x" * rest.pop("body", 100), **rest)
    frame = ether(inner) if form == PLAIN else wrapped(inner)
    assert programs.run("fast_in", frame) == (NEXT, frame)
    assert programs.counted()["in"] == 0


@pytest.mark.parametrize("cut", [34, 35, 41, 42, 53])
def test_truncated(programs, cut):
    """The kernel takes no shorter frame for a test."""
    programs.flow()
    frame = from_container(segment())[:cut]
    assert programs.run("fast_out", frame) == (NEXT, frame)
    frame = ether(answer())[:cut]
    assert programs.run("fast_in", frame) == (NEXT, frame)
    for more in (cut, 14 + cut, 30 + cut, 50 + cut):
        frame = wrapped(answer())[:more]
        assert programs.run("fast_in", frame) == (NEXT, frame)
        assert programs.run("fast_learn_out", frame, mark=0x1000)[0] == NEXT
    assert programs.counted() == dict.fromkeys(COUNTERS, 0)


@pytest.mark.parametrize("kind", [0x8100, 0x88A8, 0x86DD, 0x0806])
def test_other_protocols_and_vlan_tags(programs, kind):
    programs.flow()
    tagged = struct.pack(">HH", 5, 0x0800) + segment() if kind in (0x8100, 0x88A8) else segment()
    frame = ether(tagged, MAC_A, ROUTER, kind)
    assert programs.run("fast_out", frame)[0] == NEXT
    frame = ether(struct.pack(">HH", 5, 0x0800) + wrapped(answer())[14:], kind=kind)
    assert programs.run("fast_in", frame)[0] == NEXT
    assert programs.counted()["out"] == programs.counted()["in"] == 0


def test_only_tcp_and_udp(programs):
    programs.flow(protocol=1)
    frame = from_container(ip_packet(HERE, THERE, 1, b"\x08\x00" + bytes(30)))
    assert programs.run("fast_out", frame) == (NEXT, frame)


@pytest.mark.parametrize("seen", ["out_seen", "in_seen"])
def test_what_was_learned_lasts_for_a_second(programs, seen):
    programs.flow(**{seen: time.clock_gettime_ns(_MONOTONIC_COARSE) - 1_000_000_001})
    assert programs.run("fast_out", from_container(segment()))[0] == (NEXT if seen == "out_seen" else REDIRECT)
    assert programs.run("fast_in", wrapped(answer()))[0] == (NEXT if seen == "in_seen" else REDIRECT)


def test_out_of_another_container_or_to_another_router(programs):
    programs.flow(device=17)
    frame = from_container(segment())
    assert programs.run("fast_out", frame) == (NEXT, frame)
    programs.flow()
    frame = from_container(segment(), MAC_B)
    assert programs.run("fast_out", frame) == (NEXT, frame)
    assert programs.counted()["wrong-source"] == 2


@pytest.mark.parametrize(
    ("wrong", "counted"),
    [
        ({"source": "10.99.0.3"}, 1),
        ({"mac": MAC_A}, 1),
        ({"destination": "10.99.0.9"}, 0),
        ({"vni": 2}, 0),
        ({"flags": 0x88}, 0),  # GBP
        ({"flags": 0x00}, 0),
        ({"tos": 3}, 0),  # congestion was met
        ({"fragment": 0x2000}, 0),
        ({"options": b"\x01\x01\x01\x01"}, 0),
    ],
)
def test_in_from_elsewhere(programs, wrong, counted):
    programs.flow()
    frame = wrapped(answer(), **wrong)
    assert programs.run("fast_in", frame) == (NEXT, frame)
    assert programs.counted()["wrong-source"] == counted
    assert programs.counted()["in"] == 0


def test_in_not_of_the_form_that_goes_out(programs):
    """A flow that leaves wrapped does not come in plain."""
    programs.flow()
    assert programs.run("fast_in", ether(answer()))[0] == NEXT
    programs.flow(form=PLAIN)
    assert programs.run("fast_in", wrapped(answer()))[0] == NEXT
    assert programs.counted()["wrong-source"] == 2


def test_in_for_another_host(programs):
    """A switch that floods: the frame is not to us."""
    programs.flow(form=PLAIN)
    assert programs.run("fast_in", ether(answer(), MAC_A, MAC_B))[0] == NEXT
    assert programs.run("fast_in", ether(answer()))[0] == REDIRECT


def test_super_packets_go_by_the_size_of_their_segments(programs):
    programs.flow(form=PLAIN, most=1400)
    large = tcp(HERE, THERE, PORTS, b"x" * 2720)
    assert programs.run("fast_out", from_container(large), gso=1360)[0] == REDIRECT
    assert programs.counted()["out"] == 3
    assert programs.run("fast_out", from_container(large), gso=1361)[0] == NEXT
    assert (
        programs.run("fast_out", from_container(tcp(HERE, THERE, PORTS, b"x" * 2720, length=1400)), gso=1360)[0] == NEXT
    )
    assert programs.counted()["too-large"] == 3


LEARNED = ether(vxlan(ether(segment(ttl=63), VTEP, PEER_VTEP), LOCAL, PEER), MAC_A, MAC_B)


def test_learning_makes_the_fast_path(programs):
    """Both ways by the ordinary path, then the next packets by the fast one: with the same headers."""
    programs.run("fast_learn_in", ether(answer(), ROUTER, MAC_A), mark=0x1000)
    assert programs.run("fast_out", from_container(segment()))[0] == NEXT  # the way out is not known yet
    programs.run("fast_learn_out", LEARNED, mark=0x1000)
    verdict, data = programs.run("fast_out", from_container(segment()))
    assert verdict == REDIRECT
    assert data[:14] == LEARNED[:14]
    assert data[20:24] == LEARNED[20:24]  # DF, TTL, protocol
    assert data[26:38] == LEARNED[26:38]  # outer addresses and ports
    assert data[42:64] == LEARNED[42:64]
    verdict, data = programs.run("fast_in", wrapped(answer()))
    assert (verdict, data[:12]) == (REDIRECT, MAC_A + ROUTER)
    counted = programs.counted()
    assert (counted["learned-out"], counted["learned-in"], counted["out"], counted["in"]) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("fast_learn_out", ether(vxlan(ether(segment(flags=0x11), VTEP, PEER_VTEP), LOCAL, PEER))),  # FIN
        ("fast_learn_out", ether(vxlan(ether(segment(fragment=0x2000), VTEP, PEER_VTEP), LOCAL, PEER))),
        ("fast_learn_out", ether(vxlan(ether(segment(), VTEP, PEER_VTEP), LOCAL, PEER, fragment=0x2000))),
        ("fast_learn_out", ether(vxlan(ether(tcp(LOCAL, THERE, PORTS), VTEP, PEER_VTEP), LOCAL, PEER))),
        ("fast_learn_out", ether(tcp(HERE, "10.5.1.3", PORTS))),  # between containers of this host
        ("fast_learn_out", ether(tcp(LOCAL, THERE, PORTS))),  # the host's own
        ("fast_learn_out", ether(ip_packet(HERE, THERE, 1, bytes(40)))),
        ("fast_learn_in", ether(tcp("10.5.1.3", HERE, PORTS))),
        ("fast_learn_in", ether(tcp(THERE, "10.5.3.2", PORTS))),
        ("fast_learn_in", ether(answer(flags=0x12))),
        ("fast_learn_in", ether(answer(fragment=0x0010))),
        ("fast_learn_in", ether(answer(options=b"\x01\x01\x01\x01"))),
    ],
)
def test_nothing_is_learned_from(programs, name, frame):
    assert programs.run(name, frame, mark=0x1000) == (NEXT, frame)
    assert programs.flows() == {}


@pytest.mark.parametrize("mark", [0, 0x4000, 0x8000, 0xEFFF])
def test_nothing_is_learned_without_the_mark(programs, mark):
    programs.run("fast_learn_out", LEARNED, mark=mark)
    programs.run("fast_learn_in", ether(answer(), ROUTER, MAC_A), mark=mark)
    assert programs.flows() == {}


def test_a_larger_packet_does_not_make_the_second_longer(programs):
    programs.flow(age=0.9, most=200)
    before = next(iter(programs.flows().values()))
    programs.run("fast_learn_in", ether(tcp(THERE, HERE, PORTS[::-1], b"y" * 1000), ROUTER, MAC_A), mark=0x1000)
    after = next(iter(programs.flows().values()))
    assert before[72:80] == after[72:80]  # in_seen
    assert struct.unpack_from("=H", after, 90) == (1040,)  # in_most


def test_a_new_second_begins_with_the_size_of_its_first_packet(programs):
    programs.flow(age=5)
    programs.run("fast_learn_in", ether(answer(), ROUTER, MAC_A), mark=0x1000)
    assert struct.unpack_from("=H", next(iter(programs.flows().values())), 90) == (140,)


def test_a_changed_way_is_followed(programs):
    programs.flow()
    moved = ether(vxlan(ether(segment(), VTEP, PEER_VTEP), LOCAL, "10.99.0.7"), MAC_A, MAC_B)
    programs.run("fast_learn_out", moved, mark=0x1000)
    verdict, data = programs.run("fast_out", from_container(segment()))
    assert (verdict, data[30:34]) == (REDIRECT, address("10.99.0.7"))
    assert programs.run("fast_in", wrapped(answer()))[0] == NEXT  # no longer by the former host
    assert programs.run("fast_in", wrapped(answer(), source="10.99.0.7"))[0] == REDIRECT


def test_the_probe(programs):
    assert programs.run("fast_probe", ether(segment()))[0] == 0
