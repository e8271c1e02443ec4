"""What containers on two hosts see of the tunnel."""

import asyncio
import re
import socket
import struct
import sys
from pathlib import Path

import pytest

from wincey.model.checksum import checksum
from wincey.tunnel.packet import fault

pytestmark = pytest.mark.root

PROXY = Path(__file__).parents[1] / "support" / "flannel_proxy.py"

SEND = """
import hashlib, os, socket
data = os.urandom(10 << 20)
with socket.create_connection(("10.3.2.2", 5001), timeout=30) as sock:
    sock.sendall(data)
print(hashlib.sha256(data).hexdigest())
"""
RECEIVE = """
import hashlib, socket
with socket.create_server(("10.3.2.2", 5001)) as server:
    print("ready", flush=True)
    sock, _ = server.accept()
    sock.settimeout(30)
    digest = hashlib.sha256()
    while data := sock.recv(1 << 20):
        digest.update(data)
print(digest.hexdigest())
"""
CONNECT = """
import errno, socket, sys
try:
    socket.create_connection((sys.argv[1], 80), timeout=10)
except OSError as error:
    print(errno.errorcode.get(error.errno, error))
"""


def transfer(a, b):
    with b.container.started(sys.executable, "-c", RECEIVE) as receiver:
        assert receiver.stdout.readline() == "ready\n"
        sent = a.container.python(SEND).stdout
        return sent, receiver.communicate(timeout=30)[0]


def received(output):
    return tuple(map(int, re.search(r"(\d+) packets transmitted, (\d+) received", output).groups()))


@pytest.mark.parametrize("size", [0, 1, 100, 1443, 1444])
async def test_packets_of_every_size_up_to_the_mtu_pass_with_df(joined, size):
    a, b = joined
    assert received(a.container.ping("10.3.2.2", "-M", "do", "-s", str(size))) == (3, 3)
    assert received(b.container.ping("10.3.1.2", "-M", "do", "-s", str(size))) == (3, 3)


async def test_a_packet_above_the_mtu_is_answered_with_frag_needed(joined):
    a, _ = joined
    output = a.container.ping("10.3.2.2", "-M", "do", "-s", "1445", count=1)
    assert "Frag needed and DF set (mtu = 1472)" in output or "mtu=1472" in output
    assert received(a.container.ping("10.3.2.2", "-M", "dont", "-s", "4000")) == (3, 3)


async def test_the_tunnel_is_a_link_and_costs_no_ttl(joined):
    a, _ = joined
    output = a.container.ping("10.3.2.2")
    assert output.count("ttl=62") == 3  # two hosts forwarded


async def test_each_host_answers_for_an_expired_ttl(joined):
    a, _ = joined
    for ttl, answers in ((1, "From 10.3.1.1 "), (2, "From 10.3.2.0 ")):
        output = a.container.ping("10.3.2.2", "-t", str(ttl), count=1)
        assert answers in output
        assert "Time to live exceeded" in output
    assert received(a.container.ping("10.3.2.2", "-t", "3")) == (3, 3)


async def test_a_transfer_arrives_whole_and_every_packet_has_its_checksums(joined):
    a, b = joined
    for host in joined:  # so that the capture sees what a wire would
        host.run("ethtool", "-K", "eth0", "tx-udp-segmentation", "off")
    with a.inside():
        capture = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with capture:
        capture.bind(("eth0", 0x0800))
        capture.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        capture.setblocking(False)
        sent, arrived = transfer(a, b)
        inner = 0
        while True:
            try:
                outer, _ = capture.recvfrom(65535)
            except BlockingIOError:
                break
            header = (outer[0] & 15) * 4
            if outer[9] != 17 or struct.unpack_from("!H", outer, header + 2)[0] != 8285:
                continue
            packet = outer[header + 8 :]
            assert fault(packet) == ""
            assert checksum(packet[: (packet[0] & 15) * 4]) == 0
            if packet[9] == 6:
                segment = packet[(packet[0] & 15) * 4 :]
                assert checksum(packet[12:20] + struct.pack("!HH", 6, len(segment)) + segment) == 0
                inner += 1
    assert sent == arrived
    assert inner > 100  # the capture loses some on a busy machine


async def test_an_unknown_subnet_is_unreachable_for_containers_and_host(joined):
    a, _ = joined
    assert a.container.python(CONNECT, "10.3.99.1").stdout == "ENETUNREACH\n"
    assert a.python(CONNECT, "10.3.99.1").stdout == "ENETUNREACH\n"
    assert "From 10.3.1.0 icmp_seq=1 Destination Net Unreachable" in a.container.ping("10.3.99.1", count=1)
    assert (await a.counters())["out.drop.no-peer"] >= 3


async def test_unreachables_are_limited(joined):
    a, _ = joined
    flood = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(3000):
    sock.sendto(b"x", ("10.3.99.1", 9))
"""
    a.container.python(flood)
    for _ in range(100):  # until the keeper has come to all of it
        counters = await a.counters()
        if counters["out.drop.no-peer"] > counters["out.unreachable"] >= 50:
            break
        await asyncio.sleep(0.1)
    assert counters["out.drop.no-peer"] > counters["out.unreachable"] >= 50


async def test_ipv6_solicitations_are_not_sent(joined):
    a, _ = joined
    a.python("import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM); "
             "s.sendto(bytes([0x60]) + bytes(47), ('flannel0', 0x86dd))")  # fmt: skip
    assert (await a.counters())["out.drop.version"] >= 1
    assert received(a.container.ping("10.3.2.2")) == (3, 3)


async def test_a_narrow_underlay_fragments(joined):
    a, b = joined
    for host in joined:
        host.ip("link", "set", "eth0", "mtu", "1300")
    assert received(a.container.ping("10.3.2.2", "-M", "do", "-s", "1444")) == (3, 3)
    sent, arrived = transfer(a, b)
    assert sent == arrived


async def test_garbage_from_the_underlay_harms_nothing(joined):
    a, b = joined
    b.python("""
import os, random, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(2000):
    sock.sendto(os.urandom(random.randrange(200)), ("10.99.0.1", 8285))
""")
    b.ip("addr", "add", "10.99.0.77/24", "dev", "eth0")
    b.python("""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("10.99.0.77", 8285))
sock.sendto(bytes([0x45, 0, 0, 20]) + bytes(16), ("10.99.0.1", 8285))
""")
    assert received(a.container.ping("10.3.2.2")) == (3, 3)
    counters = await a.counters()
    assert counters["in.drop.version"] > 0
    assert counters["in.unknown-source"] >= 1


async def test_the_one_packet_proxy_of_flannel_understands_it(hosts):
    a, b = hosts
    assert await a.apply(a.objects()) == []
    a.bring_up()
    routes = ("10.3.9.0/24=10.99.0.9", "10.3.1.0/24=10.99.0.1")
    with b.started(sys.executable, str(PROXY), "flannel0", "10.99.0.2", "8285", *routes) as proxy:
        assert proxy.stdout.readline() == "ready\n"
        b.bring_up(mtu=1472)
        output = a.container.ping("10.3.2.2", "-M", "do", "-s", "1444")
        assert received(output) == (3, 3)
        assert output.count("ttl=61") == 3  # the proxy takes one more
        assert received(b.container.ping("10.3.1.2", "-M", "do", "-s", "1444")) == (3, 3)
        for sent, arrived in (transfer(a, b), transfer(a, b)):
            assert sent == arrived
    counters = await a.counters()
    assert not [name for name in counters if ".drop." in name and name != "out.drop.version"]
