"""The fast path on the wire: the same bytes as without it, so that the other end may be anybody's, and every checksum right."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from support.fastpath import Talk, counted, echo, not_taken, taken
from support.interop import sh, standin
from support.packets import read_capture, verify
from support.traffic import transfer
from wincey.lab.node import own_flanneld
from wincey.lab.plan import network_config

WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")
FAST = ("--fast-path=on",)
OURS = shlex.join([*own_flanneld(), "--etcd-api=v3", *FAST])


class Capture:
    """All of a host's eth0 while it lasts."""

    def __init__(self, host, path):
        self._path = path
        self._process = host.popen(
            ["tcpdump", "-i", "eth0", "-s", "0", "-B", "65536", "-U", "-w", str(path), "ip"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "listening on" in self._process.stderr.readline()

    def verified(self):
        """What was seen, all of it right."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=10)
        return [verify(packet) for packet in read_capture(self._path)]

    def close(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def capture(tmp_path):
    captures = []

    def start(host):
        captures.append(Capture(host, tmp_path / f"{host.netns}-{len(captures)}.pcap"))
        return captures[-1]

    yield start
    for each in captures:
        each.close()


def finishing(lab):
    """Have everything finished before the wire, as a card without offloads does, so that a capture sees what would travel."""
    for host in lab.hosts:
        sh(host, "ethtool -K eth0 tx off")
    return lab


def wrapped(backend):
    return backend != "host-gw"


@pytest.mark.etcd
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_the_other_end_is_flannels(make_lab, capture, backend):
    """Which knows nothing of a fast path. A proxy that reads a socket gets what the ordinary path makes for it."""
    lab = finishing(
        make_lab(backend, store="etcd3", segmenting=True, ip_masq=True, daemons={"h1": OURS, "h2": standin()})
    )
    h1, (one, two) = lab.hosts[0], lab.containers
    assert lab.ping(patience=10).unreachable == []
    seen = capture(h1)
    for source, target in ((one, two), (two, one)):
        before = counted(h1)
        sent, received = transfer(source, target, megabytes=4)
        assert sent == received
        now = counted(h1)
        way = "out" if source is one else "in"
        assert (now[way] - before[way] > 20) == (backend != "udp")
    packets = [each for each in seen.verified() if each.protocol == 6 and each.source.startswith("10.5.")]
    assert len(packets) > 4000
    assert {each.wrapped for each in packets} == {wrapped(backend)}
    assert max(each.size for each in packets) == h1.mtu
    from_us = {each.ttl for each in packets if each.source == one.address(4)}
    assert from_us == {63}  # whichever path each of them took


def test_udp_with_programs_at_both_ends(make_lab, capture):
    lab = finishing(make_lab("udp", segmenting=True, options=FAST))
    h1, (one, two) = lab.hosts[0], lab.containers
    assert lab.ping(patience=10).unreachable == []
    seen = capture(h1)
    with taken(*lab.hosts, least=50):
        for source, target in ((one, two), (two, one)):
            sent, received = transfer(source, target, megabytes=4)
            assert sent == received
    packets = [each for each in seen.verified() if each.protocol == 6 and each.source.startswith("10.5.")]
    assert len(packets) > 4000
    assert {(each.wrapped, each.ttl) for each in packets} == {(True, 63)}
    status = json.loads(h1.exec([WINCEY, "status", "--json"], check=True).stdout)
    fast = status["networks"][0]["fast_path"]
    assert "between containers and eth0" in fast["way"]
    assert fast["counters"]["out"] >= counted(h1)["out"] - 50 > 0


@pytest.mark.parametrize(("backend", "segmenting"), [("vxlan", False), ("udp", False), ("udp", True)])
def test_bulk_stays_on_it(make_lab, backend, segmenting):
    """As large packets as a host makes, and segments that are merged on their way in."""
    lab = make_lab(backend, segmenting=segmenting, options=FAST)
    (h1, h2), (one, two) = lab.hosts, lab.containers
    assert lab.ping(patience=10).unreachable == []
    before = counted(h1)["out"], counted(h2)["in"]
    sent, received = transfer(one, two, megabytes=100)
    assert sent == received
    out, taken_in = counted(h1)["out"] - before[0], counted(h2)["in"] - before[1]
    assert min(out, taken_in) > 0.7 * 100e6 / h1.mtu, (out, taken_in)


def test_encapsulation_left_to_the_device(make_lab, tmp_path):
    """Where headers carry more than the programs know of (GBP), they hand packets to the tunnel's device."""
    lab = make_lab(config=network_config("vxlan", GBP=True), options=FAST)
    h1, (one, two) = lab.hosts[0], lab.containers
    assert lab.ping(patience=10).unreachable == []
    assert "and flannel.1, which encapsulates: group policy" in "\n".join(h1.log())
    unwrapped = counted(lab.hosts[1])["in"]
    with taken(*lab.hosts, least=50):
        sent, received = transfer(one, two, megabytes=50)
    assert sent == received
    assert counted(lab.hosts[1])["in"] - unwrapped > 10_000
    sh(
        h1,
        "nft 'add table ip test; add chain ip test f { type filter hook forward priority 0; }; add rule ip test f tcp dport 7 drop'",
    )
    with echo(two), not_taken(h1):
        talk = Talk(one, two.address(4), tmp_path)
        assert talk.stands_still()
        talk.close()
