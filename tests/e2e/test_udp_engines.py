"""The udp backend's engine in the kernel between hosts: beside other engines, through deaths, switches, upgrades and damage."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from support.keys import wait_until
from support.packets import read_capture, verify
from support.traffic import ContinuousPing, ping, transfer
from wincey.bpf import udp
from wincey.bpf.bpffs import owner_directory
from wincey.bpf.program import read_baked
from wincey.kernel.diff import diff
from wincey.lab.namespace import call_in
from wincey.lab.node import own_flanneld
from wincey.model.address import Subnet, parse_address
from wincey.model.report import StatusReport
from wincey.model.state import Scope
from wincey.model.udp import BpfTunnel

WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")
PAIRS = {"flannel0-f0", "flannel0-f1", "flannel0-m0", "flannel0-m1"}
FAST = 0.001  # seconds between echo requests


def network(host):
    """What the daemon says of its network."""
    done = host.exec([WINCEY, "status", "--json"], timeout=30)
    assert done.stdout, done.stderr
    (report,) = msgspec.json.decode(done.stdout, type=StatusReport).networks
    return report


def engine(host):
    """What carries its packets, as the daemon says."""
    return network(host).engine


def pins(host):
    """Where the host's programs are pinned."""
    return call_in(host.netns, lambda: owner_directory("udp", host.directory / "wincey" / "subnet"))


def keeper(host):
    """The pid of the process beside the programs."""
    found = subprocess.run(["pgrep", "-f", f"wincey.tunnel {host.directory}/"], check=False, stdout=subprocess.PIPE)
    pids = [int(pid) for pid in found.stdout.split()]
    return pids[0] if len(pids) == 1 else None


def links(host):
    return set(re.findall(r"^\d+: ([^:@]+)", host.exec(["ip", "-o", "link"]).stdout, re.MULTILINE))


def with_engine(name, *before):
    return shlex.join([*before, *own_flanneld(), f"--udp-engine={name}", "FLAGS"]).replace("FLAGS", FLAGS)


FLAGS = "--iface={iface} --subnet-file={subnet_file} --store={store} --etcd-prefix={etcd_prefix}"


def answered(flow):
    """How many requests were sent, and which had no answer while later ones had. Ends the flow."""
    sent, _ = flow.sent_and_lost()
    numbers = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", flow.path.read_text())}
    return sent, sorted(set(range(1, max(numbers))) - numbers)


@contextmanager
def capture(host, path: Path):
    """What comes in at a host's underlay, whole."""
    argv = [
        "tcpdump",
        "-i",
        "eth0",
        "-n",
        "-s",
        "0",
        "-c",
        "20000",
        "-Q",
        "in",
        "-w",
        str(path),
        "-U",
        "udp",
        "port",
        "8285",
    ]
    with host.popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while "listening" not in process.stderr.readline():
            assert process.poll() is None
        try:
            yield
        finally:
            time.sleep(0.3)
            process.terminate()


@pytest.mark.parametrize("segmenting", [True, False], ids=["segmenting", "whole"])
def test_every_engine_understands_every_other(make_lab, tmp_path, segmenting):
    """On a wire that carries packets whole, only a kernel may get them unfinished."""
    engines = {"h1": "bpf", "h2": "bpf", "h3": "plain"}
    lab = make_lab(
        "udp", hosts=3, segmenting=segmenting, daemons={host: with_engine(name) for host, name in engines.items()}
    )
    for host in lab.hosts if segmenting else ():  # nor does the card fill in checksums
        assert host.exec(["ethtool", "-K", "eth0", "tx", "off"]).returncode == 0
    told = {host.name: engine(host) for host in lab.hosts}
    assert {name: report.name for name, report in told.items()} == engines
    one = lab.containers[0]
    for other, host in zip(lab.containers[1:], lab.hosts[1:], strict=True):
        with capture(host, tmp_path / "there.pcap"), capture(lab.hosts[0], tmp_path / "back.pcap"):
            for source, target in ((one, other), (other, one)):
                sent, received = transfer(source, target, megabytes=4)
                assert sent == received
            assert ping(one, other.address(4), "-s", "3000")[0] == 0  # in fragments
        paths = [tmp_path / "there.pcap", tmp_path / "back.pcap"] if segmenting else []
        if not segmenting and engines[host.name] != "bpf":
            paths = [tmp_path / "there.pcap"]
        for path in paths:
            seen = [verify(packet) for packet in read_capture(path)]
            assert len(seen) > 100
            assert {packet.wrapped for packet in seen} == {True}
            assert max(packet.size for packet in seen) <= lab.hosts[0].mtu
    counted = engine(lab.hosts[0]).counters["kernel"]
    assert counted["out.packets"] > 2000
    assert counted["in.packets"] > 2000
    assert counted["out.cut"] > 1000  # for those whose other end is a process
    assert counted["in.drop.source"] == 0
    (device,) = network(lab.hosts[0]).traffic
    assert device.transmit_packets >= counted["out.packets"]
    assert device.receive_bytes >= counted["in.bytes"]
    what_the_host_answers(lab)


