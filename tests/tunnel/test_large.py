"""Large packets cut and made, by both engines that do it, on packets made by hand; what one does, the other does byte for byte."""

import contextlib
import errno
import os
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.packets import ones_sum, verify
from support.tunnel import LARGE, Bench, drain
from wincey.tunnel import device
from wincey.tunnel.large import HEADER

ROOT = Path(__file__).parents[2]
VIRTIO = struct.Struct("=BBHHHH")
OURS, THEIRS = bytes((10, 3, 1, 2)), bytes((10, 3, 2, 2))
TCP, UDP = 6, 17
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 7))
TCPV4, UDP_L4, ECN = 1, 5, 0x80
TIMESTAMPS = bytes((1, 1, 8, 10)) + bytes(range(8))
TRAIN = 103  # UDP_SEGMENT


def packet(
    payload, *, out, protocol=TCP, number=0, identity=1, flags=ACK, options=b"", fragment=0x4000, tos=0, ttl=9,
    window=500, port=1000, ip_options=b"", wrong=False, unchecked=False,
):  # fmt: skip
    """A whole packet of one flow. number: bytes of the flow before this one. wrong: so is its checksum."""
    source, destination = (OURS, THEIRS) if out else (THEIRS, OURS)
    if protocol == TCP:
        header = struct.pack(
            "!HHIIBBHHH",
            port,
            80,
            (0xFFFFF000 + number) & 0xFFFFFFFF,
            77,
            (20 + len(options)) << 2,
            flags,
            window,
            0,
            0,
        )
        header += options
        at = 16
    else:
        header, at = struct.pack("!HHHH", port, 53, 8 + len(payload), 0), 6
    pseudo = source + destination + struct.pack("!HH", protocol, len(header) + len(payload))
    check = 65535 - ones_sum(pseudo + header + payload)
    check = 0 if unchecked else (check or 65535) ^ (0x1234 if wrong else 0)
    header = header[:at] + struct.pack("!H", check) + header[at + 2 :]
    length = 20 + len(ip_options) + len(header) + len(payload)
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45 + len(ip_options) // 4, tos, length, identity & 65535, fragment, ttl, protocol, 0, source, destination
    ) + ip_options  # fmt: skip
    return ip[:10] + struct.pack("!H", 65535 - ones_sum(ip)) + ip[12:] + header + payload


def large(whole, size, *, kind=TCPV4):
    """The frame that the kernel hands over: the checksum field holds the pseudo header's sum alone."""
    ip = (whole[0] & 15) * 4
    offset = 16 if whole[9] == TCP else 6
    partial = ones_sum(whole[12:20] + struct.pack("!HH", whole[9], len(whole) - ip))
    header = VIRTIO.pack(1, kind, 0, size, ip, offset)
    return header + whole[: ip + offset] + struct.pack("!H", partial) + whole[ip + offset + 2 :]


def flow(sizes, *, flags=ACK, **rest):
    """Consecutive packets of one flow, with payloads of these sizes; the last one has `flags`."""
    data = random.Random(7).randbytes(sum(sizes))
    made, at = [], 0
    for index, size in enumerate(sizes):
        last = index == len(sizes) - 1
        more = {"identity": 65534 + index, "flags": flags if last else ACK, "number": at, **rest}
        made.append(packet(data[at : at + size], out=False, **more))
        at += size
    return made


@pytest.fixture(params=LARGE)
def bench(request):
    bench = Bench(request.param)
    yield bench
    bench.close()


@contextlib.contextmanager
def both():
    with contextlib.ExitStack() as stack:
        benches = [Bench(engine) for engine in LARGE]
        for bench in benches:
            stack.callback(bench.close)
        yield benches


