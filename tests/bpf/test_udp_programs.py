"""The udp backend's programs, each run by the kernel on packets made by hand (BPF_PROG_TEST_RUN): nothing of it goes anywhere."""

from __future__ import annotations

import struct
import time

import msgspec
import pytest

from support.packets import MAC_A, UDP_PORT, address, ether, ip, tcp, udp, verify
from wincey.bpf import program, syscall
from wincey.bpf.maps import Map, processors
from wincey.bpf.program import read_baked
from wincey.bpf.udp import CHECKS, CONFIG, COUNTERS, PROCESS, ROUTE, ROUTE_KEY

pytestmark = pytest.mark.root

NEXT, DROP, REDIRECT = 0xFFFFFFFF, 2, 7
LOCAL, PEER, OTHER, STRANGER = "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.99"
MINE, THEIRS, OTHERS, NOBODYS, FOREIGN = "10.1.1.5", "10.1.2.5", "10.1.3.5", "10.1.9.9", "203.0.113.7"
MERGE_MAC = bytes.fromhex("02aabbccddee")
BAKED = read_baked("udp")
MTU = 1472
_MONOTONIC_COARSE = 6  # linux/time.h: the clock of the programs


class Programs:
    """The loaded programs, with a map each of small size."""

    def __init__(self) -> None:
        layouts = {
            name: msgspec.structs.replace(each, entries=each.entries if name == "merged" else min(each.entries, 64))
            for name, each in BAKED.maps.items()
        }
        self.maps = {name: Map.create(name, layout) for name, layout in layouts.items()}
        self.fds = program.load(BAKED, self.maps)
        self.configure()
        for subnet, host, flags in (("10.1.2.0", PEER, 0), ("10.1.3.0", OTHER, PROCESS)):
            self.maps["routes"].put(ROUTE_KEY.pack(24, address(subnet)), ROUTE.pack(address(host), flags))
            self.maps["hosts"].put(address(host), bytes(4))

    def configure(self, check: str = "network") -> None:
        value = CONFIG.pack(
            address(LOCAL), address("10.1.0.0"), address("255.255.0.0"), 2, 3, 4, 5,
            UDP_PORT.to_bytes(2, "big"), MTU, MERGE_MAC, CHECKS[check],
        )  # fmt: skip
        self.maps["config"].put(bytes(4), value)

    def run(self, name: str, frame: bytes, context: bytes = b"") -> tuple[int, bytes]:
        verdict, out, _ = syscall.prog_test_run(self.fds[name], frame, context=context)
        return verdict, out

    def counted(self) -> dict[str, int]:
        totals = {name: self.maps["counters"].total(index) for index, name in enumerate(COUNTERS)}
        return {name: total for name, total in totals.items() if total}

    def merged(self) -> dict[bytes, tuple[int, int]]:
        """When segments of a flow last went through the merging pair, any and large ones, by the flow's place."""
        found = {place: struct.unpack("=QQ", times) for place, times in self.maps["merged"].items().items()}
        return {place: times for place, times in found.items() if any(times)}

    def close(self) -> None:
        program.close(self.fds)
        for each in self.maps.values():
            each.close()


@pytest.fixture(scope="module")
def loaded():
    programs = Programs()
    yield programs
    programs.close()


@pytest.fixture
def programs(loaded):
    """As they were loaded, with nothing counted and nothing seen."""
    loaded.configure()
    for index in range(len(COUNTERS)):
        syscall.map_update(loaded.maps["counters"].fd, struct.pack("=I", index), bytes(8 * processors()))
    for place in loaded.merged():
        loaded.maps["merged"].put(place, bytes(16))
    return loaded


def wire(
    inner: bytes, sender: str = PEER, *, port: int = UDP_PORT, to: str = LOCAL, check: bool = False, **rest
) -> bytes:
    """A peer's frame."""
    return ether(udp(sender, to, (UDP_PORT, port), inner, check=check, **rest))


def inner(size: int = 100, source: str = THEIRS, destination: str = MINE, **rest) -> bytes:
    return udp(source, destination, (1000, 2000), bytes(size), **rest)


