"""The ovs backend between hosts that each have an Open vSwitch of their own, with the user-space datapath."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from support.keys import delete, lease_key, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab import ovs
from wincey.lab.node import own_flanneld
from wincey.lab.plan import network_config

BRIDGE = "flannel-ovs"
MTU = {"vxlan": 1450, "gre": 1458, "geneve": 1450}
TUNNEL = {"vxlan": "udp port 4789", "gre": "ip proto 47"}


@pytest.fixture
def ovs_lab(make_lab):
    """Labs whose ovs-vswitchd may be ended by pid: what is left of it goes with the namespaces."""

    def make(tunnel="vxlan", **spec):
        families = spec.pop("families", (4,))
        return make_lab(config=network_config("ovs", families, Tunnel=tunnel, **spec.pop("options", {})), **spec)

    return make


def vsctl(host, *words):
    socket = f"--db=unix:{host.ovs_directory}/db.sock"
    return host.exec(["ovs-vsctl", socket, "--timeout=10", *words], check=True).stdout.strip()


def ofctl(host, *words):
    [command, *rest] = words
    target = f"unix:{host.ovs_directory}/{BRIDGE}.mgmt"
    return host.exec(["ovs-ofctl", "--no-stats", "--names", command, target, *rest], check=True).stdout


def flows(host):
    return sorted(line.strip() for line in ofctl(host, "dump-flows").splitlines() if "actions=" in line)


def tunnels(host):
    return sorted(name for name in vsctl(host, "list-ports", BRIDGE).split() if re.fullmatch("[vgn][0-9a-f]{14}", name))


def routes(host):
    return host.exec(["ip", "route"], check=True).stdout


def neighbors(host):
    return host.exec(["ip", "neigh", "show", "nud", "permanent"], check=True).stdout


SEND = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
    s.bind((sys.argv[1], 0))
    for to in sys.argv[2:]:
        for _ in range(5):
            s.send(bytes.fromhex(to) + bytes.fromhex("02000000beef0806") + bytes(46))
"""
BROADCAST, MULTICAST, UNKNOWN = "ffffffffffff", "01005e0000fb", "02123456789a"


@pytest.mark.parametrize("tunnel", ["vxlan", "gre"])
def test_packets(ovs_lab, tmp_path, tunnel):
    """The matrix, a transfer, the MTU; and what one host sends to another, or to nobody, no third gets."""
    lab = ovs_lab(tunnel, hosts=3)
    assert lab.ping(patience=20).unreachable == []
    h1, _, h3 = lab.hosts
    first, second, third = lab.containers
    assert h1.mtu == json.loads(h1.exec(["ip", "-j", "link", "show", BRIDGE]).stdout)[0]["mtu"] == MTU[tunnel]
    capture = tmp_path / "h3.pcap"
    # At the far end of h3's cable, and only what is addressed to it: the switch between the hosts may flood.
    argv = ["tcpdump", "-n", "-U", "-i", "h3", "-w", str(capture), f"{TUNNEL[tunnel]} and host {h3.underlay(4)}"]
    tcpdump = lab.node("switch").popen(argv, stderr=subprocess.PIPE, text=True)

    def seen():
        return h1.exec(["tcpdump", "-n", "-r", str(capture)]).stdout.splitlines()

    try:
        assert any("listening" in line for line in tcpdump.stderr)
        sent, received = transfer(first, second, 4, megabytes=20)
        assert sent == received
        # A learning switch would flood these.
        h1.exec([sys.executable, "-c", SEND, BRIDGE, BROADCAST, MULTICAST, UNKNOWN], check=True)
        # What does belong to h3 comes last: when it is captured, what came before would be too.
        assert ping(first, third.address(4), count=1)[0] == 0
        # tcpdump writes outer and inner header in one line or two.
        wait_until(lambda: sum("ICMP echo" in line for line in seen()) == 2)
        assert sum(h3.underlay(4) in line for line in seen()) == 2, seen()
        ofctl(h1, "add-flow", "priority=1,actions=NORMAL")  # now it floods, and that is seen here
        h1.exec([sys.executable, "-c", SEND, BRIDGE, BROADCAST, MULTICAST, UNKNOWN], check=True)
        wait_until(lambda: sum(h3.underlay(4) in line for line in seen()) >= 15)
    finally:
        tcpdump.send_signal(signal.SIGINT)
        tcpdump.wait(10)
        tcpdump.stderr.close()
    mtu_is_right(first, second, 4)