@pytest.mark.parametrize("options", [b"", TIMESTAMPS, bytes(40)])
@pytest.mark.parametrize(("length", "size"), [(65000, 1400), (65000, 536), (2801, 1400), (2800, 1400), (1000, 1400)])
def test_a_large_tcp_packet_is_cut(bench, options, length, size):
    data = random.Random(1).randbytes(length)
    flags = ACK | PSH | FIN | CWR | ECE
    frame = large(packet(data, out=True, options=options, identity=65530, flags=flags), size, kind=TCPV4 | ECN)
    segments = bench.frames_from_tun(frame)
    head = 40 + len(options)
    assert b"".join(segment[head:] for segment in segments) == data
    for index, segment in enumerate(segments):
        assert verify(segment).size == len(segment) == head + min(size, length - index * size)
        assert struct.unpack_from("!H", segment, 4)[0] == (65530 + index) & 65535
        assert struct.unpack_from("!I", segment, 24)[0] == (0xFFFFF000 + index * size) & 0xFFFFFFFF
        first, last = index == 0, index == len(segments) - 1
        assert segment[33] == ACK | ECE | (CWR if first else 0) | (PSH | FIN if last else 0)
        assert segment[40:head] == options
    assert bench.counted()["out.packets"] == len(segments)
    assert bench.counted()["out.bytes"] == sum(map(len, segments))
    assert bench.relay.counters["out.sends"] <= 1 + len(segments) // 40


@pytest.mark.parametrize(("length", "size"), [(60000, 1400), (1401, 1400), (640, 10), (7, 10)])
def test_a_large_udp_packet_is_cut(bench, length, size):
    data = random.Random(1).randbytes(length)
    segments = bench.frames_from_tun(large(packet(data, out=True, protocol=UDP), size, kind=UDP_L4))
    assert b"".join(segment[28:] for segment in segments) == data
    assert {verify(segment).size for segment in segments[:-1]} <= {28 + size}
    verify(segments[-1])


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_an_unfinished_checksum_is_finished(bench, protocol):
    whole = packet(b"odd", out=True, protocol=protocol)
    frame = large(whole, 0, kind=0)
    assert bench.frames_from_tun(frame) == [whole]
    unknown = VIRTIO.pack(1, 0, 0, 0, 60000, 16) + whole
    assert bench.frames_from_tun(unknown) == []
    assert bench.counted()["out.drop.offload"] == 1


def test_a_udp_checksum_of_zero_is_sent_as_ones(bench):
    """0 says that there is none (RFC 768)."""
    # What the sum lacks to be all ones: as payload it makes it so.
    short = packet(bytes(2), out=True, protocol=UDP)[26:28]
    whole = packet(short, out=True, protocol=UDP)
    assert whole[26:28] == b"\xff\xff"
    assert bench.frames_from_tun(large(whole, 0, kind=0)) == [whole]
    assert bench.frames_from_tun(large(whole, 2, kind=UDP_L4)) == [whole]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frame: frame[:1] + bytes([3]) + frame[2:],  # UFO, which we never offered
        lambda frame: frame[:1] + bytes([UDP_L4]) + frame[2:],  # of a TCP packet
        lambda frame: frame[:4] + bytes(2) + frame[6:],  # segments of no size
        lambda frame: frame[: HEADER + 6] + b"\x20\x00" + frame[HEADER + 8 :],  # a fragment
        lambda frame: frame[: HEADER + 32] + b"\x10" + frame[HEADER + 33 :],  # a TCP header of 4 bytes
        lambda frame: frame[: HEADER + 2] + struct.pack("!H", 40) + frame[HEADER + 4 : HEADER + 40],  # nothing to cut
    ],
)
def test_a_malformed_large_packet_is_dropped_and_counted(bench, spoil):
    frame = large(packet(bytes(3000), out=True), 1400)
    assert bench.frames_from_tun(spoil(frame)) == []
    assert bench.counted()["out.drop.offload"] == 1
    assert len(bench.frames_from_tun(frame)) == 3


def test_packets_of_one_size_leave_in_a_train_and_in_order(bench):
    packets = [packet(bytes(18), out=True, protocol=UDP, identity=i) for i in range(60)]
    mixed = [*packets[:20], packet(bytes(5), out=True), *packets[20:], packet(bytes(1400), out=True)]
    assert bench.from_tun(*mixed) == mixed
    assert bench.relay.counters["out.sends"] < 10