def gso(size: int, segments: int) -> bytes:
    """struct __sk_buff, of which the kernel takes the fields of segmentation."""
    context = bytearray(192)
    struct.pack_into("=I", context, 164, segments)
    struct.pack_into("=I", context, 176, size)
    return bytes(context)


# --- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 1444])
@pytest.mark.parametrize("check", [False, True])
def test_a_peers_packet_is_unwrapped(programs, size, check):
    packet = inner(size)
    verdict, out = programs.run("udp_wire_in", wire(packet, check=check))
    assert verdict == REDIRECT
    assert out == ether(packet, source=MAC_A, destination=MERGE_MAC)
    assert programs.counted() == {"in.packets": 1, "in.bytes": len(packet)}


@pytest.mark.parametrize(
    "packet",
    [
        inner(fragment=0x2000),
        inner(fragment=0x00B9),
        inner(options=b"\x94\x04\x00\x00"),
        inner(ttl=1),
        inner(tos=0xB9),
        ip(THEIRS, MINE, 1, b"\x08\x00\xf7\xff\0\0\0\0"),
        tcp(THEIRS, MINE, (1, 2), bytes(1000), flags=2),
        ip(THEIRS, MINE, 99, b""),
    ],
    ids=["first fragment", "last fragment", "options", "ttl 1", "tos", "icmp", "tcp", "header alone"],
)
def test_inner_packets_of_all_kinds_are_left_as_they_are(programs, packet):
    verdict, out = programs.run("udp_wire_in", wire(packet))
    assert (verdict, out[14:]) == (REDIRECT, packet)


@pytest.mark.parametrize(
    "frame",
    [
        wire(inner(), port=8286),
        wire(inner(), to="192.0.2.77"),
        wire(inner(), to="224.0.0.1"),
        wire(inner(), options=b"\x94\x04\x00\x00"),  # outer options: not our place
        ether(tcp(PEER, LOCAL, (UDP_PORT, UDP_PORT), inner())),
        ether(inner(), kind=0x0806),
        ether(b"\x60" + bytes(60), kind=0x86DD),
        ether(b"\0\x05\x08\0" + wire(inner())[14:], kind=0x8100),
        ether(wire(inner())[14:], destination=b"\x02\0\0\0\0\x77"),  # another host's: we are promiscuous
        ether(bytes(20)),
        wire(b"")[: 14 + 28],
        wire(bytes(19)),
    ],
    ids=[
        "port", "address", "multicast", "options", "tcp", "arp", "ipv6", "vlan", "other host", "zeros", "empty", "short",
    ],
)  # fmt: skip
def test_what_is_not_ours_is_left_to_the_host_untouched_and_uncounted(programs, frame):
    verdict, out = programs.run("udp_wire_in", frame)
    assert (verdict, out) == (NEXT, frame)
    assert programs.counted() == {}