def what_the_host_answers(lab):
    """Routing, TTL and MTU are the host's own business, and its answers are its own."""
    one, other = lab.containers[:2]
    address = other.address(4)
    assert "Time to live exceeded" in ping(one, address, "-t", "1")[1]
    assert ping(one, address, "-t", "3")[0] == 0
    assert re.search(r"[Ff]rag needed|message too long", ping(one, address, "-M", "do", "-s", "2000")[1])
    assert ping(one, address, "-M", "do", "-s", str(lab.hosts[0].mtu - 28))[0] == 0
    nobody = next(f"10.5.{number}.9" for number in range(1, 200) if not _leased(lab, f"10.5.{number}."))
    assert "Net Unreachable" in ping(one, nobody)[1]
    assert engine(lab.hosts[0]).counters["kernel"]["out.passed"] > 0


def _leased(lab, start):
    return any(container.address(4).startswith(start) for container in lab.containers)


def test_packets_flow_with_nobody_there_and_damage_is_repaired(make_lab, tmp_path):
    lab = make_lab("udp", segmenting=True)
    h1, h2 = lab.hosts
    one, two = lab.containers
    assert engine(h1).name == "bpf"
    wait_until(lambda: ping(*_ends(lab), count=1)[0] == 0)
    flow = ContinuousPing(one, two, tmp_path, interval=FAST)
    try:
        for host in (h1, h2):
            host.kill_daemon()
            os.kill(keeper(host), signal.SIGKILL)
        time.sleep(0.5)
        assert ping(two, one.address(4))[0] == 0
        sent, received = transfer(one, two, megabytes=4)
        assert sent == received
        for host in (h1, h2):
            host.start_daemon()
        wait_until(lambda: keeper(h1) and keeper(h2))
        sent, lost = answered(flow)
    finally:
        flow.kill()
    assert sent > 300
    assert lost == []
    damages = [
        ("ip link delete flannel0-m0", lambda: links(h1) >= PAIRS),
        ("ip link delete flannel0-f1", lambda: links(h1) >= PAIRS),
        (f"rm {pins(h1)}/link_flannel0_egress_*", lambda: list(pins(h1).glob("link_flannel0_egress_*"))),
        (f"rm -r {pins(h1)}", lambda: len(list(pins(h1).glob("link_*"))) == 4),
    ]
    for damage, mended in damages:
        assert h1.exec(["sh", "-c", damage]).returncode == 0
        if "rm" in damage:  # nobody tells of pins: it is found by the next audit, which a device of ours brings about
            h1.exec(["ip", "link", "set", "flannel0", "down"])
        wait_until(mended)
        wait_until(lambda: ping(one, two.address(4), count=1)[0] == 0)
    assert engine(h1).name == "bpf"
    before = engine(h1).counters["kernel"]["out.packets"]
    assert transfer(one, two, megabytes=1)
    assert engine(h1).counters["kernel"]["out.packets"] > before + 500
    h1.stop_daemon()
    cleaned = h1.exec([*own_flanneld(), f"--subnet-file={h1.subnet_file}", "--cleanup"])
    assert cleaned.returncode == 0, cleaned.stderr
    assert not links(h1) & {*PAIRS, "flannel0"}
    assert not pins(h1).exists()
    # The other host's keeper ends by itself, with no daemon there, as for flannel: it takes the programs with it.
    h2.kill_daemon()
    os.kill(keeper(h2), signal.SIGTERM)
    wait_until(lambda: not links(h2) & {*PAIRS, "flannel0"} and not pins(h2).exists())