@pytest.mark.parametrize(
    "packets",
    [
        flow([1400] * 10),
        flow([1400] * 9 + [7], flags=ACK | PSH),
        flow([1400] * 3, flags=ACK | PSH | FIN, options=TIMESTAMPS),
        flow([100] * 16),
        flow([1000] * 5, fragment=0),
        flow([200] * 8, protocol=UDP, fragment=0),
        flow([200] * 8 + [1], protocol=UDP),
    ],
)
def test_consecutive_packets_are_merged_and_cut_to_the_same_again(bench, packets):
    (frame,) = bench.frames_from_underlay(*packets)
    flags, kind, header, size, start, offset = VIRTIO.unpack_from(frame)
    assert (flags, kind) == (1, TCPV4 if packets[0][9] == TCP else UDP_L4)
    assert (start, offset) == (20, 16 if packets[0][9] == TCP else 6)
    assert header + size == len(packets[0])
    whole = frame[HEADER:]
    assert ones_sum(whole[:20]) == 0xFFFF
    assert struct.unpack_from("!H", whole, 2)[0] == len(whole)
    assert struct.unpack_from("!H", whole, start + offset)[0] == ones_sum(
        whole[12:20] + struct.pack("!HH", whole[9], len(whole) - 20)
    )
    assert bench.counted()["in.packets"] == len(packets)
    assert bench.counted()["in.bytes"] == sum(map(len, packets))
    assert returned(bench, [frame]) == packets


def returned(bench, frames):
    """What the frames are when they are cut again, on their way back to where they came from."""
    turned = []
    for frame in frames:
        whole = frame[HEADER:]
        turned.append(frame[:HEADER] + whole[:12] + OURS + THEIRS + whole[20:])
    back = bench.frames_from_tun(*turned)
    return [segment[:12] + THEIRS + OURS + segment[20:] for segment in back]


def test_packets_with_df_may_all_have_one_id(bench):
    packets = flow([100] * 5, protocol=UDP, identity=0)
    (frame,) = bench.frames_from_underlay(*packets)
    assert VIRTIO.unpack_from(frame)[3] == 100
    without = flow([100] * 5, protocol=UDP, identity=0, fragment=0)
    assert bench.from_underlay(*without) == without


@pytest.mark.parametrize(
    "second",
    [
        {"number": 1401},
        {"number": 0},
        {"identity": 9},
        {"tos": 4},
        {"ttl": 8},
        {"window": 501},
        {"port": 1001},
        {"flags": ACK | SYN},
        {"flags": ACK | RST},
        {"flags": ACK | URG},
        {"flags": ACK | CWR},
        {"flags": ACK | ECE},
        {"flags": 0},
        {"options": TIMESTAMPS},
        {"fragment": 0},
        {"fragment": 0x2000},
        {"fragment": 0x4001},
        {"fragment": 0xC000},
        {"ip_options": bytes((148, 4, 0, 0))},
        {"wrong": True},
        {"protocol": UDP},
    ],
)
def test_packets_that_are_not_consecutive_are_not_merged(bench, second):
    """A window or an ECE of its own is harmless to merge for some; we keep every header as it came."""
    one = packet(bytes(1400), out=False, number=0, identity=1)
    two = packet(bytes(1400), out=False, **{"number": 1400, "identity": 2, **second})
    assert bench.from_underlay(one, two, one) == [one, two, one]


@pytest.mark.parametrize("sizes", [[1400, 1401], [1000, 1400]])
def test_a_larger_packet_is_not_merged(bench, sizes):
    packets = flow(sizes)
    assert bench.from_underlay(*packets) == packets


def test_nothing_follows_a_push_or_a_shorter_packet(bench):
    packets = [
        *flow([100, 100], flags=ACK | PSH),
        packet(bytes(100), out=False, number=200, identity=65536),
        packet(bytes(10), out=False, number=300, identity=65537),
        packet(bytes(10), out=False, number=310, identity=65538),
    ]
    frames = bench.frames_from_underlay(*packets)
    assert [VIRTIO.unpack_from(frame)[3] for frame in frames] == [100, 100, 0]


def test_unverified_packets_stay_alone(bench):
    """A wrong checksum is for the kernel to see, and UDP without one can't be merged."""
    for rest in ({"wrong": True}, {"protocol": UDP, "wrong": True}, {"protocol": UDP, "unchecked": True}):
        packets = flow([100] * 4, **rest)
        assert bench.from_underlay(*packets) == packets
    spoiled = flow([100] * 4)
    spoiled[0] = spoiled[0][:10] + bytes(2) + spoiled[0][12:]  # of the IP header
    assert bench.frames_from_underlay(*spoiled)[0] == bytes(HEADER) + spoiled[0]


