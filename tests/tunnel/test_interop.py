"""Every engine of the keeper at one end, every other one and flannel's proxy at the other; and engines that change under traffic."""

import asyncio
import contextlib
import itertools
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from support.packets import verify
from wincey.model.state import Tunnel
from wincey.tunnel import device
from wincey.tunnel.client import launch
from wincey.tunnel.control import PEER, connect, control_name, decode, encode

pytestmark = pytest.mark.root

PROXY = Path(__file__).parents[1] / "support" / "flannel_proxy.py"
PORT = (8285).to_bytes(2, "big")
ALL = 3  # ETH_P_ALL: packets that leave are seen by nobody else
ENGINES = ("compiled", "python", "plain", "proxy")

KEEPER = """
import sys
from wincey.tunnel import __main__, engines
if sys.argv[1] == "python":
    engines._compiled = lambda *arguments, **more: (None, "for a test")
sys.exit(__main__.main(sys.argv[2:]))
"""

RELEASED = """
import functools, sys
from wincey.tunnel import __main__, device, keeper
keeper.BUILD = "0/0.0.1"
keeper.open_tun = functools.partial(device.open_tun, header=False)  # what no engine but the plain one can use
show = keeper.Keeper._show
def old(self, client, header, body):
    frame, peers = keeper.decode(bytearray(show(self, client, header, body)))
    news = ("wanted", "engine", "core", "why", "check", "network", "lasts", "farewell")
    return keeper.encode({name: value for name, value in frame.items() if name not in news}, peers)
keeper.Keeper._show = old
sys.exit(__main__.main([*sys.argv[1:], "plain"]))
"""

SEND = """
import hashlib, random, socket, sys, time
data = random.Random(int(sys.argv[2])).randbytes(3_000_000)
with socket.create_connection((sys.argv[1], 5001), timeout=30) as sock:
    at = 0
    for size in (1, 1431, 1432, 1433, 4000, 65536, len(data)):  # of writes: small ones, a packet's, large ones
        sock.sendall(data[at : at + size])
        at += size
print(hashlib.sha256(data).hexdigest())
"""
RECEIVE = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 5001)) as server:
    print("ready", flush=True)
    sock, _ = server.accept()
    sock.settimeout(30)
    digest = hashlib.sha256()
    while data := sock.recv(1 << 20):
        digest.update(data)
print(digest.hexdigest())
"""
ECHO = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
sock.bind((sys.argv[1], 5002))
sock.settimeout(30)
print("ready", flush=True)
while True:
    data, sender = sock.recvfrom(65535)
    sock.sendto(data, sender)
"""
DATAGRAMS = """
import random, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(20)
sock.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT: hosts may fragment
sock.connect((sys.argv[1], 5002))
sizes = [0, 1, 18, 18, 18, 18, 17, 1400, 1400, 1400, 1443, 1444, 1445, 4000, 9000, 18]  # larger than 1444 is in fragments
sent = [random.Random(index).randbytes(size) for index, size in enumerate(sizes)]
for data in sent:
    sock.send(data)
heard = [sock.recv(65535) for _ in sent]
assert sorted(heard) == sorted(sent), [len(data) for data in heard]
# One call, many datagrams: segmentation of UDP in the sender's kernel.
sock.setsockopt(socket.IPPROTO_UDP, 103, 500)
data = random.Random(1).randbytes(500 * 20 + 7)
sock.send(data)
sock.setsockopt(socket.IPPROTO_UDP, 103, 0)
assert b"".join(sock.recv(65535) for _ in range(21)) == data
print("equal")
"""


@contextlib.contextmanager
def running(host, engine):
    """A keeper with that engine, or the proxy, joined to the other host."""
    other = 3 - host.number
    if engine == "proxy":
        route = f"10.3.{other}.0/24=10.99.0.{other}"
        with host.started(sys.executable, str(PROXY), "flannel0", host.local, "8285", route) as process:
            assert process.stdout.readline() == "ready\n"
            host.bring_up(mtu=1472)
            yield
            process.kill()
            process.wait()
        return
    path = control(host)
    wanted = "plain" if engine == "plain" else "offload"
    host.python(KEEPER, engine, path, "flannel0", "1472", host.local, "8285", wanted)
    try:
        ask(path, {"do": "peers"}, PEER.pack(bytes((10, 3, other, 0)), 24, bytes((10, 99, 0, other))))
        host.bring_up()
        shown = ask(path, {"do": "show"})
        assert (shown["engine"], shown["core"] or "plain") == (wanted, engine)
        yield
        drops = [name for name in ask(path, {"do": "show"})["counters"] if ".drop." in name]
        assert set(drops) <= {"out.drop.version"}
    finally:
        ask(path, {"do": "stop"})