def test_nothing_is_lost_and_what_others_change_comes_back(ovs_lab, tmp_path):
    lab = ovs_lab(families=(4, 6), hosts=3)
    h1, h2, h3 = lab.hosts
    assert lab.ping(patience=20).unreachable == []
    # What is not ours, beside ours and on our bridge.
    vsctl(h1, "add-br", "foreign", "--", "set", "bridge", "foreign", "datapath_type=netdev")
    vsctl(
        h1,
        "add-port",
        "foreign",
        "theirs",
        "--",
        "set",
        "interface",
        "theirs",
        "type=gre",
        "options:remote_ip=10.99.0.9",
    )
    vsctl(h1, "add-port", BRIDGE, "visitor", "--", "set", "interface", "visitor", "type=internal")
    ofctl(h1, "add-flow", "cookie=0x77,priority=7,dl_dst=02:00:00:00:00:77,actions=drop")
    stream = ContinuousPing(lab.container("h1c1"), lab.container("h2c1"), tmp_path)
    try:
        for host in (h1, h2):
            host.kill_daemon()
            time.sleep(0.3)
            host.start_daemon()
        before = tunnels(h1), flows(h1)
        assert len(before[0]) == 2
        assert len(before[1]) == 4

        # By hand: a port deleted, another's remote changed; both lead to h3, whose packets nobody counts.
        [port] = [name for name in before[0] if name.endswith("0a630003")]
        vsctl(h1, "del-port", BRIDGE, port)
        wait_until(lambda: tunnels(h1) == before[0] and flows(h1) == before[1])
        vsctl(h1, "set", "interface", port, "options:remote_ip=10.99.0.77")
        wait_until(lambda: "10.99.0.3" in vsctl(h1, "get", "interface", port, "options"))
        vsctl(h1, "set", "interface", port, "type=gre")
        wait_until(lambda: vsctl(h1, "get", "interface", port, "type") == "vxlan")
        wait_until(lambda: flows(h1) == before[1])
        assert lab.ping(patience=20).unreachable == []

        assert "visitor" in vsctl(h1, "list-ports", BRIDGE)
        h3.stop_daemon()
        gone = [str(gateway.network) for gateway in h3.gateways]
        base = str(h3.gateways[0].network[0])
        delete(lab, lease_key(h3))
        wait_until(lambda: len(tunnels(h1)) == 1 and len(flows(h1)) == 3 and gone[0] not in routes(h1))
        assert base not in neighbors(h1)
        assert gone[1] not in h1.exec(["ip", "-6", "route"]).stdout
        time.sleep(0.5)
        total, lost = stream.sent_and_lost()
    finally:
        stream.kill()
    assert total > 200
    assert lost == 0, f"{lost} of {total} lost"

    h1.stop_daemon()
    done = h1.exec(
        [*own_flanneld(), "--cleanup", f"--subnet-file={h1.subnet_file}"], env={**os.environ, **h1.variables}
    )
    assert done.returncode == 0, done.stderr
    assert set(vsctl(h1, "list-br").split()) == {"eth0", "foreign"}
    assert vsctl(h1, "list-ports", "foreign") == "theirs"
    assert h1.exec(["ip", "link", "show", BRIDGE]).returncode != 0
    assert str(h2.gateways[0].network) not in routes(h1)


def test_foreign_flows_stay_and_a_new_vswitchd_gets_ours(ovs_lab):
    """With another encapsulation afterwards: the ports are new ones."""
    lab = ovs_lab("gre")
    h1 = lab.hosts[0]
    assert lab.ping(patience=20).unreachable == []
    ofctl(h1, "add-flow", "cookie=0x77,priority=7,dl_dst=02:00:00:00:00:77,actions=drop")
    ours = [line for line in flows(h1) if "0x77," not in line]
    assert len(ours) == 2
    ofctl(h1, "add-flow", "cookie=0x78,priority=8,dl_dst=02:00:00:00:00:78,actions=drop")
    pid = int((h1.ovs_directory / "ovs-vswitchd.id").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    ovs.start_switch(h1, h1.ovs_directory)
    wait_until(lambda: flows(h1) == ours)
    assert lab.ping(patience=20).unreachable == []

    ofctl(h1, "add-flow", "cookie=0x77,priority=7,dl_dst=02:00:00:00:00:77,actions=drop")
    lab.store.put_config(network_config("ovs", Tunnel="geneve", VNI=77))
    for host in lab.hosts:
        wait_until(lambda host=host: [name[:7] for name in tunnels(host)] == ["n00004d"])
    assert lab.ping(patience=20).unreachable == []
    assert any("cookie=0x77," in line for line in flows(h1))
    for host in lab.hosts:
        wait_until(lambda host=host: host.env.mtu == MTU["geneve"])
        host.attach()
    sent, received = transfer(*lab.containers, 4, megabytes=20)
    assert sent == received
    mtu_is_right(*lab.containers, 4)


def test_open_vswitch_is_not_there(make_lab):
    """A host says in one line what it lacks, and another's bridge of that name is not taken."""
    lab = make_lab(config=network_config("ovs"), hosts=1, start=[])
    [host] = lab.hosts
    there = {**os.environ, **host.variables}
    done = host.exec(host.argv(), env={**there, "OVS_RUNDIR": str(host.directory / "nowhere")})
    assert done.returncode == 1
    assert "openvswitch-switch" in done.stderr
    vsctl(host, "add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
    host.start_daemon(wait=False)
    wait_until(lambda: any(f"a bridge {BRIDGE} is there that Wincey did not make" in line for line in host.log()))
    assert vsctl(host, "list-ports", BRIDGE) == ""
    wait_until(lambda: not host.running)
    vsctl(host, "del-br", BRIDGE)
    host.start_daemon()
    assert len(flows(host)) == 1