def damaged(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


@pytest.mark.parametrize(
    "frame",
    [
        wire(inner(), fragment=0x2000),
        wire(inner(), fragment=0x0010),
        damaged(wire(inner()), 24, b"\x12\x34"),
        wire(inner()[:-1]),
        wire(inner() + b"\0"),
        wire(inner() + inner()),
        wire(damaged(inner(), 0, b"\x65")),
        wire(damaged(inner(), 0, b"\x44")),
        wire(inner())[:-10],
        damaged(wire(inner()), 38, b"\x00\x30"),
    ],
    ids=[
        "first outer fragment", "later outer fragment", "outer checksum", "inner cut off", "inner with a tail",
        "two in one", "inner version 6", "inner header too short", "frame cut off", "outer lengths differ",
    ],
)  # fmt: skip
def test_what_is_ours_but_not_as_we_make_it_is_the_keepers(programs, frame):
    verdict, out = programs.run("udp_wire_in", frame)
    assert (verdict, out) == (NEXT, frame)
    assert programs.counted() == {"in.passed": 1}


PASS, KEEP, LOSE = REDIRECT, NEXT, DROP


@pytest.mark.parametrize(
    ("source", "sender", "strict", "network", "off"),
    [
        (THEIRS, PEER, PASS, PASS, PASS),
        (OTHERS, PEER, LOSE, LOSE, PASS),
        (NOBODYS, PEER, LOSE, LOSE, PASS),
        (MINE, PEER, LOSE, LOSE, PASS),
        (FOREIGN, PEER, LOSE, PASS, PASS),
        (THEIRS, STRANGER, KEEP, KEEP, PASS),
        (FOREIGN, STRANGER, KEEP, KEEP, PASS),
    ],
    ids=[
        "its own",
        "another's",
        "nobody's",
        "ours",
        "foreign",
        "a stranger with a peer's",
        "a stranger with a foreign one",
    ],
)
@pytest.mark.parametrize("check", ["strict", "network", "off"])
def test_inner_sources_are_checked(programs, source, sender, strict, network, off, check):
    expected = {"strict": strict, "network": network, "off": off}[check]
    programs.configure(check)
    verdict, _ = programs.run("udp_wire_in", wire(inner(source=source), sender))
    assert verdict == expected
    counter = {PASS: "in.packets", KEEP: "in.passed", LOSE: "in.drop.source"}[expected]
    assert programs.counted()[counter] == 1


def test_a_batch_of_a_process_is_the_keepers(programs):
    """UDP segmentation offload puts several datagrams of one size into one packet: taken apart it would be one wrong one."""
    frame = wire(inner(100) + inner(100))
    assert programs.run("udp_wire_in", frame, gso(156, 2)) == (NEXT, frame)


def test_packets_that_the_kernel_can_not_unwrap_whole_are_left_as_they_are(programs):
    frame = wire(tcp(THEIRS, MINE, (1, 2), bytes(2500)))
    assert programs.run("udp_wire_in", frame, gso(900, 3)) == (NEXT, frame)  # no type of segmentation in a test run
    assert programs.counted() == {"in.passed": 1}


def test_small_segments_pass_the_merging_pair_by_unless_something_of_their_flow_may_be_in_it(programs):
    def sent(packet):
        assert programs.run("udp_wire_in", wire(packet)) == (REDIRECT, ether(packet, destination=MERGE_MAC))
        return programs.merged()

    def segment(size, port=80):
        return tcp(THEIRS, MINE, (port, 2000), bytes(size))

    assert sent(segment(0)) == sent(segment(88)) == {}
    ((place, (small, large)),) = sent(segment(89)).items()
    assert small == 0 < large
    assert sent(inner(1000)) == {place: (small, large)}  # no TCP
    assert sent(segment(0, port=81)) == {place: (small, large)}  # another flow
    for age, through in (((0, 0), True), ((0, 50), True), ((1, 5), True), ((1, 50), False)):
        for _ in range(1000):  # until nothing has come between
            clocks = time.monotonic_ns(), time.clock_gettime_ns(_MONOTONIC_COARSE)
            before = tuple(clock - each * 1_000_000 for clock, each in zip(clocks, age, strict=True))
            programs.maps["merged"].put(place, struct.pack("=QQ", *before))
            verdict, _ = programs.run("udp_wire_in", wire(segment(1)))
            if time.monotonic_ns() - before[0] - age[0] * 1_000_000 < 90_000:
                break
        now = programs.merged()[place]
        assert verdict == REDIRECT
        assert now[1] == before[1]
        assert (now[0] > before[0]) is through, age
    options = ip(THEIRS, MINE, 6, segment(0)[20:], options=bytes([1, 1, 1, 0]))
    assert len(sent(options)) == 1  # through it: whose it is nobody has looked


def test_merged_packets_enter_by_the_tun_and_nothing_else_does(programs):
    assert programs.run("udp_merge_in", ether(inner()))[0] == REDIRECT
    assert programs.run("udp_merge_in", ether(b"\x60" + bytes(60), kind=0x86DD))[0] == DROP


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 1444])
@pytest.mark.parametrize("tos", [0, 0xB9])
@pytest.mark.parametrize("fragment", [0, 0x4000, 0x2000])
def test_a_packet_is_wrapped(programs, size, tos, fragment):
    packet = inner(size, MINE, THEIRS, tos=tos, fragment=fragment)
    verdict, out = programs.run("udp_cut_in", ether(packet))
    assert verdict == REDIRECT
    assert out[42:] == packet
    outer = out[14:34]
    assert (outer[1], outer[6:8], outer[8], outer[9]) == (0, b"\0\0", 64, 17)  # tos, DF clear, TTL, UDP
    assert out[34:42] == struct.pack(">HHHH", UDP_PORT, UDP_PORT, 8 + len(packet), 0)
    seen = verify(out[14:])
    assert (seen.outer, seen.source, seen.destination, seen.size) == (LOCAL, MINE, THEIRS, len(packet))
    assert out[30:34] == address(PEER)
    assert programs.counted() == {"out.packets": 1, "out.bytes": len(packet)}