def control(host):
    with host.inside():
        return str(host.directory / control_name("flannel0"))


def ask(path, header, body=b""):
    with connect(path, blocking=True) as sock:
        sock.settimeout(20)
        sock.sendall(encode(header, body))
        buffer = bytearray()
        while (frame := decode(buffer)) is None:
            data = sock.recv(65536)
            assert data
            buffer += data
    assert "error" not in frame[0], frame[0]
    return frame[0]


def segmenting(hosts, *, checksums):
    """Everything is cut to the MTU before the wire, and merged after it, as on many a network card.

    checksums: whether that card does the outer ones. Without, older kernels refuse trains (EIO).
    """
    for host in hosts:
        off = [
            "tso",
            "off",
            "gso",
            "off",
            "tx-udp-segmentation",
            "off",
            "gro",
            "on",
            "tx",
            "on" if checksums else "off",
        ]
        host.run("ethtool", "-K", "eth0", *off)


def transfer(a, b, seed):
    address = f"10.3.{b.number}.2"
    with b.container.started(sys.executable, "-c", RECEIVE, address) as receiver:
        assert receiver.stdout.readline() == "ready\n"
        sent = a.container.python(SEND, address, str(seed)).stdout
        return sent, receiver.communicate(timeout=30)[0]


def datagrams(a, b):
    address = f"10.3.{b.number}.2"
    with b.container.started(sys.executable, "-c", ECHO, address) as echo:
        assert echo.stdout.readline() == "ready\n"
        return a.container.python(DATAGRAMS, address, check=False)


@contextlib.contextmanager
def captured(host):
    """The IPv4 packets that cross the underlay, as far as the capture keeps up."""
    with host.inside():
        capture = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL))
    packets = []
    with capture:
        capture.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        capture.bind(("eth0", ALL))
        capture.setblocking(False)
        yield packets
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, (_, protocol, kind, *_) = capture.recvfrom(1 << 17)
                if kind == socket.PACKET_OUTGOING and protocol == 0x0800:  # what comes in is merged before it is seen
                    packets.append(packet)


@pytest.mark.parametrize("left", ENGINES)
def test_each_engine_talks_to_each_over_a_segmenting_underlay(hosts, left):
    a, b = hosts
    checksums = left in ("compiled", "python")
    segmenting(hosts, checksums=checksums)
    for host in hosts:
        host.container.run("sysctl", "-qw", "net.ipv4.tcp_ecn=1")
    with running(a, left):
        for seed, right in enumerate(ENGINES):
            if "proxy" in (left, right) and ENGINES.index(left) > ENGINES.index(right):
                continue  # tried the other way round
            with running(b, right), captured(a) as packets:
                for sender, receiver in ((a, b), (b, a)):
                    sent, arrived = transfer(sender, receiver, seed)
                    assert sent == arrived
                    if "proxy" not in (
                        left,
                        right,
                    ):  # flannel's own takes no packet larger than its buffer, and is slow
                        done = datagrams(sender, receiver)
                        assert done.stdout == "equal\n", done.stderr
            datagram = [packet for packet in packets if packet[9] == 17 and packet[22:24] == PORT]
            for packet in datagram:
                verify(packet[28:] if checksums else packet)
            assert len(datagram) > 100
            assert max(map(len, datagram)) <= 1500


@pytest.mark.parametrize("left", ["compiled", "python"])
def test_each_engine_talks_to_each_over_an_offloading_underlay(hosts, left):
    a, b = hosts
    with running(a, left):
        for seed, right in enumerate(ENGINES):
            with running(b, right):
                for sender, receiver in ((a, b), (b, a)):
                    sent, arrived = transfer(sender, receiver, seed)
                    assert sent == arrived