def test_no_large_packet_is_larger_than_a_packet_can_be(bench):
    packets = flow([16000] * 7)
    frames = bench.frames_from_underlay(*packets)
    assert max(map(len, frames)) <= HEADER + 65535
    assert returned(bench, frames) == packets


def test_a_merged_datagram_of_the_kernel_is_taken_apart(bench):
    """The kernel merges datagrams as it likes: what it says of their size counts."""
    assert device.set_merging(bench.udp, on=True)
    packets = flow([100] * 6)
    bench.peer.sendmsg(
        packets, [(socket.IPPROTO_UDP, TRAIN, struct.pack("=H", len(packets[0])))], 0, bench.udp.getsockname()
    )
    bench.relay.inbound()
    (frame,) = drain(bench.host)
    assert returned(bench, [frame]) == packets


@pytest.mark.parametrize("engine", ["bare", "plain", *LARGE])
def test_what_the_kernel_merged_for_a_predecessor_is_taken_apart(engine):
    bench = Bench(engine)
    try:
        assert device.set_merging(bench.udp, on=True)
        packets = [packet(bytes([i]) * 100, out=False, protocol=UDP, unchecked=True) for i in range(6)]
        bench.peer.sendmsg(
            packets, [(socket.IPPROTO_UDP, TRAIN, struct.pack("=H", len(packets[0])))], 0, bench.udp.getsockname()
        )
        device.set_merging(bench.udp, on=False)
        assert bench.from_underlay() == packets
        twice = packets[0] + packets[1][:-1]
        assert bench.from_underlay(twice) == []
        assert bench.counted()["in.drop.length"] == 1
    finally:
        bench.close()


def test_the_plain_engine_finishes_what_a_predecessor_let_the_kernel_leave():
    bench = Bench("plain")
    try:
        data = bytes(range(250)) * 20
        frame = large(packet(data, out=True), 1400)
        for _ in range(2):
            segments = bench.frames_from_tun(frame)
            assert b"".join(segment[40:] for segment in segments) == data
            assert [verify(segment).size for segment in segments] == [1440, 1440, 1440, 840]
    finally:
        bench.close()


def test_a_train_that_the_kernel_refuses_goes_one_by_one(bench):
    """Without outer checksums it segments nothing: EINVAL, as for segments larger than the way there takes."""
    bench.udp.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
    packets = [packet(bytes(size), out=True, protocol=UDP) for size in (100, 100, 60, 60, 30)]
    for _ in range(2):
        assert bench.from_tun(*packets) == packets
    assert bench.counted() == {
        "in.packets": 0, "in.bytes": 0, "out.packets": 10, "out.bytes": 2 * sum(map(len, packets)),
    }  # fmt: skip


def test_a_device_that_takes_no_large_packets_gets_them_one_by_one(monkeypatch):
    bench = Bench("python")
    write = os.writev

    def old(tun, buffers):
        if buffers[0][1:2] not in (b"", b"\0"):
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(tun, buffers)

    monkeypatch.setattr(os, "writev", old)
    try:
        for packets in (flow([100] * 4), flow([100] * 4), flow([100] * 4, protocol=UDP)):
            assert bench.from_underlay(*packets) == packets
        assert bench.counted()["in.packets"] == 12
    finally:
        bench.close()


def test_an_engine_without_its_device_says_so(bench):
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    bench.relay.tun = write
    bench.peer.sendto(packet(b"x", out=False), bench.udp.getsockname())
    with pytest.raises(OSError, match="Bad file"):
        bench.relay.inbound()


FLAGS = st.sampled_from([ACK, ACK, ACK, ACK | PSH, ACK | FIN, ACK | SYN, ACK | ECE, ACK | CWR])