def test_outer_packets_have_numbers_of_their_own(programs):
    """The underlay may fragment, and puts fragments together by these."""
    numbers = {programs.run("udp_cut_in", ether(inner(10, MINE, THEIRS)))[1][18:20] for _ in range(20)}
    assert len(numbers) > 15


def test_what_has_no_way_does_not_leave_a_pair(programs):
    assert programs.run("udp_cut_in", ether(inner(10, MINE, NOBODYS)))[0] == DROP
    assert programs.counted() == {"out.drop.error": 1}
    assert programs.run("udp_cut_in", ether(b"\x60" + bytes(60), kind=0x86DD))[0] == DROP


def bare(size: int, destination: str) -> bytes:
    """A bare IP packet. The kernel reads an Ethernet header there in a test run: 8.0 of the source is its type, IPv4."""
    return udp("8.0.0.1", destination, (1, 2), bytes(size))


def test_a_packet_without_a_route_is_the_keepers(programs):
    packet = bare(100, NOBODYS)
    assert programs.run("udp_tun_out", packet) == (NEXT, packet)
    assert programs.counted() == {"out.passed": 1}


def test_a_packet_that_is_too_large_is_the_keepers(programs):
    assert programs.run("udp_tun_out", bare(MTU - 28, THEIRS))[0] == REDIRECT
    assert programs.run("udp_tun_out", bare(MTU - 27, THEIRS))[0] == NEXT
    assert programs.counted()["out.passed"] == 1


def test_a_process_gets_finished_packets(programs):
    packet = bare(100, OTHERS)
    verdict, out = programs.run("udp_tun_out", packet)
    assert (verdict, out[-len(packet) :]) == (REDIRECT, packet)  # into the pair, with an Ethernet header in front
    assert len(out) == len(packet) + 14
    assert programs.counted() == {"out.cut": 1}


def test_without_a_configuration_nothing_is_touched(programs):
    programs.maps["config"].put(bytes(4), bytes(CONFIG.size))
    frame = wire(inner())
    assert programs.run("udp_wire_in", frame) == (NEXT, frame)


def test_the_longest_prefix_decides(programs):
    programs.maps["routes"].put(ROUTE_KEY.pack(28, address("10.1.2.0")), ROUTE.pack(address(OTHER), 0))
    _, out = programs.run("udp_cut_in", ether(inner(10, MINE, "10.1.2.5")))
    assert out[30:34] == address(OTHER)
    _, out = programs.run("udp_cut_in", ether(inner(10, MINE, "10.1.2.50")))
    assert out[30:34] == address(PEER)
    programs.maps["routes"].delete(ROUTE_KEY.pack(28, address("10.1.2.0")))


# --- baking ----------------------------------------------------------------------------------------------------------


def test_the_layouts_here_and_there_are_the_same():
    sizes = {name: (layout.key, layout.value) for name, layout in BAKED.maps.items()}
    assert sizes["config"][1] == CONFIG.size
    assert sizes["routes"] == (ROUTE_KEY.size, ROUTE.size)
    assert len(COUNTERS) <= BAKED.maps["counters"].entries