def test_engines_are_switched_without_a_packet_lost(make_lab, tmp_path):
    lab = make_lab("udp", segmenting=True, daemons={"h1": with_engine("bpf"), "h2": with_engine("bpf")})
    h1, h2 = lab.hosts
    wait_until(lambda: ping(*_ends(lab), count=1)[0] == 0)
    flow = ContinuousPing(*lab.containers, tmp_path, interval=FAST)
    try:
        for host, name in ((h1, "offload"), (h2, "plain"), (h1, "bpf")):
            host.stop_daemon()
            host.start_daemon(with_engine(name))
            wait_until(lambda host=host, name=name: engine(host) and engine(host).name == name)
            wait_until(lambda host=host, name=name: (links(host) >= PAIRS) is (name == "bpf"))
        sent, lost = answered(flow)
    finally:
        flow.kill()
    assert sent > 1000
    assert lost == []
    assert [engine(host).name for host in lab.hosts] == ["bpf", "plain"]


def test_twenty_upgrades_lose_no_packet(make_lab, tmp_path, monkeypatch):
    """Releases whose map of routes has another layout each time: it is filled anew before a program reads it."""
    lab = make_lab("udp", segmenting=True)
    h1 = lab.hosts[0]
    released = read_baked("udp")
    entries = itertools.cycle([1 << 15, 1 << 16])

    def upgrade():
        layout = msgspec.structs.replace(released.maps["routes"], entries=next(entries))
        release = msgspec.structs.replace(released, maps=released.maps | {"routes": layout})
        monkeypatch.setattr(udp, "read_baked", lambda name: release)
        asyncio.run(take_over())
        return [path.name for path in pins(h1).iterdir() if path.is_dir()] == [release.digest]

    async def take_over():
        driver = udp.BpfTunnelDriver(h1.directory / "wincey" / "subnet")
        assert len(desired) == 2
        failures = await driver.apply(diff(desired, await driver.observe(desired, Scope())))
        assert not failures
        assert await driver.observe(desired, Scope()) == desired
        await driver.close()

    wait_until(lambda: ping(*_ends(lab), count=1)[0] == 0)
    desired = call_in(h1.netns, lambda: asyncio.run(as_it_is(h1)))
    h1.kill_daemon()
    flow = ContinuousPing(*lab.containers, tmp_path, interval=FAST)
    try:
        assert all(call_in(h1.netns, upgrade) for _ in range(20))
        sent, lost = answered(flow)
    finally:
        flow.kill()
    assert sent > 300
    assert lost == []


async def as_it_is(host):
    """The tunnel and its peers, as the driver finds them."""
    network, local = Subnet.parse("10.5.0.0/16"), parse_address(host.underlay(4))
    tunnel = BpfTunnel("flannel0", host.mtu, "eth0", local, 8285, network, "network")
    driver = udp.BpfTunnelDriver(host.directory / "wincey" / "subnet")
    found = await driver.observe({tunnel.key: tunnel}, Scope())
    await driver.close()
    assert found[tunnel.key] == tunnel
    return found


def test_without_the_capability_another_engine_is_chosen_and_it_is_said_why(make_lab):
    deprived = ["setpriv", "--bounding-set=-bpf,-sys_admin"]  # with CAP_PERFMON
    lab = make_lab("udp", daemons={"h1": with_engine("auto", *deprived)})
    h1, h2 = lab.hosts
    assert engine(h1).name == "offload"
    assert "bpf: this process lacks the capability CAP_BPF" in engine(h1).why
    assert any("udp engine: offload (bpf: this process lacks" in line for line in h1.log())
    assert engine(h2).name == "bpf"
    assert ping(*_ends(lab))[0] == 0
    h1.stop_daemon()
    demanded = h1.exec([*deprived, *shlex.split(" ".join(h1.argv())), "--udp-engine=bpf"], timeout=30)
    assert demanded.returncode == 1
    assert "--udp-engine=bpf can't be had: this process lacks the capability CAP_BPF" in demanded.stderr


def _ends(lab):
    return lab.containers[0], lab.containers[1].address(4)


def test_what_stops_working_gives_way_to_another_engine(make_lab, tmp_path):
    """The programs go, and can't come back: their pairs' names are taken by somebody else's devices."""
    lab = make_lab("udp", segmenting=True)
    h1 = lab.hosts[0]
    one, two = lab.containers
    assert engine(h1).name == "bpf"
    for line in ("delete flannel0-m0", "add flannel0-m0 type bridge"):
        assert h1.exec(["ip", "link", *line.split()]).returncode == 0
    wait_until(lambda: engine(h1).name == "offload")
    assert "File exists" in engine(h1).why
    wait_until(lambda: not list(pins(h1).glob("link_*")))
    wait_until(lambda: ping(one, two.address(4), count=1)[0] == 0)
    sent, received = transfer(two, one, megabytes=4)
    assert sent == received