@st.composite
def traffic(draw):
    """Packets most of which follow each other, some of which are spoiled."""
    packets, number, identity = [], 0, draw(st.integers(0, 65535))
    protocol = draw(st.sampled_from([TCP, TCP, UDP]))
    usual = draw(st.sampled_from([1, 2, 99, 100]))
    for _ in range(draw(st.integers(1, 16))):
        size = draw(st.sampled_from([usual, usual, usual, usual, 1, usual + 1, 0]))
        identity += draw(st.sampled_from([1, 1, 1, 1, 1, 0, 2]))
        number += draw(st.sampled_from([0] * 9 + [1]))
        made = packet(
            draw(st.binary(min_size=size, max_size=size)),
            out=False, protocol=protocol, number=number, identity=identity, flags=draw(FLAGS),
            options=draw(st.sampled_from([b"", b"", b"", TIMESTAMPS])), fragment=draw(st.sampled_from([0x4000] * 7 + [0, 0x2000])),
            wrong=draw(st.sampled_from([False] * 9 + [True])), tos=draw(st.sampled_from([0] * 9 + [2])),
        )  # fmt: skip
        number += size
        if draw(st.integers(0, 19)) == 0:
            made = made[: draw(st.integers(0, len(made)))]
        packets.append(made)
    return packets


@settings(max_examples=150, deadline=None)
@given(traffic())
def test_both_merge_the_same_and_only_what_cutting_puts_back(packets):
    with both() as benches:
        frames = [bench.frames_from_underlay(*packets) for bench in benches]
        assert frames[0] == frames[1]
        assert benches[0].counted() == benches[1].counted()
        back = [returned(bench, frames[0]) for bench in benches]
        assert back[0] == back[1]
        assert [without_id(it) for it in back[0]] == [without_id(it) for it in packets if len(it) >= 20 and whole(it)]


def whole(it):
    header = (it[0] & 15) * 4
    return header <= len(it) and struct.unpack_from("!H", it, 2)[0] == len(it)


def without_id(it):
    """With DF, ids mean nothing (RFC 6864), so merging may count them up."""
    return it[:4] + it[6:10] + it[12:] if it[6] & 0x40 else it


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.tuples(
                st.sampled_from([0, 1, 1, 2]), st.sampled_from([0, TCPV4, UDP_L4, TCPV4 | ECN, 3, 4]),
                st.integers(0, 100), st.integers(0, 300), st.integers(0, 60), st.integers(0, 30),
            ),
            st.sampled_from([TCP, UDP]), st.binary(max_size=2000), FLAGS, st.sampled_from([b"", TIMESTAMPS]),
            st.integers(0, 2100), st.integers(0, 255),
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_both_cut_the_same_whatever_the_header_says(frames):
    made = []
    for header, protocol, payload, flags, options, cut, byte in frames:
        it = bytearray(packet(payload, out=True, protocol=protocol, flags=flags, options=options))
        if cut < len(it):
            it[cut] ^= byte
        it[16:20] = THEIRS
        made.append(VIRTIO.pack(*header) + bytes(it))
    with both() as benches:
        sent = [bench.frames_from_tun(*made) for bench in benches]
        assert sent[0] == sent[1]
        assert benches[0].relay.counters == benches[1].relay.counters


def test_a_header_too_short_is_dropped_to_a_known_destination_too(bench):
    fine = VIRTIO.pack(0, 0, 0, 0, 0, 0) + packet(b"", out=True)
    short = fine[: VIRTIO.size] + b"\x44" + fine[VIRTIO.size + 1 :]
    assert bench.frames_from_tun(fine, short) == [fine[VIRTIO.size :]]
    assert bench.counted()["out.drop.header"] == 1


@pytest.mark.slow
def test_the_core_touches_no_byte_that_is_not_its_own(tmp_path):
    """The tests of the compiled core once more, with a build that watches every access."""
    core = tmp_path / "core.so"
    sources = sorted(map(str, (ROOT / "src/wincey/tunnel/core").glob("*.c")))
    flags = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    watch = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["cc", *flags, *watch, "-o", core, *sources], check=True)
    libraries = [
        subprocess.run(
            ["cc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ, "TEST_CORE": str(core), "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }  # fmt: skip
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "(compiled or both) and not touches"]
    done = subprocess.run(
        [*argv, "tests/tunnel/test_large.py", "tests/tunnel/test_relay.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