async def test_nothing_is_lost_while_engines_change_and_keepers_hand_over(hosts):
    a, b = hosts
    with running(b, "compiled"), running(a, "compiled"):
        path = control(a)
        state = {"do": "configure", "mtu": 1472, "local": a.local, "port": 8285}
        ping = ("ping", "-n", "-i", "0.001", "-c", "6000", "-W", "10", "10.3.2.2")
        with a.container.started(*ping) as pinging:
            seen, pids = [], set()
            for engine in itertools.islice(itertools.cycle(["plain", "offload"]), 10):
                ask(path, {**state, "engine": engine})
                seen.append(ask(path, {"do": "show"})["engine"])
                if engine == "plain":
                    with a.inside():
                        await launch(Path(path))
                pids.add(ask(path, {"do": "show"})["pid"])
                await asyncio.sleep(0.05)
            assert pinging.poll() is None
            output, _ = await asyncio.to_thread(pinging.communicate, timeout=60)
        answered = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", output)}
        assert set(range(1, max(answered))) - answered == set()
        assert max(answered) > 5900  # for the last answers ping itself waits no longer than for the others
        assert seen == ["plain", "offload"] * 5
        assert len(pids) == 5


async def test_a_keeper_of_a_released_version_is_taken_over_and_its_device_opened_anew(hosts):
    a, b = hosts
    with running(b, "plain"):
        path = control(a)
        a.python(RELEASED, path, "flannel0", "1472", a.local, "8285")
        ask(path, {"do": "peers"}, PEER.pack(bytes((10, 3, 2, 0)), 24, bytes((10, 99, 0, 2))))
        a.bring_up()
        tunnel, peer = a.objects()
        assert (await a.observe())[tunnel.key].engine == "plain"
        with a.container.started("ping", "-n", "-q", "-i", "0.001", "-c", "1500", "-W", "10", "10.3.2.2") as pinging:
            await asyncio.sleep(0.3)
            found = await a.observe([tunnel, peer])
            for _ in range(200):  # until the old one is gone
                if ask(path, {"do": "show"})["engine"] == "offload":
                    break
                await asyncio.sleep(0.05)
            output, _ = await asyncio.to_thread(pinging.communicate, timeout=60)
        assert isinstance(found[tunnel.key], Tunnel)
        assert ask(path, {"do": "show"})["engine"] == "offload"
        sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", output).groups())
        assert sent - received <= 2  # the device stands alone for a tenth of a millisecond
        routes = a.ip("route", "show", "dev", "flannel0").stdout
        assert "10.3.0.0/16" in routes
        assert transfer(a, b, 1)[0] == transfer(a, b, 1)[1]
        ask(path, {"do": "stop"})


def test_a_released_version_is_given_what_it_knows(hosts):
    """It asks without saying that it can take the virtio header, or merged datagrams."""
    a, b = hosts
    with running(b, "compiled"), running(a, "compiled"):
        path = control(a)
        state = {"do": "configure", "mtu": 1472, "local": a.local, "port": 8285}
        ask(path, {**state, "lasts": True})
        with connect(path, blocking=True) as sock:
            sock.settimeout(20)
            sock.sendall(encode({"do": "handover"}))
            _, descriptors, _, _ = socket.recv_fds(sock, 65536, 2)
            tun, udp = descriptors
            with socket.socket(fileno=udp) as received:
                assert not device.has_header(tun)
                assert received.getsockopt(socket.IPPROTO_UDP, 104) == 0  # UDP_GRO
                assert received.getsockname() == (a.local, 8285)

            os.close(tun)
        shown = ask(path, {"do": "show"})
        assert (shown["engine"], shown["lasts"]) == ("plain", False)  # and goes on so, as nobody has taken over
        sent, arrived = transfer(a, b, 1)
        assert sent == arrived
        sent, arrived = transfer(b, a, 2)
        assert sent == arrived
        ask(path, {**state, "lasts": True})
        ask(path, {**state, "engine": "offload"})
        shown = ask(path, {"do": "show"})
        assert (shown["engine"], shown["lasts"], shown["why"]) == ("offload", True, "")


def test_an_engine_falls_back_and_says_why(host):
    path = control(host)
    host.directory.mkdir(exist_ok=True)
    with running(host, "python"):
        assert ask(path, {"do": "show"})["why"] == "no compiled core: for a test"
        with connect(path, blocking=True) as sock:
            sock.sendall(encode({"do": "configure", "mtu": 1472, "local": host.local, "port": 8285, "engine": "warp"}))
            buffer = bytearray(sock.recv(65536))
        assert "an engine is one of offload, plain, not 'warp'" in str(decode(buffer))
